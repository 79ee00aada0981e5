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
                    left = left.map(|it| it.saturating_sub(new));
                    self.count(&filled);
                }
                Err((reason, message, is_transient)) => {
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
