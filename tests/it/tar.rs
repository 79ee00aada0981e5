//! Reads the archives of GNU tar, bsdtar, Python and Go, and compares them with the files that
//! these tools were given, and with what Go reads in the same archives.

#![expect(
    clippy::unwrap_used,
    reason = "a helper's failure is the test's failure"
)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs::{self, File, Metadata},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    process::Command,
};

use clip_csi::tar::{Parser, TarEntry, TarKind, TarLimits};

use crate::tar_tools::{Level, MAKERS, Maker, go_reader, make_tree, skipped};

/// Parses an archive in pieces that are no multiples of blocks.
fn parse(archive: &Path) -> Vec<TarEntry> {
    let bytes = fs::read(archive).unwrap();
    let mut entries = Vec::new();
    let mut parser = Parser::new(TarLimits::default());
    for piece in bytes.chunks(7919) {
        let pushed = parser.push(piece, &mut |entry| entries.push(entry));
        pushed.unwrap_or_else(|error| panic!("{}: {error}", archive.display()));
    }
    parser.finish().unwrap();
    entries
}

/// Returns a file's content at `offset`, from the archive and the entry's extents.
fn read_at(archive: &File, entry: &TarEntry, offset: u64, len: u64) -> Vec<u8> {
    let TarKind::File { extents, .. } = &entry.kind else {
        panic!("not a file")
    };
    let mut content = vec![0; usize::try_from(len).unwrap()];
    for extent in extents {
        let start = extent.file_offset.max(offset);
        let end = (extent.file_offset + extent.len).min(offset + len);
        if start < end {
            let range =
                usize::try_from(start - offset).unwrap()..usize::try_from(end - offset).unwrap();
            let at = extent.layer_offset + (start - extent.file_offset);
            archive.read_exact_at(&mut content[range], at).unwrap();
        }
    }
    content
}

/// Returns the path in the tree: without `./` in front and `/` behind.
fn path_of(raw: &[u8]) -> PathBuf {
    Path::new(std::ffi::OsStr::from_bytes(raw))
        .components()
        .collect()
}

/// Returns every path below `root`.
fn walk(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.symlink_metadata().unwrap().is_dir() {
                dirs.push(path.clone());
            }
            found.insert(Path::new(".").join(path.strip_prefix(root).unwrap()));
        }
    }
    found.insert(PathBuf::from("."));
    found
}

/// Returns the attributes that the tree was given.
fn xattrs_of(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut xattrs = Vec::new();
    for name in ["user.empty", "user.raw"] {
        let mut value = [0; 64];
        if let Ok(len) = rustix::fs::lgetxattr(path, name, &mut value) {
            xattrs.push((name.into(), value[..len].to_vec()));
        }
    }
    xattrs
}

/// Compares one entry with the file that it was made of.
fn compare(maker: &Maker, archive: &File, entry: &TarEntry, root: &Path, path: &Path) {
    let what = format!("{} of {}", path.display(), maker.name);
    let file = root.join(path);
    let meta = file.symlink_metadata().unwrap();
    if !meta.is_symlink() {
        assert_eq!(entry.mode, meta.mode() & 0o7777, "mode of {what}");
    }
    assert_eq!(
        (entry.uid, entry.gid),
        (meta.uid(), meta.gid()),
        "owner of {what}"
    );
    let nanoseconds = if maker.nanoseconds {
        meta.mtime_nsec()
    } else {
        0
    };
    let mtime = (entry.mtime_seconds, i64::from(entry.mtime_nanoseconds));
    // libarchive 3.6 writes the two parts of -5.25 s, -6 s and 0.75 s, as "-6.75".
    let misprinted = maker.name == "bsdtar pax" && meta.mtime() < 0 && nanoseconds > 0;
    if !misprinted {
        assert_eq!(mtime, (meta.mtime(), nanoseconds), "mtime of {what}");
    }
    let is_first = !matches!(entry.kind, TarKind::HardLink(_));
    if is_first {
        let xattrs = if maker.xattrs {
            xattrs_of(&file)
        } else {
            Vec::new()
        };
        assert_eq!(entry.xattrs, xattrs, "attributes of {what}");
    }
    compare_kind(maker, archive, entry, root, &file, &meta, &what);
}

