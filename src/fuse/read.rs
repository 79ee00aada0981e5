//! Carries a read from the request to the reply, over as many threads as it takes.
//!
//! ```text
//! FUSE thread:  present and in the page cache ─────────────────────────────► reply
//!                 │ present, on disk          │ not present
//!                 ▼                           ▼
//! read pool:    pread ──► reply ◄── pread  make_present (no thread waits) ──► EIO if that fails
//!                 │         evicted meanwhile: again, at most 3 times
//!                 │ the disk fails,           │ the disk cannot take it
//!                 │ or evicts too often       │
//!                 ▼                           ▼
//!               lend (`lending.rs`; no thread waits) ──► reply out of memory
//! ```
//!
//! A read that is dropped on the way, by a panic or at the end of the process, is answered with EIO
//! by fuser, so that no reader waits for ever.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use fuser::{Errno, ReplyData};
use tracing::warn;

use super::{
    Served,
    counters::{Op, Subject},
    errno::errno,
    lending::{MAX_LENDINGS, Permit},
};
use crate::{
    digest::DiffId,
    fs::{
        FsError, ServedBytes, Wait,
        read::{Missing, Needed, ReadOutcome},
    },
    index::image::Ino,
    metrics::Outcome,
    telemetry::error_chain,
    tier::{PresentError, lent::LentChunk},
};

/// How often a read has chunks fetched, or reads again what was evicted while it read, before it has them
/// lent.
///
/// More than once is needed only if they are evicted between the fetch and the read. A cache in
/// which that happens three times in a row is far too small, and going on would never end.
const MAX_FETCHES: u32 = 3;

/// A read that has not been answered.
#[derive(Debug)]
pub(super) struct PendingRead<I> {
    pub(super) served: Arc<Served<I>>,
    pub(super) ino: Ino,
    pub(super) offset: u64,
    pub(super) len: u32,
    reply: ReplyData,
    started: Instant,
    n_fetches: u32,
    /// How often chunks were evicted while they were read.
    n_evictions: u32,
    pub(super) n_lendings: u32,
    /// Chunks that are read here, not on the disk.
    pub(super) lent: Vec<LentChunk>,
    /// The right to them; behind them, because fields are dropped in order.
    pub(super) permit: Option<Permit>,
}

/// A read that waits for chunks.
#[derive(Debug)]
struct Waiting<I> {
    /// std Mutex: held to take the read out, which the first error or the last arrival does.
    read: Mutex<Option<PendingRead<I>>>,
    n_left: AtomicUsize,
}

impl<I: ServedBytes> PendingRead<I> {
    pub(super) fn new(
        served: Arc<Served<I>>,
        ino: Ino,
        offset: u64,
        len: u32,
        reply: ReplyData,
    ) -> Self {
        Self {
            served,
            ino,
            offset,
            len,
            reply,
            started: Instant::now(),
            n_fetches: 0,
            n_evictions: 0,
            n_lendings: 0,
            lent: Vec::new(),
            permit: None,
        }
    }

    /// Answers at once if that needs no wait; otherwise passes the read on.
    pub(super) fn start(self) {
        let served = self.served.clone();
        match served.pool.try_buffer() {
            Some(mut buffer) => self.attempt(&mut buffer, Wait::Never),
            None => self.read_in_pool(),
        }
    }

    pub(super) fn read_in_pool(self) {
        let served = self.served.clone();
        let pool = served.pool.clone();
        pool.submit(
            self.served.number,
            Box::new(move |buffer| {
                served.guard_without_turn(Op::Read, || self.attempt(buffer, Wait::ForDisk));
            }),
        );
    }

