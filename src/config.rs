//! The configuration: defaults, then the file, then the command line.
//!
//! Each part's settings live beside what they configure; this file only puts them together.
//! `docs/CONFIGURATION.md` explains every key.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    layer::CacheConfig, mount::KernelMounts, prewarm::config::PrewarmConfig,
    registry::RegistryConfig, remote::RemoteConfig,
};

/// Says why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("configuration {path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value cannot be used.
    #[error("configuration {path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Which value, and what would do.
        reason: String,
    },
}

/// All settings.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The local disk cache.
    pub cache: CacheConfig,
    /// The remote content cache.
    pub remote: RemoteConfig,
    /// Registries.
    pub registry: RegistryConfig,
    /// What the kernel is told.
    pub fuse: FuseConfig,
    /// The CSI node service.
    pub node: NodeConfig,
    /// Pre-warming.
    pub prewarm: PrewarmConfig,
}

/// Settings of FUSE mounts.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FuseConfig {
    /// Threads that take requests of one mount from the kernel.
    pub threads_per_mount: usize,
    /// Threads of the process that wait for the cache disk.
    pub read_threads: usize,
    /// How far the kernel reads ahead, in KiB.
    pub read_ahead_kib: u32,
}

impl Default for FuseConfig {
    fn default() -> Self {
        Self {
            // One thread answers what needs no disk; more only wake each other up.
            threads_per_mount: 1,
            read_threads: 8,
            // 256 is best for a mix; 512 if large files dominate, 1024 hurts random faults.
            read_ahead_kib: 256,
        }
    }
}

/// Settings of the CSI node service.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// How long a publish waits for its image before it answers that work goes on, in seconds.
    ///
    /// Kubelet gives a call two minutes.
    pub publish_wait_seconds: u64,
    /// How long a mount waits for a server after one has died, before it is given up, in seconds.
    pub server_deadline_seconds: u64,
    /// How long a source mount is kept that no volume uses any more, in seconds.
    pub idle_source_seconds: u64,
    /// Which images the kernel serves by itself, without a server.
    pub kernel_mounts: KernelMounts,
    /// How long the end waits for uploads under way, in seconds; what is left is uploaded by the
    /// next start.
    pub drain_seconds: u64,
    /// How many bytes a pod may write to one volume; 0: no volume can be written to.
    ///
    /// It is memory, and accounted to the pod.
    pub max_writable_bytes: u64,
    /// How many volumes Kubernetes is to place on the node; 0: as many as memory and file descriptors of the
    /// node service allow.
    pub max_volumes: u32,
    /// How many volumes may be published in a second, beyond a burst of 512; 0: any number.
    pub publishes_per_second: u32,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            publish_wait_seconds: 100,
            // A pod is rescheduled, or an image pulled, in less; and who waits, waits in the kernel.
            server_deadline_seconds: 60,
            // A pod that is restarted finds it.
            idle_source_seconds: 60,
            kernel_mounts: KernelMounts::Whole,
            drain_seconds: 5,
            // Whoever runs the node decides about its memory.
            max_writable_bytes: 0,
            max_volumes: 0,
            // A new mount takes a few milliseconds, a question to a registry some tens.
            publishes_per_second: 20,
        }
    }
}

impl Config {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the line and the key.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let path = path.to_owned();
        match config.cache.check() {
            Ok(()) => Ok(config),
            Err(reason) => Err(ConfigError::Invalid { path, reason }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn the_empty_file_is_the_default() {
        let config: Config = toml::from_str("").unwrap();
        assert_eq!(config.cache, CacheConfig::default());
        assert_eq!(config.fuse, FuseConfig::default());
    }

    #[test]
    fn watermarks_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        for (text, expected) in [
            (
                "high_watermark_percent = 2\nlow_watermark_percent = 1",
                None,
            ),
            ("high_watermark_percent = 100", None),
            (
                "high_watermark_percent = 101",
                Some("cache.high_watermark_percent = 101: it must be from 1 to 100"),
            ),
            (
                "low_watermark_percent = 0",
                Some("cache.low_watermark_percent = 0: it must be from 1 to 100"),
            ),
            (
                "high_watermark_percent = 80",
                Some(
                    "cache.low_watermark_percent = 80 must be less than \
                     cache.high_watermark_percent = 80",
                ),
            ),
        ] {
            let mut file = std::fs::File::create(&path).unwrap();
            write!(file, "[cache]\n{text}\n").unwrap();
            let error = Config::read(&path).err().map(|it| it.to_string());
            let expected = expected.map(|it| format!("configuration {}: {it}", path.display()));
            assert_eq!(error, expected, "{text}");
        }
    }

    #[test]
    fn an_unknown_key_is_named() {
        let error = toml::from_str::<Config>("[cache]\nmax_bites = 1\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("max_bites"), "{error}");
    }
}
