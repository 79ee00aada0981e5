//! Makes chunks present for readers: from the remote content cache one by one, or from a stream
//! of the whole layer out of the registry.

use std::{
    ops::Range,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{
    feed, fill,
    store::{Inner, Layer, OTHER_PROCESS_POLL, RefillState, crashed},
};
use crate::{
    metrics::{Outcome, Tier},
    remote::Repair,
    telemetry::error_chain,
    tier::PresentError,
};

/// How often a refill of one layer is tried for one reader before its error is the reader's.
const REFILLS_PER_READER: u32 = 2;

impl Inner {
    /// Makes `chunks` of `layer` present, each from the first tier that has it.
    pub(super) async fn present(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunks: Range<u32>,
    ) -> Result<(), PresentError> {
        let started = Instant::now();
        let mut deepest = Tier::Disk;
        for chunk in chunks {
            let tier = self.present_chunk(layer, chunk).await?;
            deepest = match (deepest, tier) {
                (Tier::Registry, _) | (_, Tier::Registry) => Tier::Registry,
                (Tier::ContentCache, _) | (_, Tier::ContentCache) => Tier::ContentCache,
                (Tier::Disk, Tier::Disk) => Tier::Disk,
            };
        }
        match deepest {
            Tier::Disk => return Ok(()),
            Tier::ContentCache => self.metrics.tier_read(Tier::ContentCache, Outcome::Hit),
            Tier::Registry => {
                if self.remote.is_some() {
                    self.metrics.tier_read(Tier::ContentCache, Outcome::Miss);
                }
                self.metrics.tier_read(Tier::Registry, Outcome::Hit);
            }
        }
        let duration = self
            .metrics
            .tier_read_duration
            .with_label_values(&[deepest.label()]);
        duration.observe(started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Makes one chunk present and says which tier had it.
    async fn present_chunk(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
    ) -> Result<Tier, PresentError> {
        let file = &layer.file;
        if file.n_chunks() <= chunk {
            let reason = format!("it has no chunk {chunk}");
            return Err(PresentError::Refused {
                layer: file.diff_id(),
                reason,
            });
        }
        let is_present = || file.has(chunk..chunk + 1);
        if is_present() {
            return Ok(Tier::Disk);
        }
        // A stream that is under way passes every chunk; else the remote is asked, by one for all.
        if !layer.is_refilling() {
            let flight = self.chunk_flights.join((file.diff_id(), chunk)).await;
            if is_present() {
                return Ok(Tier::ContentCache);
            }
            if !layer.is_refilling() {
                if self.adopt(layer, chunk).await? {
                    return Ok(Tier::Disk);
                }
                if self.fetch_chunk(layer, chunk).await? {
                    return Ok(Tier::ContentCache);
                }
            }
            drop(flight);
        }
        let started = Instant::now();
        let mut n_failures = 0;
        loop {
            let outcome = self.ride_refill(layer, chunk).await;
            if is_present() {
                return Ok(Tier::Registry);
            }
            n_failures += 1;
            let err = match outcome {
                Err(err) => err,
                // The stream was stopped, or the chunk was dropped again behind it.
                Ok(()) => PresentError::Timeout {
                    layer: file.diff_id(),
                    waited: started.elapsed(),
                },
            };
            if REFILLS_PER_READER <= n_failures || !is_transient(&err) {
                self.metrics.tier_read(Tier::Registry, Outcome::Error);
                warn!(layer.diff_id = %file.diff_id(), chunk, error = %error_chain(&err),
                    "no tier could give a chunk");
                return Err(err);
            }
        }
    }

    /// After an unclean stop: takes the chunk that is on disk if it is right.
    async fn adopt(&self, layer: &Arc<Layer>, chunk: u32) -> Result<bool, PresentError> {
        let file = Arc::clone(&layer.file);
        let diff_id = file.diff_id();
        let adopted = self
            .runtime
            .spawn_blocking(move || file.adopt_chunk(chunk))
            .await;
        match adopted {
            Ok(Ok(is_adopted)) => Ok(is_adopted),
            // What cannot be read can be fetched.
            Ok(Err(err)) => {
                debug!(layer.diff_id = %diff_id, chunk, error = %err, "chunk on disk cannot be read");
                Ok(false)
            }
            Err(err) => Err(crashed(diff_id, &err)),
        }
    }

    /// Takes the chunk from the remote content cache; `false` if that does not have it.
    async fn fetch_chunk(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
    ) -> Result<bool, PresentError> {
        let Some(remote) = &self.remote else {
            return Ok(false);
        };
        let file = Arc::clone(&layer.file);
        let diff_id = file.diff_id();
        let Some(digest) = file.index().chunk_digest(chunk) else {
            return Ok(false);
        };
        let Ok(len) = usize::try_from(file.chunk_bytes(chunk)) else {
            return Ok(false);
        };
        let Some(bytes) = remote.cache.chunk(&diff_id, chunk, len, &digest).await else {
            layer
                .missed
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(chunk);
            return Ok(false);
        };
        let delivered = bytes.len() as u64;
        let room = Arc::clone(&self.room);
        let written = self
            .runtime
            .spawn_blocking(move || room.with_room(|| file.write_chunk(chunk, &bytes)))
            .await;
        let new_bytes = written
            .map_err(|err| crashed(diff_id, &err))?
            .map_err(|err| self.blame(diff_id).disk(err))?;
        let Some(new_bytes) = new_bytes else {
            return Ok(false);
        };
        self.room.grew(new_bytes);
        let tier = Tier::ContentCache.label();
        self.metrics
            .tier_read_bytes
            .with_label_values(&[tier])
            .inc_by(delivered);
        if layer.file.is_complete() {
            info!(layer.diff_id = %diff_id, bytes = layer.file.layer_bytes(),
                path = %layer.file.dir().display(), "layer cached to disk");
            self.flush_later(layer);
        }
        Ok(true)
    }

    /// Waits until the refill of `layer` has passed `chunk`, or has ended; starts it if need be.
    async fn ride_refill(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
    ) -> Result<(), PresentError> {
        let stall = Duration::from_secs(self.config.stall_timeout_seconds);
        let mut progress = self.start_refill(layer);
        loop {
            if layer.file.has(chunk..chunk + 1) {
                return Ok(());
            }
            let state = progress.borrow_and_update().clone();
            match state {
                RefillState::Running => {}
                RefillState::Done => return Ok(()),
                RefillState::Failed(err) => return Err(err),
            }
            match tokio::time::timeout(stall, progress.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Ok(()),
                Err(_) => {
                    return Err(PresentError::Timeout {
                        layer: layer.file.diff_id(),
                        waited: stall,
                    });
                }
            }
        }
    }

    /// Joins the refill under way, or starts one.
    fn start_refill(self: &Arc<Self>, layer: &Arc<Layer>) -> watch::Receiver<RefillState> {
        let mut refill = layer.refill.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(progress) = &*refill {
            self.metrics.single_flight_followers.inc();
            return progress.clone();
        }
        let (sender, receiver) = watch::channel(RefillState::Running);
        *refill = Some(receiver.clone());
        let inner = Arc::clone(self);
        let layer = Arc::clone(layer);
        self.spawn(async move {
            let outcome = inner.refill(&layer, &sender).await;
            *layer.refill.lock().unwrap_or_else(PoisonError::into_inner) = None;
            let _ = sender.send(match outcome {
                Ok(()) => RefillState::Done,
                Err(err) => RefillState::Failed(err),
            });
        });
        receiver
    }

    /// Streams the layer's blob past its missing chunks.
    async fn refill(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        progress: &watch::Sender<RefillState>,
    ) -> Result<(), PresentError> {
        let origin = layer.origin();
        let (desc, diff_id) = (&origin.desc, origin.desc.diff_id);
        // Another process may be at it: then this one wakes its readers as the bits appear.
        let lock = loop {
            match self.try_lock(diff_id)? {
                Some(lock) => break lock,
                None => tokio::time::sleep(OTHER_PROCESS_POLL).await,
            }
            progress.send_replace(RefillState::Running);
        };
        if layer.file.is_complete() {
            return Ok(());
        }
        let permit = self.decompressions.acquire().await;
        let started = Instant::now();
        info!(layer.diff_id = %diff_id, layer.blob = %desc.blob, bytes = desc.blob_bytes,
            "decompressing layer (missing chunks)");
        let filled = self.stream_past(layer, progress).await;
        drop((permit, lock));
        let outcome = filled.as_ref().map(|()| layer.file.layer_bytes());
        self.decompressed(desc, started, outcome);
        filled?;
        self.flush_later(layer);
        let chunks =
            std::mem::take(&mut *layer.missed.lock().unwrap_or_else(PoisonError::into_inner));
        self.upload_later(
            desc,
            &layer.file,
            Repair {
                chunks,
                index: false,
            },
        );
        Ok(())
    }

    async fn stream_past(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        progress: &watch::Sender<RefillState>,
    ) -> Result<(), PresentError> {
        let origin = layer.origin();
        let (desc, diff_id) = (&origin.desc, origin.desc.diff_id);
        let opened = origin.source.open(&desc.blob, desc.blob_bytes, 0).await;
        let stream = opened.map_err(|source| PresentError::Origin {
            layer: diff_id,
            source,
        })?;
        let (feed, reader) = feed::feed();
        let (inner, file, progress) = (Arc::clone(self), Arc::clone(&layer.file), progress.clone());
        let work = self.runtime.spawn_blocking(move || {
            let mut passed = |new_bytes| {
                inner.room.grew(new_bytes);
                let tier = Tier::Registry.label();
                inner
                    .metrics
                    .tier_read_bytes
                    .with_label_values(&[tier])
                    .inc_by(new_bytes);
                progress.send_replace(RefillState::Running);
            };
            fill::refill(&inner.paths, &inner.room, &file, reader, &mut passed)
        });
        let ((), outcome) = tokio::join!(feed.run(stream), work);
        outcome.unwrap_or_else(|err| Err(crashed(diff_id, &err)))
    }
}

/// Whether the same fill may succeed when it is tried again.
fn is_transient(err: &PresentError) -> bool {
    match err {
        PresentError::Origin { source, .. } => source.is_transient(),
        PresentError::Timeout { .. } => true,
        PresentError::Refused { .. }
        | PresentError::NoSpace { .. }
        | PresentError::CacheFull { .. }
        | PresentError::Disk { .. }
        | PresentError::Limit { .. }
        | PresentError::Unknown { .. } => false,
    }
}
