//! Makes layers that the disk does not have: from the remote content cache, from an index that was
//! pushed beside the image (`pushed`), or from the registry.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use futures_util::{Stream, stream};
use tracing::{debug, info, warn};

use super::{
    disk::{INDEX, Staging},
    feed::{self, Hashing},
    fill,
    lock::FillLock,
    origins::Origin,
    pipeline::Encoding,
    store::{Inner, Layer, Remote, crashed},
};
use crate::{
    chunk, disk,
    fair::Claimant,
    index::layer_index::LayerIndex,
    remote::{LeaseGuard, RemoteManifest, Trust, Turn, WantedChunk},
    sys::{self, MappedFile},
    telemetry::error_chain,
    tier::{LayerDesc, PresentError, SourceError},
};

/// What came of asking everybody but the registry's blob for a layer.
#[derive(Debug)]
enum Elsewhere {
    /// The disk has it now.
    Made,
    /// It is to be made from the registry; with a lease, other nodes wait for its upload.
    Lacking(Option<LeaseGuard>),
}

impl Inner {
    /// Makes a layer that the disk does not have; the caller holds its lock.
    pub(super) async fn make_layer(
        self: &Arc<Self>,
        origin: &Origin,
        lock: FillLock,
    ) -> Result<Arc<Layer>, PresentError> {
        let diff_id = origin.desc.diff_id;
        let elsewhere = self.make_from_elsewhere(origin).await?;
        if let Elsewhere::Lacking(_) = &elsewhere {
            self.make_from_registry(origin).await?;
        }
        let layer = self.open_layer(origin)?.ok_or_else(|| PresentError::Disk {
            reason: format!("layer {diff_id} vanished while it was made"),
        })?;
        // Until here the lock kept it from being evicted; from here on it is in use.
        drop(lock);
        if let Elsewhere::Lacking(lease) = elsewhere {
            layer.origins.worked(origin);
            self.upload_new(&origin.desc, layer.file(), lease);
        }
        self.metrics.layer_cache_layers.inc();
        self.room.sweep_soon();
        if layer.file.is_complete() {
            self.flush_later(&layer);
        }
        Ok(layer)
    }

    /// Makes the layer from the remote content cache, or from an index that was pushed beside its
    /// image, or from the remote again once another node has put it there.
    async fn make_from_elsewhere(
        self: &Arc<Self>,
        origin: &Origin,
    ) -> Result<Elsewhere, PresentError> {
        let desc = &origin.desc;
        let mut found = None;
        if let Some(remote) = &self.remote {
            found = remote.cache.manifest(&desc.diff_id).await;
            if let Some(manifest) = &found
                && self.take_from_remote(remote, desc, manifest).await?
            {
                return Ok(Elsewhere::Made);
            }
        }
        // With that, nobody need wait for another node.
        if self.make_from_pushed_index(origin).await? {
            return Ok(Elsewhere::Made);
        }
        let Some(remote) = &self.remote else {
            return Ok(Elsewhere::Lacking(None));
        };
        if !remote.uploader.has_room() {
            return Ok(Elsewhere::Lacking(None));
        }
        match remote.cache.turn(&desc.diff_id, found.as_deref()).await {
            Turn::Made(manifest) => match self.take_from_remote(remote, desc, &manifest).await? {
                true => Ok(Elsewhere::Made),
                false => Ok(Elsewhere::Lacking(None)),
            },
            Turn::Ours(lease) => Ok(Elsewhere::Lacking(Some(lease))),
            Turn::Alone => Ok(Elsewhere::Lacking(None)),
        }
    }

    /// Makes the layer that `manifest` describes; `false` if the remote has not all of it.
    async fn take_from_remote(
        self: &Arc<Self>,
        remote: &Remote,
        desc: &LayerDesc,
        manifest: &Arc<RemoteManifest>,
    ) -> Result<bool, PresentError> {
        match manifest.trust {
            Trust::Authenticated => self.adopt_remote_index(remote, manifest).await,
            Trust::Unverified => self.copy_remote_layer(remote, desc, manifest).await,
        }
    }

