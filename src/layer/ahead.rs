//! Fetches from the remote content cache ahead of who reads a layer in order, and several chunks that are
//! wanted together as one run, whose requests wait for one another's answers no more than they must.
//!
//! A reader's run holds the flights of its chunks: who comes for one of them waits for that one alone, and
//! it is marked present as soon as it has come and is verified. One for nobody holds none while it waits, so
//! that no reader waits for its turns; what readers fetch themselves meanwhile is dropped. What somebody
//! else fetches is left to them.

use std::{
    ops::Range,
    sync::{Arc, PoisonError},
};

use tracing::debug;

use super::store::{Inner, Layer};
use crate::{fair::Claimant, remote::WantedChunk, telemetry::error_chain, tier::PresentError};

/// Chunks that are fetched ahead of a reader at first, and at most: 8 MiB, as much as a kernel reads ahead of
/// a stream from a disk.
const AHEAD_CHUNKS: (u32, u32) = (2, 8);

/// Readers in order that are told apart in one layer.
const MAX_SEQUENCES: usize = 4;

/// Runs at once: each has a connection, and what was asked for ahead in the kernel's buffers.
pub(super) const RUNS: usize = 2;

/// Somebody who reads in order.
#[derive(Debug, PartialEq, Eq)]
struct Sequence {
    /// Where what was fetched for them ends.
    end: u32,
    /// How many chunks that was ahead of them.
    n_ahead: u32,
}

/// Where the readers of a layer went last, by what was fetched for them; the last one last.
#[derive(Debug, Default)]
pub(super) struct Sequences(Vec<Sequence>);

impl Sequences {
    /// Which chunks are fetched ahead for a reader of `chunk`: none the first time, and more each time for
    /// one who reads in order.
    fn window(&mut self, chunk: u32, n_chunks: u32) -> Range<u32> {
        let (first, most) = AHEAD_CHUNKS;
        let n_ahead = match self.0.iter().position(|it| it.end == chunk) {
            Some(at) => (2 * self.0.remove(at).n_ahead).clamp(first, most),
            None => 0,
        };
        if MAX_SEQUENCES <= self.0.len() {
            self.0.remove(0);
        }
        let from = chunk.saturating_add(1).min(n_chunks);
        let end = from.saturating_add(n_ahead).min(n_chunks);
        self.0.push(Sequence { end, n_ahead });
        from..end
    }

    /// Forgets all: what they want is not where it was looked for.
    fn forget(&mut self) {
        self.0.clear();
    }
}

impl Inner {
    /// Takes `chunk` from the remote content cache for a reader, and what they are likely to want next
    /// beside; `false` if that does not have the chunk.
    pub(super) async fn fetch_for_reader(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunk: u32,
        who: Claimant,
    ) -> Result<bool, PresentError> {
        if self.remote.is_none() {
            return Ok(false);
        }
        let ahead = {
            let mut sequences = layer.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            sequences.window(chunk, layer.file.n_chunks())
        };
        let ahead_bytes = ahead.clone().map(|it| layer.file.chunk_bytes(it)).sum();
        // What nobody wants yet takes no room of what was wanted, and nothing is tried on a disk that is let
        // alone.
        if !ahead.is_empty() && self.room.has_spare(ahead_bytes) && !self.through.is_paused() {
            self.read_ahead(layer, ahead, who);
        }
        let has_it = self.fetch_chunk(layer, chunk, who).await;
        if !matches!(has_it, Ok(true)) {
            let mut sequences = layer.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            sequences.forget();
        }
        has_it
    }

    /// Fetches `chunks` beside the reader, in their name: who comes for one of them is to wait no longer
    /// than for one of their own.
    fn read_ahead(self: &Arc<Self>, layer: &Arc<Layer>, chunks: Range<u32>, who: Claimant) {
        let (inner, layer) = (Arc::clone(self), Arc::clone(layer));
        self.spawn(async move {
            if let Err(err) = inner.fetch_together(&layer, chunks, who).await {
                // Readers ask for it themselves, and hear why they do not have it.
                debug!(layer.diff_id = %layer.file.diff_id(), error = error_chain(&err),
                    "reading ahead has ended");
            }
        });
    }

    /// Takes those of `chunks` from the remote content cache that are missing and that nobody else fetches,
    /// each kept as soon as it has come. Returns those that the remote lacks.
    ///
    /// # Errors
    /// That the disk cannot take them.
    pub(super) async fn fetch_together(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        chunks: Range<u32>,
        who: Claimant,
    ) -> Result<Vec<u32>, PresentError> {
        let Some(remote) = &self.remote else {
            return Ok(Vec::new());
        };
        // Before the flights, so that nobody waits for who waits here.
        let _turn = self.runs.take(who).await;
        let file = &layer.file;
        let diff_id = file.diff_id();
        let (mut wanted, mut flights) = (Vec::new(), Vec::new());
        for number in chunks {
            if file.has(number..number + 1) || layer.is_passing(number) {
                continue;
            }
            let Some(flight) = self.chunk_flights.try_join((diff_id, number)) else {
                continue;
            };
            if file.has(number..number + 1) || self.adopt(layer, number).await? {
                continue;
            }
            let digest = file.chunk_digest(number);
            let len = usize::try_from(file.chunk_bytes(number));
            if let (Some(digest), Ok(len)) = (digest, len) {
                wanted.push(WantedChunk {
                    number,
                    len,
                    digest,
                });
                if who != Claimant::Background {
                    flights.push(flight);
                }
            }
        }
        let mut lacking = Vec::new();
        let mut run = remote.cache.chunks(who, &diff_id, wanted);
        let mut flights = flights.into_iter();
        while let Some((number, bytes)) = run.next().await {
            let flight = flights
                .next()
                .or_else(|| self.chunk_flights.try_join((diff_id, number)));
            if flight.is_none() || file.has(number..number + 1) {
                continue;
            }
            let is_kept = match bytes {
                Some(bytes) => self.keep_fetched(layer, number, bytes).await?,
                None => false,
            };
            if !is_kept {
                layer.note_missed(number);
                lacking.push(number);
            }
        }
        Ok(lacking)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_in_order_is_read_ahead_of_more_each_time() {
        let mut sequences = Sequences::default();
        let mut windows = Vec::new();
        let mut chunk = 5;
        for _ in 0..6 {
            let window = sequences.window(chunk, 1000);
            chunk = window.end.max(chunk + 1);
            windows.push(window);
        }
        assert_eq!(windows, [6..6, 7..9, 10..14, 15..23, 24..32, 33..41]);
        assert_eq!(sequences.window(chunk, 45), 42..45);
        assert_eq!(sequences.window(500, 1000), 501..501, "somewhere else");
        assert_eq!(sequences.window(999, 1000), 1000..1000, "the last one");
        assert_eq!(sequences.window(u32::MAX, 0), 0..0, "nothing overflows");
    }

    #[test]
    fn some_readers_in_order_are_told_apart() {
        let mut sequences = Sequences::default();
        for first in [0, 100, 200, 300] {
            assert_eq!(sequences.window(first, 1000).len(), 0);
        }
        for second in [1, 101, 201, 301] {
            assert_eq!(sequences.window(second, 1000).len(), 2);
        }
        // One more takes the place of who was longest not there.
        assert_eq!(sequences.window(400, 1000).len(), 0);
        let third = [304, 204, 104, 4].map(|it| sequences.window(it, 1000).len());
        assert_eq!(third, [4, 4, 4, 0]);
        sequences.forget();
        assert_eq!(sequences.window(309, 1000).len(), 0);
    }
}
