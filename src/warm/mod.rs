//! Has layers where they will be wanted, before they are.
//!
//! Two halves, for two sides of the remote content cache:
//!
//! - [`seed`](Warmer::seed) puts an image into it: asks the registry once, decompresses each layer
//!   that the remote lacks, uploads it, and sees that it is there. Once in a cluster.
//! - [`fill`](Warmer::fill) takes an image out of it, onto the local disk: on each node, with no right at
//!   any registry. What the image is made of comes from the remote as well, each document named by
//!   its digest, so that whoever knows the digest of the manifest need trust nobody.
//!
//! Both do nothing that was done before, so that either may be repeated at any time, and goes on where
//! a process that was killed had come to. Both hold no layer in memory. Both end at once when their
//! future is dropped: what is under way for others as well goes on.
//!
//! Deliberately absent: who decides what is warmed where, and when.

mod error;
mod fill;
mod pace;
mod progress;
mod seed;
mod source;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    indexer::Indexer, layer::store::LayerStore, registry::RegistryClient, tier::BoxFuture,
};

pub use error::WarmError;
pub use fill::{FillLimits, FillRequest, Filled, Origin};
pub use pace::Pace;
pub use progress::{Phase, WarmProgress, WarmSnapshot};
pub use seed::{LocalCopy, SeedRequest, Seeded};

/// How much of an image is to be there. The later ones contain the earlier ones.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum WarmWhat {
    /// The index: what a mount needs before its first read.
    Index,
    /// And the chunks that were read first when the image was mounted before; none, if it never was.
    #[default]
    Recorded,
    /// And all the others.
    All,
}

/// What warms: the parts of a process that opens images, lent. Cheap to make and to copy.
#[derive(Debug, Clone, Copy)]
pub struct Warmer<'a> {
    /// Where images are resolved.
    pub registry: &'a RegistryClient,
    /// Where layers come to, with the remote content cache behind it.
    pub store: &'a LayerStore,
    /// What makes indexes of images.
    pub indexer: &'a Indexer,
}

/// Whoever has the parts to lend them.
pub trait Warms: Send + Sync + 'static {
    /// Lends them.
    fn warmer(&self) -> Warmer<'_>;
}

/// Whoever fills a node's disk: all that a node's part of pre-warming needs of the rest.
pub trait Fills: Send + Sync + 'static {
    /// Has an image on the local disk, as [`Warmer::fill`] does.
    ///
    /// # Errors
    /// [`WarmError`]; what came before stays.
    ///
    /// # Cancellation
    /// Safe.
    fn fill<'a>(
        &'a self,
        request: &'a FillRequest,
        progress: &'a Arc<WarmProgress>,
    ) -> BoxFuture<'a, Result<Filled, WarmError>>;
}

impl<T: Warms> Fills for T {
    fn fill<'a>(
        &'a self,
        request: &'a FillRequest,
        progress: &'a Arc<WarmProgress>,
    ) -> BoxFuture<'a, Result<Filled, WarmError>> {
        Box::pin(async move { self.warmer().fill(request, progress).await })
    }
}
