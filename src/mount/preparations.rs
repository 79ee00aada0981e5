//! Runs the preparation of images apart from the calls that wait for it.
//!
//! Kubelet gives a call two minutes; a large image on a slow link takes longer. A call joins the
//! work on its image, waits as long as it may, and answers "still being prepared"; the work goes
//! on, and the next call joins it.
//!
//! Nothing is cached: when work has ended, the next call starts anew, which is quick if the image
//! has become ready, and asks the registry for the right to pull again. One exception: a failure
//! that came when nobody waited is told to the next call, once. Otherwise an image that fails
//! after ten minutes would be "still being prepared" for ever.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{timeout, timeout_at},
};
use tracing::{Instrument, info, info_span, warn};

use super::{ImageMounter, ImageRequest, MountError, PrepareError, PreparedImage, Progress, lock};
use crate::digest::ManifestDigest;

/// Images being prepared at once, at most; each costs a task and what it streams.
///
/// A node holds 110 pods by default (kubelet `maxPods`): a reboot of a full node stays below.
const MAX_PREPARATIONS: usize = 128;

/// How long a failure is kept for the call that did not hear it: kubelet tries again after two
/// minutes at most.
const UNHEARD_FAILURE_LIFE: Duration = Duration::from_secs(300);

/// How long an image may take before its pods are told: kubelet says nothing while a call waits.
///
/// A gigabyte is read and indexed in about that time.
const SLOW: Duration = Duration::from_secs(15);

type Key = [u8; 32];
type Outcome = Result<PreparedImage, PrepareError>;

/// The preparations in flight. Dropped, it ends them.
#[derive(Debug)]
pub(super) struct Preparations {
    mounter: Arc<dyn ImageMounter>,
    shared: Arc<Mutex<Shared>>,
    /// Owns the work. std Mutex: held to spawn, never across an await.
    tasks: Mutex<JoinSet<()>>,
}

/// std Mutex around it: held for a map lookup, never across an await.
#[derive(Debug, Default)]
struct Shared {
    running: HashMap<Key, Running>,
    unheard: HashMap<Key, (Instant, PrepareError)>,
}

#[derive(Debug, Clone)]
struct Running {
    outcome: watch::Receiver<Option<Outcome>>,
    progress: Arc<Progress>,
    since: Instant,
}

impl Preparations {
    pub(super) fn new(mounter: Arc<dyn ImageMounter>) -> Self {
        Self {
            mounter,
            shared: Arc::default(),
            tasks: Mutex::default(),
        }
    }

    /// Waits up to `patience` for the image, starting the work if nobody has. `when_slow` is told how far
    /// it is, once, if it takes long.
    ///
    /// # Errors
    /// [`MountError::Preparing`] when the patience is over; otherwise why the image is not ready.
    ///
    /// # Cancellation
    /// Safe: the work goes on.
    pub(super) async fn wait(
        &self,
        request: ImageRequest,
        patience: Duration,
        when_slow: impl FnOnce(String),
    ) -> Result<PreparedImage, MountError> {
        let image = request.image.clone();
        let mut running = self.join(request)?;
        let until = tokio::time::Instant::now() + patience;
        let soon = running.outcome.wait_for(Option::is_some);
        if timeout(SLOW.min(patience), soon).await.is_err() {
            when_slow(running.progress.to_string());
        }
        let outcome = match timeout_at(until, running.outcome.wait_for(Option::is_some)).await {
            Ok(Ok(outcome)) => outcome.clone(),
            // The sender is gone without a word.
            Ok(Err(_)) => None,
            Err(_) => {
                return Err(MountError::Preparing {
                    image,
                    waited: running.since.elapsed(),
                    progress: running.progress.to_string(),
                });
            }
        };
        outcome
            .unwrap_or_else(|| {
                Err(PrepareError::Internal {
                    reason: "the work ended without an outcome: see this node's log".to_owned(),
                })
            })
            .map_err(|cause| MountError::of_image(&image, cause))
    }

    /// Has what is read of a mounted image be read with the rights of `request`.
    ///
    /// # Errors
    /// Those of [`ImageMounter::renew`].
    pub(super) async fn renew(
        &self,
        manifest: ManifestDigest,
        request: &ImageRequest,
    ) -> Result<(), PrepareError> {
        self.mounter.renew(manifest, request).await
    }

    fn join(&self, request: ImageRequest) -> Result<Running, MountError> {
        let key = request.work();
        let mut shared = lock(&self.shared);
        if let Some(running) = shared.running.get(&key) {
            return Ok(running.clone());
        }
        shared
            .unheard
            .retain(|_, (since, _)| since.elapsed() < UNHEARD_FAILURE_LIFE);
        if let Some((_, cause)) = shared.unheard.remove(&key) {
            return Err(MountError::of_image(&request.image, cause));
        }
        if MAX_PREPARATIONS <= shared.running.len() {
            return Err(MountError::Overloaded {
                max: MAX_PREPARATIONS,
            });
        }
        let (sender, outcome) = watch::channel(None);
        let running = Running {
            outcome,
            progress: Arc::default(),
            since: Instant::now(),
        };
        shared.running.insert(key, running.clone());
        drop(shared);

        let entry = Entry {
            shared: Arc::clone(&self.shared),
            key,
            sender,
        };
        let span = info_span!(parent: None, "prepare", image.ref = %request.image);
        let work = prepare(
            Arc::clone(&self.mounter),
            request,
            Arc::clone(&running.progress),
            entry,
        );
        let mut tasks = lock(&self.tasks);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(work.instrument(span));
        Ok(running)
    }
}

async fn prepare(
    mounter: Arc<dyn ImageMounter>,
    request: ImageRequest,
    progress: Arc<Progress>,
    entry: Entry,
) {
    let since = Instant::now();
    let outcome = mounter.prepare(&request, &progress).await;
    let seconds = since.elapsed().as_secs_f64();
    match &outcome {
        Ok(image) => info!(image.manifest = %image.manifest, seconds, "image is ready"),
        Err(err) => warn!(
            error = err as &dyn std::error::Error,
            seconds, "image is not ready"
        ),
    }
    entry.announce(outcome);
}

/// The entry of work in flight: gone when the work has ended, in whatever way.
struct Entry {
    shared: Arc<Mutex<Shared>>,
    key: Key,
    sender: watch::Sender<Option<Outcome>>,
}

impl Entry {
    /// Tells all who wait; keeps a failure that nobody waits for.
    fn announce(self, outcome: Outcome) {
        let mut shared = lock(&self.shared);
        // The entry holds a receiver too. Under the lock, so that nobody joins in between.
        shared.running.remove(&self.key);
        if self.sender.receiver_count() == 0
            && shared.unheard.len() < MAX_PREPARATIONS
            && let Err(cause) = &outcome
        {
            let failure = (Instant::now(), cause.clone());
            shared.unheard.insert(self.key, failure);
        }
        drop(shared);
        self.sender.send_replace(Some(outcome));
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut shared = lock(&self.shared);
        // After `announce` the entry under this key may be the next call's.
        let ours = shared
            .running
            .get(&self.key)
            .is_some_and(|it| it.outcome.same_channel(&self.sender.subscribe()));
        if ours {
            shared.running.remove(&self.key);
        }
    }
}
