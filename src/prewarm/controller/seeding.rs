//! Seeds images: a bounded number at once, those of the greatest priority first.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::jiff::Timestamp;
use kube::Client;
use tokio::{
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tracing::{info, warn};

use super::plan::{ImageKey, Outcome, Problem, Task};
use crate::{
    api::{Content, ImagePrewarmSpec},
    metrics::Metrics,
    registry::{DockerConfig, ImageRef, Platform, Requester, VolumeRequester, VolumeSecret},
    service_accounts::{PullSecretError, pull_secret, volume_secret},
    warm::{LocalCopy, Pace, SeedRequest, WarmError, WarmProgress, WarmWhat, Warms},
};

/// What grants the right to read pull secrets, in the chart.
const SECRETS_VALUE: &str = "prewarm.pullSecrets.namespaces";

/// How long the Kubernetes API may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Which image of which object.
pub(super) type TaskId = (String, ImageKey);

/// An image that is wanted, in the order in which they are seeded.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Wanted {
    /// The greatest first.
    pub(super) priority: std::cmp::Reverse<i32>,
    /// The oldest first.
    pub(super) created: Timestamp,
    pub(super) task: TaskId,
}

/// What a task needs of its object.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) namespace: String,
    pub(super) spec: Arc<ImagePrewarmSpec>,
    /// Secrets with which volumes pull the image.
    pub(super) volume_secrets: BTreeSet<String>,
    /// Of the spec: what runs for another one is stopped.
    pub(super) generation: i64,
}

/// A task that is under way.
#[derive(Debug)]
struct Running {
    progress: Arc<WarmProgress>,
    handle: AbortHandle,
    generation: i64,
}

/// Runs the tasks. They end with it.
pub(super) struct Seeding {
    client: Client,
    parts: Arc<dyn Warms>,
    pace: Arc<Pace>,
    has_remote: bool,
    max_tasks: usize,
    metrics: Metrics,
    tasks: JoinSet<(TaskId, i64, Result<Outcome, Problem>)>,
    running: BTreeMap<TaskId, Running>,
}

impl std::fmt::Debug for Seeding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Seeding")
            .field("running", &self.running)
            .finish_non_exhaustive()
    }
}

impl Seeding {
    pub(super) fn new(
        client: Client,
        parts: Arc<dyn Warms>,
        settings: &super::Settings,
        metrics: Metrics,
    ) -> Self {
        Self {
            client,
            parts,
            pace: Arc::new(Pace::new(settings.bytes_per_second)),
            has_remote: settings.has_remote,
            max_tasks: settings.parallel_images.max(1),
            metrics,
            tasks: JoinSet::new(),
            running: BTreeMap::new(),
        }
    }

    /// Stops what is not wanted any more, and begins what is, as far as there is room.
    pub(super) fn run(
        &mut self,
        mut wanted: Vec<Wanted>,
        order: impl Fn(&TaskId) -> Option<Order>,
    ) {
        wanted.sort();
        self.running.retain(|task, it| {
            let is_wanted = wanted.iter().any(|wanted| wanted.task == *task);
            let is_current = order(task).is_some_and(|order| order.generation == it.generation);
            let stays = is_wanted && is_current;
            if !stays {
                info!(image.r#ref = task.1.image, "seeding is stopped");
                it.handle.abort();
            }
            stays
        });
        for Wanted { task, .. } in wanted {
            if self.max_tasks <= self.running.len() {
                break;
            }
            if self.running.contains_key(&task) {
                continue;
            }
            if let Some(order) = order(&task) {
                self.begin(task, order);
            }
        }
        self.count();
    }

    fn begin(&mut self, task: TaskId, order: Order) {
        let progress = Arc::<WarmProgress>::default();
        let generation = order.generation;
        let work = Work {
            client: self.client.clone(),
            parts: Arc::clone(&self.parts),
            pace: Arc::clone(&self.pace),
            has_remote: self.has_remote,
            progress: Arc::clone(&progress),
        };
        info!(
            image.r#ref = task.1.image,
            platform = task.1.platform,
            "seeding begins"
        );
        let id = task.clone();
        let handle = self.tasks.spawn(async move {
            let done = work.seed(&id.1, &order).await;
            (id, generation, done)
        });
        let running = Running {
            progress,
            handle,
            generation,
        };
        self.running.insert(task, running);
    }

    fn count(&self) {
        let n_running = i64::try_from(self.running.len()).unwrap_or(i64::MAX);
        self.metrics.prewarm_seedings.set(n_running);
    }

    /// How far the tasks are that are under way.
    pub(super) fn progress(&self) -> impl Iterator<Item = (&TaskId, Task)> {
        self.running.iter().map(|(task, it)| {
            let now = it.progress.snapshot();
            let running = Task::Running {
                blob_bytes: clamped(now.bytes_total),
                blob_bytes_done: clamped(now.bytes_done),
            };
            (task, running)
        })
    }

    /// Whether a task is under way for an image of an object.
    pub(super) fn has(&self, uid: &str, key: &ImageKey) -> bool {
        self.running.contains_key(&(uid.to_owned(), key.clone()))
    }

    /// Waits for the next task that has ended by itself, and of which generation; for ever if none is under way.
    ///
    /// # Cancellation
    /// Safe.
    pub(super) async fn next(&mut self) -> (TaskId, i64, Task) {
        loop {
            match self.tasks.join_next().await {
                None => std::future::pending().await,
                Some(Ok((task, generation, done))) => {
                    // One that was stopped too late, or whose place another one has taken.
                    let is_it = |it: &Running| it.generation == generation;
                    if !self.running.get(&task).is_some_and(is_it) {
                        continue;
                    }
                    self.running.remove(&task);
                    self.count();
                    let outcome = if done.is_ok() { "ok" } else { "error" };
                    let attempts = &self.metrics.prewarm_seed_attempts;
                    attempts.with_label_values(&[outcome]).inc();
                    let done = match done {
                        Ok(outcome) => Task::Done(outcome),
                        Err(problem) => {
                            warn!(
                                image.r#ref = task.1.image,
                                reason = problem.reason,
                                error = problem.message,
                                "seeding failed"
                            );
                            Task::Failed(problem)
                        }
                    };
                    return (task, generation, done);
                }
                Some(Err(err)) if err.is_cancelled() => {}
                Some(Err(err)) => std::panic::resume_unwind(err.into_panic()),
            }
        }
    }
}

/// What a task works with.
struct Work {
    client: Client,
    parts: Arc<dyn Warms>,
    pace: Arc<Pace>,
    has_remote: bool,
    progress: Arc<WarmProgress>,
}

impl Work {
    async fn seed(&self, key: &ImageKey, order: &Order) -> Result<Outcome, Problem> {
        let image: ImageRef = key
            .image
            .parse()
            .map_err(|err| invalid("InvalidImage", &err))?;
        let platform: Platform = key
            .platform
            .parse()
            .map_err(|err| invalid("InvalidPlatform", &err))?;
        let requester = self.requester(order, &image).await?;
        let warmer = self.parts.warmer();
        if !self.has_remote {
            // Nodes need to know what the tag means, and take it from the registry themselves.
            let resolved = warmer.registry.resolve(&image, &platform, &requester).await;
            let resolved = resolved.map_err(|err| of_warm(&WarmError::Registry(err)))?;
            let blob_bytes = resolved.layers.iter().map(|it| it.blob_bytes).sum();
            return Ok(Outcome {
                manifest_digest: resolved.manifest.to_string(),
                layers: i32::try_from(resolved.layers.len()).unwrap_or(i32::MAX),
                blob_bytes: clamped(blob_bytes),
                ..Outcome::default()
            });
        }
        let request = SeedRequest {
            image,
            platform,
            requester,
            what: what(order.spec.content),
            local: LocalCopy::Remove,
            pace: Arc::clone(&self.pace),
        };
        let seeded = warmer.seed(&request, &self.progress).await;
        let seeded = seeded.map_err(|err| of_warm(&err))?;
        Ok(Outcome {
            manifest_digest: seeded.manifest.to_string(),
            layers: i32::try_from(seeded.n_layers).unwrap_or(i32::MAX),
            blob_bytes: clamped(seeded.blob_bytes),
            layer_bytes: Some(clamped(seeded.layer_bytes)),
            bytes_from_registry: clamped(seeded.bytes_from_registry),
            is_seeded: true,
        })
    }

