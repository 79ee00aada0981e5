use serde_json::{Value, json};

use super::*;
use crate::{
    api::{ImageState, Phase},
    prewarm::controller::{
        discovery::of_object,
        plan::{Outcome, Problem},
    },
};

/// What the controller has been told, and what it decides.
struct Case {
    world: World,
    now: i64,
}

fn premises() -> Premises {
    Premises {
        platform: "linux/amd64".to_owned(),
        has_remote: true,
    }
}

fn prewarm(uid: &str, generation: i64, spec: Value) -> ImagePrewarm {
    let mut object = json!({
        "metadata": {"name": uid, "namespace": "team", "uid": uid, "generation": generation},
        "spec": {"images": [{"image": "r/a:1"}], "parallelism": 1},
    });
    let fields = spec.as_object().unwrap().clone();
    object["spec"].as_object_mut().unwrap().extend(fields);
    serde_json::from_value(object).unwrap()
}

fn is<T>(it: T) -> Seen<T> {
    Seen::Is(Box::new(it))
}

fn node(name: &str, labels: Value, ready: &str) -> Change {
    let node = json!({
        "metadata": {"name": name, "labels": labels},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    });
    let node: Node = serde_json::from_value(node).unwrap();
    Change::Node(is(node).map(|it| of_node(&it)))
}

fn cache(name: &str, warmups: Value) -> Change {
    let cache = json!({"metadata": {"name": name}, "status": {"warmups": warmups}});
    let cache: NodeImageCache = serde_json::from_value(cache).unwrap();
    Change::Cache(is(cache).map(of_cache))
}

impl Case {
    fn new() -> Self {
        Self::with(None)
    }

    fn with(discovery: Option<Discovery>) -> Self {
        let mut case = Self {
            world: World::new(discovery),
            now: 1000,
        };
        for listing in [
            Change::Prewarm(Seen::Listing),
            Change::Rollout(Seen::Listing),
            Change::Node(Seen::Listing),
            Change::Cache(Seen::Listing),
        ] {
            case.world.apply(listing);
        }
        case
    }

    fn listed(&mut self) {
        for listed in [
            Change::Prewarm(Seen::Listed),
            Change::Rollout(Seen::Listed),
            Change::Node(Seen::Listed),
            Change::Cache(Seen::Listed),
        ] {
            assert!(!self.world.is_complete());
            self.world.apply(listed);
        }
        assert!(self.world.is_complete());
    }

    /// Which are decided about now.
    fn decide(&mut self) -> Vec<String> {
        let now = Timestamp::from_second(self.now).unwrap();
        let due = self.world.take_due(now);
        for uid in &due {
            self.world.decide(uid, &premises(), now);
        }
        due
    }

    fn seeded(&mut self, uid: &str) {
        let known = self.world.prewarms.get_mut(uid).unwrap();
        let key = ImageKey {
            image: "r/a:1".to_owned(),
            platform: "linux/amd64".to_owned(),
        };
        let outcome = Outcome {
            manifest_digest: "sha256:1".to_owned(),
            is_seeded: true,
            ..Default::default()
        };
        known.tasks.insert(key, Task::Done(outcome));
        self.world.dirty.insert(uid.to_owned());
        // Once for the digest, once for the nodes that have nothing of it.
        assert_eq!(self.decide(), [uid]);
        assert_eq!(self.decide(), [uid]);
        assert_eq!(self.decide(), [""; 0]);
    }

    fn status(&self, uid: &str) -> &ImagePrewarmStatus {
        &self.world.prewarms.get(uid).unwrap().status
    }

    fn told(&self, uid: &str, phase: &str) -> Value {
        json!([{"uid": uid, "revision": self.status(uid).revision, "phase": phase}])
    }
}

#[test]
fn nodes_are_counted_if_they_are_ready_match_and_have_an_agent() {
    let mut case = Case::new();
    case.world.apply(Change::Prewarm(is(prewarm(
        "p",
        1,
        json!({"nodeSelector": {"pool": "a"}}),
    ))));
    for (name, pool, ready) in [
        ("n1", "a", "True"),
        ("n2", "b", "True"),
        ("n3", "a", "Unknown"),
        ("n4", "a", "True"),
    ] {
        case.world.apply(node(name, json!({"pool": pool}), ready));
    }
    for name in ["n1", "n2", "n3"] {
        case.world.apply(cache(name, json!([])));
    }
    case.listed();
    assert_eq!(case.decide(), ["p"]);
    assert_eq!(case.status("p").nodes.desired, 1);
    case.world.apply(cache("n4", json!([])));
    case.world.apply(node("n3", json!({"pool": "a"}), "True"));
    case.world.apply(node("n1", json!({"pool": "b"}), "True"));
    assert_eq!(case.decide(), ["p"]);
    assert_eq!(case.status("p").nodes.desired, 2);
    case.world.apply(Change::Node(Seen::Gone(Box::new(Named {
        name: "n4".to_owned(),
        facts: NodeFacts::default(),
    }))));
    case.decide();
    assert_eq!(case.status("p").nodes.desired, 1);
}

