//! Writes the node's NodeImageCache: at once where something has ended, soon where something has begun, seldom where
//! something only goes on.

use std::time::{Duration, Instant};

use k8s_openapi::{
    api::core::v1::Node,
    apimachinery::pkg::apis::meta::v1::{OwnerReference, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource,
    api::{Patch, PatchParams},
};
use serde_json::json;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::queue::{News, Queue};
use crate::{
    api::{CacheUsage, NodeImageCache, NodeImageCacheStatus, Warmup, WarmupPhase},
    metrics::Metrics,
    telemetry::error_chain,
};

/// Owner of the fields in server-side apply.
const MANAGER: &str = "clip-csi-agent";

/// How often progress alone is written, at most.
const PROGRESS_EVERY: Duration = Duration::from_secs(15);

/// Writes of progress in a second that a whole cluster makes, at most.
const PROGRESS_OF_ALL_PER_SECOND: u32 = 50;

/// Writes of what has begun in a second that a whole cluster makes, at most. What has ended meanwhile is told with it, so
/// that what takes a moment is one write and not two.
const BEGINS_OF_ALL_PER_SECOND: u32 = 100;

/// How long it waits before that, at most.
const MAX_BEGIN_AFTER: Duration = Duration::from_secs(30);

/// How long a write that failed is not tried again; twice as long each time.
const FIRST_RETRY: Duration = Duration::from_secs(2);

/// The longest such wait.
const MAX_RETRY: Duration = Duration::from_secs(60);

/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Writes what the queue tells.
pub(super) struct Report {
    api: Api<NodeImageCache>,
    node: String,
    metrics: Metrics,
    /// Whether the object is known to be there.
    is_made: bool,
    written_at: Option<Instant>,
    /// When there was something to tell first, since.
    news_at: Option<Instant>,
    not_before: Instant,
    retry: Duration,
}

impl Report {
    pub(super) fn new(client: Client, node: &str, metrics: Metrics) -> Self {
        Self {
            api: Api::all(client),
            node: node.to_owned(),
            metrics,
            is_made: false,
            written_at: None,
            news_at: None,
            not_before: Instant::now(),
            retry: FIRST_RETRY,
        }
    }

    /// Reads what this node has told before, as often as it takes.
    pub(super) async fn read(&mut self) -> Vec<Warmup> {
        let mut wait = FIRST_RETRY;
        loop {
            let error = match timeout(ANSWER_TIMEOUT, self.api.get_opt(&self.node)).await {
                Ok(Ok(object)) => {
                    let status = object.and_then(|it| it.status);
                    return status.unwrap_or_default().warmups;
                }
                Ok(Err(err)) => error_chain(&err).to_string(),
                Err(_) => "the Kubernetes API does not answer".to_owned(),
            };
            warn!(
                error,
                "cannot read what this node was warmed with, trying again"
            );
            sleep(wait).await;
            wait = (wait * 2).min(MAX_RETRY);
        }
    }

    /// Writes what there is to tell, if it is time.
    pub(super) async fn write(&mut self, node_uid: &str, queue: &mut Queue) {
        self.show(&queue.told());
        let now = Instant::now();
        if queue.news() != News::None {
            self.news_at.get_or_insert(now);
        }
        let age = self.news_at.map_or(Duration::ZERO, |at| now - at);
        let is_due = match (queue.news(), self.written_at) {
            // The object itself says that there is an agent.
            (_, None) => true,
            (News::None, Some(_)) => false,
            (News::Step, Some(_)) => true,
            (News::Begun, Some(_)) => begin_after(queue.n_nodes()) <= age,
            (News::Progress, Some(at)) => progress_every(queue.n_nodes()) <= now.duration_since(at),
        };
        // An unfinished listing would have what it does not name yet forgotten.
        if !is_due || now < self.not_before || !queue.is_listed() {
            return;
        }
        match self.put(node_uid, queue.told()).await {
            Ok(()) => {
                queue.was_told(now);
                self.written_at = Some(now);
                self.news_at = None;
                self.retry = FIRST_RETRY;
            }
            Err(error) => {
                warn!(error, "cannot write how far this node is, trying again");
                self.is_made = false;
                self.not_before = now + self.retry;
                self.retry = (self.retry * 2).min(MAX_RETRY);
            }
        }
    }

    async fn put(&mut self, node_uid: &str, told: Vec<Warmup>) -> Result<(), String> {
        let (api_version, kind) = (NodeImageCache::api_version(&()), NodeImageCache::kind(&()));
        if !self.is_made {
            let owner = OwnerReference {
                api_version: Node::api_version(&()).into_owned(),
                kind: Node::kind(&()).into_owned(),
                name: self.node.clone(),
                uid: node_uid.to_owned(),
                ..OwnerReference::default()
            };
            let object = json!({
                "apiVersion": api_version,
                "kind": kind,
                "metadata": {"name": self.node, "ownerReferences": [owner]},
            });
            let patch = Patch::Apply(&object);
            let params = PatchParams::apply(MANAGER).force();
            let made = self.api.patch(&self.node, &params, &patch);
            self.done(timeout(ANSWER_TIMEOUT, made).await)?;
            self.is_made = true;
            info!(node.name = self.node, "NodeImageCache is there");
        }
        let object = json!({
            "apiVersion": api_version,
            "kind": kind,
            "metadata": {"name": self.node},
            "status": self.status(told),
        });
        let patch = Patch::Apply(&object);
        let params = PatchParams::apply(MANAGER).force();
        let write = self.api.patch_status(&self.node, &params, &patch);
        self.done(timeout(ANSWER_TIMEOUT, write).await)
    }

    fn status(&self, warmups: Vec<Warmup>) -> NodeImageCacheStatus {
        let n_ready = warmups
            .iter()
            .filter(|it| it.phase == WarmupPhase::Ready)
            .count();
        NodeImageCacheStatus {
            updated_at: Some(Time(Timestamp::now())),
            cache: CacheUsage {
                capacity_bytes: self.metrics.layer_cache_capacity_bytes.get(),
                used_bytes: self.metrics.layer_cache_bytes.get(),
                layers: self.metrics.layer_cache_layers.get(),
            },
            warmups_ready: format!("{n_ready}/{}", warmups.len()),
            warmups,
        }
    }

    fn done<T>(
        &self,
        done: Result<kube::Result<T>, tokio::time::error::Elapsed>,
    ) -> Result<(), String> {
        let result = match done {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(err)) => Err(error_chain(&err).to_string()),
            Err(_) => Err("the Kubernetes API does not answer".to_owned()),
        };
        let outcome = if result.is_ok() { "ok" } else { "error" };
        let writes = &self.metrics.prewarm_api_writes;
        writes.with_label_values(&["node", outcome]).inc();
        result
    }

    fn show(&self, told: &[Warmup]) {
        for (phase, label) in [
            (WarmupPhase::Pending, "pending"),
            (WarmupPhase::Warming, "warming"),
            (WarmupPhase::Ready, "ready"),
            (WarmupPhase::Failed, "failed"),
        ] {
            let n_told = told.iter().filter(|it| it.phase == phase).count();
            let gauge = self.metrics.prewarm_queue.with_label_values(&[label]);
            gauge.set(i64::try_from(n_told).unwrap_or(i64::MAX));
        }
    }
}

/// How often one of `n_nodes` writes its progress.
fn progress_every(n_nodes: u32) -> Duration {
    let share = f64::from(n_nodes) / f64::from(PROGRESS_OF_ALL_PER_SECOND);
    PROGRESS_EVERY.max(Duration::from_secs_f64(share))
}

/// How long one of `n_nodes` waits before it tells that something has begun; not at all in a small cluster.
fn begin_after(n_nodes: u32) -> Duration {
    let share = Duration::from_secs(u64::from(n_nodes / BEGINS_OF_ALL_PER_SECOND));
    share.min(MAX_BEGIN_AFTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_of_any_size_writes_so_much_in_a_second() {
        for (n_nodes, seconds) in [(0, 15), (750, 15), (1000, 20), (10_000, 200)] {
            assert_eq!(progress_every(n_nodes), Duration::from_secs(seconds));
        }
        for (n_nodes, seconds) in [(0, 0), (99, 0), (1000, 10), (10_000, 30)] {
            assert_eq!(begin_after(n_nodes), Duration::from_secs(seconds));
        }
    }
}
