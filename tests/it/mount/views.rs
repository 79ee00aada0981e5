//! What of an image is seen, what is written over it, and what is said of it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use clip_csi::mount::{
    MountError, MountInfo, PublishRequest, Sharing, Space, SubPath, View, VolumeStats, Writable,
};

use super::World;
use crate::mount_fixture::{USAGE, publish_request, skip_without_mounts};

const MIB: u64 = 1 << 20;

fn seen(volume: &str, target: &Path, path: &str) -> PublishRequest {
    PublishRequest {
        view: View {
            path: Some(SubPath::parse(path).unwrap()),
            writable: None,
        },
        ..publish_request(volume, target, "app")
    }
}

fn written(volume: &str, target: &Path, bytes: u64) -> PublishRequest {
    allowed(volume, target, Some(bytes), bytes)
}

/// On a node that allows so much.
fn allowed(volume: &str, target: &Path, size_bytes: Option<u64>, max_bytes: u64) -> PublishRequest {
    PublishRequest {
        view: View {
            path: None,
            writable: Some(Writable {
                size_bytes,
                max_bytes,
            }),
        },
        ..publish_request(volume, target, "app")
    }
}

impl World {
    async fn stats(&self, volume: &str, path: &Path) -> Result<VolumeStats, MountError> {
        self.table.stats(volume, path.to_str().unwrap()).await
    }

    fn options_at(&self, target: &Path) -> String {
        let info = MountInfo::read().unwrap();
        info.at(target).last().unwrap().options.clone()
    }
}

#[tokio::test]
async fn a_directory_of_the_image_is_all_that_is_seen() {
    skip_without_mounts!("mount: path");
    let world = World::new();
    let target = world.scratch.target("pod");
    for _ in 0..3 {
        world
            .table
            .publish(seen("v", &target, "usr/share"))
            .await
            .unwrap();
    }
    let names: Vec<_> = fs::read_dir(&target)
        .unwrap()
        .map(|it| it.unwrap().file_name())
        .collect();
    assert_eq!(names, ["words"]);
    assert!(world.options_at(&target).starts_with("ro,nosuid,nodev"));
    let err = fs::File::create(target.join("x")).unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::ReadOnlyFilesystem);
    // Another view is another volume.
    for other in [
        seen("v", &target, "usr"),
        publish_request("v", &target, "app"),
    ] {
        let err = world.table.publish(other).await.unwrap_err();
        assert!(matches!(err, MountError::AlreadyExists { .. }), "{err}");
    }
    // Both views are of one source.
    let whole = world.scratch.target("whole");
    world.publish("w", &whole, "app").await.unwrap();
    assert_eq!(world.mounter.n_mounts(), 1);
    world.unpublish("w", &whole).await;
    world.unpublish("v", &target).await;
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn what_the_image_does_not_have_is_refused_and_nothing_stays() {
    skip_without_mounts!("mount: bad path");
    let world = World::new();
    let target = world.scratch.target("pod");
    for (path, want) in [
        ("usr/lib", "path: the image has no directory \"usr/lib\""),
        (
            "image",
            "path: \"image\" is not a directory of the image: to see a file, use the container's subPath",
        ),
        (
            "out",
            "path: \"out\" leads through a symbolic link of the image, which is not followed: give the path that it leads to",
        ),
        (
            "out/etc",
            "path: \"out/etc\" leads through a symbolic link of the image, which is not followed: give the path that it leads to",
        ),
    ] {
        let err = world
            .table
            .publish(seen("v", &target, path))
            .await
            .unwrap_err();
        assert_eq!(err.to_string(), want);
        assert!(!err.is_transient());
        world.assert_nothing_is_left(&target);
    }
}