#[test]
fn what_nodes_tell_counts_for_its_object_and_revision_alone() {
    let mut case = Case::new();
    for uid in ["p", "q"] {
        case.world
            .apply(Change::Prewarm(is(prewarm(uid, 1, json!({})))));
    }
    case.world.apply(node("n1", json!({}), "True"));
    case.world.apply(cache(
        "n1",
        json!([{"uid": "p", "revision": "old", "phase": "Ready"}]),
    ));
    case.listed();
    assert_eq!(case.decide(), ["p", "q"]);
    case.seeded("p");
    case.seeded("q");
    assert_eq!(case.status("p").phase, Phase::Distributing);
    let told = case.told("p", "Ready");
    case.world.apply(cache("n1", told.clone()));
    assert_eq!(case.decide(), ["p"]);
    assert_eq!(case.status("p").phase, Phase::Ready);
    assert_eq!(case.status("q").phase, Phase::Distributing);
    // The same again is no news.
    case.world.apply(cache("n1", told));
    case.world.apply(node("n1", json!({}), "True"));
    assert_eq!(case.decide(), [""; 0]);
    let mut failed = case.told("q", "Failed");
    failed[0]["reason"] = json!("NoSpace");
    failed[0]["message"] = json!("free some");
    case.world.apply(cache("n1", failed));
    assert_eq!(case.decide(), ["p", "q"]);
    assert_eq!(case.status("q").failed_nodes[0].reason, "NoSpace");
    assert_eq!(case.status("p").nodes.pending, 1);
}

#[test]
fn an_object_that_changes_is_decided_anew_and_one_that_goes_is_forgotten() {
    let mut case = Case::new();
    case.world
        .apply(Change::Prewarm(is(prewarm("p", 1, json!({})))));
    case.listed();
    case.decide();
    case.seeded("p");
    // Its own status comes back from the API server.
    case.world
        .apply(Change::Prewarm(is(prewarm("p", 1, json!({})))));
    assert_eq!(case.decide(), [""; 0]);
    case.world.apply(Change::Prewarm(is(prewarm(
        "p",
        2,
        json!({"suspend": true}),
    ))));
    assert_eq!(case.decide(), ["p"]);
    assert_eq!(case.status("p").phase, Phase::Suspended);
    let mut deleting = prewarm("p", 2, json!({}));
    deleting.metadata.deletion_timestamp = Some(
        k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::UNIX_EPOCH),
    );
    case.world.apply(Change::Prewarm(is(deleting)));
    assert!(case.world.prewarms.get("p").is_none());
    // It was missed while the watch was away.
    case.world
        .apply(Change::Prewarm(is(prewarm("q", 1, json!({})))));
    case.world.apply(Change::Prewarm(Seen::Listing));
    case.world.apply(Change::Prewarm(Seen::Listed));
    assert!(case.world.prewarms.get("q").is_none());
    assert_eq!(case.decide().len(), 1);
}

fn rollout(uid: &str, revision: &str) -> Change {
    let rollout = json!({"metadata": {"name": uid}, "spec": {"revision": revision}});
    let rollout: ImageRollout = serde_json::from_value(rollout).unwrap();
    Change::Rollout(is(of_rollout(rollout)))
}

#[test]
fn what_nodes_are_told_is_put_right_and_goes_with_its_object() {
    let mut case = Case::new();
    for uid in ["p", "q"] {
        case.world
            .apply(Change::Prewarm(is(prewarm(uid, 1, json!({})))));
    }
    case.world.apply(rollout("p", "r"));
    case.world.apply(rollout("gone", "r"));
    case.listed();
    case.decide();
    assert_eq!(case.world.orphans(), ["gone"]);
    // What was written comes back from the API server.
    case.world.apply(rollout("p", "r"));
    assert_eq!(case.decide(), [""; 0]);
    // Somebody else has changed it, or has deleted it.
    case.world.apply(rollout("p", "other"));
    assert_eq!(case.decide(), ["p"]);
    let Change::Rollout(Seen::Is(of_p)) = rollout("p", "other") else {
        unreachable!("it makes such");
    };
    case.world.apply(Change::Rollout(Seen::Gone(of_p)));
    assert_eq!(case.decide(), ["p"]);
    case.world.apply(rollout("q", "r"));
    case.decide();
    case.world.apply(Change::Rollout(Seen::Listing));
    case.world.apply(Change::Rollout(Seen::Listed));
    assert_eq!(case.decide(), ["gone", "q"]);
    assert_eq!(case.world.orphans(), [""; 0]);
    case.world.apply(rollout("q", "r"));
    case.world
        .apply(Change::Prewarm(Seen::Gone(Box::new(prewarm(
            "q",
            1,
            json!({}),
        )))));
    assert_eq!(case.world.orphans(), ["q"]);
}

