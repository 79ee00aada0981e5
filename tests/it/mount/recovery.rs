//! Mounts that died, and state directories that a former process left.

use std::{
    ffi::CString, fs, io, os::fd::AsRawFd, path::Path, sync::atomic::Ordering, time::Duration,
};

use clip_csi::{
    disk,
    metrics::Metrics,
    mount::{MountError, MountInfo, MountTable, PodInfo, PodRef, Recovered, SOURCE_NAME},
    secret::Secret,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::time::timeout;

use super::{World, device_at, image_at, not_found, unavailable};
use crate::mount_fixture::{FakeMounter, Scratch, publish_request, skip_without_mounts};

#[tokio::test]
async fn a_source_that_died_is_replaced_when_the_volume_is_published_again() {
    skip_without_mounts!("mount: dead source");
    let world = World::new();
    let (one, two) = (world.scratch.target("one"), world.scratch.target("two"));
    world.publish("v1", &one, "app").await.unwrap();
    world.publish("v2", &two, "app").await.unwrap();
    world.mounter.alive.store(false, Ordering::SeqCst);
    let dead = device_at(&one);
    world.publish("v1", &one, "app").await.unwrap();
    world.mounter.alive.store(true, Ordering::SeqCst);
    assert_eq!(
        (world.mounter.n_mounts(), world.metrics.mounts.get()),
        (2, 1)
    );
    assert_ne!(device_at(&one), dead);
    assert_eq!(device_at(&two), dead);
    world.unpublish("v2", &two).await;
    assert_eq!(image_at(&one), "app");
    world.unpublish("v1", &one).await;
    world.assert_nothing_is_left(&one);
}

/// A FUSE mount as the driver's sources are, whose server never answers; dead once the file is
/// closed.
fn mount_fuse(path: &Path) -> io::Result<fs::File> {
    let device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")?;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        device.as_raw_fd()
    );
    let options = CString::new(options).unwrap();
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount(SOURCE_NAME, path, "fuse", flags, options.as_c_str())?;
    Ok(device)
}

#[tokio::test]
async fn hung_and_dead_fuse_mounts_are_detached_without_being_touched() {
    skip_without_mounts!("mount: hung FUSE");
    for dead in [false, true] {
        let scratch = Scratch::new();
        let (lost, again) = (scratch.target("lost"), scratch.target("again"));
        let source = scratch.state_dir().join("sources/00/mnt");
        let mut servers = Vec::new();
        for path in [&lost, &again, &source] {
            fs::create_dir_all(path).unwrap();
            match mount_fuse(path) {
                Ok(server) => servers.push(server),
                Err(err) => {
                    eprintln!("SKIP mount: hung FUSE: {err}");
                    return;
                }
            }
        }
        if dead {
            servers.clear();
            assert!(fs::metadata(&lost).is_err(), "the mount is not dead");
        }
        let started = tokio::task::spawn_blocking(move || {
            let (mounter, metrics) = (FakeMounter::new(), Metrics::new());
            let (table, recovered) = scratch.recover(&mounter, &metrics);
            (
                World {
                    table,
                    mounter,
                    metrics,
                    scratch,
                },
                recovered,
            )
        });
        let limit = Duration::from_secs(5);
        let (world, recovered) = timeout(limit, started).await.unwrap().unwrap();
        assert_eq!(recovered.stale_sources, 1);
        assert!(!source.exists());
        // Both without a record: known by their name alone.
        let published = world.publish("v", &again, "app");
        timeout(limit, published).await.unwrap().unwrap();
        assert_eq!(image_at(&again), "app");
        timeout(limit, world.unpublish("w", &lost)).await.unwrap();
        timeout(limit, world.unpublish("v", &again)).await.unwrap();
        assert!(!lost.exists());
        world.assert_nothing_is_left(&again);
    }
}

#[tokio::test]
async fn after_a_crash_sources_are_cleared_and_volumes_can_be_unpublished_or_published_again() {
    skip_without_mounts!("mount: recover");
    let world = World::new();
    let (again, gone, orphan) = (
        world.scratch.target("again"),
        world.scratch.target("gone"),
        world.scratch.target("orphan"),
    );
    world.publish("v1", &again, "app").await.unwrap();
    world.publish("v2", &gone, "other").await.unwrap();
    world.publish("v3", &orphan, "other").await.unwrap();
    unmount(&orphan, UnmountFlags::DETACH).unwrap();
    fs::remove_dir_all(orphan.parent().unwrap()).unwrap();
    let volumes = world.scratch.state_dir().join("volumes");
    disk::publish(&volumes.join("broken.json"), b"{").unwrap();
    disk::publish(&volumes.join("broken.json.1-2-3.tmp"), b"{").unwrap();

    let (world, recovered) = world.crash_and_recover();
    assert_eq!(
        recovered,
        Recovered {
            volumes: 2,
            dead_volumes: 2,
            orphans: 1,
            bad_records: 1,
            stale_sources: 2
        }
    );
    assert_eq!(world.scratch.names("sources"), [""; 0]);
    assert_eq!(
        world.scratch.mounted(),
        [Path::new("pods/again/mount"), Path::new("pods/gone/mount")]
    );
    assert_eq!(
        (world.metrics.mounts.get(), world.metrics.volumes.get()),
        (0, 0)
    );
    assert_eq!(world.metrics.dead_volumes.get(), 2);

    world.publish("v1", &again, "app").await.unwrap();
    assert_eq!(world.metrics.dead_volumes.get(), 1);
    assert_eq!(world.mounter.n_mounts(), 1);
    assert_eq!(
        MountInfo::read().unwrap().at(&again).count(),
        1,
        "the dead bind is still below"
    );
    assert_eq!(image_at(&again), "app");

    world.unpublish("v2", &gone).await;
    assert!(!gone.exists());
    assert_eq!(world.metrics.dead_volumes.get(), 0);
    world.unpublish("v1", &again).await;
    fs::remove_file(volumes.join("broken.json.bad")).unwrap();
    world.assert_nothing_is_left(&again);
}

