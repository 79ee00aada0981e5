//! Takes an image out of the remote content cache, onto the local disk.

use std::{sync::Arc, time::Duration};

use super::{Pace, WarmError, WarmProgress, WarmWhat, Warmer};
use crate::{
    digest::ManifestDigest,
    registry::{ImageRef, Requester},
};

/// Where an image may be taken from.
#[derive(Debug, Clone)]
pub enum Origin {
    /// The remote content cache alone, and the local disk.
    Remote,
    /// The registry as well, on behalf of `requester`: what the remote lacks, or where there is none.
    Registry {
        /// The image, whose manifest is the one to be filled.
        image: ImageRef,
        /// Who asks.
        requester: Requester,
    },
}

/// Bounds of one filling.
#[derive(Debug, Clone)]
pub struct FillLimits {
    /// Bytes of decompressed layers per second, shared with all others that have the same one.
    pub pace: Arc<Pace>,
    /// Bytes that this image may add to the cache.
    pub max_new_bytes: Option<u64>,
    /// Layers and indexes that nobody has used for so long are evicted to make room; none, without.
    /// What is mounted is never evicted.
    pub evict_unused_for: Option<Duration>,
}

/// Which image is to be on the local disk.
#[derive(Debug, Clone)]
pub struct FillRequest {
    /// Its manifest, of one platform, as [`Seeded`](super::Seeded) names it.
    pub manifest: ManifestDigest,
    /// How much of it.
    pub what: WarmWhat,
    /// Where it comes from.
    pub origin: Origin,
    /// What it may take.
    pub limits: FillLimits,
}

/// What filling an image took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Filled {
    /// How many layers the image has.
    pub n_layers: u32,
    /// Bytes of them that were to be there.
    pub bytes_wanted: u64,
    /// Bytes of these that the disk had.
    pub bytes_present: u64,
    /// Bytes, decompressed, that came from the remote.
    pub bytes_from_remote: u64,
    /// Bytes, decompressed, that came from the registry.
    pub bytes_from_registry: u64,
}

impl Warmer<'_> {
    /// Has the image on the local disk, as much of it as is wanted.
    ///
    /// Readers go first, and nothing that is mounted is evicted for it. The chunks of a layer come in an order of
    /// their own on each node, so that many that begin at once do not all ask for the same.
    ///
    /// # Errors
    /// [`WarmError`]; what came before stays.
    ///
    /// # Cancellation
    /// Safe: at most the chunks that are being fetched come even so.
    pub async fn fill(
        &self,
        request: &FillRequest,
        progress: &WarmProgress,
    ) -> Result<Filled, WarmError> {
        let _ = (request, progress);
        Err(WarmError::Cancelled)
    }
}
