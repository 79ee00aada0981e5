//! Answers reads past the local disk: waits for a turn, has the chunks lent, and reads on from them.
//!
//! No more than [`MAX_LENT`] chunks are lent at once, for all mounts together. A read takes its turn for
//! all chunks that it needs, and gives all back before it asks for others, so that no read waits for
//! another one that waits for it. Turns go round among mounts.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{counters::Op, pool::MountNumber, read::PendingRead};
use crate::{
    digest::DiffId,
    fair::RoundRobin,
    fs::{ServedBytes, read::Needed},
    telemetry::error_chain,
    tier::{
        Chunk, PresentError,
        lent::{LentChunk, MAX_LENT},
    },
};

/// How long a read waits for its turn: an agent or a registry that does not answer must not keep all
/// others waiting one after the other.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often a read has chunks lent before it gives up.
///
/// More than once is needed only if others are lost meanwhile.
pub(super) const MAX_LENDINGS: u32 = 3;

/// Who may have chunks lent, and who waits for it; one for the process.
#[derive(Debug, Default)]
pub(super) struct Lending(
    /// std Mutex: held to enter or leave, never while a read goes on.
    Mutex<Turnstile<MountNumber, Turn>>,
);

/// What a read does when its turn comes.
struct Turn(Box<dyn FnOnce(Permit) + Send>);

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Turn")
    }
}

/// The right to have so many chunks lent.
#[derive(Debug)]
pub(super) struct Permit {
    lending: Arc<Lending>,
    n_chunks: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let started = self.lending.turnstile().leave(self.n_chunks);
        for (n_chunks, turn) in started {
            let lending = Arc::clone(&self.lending);
            (turn.0)(Permit { lending, n_chunks });
        }
    }
}

impl Lending {
    /// Calls `turn` once so many chunks, at most [`MAX_LENT`], may be lent: at once, or when others have
    /// given theirs back, and then on their thread.
    fn enter(
        self: &Arc<Self>,
        mount: MountNumber,
        n_chunks: usize,
        turn: impl FnOnce(Permit) + Send + 'static,
    ) {
        let turn = Turn(Box::new(turn));
        let started = self.turnstile().enter(mount, n_chunks, turn);
        if let Some(turn) = started {
            let lending = Arc::clone(self);
            (turn.0)(Permit { lending, n_chunks });
        }
    }

    fn turnstile(&self) -> MutexGuard<'_, Turnstile<MountNumber, Turn>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Lets in one of each mount in turn, and of a mount whoever came first.
#[derive(Debug)]
struct Turnstile<K, T> {
    n_left: usize,
    waiting: RoundRobin<K, (usize, T)>,
}

impl<K, T> Default for Turnstile<K, T> {
    fn default() -> Self {
        Self {
            n_left: MAX_LENT,
            waiting: RoundRobin::default(),
        }
    }
}

impl<K: PartialEq, T> Turnstile<K, T> {
    /// Gives `who` back if there is room for it; else it waits behind the others.
    fn enter(&mut self, mount: K, n: usize, who: T) -> Option<T> {
        if self.waiting.is_empty() && n <= self.n_left {
            self.n_left -= n;
            return Some(who);
        }
        self.waiting.push(mount, (n, who));
        None
    }

    /// Makes room, and gives who enters now.
    fn leave(&mut self, n: usize) -> Vec<(usize, T)> {
        self.n_left += n;
        let mut entered = Vec::new();
        while let Some((n, _)) = self.waiting.peek()
            && *n <= self.n_left
        {
            self.n_left -= n;
            entered.extend(self.waiting.pop());
        }
        entered
    }
}

/// A read that waits for what it has lent.
#[derive(Debug)]
struct Borrowing<I> {
    /// std Mutex: held to add what came, or to take the read out, which the last arrival does.
    state: Mutex<Borrowed<I>>,
    n_left: AtomicUsize,
}

#[derive(Debug)]
struct Borrowed<I> {
    /// Until all has come.
    read: Option<PendingRead<I>>,
    failure: Option<(DiffId, PresentError)>,
}

impl<I: ServedBytes> PendingRead<I> {
    /// Has the chunks that the read needs lent, on a read thread, and goes on with them.
    pub(super) fn borrow_in_pool(self, needed: Needed) {
        let served = Arc::clone(&self.served);
        let pool = Arc::clone(&served.pool);
        pool.submit(
            served.number,
            Box::new(move |_buffer| {
                served.guard_without_turn(Op::Read, || self.borrow(needed));
            }),
        );
    }

