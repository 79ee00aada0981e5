//! Fetches for nobody yet: what was recorded of an image, in its order, or all of it.
//!
//! A few chunks at once, so that readers have most of what there is; never what would have the cache
//! evict anything; and never by a stream unless all is wanted. The first thing that fails ends it:
//! whoever needs the rest will ask for it, and hear why it cannot be had.

use std::{
    ops::Range,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::{TryStreamExt, stream};
use tokio::sync::SemaphorePermit;
use tracing::info;

use super::{
    images::Image,
    present::LOST_CHUNKS,
    random::{MAX_PAUSE, Window},
    riders,
    store::{Inner, Layer},
};
use crate::{fair::Claimant, index::profile::Touch, telemetry::error_chain, tier::PresentError};

/// How much is fetched at once.
const RUNS_AT_ONCE: usize = 2;

/// Chunks that are fetched with one request to the registry, at most: as many as for a reader.
const MAX_RUN_CHUNKS: u32 = 8;

/// Chunks of one layer that follow one another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    layer: u32,
    chunks: Range<u32>,
}

/// What became of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Brought {
    /// It came.
    Fetched,
    /// It was there.
    Present,
    /// A stream is about to bring it, or nothing but a stream could.
    Skipped,
}

/// Why no more is fetched.
#[derive(Debug)]
enum Stop {
    /// Nobody has the layer open any more.
    Unused,
    /// The cache has no room that is nobody's.
    NoRoom,
    Failed(PresentError),
}

impl Stop {
    fn reason(&self) -> String {
        match self {
            Self::Unused => "the image is not used any more".to_owned(),
            Self::NoRoom => "the cache has no room for it".to_owned(),
            Self::Failed(err) => error_chain(err),
        }
    }
}

/// Leave to read a part of a layer out of the registry.
#[derive(Debug)]
struct ByParts<'a> {
    run: Range<u32>,
    /// Those of it that the remote content cache lacks, as far as it was asked.
    lacking: Vec<u32>,
    /// Had from when it is first needed until the run has come.
    turn: Option<SemaphorePermit<'a>>,
}

impl Brought {
    /// What became of a chunk that was there before, or was not, if this is what was found in the end.
    fn unless(self, was_there: bool) -> Self {
        match self {
            Self::Present if !was_there => Self::Fetched,
            brought => brought,
        }
    }
}

/// Which of `chunks` are present.
fn present_of(layer: &Weak<Layer>, chunks: Range<u32>) -> Result<Vec<bool>, Stop> {
    let layer = layer.upgrade().ok_or(Stop::Unused)?;
    Ok(chunks.map(|it| layer.file.has(it..it + 1)).collect())
}

/// Counts what came.
#[derive(Debug, Default)]
struct Tally {
    fetched: AtomicU64,
    present: AtomicU64,
    skipped: AtomicU64,
}

/// Puts chunks that follow one another in the order of touches together.
fn plan(touches: &[Touch]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for touch in touches {
        match runs.last_mut() {
            Some(run)
                if (run.layer, run.chunks.end) == (touch.layer, touch.chunk)
                    && run.chunks.len() < MAX_RUN_CHUNKS as usize =>
            {
                run.chunks.end += 1;
            }
            _ => runs.push(Run {
                layer: touch.layer,
                chunks: touch.chunk..touch.chunk + 1,
            }),
        }
    }
    runs
}

impl Inner {
    /// Fetches what was recorded, in its order.
    ///
    /// # Cancellation
    /// Safe: a part of a layer that is being read comes even so.
    pub(super) async fn replay(self: &Arc<Self>, image: &Image, touches: &[Touch]) {
        let manifest = image.manifest;
        info!(image.manifest = %manifest, chunks = touches.len(), "fetching what was read first of an image");
        let tally = Tally::default();
        let runs = stream::iter(plan(touches).into_iter().map(Ok));
        let outcome = runs
            .try_for_each_concurrent(RUNS_AT_ONCE, |run| {
                let tally = &tally;
                async move {
                    // A profile names layers of its image.
                    let at = usize::try_from(run.layer).unwrap_or(usize::MAX);
                    let layer = image.layers.get(at).ok_or(Stop::Unused)?;
                    self.fetch_run(layer, run.chunks, tally).await
                }
            })
            .await;
        self.ended(image, &tally, outcome.err());
    }