fn compare_kind(
    maker: &Maker,
    archive: &File,
    entry: &TarEntry,
    root: &Path,
    file: &Path,
    meta: &Metadata,
    what: &str,
) {
    let device = |major, minor| rustix::fs::makedev(major, minor) == meta.rdev();
    match &entry.kind {
        TarKind::File { size, extents } => {
            assert!(meta.is_file(), "{what}");
            assert_eq!(*size, meta.len(), "size of {what}");
            if 0 < *size {
                let stored: u64 = extents.iter().map(|extent| extent.len).sum();
                let sparse = file.file_name().unwrap().as_bytes().starts_with(b"sparse");
                assert_eq!(stored < *size, maker.sparse && sparse, "holes of {what}");
            }
            let source = File::open(file).unwrap();
            // The huge file has its data at the start, at 5 GiB and at its end.
            let ranges = match *size {
                ..100_000_000 => vec![(0, *size)],
                _ => vec![
                    (0, 1 << 20),
                    ((5 << 30) - 8192, 1 << 20),
                    (*size - (1 << 20), 1 << 20),
                ],
            };
            for (offset, len) in ranges {
                let mut expected = vec![0; usize::try_from(len).unwrap()];
                source.read_exact_at(&mut expected, offset).unwrap();
                assert!(
                    read_at(archive, entry, offset, len) == expected,
                    "content of {what}"
                );
            }
        }
        TarKind::HardLink(target) => {
            let target = root.join(path_of(target)).symlink_metadata().unwrap();
            assert_eq!((target.ino(), meta.nlink()), (meta.ino(), 2), "{what}");
        }
        TarKind::Symlink(target) => {
            assert_eq!(
                fs::read_link(file).unwrap().as_os_str().as_bytes(),
                target,
                "{what}"
            );
        }
        TarKind::Directory => assert!(meta.is_dir(), "{what}"),
        TarKind::Fifo => assert!(meta.file_type().is_fifo(), "{what}"),
        TarKind::CharDevice { major, minor } => {
            assert!(
                meta.file_type().is_char_device() && device(*major, *minor),
                "{what}"
            );
        }
        TarKind::BlockDevice { major, minor } => {
            assert!(
                meta.file_type().is_block_device() && device(*major, *minor),
                "{what}"
            );
        }
    }
}

#[test]
fn archives_of_every_tool_are_read_as_they_were_made() {
    let dir = tempfile::tempdir().unwrap();
    let mut trees = BTreeMap::new();
    let mut archives = Vec::new();
    for maker in MAKERS {
        let root = trees
            .entry(maker.level)
            .or_insert_with(|| make_tree(dir.path(), maker.level));
        let path = dir
            .path()
            .join(format!("{}.tar", maker.name.replace(' ', "_")));
        if !maker.make(dir.path(), root, &path) {
            continue;
        }
        let archive = File::open(&path).unwrap();
        let entries = parse(&path);
        let mut expected = walk(root);
        for entry in &entries {
            let relative = Path::new(".").join(path_of(&entry.path));
            let relative: PathBuf = relative.components().collect();
            assert!(
                expected.remove(&relative),
                "{}: {}",
                maker.name,
                relative.display()
            );
            compare(maker, &archive, entry, root, &relative);
        }
        assert_eq!(expected, BTreeSet::new(), "left out by {}", maker.name);
        archives.push(path);
    }
    assert!(!archives.is_empty(), "no tool is installed");
    assert_eq!(compare_with_go(dir.path(), &archives), 0, "refused by Go");
}

/// Compares with what Go reads: names, metadata and contents, in order, and nothing else.
///
/// Returns how many archives Go refused, which ends the comparison of that one.
pub(crate) fn compare_with_go(dir: &Path, archives: &[PathBuf]) -> usize {
    let Some(go) = go_reader(dir) else {
        skipped("Go as a reader", "no go");
        return 0;
    };
    let output = Command::new(&go)
        .arg("read")
        .args(archives)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let go = String::from_utf8(output.stdout).unwrap();
    let mut go = go.lines().peekable();
    let mut n_refused = 0;
    for path in archives {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(go.next(), Some(name));
        let archive = File::open(path).unwrap();
        for entry in parse(path) {
            if go.peek().is_some_and(|line| line.starts_with("refused")) {
                break;
            }
            let ours = line(&archive, &entry);
            assert_eq!(Some(&*ours), go.next(), "{}", path.display());
        }
        let refused = go.next_if(|line| line.starts_with("refused"));
        n_refused += usize::from(refused.is_some());
    }
    assert_eq!(go.next(), None);
    n_refused
}

/// Writes an entry as the Go program does.
fn line(archive: &File, entry: &TarEntry) -> String {
    let (kind, size, detail) = match &entry.kind {
        TarKind::File { size, .. } => ("file", *size, String::new()),
        TarKind::HardLink(target) => ("link", 0, hex(target)),
        TarKind::Symlink(target) => ("symlink", 0, hex(target)),
        TarKind::Directory => ("dir", 0, String::new()),
        TarKind::CharDevice { major, minor } => ("char", 0, format!("{major}:{minor}")),
        TarKind::BlockDevice { major, minor } => ("block", 0, format!("{major}:{minor}")),
        TarKind::Fifo => ("fifo", 0, String::new()),
    };
    let mut crc = flate2::Crc::new();
    if 0 < size && size < 100_000_000 {
        crc.update(&read_at(archive, entry, 0, size));
    }
    let mut line = format!(
        "{} {kind} {size} {detail} {:o} {} {} {}.{:09} {:08x}",
        hex(&entry.path),
        entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime_seconds,
        entry.mtime_nanoseconds,
        crc.sum(),
    );
    for (name, value) in &entry.xattrs {
        write!(line, " {}={}", hex(name), hex(value)).unwrap();
    }
    line
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn levels_cover_what_they_promise() {
    let dir = tempfile::tempdir().unwrap();
    let count = |level| walk(&make_tree(dir.path(), level)).len();
    let counts = [Level::V7, Level::Ustar, Level::Rich].map(count);
    assert!(counts[0] < counts[1] && counts[1] < counts[2], "{counts:?}");
}
