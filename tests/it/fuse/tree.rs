//! What the kernel shows of an image: names, attributes, bytes; and that nothing can be changed.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
    sync::atomic::Ordering,
};

use clip_csi::{chunk::CHUNK_BYTES, sys::MappedFile, tar::TarKind};
use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr};

use super::{big_file, errno};
use crate::fuse_fakes::{LayerText, large_directory, mount_image, noise};

#[test]
fn the_tree_is_what_the_image_says() {
    let mut base = LayerText::default();
    base.push(".", TarKind::Directory).mode = 0o1777;
    base.push("etc", TarKind::Directory).mode = 0o2750;
    let file = base.file("etc/passwd", b"root");
    (file.mode, file.uid, file.gid) = (0o4640, 70_000, 4_000_000_000);
    (file.mtime_seconds, file.mtime_nanoseconds) = (-5, 999_999_999);
    file.xattrs = vec![
        (b"user.note".to_vec(), b"hello".to_vec()),
        (b"user.empty".to_vec(), vec![]),
        (
            b"security.capability".to_vec(),
            vec![1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ),
    ];
    base.push("etc/hard", TarKind::HardLink(b"etc/passwd".to_vec()));
    base.push("link", TarKind::Symlink(b"etc/passwd".to_vec()));
    base.push("null", TarKind::CharDevice { major: 1, minor: 3 });
    base.push(
        "disk",
        TarKind::BlockDevice {
            major: 259,
            minor: 70_000,
        },
    );
    base.push("pipe", TarKind::Fifo).mode = 0o600;
    base.file("empty", b"");
    let name: Vec<u8> = (1..=255).filter(|it| *it != b'/').collect();
    base.file("x", b"named by bytes").path = name.clone();
    let mut upper = LayerText::default();
    upper.file("etc/upper", b"from the upper layer");
    let Some(mounted) = mount_image("the_tree_is_what_the_image_says", vec![base, upper]) else {
        return;
    };
    let stat = |path: &str| fs::symlink_metadata(mounted.path(path)).unwrap();
    // The modes with their file types; sizes; link counts.
    let expected: &[(&str, u32, u64, u64)] = &[
        ("", 0o041_777, 4096, 3),
        ("etc", 0o042_750, 4096, 2),
        ("etc/passwd", 0o104_640, 4, 2),
        ("etc/hard", 0o104_640, 4, 2),
        ("etc/upper", 0o100_755, 20, 1),
        ("link", 0o120_755, 10, 1),
        ("null", 0o020_755, 0, 1),
        ("disk", 0o060_755, 0, 1),
        ("pipe", 0o010_600, 0, 1),
        ("empty", 0o100_755, 0, 1),
    ];
    for (path, mode, size, n_links) in expected {
        let found = stat(path);
        let found = (found.mode(), found.size(), found.nlink());
        assert_eq!(found, (*mode, *size, *n_links), "{path}");
    }
    let passwd = stat("etc/passwd");
    assert_eq!((passwd.uid(), passwd.gid()), (70_000, 4_000_000_000));
    assert_eq!((passwd.blocks(), passwd.blksize()), (1, 4096));
    for (seconds, nanoseconds) in [
        (passwd.mtime(), passwd.mtime_nsec()),
        (passwd.ctime(), passwd.ctime_nsec()),
        (passwd.atime(), passwd.atime_nsec()),
    ] {
        assert_eq!((seconds, nanoseconds), (-5, 999_999_999));
    }
    assert_eq!(stat("etc/hard").ino(), passwd.ino());
    assert_eq!(stat("").ino(), 1);
    assert_eq!(stat("null").rdev(), libc::makedev(1, 3));
    assert_eq!(stat("disk").rdev(), libc::makedev(259, 70_000));
    assert_eq!(
        fs::read_link(mounted.path("link")).unwrap(),
        Path::new("etc/passwd")
    );
    assert_eq!(fs::read(mounted.path("link")).unwrap(), b"root");
    assert_eq!(
        fs::read(mounted.path("etc/upper")).unwrap(),
        b"from the upper layer"
    );
    let odd = mounted.mount.dir().join(std::ffi::OsStr::from_bytes(&name));
    assert_eq!(fs::read(odd).unwrap(), b"named by bytes");

    let mut buf = [0; 256];
    let passwd = mounted.path("etc/passwd");
    let note = lgetxattr(&passwd, "user.note", &mut buf).unwrap();
    assert_eq!(&buf[..note], b"hello");
    // Empty in the layer, which means none.
    assert_eq!(
        lgetxattr(&passwd, "user.empty", &mut buf),
        Err(rustix::io::Errno::NODATA)
    );
    assert_eq!(lgetxattr(&passwd, "security.capability", &mut buf), Ok(20));
    assert_eq!(
        lgetxattr(&passwd, "user.note", &mut [0; 4]),
        Err(rustix::io::Errno::RANGE)
    );
    assert_eq!(
        lgetxattr(&passwd, "user.none", &mut buf),
        Err(rustix::io::Errno::NODATA)
    );
    let names = llistxattr(&passwd, &mut buf).unwrap();
    let mut names: Vec<_> = buf[..names].split_inclusive(|it| *it == 0).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"security.capability\0"[..], b"user.note\0"]);
    assert_eq!(llistxattr(mounted.path("empty"), &mut buf), Ok(0));

    let statfs = rustix::fs::statvfs(mounted.mount.dir()).unwrap();
    assert_eq!(
        (statfs.f_bsize, statfs.f_blocks, statfs.f_bfree),
        (4096, 1, 0)
    );
    assert_eq!((statfs.f_files, statfs.f_namemax), (10, 255));
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = mounted.mount.dir().to_str().unwrap();
    let line = mountinfo.lines().find(|it| it.contains(dir)).unwrap();
    assert!(line.contains(" ro,nosuid,nodev,"), "{line}");
    assert!(
        line.contains(" - fuse.clip registry.example:5000/a,b:latest ro,"),
        "{line}"
    );
    assert!(line.contains("default_permissions,allow_other"), "{line}");
}

