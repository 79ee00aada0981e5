//! Puts layers into the remote content cache in the background.
//!
//! One task works through a queue of layers, a chunk at a time: read from the local disk, verify,
//! compress, put. The queue holds sources, no data, so that memory is one chunk and its compressed
//! form, however many layers wait and however slow the remote is.
//!
//! A layer is tried again after the remote failed, from its first chunk, because a store that was
//! restarted may have lost what it had; chunks that are there are not sent again. After some
//! attempts without progress the layer is given up: the cache is an optimisation.

mod pass;
mod queue;

use std::{
    fmt, io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::task::JoinHandle;
use tracing::{debug, info, warn};

use crate::digest::{BlobDigest, ChunkDigest, DiffId};

use super::{content::ContentCache, lease::LeaseGuard};
use pass::{Pass, Stop};
use queue::{Job, Queue};

/// A layer on the local disk that is to be uploaded.
///
/// All methods may block on the local disk; they are called on the blocking pool, except for
/// [`diff_id`](Self::diff_id), [`failed`](Self::failed) and [`done`](Self::done), which must not block.
pub trait UploadSource: Send + Sync + fmt::Debug {
    /// Names the layer.
    fn diff_id(&self) -> DiffId;

    /// The layer's blob in the registry.
    fn blob(&self) -> BlobDigest;

    /// Size of the blob.
    fn blob_bytes(&self) -> u64;

    /// Size of the decompressed layer.
    fn layer_bytes(&self) -> u64;

    /// The digests of all chunks, in order. They must come from a layer that was checked against
    /// its `DiffId`, because the manifest is authenticated with this installation's key.
    fn chunk_digests(&self) -> Vec<ChunkDigest>;

    /// Says how long the layer's index is, and its digest.
    ///
    /// # Errors
    /// Those of the disk; they end this layer's upload.
    fn index(&self) -> io::Result<(u64, ChunkDigest)>;

    /// Fills `into` from `offset` of the index.
    ///
    /// # Errors
    /// As for [`index`](Self::index).
    fn read_index(&self, into: &mut [u8], offset: u64) -> io::Result<()>;

    /// Says which blob the layer's access map is of, and how long it is, if there is one.
    ///
    /// # Errors
    /// Those of the disk; then the layer is uploaded without it.
    fn access_map(&self) -> io::Result<Option<(BlobDigest, u64)>> {
        Ok(None)
    }

    /// Fills `into` from `offset` of the access map.
    ///
    /// # Errors
    /// As for [`access_map`](Self::access_map).
    fn read_access_map(&self, _into: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }

    /// Reads all of chunk `n` into `into`, which is empty.
    ///
    /// # Errors
    /// Those of the disk, or that the chunk was evicted; they end this layer's upload.
    fn read_chunk(&self, n: u32, into: &mut Vec<u8>) -> io::Result<()>;

    /// Called before [`done`](Self::done), if it is to be told of a failure: why.
    fn failed(&self, _reason: &str) {}

    /// Called once for each accepted request, from any thread, when nothing more is done for it.
    fn done(&self, outcome: UploadOutcome);
}

/// How the upload of a layer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UploadOutcome {
    /// The layer, or what was to be repaired, is in the store.
    Uploaded {
        /// Bytes that were sent.
        sent_bytes: u64,
    },
    /// The store had it already.
    AlreadyThere,
    /// Given up: the remote is down or full, or the local copy cannot be read or is wrong.
    Failed,
    /// The uploader was stopped first.
    Stopped,
    /// A later request for the same layer replaced this one before it began.
    Merged,
}

/// What is to be put again of a layer that the store has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Repair {
    /// Chunks that were missing or wrong.
    pub chunks: Vec<u32>,
    /// Whether the index was.
    pub index: bool,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    /// It waits for its turn.
    Accepted,
    /// The queue is full, or the uploader is stopping: `done` is not called.
    Refused,
}

/// What an [`Uploader`] can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UploadOptions {
    /// Layers that may wait.
    pub queue_layers: usize,
    /// Attempts in a row without progress after which a layer is given up. That the remote is skipped is none.
    pub attempts: u32,
}

