//! Writes what was decided: at once where something has happened, seldom where something only goes on.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{
    Api, Client, Resource,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
};
use serde_json::json;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use super::{plan::Notice, world::Known};
use crate::{
    api::{ImagePrewarm, ImagePrewarmStatus, ImageState, NodeCounts},
    cluster::Events,
    metrics::Metrics,
    prewarm::rollout::{ANNOTATION, Rollout},
    telemetry::error_chain,
};

/// Owner of the fields in server-side apply.
const MANAGER: &str = "clip-csi-prewarm-controller";

/// How often progress alone is written for one object, at most.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// And for all objects together.
const PROGRESS_EVERY_FOR_EACH: Duration = Duration::from_secs(1);

/// And messages to nodes in a second, at most: each write is told to each node that watches.
const PROGRESS_MESSAGES_PER_SECOND: u32 = 500;

/// Messages to nodes in a second, at most, by which they are told that more of them may begin.
///
/// With 1,000 nodes and 20 objects that share grows all the time, and an API server would do nothing else.
const ROLLOUT_MESSAGES_PER_SECOND: u32 = 5000;

/// A share is written into the status and into the annotation.
const WRITES_OF_A_ROLLOUT: u32 = 2;

/// How long a write that failed is not tried again.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// How long a write may take: the others wait.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// What was written of an object last.
#[derive(Debug, Clone, Copy)]
struct Written {
    /// Digests of all of the status, and of it without what only goes on.
    all: blake3::Hash,
    steps: blake3::Hash,
    permille: i32,
    at: Instant,
}

/// Writes to the API server.
pub(super) struct Writer {
    client: Client,
    events: Events,
    metrics: Metrics,
    written: BTreeMap<String, Written>,
    not_before: BTreeMap<String, Instant>,
}

/// Whether something is left to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Nothing.
    Nothing,
    /// It is to be tried again then.
    At(Instant),
}

impl Writer {
    pub(super) fn new(client: Client, events: Events, metrics: Metrics) -> Self {
        Self {
            client,
            events,
            metrics,
            written: BTreeMap::new(),
            not_before: BTreeMap::new(),
        }
    }

