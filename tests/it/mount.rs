//! The mount table with real mounts: what is published, shared, undone, and found again.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "mount/kernel.rs"]
mod kernel;
#[path = "mount/preparations.rs"]
mod preparations;
#[path = "mount/recovery.rs"]
mod recovery;
#[path = "mount/views.rs"]
mod views;

use std::{fs, io, path::Path, sync::atomic::Ordering};

use clip_csi::{
    disk,
    metrics::Metrics,
    mount::{MountError, MountInfo, MountTable, PrepareError, PullCredentials, Recovered},
    secret::Secret,
    tier::SourceError,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

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
                dead_volumes: 0,
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
    // With the rights of each that came later, too, what it lacks is fetched.
    let shared = world.mounter.shared.lock().unwrap().clone();
    assert_eq!(shared, [manifest("app"); 2]);
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
            MountError::Invalid { ref field, .. } if field == "target_path"
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

fn device_at(path: &Path) -> clip_csi::mount::Device {
    MountInfo::read().unwrap().at(path).last().unwrap().device
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

#[tokio::test]
async fn a_publish_that_is_repeated_with_other_credentials_renews_them_and_mounts_nothing() {
    skip_without_mounts!("mount: renew");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.publish("vol", &target, "app").await.unwrap();
    let before = world.scratch.mounted();
    let request = |password: &str| {
        let mut request = publish_request("vol", &target, "app");
        request.image.credentials = PullCredentials::Basic {
            username: "u".to_owned(),
            password: Secret::new(password.to_owned()),
        };
        request
    };
    let n_renewed = || world.mounter.renewed.lock().unwrap().len();
    for (password, expected) in [("first", 1), ("first", 1), ("second", 2)] {
        world.table.publish(request(password)).await.unwrap();
        assert_eq!(n_renewed(), expected, "{password}");
    }
    let (of, renewed) = world.mounter.renewed.lock().unwrap()[1].clone();
    assert_eq!(of, manifest("app"));
    assert_eq!(renewed, request("second").image);
    // What goes wrong with it is nothing that the pod must see.
    let refused = PrepareError::Internal {
        reason: "no agent".to_owned(),
    };
    world.mounter.fail("app", refused);
    world.table.publish(request("third")).await.unwrap();
    assert_eq!(n_renewed(), 3);
    // The image was prepared and mounted once.
    assert_eq!(world.mounter.n_prepared(), 1);
    assert_eq!(world.scratch.mounted(), before);
    assert_eq!(image_at(&target), "app");
    world.unpublish("vol", &target).await;
    world.assert_nothing_is_left(&target);
}
