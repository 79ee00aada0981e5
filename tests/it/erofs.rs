//! Images in the kernel's own file system: what it shows.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

#[path = "erofs/killed.rs"]
mod killed;
#[path = "erofs/refused.rs"]
mod refused;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use clip_csi::{
    erofs::{self, LayerFiles, METADATA_NAME},
    index::image::ImageIndex,
    sys,
    tar::TarKind,
};
use proptest::prelude::*;
use rustix::{
    fs::{lgetxattr, llistxattr},
    mount::{UnmountFlags, unmount},
};

use crate::fuse_fakes::{LayerText, build, large_directory, noise};

/// As setcap(8) writes it: the kernel looks at it.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A mounted image, its files still there.
#[derive(Debug)]
struct Mounted {
    dir: tempfile::TempDir,
    is_mounted: bool,
}

impl Mounted {
    fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join("mnt").join(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn unmount(&mut self) {
        if std::mem::take(&mut self.is_mounted) {
            unmount(self.path(""), UnmountFlags::DETACH).unwrap();
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.unmount();
    }
}

/// Layers as they are in an archive, which ends with a whole block: the shortest that is mounted.
fn padded(mut layers: Vec<LayerText>) -> Vec<LayerText> {
    for layer in &mut layers {
        layer
            .bytes
            .resize(layer.bytes.len().next_multiple_of(512), 0);
    }
    layers
}

/// Writes an image's layers to files, and opens them as they are mounted.
fn layer_files(layers: &[Vec<u8>], dir: &Path) -> Vec<LayerFiles> {
    let open = |name: String, content: &[u8]| {
        let path = dir.join(name);
        File::create(&path)
            .unwrap()
            .write_all_at(content, 0)
            .unwrap();
        File::open(path).unwrap().into()
    };
    (0..)
        .zip(layers)
        .map(|(at, bytes)| LayerFiles {
            data: open(format!("data-{at}"), bytes),
            mounted: open(format!("mounted-{at}"), b""),
        })
        .collect()
}

/// Mounts an image at `mnt`; its files are in `dir`.
///
/// # Errors
/// As the kernel says.
pub(crate) fn mount_at(mnt: &Path, dir: &Path, layers: Vec<LayerText>) -> io::Result<()> {
    mount_files(mnt, dir, layers, |layers, dir| Ok(layer_files(layers, dir)))
}

/// The same, out of layers that `open` opens.
fn mount_files(
    mnt: &Path,
    dir: &Path,
    layers: Vec<LayerText>,
    open: impl FnOnce(&[Vec<u8>], &Path) -> io::Result<Vec<LayerFiles>>,
) -> io::Result<()> {
    let (index, layers) = build(padded(layers));
    let index = ImageIndex::open(index).unwrap();
    let metadata = dir.join(METADATA_NAME);
    erofs::write(&index, &File::create_new(&metadata).unwrap()).unwrap();
    // No page is cut, or some kernels would not read it.
    assert!(
        fs::metadata(&metadata)
            .unwrap()
            .len()
            .is_multiple_of(64 << 10)
    );
    let bytes: Vec<_> = layers.iter().map(|it| it.bytes().to_vec()).collect();
    let mounted = open(&bytes, dir).and_then(|files| erofs::mount(&metadata, &files, mnt));
    fs::remove_file(metadata).unwrap();
    mounted
}

/// Mounts an image; `None`, with a word of why, where that cannot be.
fn mount(test: &str, layers: Vec<LayerText>) -> Option<Mounted> {
    mount_opened(test, layers, |layers, dir| Ok(layer_files(layers, dir)))
}

/// The same, out of layers that `open` opens.
fn mount_opened(
    test: &str,
    layers: Vec<LayerText>,
    open: impl FnOnce(&[Vec<u8>], &Path) -> io::Result<Vec<LayerFiles>>,
) -> Option<Mounted> {
    let dir = tempfile::tempdir().unwrap();
    let mnt = dir.path().join("mnt");
    fs::create_dir(&mnt).unwrap();
    match mount_files(&mnt, dir.path(), layers, open) {
        Ok(()) => Some(Mounted {
            dir,
            is_mounted: true,
        }),
        Err(err)
            if matches!(
                err.kind(),
                io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied
            ) =>
        {
            eprintln!("SKIP {test}: {err}");
            None
        }
        Err(err) => panic!("{err}"),
    }
}

#[test]
fn the_kernel_shows_the_image() {
    let mut base = LayerText::default();
    base.push(".", TarKind::Directory).mode = 0o1777;
    base.push("etc", TarKind::Directory).mode = 0o2750;
    let file = base.file("etc/passwd", b"root");
    (file.mode, file.uid, file.gid) = (0o4640, 70_000, 4_000_000_000);
    (file.mtime_seconds, file.mtime_nanoseconds) = (-5, 999_999_999);
    file.xattrs = vec![
        (b"user.note".to_vec(), b"hello".to_vec()),
        (b"security.capability".to_vec(), CAPABILITY.to_vec()),
        (b"trusted.ours".to_vec(), vec![7; 3000]),
    ];
    base.push("etc/hard", TarKind::HardLink(b"etc/passwd".to_vec()));
    base.push("link", TarKind::Symlink(vec![b'x'; 4095]));
    base.push(
        "disk",
        TarKind::BlockDevice {
            major: 259,
            minor: 70_000,
        },
    );
    base.push("null", TarKind::CharDevice { major: 1, minor: 3 });
    base.push("pipe", TarKind::Fifo).mode = 0o600;
    base.file("empty", b"");
    let name: Vec<u8> = (1..=255).filter(|it| *it != b'/').collect();
    base.file("x", b"named by bytes").path = name.clone();
    // Before and behind "." and "..".
    for name in ["!", "..a", ".a", "~"] {
        base.file(name, name.as_bytes());
    }
    let big = noise(3_000_001, 5);
    let mut upper = LayerText::default();
    upper.file("etc/upper", &big);
    let Some(mounted) = mount("the_kernel_shows_the_image", vec![base, upper]) else {
        return;
    };
    let stat = |path: &str| fs::symlink_metadata(mounted.path(path)).unwrap();
    let expected: &[(&str, u32, u64)] = &[
        ("", 0o041_777, 3),
        ("etc", 0o042_750, 2),
        ("etc/passwd", 0o104_640, 2),
        ("etc/hard", 0o104_640, 2),
        ("etc/upper", 0o100_755, 1),
        ("link", 0o120_755, 1),
        ("null", 0o020_755, 1),
        ("disk", 0o060_755, 1),
        ("pipe", 0o010_600, 1),
        ("empty", 0o100_755, 1),
    ];
    for (path, mode, n_links) in expected {
        let found = stat(path);
        assert_eq!((found.mode(), found.nlink()), (*mode, *n_links), "{path}");
    }
    let passwd = stat("etc/passwd");
    assert_eq!((passwd.uid(), passwd.gid()), (70_000, 4_000_000_000));
    assert_eq!((passwd.mtime(), passwd.mtime_nsec()), (-5, 999_999_999));
    assert_eq!(stat("etc/hard").ino(), passwd.ino());
    assert_eq!(stat("null").rdev(), libc::makedev(1, 3));
    assert_eq!(stat("disk").rdev(), libc::makedev(259, 70_000));
    let target = fs::read_link(mounted.path("link")).unwrap();
    assert_eq!(target.as_os_str().as_bytes(), [b'x'; 4095]);
    assert_eq!(fs::read(mounted.path("etc/passwd")).unwrap(), b"root");
    assert_eq!(fs::read(mounted.path("etc/upper")).unwrap(), big);
    assert_eq!(fs::read(mounted.path("empty")).unwrap(), b"");
    let odd = mounted.path(std::ffi::OsStr::from_bytes(&name));
    assert_eq!(fs::read(odd).unwrap(), b"named by bytes");
    for name in ["!", "..a", ".a", "~"] {
        assert_eq!(fs::read(mounted.path(name)).unwrap(), name.as_bytes());
    }

    let mut buf = [0; 4096];
    let passwd = mounted.path("etc/passwd");
    for (name, expected) in [
        ("user.note", &b"hello"[..]),
        ("security.capability", &CAPABILITY),
        ("trusted.ours", &[7; 3000]),
    ] {
        let len = lgetxattr(&passwd, name, &mut buf).unwrap();
        assert_eq!(&buf[..len], expected, "{name}");
    }
    let len = llistxattr(&passwd, &mut buf).unwrap();
    let mut names: Vec<_> = buf[..len].split_inclusive(|it| *it == 0).collect();
    names.sort_unstable();
    let expected = [
        &b"security.capability\0"[..],
        b"trusted.ours\0",
        b"user.note\0",
    ];
    assert_eq!(names, expected);
    assert_eq!(llistxattr(mounted.path("empty"), &mut buf), Ok(0));

    let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = mounted.path("");
    let dir = dir.to_str().unwrap().trim_end_matches('/');
    let line = mountinfo.lines().find(|it| it.contains(dir)).unwrap();
    assert!(line.contains(" ro,nosuid,nodev,"), "{line}");
    assert!(line.contains(" - erofs ") && line.contains("/clip-csi ro"));
}

#[test]
fn directories_of_any_size_list_every_name_once_and_find_it() {
    let (layer, expected) = large_directory();
    let Some(mounted) = mount("directories_of_any_size", vec![layer]) else {
        return;
    };
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(mounted.path("d")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let len = fs::metadata(mounted.path("d").join(&name)).unwrap().len();
        assert_eq!(found.insert(name, len), None);
    }
    assert_eq!(found, expected);
    let missing = fs::metadata(mounted.path("d/name-5000")).unwrap_err();
    assert_eq!(missing.kind(), io::ErrorKind::NotFound);
}

#[test]
fn inodes_that_take_much_are_found_as_others_are() {
    let mut layer = LayerText::default();
    for at in 0..300 {
        let file = layer.file(&format!("file-{at:03}"), format!("{at}").as_bytes());
        // Every other hundred takes more than a byte can count.
        if at / 100 % 2 == 1 {
            file.xattrs = vec![(b"user.large".to_vec(), vec![7; 60_000])];
        }
    }
    for at in 0..300 {
        let linked = format!("file-{:03}", 299 - at).into_bytes();
        layer.push(&format!("link-{at:03}"), TarKind::HardLink(linked));
    }
    let Some(mounted) = mount("inodes_that_take_much", vec![layer]) else {
        return;
    };
    for at in 0..300 {
        let read = |name: String| fs::read_to_string(mounted.path(name)).unwrap();
        assert_eq!(read(format!("file-{at:03}")), at.to_string());
        assert_eq!(read(format!("link-{at:03}")), (299 - at).to_string());
    }
}

#[test]
fn an_image_may_have_as_many_layers_as_runtimes_take() {
    let layers = (0..127).map(|at| {
        let mut layer = LayerText::default();
        layer.file(&format!("file-{at}"), at.to_string().as_bytes());
        layer
    });
    let Some(mounted) = mount("as_many_layers", layers.collect()) else {
        return;
    };
    for at in 0..127 {
        let read = fs::read_to_string(mounted.path(format!("file-{at}"))).unwrap();
        assert_eq!(read, at.to_string());
    }
}

/// What is found below a directory: the content of files, and the number of names in directories.
fn walk(dir: &Path, below: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    let mut n_names = 0_u64;
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let path = below.join(entry.file_name());
        n_names += 1;
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), &path, found);
        } else {
            found.insert(path, fs::read(entry.path()).unwrap());
        }
    }
    found.insert(below.to_owned(), n_names.to_le_bytes().to_vec());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Directories of any shape, names of any bytes and lengths, in two layers.
    #[test]
    fn any_tree_is_shown(
        dirs in prop::collection::vec((any::<prop::sample::Index>(), name()), 0..20),
        files in prop::collection::vec((any::<prop::sample::Index>(), name(), 0_usize..3000, any::<bool>()), 1..150),
    ) {
        let mut layers = [LayerText::default(), LayerText::default()];
        let (mut paths, mut expected) = (vec![Vec::new()], BTreeMap::new());
        let join = |parent: &[u8], name: &[u8]| match parent.is_empty() {
            true => name.to_vec(),
            false => [parent, b"/", name].concat(),
        };
        let mut taken = std::collections::BTreeSet::new();
        for (parent, name) in dirs {
            let path = join(&paths[parent.index(paths.len())], &name);
            if path.len() < 2000 && taken.insert(path.clone()) {
                layers[0].push("x", TarKind::Directory).path.clone_from(&path);
                paths.push(path);
            }
        }
        for (parent, name, len, is_upper) in files {
            let path = join(&paths[parent.index(paths.len())], &name);
            if path.len() < 2000 && taken.insert(path.clone()) {
                let content = noise(len, len as u64);
                layers[usize::from(is_upper)].file("x", &content).path.clone_from(&path);
                expected.insert(PathBuf::from(std::ffi::OsStr::from_bytes(&path)), content);
            }
        }
        for dir in &paths {
            let dir = Path::new(std::ffi::OsStr::from_bytes(dir));
            let inside = taken.iter().filter(|it| {
                Path::new(std::ffi::OsStr::from_bytes(it)).parent() == Some(dir)
            });
            let n_names = inside.count() as u64;
            expected.insert(dir.to_owned(), n_names.to_le_bytes().to_vec());
        }
        if let Some(mounted) = mount("any_tree_is_shown", layers.into()) {
            let mut found = BTreeMap::new();
            walk(&mounted.path(""), Path::new(""), &mut found);
            prop_assert!(found == expected, "{:?}", taken);
        }
    }
}

