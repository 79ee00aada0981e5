//! Preparation of images: calls that wait, join, give up, and hear of failures.

use std::sync::atomic::Ordering;

use clip_csi::{
    mount::{MountError, PodInfo, PodNotice, PodRef, PullCredentials},
    secret::Secret,
};

use super::{World, image_at, not_found, unavailable};
use crate::mount_fixture::{publish_request, skip_without_mounts, unpublish_request};

#[tokio::test]
async fn slow_work_is_detached_from_the_call_and_the_next_call_joins_it() {
    skip_without_mounts!("mount: slow preparation");
    let world = World::new();
    let target = world.scratch.target("pod");
    let err = world.publish("v", &target, "slow").await.unwrap_err();
    assert!(matches!(err, MountError::Preparing { .. }), "{err:?}");
    assert_eq!(
        err.to_string(),
        "image slow is still being prepared after 0 s (streaming layer 1 of 2, 20 of 60 MB): \
         it is mounted once it is ready, nothing needs to be done"
    );
    world.assert_nothing_is_left(&target);
    // Others need not wait, and other rights share no work.
    world
        .publish("w", &world.scratch.target("other"), "app")
        .await
        .unwrap();
    let mut request = publish_request("x", &world.scratch.target("third"), "slow");
    request.image.credentials = PullCredentials::DockerConfig(Secret::new("{}".to_owned()));
    let err = world.table.publish(request).await.unwrap_err();
    assert!(matches!(err, MountError::Preparing { .. }), "{err:?}");
    assert_eq!(world.mounter.n_prepared(), 3);

    // The work is as old as the first call: this one joined it.
    let err = world.publish("v", &target, "slow").await.unwrap_err();
    let MountError::Preparing { waited, .. } = err else {
        panic!("{err:?}");
    };
    assert!(
        2 * world.scratch.config().prepare_wait <= waited,
        "{waited:?}"
    );
    assert_eq!(
        world.mounter.n_prepared(),
        3,
        "the second call did not join"
    );

    // One permit for each work, one for a call that comes after its end.
    world.mounter.gate.add_permits(3);
    world.publish("v", &target, "slow").await.unwrap();
    assert_eq!(image_at(&target), "slow");
}

#[tokio::test]
async fn a_failure_is_told_to_all_who_wait_and_not_kept() {
    skip_without_mounts!("mount: failed preparation");
    let world = World::new();
    let (one, two) = (world.scratch.target("one"), world.scratch.target("two"));
    world.mounter.fail("slow", unavailable());
    let release = async {
        while world.mounter.n_prepared() == 0 {
            tokio::task::yield_now().await;
        }
        // A second one for a call that comes late.
        world.mounter.gate.add_permits(2);
    };
    let (one_told, two_told, ()) = tokio::join!(
        world.publish("v1", &one, "slow"),
        world.publish("v2", &two, "slow"),
        release
    );
    for told in [one_told, two_told] {
        assert!(
            matches!(told, Err(MountError::Unavailable { .. })),
            "{told:?}"
        );
    }
    world.mounter.failures.lock().unwrap().clear();
    world.mounter.gate.add_permits(1);
    world.publish("v1", &one, "slow").await.unwrap();
}

#[tokio::test]
async fn a_failure_that_nobody_heard_is_told_once() {
    skip_without_mounts!("mount: unheard failure");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.mounter.fail("slow", not_found());
    let err = world.publish("v", &target, "slow").await.unwrap_err();
    assert!(matches!(err, MountError::Preparing { .. }), "{err:?}");
    world.mounter.gate.add_permits(1);
    while world.mounter.gate.available_permits() != 0 {
        tokio::task::yield_now().await;
    }
    tokio::task::yield_now().await;
    let err = world.publish("v", &target, "slow").await.unwrap_err();
    assert!(matches!(err, MountError::ImageNotFound { .. }), "{err:?}");
    assert_eq!(world.mounter.n_prepared(), 1);
    world.mounter.failures.lock().unwrap().clear();
    world.mounter.gate.add_permits(1);
    world.publish("v", &target, "slow").await.unwrap();
    assert_eq!(world.mounter.n_prepared(), 2);
}