    /// Takes the index from the remote content cache; chunks follow as they are read.
    pub(super) async fn adopt_remote_index(
        self: &Arc<Self>,
        remote: &Remote,
        manifest: &RemoteManifest,
    ) -> Result<bool, PresentError> {
        let diff_id = manifest.diff_id;
        self.make_room(diff_id, manifest.index_bytes).await?;
        let failed = |err| self.blame(diff_id).disk(err);
        let staging = Staging::new(&self.paths, diff_id).map_err(failed)?;
        let file = staging.create(INDEX).map_err(failed)?;
        let keep = |part: &[u8]| disk::write_to_map(&file, part);
        if !remote.cache.index(manifest, keep).await.map_err(failed)? {
            return Ok(false);
        }
        let fits = |it: &LayerIndex<MappedFile>| {
            it.diff_id() == diff_id
                && it.layer_bytes() == manifest.layer_bytes
                && (0..it.n_chunks())
                    .all(|n| it.chunk_digest(n).as_ref() == manifest.chunk_digests.get(n as usize))
        };
        // One without a byte could not be mapped; no index is so short.
        let mapped = MappedFile::new(&file).map_err(failed)?;
        match LayerIndex::decode(mapped) {
            Ok(index) if fits(&index) => {}
            Ok(_) => {
                warn!(layer.diff_id = %diff_id, "remote cache has an index of another layer");
                return Ok(false);
            }
            Err(err) => {
                warn!(layer.diff_id = %diff_id, error = %err, "remote cache has an unusable index");
                return Ok(false);
            }
        }
        staging
            .publish_empty(&self.paths, diff_id, manifest.layer_bytes)
            .map_err(failed)?;
        Ok(true)
    }

    /// Copies the whole layer from a remote content cache that nobody vouches for: the layer's own
    /// digest does, and nothing is served before it matched.
    ///
    /// For want of room as well the registry is asked: how large the layer is, the manifest alone has said.
    async fn copy_remote_layer(
        self: &Arc<Self>,
        remote: &Remote,
        desc: &LayerDesc,
        manifest: &Arc<RemoteManifest>,
    ) -> Result<bool, PresentError> {
        let max_bytes = self.config.max_layer_bytes;
        if max_bytes < manifest.layer_bytes {
            warn!(layer.diff_id = %desc.diff_id, bytes = manifest.layer_bytes, max_bytes,
                "remote cache has a layer larger than cache.max_layer_bytes, asking the registry");
            remote.cache.reject(&desc.diff_id).await;
            return Ok(false);
        }
        match self.make_room(desc.diff_id, manifest.layer_bytes).await {
            Ok(()) => {}
            Err(err) if is_of_size(&err) => {
                warn!(layer.diff_id = %desc.diff_id, bytes = manifest.layer_bytes, error = error_chain(&err),
                    "no room for what the remote cache has, asking the registry");
                return Ok(false);
            }
            Err(err) => return Err(err),
        }
        let wanted = manifest.chunk_digests.iter().zip(0..);
        let wanted = wanted.filter_map(|(digest, number)| {
            let range = chunk::byte_range(number, manifest.layer_bytes);
            Some(WantedChunk {
                number,
                // At most the bytes of a chunk.
                len: usize::try_from(range.end - range.start).ok()?,
                digest: *digest,
            })
        });
        let run = remote
            .cache
            .chunks(Claimant::Publish, &manifest.diff_id, wanted.collect());
        let chunks = stream::unfold(run, |mut run| async move {
            let (_, bytes) = run.next().await?;
            Some((Ok(bytes?), run))
        });
        let copied = self.first_fill(desc, chunks, Encoding::Decompressed).await;
        match copied {
            Ok(bytes) => {
                info!(layer.diff_id = %desc.diff_id, bytes, "layer cached to disk");
                Ok(true)
            }
            // Chunks were missing, or the copy is not the layer: the registry has it.
            Err(PresentError::Refused { reason, .. }) => {
                warn!(layer.diff_id = %desc.diff_id, reason, "remote cache could not give the whole layer");
                remote.cache.reject(&desc.diff_id).await;
                Ok(false)
            }
            Err(err) if is_of_size(&err) => {
                warn!(layer.diff_id = %desc.diff_id, error = error_chain(&err),
                    "remote cache has a layer that is too large, asking the registry");
                if let PresentError::Limit { .. } = err {
                    remote.cache.reject(&desc.diff_id).await;
                }
                Ok(false)
            }
            Err(err) => Err(err),
        }
    }