#[tokio::test]
async fn a_pod_whose_volume_has_died_with_a_former_process_is_told_so() {
    skip_without_mounts!("mount: notices after a crash");
    let world = World::new();
    let (known, unknown) = (world.scratch.target("known"), world.scratch.target("not"));
    let mut request = publish_request("v1", &known, "app");
    request.image.pod = Some(Box::new(PodInfo {
        namespace: "team".to_owned(),
        name: "web-0".to_owned(),
        uid: "uid-1".to_owned(),
        service_account: "default".to_owned(),
        tokens: Secret::new(String::new()),
    }));
    world.table.publish(request).await.unwrap();
    world.publish("v2", &unknown, "app").await.unwrap();

    let (world, recovered) = world.crash_and_recover();
    assert_eq!(recovered.dead_volumes, 2);
    let told = world.table.take_pod_notices();
    let pod = PodRef {
        namespace: "team".to_owned(),
        name: "web-0".to_owned(),
        uid: "uid-1".to_owned(),
    };
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].reason, &told[0].pod), ("VolumeDead", &pod));
    world.unpublish("v1", &known).await;
    world.unpublish("v2", &unknown).await;
}

#[tokio::test]
async fn a_dead_volume_that_cannot_be_mounted_anew_is_kept_or_undone_as_the_error_says() {
    skip_without_mounts!("mount: failed republish");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    let (world, _) = world.crash_and_recover();
    world.mounter.fail("app", unavailable());
    let err = world.publish("v", &target, "app").await.unwrap_err();
    assert!(matches!(err, MountError::Unavailable { .. }), "{err:?}");
    assert_eq!(world.metrics.dead_volumes.get(), 1);
    assert_eq!(world.scratch.mounted(), [Path::new("pods/pod/mount")]);
    assert_eq!(world.scratch.names("volumes").len(), 1);
    world.mounter.fail("app", not_found());
    let err = world.publish("v", &target, "app").await.unwrap_err();
    assert!(matches!(err, MountError::ImageNotFound { .. }), "{err:?}");
    world.assert_nothing_is_left(&target);
    assert_eq!(world.metrics.dead_volumes.get(), 0);

    // A volume whose mount is gone, as after a reboot, is none that is dead.
    world.mounter.failures.lock().unwrap().clear();
    world.publish("v", &target, "app").await.unwrap();
    unmount(&target, UnmountFlags::DETACH).unwrap();
    let (world, recovered) = world.crash_and_recover();
    assert_eq!(
        (recovered.volumes, world.metrics.dead_volumes.get()),
        (1, 0)
    );
    world.unpublish("v", &target).await;

    // The same when the mount itself fails.
    world.publish("v", &target, "app").await.unwrap();
    let (world, _) = world.crash_and_recover();
    world.mounter.mount_fails.store(true, Ordering::SeqCst);
    let err = world.publish("v", &target, "app").await.unwrap_err();
    assert!(matches!(err, MountError::System { .. }), "{err:?}");
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn a_record_without_a_mount_gives_way_to_whatever_is_published_there() {
    skip_without_mounts!("mount: stale record");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    // One that is dead is still there, and its pod may have it open.
    let (world, _) = world.crash_and_recover();
    let err = world.publish("v", &target, "other").await.unwrap_err();
    assert!(matches!(err, MountError::AlreadyExists { .. }), "{err:?}");
    // As a reboot leaves it.
    unmount(&target, UnmountFlags::DETACH).unwrap();
    let (world, recovered) = world.crash_and_recover();
    assert_eq!((recovered.volumes, recovered.dead_volumes), (1, 0));
    world.mounter.fail("other", unavailable());
    let err = world.publish("v", &target, "other").await.unwrap_err();
    assert!(matches!(err, MountError::Unavailable { .. }), "{err:?}");
    world.mounter.failures.lock().unwrap().clear();
    for _ in 0..2 {
        world.publish("v", &target, "other").await.unwrap();
    }
    assert_eq!(image_at(&target), "other");
    assert_eq!(world.scratch.names("volumes").len(), 1);
    world.unpublish("v", &target).await;
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn a_record_that_went_bad_while_running_is_put_aside() {
    skip_without_mounts!("mount: bad record");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    let name = world.scratch.names("volumes").pop().unwrap();
    let path = world.scratch.state_dir().join("volumes").join(&name);
    disk::publish(&path, b"garbage").unwrap();
    world.unpublish("v", &target).await;
    assert_eq!(world.scratch.names("volumes"), [format!("{name}.bad")]);
    assert!(!target.exists());
    assert_eq!(world.scratch.mounted(), Vec::<std::path::PathBuf>::new());
}

#[tokio::test]
async fn two_processes_cannot_share_a_state_directory() {
    let world = World::new();
    let second = MountTable::recover(world.scratch.config(), FakeMounter::new(), &Metrics::new());
    let err = second.unwrap_err();
    let source = std::error::Error::source(&err).unwrap().to_string();
    assert!(
        source.starts_with("another clip-csi process uses this"),
        "{err}: {source}"
    );
    drop(world.table);
    let (_table, _) = world.scratch.recover(&FakeMounter::new(), &Metrics::new());
}