impl Default for UploadOptions {
    fn default() -> Self {
        Self {
            // A waiting layer is some hundred bytes; the largest images have 127 layers.
            queue_layers: 256,
            // With the breaker's waits between them, of a minute at most, this bridges some minutes: a server that
            // another one replaces.
            attempts: 10,
        }
    }
}

/// How long a layer waits for a remote that is skipped: others may find it down again and again.
const LONGEST_OUTAGE: Duration = Duration::from_secs(600);

/// Uploads layers in the background, until it is drained or dropped.
#[derive(Debug)]
pub struct Uploader {
    queue: Arc<Queue>,
    cache: ContentCache,
    /// std Mutex: held to take the handle, never across an await.
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Uploader {
    /// Starts the task. Must be called inside a tokio runtime.
    pub fn start(cache: ContentCache, options: UploadOptions) -> Self {
        let queue = Arc::new(Queue::new(options.queue_layers));
        let worker = tokio::spawn(work(Arc::clone(&queue), cache.clone(), options));
        Self {
            queue,
            cache,
            worker: Mutex::new(Some(worker)),
        }
    }

    /// Asks for the upload of a layer. Returns at once; if the store has the layer already, that
    /// is found out later and cheaply.
    pub fn enqueue(&self, layer: Arc<dyn UploadSource>) -> Enqueued {
        self.push(layer, Repair::default(), None)
    }

    /// Asks for the upload of a layer that other nodes wait for: its lease is held until the upload
    /// has ended, however it ends.
    pub fn enqueue_leased(&self, layer: Arc<dyn UploadSource>, lease: LeaseGuard) -> Enqueued {
        self.push(layer, Repair::default(), Some(lease))
    }

    /// Asks to put parts of a layer again; all of it if the store has no manifest of it.
    pub fn enqueue_repair(&self, layer: Arc<dyn UploadSource>, repair: Repair) -> Enqueued {
        self.push(layer, repair, None)
    }

    /// Whether a layer would be accepted now: who cannot upload must not have others wait.
    pub fn has_room(&self) -> bool {
        self.queue.has_room()
    }

    fn push(
        &self,
        layer: Arc<dyn UploadSource>,
        repair: Repair,
        lease: Option<LeaseGuard>,
    ) -> Enqueued {
        let diff_id = layer.diff_id();
        let accepted = self.queue.push(layer, repair, lease);
        if accepted == Enqueued::Refused {
            self.count("dropped");
            warn!(
                layer.diff_id = %diff_id,
                "upload queue is full or stopping, layer is not uploaded to remote cache"
            );
        }
        accepted
    }

    /// Takes no more layers, and waits until those that are queued are uploaded or given up, or
    /// until `deadline` has passed; what is left then is [`UploadOutcome::Stopped`].
    pub async fn drain(&self, deadline: Duration) {
        self.queue.close();
        let Some(mut worker) = self.take_worker() else {
            return;
        };
        if tokio::time::timeout(deadline, &mut worker).await.is_err() {
            worker.abort();
            // It was cancelled: that is what it says.
            let _ = worker.await;
        }
        drop(self.queue.clear());
    }

    fn take_worker(&self) -> Option<JoinHandle<()>> {
        // Nothing panics with the lock held.
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        worker.take()
    }

    fn count(&self, outcome: &str) {
        count(&self.cache, outcome);
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.queue.close();
        if let Some(worker) = self.take_worker() {
            worker.abort();
        }
        drop(self.queue.clear());
    }
}

fn count(cache: &ContentCache, outcome: &str) {
    let uploads = &cache.metrics().remote_uploads;
    uploads.with_label_values(&[outcome]).inc();
}

/// Works through the queue until it is closed and empty.
async fn work(queue: Arc<Queue>, cache: ContentCache, options: UploadOptions) {
    while let Some(job) = queue.pop().await {
        let outcome = upload(&cache, &job, options).await;
        match outcome {
            UploadOutcome::Uploaded { .. } => count(&cache, "ok"),
            UploadOutcome::Failed => count(&cache, "error"),
            _ => {}
        }
        job.end(outcome);
    }
}

/// Uploads one layer, with retries.
async fn upload(cache: &ContentCache, job: &Job, options: UploadOptions) -> UploadOutcome {
    let layer = job.diff_id();
    let started = cache.clock().now();
    let mut attempts = Attempts::new(options.attempts);
    let mut pass = Pass::new(cache, job);
    loop {
        let sent_before = pass.sent_bytes();
        let stop = match pass.run().await {
            Ok(None) => {
                debug!(layer.diff_id = %layer, "layer is in remote cache already");
                return UploadOutcome::AlreadyThere;
            }
            Ok(Some(layer_bytes)) => {
                let sent_bytes = pass.sent_bytes();
                let took = cache.clock().now().saturating_sub(started);
                info!(
                    layer.diff_id = %layer,
                    bytes = layer_bytes,
                    sent_bytes,
                    duration_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
                    engine = cache.engine(),
                    "cached decompressed layer to remote cache"
                );
                return UploadOutcome::Uploaded { sent_bytes };
            }
            Err(stop) => stop,
        };
        if sent_before < pass.sent_bytes() {
            attempts.progressed();
        }
        let (wait, error, may_go_on) = match stop {
            Stop::Later { wait, error } => (wait, error, attempts.failed()),
            Stop::Skipped { wait } => {
                let may_go_on = attempts.skipped(cache.clock().now());
                (
                    wait,
                    "remote cache is skipped after failures".to_owned(),
                    may_go_on,
                )
            }
            Stop::Never { error } => {
                warn!(layer.diff_id = %layer, error, "layer is not uploaded to remote cache");
                job.source().failed(&error);
                return UploadOutcome::Failed;
            }
        };
        if !may_go_on {
            warn!(
                layer.diff_id = %layer,
                attempts = attempts.total,
                error,
                "giving up the upload of a layer to remote cache"
            );
            job.source().failed(&error);
            return UploadOutcome::Failed;
        }
        debug!(layer.diff_id = %layer, error, ?wait, "upload to remote cache waits");
        tokio::time::sleep(wait).await;
    }
}

/// Counts the attempts at one layer.
#[derive(Debug)]
struct Attempts {
    allowed: u32,
    in_vain: u32,
    total: u32,
    /// Since when the remote is skipped.
    skipped_since: Option<Duration>,
}

impl Attempts {
    /// A store that takes some chunks and forgets them would let progress go on for ever.
    const TOTAL_FACTOR: u32 = 10;