/// A name that a layer may have, and that hides nothing.
fn name() -> impl Strategy<Value = Vec<u8>> {
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..4),
        prop::collection::vec(any::<u8>(), 1..256),
        prop::collection::vec(0x2c_u8..0x30, 1..4),
    ];
    bytes.prop_filter("no name", |it| {
        !it.iter().any(|it| matches!(it, b'/' | 0))
            && !matches!(&it[..], b"." | b"..")
            && !it.starts_with(b".wh.")
    })
}

#[test]
fn sparse_files_have_their_holes() {
    let mut layer = LayerText::default();
    let (a, b, c) = (noise(4096, 1), noise(1024, 2), noise(1000, 3));
    layer.sparse_file("end", 100_000, &[(0, &a)]);
    layer.sparse_file("middle", 50_000, &[(8192, &a), (40_960, &b)]);
    layer.sparse_file("tail", 41_960, &[(40_960, &c)]);
    layer.sparse_file("hole", 1 << 30, &[]);
    let Some(mounted) = mount("sparse_files_have_their_holes", vec![layer]) else {
        return;
    };
    let read = |name: &str| fs::read(mounted.path(name)).unwrap();
    let filled = |size: usize, parts: &[(usize, &[u8])]| {
        let mut bytes = vec![0; size];
        for (at, part) in parts {
            bytes[*at..at + part.len()].copy_from_slice(part);
        }
        bytes
    };
    assert!(read("end") == filled(100_000, &[(0, &a)]));
    assert!(read("middle") == filled(50_000, &[(8192, &a), (40_960, &b)]));
    assert!(read("tail") == filled(41_960, &[(40_960, &c)]));
    let hole = File::open(mounted.path("hole")).unwrap();
    assert_eq!(hole.metadata().unwrap().len(), 1 << 30);
    let mut end = [1; 100];
    hole.read_exact_at(&mut end, (1 << 30) - 100).unwrap();
    assert_eq!(end, [0; 100]);
}

#[test]
fn what_is_mounted_is_open_to_the_kernel_alone() {
    let mut layer = LayerText::default();
    layer.file("a", b"a");
    let Some(mut mounted) = mount("what_is_mounted_is_open", vec![layer]) else {
        return;
    };
    let marker = File::open(mounted.file("mounted-0")).unwrap();
    assert!(sys::is_open_elsewhere(&marker).unwrap());
    // Not the place but the file system counts.
    let held = File::open(mounted.path("a")).unwrap();
    mounted.unmount();
    assert!(sys::is_open_elsewhere(&marker).unwrap());
    drop(held);
    assert!(!sys::is_open_elsewhere(&marker).unwrap());
}
