//! What the layer store does for whoever warms: brings chunks for nobody yet, says how much room is
//! nobody's, and when a layer's upload has ended.
//!
//! Readers go first: before each chunk it is waited until none of them waits for one, for a moment.
//! Nothing in use is evicted, and nothing at all that was not unused for as long as the caller says.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tracing::debug;

use super::{
    catalog::{self, Removed},
    origins::Origin,
    random::Demand,
    riders,
    store::{Inner, Layer, LayerStore, crashed},
    upload::UploadEnd,
};
use crate::{
    digest::{DiffId, ManifestDigest},
    fair::Claimant,
    index::profile::Touch,
    remote::{ContentCache, Repair},
    tier::{BlobSource, LayerDesc, PresentError},
};

/// How long a chunk for nobody waits for readers, at most: where they never cease, warming goes on at
/// some chunks per second.
const MAX_PAUSE: Duration = Duration::from_millis(200);

/// How often a layer that was uploaded is tried to be removed, while what uploaded it lets go of it.
const REMOVALS: u32 = 10;

/// The wait between two of them.
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);

/// What became of a chunk that was to be brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warmed {
    /// It was there.
    Present,
    /// The remote content cache had it.
    Fetched,
    /// It did not.
    Lacking,
    /// What is nobody's room is not enough for it.
    NoRoom,
}

/// What whoever warms and everybody else have to know of each other.
#[derive(Debug, Default)]
pub(super) struct Warming {
    /// Readers that wait for the remote content cache: who warms makes way for them.
    pub(super) readers: Demand,
    /// Bytes that are kept for images, and not written yet.
    kept_bytes: AtomicU64,
}

/// Room that is kept for an image in the warming, against all others that are.
#[derive(Debug)]
pub struct Reservation {
    inner: Arc<Inner>,
    left_bytes: AtomicU64,
}

impl Reservation {
    /// Bytes that are kept still.
    pub fn left_bytes(&self) -> u64 {
        self.left_bytes.load(Ordering::Relaxed)
    }

    /// Gives back what has been written.
    pub fn spent(&self, bytes: u64) {
        let take = |left: u64| Some(left.saturating_sub(bytes));
        let before = self
            .left_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
        let before = before.unwrap_or_else(|left| left);
        let total = &self.inner.warming.kept_bytes;
        total.fetch_sub(before.min(bytes), Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.spent(self.left_bytes.load(Ordering::Relaxed));
    }
}

impl LayerStore {
    /// The remote content cache, if there is one.
    pub fn remote(&self) -> Option<&ContentCache> {
        self.inner().remote.as_ref().map(|it| &it.cache)
    }

    /// Opens a layer if the disk has it, or some of it; asks nobody else.
    ///
    /// # Errors
    /// [`PresentError`] if the disk failed.
    pub fn layer_on_disk(
        &self,
        desc: &LayerDesc,
        source: Arc<dyn BlobSource>,
    ) -> Result<Option<Arc<Layer>>, PresentError> {
        let origin = Origin::new(desc, source);
        self.inner().open_layer(&origin)
    }

    /// Which chunks were wanted first of an image whose layers have so many chunks, in order, if
    /// anybody recorded it. Keeps that on disk, for the image's next mount.
    pub async fn recorded(&self, manifest: ManifestDigest, n_chunks: &[u32]) -> Vec<Touch> {
        let found = self.inner().profile(manifest, n_chunks).await;
        found.map(|it| it.touches).unwrap_or_default()
    }

    /// Keeps `bytes` of room that is nobody's, until the result is dropped; without it, evicts what was
    /// not used for `unused_for`, if that is enough.
    ///
    /// # Errors
    /// How many bytes there are.
    pub async fn reserve(
        &self,
        bytes: u64,
        unused_for: Option<Duration>,
    ) -> Result<Reservation, u64> {
        let inner = self.inner();
        let kept_bytes = &inner.warming.kept_bytes;
        let others_bytes = kept_bytes.fetch_add(bytes, Ordering::Relaxed);
        // Given back when it is dropped, also because there is no room.
        let reservation = Reservation {
            inner: Arc::clone(inner),
            left_bytes: AtomicU64::new(bytes),
        };
        let room = Arc::clone(&inner.room);
        let wanted_bytes = others_bytes.saturating_add(bytes);
        let made = inner
            .runtime
            .spawn_blocking(move || room.make_spare(wanted_bytes, unused_for));
        match made.await {
            Ok(spare_bytes) if wanted_bytes <= spare_bytes => Ok(reservation),
            Ok(spare_bytes) => Err(spare_bytes.saturating_sub(others_bytes)),
            Err(_) => Err(0),
        }
    }

