//! `ImagePrewarm`: which images are to be where before pods ask for them.

use std::collections::BTreeMap;

use k8s_openapi::{
    NamespaceResourceScope,
    apimachinery::pkg::{
        apis::meta::v1::{Condition, LabelSelector, ObjectMeta, Time},
        util::intstr::IntOrString,
    },
};
use serde::{Deserialize, Serialize};

use super::resource;

/// Images that are to be in the remote content cache, or on nodes, before pods ask for them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImagePrewarm {
    /// Name, namespace and the like.
    pub metadata: ObjectMeta,
    /// What is wanted.
    pub spec: ImagePrewarmSpec,
    /// How far it has come; written by the controller alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<ImagePrewarmStatus>,
}

resource!(
    ImagePrewarm,
    "ImagePrewarm",
    "imageprewarms",
    NamespaceResourceScope
);

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImagePrewarmSpec {
    /// The images, from 1 to 32, each once; empty if `workloads` alone says which.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<ImageToWarm>,
    /// Workloads of the object's namespace whose volumes name further images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workloads: Option<Workloads>,
    /// Platforms to warm of multi-arch images, such as `linux/arm64`, 4 at most; the controller's own if empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub platforms: Vec<String>,
    /// Secrets with credentials of registries, in the namespace of the object, 8 at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub image_pull_secrets: Vec<PullSecretRef>,
    /// Where the images are wanted.
    #[serde(default)]
    pub target: Target,
    /// How much of them is wanted.
    #[serde(default)]
    pub content: Content,
    /// Labels that a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints in spite of which a node is warmed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tolerations: Vec<Toleration>,
    /// How many nodes warm at once: a number, or a share of them in percent; `10%` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<IntOrString>,
    /// Bytes a second that one node reads for it, at most; no bound if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second_per_node: Option<i64>,
    /// Bytes a second that all nodes together read for it, at most; no bound if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes_per_second: Option<i64>,
    /// Bytes that it may put on one node's disk; a node on which it would be more refuses it as `TooLarge`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes_per_node: Option<i64>,
    /// Which goes first where several wait, 0 to 100: the greater one.
    #[serde(default)]
    pub priority: i32,
    /// Seconds after which tags are looked up anew; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refresh_interval_seconds: Option<i64>,
    /// Seconds after its end in which the object is deleted; never if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds_after_finished: Option<i64>,
    /// Seconds after its start in which it must have come to its end, or it has failed; no bound if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_deadline_seconds: Option<i64>,
    /// Failed attempts at an image after which the image has failed.
    #[serde(default = "default_backoff_limit")]
    pub backoff_limit: i32,
    /// Stop all work for it, until this is false again.
    #[serde(default)]
    pub suspend: bool,
}

/// As a Job's.
fn default_backoff_limit() -> i32 {
    6
}

/// An image that is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageToWarm {
    /// The image: `registry/repository:tag` or `registry/repository@sha256:…`.
    pub image: String,
}

/// Workloads of the object's namespace: pods, and what makes pods.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Workloads {
    /// Which of them, by their own labels; all if absent or empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
}

/// A Secret in the namespace of the object.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullSecretRef {
    /// Its name.
    pub name: String,
}

/// Where images are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// In the remote content cache alone.
    Remote,
    /// On the disks of nodes.
    #[default]
    Nodes,
}

/// How much of an image is wanted on nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Content {
    /// What says which files there are: a mount is there at once, and reads come from the remote content cache.
    Index,
    /// That, and what was read first when the image was mounted before.
    Recorded,
    /// Every byte.
    #[default]
    All,
}

/// A taint, or several, in spite of which a node is warmed; means what it does in a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toleration {
    /// Key of the taint; all of them if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Whether the value counts.
    #[serde(default)]
    pub operator: TolerationOperator,
    /// Value of the taint, for `Equal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Effect of the taint; all of them if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effect: Option<String>,
}

/// Whether the value of a taint counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum TolerationOperator {
    /// It must be the toleration's.
    #[default]
    Equal,
    /// It may be any.
    Exists,
}

