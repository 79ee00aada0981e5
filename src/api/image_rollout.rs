//! `ImageRollout`: what each node is told of one ImagePrewarm.

use k8s_openapi::{ClusterResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde::{Deserialize, Serialize};

use super::resource;

/// What there is to have of one ImagePrewarm, and which nodes may begin. It has the uid of the ImagePrewarm as its name.
///
/// An object of its own, because every node watches it: a status of some kilobytes, which changes all the time, would go
/// to all of them. Of the cluster, because nobody but the controller is to say whose turn it is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImageRollout {
    /// Name and the like.
    pub metadata: ObjectMeta,
    /// What the controller says.
    #[serde(default)]
    pub spec: ImageRolloutSpec,
}

resource!(
    ImageRollout,
    "ImageRollout",
    "imagerollouts",
    ClusterResourceScope
);

/// What the controller says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ImageRolloutSpec {
    /// Namespace of the ImagePrewarm.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its generation that this is about.
    pub generation: i64,
    /// What there is to have (its `status.revision`); empty if there is nothing yet.
    pub revision: String,
    /// Share of the nodes that may begin, in thousandths.
    pub admitted_permille: i32,
    /// Nodes that are to be warmed: how seldom each of them tells of its progress.
    pub nodes: i32,
}