    fn borrow(mut self, needed: Needed) {
        self.n_lendings += 1;
        let fs = &self.served.fs;
        let wanted = match fs.chunks(self.ino, self.offset, self.len, needed) {
            Ok(wanted) => wanted,
            Err(error) => return self.fail_with(&error),
        };
        let Some(first) = wanted.first().copied() else {
            // They have come meanwhile.
            return self.read_in_pool();
        };
        if MAX_LENT < wanted.len() {
            let reason =
                "it lies in more chunks than can be lent at once: the image's index is damaged";
            return self.fail(first.layer, reason);
        }
        let pool = Arc::clone(&self.served.pool);
        let since = Instant::now();
        let number = self.served.number;
        pool.lending().enter(number, wanted.len(), move |permit| {
            let pool = Arc::clone(&self.served.pool);
            pool.submit(
                number,
                Box::new(move |_buffer| {
                    if since.elapsed() < PATIENCE {
                        self.ask(wanted, permit);
                    } else {
                        drop(permit);
                        self.fail(first.layer, "those before it had chunks lent for too long");
                    }
                }),
            );
        });
    }

    fn ask(mut self, wanted: Vec<Chunk>, permit: Permit) {
        self.permit = Some(permit);
        let provider = Arc::clone(&self.served.provider);
        let borrowing = Arc::new(Borrowing {
            n_left: AtomicUsize::new(wanted.len()),
            state: Mutex::new(Borrowed {
                read: Some(self),
                failure: None,
            }),
        });
        for chunk in wanted {
            let borrowing = Arc::clone(&borrowing);
            let done = Box::new(move |outcome| borrowing.arrived(chunk.layer, outcome));
            provider.lend(chunk, done);
        }
    }

    /// Gives back what was lent, and lets the next one have its turn.
    pub(super) fn give_back(&mut self) {
        self.lent = Vec::new();
        self.permit = None;
    }
}

impl<I: ServedBytes> Borrowing<I> {
    fn arrived(&self, layer: DiffId, outcome: Result<LentChunk, PresentError>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match outcome {
            Ok(lent) => {
                if let Some(read) = &mut state.read {
                    read.lent.push(lent);
                }
            }
            Err(error) => state.failure = Some((layer, error)),
        }
        // The turn is for all of them: it ends when none is to come any more.
        if self.n_left.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let (read, failure) = (state.read.take(), state.failure.take());
        drop(state);
        match (read, failure) {
            (Some(read), None) => read.read_in_pool(),
            (Some(mut read), Some((layer, error))) => {
                read.give_back();
                read.fail(layer, &error_chain(&error));
            }
            (None, _) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::fuse::pool::{PoolConfig, ReadPool};

    #[test]
    fn the_first_to_come_is_the_first_to_enter_and_none_is_passed_by() {
        let mut turnstile = Turnstile::default();
        assert_eq!(turnstile.enter(0, 3, 'a'), Some('a'));
        assert_eq!(turnstile.enter(0, 2, 'b'), None);
        // There would be room, but a stream of small ones must not keep a large one waiting.
        assert_eq!(turnstile.enter(0, 1, 'c'), None);
        assert_eq!(turnstile.enter(0, 4, 'd'), None);
        assert_eq!(turnstile.leave(3), [(2, 'b'), (1, 'c')]);
        assert_eq!(turnstile.leave(2), []);
        assert_eq!(turnstile.leave(1), [(4, 'd')]);
        assert_eq!(turnstile.leave(4), []);
        assert_eq!(turnstile.n_left, MAX_LENT);
    }

    #[test]
    fn many_of_one_mount_keep_another_waiting_for_one() {
        let mut turnstile = Turnstile::default();
        assert_eq!(turnstile.enter(0, MAX_LENT, 0), Some(0));
        for who in 1..=64 {
            assert_eq!(turnstile.enter(0, MAX_LENT, who), None);
        }
        assert_eq!(turnstile.enter(1, MAX_LENT, 65), None);
        assert_eq!(turnstile.leave(MAX_LENT), [(MAX_LENT, 1)]);
        assert_eq!(turnstile.leave(MAX_LENT), [(MAX_LENT, 65)]);
        assert_eq!(turnstile.leave(MAX_LENT), [(MAX_LENT, 2)]);
    }

    #[test]
    fn a_permit_that_is_dropped_lets_the_next_one_in() {
        let lending = Arc::new(Lending::default());
        let (sender, permits) = mpsc::channel();
        let mount = ReadPool::new(PoolConfig::default()).unwrap().join();
        for n in [MAX_LENT, 1] {
            let sender = sender.clone();
            lending.enter(mount, n, move |permit| sender.send(permit).unwrap());
        }
        let first = permits.try_recv().unwrap();
        assert!(permits.try_recv().is_err());
        drop(first);
        assert_eq!(permits.try_recv().unwrap().n_chunks, 1);
    }
}
