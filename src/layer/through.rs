//! Serves chunks past a disk that cannot take or give them: fetches and verifies them as ever, and lends
//! them to readers in memory.
//!
//! After a write that failed, the disk is let alone for a while ([`PAUSE`]): readers are told at once, and
//! have chunks lent. Then one of them tries again, so that the cache recovers by itself when there is room.
//! What was lent last is kept for a moment, because a reader in order comes for each chunk several times.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tracing::{debug, info, warn};

use super::{
    disk::LayerFile,
    feed::{self, Hashing},
    origins::Origin,
    seek,
    span::{SpanError, TakeChunk},
    store::{Inner, Layer, crashed},
};
use crate::{
    chunk::CHUNK_BYTES,
    digest::{ChunkDigest, DiffId},
    fair::{Claimant, Turns},
    metrics::{Outcome, Tier},
    telemetry::error_chain,
    tier::{
        Chunk, PresentError,
        lent::{LentChunk, MAX_LENT},
    },
};

/// How long nothing is written for readers after a write that failed: a try costs a fetch for nothing, and
/// an eviction that looks through the whole cache.
const PAUSE: Duration = Duration::from_secs(3);

/// How long a chunk is kept that was lent: a reader in order has long come back.
const KEEP: Duration = Duration::from_secs(5);

/// How long the log is silent about chunks that cannot be read, after one.
const QUIET: Duration = Duration::from_secs(60);

/// Values of the label `reason`.
const NO_SPACE: &str = "no_space";
const IO_ERROR: &str = "io_error";

/// Whether the disk is let alone, and what is lent.
#[derive(Debug)]
pub(super) struct Through {
    /// The right to fetch a chunk into memory.
    turns: Turns,
    /// std Mutex: held to look or to change a field, never across an await.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pause: Option<Pause>,
    /// What was lent, the oldest first, at most [`MAX_LENT`].
    kept: VecDeque<(LentChunk, Instant)>,
    is_sweeping: bool,
    warned_of_bad: Option<Instant>,
}

#[derive(Debug)]
struct Pause {
    since: Instant,
    reason: PresentError,
}

impl Default for Through {
    fn default() -> Self {
        Self {
            turns: Turns::new(MAX_LENT),
            state: Mutex::default(),
        }
    }
}

impl Through {
    /// Lets a reader try to have a chunk written: all while the disk does well, else one for each pause.
    ///
    /// # Errors
    /// What is wrong with the disk.
    pub(super) fn admit(&self, now: Instant) -> Result<(), PresentError> {
        match &mut self.state().pause {
            None => Ok(()),
            Some(pause) if now.duration_since(pause.since) < PAUSE => Err(pause.reason.clone()),
            Some(pause) => {
                pause.since = now;
                Ok(())
            }
        }
    }

    /// Whether the disk is let alone.
    pub(super) fn is_paused(&self) -> bool {
        self.state().pause.is_some()
    }

    /// Hears that the disk could not take a chunk.
    pub(super) fn pause(&self, reason: &PresentError, now: Instant) {
        let reason = reason.clone();
        let text = error_chain(&reason);
        let pause = Pause { since: now, reason };
        if self.state().pause.replace(pause).is_none() {
            warn!(
                error = text,
                "cache disk cannot take what is read: it is served without being kept, and tried again every few seconds"
            );
        }
    }

    /// Hears that the disk took a chunk.
    pub(super) fn resume(&self) {
        if self.state().pause.take().is_some() {
            info!("cache disk takes what is read again");
        }
    }

