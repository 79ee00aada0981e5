//! The Kubernetes API of pre-warming: what people ask for, and what controller and agents answer.
//!
//! [`ImagePrewarm`] is an intent, and lives in the namespace of who has it; its status is the controller's alone.
//! [`ImageRollout`] is what the controller tells all nodes of it. [`NodeImageCache`] is what one node has come to, and is
//! written by that node alone. They are in the group [`GROUP`], and described by `deploy/helm/clip-csi/files/crds`; a test keeps types and YAML alike.

mod image_prewarm;
mod image_rollout;
mod node_image_cache;

pub use image_prewarm::{
    Content, FailedNode, ImagePrewarm, ImagePrewarmSpec, ImagePrewarmStatus, ImageState,
    ImageStatus, ImageToWarm, NodeCounts, Phase, PullSecretRef, Target, Toleration,
    TolerationOperator, Workloads,
};
pub use image_rollout::{ImageRollout, ImageRolloutSpec};
pub use node_image_cache::{
    CacheUsage, MAX_WARMUPS, NodeImageCache, NodeImageCacheStatus, Warmup, WarmupPhase,
};

/// Group of the API.
pub const GROUP: &str = "clip-csi.dev";

/// Version of the API.
pub const VERSION: &str = "v1alpha1";

/// Implements what kube wants to know of a kind: its names, and where its metadata is.
macro_rules! resource {
    ($kind:ident, $name:literal, $plural:literal, $scope:ty) => {
        impl kube::Resource for $kind {
            type DynamicType = ();
            type Scope = $scope;

            fn kind((): &()) -> std::borrow::Cow<'_, str> {
                $name.into()
            }

            fn group((): &()) -> std::borrow::Cow<'_, str> {
                super::GROUP.into()
            }

            fn version((): &()) -> std::borrow::Cow<'_, str> {
                super::VERSION.into()
            }

            fn plural((): &()) -> std::borrow::Cow<'_, str> {
                $plural.into()
            }

            fn meta(&self) -> &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                &self.metadata
            }

            fn meta_mut(
                &mut self,
            ) -> &mut k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta {
                &mut self.metadata
            }
        }
    };
}
use resource;
