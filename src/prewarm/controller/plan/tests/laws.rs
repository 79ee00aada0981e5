//! What holds of a status whatever has happened in whatever order.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::prewarm::controller::discovery::FoundImage;

#[derive(Debug, Clone)]
enum Step {
    Task(usize, u8),
    Node(usize, u8),
    Later(i64),
    Change(u8),
    Found(u8),
    Forget,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..2usize, 0..5u8).prop_map(|(at, what)| Step::Task(at, what)),
        4 => (0..4usize, 0..5u8).prop_map(|(at, what)| Step::Node(at, what)),
        2 => (1..700i64).prop_map(Step::Later),
        1 => (0..7u8).prop_map(Step::Change),
        1 => (0..5u8).prop_map(Step::Found),
        1 => Just(Step::Forget),
    ]
}

proptest! {
    /// Whatever happens in whatever order: what a status says never contradicts itself, a decision that is made twice
    /// is the same, and there is always somebody to wait for.
    #[test]
    fn a_status_never_contradicts_itself(steps in proptest::collection::vec(step(), 1..40)) {
        let images = json!([{"image": "r/a:1"}, {"image": "r/b:1"}]);
        let specs = [
            json!({"images": images}),
            json!({"images": images, "suspend": true}),
            json!({"images": images, "activeDeadlineSeconds": 500, "backoffLimit": 1}),
            json!({"images": images, "refreshIntervalSeconds": 100}),
            json!({"images": images, "target": "Remote", "ttlSecondsAfterFinished": 10}),
            json!({"images": [], "workloads": {}}),
            json!({"images": [{"image": "r/a:1"}], "workloads": {}}),
        ];
        let mut world = World::new(specs[0].clone());
        world.nodes = vec![(10, Pending, ""), (400, Pending, ""), (400, Pending, ""), (999, Pending, "")];
        for step in steps {
            let revision = world.status.revision.clone();
            match step {
                Step::Task(at, what) => {
                    let image = ["r/a:1", "r/b:1"][at];
                    // Only what was asked for is done.
                    if !world.seeds().contains(&image) {
                        continue;
                    }
                    let task = match what {
                        0 => RUNNING,
                        1 => seeded("sha256:1"),
                        2 => seeded("sha256:2"),
                        3 => problem("NotFound", false),
                        _ => problem("RemoteDown", true),
                    };
                    world.task(image, task);
                }
                Step::Node(at, what) => {
                    let phases = [Pending, Warming, Ready, Failed, Failed];
                    let reason = if what == 4 { "NotSeeded" } else { "NoSpace" };
                    world.nodes[at].1 = phases[usize::from(what)];
                    world.nodes[at].2 = reason;
                    world.decide();
                }
                Step::Later(seconds) => {
                    world.later(seconds);
                }
                Step::Change(at) => {
                    // As the controller does: tasks are of one generation.
                    world.tasks.clear();
                    world.change(specs[usize::from(at)].clone());
                }
                Step::Found(what) => {
                    let names: &[&str] = match what {
                        0 => &[],
                        1 => &["r/a:1"],
                        2 => &["r/b:1"],
                        _ => &["r/a:1", "r/b:1"],
                    };
                    world.found = (what != 4).then(|| Found {
                        images: names.iter().map(|it| ((*it).to_owned(), FoundImage { is_for_default: true, ..FoundImage::default() })).collect(),
                        n_left_out: usize::from(what == 1),
                    });
                    // As the controller does: nobody is seeded whom nobody wants.
                    world.decide();
                }
                Step::Forget => {
                    world.tasks.clear();
                    world.decide();
                }
            }
            let first = world.last.clone().unwrap();
            let status = &first.status;
            let spec = &world.spec;
            let nodes = status.nodes;
            prop_assert_eq!(nodes.desired, nodes.pending + nodes.warming + nodes.ready + nodes.failed);
            if spec.suspend {
                prop_assert!(first.seed.is_empty() && status.admitted_permille == 0);
                prop_assert_eq!(status.phase, Phase::Suspended);
            }
            if spec.target == Target::Remote || status.revision.is_empty() {
                prop_assert_eq!(status.admitted_permille, 0);
            }
            let is_ready = status.conditions.iter().any(|it| it.type_ == "Ready" && it.status == "True");
            prop_assert_eq!(is_ready, status.phase == Phase::Ready);
            prop_assert_eq!(is_ready, is_ready && status.images.iter().all(|it| is_there(it.state)));
            for image in &status.images {
                prop_assert!(!is_there(image.state) || image.manifest_digest.is_some());
                prop_assert!(image.state != ImageState::Failed || image.manifest_digest.is_none());
                prop_assert!(image.attempts == 0 || image.reason.is_some());
            }
            // Somebody is to do something, something is waited for, or it is at its end.
            let is_at_end = status.finished_at.is_some() || spec.suspend;
            let nodes_are_at_it = 0 < status.admitted_permille && 0 < nodes.pending + nodes.warming;
            prop_assert!(
                is_at_end || !first.seed.is_empty() || first.wake_at.is_some() || nodes_are_at_it,
                "nobody to wait for: {:?}", status
            );
            // What has happened is not told twice, and what was decided stands.
            let again = world.decide().clone();
            prop_assert!(again.notices.is_empty(), "{:?}", again.notices);
            prop_assert_eq!(&again.status.images, &status.images);
            if revision == status.revision {
                prop_assert_eq!(&again.seed, &first.seed);
            }
        }
    }
}
