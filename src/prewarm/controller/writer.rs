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
    api::{
        ImagePrewarm, ImagePrewarmStatus, ImageRollout, ImageRolloutSpec, ImageState, NodeCounts,
    },
    cluster::Events,
    metrics::Metrics,
    telemetry::error_chain,
};

/// Owner of the fields in server-side apply.
const MANAGER: &str = "clip-csi-prewarm-controller";

/// How often progress alone is written for one object, at most.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// And for all objects together.
const PROGRESS_EVERY_FOR_EACH: Duration = Duration::from_secs(1);

/// Messages to nodes in a second, at most, by which they are told that more of them may begin: each write of a rollout is
/// one to each node.
///
/// With 1,000 nodes and 20 objects that share grows all the time, and an API server would do nothing else.
const ROLLOUT_MESSAGES_PER_SECOND: u32 = 5000;

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
    at: Instant,
}

/// Writes to the API server.
pub(super) struct Writer {
    client: Client,
    events: Events,
    metrics: Metrics,
    written: BTreeMap<String, Written>,
    /// When nodes were told of it last.
    told: BTreeMap<String, Instant>,
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
            told: BTreeMap::new(),
            not_before: BTreeMap::new(),
        }
    }

    /// Forgets objects that are not there any more.
    pub(super) fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.written.retain(|uid, _| is_there(uid));
        self.told.retain(|uid, _| is_there(uid));
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

    /// Writes status and rollout, if it is time; `n_objects` are under way. `told` is what nodes are told, and is kept true.
    pub(super) async fn write(
        &mut self,
        uid: &str,
        known: &Known,
        told: &mut Option<ImageRolloutSpec>,
        n_objects: u32,
    ) -> Left {
        if let Some(at) = self.not_before.get(uid).filter(|it| Instant::now() < **it) {
            return Left::At(*at);
        }
        let status = match self.write_status_in_time(uid, known, n_objects).await {
            Ok(left) => left,
            Err(reason) => return self.failed(uid, known, &reason),
        };
        // After the status: who sees the one reads the other.
        let rollout = self.write_rollout_in_time(uid, known, told, n_objects);
        let rollout = match rollout.await {
            Ok(left) => left,
            Err(reason) => return self.failed(uid, known, &reason),
        };
        self.not_before.remove(uid);
        status.and(rollout)
    }

    async fn write_status_in_time(
        &mut self,
        uid: &str,
        known: &Known,
        n_objects: u32,
    ) -> Result<Left, String> {
        let now = Instant::now();
        let (all, steps) = (digest(&known.status), digest(&steps(&known.status)));
        let written = |at| Written { all, steps, at };
        // What a former leader has written need not be written again.
        if !self.written.contains_key(uid) && known.read == Some(all) {
            self.written.insert(uid.to_owned(), written(now));
        }
        if let Some(before) = self.written.get(uid) {
            if before.all == all {
                return Ok(Left::Nothing);
            }
            let due = before.at + progress_every(n_objects);
            if before.steps == steps && now < due {
                return Ok(Left::At(due));
            }
        }
        self.write_status(uid, known).await?;
        self.written.insert(uid.to_owned(), written(now));
        Ok(Left::Nothing)
    }

    async fn write_rollout_in_time(
        &mut self,
        uid: &str,
        known: &Known,
        told: &mut Option<ImageRolloutSpec>,
        n_objects: u32,
    ) -> Result<Left, String> {
        let now = Instant::now();
        let rollout = rollout(known);
        if !is_news(told.as_ref(), &rollout) {
            return Ok(Left::Nothing);
        }
        let due = self.told.get(uid);
        let due = due.map(|it| *it + rollout_every(n_objects, rollout.nodes));
        let is_step = told.as_ref().map(step) != Some(step(&rollout));
        if let Some(due) = due.filter(|it| now < *it && !is_step) {
            return Ok(Left::At(due));
        }
        self.write_rollout(uid, &rollout).await?;
        self.told.insert(uid.to_owned(), now);
        *told = Some(rollout);
        Ok(Left::Nothing)
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

    async fn write_rollout(&self, uid: &str, rollout: &ImageRolloutSpec) -> Result<(), String> {
        let patch = json!({
            "apiVersion": ImageRollout::api_version(&()),
            "kind": ImageRollout::kind(&()),
            "metadata": {"name": uid},
            "spec": rollout,
        });
        let params = PatchParams::apply(MANAGER).force();
        let api = self.rollouts();
        let patch = Patch::Apply(&patch);
        let done = timeout(WRITE_TIMEOUT, api.patch(uid, &params, &patch)).await;
        self.done("rollout", done)
    }

    /// Tells nodes no more of an object that is not there any more. Says whether that was done.
    pub(super) async fn withdraw(&self, uid: &str) -> bool {
        let api = self.rollouts();
        let params = DeleteParams::default();
        let done = timeout(WRITE_TIMEOUT, api.delete(uid, &params)).await;
        let done = self.done("rollout", done);
        if let Err(error) = &done {
            warn!(
                uid,
                error, "cannot delete an ImageRollout of no ImagePrewarm, trying again"
            );
        }
        done.is_ok()
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

    fn rollouts(&self) -> Api<ImageRollout> {
        Api::all(self.client.clone())
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

impl Left {
    /// What is to be tried first.
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::At(one), Self::At(another)) => Self::At(one.min(another)),
            (Self::Nothing, it) | (it, Self::Nothing) => it,
        }
    }
}

