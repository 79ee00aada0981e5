//! ImagePrewarms whose images workloads name.

use super::*;
use crate::prewarm::controller::discovery::FoundImage;

/// What workloads name, for the default platform.
fn found(images: &[&str], n_left_out: usize) -> Option<Found> {
    let images = images.iter().map(|it| {
        let image = FoundImage {
            is_for_default: true,
            ..FoundImage::default()
        };
        ((*it).to_owned(), image)
    });
    Some(Found {
        images: images.collect(),
        n_left_out,
    })
}

fn following(fields: Value, images: &[&str]) -> World {
    let mut spec = json!({"images": [], "workloads": {}});
    spec.as_object_mut()
        .unwrap()
        .extend(fields.as_object().unwrap().clone());
    let mut world = World::new(json!({"suspend": true}));
    world.found = found(images, 0);
    world.change(spec);
    world.told();
    world
}

fn images(world: &World) -> Vec<&str> {
    let images = world.status.images.iter();
    images.map(|it| it.image.as_str()).collect()
}

#[test]
fn images_come_and_go_with_the_workloads_that_name_them() {
    let mut world = following(json!({}), &[]);
    world.nodes = vec![(1, Pending, "")];
    world.decide();
    assert_eq!(world.status.phase, Phase::Ready);
    assert_eq!(world.ready().1, "NoWorkloads");
    world.found = found(&["r/b:1"], 0);
    world.decide();
    assert_eq!(
        (world.status.phase, world.seeds()),
        (Phase::Pending, vec!["r/b:1"])
    );
    assert_eq!(world.status.finished_at, None);
    world.task("r/b:1", seeded("sha256:1"));
    assert_eq!(
        (world.status.phase, world.status.admitted_permille),
        (Phase::Distributing, 1000)
    );
    world.nodes[0].1 = Ready;
    world.later(5);
    assert_eq!(world.status.phase, Phase::Ready);
    assert!(world.status.finished_at.is_some());
    // Another one, before the first by name: nodes that are at it go on while it is seeded.
    let one = world.status.revision.clone();
    world.found = found(&["r/a:1", "r/b:1"], 0);
    world.later(5);
    assert_eq!(
        (images(&world), world.seeds()),
        (vec!["r/a:1", "r/b:1"], vec!["r/a:1"])
    );
    assert_eq!(
        (&world.status.revision, world.status.admitted_permille),
        (&one, 1000)
    );
    assert_eq!(world.status.images_seeded, "1/2");
    world.task("r/a:1", seeded("sha256:2"));
    let two = world.status.revision.clone();
    assert_ne!(two, one);
    assert_eq!(world.status.nodes.pending, 1);
    // One has gone: nodes need not be asked, for they have more than is wanted.
    world.nodes[0].1 = Ready;
    world.found = found(&["r/b:1"], 0);
    world.decide();
    assert_eq!(
        (images(&world), &world.status.revision),
        (vec!["r/b:1"], &two)
    );
    assert_eq!(
        (world.status.phase, world.ready().2),
        (Phase::Ready, "1/1 images, 1/1 nodes")
    );
    // It comes back: a node that has come meanwhile has it not.
    world.found = found(&["r/a:1", "r/b:1"], 0);
    world.decide();
    world.task("r/a:1", seeded("sha256:2"));
    assert!(![&one, &two].contains(&&world.status.revision));
    world.found = found(&[], 0);
    world.decide();
    assert_eq!(
        (world.status.phase, world.ready().1),
        (Phase::Ready, "NoWorkloads")
    );
    assert_eq!(world.status.admitted_permille, 0);
}

#[test]
fn platforms_are_the_volumes_own_or_else_those_of_the_spec() {
    let mut world = following(
        json!({"platforms": ["linux/amd64", "linux/s390x"], "images": [{"image": "r/b:1"}]}),
        &["r/a:1", "r/b:1"],
    );
    let found = &mut world.found.as_mut().unwrap().images;
    found.get_mut("r/a:1").unwrap().is_for_default = false;
    for (image, platform) in [
        ("r/a:1", "linux/arm64"),
        ("r/b:1", "linux/arm64"),
        ("r/b:1", "linux/amd64"),
    ] {
        found
            .get_mut(image)
            .unwrap()
            .platforms
            .insert(platform.to_owned());
    }
    world.decide();
    let all = world.status.images.iter();
    let all: Vec<_> = all
        .map(|it| (it.image.as_str(), it.platform.as_str()))
        .collect();
    assert_eq!(
        all,
        [
            ("r/b:1", "linux/amd64"),
            ("r/b:1", "linux/s390x"),
            ("r/a:1", "linux/arm64"),
            ("r/b:1", "linux/arm64"),
        ]
    );
}

#[test]
fn what_is_not_looked_at_and_what_has_no_room_is_said() {
    let mut world = following(json!({}), &[]);
    world.found = None;
    world.decide();
    assert_eq!(world.status.phase, Phase::Failed);
    let (_, reason, message) = world.ready();
    assert_eq!(reason, "DiscoveryOff");
    assert!(message.contains("prewarm.discovery.enabled"), "{message}");
    assert_eq!(world.told(), ["DiscoveryOff"]);
    // What the spec itself names is warmed even so.
    world.change(json!({"workloads": {}, "target": "Remote"}));
    world.task("r/a:1", seeded("sha256:1"));
    assert_eq!(
        (world.status.phase, world.ready().1),
        (Phase::Degraded, "DiscoveryOff")
    );
    world.told();
    world.found = found(&["r/b:1"], 7);
    world.decide();
    assert_eq!(
        (world.status.phase, world.ready().1),
        (Phase::Seeding, "InProgress")
    );
    world.task("r/b:1", seeded("sha256:2"));
    assert_eq!(world.status.phase, Phase::Degraded);
    let (_, reason, message) = world.ready();
    assert_eq!(reason, "TooManyImages");
    assert!(
        message.starts_with("7 images") && message.contains("a further ImagePrewarm"),
        "{message}"
    );
    assert_eq!(world.told(), ["Seeded", "TooManyImages"]);
    world.found = found(&["r/b:1"], 0);
    world.decide();
    assert_eq!(
        (world.status.phase, world.ready().0),
        (Phase::Ready, "True")
    );
}
