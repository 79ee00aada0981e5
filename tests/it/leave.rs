//! The end of a mount table: nothing of its state stays when no volume does.

use clip_csi::{disk, metrics::Metrics};

use crate::mount_fixture::{
    FakeMounter, Scratch, publish_request, skip_without_mounts, unpublish_request,
};

#[tokio::test]
async fn nothing_of_the_state_stays_when_no_volume_does() {
    skip_without_mounts!("leave");
    let (scratch, mounter) = (Scratch::new(), FakeMounter::new());
    let target = scratch.target("pod");
    let (table, _) = scratch.recover(&mounter, &Metrics::new());
    let publish = || table.publish(publish_request("v", &target, "app"));
    let unpublish = || table.unpublish(unpublish_request("v", &target));
    publish().await.unwrap();
    assert!(!table.clone().leave(), "a volume is published");
    // Nothing that a running table needs was taken from it.
    unpublish().await.unwrap();
    publish().await.unwrap();
    unpublish().await.unwrap();
    assert!(table.leave());
    assert!(!scratch.state_dir().exists());
    let (_table, found) = scratch.recover(&mounter, &Metrics::new());
    assert_eq!(found.volumes, 0);
}

#[tokio::test]
async fn what_is_not_the_drivers_is_left() {
    let scratch = Scratch::new();
    let (table, _) = scratch.recover(&FakeMounter::new(), &Metrics::new());
    let foreign = scratch.state_dir().join("volumes/note.txt");
    disk::publish(&foreign, b"mine").unwrap();
    assert!(!table.leave());
    assert!(foreign.exists());
}
