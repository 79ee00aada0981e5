//! Settings of pre-warming, of the controller and of the agents.

use std::time::Duration;

use serde::Deserialize;

/// Settings of pre-warming.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrewarmConfig {
    /// How many images the controller seeds at once, and how many ImagePrewarms an agent warms at once.
    pub parallel_images: usize,
    /// Bytes a second that one process reads for it, at most: the controller of blobs, an agent of
    /// decompressed layers; 0: any number.
    pub bytes_per_second: u64,
    /// On a node, layers that nobody has used for so long are evicted to make room for what is to be warmed, in
    /// seconds; 0: none are. What is mounted never is.
    pub evict_unused_for_seconds: u64,
}

impl Default for PrewarmConfig {
    fn default() -> Self {
        Self {
            // While one is decompressed, another one waits for the network.
            parallel_images: 2,
            bytes_per_second: 0,
            // What a daily job needs stays.
            evict_unused_for_seconds: 86_400,
        }
    }
}

impl PrewarmConfig {
    /// How long something must have been unused to be evicted for what is to be warmed; `None`: nothing is.
    pub fn evict_unused_for(&self) -> Option<Duration> {
        match self.evict_unused_for_seconds {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        }
    }
}