#[tokio::test]
async fn a_panic_in_the_work_is_an_error_of_the_call_only() {
    skip_without_mounts!("mount: panic");
    let world = World::new();
    let target = world.scratch.target("pod");
    for n_calls in 1..=2 {
        let err = world.publish("v", &target, "panic").await.unwrap_err();
        assert!(matches!(err, MountError::System { .. }), "{err:?}");
        assert_eq!(world.mounter.n_prepared(), n_calls);
    }
    world.publish("v", &target, "app").await.unwrap();
}

#[tokio::test]
async fn a_call_that_is_dropped_lets_go_of_the_volume() {
    skip_without_mounts!("mount: dropped call");
    let world = World::new();
    let target = world.scratch.target("pod");
    {
        let call = world.publish("v", &target, "slow");
        tokio::select! {
            outcome = call => panic!("{outcome:?}"),
            () = async { while world.mounter.n_prepared() == 0 { tokio::task::yield_now().await } } => {}
        }
    }
    assert_eq!(world.mounter.gate.available_permits(), 0);
    // One for the work that goes on, one for a call that comes after its end.
    world.mounter.gate.add_permits(2);
    world.publish("v", &target, "slow").await.unwrap();
}

#[tokio::test]
async fn the_same_volume_or_target_is_busy_while_it_is_worked_on() {
    skip_without_mounts!("mount: busy");
    let world = World::new();
    let target = world.scratch.target("pod");
    let first = world.publish("v", &target, "slow");
    let second = async {
        while world.mounter.n_prepared() == 0 {
            tokio::task::yield_now().await;
        }
        let same_volume = world
            .publish("v", &world.scratch.target("other"), "app")
            .await;
        let same_target = world.publish("w", &target, "app").await;
        let unpublish = world.table.unpublish(unpublish_request("v", &target)).await;
        world.mounter.gate.add_permits(1);
        [same_volume, same_target, unpublish]
    };
    let (first, refused) = tokio::join!(first, second);
    first.unwrap();
    for outcome in refused {
        assert!(
            matches!(outcome, Err(MountError::Busy { .. })),
            "{outcome:?}"
        );
    }
    world.unpublish("v", &target).await;
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn a_pod_is_told_once_that_its_image_is_slow_and_that_its_volume_has_died() {
    skip_without_mounts!("mount: pod notices");
    let world = World::new();
    let target = world.scratch.target("pod");
    let mut request = publish_request("v", &target, "slow");
    request.image.pod = Some(Box::new(PodInfo {
        namespace: "team".to_owned(),
        name: "web-0".to_owned(),
        uid: "uid-1".to_owned(),
        service_account: "default".to_owned(),
        tokens: Secret::new(String::new()),
    }));
    for _ in 0..2 {
        world.table.publish(request.clone()).await.unwrap_err();
    }
    let pod = PodRef {
        namespace: "team".to_owned(),
        name: "web-0".to_owned(),
        uid: "uid-1".to_owned(),
    };
    let slow = PodNotice {
        pod: pod.clone(),
        reason: "VolumeSlow",
        message: "image slow takes long to be ready: streaming layer 1 of 2, 20 of 60 MB; the pod starts when it is".to_owned(),
    };
    assert_eq!(world.table.take_pod_notices(), [slow]);
    world.mounter.gate.add_permits(2);
    world.table.publish(request).await.unwrap();
    world.table.look_after();
    assert_eq!(world.table.take_pod_notices(), []);
    world.mounter.alive.store(false, Ordering::SeqCst);
    for _ in 0..2 {
        world.table.look_after();
    }
    let told = world.table.take_pod_notices();
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].reason, &told[0].pod), ("VolumeDead", &pod));
    assert!(
        told[0].message.contains("delete the pod"),
        "{}",
        told[0].message
    );
    world.mounter.alive.store(true, Ordering::SeqCst);
}
