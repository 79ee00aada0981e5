use serde_json::{Value, json};

use super::*;

mod laws;
mod workloads;

const PLATFORM: &str = "linux/amd64";

/// An object, its nodes and its time, decided about again and again as the controller does.
struct World {
    generation: i64,
    spec: ImagePrewarmSpec,
    found: Option<Found>,
    status: ImagePrewarmStatus,
    tasks: BTreeMap<ImageKey, Task>,
    nodes: Vec<(i32, WarmupPhase, &'static str)>,
    quiet: i64,
    has_remote: bool,
    now: i64,
    told: Vec<(EventKind, String)>,
    last: Option<Plan>,
}

impl World {
    fn new(fields: Value) -> Self {
        let mut world = Self {
            generation: 0,
            spec: ImagePrewarmSpec::default(),
            found: None,
            status: ImagePrewarmStatus::default(),
            tasks: BTreeMap::new(),
            nodes: Vec::new(),
            quiet: 0,
            has_remote: true,
            now: 1000,
            told: Vec::new(),
            last: None,
        };
        world.change(fields);
        world
    }

    /// Somebody changes the spec, and it is decided.
    fn change(&mut self, fields: Value) {
        let mut spec = json!({"images": [{"image": "r/a:1"}]});
        let fields = fields.as_object().unwrap().clone();
        spec.as_object_mut().unwrap().extend(fields);
        self.spec = serde_json::from_value(spec).unwrap();
        self.generation += 1;
        self.decide();
    }

    fn decide(&mut self) -> &Plan {
        let wanted = self
            .nodes
            .iter()
            .filter(|_| self.spec.target == Target::Nodes);
        let nodes: Vec<_> = wanted
            .map(|(slot, phase, reason)| NodeView {
                name: "node",
                slot: *slot,
                phase: *phase,
                reason,
                message: "do something",
            })
            .collect();
        let plan = plan(&Facts {
            generation: self.generation,
            spec: &self.spec,
            found: self
                .found
                .as_ref()
                .filter(|_| self.spec.workloads.is_some()),
            status: &self.status,
            tasks: &self.tasks,
            nodes: &nodes,
            quiet: SignedDuration::from_secs(self.quiet),
            platform: PLATFORM,
            has_remote: self.has_remote,
            now: Timestamp::from_second(self.now).unwrap(),
        });
        if self.status.revision != plan.status.revision {
            // No node has told of the new one.
            self.nodes.iter_mut().for_each(|it| it.1 = Pending);
        }
        self.status = plan.status.clone();
        // What has ended is known now.
        self.tasks
            .retain(|_, it| matches!(it, Task::Running { .. }));
        let told = plan.notices.iter();
        self.told
            .extend(told.map(|it| (it.kind, it.reason.clone())));
        self.last.insert(plan)
    }

    fn task(&mut self, image: &str, task: Task) -> &Plan {
        self.tasks.insert(key(image), task);
        self.decide()
    }

    fn seeds(&self) -> Vec<&str> {
        let seeds = self.last.as_ref().unwrap().seed.iter();
        seeds.map(|it| it.image.as_str()).collect()
    }

    fn later(&mut self, seconds: i64) -> &Plan {
        self.now += seconds;
        self.decide()
    }

    fn wake(&self) -> Option<i64> {
        let at = self.last.as_ref().unwrap().wake_at;
        at.map(|it| it.as_second() - self.now)
    }

    fn ready(&self) -> (&str, &str, &str) {
        let conditions = &self.status.conditions;
        let it = conditions.iter().find(|it| it.type_ == "Ready").unwrap();
        (&it.status, &it.reason, &it.message)
    }