    /// Forgets objects that are not there any more.
    pub(super) fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.written.retain(|uid, _| is_there(uid));
        self.not_before.retain(|uid, _| is_there(uid));
    }

    /// Tells people of what has happened.
    pub(super) async fn tell(&self, uid: &str, known: &Known, notices: &[Notice]) {
        let about = ObjectReference {
            api_version: Some(ImagePrewarm::api_version(&()).into_owned()),
            kind: Some(ImagePrewarm::kind(&()).into_owned()),
            namespace: Some(known.namespace.clone()),
            name: Some(known.name.clone()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        };
        for Notice {
            kind,
            reason,
            message,
        } in notices
        {
            let events = &self.events;
            let write = events.write(&known.namespace, about.clone(), *kind, reason, message);
            if timeout(WRITE_TIMEOUT, write).await.is_err() {
                warn!(reason, "an event took too long");
            }
            self.count("event", true);
        }
    }

    /// Writes status and annotation, if it is time; `n_objects` are under way.
    pub(super) async fn write(&mut self, uid: &str, known: &mut Known, n_objects: u32) -> Left {
        let now = Instant::now();
        if let Some(at) = self.not_before.get(uid).filter(|it| now < **it) {
            return Left::At(*at);
        }
        let (all, steps) = (digest(&known.status), digest(&steps(&known.status)));
        let permille = known.status.admitted_permille;
        let written = |at| Written {
            all,
            steps,
            permille,
            at,
        };
        // What a former leader has written need not be written again.
        if !self.written.contains_key(uid) && known.read == Some(all) {
            self.written.insert(uid.to_owned(), written(now));
        }
        let before = self.written.get(uid).copied();
        if before.is_none_or(|it| it.all != all) {
            let every = match before.is_some_and(|it| it.permille == permille) {
                true => progress_every(n_objects, known.status.nodes.desired),
                false => rollout_every(n_objects, known.status.nodes.desired),
            };
            let due = before.map_or(now, |it| it.at + every);
            let is_step = before.is_none_or(|it| it.steps != steps);
            if !is_step && now < due {
                return Left::At(due);
            }
            if let Err(reason) = self.write_status(uid, known).await {
                return self.failed(uid, known, &reason);
            }
            self.written.insert(uid.to_owned(), written(now));
        }
        // After the status: who sees the one reads the other.
        let rollout = rollout(&known.status);
        if known.rollout.as_ref() != Some(&rollout) {
            if let Err(reason) = self.write_rollout(uid, known, &rollout).await {
                return self.failed(uid, known, &reason);
            }
            known.rollout = Some(rollout);
        }
        self.not_before.remove(uid);
        Left::Nothing
    }

    fn failed(&mut self, uid: &str, known: &Known, reason: &str) -> Left {
        warn!(
            namespace = known.namespace,
            name = known.name,
            error = reason,
            "cannot write how far an ImagePrewarm is, trying again"
        );
        let at = Instant::now() + RETRY_AFTER;
        self.not_before.insert(uid.to_owned(), at);
        Left::At(at)
    }

    async fn write_status(&self, uid: &str, known: &Known) -> Result<(), String> {
        // The uid makes it fail for another object of the same name.
        let patch = json!({
            "apiVersion": ImagePrewarm::api_version(&()),
            "kind": ImagePrewarm::kind(&()),
            "metadata": {"name": known.name, "namespace": known.namespace, "uid": uid},
            "status": known.status,
        });
        let params = PatchParams::apply(MANAGER).force();
        let api = self.api(known);
        let patch = Patch::Apply(&patch);
        let write = api.patch_status(&known.name, &params, &patch);
        let done = timeout(WRITE_TIMEOUT, write).await;
        self.done("status", done)
    }

    async fn write_rollout(
        &self,
        uid: &str,
        known: &Known,
        rollout: &Rollout,
    ) -> Result<(), String> {
        // No apply: it would make an object that has just been deleted anew.
        let patch =
            json!({"metadata": {"uid": uid, "annotations": {ANNOTATION: rollout.to_string()}}});
        let params = PatchParams {
            field_manager: Some(MANAGER.to_owned()),
            ..PatchParams::default()
        };
        let api = self.api(known);
        let patch = Patch::Merge(&patch);
        let write = api.patch_metadata(&known.name, &params, &patch);
        let done = timeout(WRITE_TIMEOUT, write).await;
        self.done("rollout", done)
    }

    /// Deletes an object whose time is over. Says whether that was done.
    pub(super) async fn delete(&self, uid: &str, known: &Known) -> bool {
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        info!(
            namespace = known.namespace,
            name = known.name,
            "an ImagePrewarm has ended ttlSecondsAfterFinished ago, and is deleted"
        );
        let api = self.api(known);
        let done = timeout(WRITE_TIMEOUT, api.delete(&known.name, &params)).await;
        let done = self.done("delete", done);
        if let Err(reason) = &done {
            warn!(
                name = known.name,
                error = reason,
                "cannot delete it, trying again"
            );
        }
        done.is_ok()
    }

    fn api(&self, known: &Known) -> Api<ImagePrewarm> {
        Api::namespaced(self.client.clone(), &known.namespace)
    }

    fn done<T>(
        &self,
        what: &str,
        done: Result<kube::Result<T>, tokio::time::error::Elapsed>,
    ) -> Result<(), String> {
        let result = match done {
            Ok(Ok(_)) => Ok(()),
            // It has been deleted meanwhile, or is another one by now: the watch tells of it.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
                debug!(what, "not written: the object has gone");
                Ok(())
            }
            Ok(Err(err)) => Err(error_chain(&err).to_string()),
            Err(_) => Err("the Kubernetes API does not answer".to_owned()),
        };
        self.count(what, result.is_ok());
        result
    }

    fn count(&self, what: &str, is_ok: bool) {
        let outcome = if is_ok { "ok" } else { "error" };
        let writes = &self.metrics.prewarm_api_writes;
        writes.with_label_values(&[what, outcome]).inc();
    }
}

/// What the annotation is to say.
fn rollout(status: &ImagePrewarmStatus) -> Rollout {
    Rollout {
        revision: status.revision.clone(),
        permille: status.admitted_permille,
        nodes: u32::try_from(status.nodes.desired).unwrap_or(0),
    }
}

