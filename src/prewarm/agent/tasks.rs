//! Fills the cache for one ImagePrewarm after the other, or for a few at once.

use std::{collections::BTreeMap, sync::Arc};

use prometheus::IntCounterVec;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{info, warn};

use super::{
    Settings,
    order::{ImageToFill, Order},
    queue::End,
};
use crate::{
    digest::ManifestDigest,
    metrics::{Metrics, Tier},
    prewarm::controller::what,
    registry::Requester,
    warm::{FillLimits, FillRequest, Filled, Fills, Origin, Pace, WarmError, WarmProgress},
};

/// How an image cannot even be asked for.
const INVALID: &str = "InvalidImage";

/// A task that is under way.
#[derive(Debug)]
struct Running {
    revision: String,
    handle: AbortHandle,
    /// One for each image.
    progress: Vec<Arc<WarmProgress>>,
}

/// Runs the tasks. They end with it.
pub(super) struct Tasks {
    parts: Arc<dyn Fills>,
    pace: Arc<Pace>,
    settings: Settings,
    metrics: Metrics,
    /// Counts those that have ended, by outcome.
    ended: IntCounterVec,
    tasks: JoinSet<(String, String, End)>,
    running: BTreeMap<String, Running>,
}

impl Tasks {
    pub(super) fn new(parts: Arc<dyn Fills>, settings: &Settings, metrics: Metrics) -> Self {
        Self {
            parts,
            pace: Arc::new(Pace::new(settings.config.bytes_per_second)),
            settings: settings.clone(),
            ended: metrics.prewarm_warmups.clone(),
            metrics,
            tasks: JoinSet::new(),
            running: BTreeMap::new(),
        }
    }

    /// Makes one for what pods want, which shares the bound of bytes a second.
    pub(super) fn for_pods(&self) -> Self {
        Self {
            parts: Arc::clone(&self.parts),
            pace: Arc::clone(&self.pace),
            settings: self.settings.clone(),
            ended: self.metrics.prewarm_pods.clone(),
            metrics: self.metrics.clone(),
            tasks: JoinSet::new(),
            running: BTreeMap::new(),
        }
    }

    pub(super) fn start(&mut self, order: Order) {
        let progress: Vec<_> = order
            .images
            .iter()
            .map(|_| Arc::<WarmProgress>::default())
            .collect();
        let work = Work {
            parts: Arc::clone(&self.parts),
            pace: match order.bytes_per_second {
                Some(bytes) => Arc::new(Pace::within(&self.pace, bytes)),
                None => Arc::clone(&self.pace),
            },
            has_remote: self.settings.has_remote,
            evict_unused_for: self.settings.config.evict_unused_for(),
            metrics: self.metrics.clone(),
            progress: progress.clone(),
        };
        info!(
            uid = order.uid,
            revision = order.revision,
            images = order.images.len(),
            "warming begins"
        );
        let (uid, revision) = (order.uid.clone(), order.revision.clone());
        let (id, of) = (uid.clone(), revision.clone());
        let handle = self.tasks.spawn(async move {
            let end = work.fill(&order).await;
            (id, of, end)
        });
        let running = Running {
            revision,
            handle,
            progress,
        };
        if let Some(before) = self.running.insert(uid, running) {
            before.handle.abort();
        }
    }

    pub(super) fn stop(&mut self, uid: &str) {
        if let Some(running) = self.running.remove(uid) {
            info!(uid, revision = running.revision, "warming is stopped");
            running.handle.abort();
        }
    }

    /// Stops those that `goes_on` does not hold for.
    pub(super) fn retain(&mut self, goes_on: impl Fn(&str) -> bool) {
        let stop: Vec<_> = self
            .running
            .keys()
            .filter(|it| !goes_on(it))
            .cloned()
            .collect();
        for uid in stop {
            self.stop(&uid);
        }
    }

    /// How far the tasks are: bytes that are there, and bytes that are wanted.
    pub(super) fn progress(&self) -> impl Iterator<Item = (String, u64, u64)> {
        self.running.iter().map(|(uid, it)| {
            let images = it.progress.iter().map(|it| it.snapshot());
            let (done, total) = images.fold((0u64, 0u64), |(done, total), it| {
                (
                    done.saturating_add(it.bytes_done),
                    total.saturating_add(it.bytes_total),
                )
            });
            (uid.clone(), done, total)
        })
    }

