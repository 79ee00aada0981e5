//! Puts an image into the remote content cache.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::sleep;
use tracing::{info, warn};

use super::{Pace, Phase, WarmError, WarmProgress, WarmWhat, Warmer, source::Measured};
use crate::{
    chunk,
    digest::{DiffId, ManifestDigest},
    index::profile::{self, MAX_PROFILE_BYTES},
    layer::{UploadEnd, store::Layer},
    registry::{ImageDocuments, ImageRef, Platform, Requester, ResolvedImage},
    remote::{Answer, ContentCache, RemoteManifest, Repair},
    sys,
    tier::{BlobSource, LayerDesc, PresentError},
};

/// Layers that are in the making at once: one is decompressed while the one before is uploaded.
const LAYERS_AT_ONCE: usize = 2;

/// Chunks that are asked for at once whether they are there: small questions, which an object store
/// answers slowly.
const QUESTIONS_AT_ONCE: usize = 8;

/// How often what the remote lacks of a layer is put there: a store that takes and loses it again is too
/// small.
const ATTEMPTS: u32 = 2;

/// Chunks of a layer that are missing, from which on it is streamed as a whole.
const STREAM_FROM: usize = 8;

/// How long the remote may be away until who waits for an upload to it is told: a server that starts anew is
/// back by then. The upload itself is tried for longer, in the background.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often somebody who waits for an upload looks whether the remote answers.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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
    /// Bytes of blobs per second that come from the registry, shared with all that have the same one.
    pub pace: Arc<Pace>,
}

/// What an image is that was seeded, and what it took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seeded {
    /// Its manifest, of its platform.
    pub manifest: ManifestDigest,
    /// How many layers it has, each counted once.
    pub n_layers: u32,
    /// How many of them the remote had already, all that was wanted.
    pub n_layers_present: u32,
    /// Bytes of the layers' blobs.
    pub blob_bytes: u64,
    /// Bytes of the layers, decompressed.
    pub layer_bytes: u64,
    /// Bytes of blobs that came from the registry.
    pub bytes_from_registry: u64,
    /// Bytes that were sent to the remote.
    pub bytes_to_remote: u64,
}

/// One seeding.
struct Seeding<'a> {
    warmer: Warmer<'a>,
    cache: &'a ContentCache,
    request: &'a SeedRequest,
    progress: &'a WarmProgress,
    manifest: ManifestDigest,
    source: Arc<dyn BlobSource>,
    sent_bytes: AtomicU64,
}

/// A layer that the remote has.
#[derive(Debug)]
struct Known {
    /// Bytes of it, decompressed.
    layer_bytes: u64,
    /// Whether nothing was put.
    was_there: bool,
}

impl Warmer<'_> {
    /// Resolves the image, and returns once the remote content cache has all of it that is wanted, and
    /// has said so.
    ///
    /// Layers that the remote lacks are made from the registry under the remote's lease, so that nobody
    /// else does the same; last the documents are put that [`fill`](Self::fill) needs. The disk holds two layers
    /// at once, if uploaded ones are removed.
    ///
    /// # Errors
    /// [`WarmError`]; what was put before stays.
    ///
    /// # Cancellation
    /// Safe: uploads that began go on until the store is shut down, all else ends.
    pub async fn seed(
        &self,
        request: &SeedRequest,
        progress: &Arc<WarmProgress>,
    ) -> Result<Seeded, WarmError> {
        let cache = self.store.remote().ok_or(WarmError::NoRemote)?;
        progress.enter(Phase::Resolving);
        let SeedRequest {
            image,
            platform,
            requester,
            ..
        } = request;
        let resolved = self.registry.resolve_documents(image, platform, requester);
        let (mut resolved, documents) = resolved.await.map_err(WarmError::Registry)?;
        // What is put must be whole, and is compared with its DiffId on the way.
        (resolved.layers.iter_mut()).for_each(|it| it.toc = None);
        // A profile names layers by their place in the image, which may have one twice.
        let places = distinct(&mut resolved.layers);
        let blobs = self.registry.blobs(image, requester);
        let measured = Arc::new(Measured::new(blobs, &request.pace, Some(progress)));
        let seeding = Seeding {
            warmer: *self,
            cache,
            request,
            progress,
            manifest: resolved.manifest,
            source: Arc::clone(&measured) as _,
            sent_bytes: AtomicU64::new(0),
        };
        let known = seeding.run(&resolved, &places, documents).await?;
        progress.enter(Phase::Done);
        let count = |it: usize| u32::try_from(it).unwrap_or(u32::MAX);
        let seeded = Seeded {
            manifest: resolved.manifest,
            n_layers: count(known.len()),
            n_layers_present: count(known.iter().filter(|it| it.was_there).count()),
            blob_bytes: resolved.layers.iter().map(|it| it.blob_bytes).sum(),
            layer_bytes: known.iter().map(|it| it.layer_bytes).sum(),
            bytes_from_registry: measured.bytes(),
            bytes_to_remote: seeding.sent_bytes.load(Ordering::Relaxed),
        };
        info!(image.manifest = %seeded.manifest, layers = seeded.n_layers,
            present = seeded.n_layers_present, registry_bytes = seeded.bytes_from_registry,
            remote_bytes = seeded.bytes_to_remote, "image is seeded");
        Ok(seeded)
    }
}