#[tokio::test]
async fn what_is_written_is_the_volumes_alone_and_ends_with_it() {
    skip_without_mounts!("mount: writable");
    let world = World::new();
    let (one, two) = (world.scratch.target("one"), world.scratch.target("two"));
    for _ in 0..2 {
        world.table.publish(written("v1", &one, MIB)).await.unwrap();
    }
    world.table.publish(written("v2", &two, MIB)).await.unwrap();
    assert_eq!(world.mounter.n_mounts(), 1);
    assert!(world.options_at(&one).starts_with("rw,nosuid,nodev"));
    // What is in the image can be changed and removed, and more be added.
    write(&one.join("image"), b"changed").unwrap();
    fs::remove_file(one.join("usr/share/words")).unwrap();
    fs::rename(one.join("usr"), one.join("moved")).unwrap();
    write(&one.join("new"), b"new").unwrap();
    assert_eq!(fs::read_to_string(one.join("image")).unwrap(), "changed");
    assert_eq!(fs::read_to_string(two.join("image")).unwrap(), "app");
    assert!(two.join("usr/share/words").exists() && !two.join("new").exists());
    // Neither the layer nor a directory for it is left about.
    let below: Vec<PathBuf> = world.scratch.mounted();
    assert!(
        below.iter().all(|it| !it.starts_with("state/writable")),
        "{below:?}"
    );
    assert_eq!(world.scratch.names("writable"), Vec::<String>::new());
    world.unpublish("v1", &one).await;
    world.table.publish(written("v1", &one, MIB)).await.unwrap();
    assert_eq!(fs::read_to_string(one.join("image")).unwrap(), "app");
    assert!(!one.join("new").exists());
    world.unpublish("v1", &one).await;
    world.unpublish("v2", &two).await;
    world.assert_nothing_is_left(&one);
}

