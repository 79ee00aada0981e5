//! Makes chunks present for readers: from the remote content cache one by one, or from a stream
//! of the whole layer out of the registry.

use std::{
    ops::{ControlFlow, Range},
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{
    access::{Access, Checkpoints, Span},
    feed::{self, Hashing},
    fill,
    origins::Origin,
    parallel::{self, Ran, SpanSink},
    random::Window,
    riders,
    span::{self, SpanError},
    store::{Inner, Layer, NOT_BEGUN, OTHER_PROCESS_POLL, RefillState, crashed},
};
use crate::{
    fair::Claimant,
    metrics::{Outcome, Tier},
    remote::Repair,
    telemetry::error_chain,
    tier::{Prefetch, PresentError},
};

/// Parts of a layer that the remote content cache lacked, from which on the layer is streamed whole.
pub(super) const LOST_CHUNKS: u32 = 8;

/// Who holds a layer for its refill's sake: its task and its blocking thread.
const REFILL_HOLDS: usize = 2;

/// How often a refill of one layer is tried for one reader before its error is the reader's.
const REFILLS_PER_READER: u32 = 2;

impl Inner {
    /// Makes `chunks` of `layer` present for `who`, each from the first tier that has it.
    pub(super) async fn present(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunks: Range<u32>,
        who: Claimant,
    ) -> Result<(), PresentError> {
        let started = Instant::now();
        layer.note_wanted(chunks.clone());
        let _not_evicted = layer.file.wait_for(&chunks);
        let mut deepest = Tier::Disk;
        for chunk in chunks {
            if !layer.file.has(chunk..chunk + 1) {
                self.through.admit(Instant::now())?;
            }
            let tier = match self.present_chunk(layer, chunk, who).await {
                Ok(tier) => tier,
                Err(err) => {
                    if err.is_of_disk() {
                        self.through.pause(&err, Instant::now());
                    }
                    return Err(err);
                }
            };
            if tier != Tier::Disk {
                self.through.resume();
            }
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
        who: Claimant,
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
        // A stream that is about to pass the chunk is waited for; else one looks for it, for all.
        if !self.waits_for_stream(layer, chunk).await {
            let flight = self.chunk_flights.join((file.diff_id(), chunk)).await;
            if is_present() {
                return Ok(Tier::ContentCache);
            }
            if !self.waits_for_stream(layer, chunk).await {
                if self.adopt(layer, chunk).await? {
                    return Ok(Tier::Disk);
                }
                let waiting = self.warming.readers.enter();
                if self.fetch_for_reader(layer, chunk, who).await? {
                    return Ok(Tier::ContentCache);
                }
                drop(waiting);
                if let Some(access) = self.access(layer).await
                    && self
                        .read_random(layer, &access, chunk, Window::Likely(who))
                        .await?
                {
                    if file.is_complete() {
                        self.completed(layer);
                    } else {
                        self.complete_beside(layer);
                    }
                    return Ok(Tier::Registry);
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
            if err.is_of_disk() {
                // The reader is served through, and the log has it from there.
                return Err(err);
            }
            if REFILLS_PER_READER <= n_failures || !is_transient(&err) {
                self.metrics.tier_read(Tier::Registry, Outcome::Error);
                warn!(layer.diff_id = %file.diff_id(), chunk, error = %error_chain(&err),
                    "no tier could give a chunk");
                return Err(err);
            }
        }
    }

    /// Whether the stream under way is the way to `chunk`: it is about to pass it, or passes all and
    /// there is no other way than it. One that has not begun is the last way, behind the remote.
    pub(super) async fn waits_for_stream(&self, layer: &Arc<Layer>, chunk: u32) -> bool {
        layer.is_passing(chunk) || (layer.is_streaming() && self.access(layer).await.is_none())
    }

    /// Has the rest of a layer streamed that was read at random.
    ///
    /// Where the remote content cache has the layer, a single chunk that it lost is no reason. A layer that
    /// had to lose extents, or would have others lose theirs, is left as it is: what nobody wants yet
    /// must not take the room of what was wanted.
    fn complete_beside(self: &Arc<Self>, layer: &Arc<Layer>) {
        let from = match self.remote.is_some() && !layer.file.learns() {
            true => LOST_CHUNKS,
            false => 1,
        };
        let n_spans = layer
            .random
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .n_spans();
        let completes = match layer.users.wants().unwrap_or(self.config.prefetch) {
            Prefetch::None => false,
            Prefetch::Recorded => self.config.complete_layers,
            Prefetch::All => true,
        };
        if completes
            && from <= n_spans
            && !layer.is_refilling()
            && !layer.file.was_cut()
            && self.room.has_spare(layer.file.absent_bytes())
        {
            self.start_refill(layer);
        }
    }

    /// Takes the chunk from the remote content cache; `false` if that does not have it.
    pub(super) async fn fetch_chunk(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
        who: Claimant,
    ) -> Result<bool, PresentError> {
        if self.remote.is_none() {
            return Ok(false);
        }
        let Some(bytes) = self.remote_chunk(layer, chunk, who).await else {
            layer.note_missed(chunk);
            return Ok(false);
        };
        self.keep_fetched(layer, chunk, bytes).await
    }

    /// Writes a chunk that the remote content cache had; `false` if it is not the right one after all.
    pub(super) async fn keep_fetched(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
        bytes: Bytes,
    ) -> Result<bool, PresentError> {
        let file = Arc::clone(&layer.file);
        let diff_id = file.diff_id();
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
            self.completed(layer);
        }
        Ok(true)
    }

    /// Asks the remote content cache for the chunk's bytes.
    pub(super) async fn remote_chunk(
        &self,
        layer: &Layer,
        chunk: u32,
        who: Claimant,
    ) -> Option<Bytes> {
        let cache = &self.remote.as_ref()?.cache;
        let file = &layer.file;
        let digest = file.chunk_digest(chunk)?;
        let len = usize::try_from(file.chunk_bytes(chunk)).ok()?;
        let diff_id = file.diff_id();
        cache.chunk(who, &diff_id, chunk, len, &digest).await
    }

    /// Waits until the refill of `layer` has passed `chunk`, or has ended; starts it if need be.
    async fn ride_refill(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
    ) -> Result<(), PresentError> {
        let stall = Duration::from_secs(self.config.stall_timeout_seconds);
        let _riding = layer.riders.enter();
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
    pub(super) fn start_refill(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
    ) -> watch::Receiver<RefillState> {
        let mut refill = layer.refill.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(progress) = &*refill {
            self.metrics.single_flight_followers.inc();
            return progress.clone();
        }
        let (sender, receiver) = watch::channel(RefillState::Running);
        layer.refill_at.store(NOT_BEGUN, Ordering::Relaxed);
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
        let origin = layer.origins.first();
        let (desc, diff_id) = (&origin.desc, origin.desc.diff_id);
        // Another process may be at it: then this one wakes its readers as the bits appear.
        let lock = loop {
            match self.try_lock(diff_id)? {
                Some(lock) => break lock,
                None => tokio::time::sleep(OTHER_PROCESS_POLL).await,
            }
            progress.send_replace(RefillState::Running);
        };
        if layer.file.is_suspect() {
            self.adopt_all(layer, progress).await?;
        }
        if layer.file.is_complete() {
            self.flush_later(layer);
            return Ok(());
        }
        if self.fill_by_pieces(layer, progress).await? {
            return Ok(());
        }
        let turn = async {
            tokio::select! {
                biased;
                turn = self.decompressions.take(Claimant::Background) => turn,
                () = layer.riders.some() => self.decompressions.take(origin.claimant()).await,
            }
        };
        let turn = riders::telling(progress, turn).await;
        let started = Instant::now();
        info!(layer.diff_id = %diff_id, layer.blob = %desc.blob, bytes = desc.blob_bytes,
            "decompressing layer (missing chunks)");
        let stream = |origin| self.stream_past(layer, origin, progress);
        let filled = self.try_origins(layer, None, stream).await;
        drop((turn, lock));
        if let Err(PresentError::Unknown { .. }) = filled {
            debug!(layer.diff_id = %diff_id, "nobody has the layer open any more, no need for the rest");
            return Ok(());
        }
        if filled.is_ok() {
            self.refute_pieces(layer).await;
        }
        layer.renew_access();
        let outcome = filled.as_ref().map(|()| layer.file.layer_bytes());
        self.decompressed(desc, started, outcome);
        filled?;
        self.completed(layer);
        Ok(())
    }

    /// Has a layer that became complete flushed, and what the remote content cache lacked of it put
    /// there.
    pub(super) fn completed(self: &Arc<Self>, layer: &Arc<Layer>) {
        let file = &layer.file;
        info!(layer.diff_id = %file.diff_id(), bytes = file.layer_bytes(),
            path = %file.dir().display(), "layer cached to disk");
        self.flush_later(layer);
        let missed = &mut *layer.missed.lock().unwrap_or_else(PoisonError::into_inner);
        let chunks = std::mem::take(missed);
        // What was laid out by a table is nowhere before one node has all of it.
        if (!chunks.is_empty() || file.learns()) && self.is_shared(file) {
            let repair = Repair {
                chunks,
                index: false,
            };
            self.upload_later(&layer.origins.first().desc, file, repair);
        }
    }

    /// Counts bytes of a layer that came from the registry.
    pub(super) fn delivered(self: &Arc<Self>, new_bytes: u64) {
        self.room.grew(new_bytes);
        let tier = Tier::Registry.label();
        let delivered = self.metrics.tier_read_bytes.with_label_values(&[tier]);
        delivered.inc_by(new_bytes);
    }

    /// Streams all of the blob past the layer's missing chunks.
    async fn stream_past(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        origin: Origin,
        progress: &watch::Sender<RefillState>,
    ) -> Result<(), PresentError> {
        if let Some(access) = self.access(layer).await
            && access.is_of(&origin.desc)
            && access.covers_all()
            && !access.is_by_pieces()
        {
            match self
                .stream_spans(layer, &origin, Arc::clone(&access), progress)
                .await
            {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // The map may be at fault, which the stream alone does not need; or a mirror, which is
                // asked no more then.
                Err(err @ PresentError::Refused { .. }) => {
                    if !origin.distrusts(&err) {
                        self.led_astray(layer, &access).await;
                    }
                    warn!(layer.diff_id = %layer.file.diff_id(), error = %err,
                        "access map of a layer leads astray, streaming it without");
                }
                Err(err) => return Err(err),
            }
        }
        // One with the map may have failed on its way.
        layer.refill_at.store(NOT_BEGUN, Ordering::Relaxed);
        let stream = origin.open_all().await?;
        let (feed, reader) = feed::feed(Hashing::Yes);
        let (inner, layer, progress) = (Arc::clone(self), Arc::clone(layer), progress.clone());
        let (desc, diff_id) = (origin.desc.clone(), origin.desc.diff_id);
        layer.refill_at.store(0, Ordering::Relaxed);
        let work = self.runtime.spawn_blocking(move || {
            let mut passed = |chunk, new_bytes| {
                layer.refill_at.store(chunk + 1, Ordering::Relaxed);
                inner.passed(&layer, &progress, new_bytes)
            };
            fill::refill(
                &inner.paths,
                &inner.room,
                &layer.file,
                &desc,
                reader,
                &mut passed,
            )
        });
        let ((), outcome) = tokio::join!(feed.run(stream), work);
        outcome.unwrap_or_else(|err| Err(crashed(diff_id, &err)))
    }

    /// Streams all of the blob past the layer's missing chunks, decompressing at several places at
    /// once; `false` if some are left.
    async fn stream_spans(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        origin: &Origin,
        access: Arc<Access>,
        progress: &watch::Sender<RefillState>,
    ) -> Result<bool, PresentError> {
        let stream = origin.open_all().await?;
        let (feed, reader) = feed::feed(Hashing::No);
        let (inner, layer, progress) = (Arc::clone(self), Arc::clone(layer), progress.clone());
        let desc = origin.desc.clone();
        let work = self.runtime.spawn_blocking(move || {
            let Access::Checkpoints(access) = &*access else {
                return Ok(false);
            };
            let sink = Passing {
                inner: &inner,
                layer: &layer,
                access,
                progress: &progress,
            };
            match parallel::run(reader, access, layer.file.layer_bytes(), &sink) {
                Ok(Ran::Unwanted) => Err(PresentError::Unknown {
                    layer: desc.diff_id,
                }),
                Ok(Ran::Whole(blob_bytes, is_whole)) => {
                    fill::check_blob_bytes(&desc, blob_bytes).map(|()| is_whole)
                }
                Err(err) => Err(inner.span_failed(&layer, err)),
            }
        });
        let ((), outcome) = tokio::join!(feed.run(stream), work);
        outcome.unwrap_or_else(|err| Err(crashed(origin.desc.diff_id, &err)))
    }

    /// Notes that a stream made bytes present, lets readers go first, and says whether anybody has
    /// the layer open.
    fn passed(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        progress: &watch::Sender<RefillState>,
        new_bytes: u64,
    ) -> ControlFlow<()> {
        self.delivered(new_bytes);
        progress.send_replace(RefillState::Running);
        self.demand.make_way();
        if Arc::strong_count(layer) <= REFILL_HOLDS {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }
}

/// Writes the spans of a stream.
struct Passing<'a> {
    inner: &'a Arc<Inner>,
    layer: &'a Arc<Layer>,
    access: &'a Checkpoints,
    progress: &'a watch::Sender<RefillState>,
}

impl SpanSink for Passing<'_> {
    fn take(
        &self,
        span: &Span,
        mut bytes: &[u8],
        buffer: &mut Vec<u8>,
    ) -> Result<ControlFlow<()>, SpanError> {
        let file = &self.layer.file;
        let mut take = |chunk, bytes: &[u8]| {
            let new_bytes = span::write(file, &self.inner.room, chunk, bytes)?;
            Ok(self.inner.passed(self.layer, self.progress, new_bytes))
        };
        span::decompress(file, self.access, span, &mut bytes, buffer, &mut take)
    }

    fn is_there(&self, span: &Span) -> bool {
        self.layer.file.has(span.chunks.clone())
    }

    fn comes_to(&self, span: &Span) {
        self.layer
            .refill_at
            .store(span.chunks.start, Ordering::Relaxed);
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
