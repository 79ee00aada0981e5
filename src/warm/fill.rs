//! Takes an image out of the remote content cache, onto the local disk.

mod bring;
mod need;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tracing::info;

use super::{
    Pace, Phase, WarmError, WarmProgress, WarmWhat, Warmer,
    error::ROOM_HINT,
    fill::{bring::Place, need::Need},
    source::{Measured, Nowhere},
};
use crate::{
    digest::ManifestDigest,
    layer::{store::Layer, warm::Reservation},
    registry::{ImageRef, Platform, Requester, ResolvedImage},
    remote::{Answer, ContentCache},
    sys,
    tier::{BlobSource, LayerDesc, PresentError},
};

/// Where an image may be taken from.
#[derive(Debug, Clone)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one for each image that is being filled, which is few"
)]
pub enum Origin {
    /// The remote content cache alone, and the local disk.
    Remote,
    /// The registry as well, on behalf of `requester`: what the remote lacks, or where there is none.
    Registry {
        /// The image, whose manifest is the one to be filled.
        image: ImageRef,
        /// The platform of that manifest.
        platform: Platform,
        /// Who asks.
        requester: Requester,
    },
}

/// Bounds of one filling.
#[derive(Debug, Clone)]
pub struct FillLimits {
    /// Bytes per second, shared with all that have the same one: of decompressed layers out of the
    /// remote, of blobs out of the registry.
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
    /// Bytes of layers, decompressed, that came from the remote.
    pub bytes_from_remote: u64,
    /// Bytes of blobs that came from the registry.
    pub bytes_from_registry: u64,
}

/// One filling.
struct Filling<'a> {
    warmer: Warmer<'a>,
    request: &'a FillRequest,
    progress: &'a WarmProgress,
    source: Arc<dyn BlobSource>,
    from_remote_bytes: AtomicU64,
}

impl Warmer<'_> {
    /// Has the image on the local disk, as much of it as is wanted.
    ///
    /// Readers go first, and nothing that is mounted is evicted for it. Layers, and the chunks of a layer,
    /// come in an order of their own on each node, so that many that begin at once do not all ask for the same.
    /// What is on disk already costs no request.
    ///
    /// Where the remote has no key, a layer that the disk lacks comes whole, whatever is wanted of it.
    ///
    /// # Errors
    /// [`WarmError`]; what came before stays.
    ///
    /// # Cancellation
    /// Safe: at most the chunks that are being fetched come even so.
    pub async fn fill(
        &self,
        request: &FillRequest,
        progress: &Arc<WarmProgress>,
    ) -> Result<Filled, WarmError> {
        progress.enter(Phase::Resolving);
        let measured = self.measured(request);
        let source: Arc<dyn BlobSource> = match &measured {
            Some(measured) => Arc::clone(measured) as _,
            None => Arc::new(Nowhere),
        };
        let filling = Filling {
            warmer: *self,
            request,
            progress,
            source,
            from_remote_bytes: AtomicU64::new(0),
        };
        let mut filled = filling.run().await?;
        filled.bytes_from_remote = filling.from_remote_bytes.load(Ordering::Relaxed);
        filled.bytes_from_registry = measured.map_or(0, |it| it.bytes());
        progress.enter(Phase::Done);
        info!(image.manifest = %request.manifest, wanted_bytes = filled.bytes_wanted,
            present_bytes = filled.bytes_present, remote_bytes = filled.bytes_from_remote,
            registry_bytes = filled.bytes_from_registry, "image is warm");
        Ok(filled)
    }

    /// The registry's blobs, if it may be asked.
    fn measured(&self, request: &FillRequest) -> Option<Arc<Measured>> {
        let Origin::Registry {
            image, requester, ..
        } = &request.origin
        else {
            return None;
        };
        let manifest = request.manifest;
        let blobs = self.registry.image_blobs(image, requester, manifest, None);
        let pace = &request.limits.pace;
        Some(Arc::new(Measured::new(blobs, pace, None)))
    }
}