#[tokio::test]
async fn no_more_is_written_than_the_volume_allows() {
    skip_without_mounts!("mount: full writable");
    let world = World::new();
    let target = world.scratch.target("pod");
    world
        .table
        .publish(written("v", &target, MIB))
        .await
        .unwrap();
    let stats = world.stats("v", &target).await.unwrap();
    assert_eq!((stats.bytes.total, stats.bytes.used), (MIB, 0));
    let err = write(&target.join("big"), &vec![1; 2 << 20]).unwrap_err();
    assert_eq!(err.kind(), io::ErrorKind::StorageFull);
    let stats = world.stats("v", &target).await.unwrap();
    assert_eq!((stats.bytes.used, stats.bytes.available), (MIB, 0));
    fs::remove_file(target.join("big")).unwrap();
    let err = (0..)
        .find_map(|number| fs::File::create(target.join(format!("{number}"))).err())
        .unwrap();
    assert_eq!(err.kind(), io::ErrorKind::StorageFull);
    let stats = world.stats("v", &target).await.unwrap();
    assert_eq!((stats.inodes.total, stats.inodes.available), (1024, 0));
    world.unpublish("v", &target).await;
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn a_volume_that_is_there_keeps_what_it_was_allowed_whatever_the_node_allows_now() {
    skip_without_mounts!("mount: another node.max_writable_bytes");
    let world = World::new();
    let target = world.scratch.target("pod");
    for size_bytes in [None, Some(MIB)] {
        let request = |max_bytes| allowed("v", &target, size_bytes, max_bytes);
        world.table.publish(request(MIB)).await.unwrap();
        write(&target.join("new"), b"new").unwrap();
        for max_bytes in [2 * MIB, MIB / 2, 0] {
            world.table.publish(request(max_bytes)).await.unwrap();
            let stats = world.stats("v", &target).await.unwrap();
            assert_eq!(stats.bytes.total, MIB);
            assert!(target.join("new").exists());
        }
        // One that has died is made anew, and only as the node allows it now.
        world.mounter.alive.store(false, Ordering::SeqCst);
        let err = world.table.publish(request(0)).await.unwrap_err();
        let want =
            "writable: is not allowed on this node: its operator sets node.max_writable_bytes";
        assert_eq!(err.to_string(), want);
        world.mounter.alive.store(true, Ordering::SeqCst);
        world.assert_nothing_is_left(&target);
    }
}

#[tokio::test]
async fn a_writable_volume_that_an_earlier_release_published_is_known() {
    skip_without_mounts!("mount: a writable volume's old record");
    let world = World::new();
    let target = world.scratch.target("pod");
    // It wrote down what the node allowed as if it had been asked for.
    let former = allowed("v", &target, Some(MIB), MIB);
    world.table.publish(former).await.unwrap();
    let n_prepared = world.mounter.n_prepared();
    let same = allowed("v", &target, None, MIB);
    world.table.publish(same).await.unwrap();
    assert_eq!(world.mounter.n_prepared(), n_prepared);
    let other = allowed("v", &target, Some(MIB / 2), MIB);
    let err = world.table.publish(other).await.unwrap_err();
    assert!(matches!(err, MountError::AlreadyExists { .. }), "{err}");
    world.unpublish("v", &target).await;
}

#[tokio::test]
async fn a_writable_volume_whose_source_died_is_mounted_anew() {
    skip_without_mounts!("mount: writable over a dead source");
    let world = World::new();
    let target = world.scratch.target("pod");
    world
        .table
        .publish(written("v", &target, MIB))
        .await
        .unwrap();
    write(&target.join("new"), b"new").unwrap();
    world.mounter.alive.store(false, Ordering::SeqCst);
    world
        .table
        .publish(written("v", &target, MIB))
        .await
        .unwrap();
    world.mounter.alive.store(true, Ordering::SeqCst);
    assert_eq!(world.mounter.n_mounts(), 2);
    assert!(!target.join("new").exists());
    assert_eq!(fs::read_to_string(target.join("image")).unwrap(), "app");
    world.unpublish("v", &target).await;
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn an_unfinished_writable_layer_is_cleared_at_the_next_start() {
    skip_without_mounts!("mount: unfinished writable");
    let world = World::new();
    let staging = world.scratch.state_dir().join("writable/unfinished");
    fs::create_dir(&staging).unwrap();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("none", &staging, "tmpfs", flags, None).unwrap();
    let World {
        table,
        mounter,
        metrics,
        scratch,
    } = world;
    drop(table);
    let (_table, _) = scratch.recover(&mounter, &metrics);
    assert_eq!(scratch.mounted(), Vec::<PathBuf>::new());
    assert_eq!(scratch.names("writable"), Vec::<String>::new());
}

#[tokio::test]
async fn a_volume_for_one_pod_is_at_one_target() {
    skip_without_mounts!("mount: one target");
    let world = World::new();
    let (one, two) = (world.scratch.target("one"), world.scratch.target("two"));
    let exclusive = |target: &Path| PublishRequest {
        sharing: Sharing::One,
        ..publish_request("v", target, "app")
    };
    for _ in 0..2 {
        world.table.publish(exclusive(&one)).await.unwrap();
    }
    let err = world.table.publish(exclusive(&two)).await.unwrap_err();
    let want = format!(
        "volume v may be used by one pod, and is published at {} already",
        one.display()
    );
    assert_eq!(err.to_string(), want);
    assert!(!two.exists());
    world.unpublish("v", &one).await;
    world.table.publish(exclusive(&two)).await.unwrap();
    world.unpublish("v", &two).await;
    world.assert_nothing_is_left(&two);
}

#[tokio::test]
async fn how_much_an_image_holds_is_known_without_a_look_at_it() {
    skip_without_mounts!("mount: stats");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    let full = |used| Space {
        total: used,
        used,
        available: 0,
    };
    let want = VolumeStats {
        bytes: full(USAGE.bytes),
        inodes: full(USAGE.inodes),
    };
    assert_eq!(world.stats("v", &target).await.unwrap(), want);
    // Whether it is alive or not: nothing is asked of it.
    world.mounter.alive.store(false, Ordering::SeqCst);
    assert_eq!(world.stats("v", &target).await.unwrap(), want);
    world.mounter.alive.store(true, Ordering::SeqCst);
    for (volume, path, wanted) in [
        ("w", target.as_path(), "not found"),
        ("v", Path::new("/elsewhere"), "not found"),
        ("v", Path::new("some/path"), "not found"),
        ("", target.as_path(), "invalid"),
        ("v", Path::new(""), "invalid"),
    ] {
        let found = match world.stats(volume, path).await.unwrap_err() {
            MountError::VolumeNotFound { .. } => "not found",
            MountError::Invalid { .. } => "invalid",
            other => panic!("{other}"),
        };
        assert_eq!(found, wanted, "{volume:?} at {}", path.display());
    }
    world.unpublish("v", &target).await;
    let err = world.stats("v", &target).await.unwrap_err();
    assert!(matches!(err, MountError::VolumeNotFound { .. }), "{err}");
}

#[tokio::test]
async fn a_record_of_an_earlier_release_is_measured_by_the_kernel() {
    skip_without_mounts!("mount: stats of an old record");
    let world = World::new();
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    let [name] = world.scratch.names("volumes").try_into().unwrap();
    let record = world.scratch.state_dir().join("volumes").join(name);
    let text = fs::read_to_string(&record).unwrap();
    let old = text
        .replace("\"version\":2", "\"version\":1")
        .replace(",\"usage\":{\"bytes\":5000,\"inodes\":7}", "");
    assert_ne!(old, text);
    clip_csi::disk::publish(&record, old.as_bytes()).unwrap();
    let stats = world.stats("v", &target).await.unwrap();
    // The fake's source is a tmpfs, which has some blocks and not five thousand bytes.
    assert!(0 < stats.bytes.used && stats.bytes.used != USAGE.bytes);
    world.unpublish("v", &target).await;
}

/// The driver's own writes are atomic; these are a pod's.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use io::Write as _;
    fs::File::create(path)?.write_all(bytes)
}