impl Seeding<'_> {
    async fn run(
        &self,
        image: &ResolvedImage,
        places: &[usize],
        documents: ImageDocuments,
    ) -> Result<Vec<Known>, WarmError> {
        let blob_bytes = image.layers.iter().map(|it| it.blob_bytes).sum();
        let n_layers = u64::try_from(image.layers.len()).unwrap_or(u64::MAX);
        self.progress.expect(n_layers, blob_bytes);
        // What asked the registry what the image is made of is not needed for its layers.
        sys::drop_code();
        self.progress.enter(Phase::Moving);
        // Of copies, because a closure over borrowed items makes a future that cannot be spawned.
        let mut known: Vec<Known> = stream::iter(image.layers.iter().cloned())
            .map(|it| async move { self.known(&it).await })
            .buffered(LAYERS_AT_ONCE)
            .try_collect()
            .await?;
        self.progress.enter(Phase::Verifying);
        let wanted = self.wanted(&known, places).await;
        for ((desc, known), wanted) in image.layers.iter().zip(&mut known).zip(wanted) {
            self.complete(desc, known, wanted).await?;
        }
        let put = self.cache.put_image(documents.manifest, documents.config);
        put.await.map_err(|reason| WarmError::RemoteDown {
            engine: self.cache.engine(),
            reason,
        })?;
        Ok(known)
    }

    /// What the remote knows of a layer, which is put there if it knows nothing.
    async fn known(&self, desc: &LayerDesc) -> Result<Known, WarmError> {
        if let Some(manifest) = self.asked(&desc.diff_id).await? {
            self.progress.bytes_done(desc.blob_bytes);
            self.progress.layer_done();
            return Ok(Known {
                layer_bytes: manifest.layer_bytes,
                was_there: true,
            });
        }
        self.put(desc).await?;
        match self.asked(&desc.diff_id).await? {
            Some(manifest) => {
                self.progress.layer_done();
                Ok(Known {
                    layer_bytes: manifest.layer_bytes,
                    was_there: false,
                })
            }
            None => Err(self.loses(desc)),
        }
    }

    /// Puts a layer into the remote that it does not know.
    async fn put(&self, desc: &LayerDesc) -> Result<(), WarmError> {
        let store = self.warmer.store;
        // From the registry, unless a process before this one came so far, or another node has.
        let layer = self.layer(desc).await?;
        // Without this, what is evicted meanwhile is missed below.
        let kept = layer.file().keep_whole().ok();
        if !layer.file().is_complete() && self.asked(&desc.diff_id).await?.is_none() {
            let streamed = store.stream_all(&layer).await;
            streamed.map_err(|err| self.failed(desc, err))?;
        }
        if layer.file().is_complete() {
            self.upload(&layer, desc, &Repair::default()).await?;
        }
        drop((kept, layer));
        self.let_go(desc).await;
        Ok(())
    }

    /// Which chunks of each layer the remote must have; `places` says which layer is where in the image.
    async fn wanted(&self, known: &[Known], places: &[usize]) -> Vec<Vec<u32>> {
        let n_chunks = |it: &Known| {
            let n_chunks = chunk::n_chunks(it.layer_bytes);
            // A manifest says no more than that.
            u32::try_from(n_chunks).unwrap_or(u32::MAX)
        };
        let what = self.request.what;
        let mut wanted: Vec<Vec<u32>> = known
            .iter()
            .map(|it| match it.was_there && what != WarmWhat::All {
                true => Vec::new(),
                // What was put is looked at in any case.
                false => (0..n_chunks(it)).collect(),
            })
            .collect();
        if what != WarmWhat::Recorded {
            return wanted;
        }
        let Some(found) = self.cache.profile(&self.manifest, MAX_PROFILE_BYTES).await else {
            return wanted;
        };
        let n_chunks: Vec<_> = places.iter().map(|it| n_chunks(&known[*it])).collect();
        let profile = match profile::decode(&found, self.manifest, &n_chunks) {
            Ok(profile) => profile,
            Err(err) => {
                warn!(image.manifest = %self.manifest, error = %err, "profile of an image is unusable");
                return wanted;
            }
        };
        for touch in profile.touches {
            let place = usize::try_from(touch.layer).ok();
            let layer = place.and_then(|it| places.get(it)).copied();
            if let Some(layer) = layer.filter(|it| known[*it].was_there) {
                wanted[layer].push(touch.chunk);
            }
        }
        wanted
    }

    /// Sees that the remote has these chunks of a layer that it knows, and puts what it lacks.
    async fn complete(
        &self,
        desc: &LayerDesc,
        known: &mut Known,
        wanted: Vec<u32>,
    ) -> Result<(), WarmError> {
        let mut missing = self.missing(&desc.diff_id, wanted).await?;
        for _ in 0..ATTEMPTS {
            if missing.is_empty() {
                return Ok(());
            }
            info!(layer.diff_id = %desc.diff_id, chunks = missing.len(), "remote cache has lost chunks of a layer, putting them again");
            known.was_there = false;
            let layer = self.layer(desc).await?;
            let store = self.warmer.store;
            let brought = match missing.len() < STREAM_FROM {
                true => self.bring(&layer, &missing).await,
                false => store.stream_all(&layer).await,
            };
            brought.map_err(|err| self.failed(desc, err))?;
            let repair = Repair {
                chunks: missing.clone(),
                index: false,
            };
            self.upload(&layer, desc, &repair).await?;
            drop(layer);
            self.let_go(desc).await;
            missing = self.missing(&desc.diff_id, missing).await?;
        }
        match missing.is_empty() {
            true => Ok(()),
            false => Err(self.loses(desc)),
        }
    }

    async fn bring(&self, layer: &Arc<Layer>, chunks: &[u32]) -> Result<(), PresentError> {
        for chunk in chunks {
            self.warmer.store.bring(layer, *chunk..*chunk + 1).await?;
        }
        Ok(())
    }

    /// Which of `chunks` the remote lacks.
    async fn missing(&self, layer: &DiffId, chunks: Vec<u32>) -> Result<Vec<u32>, WarmError> {
        stream::iter(chunks)
            .map(|chunk| async move {
                match self.cache.has_chunk(layer, chunk).await {
                    Answer::Has(()) => Ok(None),
                    Answer::Lacks => Ok(Some(chunk)),
                    Answer::Down { reason } => Err(self.down(reason)),
                }
            })
            .buffered(QUESTIONS_AT_ONCE)
            .try_filter_map(|it| async move { Ok(it) })
            .try_collect()
            .await
    }

    async fn asked(&self, layer: &DiffId) -> Result<Option<Arc<RemoteManifest>>, WarmError> {
        match self.cache.ask_manifest(layer).await {
            Answer::Has(manifest) => Ok(Some(manifest)),
            Answer::Lacks => Ok(None),
            Answer::Down { reason } => Err(self.down(reason)),
        }
    }

    async fn layer(&self, desc: &LayerDesc) -> Result<Arc<Layer>, WarmError> {
        let layer = self.warmer.store.layer(desc, Arc::clone(&self.source));
        layer.await.map_err(|err| self.failed(desc, err))
    }

    async fn upload(
        &self,
        layer: &Arc<Layer>,
        desc: &LayerDesc,
        repair: &Repair,
    ) -> Result<(), WarmError> {
        let end = tokio::select! {
            end = self.warmer.store.upload(layer, desc, repair) => end,
            reason = self.is_away(&desc.diff_id) => return Err(self.down(reason)),
        };
        match end {
            UploadEnd::There { sent_bytes } => {
                self.sent_bytes.fetch_add(sent_bytes, Ordering::Relaxed);
                Ok(())
            }
            UploadEnd::Stopped | UploadEnd::Merged => Err(WarmError::Cancelled),
            UploadEnd::Failed { reason } => {
                // It may be down, which is nothing that is wrong with the layer.
                self.asked(&desc.diff_id).await?;
                Err(WarmError::RemoteRefuses {
                    engine: self.cache.engine(),
                    layer: desc.diff_id,
                    reason,
                })
            }
        }
    }

    /// Waits until the remote has not answered for [`PATIENCE`], and says why.
    async fn is_away(&self, layer: &DiffId) -> String {
        let mut since = None;
        loop {
            sleep(LOOK_EVERY).await;
            // Whichever chunk: that there is an answer is the answer.
            match self.cache.has_chunk(layer, 0).await {
                Answer::Has(()) | Answer::Lacks => since = None,
                Answer::Down { reason } => {
                    if since.get_or_insert_with(Instant::now).elapsed() >= PATIENCE {
                        return reason;
                    }
                }
            }
        }
    }

    /// Does with the local copy of a layer that the remote has what is wanted.
    async fn let_go(&self, desc: &LayerDesc) {
        if self.request.local == LocalCopy::Remove {
            // One that stays is evicted when there is need.
            let _is_gone = self.warmer.store.forget(desc.diff_id).await;
        }
    }

    fn down(&self, reason: String) -> WarmError {
        WarmError::RemoteDown {
            engine: self.cache.engine(),
            reason,
        }
    }

    fn loses(&self, desc: &LayerDesc) -> WarmError {
        WarmError::RemoteRefuses {
            engine: self.cache.engine(),
            layer: desc.diff_id,
            reason:
                "it took the layer and has lost of it since: give it more memory, or a policy that \
                     evicts chunks of others first"
                    .to_owned(),
        }
    }

    fn failed(&self, desc: &LayerDesc, err: PresentError) -> WarmError {
        let free_bytes = self.warmer.store.spare_bytes();
        WarmError::of_layer(self.manifest, err, desc.blob_bytes, free_bytes)
    }
}

/// Leaves each layer once, and says for each of them all which one it is.
fn distinct(layers: &mut Vec<LayerDesc>) -> Vec<usize> {
    let mut at = HashMap::new();
    let places = layers.iter().map(|it| {
        let next = at.len();
        *at.entry(it.diff_id).or_insert(next)
    });
    let places = places.collect();
    let mut seen = HashSet::new();
    layers.retain(|it| seen.insert(it.diff_id));
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::BlobDigest;

    #[test]
    fn a_layer_that_is_there_twice_is_seeded_once() {
        let layer = |name: &str| LayerDesc {
            diff_id: DiffId::of(name.as_bytes()),
            blob: BlobDigest::of(name.as_bytes()),
            blob_bytes: 1,
            toc: None,
        };
        let mut layers: Vec<_> = ["a", "empty", "b", "empty", "c"].map(layer).into();
        assert_eq!(distinct(&mut layers), [0, 1, 2, 1, 3]);
        assert_eq!(layers, ["a", "empty", "b", "c"].map(layer));
    }
}