    fn attempt(mut self, buffer: &mut Vec<u8>, wait: Wait) {
        let (fs, lent) = (&self.served.fs, &self.lent);
        let outcome = if lent.is_empty() {
            fs.read(self.ino, self.offset, self.len, buffer, wait)
        } else {
            fs.read_lent(self.ino, self.offset, self.len, buffer, lent)
        };
        match outcome {
            Ok(ReadOutcome::Ready) => self.succeed(buffer),
            Ok(ReadOutcome::WouldBlock) => self.read_in_pool(),
            Ok(ReadOutcome::Evicted(layer)) => self.read_again(layer),
            Ok(ReadOutcome::Missing(missing)) if self.lent.is_empty() => self.fetch(missing),
            Ok(ReadOutcome::Missing(_)) => {
                // What is lent is missing as well, once it is given back.
                self.give_back();
                self.read_in_pool();
            }
            Err(FsError::Io { .. }) if self.n_lendings < MAX_LENDINGS => {
                self.served.counters.disk_read(Outcome::Error);
                self.give_back();
                self.borrow_in_pool(Needed::All);
            }
            Err(error) => {
                if matches!(error, FsError::Io { .. }) {
                    self.served.counters.disk_read(Outcome::Error);
                }
                self.fail_with(&error);
            }
        }
    }

    fn succeed(self, bytes: &[u8]) {
        if self.n_fetches + self.n_evictions + self.n_lendings == 0 {
            let counters = &self.served.counters;
            counters.disk_hit(bytes.len(), self.started.elapsed());
        }
        self.served.count(Op::Read, None);
        self.reply.data(bytes);
    }

    /// Reads again what was evicted in the middle of the read.
    fn read_again(mut self, layer: DiffId) {
        self.give_back();
        self.n_evictions += 1;
        match self.n_fetches + self.n_evictions <= MAX_FETCHES {
            true => self.read_in_pool(),
            false => self.read_past_the_disk(layer),
        }
    }

    /// Has all chunks lent: they are evicted faster than they are read.
    fn read_past_the_disk(self, layer: DiffId) {
        match self.n_lendings < MAX_LENDINGS {
            true => self.borrow_in_pool(Needed::All),
            false => self.fail(
                layer,
                "evicted as soon as it was fetched: the cache is too small",
            ),
        }
    }

    /// Has chunks made present, and comes back when they are.
    fn fetch(mut self, missing: Missing) {
        if self.n_fetches == 0 {
            self.served.counters.disk_read(Outcome::Miss);
        }
        self.n_fetches += 1;
        let Some((first, _)) = missing.first().cloned() else {
            return self.read_in_pool();
        };
        if MAX_FETCHES < self.n_fetches + self.n_evictions {
            return self.read_past_the_disk(first);
        }
        let provider = self.served.provider.clone();
        let waiting = Arc::new(Waiting {
            n_left: AtomicUsize::new(missing.len()),
            read: Mutex::new(Some(self)),
        });
        for (layer, chunks) in missing {
            let waiting = waiting.clone();
            let done = Box::new(move |result| waiting.arrived(layer, result));
            provider.make_present(layer, chunks, done);
        }
    }

    /// Answers as the file system does.
    pub(super) fn fail_with(self, error: &FsError) {
        self.served.count(Op::Read, Some(error));
        self.reply.error(errno(error));
    }

    pub(super) fn fail(self, layer: DiffId, reason: &str) {
        self.served.counters.failed(Op::Read);
        let subject = Subject::Layer(layer);
        if let Some(n_silent) = self.served.failures.admit(subject, Instant::now()) {
            warn!(layer.diff_id = %layer, n_silent, error = reason, "read failed");
        }
        self.reply.error(Errno::EIO);
    }
}

impl<I: ServedBytes> Waiting<I> {
    /// Takes note that the chunks of `layer` are present, or why not.
    fn arrived(&self, layer: DiffId, result: Result<(), PresentError>) {
        match result {
            Ok(()) if self.n_left.fetch_sub(1, Ordering::AcqRel) != 1 => {}
            Ok(()) => {
                if let Some(read) = self.take() {
                    read.read_in_pool();
                }
            }
            Err(error) => {
                if let Some(read) = self.take() {
                    if error.is_of_disk() && read.n_lendings < MAX_LENDINGS {
                        read.borrow_in_pool(Needed::Absent);
                    } else {
                        read.fail(layer, &error_chain(&error));
                    }
                }
            }
        }
    }

    fn take(&self) -> Option<PendingRead<I>> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        read.take()
    }
}