    /// Waits for the next task that has ended by itself, of which object and revision; for ever if none is under way.
    ///
    /// # Cancellation
    /// Safe.
    pub(super) async fn next(&mut self) -> (String, String, End) {
        loop {
            match self.tasks.join_next().await {
                None => std::future::pending().await,
                Some(Ok((uid, revision, end))) => {
                    // One that was stopped too late, or whose place another one has taken.
                    if self
                        .running
                        .get(&uid)
                        .is_none_or(|it| it.revision != revision)
                    {
                        continue;
                    }
                    self.running.remove(&uid);
                    let outcome = match &end {
                        End::Ready { .. } => "ok",
                        End::Failed { .. } => "error",
                    };
                    self.ended.with_label_values(&[outcome]).inc();
                    return (uid, revision, end);
                }
                Some(Err(err)) if err.is_cancelled() => {}
                Some(Err(err)) => std::panic::resume_unwind(err.into_panic()),
            }
        }
    }
}

/// What a task works with.
struct Work {
    parts: Arc<dyn Fills>,
    pace: Arc<Pace>,
    has_remote: bool,
    evict_unused_for: Option<std::time::Duration>,
    metrics: Metrics,
    progress: Vec<Arc<WarmProgress>>,
}

impl Work {
    /// Fills one image after the other; those after one that failed as well.
    ///
    /// What an image wants counts against the bound, not what came of it now: an attempt that finds the images there which
    /// the one before has brought would otherwise have room for those that this one had to refuse.
    async fn fill(&self, order: &Order) -> End {
        let mut bytes = 0u64;
        let mut left = order.max_bytes;
        let mut failure = None;
        for (image, progress) in order.images.iter().zip(&self.progress) {
            match self.fill_image(order, image, left, progress).await {
                Ok(filled) => {
                    bytes = bytes.saturating_add(filled.bytes_wanted);
                    let new = filled
                        .bytes_from_remote
                        .saturating_add(filled.bytes_from_registry);
                    // Layers of which only a part is wanted may have come whole.
                    left = left.map(|it| it.saturating_sub(filled.bytes_wanted.max(new)));
                    self.count(&filled);
                }
                Err((reason, message, is_transient)) => {
                    // The rest of it comes with the next attempt.
                    let wanted = progress.snapshot().bytes_total;
                    left = left.map(|it| it.saturating_sub(wanted));
                    warn!(
                        image.r#ref = image.image,
                        reason,
                        error = message,
                        "warming failed"
                    );
                    failure.get_or_insert(End::Failed {
                        reason,
                        message: format!("{}: {message}", image.image),
                        is_transient,
                    });
                }
            }
        }
        failure.unwrap_or(End::Ready { bytes })
    }

    fn count(&self, filled: &Filled) {
        for (tier, bytes) in [
            (Tier::Disk, filled.bytes_present),
            (Tier::ContentCache, filled.bytes_from_remote),
            (Tier::Registry, filled.bytes_from_registry),
        ] {
            let of_tier = self
                .metrics
                .prewarm_bytes
                .with_label_values(&[tier.label()]);
            of_tier.inc_by(bytes);
        }
    }