    fn new(allowed: u32) -> Self {
        Self {
            allowed,
            in_vain: 0,
            total: 0,
            skipped_since: None,
        }
    }

    /// Hears that something was put.
    fn progressed(&mut self) {
        self.in_vain = 0;
        self.skipped_since = None;
    }

    /// Counts an attempt that failed, and says whether there may be another.
    fn failed(&mut self) -> bool {
        self.total = self.total.saturating_add(1);
        self.in_vain = self.in_vain.saturating_add(1);
        self.in_vain < self.allowed && self.total < self.allowed.saturating_mul(Self::TOTAL_FACTOR)
    }

    /// Hears that the remote is skipped, and says whether that may be waited for.
    fn skipped(&mut self, now: Duration) -> bool {
        let since = *self.skipped_since.get_or_insert(now);
        now.saturating_sub(since) < LONGEST_OUTAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_bounded_with_and_without_progress() {
        let mut attempts = Attempts::new(3);
        let seen: Vec<_> = (0..3).map(|_| attempts.failed()).collect();
        assert_eq!(seen, [true, true, false]);
        let mut attempts = Attempts::new(3);
        let seen = [false, false, true, false, false].map(|progressed| {
            if progressed {
                attempts.progressed();
            }
            attempts.failed()
        });
        assert_eq!(seen, [true, true, true, true, false]);
        let mut attempts = Attempts::new(3);
        let always = std::iter::repeat_with(|| {
            attempts.progressed();
            attempts.failed()
        });
        assert_eq!(always.take_while(|it| *it).take(1000).count(), 29);
    }

    #[test]
    fn a_remote_that_is_skipped_is_waited_for_and_that_is_bounded_too() {
        let at = Duration::from_secs;
        let mut attempts = Attempts::new(2);
        assert!(attempts.failed());
        for seconds in 0..600 {
            assert!(attempts.skipped(at(1000 + seconds)), "{seconds}");
        }
        assert!(!attempts.skipped(at(1600)));
        attempts.progressed();
        assert!(attempts.skipped(at(1600)));
        assert!(attempts.failed());
        assert!(!attempts.failed());
    }
}
