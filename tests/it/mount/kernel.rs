//! Images that are whole on disk, which the kernel serves alone.

use std::{fs, path::Path, sync::atomic::Ordering};

use clip_csi::mount::{MountInfo, Recovered};

use super::{World, image_at};
use crate::mount_fixture::{manifest, skip_without_mounts};

/// Returns from the test, saying so, where the kernel cannot.
macro_rules! skip_without_erofs {
    ($name:literal) => {
        skip_without_mounts!($name);
        if let Some(reason) = erofs_refused() {
            eprintln!("SKIP {}: {reason}", $name);
            return;
        }
    };
}

fn erofs_refused() -> Option<String> {
    let world = World::new();
    let dir = world.scratch.path().join("try");
    let files = world.scratch.path().join("files");
    fs::create_dir(&dir).unwrap();
    fs::create_dir(&files).unwrap();
    let mounted = crate::erofs::mount_at(&dir, &files, vec![Default::default()]);
    mounted.err().map(|it| it.to_string())
}

fn fs_type(target: &Path) -> String {
    let info = MountInfo::read().unwrap();
    info.at(target).last().unwrap().fs_type.clone()
}

fn whole(world: &World) {
    world.mounter.is_whole.store(true, Ordering::SeqCst);
}

#[tokio::test]
async fn an_image_that_is_whole_is_mounted_once_and_goes_with_its_last_volume() {
    skip_without_erofs!("kernel: publish");
    let world = World::new();
    whole(&world);
    let (a, b) = (world.scratch.target("a"), world.scratch.target("b"));
    world.publish("v", &a, "app").await.unwrap();
    world.publish("w", &b, "app").await.unwrap();
    for target in [&a, &b] {
        assert_eq!(
            (image_at(target), fs_type(target)),
            ("app".into(), "erofs".into())
        );
    }
    let n_mounts = world.mounter.n_kernel_mounts.load(Ordering::SeqCst);
    assert_eq!((n_mounts, world.mounter.n_mounts()), (1, 0));
    assert_eq!(world.metrics.kernel_mounts.get(), 1);
    // There may be no room any more for images that cannot be evicted, but this one is there.
    world.mounter.is_whole.store(false, Ordering::SeqCst);
    let c = world.scratch.target("c");
    world.publish("x", &c, "app").await.unwrap();
    assert_eq!(fs_type(&c), "erofs");
    world.unpublish("x", &c).await;
    // Again: it is found.
    world.publish("v", &a, "app").await.unwrap();
    world.unpublish("v", &a).await;
    assert_eq!(image_at(&b), "app");
    world.unpublish("w", &b).await;
    world.assert_nothing_is_left(&b);
    assert_eq!(world.metrics.kernel_mounts.get(), 0);
}

#[tokio::test]
async fn who_comes_when_an_image_has_become_whole_is_given_the_other_mount() {
    skip_without_erofs!("kernel: both");
    let world = World::new();
    let (a, b) = (world.scratch.target("a"), world.scratch.target("b"));
    world.publish("v", &a, "app").await.unwrap();
    whole(&world);
    world.publish("w", &b, "app").await.unwrap();
    assert_eq!((fs_type(&a), fs_type(&b)), ("tmpfs".into(), "erofs".into()));
    assert_eq!(
        (
            world.metrics.mounts.get(),
            world.metrics.kernel_mounts.get()
        ),
        (2, 1)
    );
    // Each is found again where it is, and goes without the other.
    world.publish("v", &a, "app").await.unwrap();
    assert_eq!(fs_type(&a), "tmpfs");
    world.unpublish("w", &b).await;
    assert_eq!(
        world
            .scratch
            .names(&format!("sources/{}", manifest("app").hex())),
        ["mnt"]
    );
    assert_eq!(image_at(&a), "app");
    world.unpublish("v", &a).await;
    world.assert_nothing_is_left(&a);
}

#[tokio::test]
async fn an_image_that_cannot_be_mounted_so_is_served() {
    skip_without_mounts!("kernel: refused");
    let world = World::new();
    whole(&world);
    world.mounter.kernel_fails.store(true, Ordering::SeqCst);
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    assert_eq!(
        (image_at(&target), fs_type(&target)),
        ("app".into(), "tmpfs".into())
    );
    assert_eq!(
        (
            world.metrics.mounts.get(),
            world.metrics.kernel_mounts.get()
        ),
        (1, 0)
    );
    world.unpublish("v", &target).await;
    world.assert_nothing_is_left(&target);
}

#[tokio::test]
async fn a_mount_of_the_kernel_outlives_the_process_that_made_it() {
    skip_without_erofs!("kernel: recovery");
    let world = World::new();
    whole(&world);
    let (a, b) = (world.scratch.target("a"), world.scratch.target("b"));
    world.publish("v", &a, "app").await.unwrap();
    // What a process leaves that dies while it mounts.
    let own = world
        .scratch
        .state_dir()
        .join("sources")
        .join(manifest("other").hex());
    fs::create_dir_all(own.join("kernel")).unwrap();
    fs::File::create(own.join("clip-csi")).unwrap();
    let (world, recovered) = world.crash_and_recover();
    let expected = Recovered {
        volumes: 1,
        dead_volumes: 0,
        orphans: 0,
        bad_records: 0,
        stale_sources: 0,
    };
    assert_eq!(recovered, expected);
    assert_eq!(world.scratch.names("sources"), [manifest("app").hex()]);
    assert_eq!(image_at(&a), "app");
    assert_eq!(
        (
            world.metrics.volumes.get(),
            world.metrics.kernel_mounts.get()
        ),
        (1, 1)
    );
    // It is the volume's still, and the next one's as well.
    whole(&world);
    world.publish("v", &a, "app").await.unwrap();
    world.publish("w", &b, "app").await.unwrap();
    assert_eq!(world.mounter.n_kernel_mounts.load(Ordering::SeqCst), 0);
    world.unpublish("v", &a).await;
    world.unpublish("w", &b).await;
    world.assert_nothing_is_left(&a);
}

#[tokio::test]
async fn a_volume_whose_record_is_lost_is_known_as_the_drivers() {
    skip_without_erofs!("kernel: no record");
    let world = World::new();
    whole(&world);
    let target = world.scratch.target("pod");
    world.publish("v", &target, "app").await.unwrap();
    for name in world.scratch.names("volumes") {
        fs::remove_file(world.scratch.state_dir().join("volumes").join(name)).unwrap();
    }
    let (world, recovered) = world.crash_and_recover();
    assert_eq!(recovered.volumes, 0);
    world.unpublish("v", &target).await;
    assert!(!target.exists());
    // Nobody uses it any more.
    world.table.look_after();
    world.assert_nothing_is_left(&target);
}