    async fn fill_image(
        &self,
        order: &Order,
        image: &ImageToFill,
        max_new_bytes: Option<u64>,
        progress: &Arc<WarmProgress>,
    ) -> Result<Filled, (&'static str, String, bool)> {
        let invalid = |err: &dyn std::fmt::Display| (INVALID, err.to_string(), false);
        let manifest: ManifestDigest = image.digest.parse().map_err(|err| invalid(&err))?;
        let origin = if self.has_remote {
            Origin::Remote
        } else {
            Origin::Registry {
                image: image.image.parse().map_err(|err| invalid(&err))?,
                platform: image.platform.parse().map_err(|err| invalid(&err))?,
                requester: Requester::Node,
            }
        };
        let request = FillRequest {
            manifest,
            what: what(order.content),
            origin,
            limits: FillLimits {
                pace: Arc::clone(&self.pace),
                max_new_bytes,
                evict_unused_for: self.evict_unused_for,
            },
        };
        let filled = self.parts.fill(&request, progress).await;
        filled.map_err(|err: WarmError| (err.reason(), err.to_string(), err.is_transient()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::{api::Content, tier::BoxFuture};

    /// Bytes of every image.
    const IMAGE_BYTES: u64 = 60;

    /// A disk to which images of [`IMAGE_BYTES`] come.
    #[derive(Debug, Default)]
    struct Disk {
        images: Mutex<BTreeMap<ManifestDigest, u64>>,
        /// One that breaks off half-way.
        breaks: Option<ManifestDigest>,
    }

    impl Fills for Disk {
        fn fill<'a>(
            &'a self,
            request: &'a FillRequest,
            progress: &'a Arc<WarmProgress>,
        ) -> BoxFuture<'a, Result<Filled, WarmError>> {
            Box::pin(async {
                let manifest = request.manifest;
                let mut images = self.images.lock().unwrap();
                let there = images.entry(manifest).or_default();
                let needs_bytes = IMAGE_BYTES - *there;
                let free_bytes = request.limits.max_new_bytes.unwrap();
                if free_bytes < needs_bytes {
                    return Err(WarmError::NoSpace {
                        manifest,
                        needs_bytes,
                        free_bytes,
                        hint: "",
                    });
                }
                progress.expect(1, IMAGE_BYTES);
                if self.breaks == Some(manifest) {
                    *there = IMAGE_BYTES / 2;
                    return Err(WarmError::NoRemote);
                }
                *there = IMAGE_BYTES;
                Ok(Filled {
                    n_layers: 1,
                    bytes_wanted: IMAGE_BYTES,
                    bytes_present: IMAGE_BYTES - needs_bytes,
                    bytes_from_remote: needs_bytes,
                    bytes_from_registry: 0,
                })
            })
        }
    }

    fn digest(image: &str) -> ManifestDigest {
        let digit = image.len() % 10;
        format!("sha256:{}", digit.to_string().repeat(64))
            .parse()
            .unwrap()
    }

    /// Fills these images with room for one of them and a half, and says how many of them are there whole.
    async fn whole(disk: &Arc<Disk>, images: &[&str]) -> (End, usize) {
        let order = Order {
            uid: "u".to_owned(),
            generation: 1,
            revision: "r".to_owned(),
            priority: 0,
            content: Content::All,
            images: images
                .iter()
                .map(|it| ImageToFill {
                    image: (*it).to_owned(),
                    platform: "linux/amd64".to_owned(),
                    digest: digest(it).to_string(),
                })
                .collect(),
            bytes_per_second: None,
            max_bytes: Some(IMAGE_BYTES * 3 / 2),
        };
        let work = Work {
            parts: Arc::<Disk>::clone(disk),
            pace: Arc::new(Pace::new(0)),
            has_remote: true,
            evict_unused_for: None,
            metrics: Metrics::new(),
            progress: images.iter().map(|_| Arc::default()).collect(),
        };
        let end = work.fill(&order).await;
        let there = disk.images.lock().unwrap();
        let n_whole = there.values().filter(|it| **it == IMAGE_BYTES).count();
        (end, n_whole)
    }

    fn reason(end: &End) -> &'static str {
        match end {
            End::Ready { .. } => "",
            End::Failed { reason, .. } => reason,
        }
    }

    #[tokio::test]
    async fn a_bound_of_bytes_holds_however_often_it_is_tried() {
        let disk = Arc::<Disk>::default();
        for _ in 0..3 {
            let (end, n_whole) = whole(&disk, &["a", "bb"]).await;
            assert_eq!((reason(&end), n_whole), ("NoSpace", 1));
        }
    }

    #[tokio::test]
    async fn an_image_that_broke_off_keeps_room_for_its_rest() {
        let disk = Arc::new(Disk {
            breaks: Some(digest("a")),
            ..Disk::default()
        });
        let (end, n_whole) = whole(&disk, &["a", "bb"]).await;
        assert_eq!((reason(&end), n_whole), ("NoRemote", 0));
    }
}
