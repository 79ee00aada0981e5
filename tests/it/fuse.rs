//! A real mount of an image in memory: what the kernel shows, and how reads wait and fail.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "fuse/through.rs"]
mod through;
#[path = "fuse/tree.rs"]
mod tree;

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use clip_csi::{
    fuse::{
        pool::{PoolConfig, ReadPool},
        session::{FuseMount, Unmounted, make_mount},
        takeover,
    },
    index::image::ImageIndex,
    metrics::Metrics,
    sys::{self, MappedFile},
    tar::TarKind,
};
use rustix::{fs::lgetxattr, mount::UnmountFlags};

use crate::fuse_fakes::{
    DEADLINE, LayerText, Mode, Mounted, build, mount_image, mount_index, noise, within_deadline,
};

/// Bytes of the file that spans several chunks.
const BIG: usize = 5_000_003;

/// A layer with one file, `big`.
fn big_file(seed: u64) -> (LayerText, Vec<u8>) {
    let content = noise(BIG, seed);
    let mut layer = LayerText::default();
    layer.file("big", &content);
    (layer, content)
}

fn errno(result: io::Result<impl Sized>) -> Option<i32> {
    result.err().and_then(|it| it.raw_os_error())
}

/// Asks again until it is so.
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until a request of this kind has reached the provider of a layer.
fn await_request(mounted: &Mounted, layer: usize) {
    let asked = &mounted.layers[layer].n_requests;
    eventually("the provider was asked", || 0 < *asked.lock().unwrap());
}

#[test]
fn a_failed_fetch_is_eio_once_and_not_for_ever() {
    let (layer, content) = big_file(1);
    let Some(mounted) = mount_image("a_failed_fetch_is_eio_once", vec![layer]) else {
        return;
    };
    mounted.layers[0].set_mode(Mode::Fail);
    let mut buf = [0; 100];
    let file = File::open(mounted.path("big")).unwrap();
    for _ in 0..2 {
        assert_eq!(errno(file.read_at(&mut buf, 10)), Some(libc::EIO));
    }
    assert!(2 <= mounted.n_requests("read", "error"));
    mounted.layers[0].set_mode(Mode::Fill);
    assert_eq!(file.read_at(&mut buf, 10).unwrap(), 100);
    assert_eq!(buf, content[10..110]);
    assert!(fs::read(mounted.path("big")).unwrap() == content);
}

#[test]
fn chunks_that_vanish_again_and_again_are_lent() {
    let (layer, content) = big_file(1);
    let Some(mounted) = mount_image("chunks_that_vanish_again_and_again_are_lent", vec![layer])
    else {
        return;
    };
    let layer = &mounted.layers[0];
    layer.set_mode(Mode::Vanish);
    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(mounted.path("big"))
        .unwrap();
    let mut buf = [0; 4096];
    assert_eq!(direct.read_at(&mut buf, 0).unwrap(), 4096);
    assert_eq!(buf, content[..4096]);
    assert_eq!(*layer.n_requests.lock().unwrap(), 3);
    assert_eq!(layer.lendings.lock().unwrap().n, 1);
}

#[test]
fn what_is_evicted_and_filled_in_the_middle_of_each_read_is_lent() {
    let (layer, content) = big_file(1);
    let name = "what_is_evicted_and_filled_in_the_middle_of_each_read_is_lent";
    let Some(mounted) = mount_image(name, vec![layer]) else {
        return;
    };
    let layer = &mounted.layers[0];
    layer.fill_all();
    layer.evicts_in_reads.store(true, Ordering::Relaxed);
    assert!(fs::read(mounted.path("big")).unwrap() == content);
    assert!(0 < layer.lendings.lock().unwrap().n);
    assert_eq!(mounted.n_requests("read", "error"), 0);
}

#[test]
fn cold_readers_of_one_file_share_its_chunks() {
    let (layer, content) = big_file(1);
    let Some(mounted) = mount_image("cold_readers_of_one_file_share_its_chunks", vec![layer])
    else {
        return;
    };
    let layer = &mounted.layers[0];
    layer.set_mode(Mode::Slow(Duration::from_millis(5)));
    layer.on_disk.store(true, Ordering::Relaxed);
    let content = Arc::new(content);
    let readers: Vec<_> = (0..8)
        .map(|at| {
            let (path, content) = (mounted.path("big"), content.clone());
            within_deadline(move || {
                let (mut file, mut found) = (File::open(path).unwrap(), Vec::new());
                let mut rest = vec![0; BIG / 8 * at];
                file.read_exact(&mut rest).unwrap();
                file.read_to_end(&mut found).unwrap();
                found == content[rest.len()..] && rest == content[..rest.len()]
            })
        })
        .collect();
    for reader in readers {
        assert!(reader.recv_timeout(DEADLINE).unwrap());
    }
    let fills = layer.fills.lock().unwrap();
    let expected = (0..layer.n_chunks()).map(|it| (it, 1)).collect();
    assert_eq!(*fills, expected);
}