    /// Fetches all of the image, layer by layer.
    ///
    /// # Cancellation
    /// Safe: a stream goes on for as long as somebody has the layer open.
    pub(super) async fn complete(self: &Arc<Self>, image: &Image) {
        info!(image.manifest = %image.manifest, layers = image.layers.len(), "fetching all of an image");
        let tally = Tally::default();
        let mut outcome = Ok(());
        for layer in &image.layers {
            outcome = self.complete_layer(layer, &tally).await;
            if outcome.is_err() {
                break;
            }
        }
        self.ended(image, &tally, outcome.err());
    }

    fn ended(&self, image: &Image, tally: &Tally, stop: Option<Stop>) {
        let count = |it: &AtomicU64| it.load(Ordering::Relaxed);
        let (fetched, present, skipped) = (
            count(&tally.fetched),
            count(&tally.present),
            count(&tally.skipped),
        );
        let stopped = stop.as_ref().map(Stop::reason);
        let outcome = match stop {
            Some(Stop::Failed(_)) => Some("error"),
            Some(Stop::NoRoom) => Some("no_room"),
            Some(Stop::Unused) | None => None,
        };
        if let Some(outcome) = outcome {
            let counter = self.metrics.prefetch_chunks.with_label_values(&[outcome]);
            counter.inc();
        }
        info!(image.manifest = %image.manifest, fetched, present, skipped, stopped,
            "fetching ahead has ended");
    }

    async fn fetch_run(
        self: &Arc<Self>,
        layer: &Weak<Layer>,
        run: Range<u32>,
        tally: &Tally,
    ) -> Result<(), Stop> {
        // One request may bring all of them.
        let was_there = present_of(layer, run.clone())?;
        let mut by_parts = ByParts {
            run: run.clone(),
            lacking: self.bring_run(layer, run.clone()).await?,
            turn: None,
        };
        for (chunk, was_there) in run.zip(was_there) {
            let brought = self.bring(layer, chunk, Some(&mut by_parts)).await?;
            self.count_brought(tally, brought.unless(was_there));
        }
        Ok(())
    }

    /// Brings what the remote content cache has of `chunks`, if they are some; returns what it lacks.
    async fn bring_run(
        self: &Arc<Self>,
        layer: &Weak<Layer>,
        chunks: Range<u32>,
    ) -> Result<Vec<u32>, Stop> {
        let layer = layer.upgrade().ok_or(Stop::Unused)?;
        let file = &layer.file;
        let missing = chunks.clone().filter(|it| !file.has(*it..*it + 1));
        let missing_bytes: Vec<_> = missing.map(|it| file.chunk_bytes(it)).collect();
        if self.remote.is_none() || missing_bytes.len() < 2 {
            return Ok(Vec::new());
        }
        self.demand.let_pass(MAX_PAUSE).await;
        let _coming = self
            .announce(missing_bytes.iter().sum())
            .ok_or(Stop::NoRoom)?;
        let run = self
            .fetch_together(&layer, chunks, Claimant::Background)
            .await;
        run.map_err(Stop::Failed)
    }

    /// From the remote content cache where that has the layer, or else by a stream.
    async fn complete_layer(
        self: &Arc<Self>,
        weak: &Weak<Layer>,
        tally: &Tally,
    ) -> Result<(), Stop> {
        let file = Arc::clone(&weak.upgrade().ok_or(Stop::Unused)?.file);
        let missing_bytes = file.absent_bytes();
        if missing_bytes == 0 {
            return Ok(());
        }
        // What had to go once for want of room does not come back for nobody.
        if file.was_cut() || !self.room.has_spare(missing_bytes) {
            return Err(Stop::NoRoom);
        }
        if self.remote.is_some() {
            // Run by run: readers have the rest of what the remote gives at once.
            let mut n_lost = 0;
            let starts = (0..file.n_chunks()).step_by(MAX_RUN_CHUNKS as usize);
            for start in starts {
                let run = start..file.n_chunks().min(start + MAX_RUN_CHUNKS);
                n_lost += self.complete_run(weak, run, tally).await?;
                if LOST_CHUNKS <= n_lost {
                    break;
                }
            }
        }
        if file.is_complete() {
            return Ok(());
        }
        drop(file);
        let layer = weak.upgrade().ok_or(Stop::Unused)?;
        let progress = self.start_refill(&layer);
        // Who waits here does not have it open: the stream is for others.
        drop(layer);
        riders::streamed(progress).await.map_err(Stop::Failed)
    }

