//! `NodeImageCache`: what a node's cache holds, and how far it has come with what is to be warmed there.

use k8s_openapi::{
    ClusterResourceScope,
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
};
use serde::{Deserialize, Serialize};

use super::resource;

/// Warm-ups that one object tells of, at most: at 300 bytes each it stays far below etcd's 1.5 MiB.
pub const MAX_WARMUPS: usize = 512;

/// A node's cache. It has the node's name, and goes with the node.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeImageCache {
    /// Name and the like.
    pub metadata: ObjectMeta,
    /// What the node says; written by it alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<NodeImageCacheStatus>,
}

resource!(
    NodeImageCache,
    "NodeImageCache",
    "nodeimagecaches",
    ClusterResourceScope
);

/// What the node says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeImageCacheStatus {
    /// When it said so: at a change, not at regular times.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_at: Option<Time>,
    /// What its cache held at that time.
    #[serde(default)]
    pub cache: CacheUsage,
    /// Its warm-ups, one for each ImagePrewarm.
    #[serde(default)]
    pub warmups: Vec<Warmup>,
    /// How many of these are ready, as `12/14`.
    #[serde(default)]
    pub warmups_ready: String,
}

/// What a cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CacheUsage {
    /// Bytes it may take on disk; 0 if the disk alone is the bound.
    #[serde(default)]
    pub capacity_bytes: i64,
    /// Bytes it takes.
    #[serde(default)]
    pub used_bytes: i64,
    /// Layers in it.
    #[serde(default)]
    pub layers: i64,
}

/// How far a node has come with one ImagePrewarm.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Warmup {
    /// Uid of the ImagePrewarm.
    pub uid: String,
    /// Its namespace.
    #[serde(default)]
    pub namespace: String,
    /// Its name.
    #[serde(default)]
    pub name: String,
    /// Its revision that this is about (`status.revision`).
    #[serde(default)]
    pub revision: String,
    /// How far it is.
    #[serde(default)]
    pub phase: WarmupPhase,
    /// Bytes that are on the node's disk, of those that are wanted.
    #[serde(default)]
    pub bytes_done: i64,
    /// Bytes that are wanted.
    #[serde(default)]
    pub bytes_total: i64,
    /// When it began to be what it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// Why it failed, in a word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why it failed, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// How far a warm-up is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WarmupPhase {
    /// It waits for its turn on this node.
    #[default]
    Pending,
    /// It is under way.
    Warming,
    /// All that was wanted is on the node.
    Ready,
    /// It failed; the node tries again by itself.
    Failed,
}