/// Tells one status from another.
pub(super) fn digest(status: &ImagePrewarmStatus) -> blake3::Hash {
    let text = serde_json::to_vec(status).unwrap_or_default();
    blake3::hash(&text)
}

/// How often is written how far one of `n_objects` is, each for `n_nodes`, at most.
fn progress_every(n_objects: u32, n_nodes: i32) -> Duration {
    let messages = f64::from(n_objects) * f64::from(n_nodes.max(0));
    let share = messages / f64::from(PROGRESS_MESSAGES_PER_SECOND);
    PROGRESS_EVERY
        .max(PROGRESS_EVERY_FOR_EACH * n_objects)
        .max(Duration::from_secs_f64(share))
}

/// How often the share of the nodes that may begin is written for one of `n_objects`, each for `n_nodes`, at most.
fn rollout_every(n_objects: u32, n_nodes: i32) -> Duration {
    let n_nodes = f64::from(n_nodes.max(0));
    let messages = f64::from(n_objects) * n_nodes * f64::from(WRITES_OF_A_ROLLOUT);
    Duration::from_secs_f64(messages / f64::from(ROLLOUT_MESSAGES_PER_SECOND))
}

/// The status without what only goes on.
fn steps(status: &ImagePrewarmStatus) -> ImagePrewarmStatus {
    let mut steps = status.clone();
    // Whether any nodes may begin is a step, how many of them is not.
    steps.admitted_permille = steps.admitted_permille.min(1);
    steps.nodes = NodeCounts::default();
    steps.nodes_ready = String::new();
    steps.failed_nodes = Vec::new();
    for image in &mut steps.images {
        if image.state == ImageState::Seeding {
            image.blob_bytes = None;
            image.blob_bytes_done = 0;
        }
    }
    for condition in &mut steps.conditions {
        condition.message = String::new();
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ImageStatus, Phase};

    #[test]
    fn the_more_nodes_and_objects_there_are_the_seldomer_progress_is_written() {
        for (n_objects, n_nodes, seconds) in [
            (0, 0, 10),
            (1, 1000, 10),
            (20, 100, 20),
            (20, 1000, 40),
            (1, -1, 10),
        ] {
            let every = progress_every(n_objects, n_nodes);
            assert_eq!(every.as_secs(), seconds, "{n_objects} {n_nodes}");
        }
    }

    #[test]
    fn the_more_nodes_and_objects_there_are_the_seldomer_a_share_is_written() {
        for (n_objects, n_nodes, milliseconds) in [
            (0, 0, 0),
            (1, 2, 0), // 0.8 ms
            (1, 1000, 400),
            (20, 1000, 8000),
            (20, 10_000, 80_000),
            (1, -1, 0),
        ] {
            let every = rollout_every(n_objects, n_nodes);
            assert_eq!(every.as_millis(), milliseconds, "{n_objects} {n_nodes}");
        }
    }

    #[test]
    fn that_nodes_may_begin_is_a_step_and_how_many_of_them_only_goes_on() {
        let of = |admitted_permille| {
            steps(&ImagePrewarmStatus {
                admitted_permille,
                ..ImagePrewarmStatus::default()
            })
        };
        assert_ne!(of(0), of(100));
        assert_eq!(of(100), of(200));
        assert_eq!(of(100), of(1000));
    }

    #[test]
    fn bytes_and_counts_only_go_on_and_everything_else_is_a_step() {
        let image = |state, done| ImageStatus {
            state,
            blob_bytes_done: done,
            ..ImageStatus::default()
        };
        let of = |phase, image, ready| ImagePrewarmStatus {
            phase,
            images: vec![image],
            nodes: NodeCounts {
                ready,
                ..NodeCounts::default()
            },
            ..ImagePrewarmStatus::default()
        };
        let before = of(Phase::Seeding, image(ImageState::Seeding, 1), 0);
        let goes_on = of(Phase::Seeding, image(ImageState::Seeding, 2), 7);
        let seeded = of(Phase::Seeding, image(ImageState::Seeded, 2), 0);
        let other_phase = of(Phase::Failed, image(ImageState::Seeding, 1), 0);
        assert_ne!(digest(&before), digest(&goes_on));
        assert_eq!(steps(&before), steps(&goes_on));
        assert_ne!(steps(&before), steps(&seeded));
        assert_ne!(steps(&before), steps(&other_phase));
    }
}