    fn told(&mut self) -> Vec<String> {
        let told = std::mem::take(&mut self.told);
        told.into_iter().map(|(_, reason)| reason).collect()
    }
}

fn key(image: &str) -> ImageKey {
    ImageKey {
        image: image.to_owned(),
        platform: PLATFORM.to_owned(),
    }
}

fn seeded(digest: &str) -> Task {
    Task::Done(Outcome {
        manifest_digest: digest.to_owned(),
        layers: 2,
        blob_bytes: 100,
        layer_bytes: Some(300),
        bytes_from_registry: 100,
        is_seeded: true,
    })
}

fn problem(reason: &'static str, is_transient: bool) -> Task {
    Task::Failed(Problem {
        reason,
        message: "check it".to_owned(),
        is_transient,
    })
}

const RUNNING: Task = Task::Running {
    blob_bytes: 100,
    blob_bytes_done: 40,
};

use WarmupPhase::{Failed, Pending, Ready, Warming};

#[test]
fn an_image_is_seeded_then_nodes_are_admitted_then_it_is_ready() {
    let mut world = World::new(json!({"parallelism": 1}));
    world.nodes = vec![(100, Pending, ""), (200, Pending, "")];
    assert_eq!(world.seeds(), ["r/a:1"]);
    assert_eq!(world.status.phase, Phase::Pending);
    world.task("r/a:1", RUNNING);
    assert_eq!(world.status.phase, Phase::Seeding);
    assert_eq!(world.status.images[0].blob_bytes_done, 40);
    assert_eq!(world.status.admitted_permille, 0);
    world.task("r/a:1", seeded("sha256:1"));
    assert_eq!(world.seeds(), [""; 0]);
    assert_eq!(world.status.phase, Phase::Distributing);
    assert_eq!(world.status.admitted_permille, 200);
    assert_eq!(world.status.nodes_ready, "0/2");
    world.nodes[0].1 = Warming;
    world.decide();
    assert_eq!(
        (world.status.admitted_permille, world.status.nodes.warming),
        (200, 1)
    );
    world.nodes[0].1 = Ready;
    world.decide();
    assert_eq!(world.status.admitted_permille, 1000);
    assert_eq!(world.ready().1, "InProgress");
    world.nodes[1].1 = Ready;
    world.later(5);
    assert_eq!(world.status.phase, Phase::Ready);
    assert_eq!(world.ready(), ("True", "Ready", "1/1 images, 2/2 nodes"));
    assert_eq!(
        world.status.finished_at.as_ref().unwrap().0.as_second(),
        1005
    );
    assert_eq!(world.wake(), None);
    assert_eq!(world.told(), ["Seeded", "Ready"]);
    // A node joins: it is admitted at once, and nothing is seeded for it.
    world.nodes.push((300, Pending, ""));
    world.decide();
    assert_eq!(world.status.phase, Phase::Distributing);
    assert_eq!(
        (world.status.admitted_permille, world.seeds()),
        (1000, vec![])
    );
}

#[test]
fn a_controller_that_was_killed_is_gone_on_from_where_it_was() {
    let mut world = World::new(json!({"images": [{"image": "r/a:1"}, {"image": "r/b:1"}]}));
    world.task("r/a:1", seeded("sha256:1"));
    world.task("r/b:1", RUNNING);
    let before = world.status.clone();
    // The next one has the status, and no task.
    world.tasks.clear();
    world.decide();
    assert_eq!(world.seeds(), ["r/b:1"]);
    assert_eq!(world.status.images[0], before.images[0]);
    assert_eq!(world.status.images[1].state, ImageState::Pending);
    assert_eq!(world.status.started_at, before.started_at);
}

#[test]
fn a_wrong_secret_is_tried_again_ever_more_seldom_and_given_up() {
    let mut world = World::new(json!({"backoffLimit": 2}));
    for wait in [10, 20] {
        world.task("r/a:1", problem("Unauthorized", false));
        assert_eq!(world.status.phase, Phase::Seeding);
        assert_eq!(world.seeds(), [""; 0]);
        assert_eq!(world.wake(), Some(wait));
        let (status, reason, message) = world.ready();
        assert_eq!((status, reason), ("False", "Unauthorized"));
        assert!(message.contains("check it; attempt"), "{message}");
        world.later(wait - 1);
        assert_eq!(world.seeds(), [""; 0]);
        world.later(1);
        assert_eq!(world.seeds(), ["r/a:1"]);
    }
    world.task("r/a:1", problem("Unauthorized", false));
    assert_eq!(world.status.phase, Phase::Failed);
    assert_eq!((world.seeds(), world.wake()), (vec![], None));
    assert!(
        world
            .ready()
            .2
            .contains("given up after attempt 3: change the spec")
    );
    assert_eq!(
        world.told(),
        ["Unauthorized", "Unauthorized", "Unauthorized"]
    );
    world.change(json!({"backoffLimit": 3}));
    assert_eq!(
        (world.seeds(), world.status.phase),
        (vec!["r/a:1"], Phase::Pending)
    );
    assert_eq!(world.status.images[0].attempts, 0);
}

#[test]
fn what_may_go_by_itself_is_never_given_up() {
    let mut world = World::new(json!({"backoffLimit": 0}));
    for _ in 0..20 {
        world.task("r/a:1", problem("RemoteDown", true));
        world.later(600);
        assert_eq!(world.seeds(), ["r/a:1"]);
    }
    assert_eq!(world.told(), ["RemoteDown"]);
}

#[test]
fn one_image_that_fails_does_not_keep_nodes_from_the_others() {
    let mut world =
        World::new(json!({"images": [{"image": "r/a:1"}, {"image": "r/b:1"}], "backoffLimit": 0}));
    world.nodes = vec![(1, Pending, "")];
    world.task("r/a:1", seeded("sha256:1"));
    assert_eq!(world.status.admitted_permille, 0);
    world.task("r/b:1", problem("NotFound", false));
    assert_eq!(world.status.admitted_permille, 1000);
    world.nodes[0].1 = Ready;
    world.decide();
    assert_eq!(world.status.phase, Phase::Degraded);
    assert_eq!(world.ready().1, "NotFound");
    assert_eq!(world.status.images_seeded, "1/2");
    let all = vec![problem("NotFound", false), problem("NotFound", false)];
    let mut world =
        World::new(json!({"images": [{"image": "r/a:1"}, {"image": "r/b:1"}], "backoffLimit": 0}));
    world.nodes = vec![(1, Pending, "")];
    for (image, task) in ["r/a:1", "r/b:1"].into_iter().zip(all) {
        world.task(image, task);
    }
    assert_eq!(
        (world.status.phase, world.status.admitted_permille),
        (Phase::Failed, 0)
    );
}

#[test]
fn suspension_stops_everything_and_its_end_goes_on() {
    let mut world = World::new(json!({}));
    world.nodes = vec![(1, Pending, "")];
    world.task("r/a:1", RUNNING);
    world.change(json!({"suspend": true}));
    assert_eq!(
        (world.seeds(), world.status.phase),
        (vec![], Phase::Suspended)
    );
    assert_eq!(world.status.images[0].state, ImageState::Pending);
    assert_eq!((world.wake(), world.ready().1), (None, "Suspended"));
    world.tasks.clear();
    world.change(json!({}));
    assert_eq!(world.seeds(), ["r/a:1"]);
    world.task("r/a:1", seeded("sha256:1"));
    assert_eq!(world.status.admitted_permille, 1000);
    world.change(json!({"suspend": true}));
    assert_eq!(world.status.admitted_permille, 0);
    // What nodes have is not forgotten.
    assert_eq!(
        world.status.images[0].manifest_digest.as_deref(),
        Some("sha256:1")
    );
}

#[test]
fn a_deadline_ends_it_once_and_a_changed_spec_begins_anew() {
    let mut world = World::new(json!({"activeDeadlineSeconds": 60}));
    world.task("r/a:1", RUNNING);
    assert_eq!(world.wake(), Some(60));
    world.later(60);
    assert_eq!((world.status.phase, world.seeds()), (Phase::Failed, vec![]));
    assert_eq!(world.ready().1, DEADLINE_EXCEEDED);
    world.tasks.clear();
    world.later(60);
    assert_eq!((world.status.phase, world.seeds()), (Phase::Failed, vec![]));
    assert_eq!(world.told(), [DEADLINE_EXCEEDED, DEADLINE_EXCEEDED]);
    world.change(json!({"activeDeadlineSeconds": 61}));
    assert_eq!(world.seeds(), ["r/a:1"]);
    world.task("r/a:1", seeded("sha256:1"));
    world.later(1000);
    assert_eq!(world.status.phase, Phase::Ready, "it was ready in time");
}

#[test]
fn a_tag_is_looked_up_anew_and_nodes_get_what_it_means_now() {
    let mut world = World::new(json!({"refreshIntervalSeconds": 100}));
    world.task("r/a:1", seeded("sha256:1"));
    world.nodes = vec![(1, Ready, "")];
    world.decide();
    let revision = world.status.revision.clone();
    assert_eq!(
        (world.status.phase, world.wake()),
        (Phase::Ready, Some(100))
    );
    world.later(100);
    assert_eq!(world.seeds(), ["r/a:1"]);
    world.task("r/a:1", RUNNING);
    assert_eq!(world.status.phase, Phase::Ready, "all the while");
    world.task("r/a:1", seeded("sha256:1"));
    assert_eq!(
        (world.status.phase, &world.status.revision),
        (Phase::Ready, &revision)
    );
    // It cannot be looked up: what is there stays, and somebody is told.
    world.told();
    world.later(100);
    world.task("r/a:1", problem("NotFound", false));
    assert_eq!(world.status.phase, Phase::Ready);
    assert_eq!(
        (world.told(), world.wake()),
        (vec!["NotFound".to_owned()], Some(10))
    );
    world.later(10);
    world.task("r/a:1", seeded("sha256:2"));
    assert_ne!(world.status.revision, revision);
    assert_eq!(
        (world.status.phase, world.status.nodes.pending),
        (Phase::Distributing, 1)
    );
    assert_eq!(world.status.images[0].reason, None);
}

#[test]
fn what_has_ended_is_deleted_after_its_time_and_not_before() {
    let mut world = World::new(json!({"target": "Remote", "ttlSecondsAfterFinished": 60}));
    world.task("r/a:1", seeded("sha256:1"));
    assert_eq!((world.status.phase, world.wake()), (Phase::Ready, Some(60)));
    assert_eq!(world.status.admitted_permille, 0);
    assert_eq!(world.status.nodes_ready, "");
    assert!(!world.later(59).delete);
    assert!(world.later(1).delete);
}

#[test]
fn nodes_that_fail_are_told_of_and_hold_up_nobody() {
    let mut world = World::new(json!({"parallelism": 1}));
    world.task("r/a:1", seeded("sha256:1"));
    world.nodes = vec![(1, Failed, "NoSpace"), (2, Pending, "")];
    world.decide();
    assert_eq!(world.status.admitted_permille, 1000);
    assert_eq!(world.status.failed_nodes[0].reason, "NoSpace");
    world.nodes[1].1 = Ready;
    world.decide();
    assert_eq!(
        (world.status.phase, world.ready().1),
        (Phase::Degraded, "NoSpace")
    );
    world.nodes[0] = (1, Ready, "");
    world.decide();
    assert_eq!(
        (world.status.phase, world.status.failed_nodes.len()),
        (Phase::Ready, 0)
    );
    world.nodes = vec![(1, Failed, "NoSpace"); 50];
    world.decide();
    assert_eq!(
        (world.status.phase, world.status.failed_nodes.len()),
        (Phase::Failed, 20)
    );
}

#[test]
fn what_the_remote_has_lost_is_seeded_again_but_not_round_and_round() {
    let mut world = World::new(json!({}));
    world.task("r/a:1", seeded("sha256:1"));
    world.nodes = vec![(1, Failed, "NotSeeded")];
    world.later(299);
    assert_eq!((world.seeds(), world.wake()), (vec![], Some(1)));
    world.later(1);
    assert_eq!(world.seeds(), ["r/a:1"]);
    world.task("r/a:1", seeded("sha256:1"));
    assert_eq!((world.seeds(), world.wake()), (vec![], Some(300)));
}

#[test]
fn without_a_remote_nodes_get_digests_and_a_condition_says_so() {
    let mut world = World::new(json!({}));
    world.has_remote = false;
    world.nodes = vec![(1, Pending, "")];
    let outcome = Outcome {
        manifest_digest: "sha256:1".to_owned(),
        ..Outcome::default()
    };
    world.task("r/a:1", Task::Done(outcome));
    assert_eq!(world.status.images[0].state, ImageState::Resolved);
    assert_eq!(world.status.admitted_permille, 1000);
    let seeded = &world.status.conditions[0];
    assert_eq!(
        (seeded.status.as_str(), seeded.reason.as_str()),
        ("False", "NoRemote")
    );
    world.nodes[0].1 = Ready;
    world.decide();
    assert_eq!(world.ready().0, "True");
}

#[test]
fn nobody_to_warm_is_an_end_and_not_a_wait() {
    let mut world = World::new(json!({"nodeSelector": {"no": "such"}}));
    world.task("r/a:1", seeded("sha256:1"));
    assert_eq!(world.status.phase, Phase::Ready);
    let conditions = world.status.conditions.iter();
    let reasons: Vec<_> = conditions.map(|it| it.reason.as_str()).collect();
    assert_eq!(reasons, ["AllSeeded", "NoNodes", "Ready"]);
}

#[test]
fn each_platform_is_an_image_of_its_own() {
    let mut world = World::new(json!({"platforms": ["linux/amd64", "linux/arm64"]}));
    let platforms: Vec<_> = world
        .last
        .as_ref()
        .unwrap()
        .seed
        .iter()
        .map(|it| it.platform.clone())
        .collect();
    assert_eq!(platforms, ["linux/amd64", "linux/arm64"]);
    world.change(json!({"platforms": ["linux/arm64"]}));
    assert_eq!(world.status.images.len(), 1);
}

#[test]
fn parallelism_and_bandwidth_are_shared_out() {
    for (fields, n_nodes, parallel, bytes) in [
        (json!({}), 0, 1, None),
        (json!({}), 5, 1, None),
        (json!({}), 11, 2, None),
        (json!({}), 1000, 100, None),
        (json!({"parallelism": 3}), 1000, 3, None),
        (json!({"parallelism": "50%"}), 3, 2, None),
        (json!({"bytesPerSecondPerNode": 9}), 10, 1, Some(9)),
        (json!({"totalBytesPerSecond": 1000}), 1000, 100, Some(10)),
        (
            json!({"totalBytesPerSecond": 1000, "bytesPerSecondPerNode": 9}),
            1000,
            100,
            Some(9),
        ),
        (json!({"totalBytesPerSecond": 1}), 1000, 100, Some(1)),
    ] {
        let spec = World::new(fields.clone()).spec;
        assert_eq!(parallelism(&spec, n_nodes), parallel, "{fields}");
        assert_eq!(bytes_per_second(&spec, parallel), bytes, "{fields}");
    }
}

#[test]
fn a_condition_keeps_the_time_of_its_last_change() {
    let mut world = World::new(json!({}));
    let first = world.status.conditions.clone();
    world.later(10);
    assert_eq!(world.status.conditions, first);
    world.later(10);
    world.task("r/a:1", seeded("sha256:1"));
    let seeded = &world.status.conditions[0];
    assert_eq!(seeded.last_transition_time.0.as_second(), 1020);
}

#[test]
fn a_long_message_is_cut_at_a_character() {
    let mut world = World::new(json!({}));
    let message = "…".repeat(1000);
    world.task(
        "r/a:1",
        Task::Failed(Problem {
            reason: "NotFound",
            message,
            is_transient: false,
        }),
    );
    assert!(world.ready().2.len() <= 1024);
}