#[test]
fn one_that_waits_for_a_time_is_decided_about_when_it_comes() {
    let mut case = Case::new();
    case.world.apply(Change::Prewarm(is(prewarm(
        "p",
        1,
        json!({"refreshIntervalSeconds": 60}),
    ))));
    case.listed();
    case.decide();
    case.seeded("p");
    case.now += 59;
    assert_eq!(case.decide(), [""; 0]);
    case.now += 1;
    assert_eq!(case.decide(), ["p"]);
    assert_eq!(case.world.prewarms.get("p").unwrap().seed.len(), 1);
}

fn pod(name: &str, namespace: &str, image: &str, secret: &str) -> Change {
    let object = json!({
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"volumes": [{"csi": {"driver": "d", "volumeAttributes": {"image": image}, "nodePublishSecretRef": {"name": secret}}}]},
    });
    let object = serde_json::from_value(object).unwrap();
    Change::Workload(Kind::Pod, is(object).map(|it| of_object(&it, "d")))
}

fn listed(case: &mut Case) {
    for kind in Kind::ALL {
        case.world.apply(Change::Workload(kind, Seen::Listing));
        case.world.apply(Change::Workload(kind, Seen::Listed));
    }
}

#[test]
fn what_follows_workloads_waits_until_all_are_listed_and_others_do_not() {
    let mut case = Case::with(Some(Discovery::new()));
    for (uid, spec) in [
        ("p", json!({})),
        ("q", json!({"images": [], "workloads": {}})),
    ] {
        case.world.apply(Change::Prewarm(is(prewarm(uid, 1, spec))));
    }
    case.listed();
    case.decide();
    assert_eq!(case.status("p").observed_generation, 1);
    // Without that, a new leader would have all images of it go.
    assert_eq!(case.status("q").observed_generation, 0);
    listed(&mut case);
    assert_eq!(case.decide(), ["q"]);
    assert_eq!(case.status("q").phase, Phase::Ready);
    // The controller need not look at workloads for that to be said.
    let mut case = Case::new();
    case.world.apply(Change::Prewarm(is(prewarm(
        "q",
        1,
        json!({"images": [], "workloads": {}}),
    ))));
    case.listed();
    case.decide();
    assert_eq!(case.status("q").phase, Phase::Failed);
}

#[test]
fn objects_are_decided_anew_when_workloads_of_their_namespace_change() {
    let mut case = Case::with(Some(Discovery::new()));
    for (uid, spec) in [
        ("p", json!({})),
        (
            "q",
            json!({"images": [], "workloads": {}, "backoffLimit": 0}),
        ),
    ] {
        case.world.apply(Change::Prewarm(is(prewarm(uid, 1, spec))));
    }
    case.listed();
    listed(&mut case);
    case.decide();
    case.world.apply(pod("a", "elsewhere", "r/b:1", "s"));
    assert_eq!(case.decide(), [""; 0]);
    case.world.apply(pod("a", "team", "r/b:1", "s"));
    assert_eq!(case.decide(), ["q"]);
    let key = ImageKey {
        image: "r/b:1".to_owned(),
        platform: "linux/amd64".to_owned(),
    };
    assert_eq!(
        case.world.prewarms.get("q").unwrap().seed,
        std::slice::from_ref(&key)
    );
    case.world.apply(pod("a", "team", "r/b:1", "s"));
    assert_eq!(case.decide(), [""; 0]);
    // It is given up with this secret, and tried again with another one.
    let problem = Problem {
        reason: "Unauthorized",
        message: "m".to_owned(),
        is_transient: false,
    };
    let known = case.world.prewarms.get_mut("q").unwrap();
    known.tasks.insert(key.clone(), Task::Failed(problem));
    case.world.dirty.insert("q".to_owned());
    case.decide();
    assert_eq!(case.status("q").images[0].state, ImageState::Failed);
    case.world.apply(pod("b", "team", "r/b:1", "other"));
    assert_eq!(case.decide(), ["q"]);
    assert_eq!(case.status("q").images[0].attempts, 0);
    assert_eq!(case.world.prewarms.get("q").unwrap().seed, [key]);
}