#[test]
fn a_slow_layer_holds_up_nobody_else() {
    let ((slow, slow_content), (_, fast_content)) = (big_file(1), big_file(2));
    let mut fast = LayerText::default();
    fast.file("fast", &fast_content);
    let Some(mounted) = mount_image("a_slow_layer_holds_up_nobody_else", vec![slow, fast]) else {
        return;
    };
    mounted.layers[0].set_mode(Mode::Hold);
    let last = mounted.layers[0].n_chunks() - 1;
    mounted.layers[0].fill(last);
    // More readers than there are read threads and buffers.
    let waiting: Vec<_> = (0..64)
        .map(|at| {
            let path = mounted.path("big");
            within_deadline(move || {
                let mut buf = vec![0; 1000];
                let file = File::open(path).unwrap();
                file.read_exact_at(&mut buf, at * 50_000).unwrap();
                buf
            })
        })
        .collect();
    await_request(&mounted, 0);
    let path = mounted.path("fast");
    let fast = within_deadline(move || fs::read(path).unwrap());
    assert!(fast.recv_timeout(DEADLINE).unwrap() == fast_content);
    assert!(
        fs::metadata(mounted.path("nothing")).is_err(),
        "lookups go on"
    );
    let path = mounted.path("big");
    let there = within_deadline(move || {
        let mut buf = vec![0; 1000];
        let file = File::open(path).unwrap();
        file.read_exact_at(&mut buf, BIG as u64 - 1000).unwrap();
        buf
    });
    let found = there.recv_timeout(DEADLINE).unwrap();
    assert_eq!(
        found,
        slow_content[BIG - 1000..],
        "what it has on disk is read"
    );
    for reader in &waiting {
        assert!(
            reader.try_recv().is_err(),
            "nothing came from the layer that holds"
        );
    }
    mounted.layers[0].set_mode(Mode::Fill);
    for (at, reader) in waiting.into_iter().enumerate() {
        let found = reader.recv_timeout(DEADLINE).unwrap();
        assert_eq!(found, slow_content[at * 50_000..][..1000]);
    }
}

#[test]
fn an_unmount_lets_pending_reads_finish() {
    let (layer, content) = big_file(1);
    let Some(mounted) = mount_image("an_unmount_lets_pending_reads_finish", vec![layer]) else {
        return;
    };
    mounted.layers[0].set_mode(Mode::Hold);
    let path = mounted.path("big");
    let reader = within_deadline(move || {
        let mut buf = vec![0; 1000];
        let file = File::open(path).unwrap();
        file.read_exact_at(&mut buf, 0).map(|()| buf)
    });
    await_request(&mounted, 0);
    let Mounted {
        mount, layers, dir, ..
    } = mounted;
    let path = mount.dir().to_owned();
    assert_eq!(mount.unmount(), Unmounted::InUse);
    assert_eq!(
        fs::read_dir(&path).unwrap().count(),
        0,
        "it has no name any more"
    );
    assert!(reader.try_recv().is_err());
    layers[0].set_mode(Mode::Fill);
    let found = reader.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(found, content[..1000]);
    // The session drops its file system, which drops the layer.
    eventually("the session ended", || Arc::strong_count(&layers[0]) == 1);
    drop(dir);
}

#[test]
fn the_kernel_says_that_a_mount_has_ended_before_it_gives_its_number_to_another() {
    let dir = tempfile::tempdir().unwrap();
    // Others that the tests mount meanwhile may be given the number first.
    let is_given_again = (0..100).any(|_| {
        let (place, first, device) = match make_mount(dir.path(), "clip-csi") {
            Ok(made) => made,
            Err(err) => {
                eprintln!("SKIP the_kernel_says_that_a_mount_has_ended: {err}");
                return true;
            }
        };
        assert!(!takeover::has_ended(&first));
        rustix::mount::unmount(&place, UnmountFlags::DETACH).unwrap();
        let (place, second, of_second) = make_mount(&place, "clip-csi").unwrap();
        assert!(takeover::has_ended(&first) && !takeover::has_ended(&second));
        rustix::mount::unmount(&place, UnmountFlags::DETACH).unwrap();
        device == of_second
    });
    assert!(is_given_again, "no number was given twice");
}