    /// Builds the layer from its blob.
    async fn make_from_registry(self: &Arc<Self>, origin: &Origin) -> Result<(), PresentError> {
        let desc = &origin.desc;
        // How large it becomes is not known; smaller than its blob it will hardly be.
        self.make_room(desc.diff_id, desc.blob_bytes).await?;
        let turn = self.decompressions.take(origin.claimant()).await;
        let started = Instant::now();
        info!(layer.diff_id = %desc.diff_id, layer.blob = %desc.blob, bytes = desc.blob_bytes,
            "decompressing layer (first access)");
        let mut built = self.fill_from_registry(origin).await;
        if let Err(err) = &built
            && origin.distrusts(err)
        {
            built = self.fill_from_registry(origin).await;
        }
        drop(turn);
        self.decompressed(desc, started, built.as_ref().copied());
        built.map(|_layer_bytes| ())
    }

    async fn fill_from_registry(&self, origin: &Origin) -> Result<u64, PresentError> {
        let desc = &origin.desc;
        let stream = origin.open_all().await?;
        self.first_fill(desc, stream, Encoding::Blob).await
    }

    /// Counts and logs the end of a decompression.
    pub(super) fn decompressed(
        &self,
        desc: &LayerDesc,
        started: Instant,
        outcome: Result<u64, &PresentError>,
    ) {
        let label = if outcome.is_ok() { "ok" } else { "error" };
        self.metrics
            .layer_decompressions
            .with_label_values(&[label])
            .inc();
        match outcome {
            Ok(bytes) => {
                self.metrics.layer_decompressed_bytes.inc_by(bytes);
                info!(layer.diff_id = %desc.diff_id, bytes, duration_ms = millis(started),
                    path = %self.paths.layer(desc.diff_id).display(),
                    "layer decompressed and cached to disk");
            }
            // Whoever wants the layer tells of it: a reader tries a full disk again and again.
            Err(err) if err.is_of_disk() => {
                debug!(layer.diff_id = %desc.diff_id, error = %error_chain(err), "decompressing layer failed");
            }
            Err(err) => {
                warn!(layer.diff_id = %desc.diff_id, error = %error_chain(err), "decompressing layer failed");
            }
        }
        // A fill's buffers are a large part of the process, and so is the code that led to it; the next
        // one may be long in coming.
        sys::trim_allocator();
        sys::drop_code();
    }

    async fn first_fill(
        &self,
        desc: &LayerDesc,
        stream: impl Stream<Item = Result<Bytes, SourceError>>,
        encoding: Encoding,
    ) -> Result<u64, PresentError> {
        let (feed, reader) = feed::feed(Hashing::Yes);
        let (paths, config, desc) = (self.paths.clone(), self.config.clone(), desc.clone());
        let (diff_id, room) = (desc.diff_id, Arc::clone(&self.room));
        let work = self.runtime.spawn_blocking(move || {
            fill::first_fill(&paths, &config, &room, &desc, reader, encoding)
        });
        let ((), outcome) = tokio::join!(feed.run(stream), work);
        let outcome = outcome.unwrap_or_else(|err| Err(crashed(diff_id, &err)));
        if outcome.is_err() {
            // What was written counts no more.
            self.room.sweep_soon();
        }
        outcome
    }
}

/// Whether a smaller layer might not have failed so.
fn is_of_size(err: &PresentError) -> bool {
    matches!(
        err,
        PresentError::Limit { .. } | PresentError::NoSpace { .. } | PresentError::CacheFull { .. }
    )
}

/// Whole milliseconds since `started`, for logs.
fn millis(started: Instant) -> u64 {
    u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)
}