    /// Who asks the registry: whoever has the pull secrets, or else the controller itself.
    async fn requester(&self, order: &Order, image: &ImageRef) -> Result<Requester, Problem> {
        let (client, namespace) = (&self.client, &order.namespace);
        let mut configs = Vec::new();
        for secret in &order.spec.image_pull_secrets {
            let config = pull_secret(client, namespace, &secret.name, SECRETS_VALUE);
            configs.push(answered(config).await.map_err(|err| of_secret(&err))?);
        }
        // Each volume has its own secret: it is enough if one of them is of use.
        let mut failure = None;
        for secret in &order.volume_secrets {
            let config = volume_secret(client, namespace, secret, image.registry(), SECRETS_VALUE);
            match answered(config).await {
                Ok(config) => configs.push(config),
                Err(err) => drop(failure.get_or_insert(err)),
            }
        }
        if configs.is_empty() {
            return failure.map_or(Ok(Requester::Node), |err| Err(of_secret(&err)));
        }
        Ok(Requester::Volume(VolumeRequester {
            secret: Some(VolumeSecret::DockerConfig(DockerConfig::joined(configs))),
            ..VolumeRequester::default()
        }))
    }
}

/// What the Kubernetes API answers, or that it does not.
async fn answered(
    config: impl Future<Output = Result<DockerConfig, PullSecretError>>,
) -> Result<DockerConfig, PullSecretError> {
    timeout(ANSWER_TIMEOUT, config).await.unwrap_or_else(|_| {
        let reason = "no answer in time".to_owned();
        Err(PullSecretError::Unavailable { reason })
    })
}

/// How the data side calls it.
pub(in crate::prewarm) fn what(content: Content) -> WarmWhat {
    match content {
        Content::Index => WarmWhat::Index,
        Content::Recorded => WarmWhat::Recorded,
        Content::All => WarmWhat::All,
    }
}

fn clamped(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

fn invalid(reason: &'static str, err: &dyn std::fmt::Display) -> Problem {
    Problem {
        reason,
        message: err.to_string(),
        is_transient: false,
    }
}

fn of_warm(err: &WarmError) -> Problem {
    Problem {
        reason: err.reason(),
        message: err.to_string(),
        is_transient: err.is_transient(),
    }
}

fn of_secret(err: &PullSecretError) -> Problem {
    let (reason, is_transient) = match err {
        PullSecretError::NotFound { .. } => ("SecretNotFound", false),
        PullSecretError::Forbidden { .. } => ("SecretForbidden", false),
        PullSecretError::Invalid { .. } => ("SecretInvalid", false),
        PullSecretError::Unavailable { .. } => ("KubernetesDown", true),
    };
    Problem {
        reason,
        message: err.to_string(),
        is_transient,
    }
}