    /// What a chunk is lent for that is not present.
    fn reason(&self) -> &'static str {
        match &self.state().pause {
            Some(pause) if matches!(pause.reason, PresentError::Disk { .. }) => IO_ERROR,
            // A pause that has just ended was most likely for want of room: that comes and goes.
            Some(_) | None => NO_SPACE,
        }
    }

    fn kept(&self, layer: DiffId, chunk: u32, now: Instant) -> Option<LentChunk> {
        let mut state = self.state();
        let (lent, last) = state.kept.iter_mut().find(|it| it.0.is(layer, chunk))?;
        *last = now;
        Some(lent.clone())
    }

    /// Keeps `lent`; says whether somebody is to come for [`Self::sweep`].
    fn keep(&self, lent: LentChunk, now: Instant) -> bool {
        let mut state = self.state();
        if MAX_LENT <= state.kept.len() {
            state.kept.pop_front();
        }
        state.kept.push_back((lent, now));
        !std::mem::replace(&mut state.is_sweeping, true)
    }

    /// Gives back what was not asked for lately; says whether there is nothing left.
    fn sweep(&self, now: Instant) -> bool {
        let mut state = self.state();
        state.kept.retain(|it| now.duration_since(it.1) < KEEP);
        state.is_sweeping = !state.kept.is_empty();
        state.kept.is_empty()
    }

    /// Whether the log is to have it that a chunk on disk is bad.
    fn warns_of_bad(&self, now: Instant) -> bool {
        let last = &mut self.state().warned_of_bad;
        let is_due = last.is_none_or(|it| QUIET <= now.duration_since(it));
        if is_due {
            *last = Some(now);
        }
        is_due
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Fetches a chunk of `layer` into memory for `who`, from the first tier that has it.
    pub(super) async fn lend(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        wanted: Chunk,
        who: Claimant,
    ) -> Result<LentChunk, PresentError> {
        let (file, number) = (&layer.file, wanted.number);
        let diff_id = file.diff_id();
        if file.n_chunks() <= number || file.chunk_bytes(number) != wanted.bytes {
            let reason = format!("it has no chunk {number} of {} bytes", wanted.bytes);
            return Err(PresentError::Refused {
                layer: diff_id,
                reason,
            });
        }
        let reason = if file.has(number..number + 1) {
            // Then whoever asks could not read it.
            IO_ERROR
        } else {
            self.through.reason()
        };
        let kept = || self.through.kept(diff_id, number, Instant::now());
        let lent = match kept() {
            Some(lent) => lent,
            None => {
                let _flight = self.chunk_flights.join((diff_id, number)).await;
                // Else one has fetched it for all who waited.
                match kept() {
                    Some(lent) => lent,
                    None => self.fetch_lent(layer, number, who).await?,
                }
            }
        };
        let counter = &self.metrics.chunks_served_through;
        counter.with_label_values(&[reason]).inc();
        Ok(lent)
    }

    async fn fetch_lent(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
        who: Claimant,
    ) -> Result<LentChunk, PresentError> {
        let _turn = self.through.turns.take(who).await;
        let started = Instant::now();
        let found = self.find_lent(layer, chunk, who).await;
        let (lent, tier) = found.inspect_err(|err| {
            debug!(layer.diff_id = %layer.file.diff_id(), chunk, error = error_chain(err),
                "a chunk cannot be served through");
        })?;
        if tier != Tier::Disk {
            self.metrics.tier_read(tier, Outcome::Hit);
            let bytes = self
                .metrics
                .tier_read_bytes
                .with_label_values(&[tier.label()]);
            bytes.inc_by(layer.file.chunk_bytes(chunk));
            let duration = &self.metrics.tier_read_duration;
            let duration = duration.with_label_values(&[tier.label()]);
            duration.observe(started.elapsed().as_secs_f64());
        }
        if self.through.keep(lent.clone(), Instant::now()) {
            let inner = Arc::clone(self);
            self.spawn(async move {
                loop {
                    tokio::time::sleep(KEEP).await;
                    if inner.through.sweep(Instant::now()) {
                        break;
                    }
                }
            });
        }
        Ok(lent)
    }

    async fn find_lent(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
        who: Claimant,
    ) -> Result<(LentChunk, Tier), PresentError> {
        if let Some(lent) = self.lend_from_disk(layer, chunk).await? {
            return Ok((lent, Tier::Disk));
        }
        if let Some(bytes) = self.remote_chunk(layer, chunk, who).await {
            let lent = self.seal_later(layer, chunk, bytes).await?;
            return Ok((lent, Tier::ContentCache));
        }
        let lent = match self.lend_random(layer, chunk, who).await? {
            Some(lent) => lent,
            None => self.lend_from_stream(layer, chunk, who).await?,
        };
        Ok((lent, Tier::Registry))
    }

    /// Takes a chunk that is marked present from the disk after all; if it cannot be read there, or is
    /// wrong, it is marked absent.
    async fn lend_from_disk(
        &self,
        layer: &Arc<Layer>,
        chunk: u32,
    ) -> Result<Option<LentChunk>, PresentError> {
        // After an unclean stop it may be there without a mark.
        self.adopt(layer, chunk).await?;
        if !layer.file.has(chunk..chunk + 1) {
            return Ok(None);
        }
        let file = Arc::clone(&layer.file);
        let diff_id = file.diff_id();
        let read = self.runtime.spawn_blocking(move || {
            let mut bytes = Vec::new();
            let is_right = file.verify_present(chunk, &mut bytes);
            (is_right, bytes)
        });
        let (is_right, bytes) = read.await.map_err(|err| crashed(diff_id, &err))?;
        let reason = match is_right {
            Ok(Some(true)) => return self.seal_later(layer, chunk, bytes.into()).await.map(Some),
            // It was evicted meanwhile.
            Ok(None) => return Ok(None),
            Ok(Some(false)) => {
                let failures = &self.metrics.verify_failures;
                failures.with_label_values(&[Tier::Disk.label()]).inc();
                "it does not match its digest".to_owned()
            }
            Err(err) => err.to_string(),
        };
        layer.file.drop_chunk(chunk);
        if self.through.warns_of_bad(Instant::now()) {
            warn!(layer.diff_id = %diff_id, chunk, reason, path = %layer.file.dir().display(),
                "chunk on disk is bad, fetching it anew: check the cache disk");
        }
        Ok(None)
    }

    /// Reads the part of the blob that has the chunk; `None` if a stream is the only way.
    async fn lend_random(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
        who: Claimant,
    ) -> Result<Option<LentChunk>, PresentError> {
        let Some(access) = self.access(layer).await else {
            return Ok(None);
        };
        let Some(span) = access.span(chunk..chunk + 1) else {
            return Ok(None);
        };
        let _demanded = self.demand.enter();
        let found = Arc::new(Mutex::new(None));
        let take: Arc<TakeChunk> = {
            let (file, found) = (Arc::clone(&layer.file), Arc::clone(&found));
            Arc::new(move |chunk, bytes| {
                let lent = seal(&file, chunk, bytes)?;
                *found.lock().unwrap_or_else(PoisonError::into_inner) = Some(lent);
                Ok(())
            })
        };
        let turn = self.random_reads.take(who).await;
        match self.fetch_span(layer, &access, span, take, turn).await {
            Ok(()) => {}
            Err(err) if err.is_of_disk() || layer.is_only_way(&access) => return Err(err),
            // The stream has the last word.
            Err(err) => {
                debug!(layer.diff_id = %layer.file.diff_id(), chunk, error = error_chain(&err),
                    "random access failed, reading the stream");
            }
        }
        Ok(found.lock().unwrap_or_else(PoisonError::into_inner).take())
    }

    /// Reads the whole blob as far as the chunk.
    async fn lend_from_stream(
        &self,
        layer: &Arc<Layer>,
        chunk: u32,
        who: Claimant,
    ) -> Result<LentChunk, PresentError> {
        let _turn = self.decompressions.take(who).await;
        let seek = |origin| self.seek_in_stream(layer, origin, chunk);
        self.try_origins(layer, None, seek).await
    }

    async fn seek_in_stream(
        &self,
        layer: &Arc<Layer>,
        origin: Origin,
        chunk: u32,
    ) -> Result<LentChunk, PresentError> {
        let stream = origin.open_all().await?;
        let (feed, reader) = feed::feed(Hashing::No);
        let (file, diff_id) = (Arc::clone(&layer.file), layer.file.diff_id());
        let work = self
            .runtime
            .spawn_blocking(move || seek::chunk(&file, chunk, reader));
        let ((), outcome) = tokio::join!(feed.run(stream), work);
        let bytes = outcome.unwrap_or_else(|err| Err(crashed(diff_id, &err)))?;
        let inflated = u64::from(chunk) * CHUNK_BYTES + bytes.len() as u64;
        self.metrics.layer_decompressed_bytes.inc_by(inflated);
        self.seal_later(layer, chunk, bytes.into()).await
    }

    /// Verifies and seals `bytes`, on a blocking thread.
    async fn seal_later(
        &self,
        layer: &Arc<Layer>,
        chunk: u32,
        bytes: bytes::Bytes,
    ) -> Result<LentChunk, PresentError> {
        let file = Arc::clone(&layer.file);
        let diff_id = file.diff_id();
        let sealed = self
            .runtime
            .spawn_blocking(move || seal(&file, chunk, &bytes));
        let sealed = sealed.await.map_err(|err| crashed(diff_id, &err))?;
        sealed.map_err(|err| self.span_failed(layer, err))
    }
}