    /// Bytes that may come for nobody: without a bound broken or anything evicted, and with a margin
    /// for who reads meanwhile.
    pub fn spare_bytes(&self) -> u64 {
        self.inner().room.spare_bytes()
    }

    /// Brings a chunk of an open layer from the remote content cache, after those that readers want.
    ///
    /// # Errors
    /// [`PresentError`] if the disk failed.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn warm_chunk(&self, layer: &Arc<Layer>, chunk: u32) -> Result<Warmed, PresentError> {
        let inner = self.inner();
        let file = &layer.file;
        let is_present = || file.has(chunk..chunk + 1);
        if is_present() {
            return Ok(Warmed::Present);
        }
        inner.warming.readers.let_pass(MAX_PAUSE).await;
        inner.demand.let_pass(MAX_PAUSE).await;
        if inner.room.spare_bytes() < file.chunk_bytes(chunk) {
            return Ok(Warmed::NoRoom);
        }
        let _flight = inner.chunk_flights.join((file.diff_id(), chunk)).await;
        if is_present() || inner.adopt(layer, chunk).await? {
            return Ok(Warmed::Present);
        }
        match inner
            .fetch_chunk(layer, chunk, Claimant::Background)
            .await?
        {
            true => Ok(Warmed::Fetched),
            false => Ok(Warmed::Lacking),
        }
    }

    /// Makes chunks of an open layer present, from wherever they are to be had, as for a reader, but after
    /// those that readers want.
    ///
    /// # Errors
    /// [`PresentError`].
    pub async fn bring(&self, layer: &Arc<Layer>, chunks: Range<u32>) -> Result<(), PresentError> {
        let inner = self.inner();
        inner.present(layer, chunks, Claimant::Background).await
    }

    /// Has an open layer streamed from its registry until all of it is there.
    ///
    /// # Errors
    /// [`PresentError`].
    ///
    /// # Cancellation
    /// Safe: the stream ends when nobody has the layer open.
    pub async fn stream_all(&self, layer: &Arc<Layer>) -> Result<(), PresentError> {
        if layer.file.is_complete() {
            return Ok(());
        }
        let progress = self.inner().start_refill(layer);
        riders::streamed(progress).await
    }

    /// Has a layer, of which the disk must have what is to be put, put into the remote content cache, and waits for it.
    ///
    /// What is there already is not sent again, but for what is to be repaired.
    ///
    /// # Cancellation
    /// Safe: the upload goes on.
    pub async fn upload(&self, layer: &Arc<Layer>, desc: &LayerDesc, repair: &Repair) -> UploadEnd {
        loop {
            let end = self.inner().upload_now(desc, &layer.file, repair.clone());
            match end.await {
                // Somebody else asked for it, and that request has ours in it.
                UploadEnd::Merged => {}
                end => return end,
            }
        }
    }

    /// Removes a layer from the disk, unless somebody has it open; whether it is gone.
    pub async fn forget(&self, layer: DiffId) -> bool {
        let inner = self.inner();
        for _ in 0..REMOVALS {
            let paths = inner.paths.clone();
            let removed = inner
                .runtime
                .spawn_blocking(move || catalog::remove(&paths, layer));
            match removed.await {
                Ok(Ok(Removed::Yes)) => {
                    inner.metrics.layer_cache_layers.dec();
                    // Brings the account in line.
                    self.sweep_soon();
                    return true;
                }
                Ok(Ok(Removed::Absent)) => return true,
                Ok(Ok(Removed::InUse | Removed::Filling)) => {}
                Ok(Err(err)) => {
                    debug!(layer.diff_id = %layer, error = %err, "layer that was uploaded stays");
                    return false;
                }
                Err(err) => {
                    debug!(error = %crashed(layer, &err), "layer that was uploaded stays");
                    return false;
                }
            }
            tokio::time::sleep(REMOVAL_PAUSE).await;
        }
        false
    }
}