#[test]
fn a_large_directory_lists_every_name_once() {
    let (layer, expected) = large_directory();
    let Some(mounted) = mount_image("a_large_directory_lists_every_name_once", vec![layer]) else {
        return;
    };
    for round in 0..2 {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(mounted.path("d")).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            assert_eq!(metadata.ino(), std::os::unix::fs::DirEntryExt::ino(&entry));
            let name = entry.file_name().into_string().unwrap();
            assert_eq!(found.insert(name, metadata.size()), None, "twice");
        }
        assert_eq!(found, expected, "round {round}");
    }
    // Attributes came with the names, and nobody was asked twice.
    assert!(mounted.n_requests("getattr", "ok") < 10);
    assert!(mounted.n_requests("lookup", "ok") < 10);
}

#[test]
fn bytes_are_those_of_the_layer() {
    let (mut layer, content) = big_file(7);
    let hole = usize::try_from(3 * CHUNK_BYTES).unwrap();
    let (head, tail) = (noise(1000, 2), noise(70_000, 3));
    let mut sparse = vec![0; hole + 100_000];
    sparse[500..1500].copy_from_slice(&head);
    sparse[hole..hole + 70_000].copy_from_slice(&tail);
    let size = sparse.len() as u64;
    layer.sparse_file("sparse", size, &[(500, &head), (hole as u64, &tail)]);
    let Some(mounted) = mount_image("bytes_are_those_of_the_layer", vec![layer]) else {
        return;
    };
    for (on_disk, fill) in [(false, false), (true, true)] {
        mounted.layers[0].on_disk.store(on_disk, Ordering::Relaxed);
        if fill {
            mounted.layers[0].fill_all();
        }
        for (name, expected) in [("big", &content), ("sparse", &sparse)] {
            // Drops the pages that the round before has left.
            let file = File::open(mounted.path(name)).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            let seeds = noise(800, 11);
            for pair in seeds.chunks_exact(4) {
                let at = u32::from_le_bytes(pair.try_into().unwrap()) as usize;
                let offset = at % (expected.len() + 10_000);
                let mut buf = vec![0xee; at % 300_000];
                let n = file.read_at(&mut buf, offset as u64).unwrap();
                let start = offset.min(expected.len());
                let end = (start + buf.len()).min(expected.len());
                assert!(
                    buf[..n] == expected[start..end],
                    "{name} at {offset} + {}",
                    buf.len()
                );
            }
            assert!(
                fs::read(mounted.path(name)).unwrap() == *expected,
                "{name} in order"
            );
            let map = MappedFile::new(&file).unwrap();
            assert!(*map == expected[..], "{name} mapped");
            // Past the page cache: the kernel passes our byte counts on as they are.
            let direct = File::options()
                .read(true)
                .custom_flags(libc::O_DIRECT)
                .open(mounted.path(name))
                .unwrap();
            let mut buf = vec![0xee; 1 << 21];
            for offset in [0, 1 << 20, expected.len() - 1, expected.len()] {
                let n = direct.read_at(&mut buf, offset as u64).unwrap();
                let end = (offset + buf.len()).min(expected.len());
                assert!(
                    buf[..n] == expected[offset..end],
                    "{name} direct at {offset}"
                );
            }
        }
    }
    let metadata = fs::metadata(mounted.path("sparse")).unwrap();
    assert_eq!(
        (metadata.size(), metadata.blocks()),
        (size, 71_000_u64.div_ceil(512))
    );
    assert_eq!(mounted.n_requests("read", "error"), 0);
}

#[test]
fn nothing_can_be_changed() {
    let mut layer = LayerText::default();
    layer.file("file", b"abc").mode = 0o666;
    layer
        .push("null", TarKind::CharDevice { major: 1, minor: 3 })
        .mode = 0o666;
    let Some(mounted) = mount_image("nothing_can_be_changed", vec![layer]) else {
        return;
    };
    let (file, other) = (mounted.path("file"), mounted.path("other"));
    let mode = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o600);
    let xattr = lsetxattr(&file, "user.a", b"1", XattrFlags::empty());
    for (what, result) in [
        (
            "open for writing",
            File::options().write(true).open(&file).map(drop),
        ),
        ("truncate", File::create(&file).map(drop)),
        ("create", File::create(&other).map(drop)),
        ("unlink", fs::remove_file(&file)),
        ("mkdir", fs::create_dir(&other)),
        ("symlink", std::os::unix::fs::symlink("file", &other)),
        ("link", fs::hard_link(&file, &other)),
        ("rename", fs::rename(&file, &other)),
        ("chmod", fs::set_permissions(&file, mode)),
        ("chown", std::os::unix::fs::chown(&file, Some(1), None)),
        ("setxattr", xattr.map_err(io::Error::from)),
    ] {
        assert_eq!(errno(result), Some(libc::EROFS), "{what}");
    }
    let device = File::open(mounted.path("null"));
    assert_eq!(errno(device), Some(libc::EACCES), "devices are not opened");
    assert_eq!(fs::read(&file).unwrap(), b"abc");
}
