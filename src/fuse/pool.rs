//! Threads and buffers that all mounts of the process share.
//!
//! A FUSE thread answers what needs no wait. What has to wait for the local disk runs here, so that
//! a mount's one FUSE thread stays free; what has to wait for the network holds no thread at all.
//!
//! Memory is bounded: no more buffers exist than the configuration says, and they are freed when
//! the process is idle. The queue has one entry, of some hundred bytes, for each kernel thread that
//! is blocked in a read or readahead request (256 of the latter for a mount): it needs no bound of its own. It goes
//! round among mounts, so that one with many readers does not keep another's waiting for all of them.
//!
//! A panic in a job does not end its thread. Sound, because a job owns what it works on, except its
//! buffer, of which any content is valid, and no lock is held while a job runs.

use std::{
    collections::VecDeque,
    fmt, io,
    ops::{Deref, DerefMut},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::lending::Lending;
use crate::{fair::RoundRobin, sys};

/// Idle buffers of more than this are freed at once: only direct I/O asks for so much at a time,
/// readahead for 256 KiB.
const KEEP_BYTES: usize = 512 << 10;

/// How long after the first request of a burst memory is given back.
///
/// Long enough to cost nothing, short enough that 50 mounts in use one after the other do not hold
/// the pages of 50 indexes.
const SETTLE: Duration = Duration::from_secs(1);

/// How many requests of all mounts may pass before the pages of indexes that they touched are given
/// back, even in the middle of a burst.
///
/// A fault maps 64 KiB of an index, and a lookup faults about three times: four requests far apart
/// hold 768 KiB. Mapping pages again costs some microseconds, a request 30.
pub(super) const TRIM_EVERY: u32 = 4;

/// Stack of a read thread: it calls pread(2) and writes the odd log line.
const STACK_BYTES: usize = 256 << 10;

/// What a read thread does.
pub(super) type Job = Box<dyn FnOnce(&mut Vec<u8>) + Send>;

/// Tells the mounts of a pool apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MountNumber(u64);

/// What happens when a burst of requests is over.
type Trim = Box<dyn FnOnce() + Send>;

/// Size of the pool.
#[derive(Debug, Clone, Copy)]
pub struct PoolConfig {
    /// Threads that read from the local disk.
    ///
    /// With 8, cold random reads of 8 processes reach three quarters of a native file system; with
    /// one a fifth.
    pub n_threads: usize,
    /// Buffers in use at the same time, each of at most 1 MiB, usually of 256 KiB.
    pub n_buffers: usize,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            n_threads: 8,
            n_buffers: 8,
        }
    }
}

/// Read threads and buffers; one for the process.
///
/// Dropping it ends the threads when they have done what they are at; what is still queued is
/// answered with EIO.
#[derive(Debug)]
pub struct ReadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    n_requests: AtomicU32,
    n_mounts: AtomicU64,
    turns: Turns,
    lending: Arc<Lending>,
}

/// Requests of all mounts that are answered at the same time: one for each core, and some.
///
/// More would not be faster, but each that is interrupted holds the pages of an index that it
/// touched until it goes on, and each mount has a thread.
#[derive(Debug)]
struct Turns {
    /// std Mutex: held to count.
    n_left: Mutex<usize>,
    ended: Condvar,
}

/// The right to answer a request.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *lock(&self.0.n_left) += 1;
        self.0.ended.notify_one();
    }
}

/// The fewest turns: so many may be waiting for a page of an index that is not in memory.
const MIN_TURNS: usize = 2;

