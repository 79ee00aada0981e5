//! The mount table with real mounts: what is published, shared, undone, and found again.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{
    ffi::CString, fs, io, os::fd::AsRawFd, path::Path, sync::atomic::Ordering, time::Duration,
};

use clip_csi::{
    disk,
    metrics::Metrics,
    mount::{
        MountError, MountInfo, MountTable, PrepareError, PullCredentials, Recovered, SOURCE_NAME,
    },
    secret::Secret,
    tier::SourceError,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::time::timeout;

use crate::mount_fixture::{
    FakeMounter, Scratch, manifest, publish_request, skip_without_mounts, unpublish_request,
};

/// One table in one directory.
struct World {
    // Dropped in this order: the table unmounts, the directory sees that all is gone.
    table: MountTable,
    mounter: std::sync::Arc<FakeMounter>,
    metrics: Metrics,
    scratch: Scratch,
}

impl World {
    fn new() -> Self {
        let scratch = Scratch::new();
        let mounter = FakeMounter::new();
        let metrics = Metrics::new();
        let (table, recovered) = scratch.recover(&mounter, &metrics);
        assert_eq!(
            recovered,
            Recovered {
                volumes: 0,
                orphans: 0,
                bad_records: 0,
                stale_sources: 0
            }
        );
        Self {
            table,
            mounter,
            metrics,
            scratch,
        }
    }

    async fn publish(&self, volume: &str, target: &Path, image: &str) -> Result<(), MountError> {
        self.table
            .publish(publish_request(volume, target, image))
            .await
    }

    async fn unpublish(&self, volume: &str, target: &Path) {
        self.table
            .unpublish(unpublish_request(volume, target))
            .await
            .unwrap();
    }

    /// Ends the process without unmounting, and starts the next.
    fn crash_and_recover(self) -> (Self, Recovered) {
        let Self {
            table,
            mounter,
            metrics,
            scratch,
        } = self;
        mounter.crashed.store(true, Ordering::SeqCst);
        drop((table, metrics));
        let (mounter, metrics) = (FakeMounter::new(), Metrics::new());
        let (table, recovered) = scratch.recover(&mounter, &metrics);
        (
            Self {
                table,
                mounter,
                metrics,
                scratch,
            },
            recovered,
        )
    }

    fn assert_nothing_is_left(&self, target: &Path) {
        assert!(!target.exists(), "{} is left", target.display());
        assert_eq!(self.scratch.mounted(), Vec::<std::path::PathBuf>::new());
        assert_eq!(self.scratch.names("volumes"), [""; 0]);
        assert_eq!(self.scratch.names("sources"), [""; 0]);
        assert_eq!(
            (self.metrics.mounts.get(), self.metrics.volumes.get()),
            (0, 0)
        );
    }
}

fn image_at(target: &Path) -> String {
    fs::read_to_string(target.join("image")).unwrap()
}

fn not_found() -> SourceError {
    SourceError::NotFound {
        what: "image".to_owned(),
        registry: "r".to_owned(),
    }
}

fn unavailable() -> SourceError {
    SourceError::Unavailable {
        registry: "r".to_owned(),
        reason: "down".to_owned(),
    }
}

#[tokio::test]
async fn a_published_image_is_seen_read_only_and_goes_with_its_unpublish() {
    skip_without_mounts!("mount: publish");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    assert_eq!(image_at(&target), "app");
    let err = fs::File::create(target.join("new")).unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let info = MountInfo::read().unwrap();
    let options = &info.at(&target).last().unwrap().options;
    for option in ["ro", "nosuid", "nodev"] {
        assert!(
            options.split(',').any(|it| it == option),
            "{option} is not in {options}"
        );
    }
    assert!(!options.split(',').any(|it| it == "noexec"), "{options}");
    assert_eq!(
        (world.metrics.mounts.get(), world.metrics.volumes.get()),
        (1, 1)
    );
    assert_eq!(world.scratch.names("sources"), [manifest("app").hex()]);
    world.unpublish("v", &target).await;
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn publishing_again_changes_nothing_and_asks_nobody() {
    skip_without_mounts!("mount: idempotency");
    let world = World::new();
    let target = world.scratch.target("pod");
    for _ in 0..3 {
        world.publish("v", &target, "app").await.unwrap();
    }
    assert_eq!(
        (world.mounter.n_prepared(), world.mounter.n_mounts()),
        (1, 1)
    );
    assert_eq!(world.scratch.mounted().len(), 2);
    assert_eq!(world.metrics.volumes.get(), 1);
    for _ in 0..3 {
        world.unpublish("v", &target).await;
    }
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn other_attributes_at_the_same_target_are_refused_and_the_mount_stays() {
    skip_without_mounts!("mount: other attributes");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    let err = world.publish("v", &target, "other").await.unwrap_err();
    assert!(matches!(err, MountError::AlreadyExists { .. }), "{err:?}");
    let mut request = publish_request("v", &target, "app");
    request.image.platform = Some("linux/arm64".to_owned());
    let err = world.table.publish(request).await.unwrap_err();
    assert!(matches!(err, MountError::AlreadyExists { .. }), "{err:?}");
    let mut renewed = publish_request("v", &target, "app");
    renewed.image.credentials = PullCredentials::Basic {
        username: "u".to_owned(),
        password: Secret::new("renewed".to_owned()),
    };
    world.table.publish(renewed).await.unwrap();
    assert_eq!(image_at(&target), "app");
    assert_eq!(world.mounter.n_prepared(), 1);
}

#[tokio::test]
async fn targets_of_one_image_share_a_source_and_the_last_one_takes_it_with_it() {
    skip_without_mounts!("mount: shared source");
    let world = World::new();
    let (one, two, other) = (
        world.scratch.target("one"),
        world.scratch.target("two"),
        world.scratch.target("other"),
    );
    world.publish("v1", &one, "app").await.unwrap();
    world.publish("v2", &two, "app").await.unwrap();
    world.publish("v1", &other, "app").await.unwrap();
    world
        .publish("v3", &world.scratch.target("third"), "third")
        .await
        .unwrap();
    assert_eq!(world.mounter.n_mounts(), 2);
    assert_eq!(
        (world.metrics.mounts.get(), world.metrics.volumes.get()),
        (2, 4)
    );
    world.unpublish("v1", &one).await;
    assert!(!one.exists());
    world.unpublish("v1", &other).await;
    assert_eq!(image_at(&two), "app");
    assert_eq!(world.metrics.mounts.get(), 2);
    world.unpublish("v2", &two).await;
    assert_eq!(world.scratch.names("sources"), [manifest("third").hex()]);
    world.unpublish("v3", &world.scratch.target("third")).await;
    world.assert_nothing_is_left(&two);
}

#[tokio::test]
async fn concurrent_publishes_of_one_image_mount_it_once() {
    skip_without_mounts!("mount: concurrent publishes");
    let world = World::new();
    let targets: Vec<_> = (0..8)
        .map(|n| world.scratch.target(&format!("pod-{n}")))
        .collect();
    let volumes: Vec<_> = (0..8).map(|n| format!("v{n}")).collect();
    let all = || volumes.iter().zip(&targets);
    let published =
        futures_util::future::join_all(all().map(|(it, target)| world.publish(it, target, "app")));
    assert!(published.await.into_iter().all(|it| it.is_ok()));
    assert_eq!(world.mounter.n_mounts(), 1);
    futures_util::future::join_all(all().map(|(it, target)| world.unpublish(it, target))).await;
    world.assert_nothing_is_left(&targets[0]);
}

#[tokio::test]
async fn a_failed_publish_leaves_nothing() {
    skip_without_mounts!("mount: undo");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.mounter.fail("missing", not_found());
    let err = world.publish("v", &target, "missing").await.unwrap_err();
    assert!(matches!(err, MountError::ImageNotFound { .. }), "{err:?}");
    world.assert_nothing_is_left(&target);

    world.mounter.mount_fails.store(true, Ordering::SeqCst);
    let err = world.publish("v", &target, "app").await.unwrap_err();
    assert!(matches!(err, MountError::System { .. }), "{err:?}");
    world.assert_nothing_is_left(&target);
    world.mounter.mount_fails.store(false, Ordering::SeqCst);

    // The record cannot be written.
    world.publish("v", &target, "app").await.unwrap();
    let record = world.scratch.names("volumes").pop().unwrap();
    world.unpublish("v", &target).await;
    let volumes = world.scratch.state_dir().join("volumes");
    fs::remove_dir(&volumes).unwrap();
    let err = world.publish("v", &target, "app").await.unwrap_err();
    assert!(matches!(err, MountError::System { .. }), "{err:?}");
    fs::create_dir(&volumes).unwrap();
    world.assert_nothing_is_left(&target);

    // And then it works, under the same name.
    world.publish("v", &target, "app").await.unwrap();
    assert_eq!(world.scratch.names("volumes"), [record]);
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
async fn unpublish_of_what_is_not_there_succeeds() {
    let world = World::new();
    let target = world.scratch.target("pod");
    world.unpublish("unknown", &target).await;
    world
        .unpublish("unknown", Path::new("/no/such/parent/mount"))
        .await;
    fs::create_dir(&target).unwrap();
    world.unpublish("unknown", &target).await;
    assert!(!target.exists(), "the empty directory is left");
    fs::create_dir(&target).unwrap();
    disk::publish(&target.join("file"), b"data").unwrap();
    world.unpublish("unknown", &target).await;
    assert_eq!(fs::read(target.join("file")).unwrap(), b"data");
}

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
    request.image.credentials = PullCredentials::DockerConfig(Secret::new(b"{}".to_vec()));
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
async fn a_target_that_is_not_ours_is_refused_and_left_alone() {
    skip_without_mounts!("mount: foreign target");
    let world = World::new();
    let foreign = |outcome: Result<(), MountError>| match outcome {
        Err(MountError::Foreign { path, .. }) => path,
        other => panic!("{other:?}"),
    };
    let mounted = world.scratch.target("mounted");
    fs::create_dir(&mounted).unwrap();
    mount("none", &mounted, "tmpfs", MountFlags::empty(), None).unwrap();
    assert_eq!(foreign(world.publish("v", &mounted, "app").await), mounted);
    world.unpublish("v", &mounted).await;
    assert_eq!(world.scratch.mounted(), [Path::new("pods/mounted/mount")]);
    unmount(&mounted, UnmountFlags::DETACH).unwrap();

    let link = world.scratch.target("link");
    std::os::unix::fs::symlink("/etc", &link).unwrap();
    assert_eq!(foreign(world.publish("v", &link, "app").await), link);

    let full = world.scratch.target("full");
    fs::create_dir_all(full.join("files")).unwrap();
    assert_eq!(foreign(world.publish("v", &full, "app").await), full);

    let used = world.scratch.target("used");
    world.publish("v", &used, "app").await.unwrap();
    assert_eq!(foreign(world.publish("w", &used, "app").await), used);
    world.unpublish("w", &used).await;
    assert_eq!(image_at(&used), "app");

    let err = world
        .publish("v", Path::new("/no/such/parent/mount"), "app")
        .await
        .unwrap_err();
    assert!(
        matches!(
            err,
            MountError::Invalid {
                field: "target_path",
                ..
            }
        ),
        "{err:?}"
    );
    assert_eq!(
        world.mounter.n_prepared(),
        1,
        "work was done for a target that is refused"
    );
}

#[tokio::test]
async fn a_target_below_a_linked_directory_is_published_once() {
    skip_without_mounts!("mount: linked kubelet directory");
    let world = World::new();
    world.scratch.target("pod");
    let link = world.scratch.path().join("kubelet");
    std::os::unix::fs::symlink(world.scratch.path().join("pods"), &link).unwrap();
    let target = link.join("pod/mount");
    world.publish("v", &target, "app").await.unwrap();
    world.publish("v", &target, "app").await.unwrap();
    assert_eq!(world.scratch.mounted().len(), 2);
    world.unpublish("v", &target).await;
    world.assert_nothing_is_left(&target);
}

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

fn device_at(path: &Path) -> clip_csi::mount::Device {
    MountInfo::read().unwrap().at(path).last().unwrap().device
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

#[test]
fn the_wait_ends_before_kubelet_gives_up() {
    let kubelet = std::time::Duration::from_secs(120);
    assert!(clip_csi::mount::MountTableConfig::PREPARE_WAIT < kubelet);
}

#[test]
fn every_cause_is_sorted() {
    let sorted = MountError::of_image("i", PrepareError::Source(unavailable()));
    assert!(sorted.is_transient());
    let sorted = MountError::of_image("i", PrepareError::Source(not_found()));
    assert!(!sorted.is_transient());
}
