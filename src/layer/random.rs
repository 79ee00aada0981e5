//! Random access: a part of the layer's blob is fetched and decompressed, beside the stream that
//! fills the layer from its start.

use std::{
    ops::{ControlFlow, Range},
    sync::{
        Arc, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tracing::{debug, warn};

use super::{
    access::{Access, STRIDE_CHUNKS, Span},
    disk::LayerFile,
    feed::{self, FeedReader, Hashing},
    origins::Origin,
    pieces, riders,
    scratch::ScratchFile,
    span::{self, SpanError, TakeChunk},
    store::{Inner, Layer, RefillState, crashed},
};
use crate::{
    fair::{Claimant, Turn},
    metrics::{Outcome, Tier},
    telemetry::error_chain,
    tier::{PresentError, SourceError},
};

/// Strides that are fetched at once for a reader who goes through the layer in order.
///
/// Four have 8 MB, as much as a kernel reads ahead of a stream from a disk.
const MAX_STRIDES: u32 = 4;

/// How long a stream pauses for readers, at most, before each chunk.
pub(super) const MAX_PAUSE: Duration = Duration::from_millis(20);

/// Readers that wait, for random access or for the remote content cache: others make way for them.
#[derive(Debug, Default)]
pub(super) struct Demand(AtomicUsize);

/// One of them.
#[derive(Debug)]
pub(super) struct Demanded<'a>(&'a Demand);

impl Demand {
    pub(super) fn enter(&self) -> Demanded<'_> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Demanded(self)
    }

    /// As [`make_way`](Self::make_way), for a task, which waits for at most `pause`.
    pub(super) async fn let_pass(&self, pause: Duration) {
        let since = Instant::now();
        while 0 < self.0.load(Ordering::Relaxed) && since.elapsed() < pause {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Waits until nobody is left, or it has taken too long.
    ///
    /// # Blocking
    /// For at most [`MAX_PAUSE`].
    pub(super) fn make_way(&self) {
        let since = Instant::now();
        while 0 < self.0.load(Ordering::Relaxed) && since.elapsed() < MAX_PAUSE {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// How much is fetched with a chunk.
#[derive(Debug, Clone)]
pub(super) enum Window {
    /// What its reader is likely to want next.
    Likely(Claimant),
    /// These chunks, which are for nobody yet.
    Exactly(Range<u32>),
}

impl Drop for Demanded<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a layer's readers have under way, and where they went last.
#[derive(Debug, Default)]
pub(super) struct RandomReads {
    /// Spans that are being fetched.
    active: Vec<(Range<u32>, watch::Receiver<RefillState>)>,
    /// Where the last span ended, and how many strides it had.
    last: Option<(u32, u32)>,
    /// How many there were.
    n_spans: u32,
}

impl RandomReads {
    /// How many parts of the layer were read at random.
    pub(super) fn n_spans(&self) -> u32 {
        self.n_spans
    }

    /// The fetch that will bring `chunk`.
    fn joining(&self, chunk: u32) -> Option<watch::Receiver<RefillState>> {
        let active = self.active.iter().find(|it| it.0.contains(&chunk));
        active.map(|it| it.1.clone())
    }

    /// Which chunks are fetched for a reader of `chunk`: its stride, and more each time for one
    /// who reads in order.
    fn window(&mut self, chunk: u32, n_chunks: u32) -> Range<u32> {
        let start = chunk - chunk % STRIDE_CHUNKS;
        let n_strides = match self.last {
            // Groups of pieces end anywhere.
            Some((end, n_strides)) if end == start || end == chunk => {
                (2 * n_strides).min(MAX_STRIDES)
            }
            _ => 1,
        };
        let end = (start + n_strides * STRIDE_CHUNKS).min(n_chunks);
        self.last = Some((end, n_strides));
        self.n_spans += 1;
        start..end
    }

    /// Hears that more was fetched than this window.
    fn reached(&mut self, end: u32) {
        if let Some(last) = &mut self.last {
            last.0 = last.0.max(end);
        }
    }
}

impl Inner {
    /// Makes `chunk` present by random access; `false` if that is not to be had, and the stream is
    /// to be waited for.
    ///
    /// # Errors
    /// That the disk cannot take it, where no stream would help; and all that goes wrong where there is
    /// none.
    pub(super) async fn read_random(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        access: &Arc<Access>,
        chunk: u32,
        window: Window,
    ) -> Result<bool, PresentError> {
        let _demanded = match window {
            Window::Likely(_) => Some(self.demand.enter()),
            Window::Exactly(_) => None,
        };
        let is_present = || layer.file.has(chunk..chunk + 1);
        loop {
            let Some((mut progress, is_own)) = self.start_span(layer, access, chunk, &window)
            else {
                return match layer.is_only_way(access) {
                    true => Err(no_way(layer, chunk)),
                    false => Ok(false),
                };
            };
            let ended = self.ride_span(&mut progress, is_present).await;
            // Who joined a fetch that had already passed the chunk, which was dropped since, has one of
            // its own.
            match ended {
                _ if is_present() => return Ok(true),
                Some(RefillState::Failed(err)) if err.is_of_disk() || layer.is_only_way(access) => {
                    return Err(err);
                }
                Some(RefillState::Done) if !is_own => {}
                _ if layer.is_only_way(access) => {
                    return Err(PresentError::Timeout {
                        layer: layer.file.diff_id(),
                        waited: Duration::from_secs(self.config.stall_timeout_seconds),
                    });
                }
                _ => return Ok(false),
            }
        }
    }

    /// Waits until `is_present`, or the fetch has ended; `None` if it has not.
    async fn ride_span(
        &self,
        progress: &mut watch::Receiver<RefillState>,
        is_present: impl Fn() -> bool,
    ) -> Option<RefillState> {
        let stall = Duration::from_secs(self.config.stall_timeout_seconds);
        while !is_present() {
            match progress.borrow_and_update().clone() {
                RefillState::Running => {}
                ended @ (RefillState::Done | RefillState::Failed(_)) => return Some(ended),
            }
            match tokio::time::timeout(stall, progress.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => break,
            }
        }
        None
    }

    /// Joins the fetch that will bring `chunk`, or starts one, and says whether it did.
    fn start_span(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        access: &Arc<Access>,
        chunk: u32,
        window: &Window,
    ) -> Option<(watch::Receiver<RefillState>, bool)> {
        let file = &layer.file;
        let mut random = layer.random.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(progress) = random.joining(chunk) {
            return Some((progress, false));
        }
        let mut chunks = match window {
            Window::Likely(_) => random.window(chunk, file.n_chunks()),
            Window::Exactly(chunks) => chunks.clone(),
        };
        let who = match window {
            Window::Likely(who) => *who,
            Window::Exactly(_) => Claimant::Background,
        };
        // What is there at either end is not decompressed again.
        while chunks.start < chunk && file.has(chunks.start..chunks.start + 1) {
            chunks.start += 1;
        }
        while chunk + 1 < chunks.end && file.has(chunks.end - 1..chunks.end) {
            chunks.end -= 1;
        }
        let span = access
            .span(access.whole(chunks))
            .or_else(|| access.span(access.whole(chunk..chunk + 1)))?;
        let chunks = span.chunks.clone();
        if let Window::Likely(_) = window {
            random.reached(chunks.end);
        }
        let (sender, receiver) = watch::channel(RefillState::Running);
        random.active.push((chunks, receiver.clone()));
        drop(random);
        let (inner, layer, access) = (Arc::clone(self), Arc::clone(layer), Arc::clone(access));
        self.spawn(async move {
            let chunks = span.chunks.clone();
            let take: Arc<TakeChunk> = {
                let (inner, sender) = (Arc::clone(&inner), sender.clone());
                let file = Arc::clone(&layer.file);
                Arc::new(move |chunk, bytes| {
                    inner.delivered(span::write(&file, &inner.room, chunk, bytes)?);
                    sender.send_replace(RefillState::Running);
                    Ok(())
                })
            };
            let turn = riders::telling(&sender, inner.random_reads.take(who)).await;
            let outcome = inner.fetch_span(&layer, &access, span, take, turn).await;
            let mut random = layer.random.lock().unwrap_or_else(PoisonError::into_inner);
            random.active.retain(|it| it.0 != chunks);
            drop(random);
            let _ = sender.send(match outcome {
                Ok(()) => RefillState::Done,
                // Whoever waits for it says so, once for all.
                Err(err) if err.is_of_disk() => RefillState::Failed(err),
                Err(err) => {
                    inner.metrics.tier_read(Tier::Registry, Outcome::Error);
                    warn!(layer.diff_id = %layer.file.diff_id(), ?chunks, error = %error_chain(&err),
                        "random access failed");
                    RefillState::Failed(err)
                }
            });
        });
        Some((receiver, true))
    }

    /// Fetches `span`, as whoever has a turn of `random_reads` may, and gives its chunks to `take`.
    pub(super) async fn fetch_span(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        access: &Arc<Access>,
        span: Span,
        take: Arc<TakeChunk>,
        _turn: Turn,
    ) -> Result<(), PresentError> {
        let (mut access, mut span, mut was_astray) = (Arc::clone(access), span, false);
        loop {
            let fetch = |origin| self.fetch_span_from(layer, origin, &access, span.clone(), &take);
            let Err(err) = self.try_origins(layer, Some(&access), fetch).await else {
                return Ok(());
            };
            match &err {
                PresentError::Refused { .. } => self.led_astray(layer, &access).await,
                err if is_ignorant_of_ranges(err) && !layer.is_only_way(&access) => {
                    layer.forget_access();
                }
                _ => {}
            }
            // Where no stream could take its place, the table of contents gives another map.
            let is_last = was_astray || !layer.is_only_way(&access);
            let another = match is_last {
                true => None,
                false => self.access(layer).await,
            };
            let Some(another) = another.filter(|it| !Arc::ptr_eq(it, &access)) else {
                return Err(err);
            };
            let chunks = another.whole(span.chunks.clone());
            span = another.span(chunks).ok_or(err)?;
            (access, was_astray) = (another, true);
        }
    }

    async fn fetch_span_from(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        origin: Origin,
        access: &Arc<Access>,
        mut span: Span,
        take: &Arc<TakeChunk>,
    ) -> Result<(), PresentError> {
        loop {
            debug!(layer.diff_id = %layer.file.diff_id(), chunks = ?span.chunks, blob = ?span.blob,
                "reading a part of the layer");
            let outcome = self.fetch_once(layer, &origin, access, &span, take).await;
            let label = if outcome.is_ok() { "ok" } else { "error" };
            let counter = self.metrics.layer_random_reads.with_label_values(&[label]);
            counter.inc();
            match outcome {
                // The guess was too short; what came of it stays.
                Err(SpanError::Short) if span.is_guess => span = access.without_guess(span),
                outcome => return outcome.map_err(|err| self.span_failed(layer, err)),
            }
        }
    }

    async fn fetch_once(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        origin: &Origin,
        access: &Arc<Access>,
        span: &Span,
        take: &Arc<TakeChunk>,
    ) -> Result<(), SpanError> {
        let stream = origin.open(span.blob.clone()).await;
        let stream = stream.map_err(SpanError::Failed)?;
        let (feed, reader) = feed::feed(Hashing::No);
        let (inner, file, access) = (
            Arc::clone(self),
            Arc::clone(&layer.file),
            Arc::clone(access),
        );
        let (span, take, diff_id) = (span.clone(), Arc::clone(take), layer.file.diff_id());
        let work = self
            .runtime
            .spawn_blocking(move || inner.run_span(&file, &access, &span, reader, &*take));
        let ((), outcome) = tokio::join!(feed.run(stream), work);
        outcome.unwrap_or_else(|err| Err(SpanError::Failed(crashed(diff_id, &err))))
    }

    /// Decompresses `span` out of `reader`.
    ///
    /// # Blocking
    /// For as long as the source delivers.
    fn run_span(
        self: &Arc<Self>,
        file: &LayerFile,
        access: &Access,
        span: &Span,
        mut reader: FeedReader,
        take: &TakeChunk,
    ) -> Result<(), SpanError> {
        let mut take = |chunk, bytes: &[u8]| take(chunk, bytes).map(|()| ControlFlow::Continue(()));
        let outcome = match access {
            Access::Checkpoints(access) => {
                span::decompress(file, access, span, &mut reader, &mut Vec::new(), &mut take)
            }
            Access::Pieces(map) => {
                let spool = ScratchFile::new(&self.paths.scratch(), Arc::clone(&self.room));
                pieces::decompress(file, map, span, &mut reader, spool, &mut take)
            }
        };
        let inflated = access.inflated_bytes(span);
        self.metrics.layer_decompressed_bytes.inc_by(inflated);
        if let Some(source) = reader.failure() {
            return Err(SpanError::Source(source));
        }
        // The little that was asked for in vain is read, so that the connection can be used again;
        // it matters to nobody how that ends.
        let _ = outcome.is_ok() && reader.finish().is_ok();
        outcome.map(|_flow| ())
    }

    /// What went wrong, for readers; what came wrong is counted.
    pub(super) fn span_failed(&self, layer: &Layer, err: SpanError) -> PresentError {
        let diff_id = layer.file.diff_id();
        let refused = |reason: String| {
            self.metrics
                .verify_failures
                .with_label_values(&[Tier::Registry.label()])
                .inc();
            PresentError::Refused {
                layer: diff_id,
                reason,
            }
        };
        match err {
            SpanError::Source(source) => PresentError::Origin {
                layer: diff_id,
                source,
            },
            SpanError::Failed(err) => err,
            SpanError::Disk(err) => self.blame(diff_id).disk(err),
            SpanError::Corrupt(err) => refused(err.to_string()),
            SpanError::Short => refused("its access map names too few bytes".to_owned()),
            SpanError::Wrong(chunk) => refused(format!("chunk {chunk} does not match its digest")),
        }
    }
}

/// Why a chunk cannot be had of which no part of the blob is known.
fn no_way(layer: &Layer, chunk: u32) -> PresentError {
    PresentError::Refused {
        layer: layer.file.diff_id(),
        reason: format!("its blob's table of contents names no bytes for chunk {chunk}"),
    }
}

/// Whether the registry knows no ranges: no part of the blob is to be had then.
fn is_ignorant_of_ranges(err: &PresentError) -> bool {
    matches!(
        err,
        PresentError::Origin {
            source: SourceError::Protocol { .. },
            ..
        }
    )
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn readers_are_let_pass_but_not_for_ever() {
        let demand = Demand::default();
        assert_eq!(demand.let_pass(MAX_PAUSE).now_or_never(), Some(()));
        let reader = demand.enter();
        assert_eq!(demand.let_pass(MAX_PAUSE).now_or_never(), None);
        let since = Instant::now();
        demand.let_pass(MAX_PAUSE).await;
        assert!(MAX_PAUSE <= since.elapsed());
        drop(reader);
        assert_eq!(demand.let_pass(MAX_PAUSE).now_or_never(), Some(()));
    }

    #[test]
    fn a_reader_in_order_is_given_more_each_time() {
        let mut random = RandomReads::default();
        let mut windows = Vec::new();
        let mut next = 7;
        for _ in 0..5 {
            let window = random.window(next, 1000);
            next = window.end;
            windows.push(window);
        }
        assert_eq!(windows, [6..8, 8..12, 12..20, 20..28, 28..36]);
        assert_eq!(random.window(500, 501), 500..501);
    }
}