struct Shared {
    /// std Mutex: held to move an entry, never while a job runs. Locked before `buffers`.
    queue: Mutex<Queue>,
    work: Condvar,
    /// std Mutex: held to move a buffer.
    buffers: Mutex<Buffers>,
    returned: Condvar,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Queue {
    jobs: RoundRobin<MountNumber, Job>,
    /// In the order of their deadlines.
    trims: VecDeque<(Instant, Trim)>,
    stopping: bool,
}

struct Buffers {
    idle: Vec<Vec<u8>>,
    /// How many more may be made.
    n_left: usize,
}

impl ReadPool {
    /// Starts the threads.
    ///
    /// # Errors
    /// If the system does not give a thread.
    pub fn new(config: PoolConfig) -> io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            work: Condvar::new(),
            buffers: Mutex::new(Buffers {
                idle: Vec::new(),
                n_left: config.n_buffers.max(1),
            }),
            returned: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            workers: Vec::new(),
            n_requests: AtomicU32::new(0),
            n_mounts: AtomicU64::new(0),
            turns: Turns {
                n_left: Mutex::new(
                    thread::available_parallelism()
                        .map_or(0, usize::from)
                        .max(MIN_TURNS),
                ),
                ended: Condvar::new(),
            },
            lending: Arc::default(),
        };
        for at in 0..config.n_threads.max(1) {
            let shared = pool.shared.clone();
            let worker = thread::Builder::new()
                .name(format!("clip-read-{at}"))
                .stack_size(STACK_BYTES)
                .spawn(move || shared.work())?;
            pool.workers.push(worker);
        }
        Ok(Arc::new(pool))
    }

    /// Numbers a mount that is going to be served.
    pub(super) fn join(&self) -> MountNumber {
        MountNumber(self.n_mounts.fetch_add(1, Ordering::Relaxed))
    }

    /// Runs `job` of a mount on a read thread, with a buffer whose content is undefined.
    pub(super) fn submit(&self, mount: MountNumber, job: Job) {
        let mut queue = lock(&self.shared.queue);
        if !queue.stopping {
            queue.jobs.push(mount, job);
            self.shared.work.notify_one();
        }
    }

    /// Runs `trim`, and frees idle buffers, when the burst that begins now is over.
    pub(super) fn trim_later(&self, trim: Trim) {
        let mut queue = lock(&self.shared.queue);
        queue.trims.push_back((Instant::now() + SETTLE, trim));
        self.shared.work.notify_one();
    }

    /// Waits for a turn to answer a request from memory.
    pub(super) fn turn(&self) -> Turn<'_> {
        let mut n_left = lock(&self.turns.n_left);
        while *n_left == 0 {
            let woken = self.turns.ended.wait(n_left);
            n_left = woken.unwrap_or_else(PoisonError::into_inner);
        }
        *n_left -= 1;
        Turn(&self.turns)
    }

    /// Who may have chunks lent.
    pub(super) fn lending(&self) -> &Arc<Lending> {
        &self.lending
    }

    /// Counts a request of any mount as so many. Every so often, runs all that waits for the end of a
    /// burst.
    pub(super) fn count_request(&self, weight: u32) {
        let before = self.n_requests.fetch_add(weight, Ordering::Relaxed);
        if before / TRIM_EVERY != before.wrapping_add(weight) / TRIM_EVERY {
            let trims = std::mem::take(&mut lock(&self.shared.queue).trims);
            for (_, trim) in trims {
                run(trim);
            }
        }
    }

    /// Takes a buffer if one is free.
    pub(super) fn try_buffer(&self) -> Option<Buffer<'_>> {
        lock(&self.shared.buffers).take().map(|bytes| Buffer {
            bytes,
            shared: &self.shared,
        })
    }

    #[cfg(test)]
    fn idle_bytes(&self) -> usize {
        let buffers = lock(&self.shared.buffers);
        buffers.idle.iter().map(Vec::capacity).sum()
    }
}

impl Drop for ReadPool {
    fn drop(&mut self) {
        let abandoned = {
            let mut queue = lock(&self.shared.queue);
            queue.stopping = true;
            self.shared.work.notify_all();
            (
                std::mem::take(&mut queue.jobs),
                std::mem::take(&mut queue.trims),
            )
        };
        drop(abandoned);
        for worker in self.workers.drain(..) {
            // The last user of the pool can be a job of its own.
            if worker.thread().id() != thread::current().id() {
                // A worker catches the panics of its jobs and has none of its own.
                let _ = worker.join();
            }
        }
    }
}

impl Shared {
    /// Does what comes, until the pool is dropped.
    fn work(&self) {
        loop {
            let mut queue = lock(&self.queue);
            if queue.stopping {
                return;
            }
            if let Some(job) = queue.jobs.pop() {
                drop(queue);
                let mut buffer = self.buffer();
                run(|| job(&mut buffer));
                continue;
            }
            let Some(due) = queue.trims.front().map(|(due, _)| *due) else {
                // Unbounded, but every submission and the end of the pool wake it.
                drop(self.work.wait(queue));
                continue;
            };
            let now = Instant::now();
            if now < due {
                drop(self.work.wait_timeout(queue, due - now));
            } else if let Some((_, trim)) = queue.trims.pop_front() {
                drop(queue);
                run(trim);
                lock(&self.buffers).free_idle();
                sys::drop_code();
            }
        }
    }

    /// Takes a buffer; waits while all are in use. Nobody waits for anything while holding one but
    /// the local disk and the kernel's copy of a reply, so the wait is short.
    fn buffer(&self) -> Buffer<'_> {
        let mut buffers = lock(&self.buffers);
        loop {
            if let Some(bytes) = buffers.take() {
                return Buffer {
                    bytes,
                    shared: self,
                };
            }
            let woken = self.returned.wait(buffers);
            buffers = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Buffers {
    fn take(&mut self) -> Option<Vec<u8>> {
        match self.idle.pop() {
            Some(bytes) => Some(bytes),
            None => {
                self.n_left = self.n_left.checked_sub(1)?;
                Some(Vec::new())
            }
        }
    }

    fn put(&mut self, bytes: Vec<u8>) {
        if bytes.capacity() <= KEEP_BYTES {
            self.idle.push(bytes);
        } else {
            self.n_left += 1;
        }
    }

    fn free_idle(&mut self) {
        self.n_left += self.idle.len();
        self.idle = Vec::new();
    }
}

/// A buffer out of the pool, to which it returns when dropped.
#[derive(Debug)]
pub(super) struct Buffer<'a> {
    bytes: Vec<u8>,
    shared: &'a Shared,
}

impl Deref for Buffer<'_> {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.bytes
    }
}