/// Seals `bytes` if they are those of `chunk`.
///
/// # Errors
/// [`SpanError::Wrong`] if they are not, [`SpanError::Failed`] if there is no memory.
fn seal(file: &LayerFile, chunk: u32, bytes: &[u8]) -> Result<LentChunk, SpanError> {
    if file.chunk_digest(chunk) != Some(ChunkDigest::of(bytes)) {
        return Err(SpanError::Wrong(chunk));
    }
    let layer = file.diff_id();
    LentChunk::seal(layer, chunk, bytes).map_err(|err| {
        SpanError::Failed(PresentError::Disk {
            reason: format!("no memory to serve chunk {chunk} of layer {layer} past it: {err}"),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_space() -> PresentError {
        PresentError::NoSpace {
            path: "/cache".into(),
        }
    }

    #[test]
    fn a_disk_that_failed_is_tried_once_a_pause_until_it_does_well() {
        let (through, start) = (Through::default(), Instant::now());
        let admits = |after: Duration| through.admit(start + after).is_ok();
        let soon = Duration::from_millis(1);
        assert!(admits(soon) && admits(soon));
        through.pause(&no_space(), start);
        assert_eq!(through.reason(), NO_SPACE);
        assert!(!admits(soon) && !admits(PAUSE - soon));
        // One tries, the others wait for how that ends.
        assert!(admits(PAUSE) && !admits(PAUSE) && !admits(2 * PAUSE - soon));
        through.pause(&no_space(), start + PAUSE + soon);
        assert!(!admits(2 * PAUSE) && admits(2 * PAUSE + soon));
        let reason = "EIO".to_owned();
        through.pause(&PresentError::Disk { reason }, start);
        assert_eq!(through.reason(), IO_ERROR);
        through.resume();
        assert!(admits(2 * PAUSE + soon) && admits(2 * PAUSE + soon));
    }

    #[test]
    fn few_chunks_are_kept_and_none_for_long() {
        let (through, start) = (Through::default(), Instant::now());
        let layer = DiffId::of(b"layer");
        let after = |seconds| start + Duration::from_secs(seconds);
        for chunk in 0..6 {
            let lent = LentChunk::seal(layer, chunk, b"bytes").unwrap();
            assert_eq!(through.keep(lent, start), chunk == 0, "one sweeps");
        }
        let kept = |now| -> Vec<u32> {
            let chunks = 0..6;
            let is_kept = |it: &u32| through.kept(layer, *it, now).is_some();
            chunks.filter(is_kept).collect()
        };
        assert_eq!(kept(start), [2, 3, 4, 5]);
        assert!(through.kept(layer, 3, after(4)).is_some());
        assert!(!through.sweep(after(5)));
        assert_eq!(kept(after(5)), [3]);
        assert!(through.sweep(after(10)));
        let lent = LentChunk::seal(layer, 0, b"bytes").unwrap();
        assert!(through.keep(lent, start), "the one who swept has gone");
    }

    #[test]
    fn one_bad_chunk_a_minute_is_logged() {
        let (through, start) = (Through::default(), Instant::now());
        assert!(through.warns_of_bad(start) && !through.warns_of_bad(start));
        assert!(through.warns_of_bad(start + QUIET));
    }
}