impl Filling<'_> {
    async fn run(&self) -> Result<Filled, WarmError> {
        let image = self.resolved().await?;
        let n_layers = image.layers.len();
        let need = self.need(&image).await?;
        let reservation = self.reserve(need.bytes, need.bytes).await?;
        self.progress.enter(Phase::Moving);
        let layers = self.open(&image, &need, &reservation).await?;
        let (recorded, rest) = self.wanted(&layers).await;
        let bytes_of = |of: &mut dyn Iterator<Item = &Place>| -> u64 {
            of.map(|(at, chunk)| layers[*at].file().chunk_bytes(*chunk))
                .sum()
        };
        let missing = |it: &&Place| !layers[it.0].file().has(it.1..it.1 + 1);
        let all = || recorded.iter().chain(rest.iter().flatten());
        let wanted_bytes = bytes_of(&mut all());
        let missing_bytes = bytes_of(&mut all().filter(missing));
        let reservation = match self.request.what {
            // It was kept before.
            WarmWhat::All => reservation,
            WarmWhat::Index | WarmWhat::Recorded => {
                drop(reservation);
                let total_bytes = need.bytes.saturating_add(missing_bytes);
                self.reserve(missing_bytes, total_bytes).await?
            }
        };
        // There is room for it: one for which there is none wants nothing.
        self.progress
            .expect(u64::try_from(n_layers).unwrap_or(u64::MAX), wanted_bytes);
        self.progress.bytes_done(wanted_bytes - missing_bytes);
        // What opened the layers is not needed for their chunks, which take most of the time and the memory.
        sys::drop_code();
        self.bring(&layers, &recorded, &reservation).await?;
        for chunks in &rest {
            self.bring(&layers, chunks, &reservation).await?;
            self.progress.layer_done();
        }
        for _ in rest.len()..n_layers {
            self.progress.layer_done();
        }
        Ok(Filled {
            n_layers: u32::try_from(n_layers).unwrap_or(u32::MAX),
            bytes_wanted: wanted_bytes,
            bytes_present: wanted_bytes - missing_bytes,
            ..Filled::default()
        })
    }

    /// Keeps room for `bytes`, of `total_bytes` that the image takes.
    async fn reserve(&self, bytes: u64, total_bytes: u64) -> Result<Reservation, WarmError> {
        let FillLimits {
            max_new_bytes,
            evict_unused_for,
            ..
        } = self.request.limits;
        if let Some(max_bytes) = max_new_bytes
            && max_bytes < total_bytes
        {
            return Err(WarmError::NoSpace {
                manifest: self.request.manifest,
                needs_bytes: total_bytes,
                free_bytes: max_bytes,
                hint: "raise the disk budget of this warming",
            });
        }
        let reserved = self.warmer.store.reserve(bytes, evict_unused_for).await;
        reserved.map_err(|free_bytes| self.no_space(bytes, free_bytes))
    }

    /// Opens the layers, one after the other, and has the image's index made.
    async fn open(
        &self,
        image: &ResolvedImage,
        need: &Need,
        reservation: &Reservation,
    ) -> Result<Vec<Arc<Layer>>, WarmError> {
        // Kept open: until the end nothing of it may be evicted.
        let mut layers = Vec::with_capacity(image.layers.len());
        for (desc, absent_bytes) in image.layers.iter().zip(&need.absent_bytes) {
            if let (Some(bytes), Origin::Remote) = (absent_bytes, &self.request.origin) {
                self.request.limits.pace.take(*bytes).await;
            }
            let layer = self.warmer.store.layer(desc, Arc::clone(&self.source));
            match layer.await {
                Ok(layer) => layers.push(layer),
                Err(err) => return Err(self.layer_failed(desc, err, reservation).await),
            }
            reservation.spent(absent_bytes.unwrap_or(0));
        }
        match self.warmer.indexer.open(image, &self.source).await {
            Ok(_opened) => Ok(layers),
            Err(err) => Err(WarmError::of_index(
                self.request.manifest,
                err,
                reservation.left_bytes(),
                self.warmer.store.spare_bytes(),
            )),
        }
    }

    /// What the remote has, or why it is not to be had.
    fn answered<T>(
        &self,
        cache: &ContentCache,
        answer: Answer<T>,
        what: &str,
    ) -> Result<T, WarmError> {
        match answer {
            Answer::Has(it) => Ok(it),
            Answer::Lacks => Err(WarmError::NotSeeded {
                manifest: self.request.manifest,
                what: what.to_owned(),
            }),
            Answer::Down { reason } => Err(WarmError::RemoteDown {
                engine: cache.engine(),
                reason,
            }),
        }
    }

    /// Why a layer could not be opened: without a registry, it is the remote that lacks its index.
    async fn layer_failed(
        &self,
        desc: &LayerDesc,
        err: PresentError,
        reservation: &Reservation,
    ) -> WarmError {
        let is_of_origin = matches!(err, PresentError::Origin { .. });
        match (&self.request.origin, self.warmer.store.remote()) {
            (Origin::Remote, Some(cache)) if is_of_origin => {
                let what = format!("the index of layer {}", desc.diff_id);
                let known = match cache.ask_manifest(&desc.diff_id).await {
                    down @ Answer::Down { .. } => down,
                    Answer::Has(_) | Answer::Lacks => Answer::Lacks,
                };
                match self.answered(cache, known, &what) {
                    Err(err) => err,
                    Ok(_) => self.failed(err, reservation.left_bytes()),
                }
            }
            _ => self.failed(err, reservation.left_bytes()),
        }
    }

    fn failed(&self, err: PresentError, needs_bytes: u64) -> WarmError {
        let free_bytes = self.warmer.store.spare_bytes();
        WarmError::of_layer(self.request.manifest, err, needs_bytes, free_bytes)
    }

    fn no_space(&self, needs_bytes: u64, free_bytes: u64) -> WarmError {
        WarmError::NoSpace {
            manifest: self.request.manifest,
            needs_bytes,
            free_bytes,
            hint: ROOM_HINT,
        }
    }

    fn refused(&self, reason: String) -> WarmError {
        WarmError::Refused {
            manifest: self.request.manifest,
            reason,
        }
    }
}