impl DerefMut for Buffer<'_> {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        lock(&self.shared.buffers).put(std::mem::take(&mut self.bytes));
        self.shared.returned.notify_one();
    }
}

/// No invariant spans two fields while a lock is held, so a poisoned lock is as good as another.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(work: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(work)).is_err() {
        tracing::error!("read thread panicked: please report this");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Longer than anything here takes, on any machine.
    const DEADLINE: Duration = Duration::from_secs(20);

    fn pool(n_threads: usize, n_buffers: usize) -> Arc<ReadPool> {
        let config = PoolConfig {
            n_threads,
            n_buffers,
        };
        ReadPool::new(config).unwrap()
    }

    #[test]
    fn no_more_buffers_exist_than_configured() {
        let pool = pool(4, 2);
        let one = pool.try_buffer().unwrap();
        let other = pool.try_buffer().unwrap();
        assert!(pool.try_buffer().is_none());
        let (sender, receiver) = mpsc::channel();
        for at in 0..8 {
            let sender = sender.clone();
            pool.submit(pool.join(), Box::new(move |_| sender.send(at).unwrap()));
        }
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        drop((one, other));
        let mut done: Vec<i32> = (0..8)
            .map(|_| receiver.recv_timeout(DEADLINE).unwrap())
            .collect();
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn many_jobs_of_one_mount_keep_another_waiting_for_one() {
        let pool = pool(1, 1);
        let (many, few) = (pool.join(), pool.join());
        let (go, wait) = mpsc::channel::<()>();
        let (begin, began) = mpsc::channel::<()>();
        let hold = move |_: &mut Vec<u8>| {
            begin.send(()).unwrap();
            wait.recv_timeout(DEADLINE).unwrap();
        };
        pool.submit(many, Box::new(hold));
        began.recv_timeout(DEADLINE).unwrap();
        let (sender, order) = mpsc::channel();
        let note = |who: &'static str| -> Job {
            let sender = sender.clone();
            Box::new(move |_| sender.send(who).unwrap())
        };
        (0..64).for_each(|_| pool.submit(many, note("many")));
        pool.submit(few, note("few"));
        go.send(()).unwrap();
        let order = (0..65).map(|_| order.recv_timeout(DEADLINE).unwrap());
        assert_eq!(order.take_while(|it| *it != "few").count(), 1);
    }

    #[test]
    fn a_panic_ends_neither_thread_nor_buffer() {
        let pool = pool(1, 1);
        for _ in 0..3 {
            pool.submit(pool.join(), Box::new(|_| panic!("a job of the test")));
        }
        let (sender, receiver) = mpsc::channel();
        pool.submit(pool.join(), Box::new(move |_| sender.send(()).unwrap()));
        receiver.recv_timeout(DEADLINE).unwrap();
    }

    #[test]
    fn large_and_idle_buffers_are_freed() {
        let pool = pool(1, 2);
        pool.try_buffer().unwrap().resize(KEEP_BYTES + 1, 0);
        assert_eq!(pool.idle_bytes(), 0);
        pool.try_buffer().unwrap().resize(KEEP_BYTES, 0);
        assert_eq!(pool.idle_bytes(), KEEP_BYTES);
        let (sender, receiver) = mpsc::channel();
        let started = Instant::now();
        pool.trim_later(Box::new(move || sender.send(()).unwrap()));
        receiver.recv_timeout(DEADLINE).unwrap();
        assert!(SETTLE <= started.elapsed());
        // The buffers go right after the trim, on the same thread as this job.
        let (sender, receiver) = mpsc::channel();
        pool.submit(
            pool.join(),
            Box::new(move |buffer| sender.send(buffer.capacity()).unwrap()),
        );
        assert_eq!(receiver.recv_timeout(DEADLINE).unwrap(), 0);
    }

    #[test]
    fn memory_is_given_back_within_a_long_burst() {
        let pool = pool(1, 1);
        let (sender, receiver) = mpsc::channel();
        pool.trim_later(Box::new(move || sender.send(()).unwrap()));
        for _ in 0..TRIM_EVERY - 1 {
            pool.count_request(1);
        }
        assert_eq!(receiver.try_recv(), Err(mpsc::TryRecvError::Empty));
        pool.count_request(1);
        assert_eq!(receiver.try_recv(), Ok(()));
    }

    #[test]
    fn a_job_may_be_the_last_user_of_the_pool() {
        let pool = pool(2, 2);
        let (sender, receiver) = mpsc::channel::<()>();
        let (go, wait) = mpsc::channel::<()>();
        let owned = pool.clone();
        pool.submit(
            pool.join(),
            Box::new(move |_| {
                wait.recv_timeout(DEADLINE).unwrap();
                drop(owned);
                drop(sender);
            }),
        );
        drop(pool);
        go.send(()).unwrap();
        let end = receiver.recv_timeout(DEADLINE);
        assert_eq!(end, Err(mpsc::RecvTimeoutError::Disconnected));
    }
}