#[test]
fn an_unmount_ends_the_session() {
    let Some(mounted) = mount_image("an_unmount_ends_the_session", vec![big_file(1).0]) else {
        return;
    };
    fs::read(mounted.path("big")).unwrap();
    let dir = mounted.mount.dir().to_owned();
    assert_eq!(mounted.mount.unmount(), Unmounted::Ended);
    eventually("the session dropped its layer", || {
        Arc::strong_count(&mounted.layers[0]) == 1
    });
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);

    // Unmounted by hand, and mounted anew at the same place: the first must leave that alone.
    let first = mount_image("an_unmount_ends_the_session", vec![big_file(1).0]).unwrap();
    let place = first.mount.dir().to_owned();
    let flags = rustix::mount::UnmountFlags::DETACH;
    rustix::mount::unmount(&place, flags).unwrap();
    first.mount.wait().unwrap();
    let (index, layers) = build(vec![big_file(2).0]);
    let (metrics, pool) = (
        Metrics::new(),
        ReadPool::new(PoolConfig::default()).unwrap(),
    );
    let index = ImageIndex::open(index).unwrap();
    let second = mount_index("", index, &layers, &metrics, pool, &place).unwrap();
    let Mounted {
        mount, dir: _place, ..
    } = first;
    assert_eq!(mount.unmount(), Unmounted::Ended);
    assert!(fs::read(place.join("big")).unwrap() == big_file(2).1);
    drop(second);
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
}

#[test]
fn the_kernel_asks_once() {
    let mut layer = LayerText::default();
    layer.file("d/file", b"abc");
    layer.push("link", TarKind::Symlink(b"d/file".to_vec()));
    let Some(mounted) = mount_image("the_kernel_asks_once", vec![layer]) else {
        return;
    };
    for _ in 0..1000 {
        assert_eq!(fs::read(mounted.path("d/file")).unwrap(), b"abc");
        assert!(!mounted.path("d/nothing").exists());
        assert_eq!(fs::read(mounted.path("link")).unwrap(), b"abc");
        assert_eq!(fs::read_dir(mounted.path("d")).unwrap().count(), 1);
        let xattr = lgetxattr(mounted.path("d"), "user.a", &mut [0; 9]);
        assert_eq!(xattr, Err(rustix::io::Errno::OPNOTSUPP));
    }
    for (op, at_most) in [
        ("open", 1),
        ("opendir", 1),
        ("read", 1),
        ("readlink", 1),
        ("getxattr", 1),
        // d, d/file, d/nothing, link.
        ("lookup", 4),
        ("getattr", 4),
        ("readdirplus", 4),
        ("readdir", 4),
        ("other", 2),
    ] {
        let n = mounted.n_requests(op, "ok");
        assert!(n <= at_most, "{op}: {n}");
    }
    assert_eq!(mounted.n_requests("open", "ok"), 1, "the counter counts");
}

#[test]
fn a_panic_is_eio_and_the_mount_lives_on() {
    let (layer, content) = big_file(1);
    let Some(mounted) = mount_image("a_panic_is_eio_and_the_mount_lives_on", vec![layer]) else {
        return;
    };
    mounted.layers[0].set_mode(Mode::Panic);
    let file = File::open(mounted.path("big")).unwrap();
    let failed = file.read_at(&mut [0; 10], 0);
    assert_eq!(errno(failed), Some(libc::EIO));
    assert!(1 <= mounted.n_requests("read", "error"));
    mounted.layers[0].set_mode(Mode::Fill);
    assert!(fs::read(mounted.path("big")).unwrap() == content);
}

#[test]
fn reads_are_counted_by_whether_the_disk_had_them() {
    let (layer, content) = big_file(1);
    let Some(mounted) = mount_image("reads_are_counted", vec![layer]) else {
        return;
    };
    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(mounted.path("big"))
        .unwrap();
    // Not 1 MiB, which is two requests where the buffer begins in the middle of a page.
    let mut buf = vec![0; 1 << 19];
    direct.read_exact_at(&mut buf, 0).unwrap();
    let counts = |mounted: &Mounted| {
        let bytes = mounted.metrics.tier_read_bytes.with_label_values(&["disk"]);
        let duration = mounted
            .metrics
            .tier_read_duration
            .with_label_values(&["disk"]);
        (
            mounted.n_disk_reads("miss"),
            mounted.n_disk_reads("hit"),
            bytes.get(),
            duration.get_sample_count(),
        )
    };
    assert_eq!(counts(&mounted), (1, 0, 0, 0));
    direct.read_exact_at(&mut buf, 0).unwrap();
    mounted.layers[0].on_disk.store(true, Ordering::Relaxed);
    direct.read_exact_at(&mut buf[..4096], 8192).unwrap();
    assert_eq!(counts(&mounted), (1, 2, (1 << 19) + 4096, 2));
    assert_eq!(buf[..4096], content[8192..][..4096]);
    assert_eq!(mounted.n_requests("read", "ok"), 3);
}