/// How far it has come.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImagePrewarmStatus {
    /// Generation of the spec that the rest is about.
    #[serde(default)]
    pub observed_generation: i64,
    /// All of it in a word.
    #[serde(default)]
    pub phase: Phase,
    /// `Seeded`, `Distributed` and `Ready`, each with what to do if it is not.
    #[serde(default)]
    pub conditions: Vec<Condition>,
    /// The images, for each platform.
    #[serde(default)]
    pub images: Vec<ImageStatus>,
    /// How many of them are seeded, as `1/2`.
    #[serde(default)]
    pub images_seeded: String,
    /// How many nodes are warm, as `97/100`.
    #[serde(default)]
    pub nodes_ready: String,
    /// Nodes that are to be warmed, by what became of it.
    #[serde(default)]
    pub nodes: NodeCounts,
    /// Some of the nodes on which it failed, 20 at most.
    #[serde(default)]
    pub failed_nodes: Vec<FailedNode>,
    /// Names what nodes are to have: it changes when an image's digest does.
    #[serde(default)]
    pub revision: String,
    /// Share of the nodes that may begin, of 1000.
    #[serde(default)]
    pub admitted_permille: i32,
    /// Bytes a second that a node may read for it; no bound if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_bytes_per_second: Option<i64>,
    /// When the work at this generation began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// When it came to its end, good or bad.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Time>,
}

/// All of it in a word.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// Nothing has begun.
    #[default]
    Pending,
    /// Images are on their way into the remote content cache.
    Seeding,
    /// Nodes are on their way to have them.
    Distributing,
    /// All is where it was wanted.
    Ready,
    /// Some nodes, or some images, could not be warmed; the others are.
    Degraded,
    /// Nothing could be warmed, or not in time.
    Failed,
    /// `suspend` is set.
    Suspended,
}

impl Phase {
    /// All phases.
    pub const ALL: [Self; 7] = [
        Self::Pending,
        Self::Seeding,
        Self::Distributing,
        Self::Ready,
        Self::Degraded,
        Self::Failed,
        Self::Suspended,
    ];

    /// The name, as the API writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Seeding => "Seeding",
            Self::Distributing => "Distributing",
            Self::Ready => "Ready",
            Self::Degraded => "Degraded",
            Self::Failed => "Failed",
            Self::Suspended => "Suspended",
        }
    }
}

/// An image for a platform.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageStatus {
    /// The image, as the spec or a workload has it.
    pub image: String,
    /// The platform.
    pub platform: String,
    /// How far it has come.
    #[serde(default)]
    pub state: ImageState,
    /// Digest of its manifest: what the tag meant when it was looked up last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest_digest: Option<String>,
    /// Layers that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<i32>,
    /// Bytes of its layers, compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blob_bytes: Option<i64>,
    /// Bytes of these that were dealt with.
    #[serde(default)]
    pub blob_bytes_done: i64,
    /// Bytes of its layers, decompressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_bytes: Option<i64>,
    /// Compressed bytes of layers that the registry was asked for, the last time.
    #[serde(default)]
    pub bytes_from_registry: i64,
    /// Failed attempts in a row.
    #[serde(default)]
    pub attempts: i32,
    /// When the next attempt begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Time>,
    /// When the image was looked up last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checked_at: Option<Time>,
    /// Why the last attempt failed, in a word.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Why it failed, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// How far an image has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageState {
    /// It waits for its turn, or for the next attempt.
    #[default]
    Pending,
    /// It is on its way into the remote content cache.
    Seeding,
    /// All of it is there.
    Seeded,
    /// Its digest is known, and nodes take it from the registry: there is no remote content cache.
    Resolved,
    /// No attempt is left.
    Failed,
}

/// Numbers of nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeCounts {
    /// Nodes that are to be warmed.
    #[serde(default)]
    pub desired: i32,
    /// Nodes of these that have not begun.
    #[serde(default)]
    pub pending: i32,
    /// Nodes that are at it.
    #[serde(default)]
    pub warming: i32,
    /// Nodes that have it all.
    #[serde(default)]
    pub ready: i32,
    /// Nodes that could not; they try again by themselves.
    #[serde(default)]
    pub failed: i32,
}

/// A node on which it failed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedNode {
    /// Its name.
    pub node: String,
    /// Why, in a word.
    pub reason: String,
    /// Why, and what to do.
    pub message: String,
}