    /// From the remote content cache; returns how many chunks it lacks.
    async fn complete_run(
        self: &Arc<Self>,
        layer: &Weak<Layer>,
        run: Range<u32>,
        tally: &Tally,
    ) -> Result<u32, Stop> {
        let was_there = present_of(layer, run.clone())?;
        let lacking = self.bring_run(layer, run.clone()).await?;
        let mut n_lost = 0;
        for (chunk, was_there) in run.zip(was_there) {
            let brought = match lacking.contains(&chunk) {
                true => Brought::Skipped,
                false => self.bring(layer, chunk, None).await?.unless(was_there),
            };
            self.count_brought(tally, brought);
            n_lost += u32::from(brought == Brought::Skipped);
        }
        Ok(n_lost)
    }

    /// Brings a chunk without a stream: from the remote content cache, or else, with the rest of the
    /// run that it is in, from the registry.
    async fn bring<'a>(
        self: &'a Arc<Self>,
        layer: &Weak<Layer>,
        chunk: u32,
        by_parts: Option<&mut ByParts<'a>>,
    ) -> Result<Brought, Stop> {
        self.demand.let_pass(MAX_PAUSE).await;
        let layer = &layer.upgrade().ok_or(Stop::Unused)?;
        let file = &layer.file;
        let is_present = || file.has(chunk..chunk + 1);
        if is_present() {
            return Ok(Brought::Present);
        }
        if self.waits_for_stream(layer, chunk).await {
            return Ok(Brought::Skipped);
        }
        let coming = by_parts
            .as_ref()
            .map_or(chunk..chunk + 1, |it| it.run.clone());
        let missing = coming.filter(|it| !file.has(*it..*it + 1));
        let coming_bytes = missing.map(|it| file.chunk_bytes(it)).sum();
        let _coming = self.announce(coming_bytes).ok_or(Stop::NoRoom)?;
        let flight = self.chunk_flights.join((file.diff_id(), chunk)).await;
        if is_present() || self.adopt(layer, chunk).await.map_err(Stop::Failed)? {
            return Ok(Brought::Present);
        }
        let is_lacking = by_parts
            .as_ref()
            .is_some_and(|it| it.lacking.contains(&chunk));
        let fetched = match is_lacking {
            true => Ok(false),
            false => self.fetch_chunk(layer, chunk, Claimant::Background).await,
        };
        if fetched.map_err(Stop::Failed)? {
            return Ok(Brought::Fetched);
        }
        let (Some(by_parts), Some(access)) = (by_parts, self.access(layer).await) else {
            return Ok(Brought::Skipped);
        };
        // A reader of the chunk does not wait until others have been read for nobody.
        drop(flight);
        if by_parts.turn.is_none() {
            by_parts.turn = self.images.random_reads.acquire().await.ok();
        }
        let _flight = self.chunk_flights.join((file.diff_id(), chunk)).await;
        if is_present() {
            return Ok(Brought::Present);
        }
        let window = Window::Exactly(by_parts.run.clone());
        let read = self.read_random(layer, &access, chunk, window).await;
        if !read.map_err(Stop::Failed)? {
            return Ok(Brought::Skipped);
        }
        if file.is_complete() {
            self.completed(layer);
        }
        Ok(Brought::Fetched)
    }

    fn count_brought(&self, tally: &Tally, brought: Brought) {
        let (count, outcome) = match brought {
            Brought::Fetched => (&tally.fetched, "fetched"),
            Brought::Present => (&tally.present, "present"),
            Brought::Skipped => (&tally.skipped, "skipped"),
        };
        count.fetch_add(1, Ordering::Relaxed);
        let counter = self.metrics.prefetch_chunks.with_label_values(&[outcome]);
        counter.inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_in_a_row_are_fetched_together() {
        let touches = |of: &[(u32, u32)]| {
            let touches = of.iter().map(|(layer, chunk)| Touch {
                layer: *layer,
                chunk: *chunk,
            });
            touches.collect::<Vec<_>>()
        };
        let planned = |of: &[(u32, u32)]| {
            let runs = plan(&touches(of)).into_iter();
            runs.map(|it| (it.layer, it.chunks)).collect::<Vec<_>>()
        };
        assert_eq!(planned(&[]), []);
        assert_eq!(
            planned(&[(0, 5), (0, 6), (1, 7), (1, 6), (0, 7), (0, 8), (0, 9)]),
            [(0, 5..7), (1, 7..8), (1, 6..7), (0, 7..10)]
        );
        let in_order: Vec<_> = (0..20).map(|it| (3, it)).collect();
        assert_eq!(planned(&in_order), [(3, 0..8), (3, 8..16), (3, 16..20)]);
    }
}