#[test]
fn readahead_is_set() {
    let Some(mounted) = mount_image("readahead_is_set", vec![big_file(1).0]) else {
        return;
    };
    let (major, minor) = mounted.mount.device();
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    match File::options().write(true).open(&path) {
        Ok(_) => assert_eq!(fs::read_to_string(&path).unwrap(), "256\n"),
        Err(error) => eprintln!("SKIP readahead_is_set: {path}: {error}"),
    }
}

/// The process of this test runs twice: the child mounts and prints its memory, the parent judges.
#[test]
fn twenty_mounts_need_little_memory() {
    const NAME: &str = "fuse::twenty_mounts_need_little_memory";
    const CHILD: &str = "CLIP_CSI_TEST_MEMORY_CHILD";
    /// Measured: 2 MiB for threads, buffers and counters. The indexes alone are 9 MiB, and one
    /// read buffer of fuser that is touched is 16 MiB.
    const MAX_BYTES: u64 = 5 << 20;
    if std::env::var_os(CHILD).is_some() {
        return use_twenty_mounts();
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = String::from_utf8(child.stderr).unwrap();
    assert!(child.status.success(), "{text}");
    let field = |name: &str| {
        text.lines()
            .find_map(|it| it.strip_prefix(name)?.parse::<u64>().ok())
    };
    let (Some(before), Some(after)) = (field("before="), field("after=")) else {
        eprintln!("SKIP {NAME}: the child could not mount");
        return;
    };
    eprintln!(
        "{NAME}: VmHWM {} KiB, before the mounts {} KiB",
        after >> 10,
        before >> 10
    );
    assert!(after - before < MAX_BYTES);
}

fn use_twenty_mounts() {
    sys::tune_allocator();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    // The index is made in a process of its own, because making it needs memory that serving it
    // does not.
    if std::env::var_os("CLIP_CSI_TEST_INDEX").is_some() {
        return write_index(Path::new(&std::env::var_os("CLIP_CSI_TEST_INDEX").unwrap()));
    }
    let made = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "fuse::twenty_mounts_need_little_memory"])
        .env("CLIP_CSI_TEST_INDEX", &path)
        .output()
        .unwrap();
    assert!(made.status.success());
    let (_, layers) = build(vec![memory_layer(0)]);
    layers[0].fill_all();
    let pool = ReadPool::new(PoolConfig::default()).unwrap();
    let metrics = Metrics::new();
    let mount = |at: u32| {
        let dir = dir.path().join(format!("mount-{at}"));
        fs::create_dir(&dir).unwrap();
        let index = MappedFile::new(&File::open(&path).unwrap()).unwrap();
        let index = ImageIndex::open(index).unwrap();
        mount_index("", index, &layers, &metrics, pool.clone(), &dir)
    };
    // With it come the pages of the program, of which builds of different kinds have different numbers.
    let Some(first) = mount(0) else { return };
    use_mount(&first);
    let before = sys::memory().highwater_bytes;
    let mounts: Vec<_> = (1..=20).map(|at| mount(at).unwrap()).collect();
    mounts.iter().for_each(use_mount);
    eprintln!("before={before}");
    eprintln!("after={}", sys::memory().highwater_bytes);
}

/// Lists all of the mount and reads some of its files.
fn use_mount(mounted: &FuseMount) {
    let mut buf = vec![0; 64 << 10];
    let mut n_files = 0;
    for directory in fs::read_dir(mounted.dir()).unwrap() {
        for file in fs::read_dir(directory.unwrap().path()).unwrap() {
            let file = file.unwrap();
            n_files += u32::from(file.metadata().unwrap().is_file());
            if n_files % 100 == 0 {
                let file = File::open(file.path()).unwrap();
                assert_eq!(file.read_at(&mut buf, 0).unwrap(), buf.len());
            }
        }
    }
    assert_eq!(n_files, 5000);
}

/// A layer of `n_directories` times 100 files that share their bytes.
fn memory_layer(n_directories: u32) -> LayerText {
    let mut layer = LayerText::default();
    layer.file("0/0", &noise(300_000, 1));
    let kind = layer.entries.pop().unwrap().kind;
    for at in 0..n_directories * 100 {
        let path = format!("{}/a-name-of-usual-length-{at}", at / 100);
        layer.push(&path, kind.clone());
    }
    layer
}

fn write_index(path: &Path) {
    let (index, _) = build(vec![memory_layer(50)]);
    let mut file = File::create(path).unwrap();
    io::Write::write_all(&mut file, &index).unwrap();
}
