//! Mounts a [`ClipFs`] and serves it to the kernel.
//!
//! [`mount`](session::mount) makes a [`FuseMount`](session::FuseMount); all mounts of the process
//! share one [`ReadPool`]. One FUSE thread per mount answers metadata and cached
//! reads; `read.rs` shows the way of the others.
//!
//! fuser is used for the protocol only. The mount itself is made and taken down here, because
//! fuser unmounts by path when its session ends, even if another mount stands there by then, and
//! because the file descriptor has to be ours to be handed over to a successor. `clone_fd` is never
//! used: requests taken from a cloned device are lost with the process that took them.

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use tracing::{error, warn};

use self::{
    counters::{Counters, FailureLog, Op, Subject},
    errno::is_failure,
    pool::{MountNumber, ReadPool, TRIM_EVERY},
};
use crate::{
    fs::{ClipFs, FsError, ServedBytes},
    telemetry::error_chain,
    tier::MakePresent,
};

mod adapter;
mod convert;
mod counters;
mod errno;
mod lending;
pub mod pool;
mod read;
pub mod session;
pub mod takeover;

/// What the threads that serve one mount share.
struct Served<I> {
    fs: Arc<ClipFs<I>>,
    provider: Arc<dyn MakePresent>,
    pool: Arc<ReadPool>,
    /// Its place in the pool's queues.
    number: MountNumber,
    counters: Counters,
    failures: FailureLog,
    /// Whether requests came since the pages of the index were last given back.
    in_burst: AtomicBool,
}

impl<I: fmt::Debug> fmt::Debug for Served<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Served")
            .field("fs", &self.fs)
            .finish_non_exhaustive()
    }
}

impl<I: ServedBytes> Served<I> {
    fn new(fs: Arc<ClipFs<I>>, provider: Arc<dyn MakePresent>, pool: Arc<ReadPool>) -> Self {
        Self {
            counters: Counters::new(fs.metrics()),
            number: pool.join(),
            fs,
            provider,
            pool,
            failures: FailureLog::default(),
            in_burst: AtomicBool::new(false),
        }
    }

    /// Runs the handler of a request. If it panics, its reply is dropped, which answers EIO.
    ///
    /// Sound: requests share the index, which does not change, counters, which are atomic, and
    /// three locks (failures, buffers, queue), which are held for single moves and are taken even
    /// when poisoned.
    fn guard(self: &Arc<Self>, op: Op, handle: impl FnOnce()) {
        // Until the pages that it touches are given back, or others may do so.
        let _turn = self.pool.turn();
        self.guard_without_turn(op, handle);
    }

    /// The same for work that waits for the disk, and so must not keep others from their turn.
    fn guard_without_turn(self: &Arc<Self>, op: Op, handle: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(handle)).is_err() {
            self.counters.failed(op);
            error!(?op, "FUSE request panicked: please report this");
        }
        // Afterwards: what it touched is given back with the rest, or by who comes next.
        if !self.in_burst.load(Ordering::Relaxed) && !self.in_burst.swap(true, Ordering::Relaxed) {
            let served = Arc::downgrade(self);
            self.pool.trim_later(Box::new(move || {
                if let Some(served) = served.upgrade() {
                    served.in_burst.store(false, Ordering::Relaxed);
                    served.fs.trim();
                }
            }));
        }
        // A listing touches as much as many others.
        self.pool.count_request(match op {
            Op::ReadDir | Op::ReadDirPlus => TRIM_EVERY,
            _ => 1,
        });
    }

    /// Counts an answer, and logs it if it is a failure.
    fn count(&self, op: Op, error: Option<&FsError>) {
        let Some(error) = error.filter(|it| is_failure(it)) else {
            return self.counters.answered(op);
        };
        self.counters.failed(op);
        let subject = match error {
            FsError::Io { layer, .. } => Subject::Layer(*layer),
            _ => Subject::Index,
        };
        if let Some(n_silent) = self.failures.admit(subject, Instant::now()) {
            warn!(?op, n_silent, error = error_chain(error), "request failed");
        }
    }
}