/// What nodes are to be told.
fn rollout(known: &Known) -> ImageRolloutSpec {
    let status = &known.status;
    ImageRolloutSpec {
        namespace: known.namespace.clone(),
        name: known.name.clone(),
        generation: status.observed_generation,
        revision: status.revision.clone(),
        admitted_permille: status.admitted_permille,
        nodes: status.nodes.desired,
    }
}

/// Whether nodes are to be told. While none of them may begin, it is enough that they know that there is something: each
/// image that is looked up makes another revision.
fn is_news(told: Option<&ImageRolloutSpec>, rollout: &ImageRolloutSpec) -> bool {
    let Some(told) = told else {
        return true;
    };
    let nobody_begins = told.admitted_permille == 0 && rollout.admitted_permille == 0;
    match nobody_begins && told.generation == rollout.generation {
        true => told.revision.is_empty() != rollout.revision.is_empty(),
        false => told != rollout,
    }
}

/// What nodes are to be told at once: whether any of them may begin is a step, how many of them is not.
fn step(rollout: &ImageRolloutSpec) -> ImageRolloutSpec {
    ImageRolloutSpec {
        admitted_permille: rollout.admitted_permille.min(1),
        nodes: 0,
        ..rollout.clone()
    }
}

/// Tells one status from another.
pub(super) fn digest(status: &ImagePrewarmStatus) -> blake3::Hash {
    let text = serde_json::to_vec(status).unwrap_or_default();
    blake3::hash(&text)
}

/// How often is written how far one of `n_objects` is, at most.
fn progress_every(n_objects: u32) -> Duration {
    PROGRESS_EVERY.max(PROGRESS_EVERY_FOR_EACH * n_objects)
}

/// How often the share of the nodes that may begin is written for one of `n_objects`, each for `n_nodes`, at most.
fn rollout_every(n_objects: u32, n_nodes: i32) -> Duration {
    let messages = f64::from(n_objects) * f64::from(n_nodes.max(0));
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
    fn the_more_nodes_and_objects_there_are_the_seldomer_a_share_is_written() {
        for (n_objects, n_nodes, milliseconds) in [
            (0, 0, 0),
            (1, 2, 0), // 0.4 ms
            (1, 1000, 200),
            (20, 1000, 4000),
            (20, 10_000, 40_000),
            (1, -1, 0),
        ] {
            let every = rollout_every(n_objects, n_nodes);
            assert_eq!(every.as_millis(), milliseconds, "{n_objects} {n_nodes}");
        }
    }

    #[test]
    fn nodes_are_told_what_makes_a_difference_to_them() {
        let of = |generation, revision: &str, admitted_permille| ImageRolloutSpec {
            generation,
            revision: revision.to_owned(),
            admitted_permille,
            ..ImageRolloutSpec::default()
        };
        assert!(is_news(None, &of(1, "", 0)));
        for (told, rollout, expected) in [
            (of(1, "", 0), of(1, "a", 0), true),
            (of(1, "a", 0), of(1, "b", 0), false),
            (of(1, "a", 0), of(2, "b", 0), true),
            (of(1, "a", 0), of(1, "", 0), true),
            (of(1, "a", 0), of(1, "b", 1), true),
            (of(1, "a", 1), of(1, "a", 1), false),
            (of(1, "a", 1), of(1, "b", 1), true),
            (of(1, "a", 1), of(1, "a", 2), true),
            (of(1, "a", 1), of(1, "a", 0), true),
        ] {
            assert_eq!(is_news(Some(&told), &rollout), expected, "{told:?}");
        }
    }

    #[test]
    fn that_nodes_may_begin_is_a_step_and_how_many_of_them_only_goes_on() {
        let of = |admitted_permille, nodes| ImageRolloutSpec {
            admitted_permille,
            nodes,
            ..ImageRolloutSpec::default()
        };
        assert_ne!(step(&of(0, 9)), step(&of(100, 9)));
        assert_eq!(step(&of(100, 9)), step(&of(1000, 8)));
        let other = ImageRolloutSpec {
            generation: 1,
            ..of(100, 9)
        };
        assert_ne!(step(&of(100, 9)), step(&other));
        let of = |admitted_permille| {
            steps(&ImagePrewarmStatus {
                admitted_permille,
                ..ImagePrewarmStatus::default()
            })
        };
        assert_ne!(of(0), of(100));
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
