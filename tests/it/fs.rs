//! The file system against a naive model, with layers that are plain memory.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{
    collections::BTreeSet,
    io,
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
};

use clip_csi::{
    chunk::{self, CHUNK_BYTES},
    digest::{BlobDigest, ChunkDigest, DiffId, ManifestDigest},
    fs::{
        Attributes, ClipFs, FsError, LayerData, LayerMismatch, Statistics, Wait, read::ReadOutcome,
    },
    index::{
        image::{FileType, ImageIndex, Ino},
        layer_index::{LayerIndex, LayerIndexBuilder},
        merge::Merge,
    },
    metrics::Metrics,
    tar::{TarEntry, TarExtent, TarKind},
};
use proptest::prelude::*;

/// A layer in memory of which some chunks are absent.
#[derive(Debug)]
struct Fake {
    diff_id: DiffId,
    bytes: Vec<u8>,
    absent: Mutex<BTreeSet<u32>>,
    /// Chunk that is taken away by the next read: an eviction in its middle.
    evict_in_read: Mutex<Option<u32>>,
    /// Whether it is filled again before the read is over, and how often that was.
    refills_in_read: AtomicBool,
    n_evictions: AtomicU64,
    /// Whether the page cache has nothing.
    cold: bool,
    n_reads: AtomicUsize,
}

impl LayerData for Fake {
    fn diff_id(&self) -> DiffId {
        self.diff_id
    }

    fn layer_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn has(&self, chunks: Range<u32>) -> bool {
        self.absent.lock().unwrap().range(chunks).next().is_none()
    }

    fn n_evictions(&self, _chunks: Range<u32>) -> u64 {
        self.n_evictions.load(Ordering::Relaxed)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<bool> {
        self.n_reads.fetch_add(1, Ordering::Relaxed);
        if let Some(chunk) = self.evict_in_read.lock().unwrap().take() {
            self.n_evictions.fetch_add(1, Ordering::Relaxed);
            if !self.refills_in_read.load(Ordering::Relaxed) {
                self.absent.lock().unwrap().insert(chunk);
            }
        }
        let start = usize::try_from(offset).unwrap();
        let found = self.bytes.get(start..start + buf.len());
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(wait == Wait::ForDisk || !self.cold)
    }
}

/// Bytes that differ from their neighbours and from zero.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|it| u8::try_from(it.wrapping_mul(2_654_435_761) >> 7 & 0x7f).unwrap() | 0x80)
        .collect()
}

fn fake(bytes: Vec<u8>) -> Fake {
    Fake {
        diff_id: DiffId::of(&bytes),
        bytes,
        absent: Mutex::default(),
        evict_in_read: Mutex::default(),
        refills_in_read: AtomicBool::new(false),
        n_evictions: AtomicU64::new(0),
        cold: false,
        n_reads: AtomicUsize::new(0),
    }
}

fn entry(path: &str, kind: TarKind) -> TarEntry {
    TarEntry {
        path: path.as_bytes().to_vec(),
        kind,
        mode: 0o4751,
        uid: 70_000,
        gid: 8,
        mtime_seconds: -9,
        mtime_nanoseconds: 10,
        xattrs: vec![],
    }
}

fn file(path: &str, size: u64, extents: &[(u64, u64, u64)]) -> TarEntry {
    let extents = extents
        .iter()
        .map(|(file_offset, layer_offset, len)| TarExtent {
            file_offset: *file_offset,
            layer_offset: *layer_offset,
            len: *len,
        });
    let kind = TarKind::File {
        size,
        extents: extents.collect(),
    };
    entry(path, kind)
}

fn index(layers: &[(&Fake, &[TarEntry])]) -> ImageIndex<Vec<u8>> {
    let mut merge = Merge::new(100_000);
    for (layer, entries) in layers {
        let mut builder = LayerIndexBuilder::default();
        for entry in *entries {
            builder.push_entry(entry).unwrap();
        }
        let layer_bytes = layer.bytes.len() as u64;
        for _ in 0..chunk::n_chunks(layer_bytes) {
            builder.push_chunk(&ChunkDigest::of(b""));
        }
        let encoded = LayerIndex::decode(builder.finish(layer.diff_id, layer_bytes)).unwrap();
        merge.add_layer(&encoded, BlobDigest::of(b""), 1).unwrap();
    }
    ImageIndex::open(merge.finish(ManifestDigest::of(b"")).unwrap()).unwrap()
}

/// An image of one layer, and the layer.
fn one_layer(layer: Fake, entries: &[TarEntry]) -> (ClipFs<Vec<u8>>, Arc<Fake>) {
    let index = index(&[(&layer, entries)]);
    let layer = Arc::new(layer);
    let fs = ClipFs::new(index, vec![layer.clone()], Metrics::new()).unwrap();
    (fs, layer)
}

fn find(fs: &ClipFs<Vec<u8>>, path: &str) -> Attributes {
    let root = fs.attributes(Ino::ROOT).unwrap();
    path.split('/').fold(root, |directory, name| {
        fs.lookup(directory.ino, name.as_bytes()).unwrap()
    })
}

#[test]
fn layers_must_be_those_of_the_index() {
    let (a, b) = (fake(vec![1]), fake(vec![2]));
    let expected = (a.diff_id, b.diff_id);
    let make = |layers: Vec<Arc<dyn LayerData>>| {
        let (a, b) = (fake(vec![1]), fake(vec![2]));
        let index = index(&[(&a, &[]), (&b, &[])]);
        ClipFs::new(index, layers, Metrics::new()).map(|_| ())
    };
    let (a, b): (Arc<dyn LayerData>, Arc<dyn LayerData>) = (Arc::new(a), Arc::new(b));
    assert_eq!(make(vec![a.clone(), b.clone()]), Ok(()));
    let count = LayerMismatch::Count {
        expected: 2,
        found: 1,
    };
    assert_eq!(make(vec![a.clone()]), Err(count));
    let swapped = LayerMismatch::DiffId {
        at: 0,
        expected: expected.0,
        found: expected.1,
    };
    assert_eq!(make(vec![b, a]), Err(swapped));
}

#[test]
fn attributes_are_those_of_the_index() {
    let (fs, _) = one_layer(
        fake(pattern(200_000)),
        &[
            file("d/small", 5, &[(0, 0, 5)]),
            file(
                "d/sparse",
                1 << 30,
                &[(0, 0, 100_000), (1 << 20, 100_000, 7)],
            ),
            entry("d/null", TarKind::CharDevice { major: 1, minor: 3 }),
            entry("d/link", TarKind::Symlink(b"small".to_vec())),
            entry("d/hard", TarKind::HardLink(b"d/small".to_vec())),
            entry("d/e", TarKind::Directory),
        ],
    );
    let small = find(&fs, "d/small");
    let expected = Attributes {
        ino: small.ino,
        file_type: FileType::Regular,
        permissions: 0o4751,
        n_links: 2,
        uid: 70_000,
        gid: 8,
        size: 5,
        blocks: 1,
        mtime_seconds: -9,
        mtime_nanoseconds: 10,
        device: (0, 0),
        block_bytes: 4096,
    };
    assert_eq!(small, expected);
    assert_eq!(find(&fs, "d/hard"), expected);
    assert_eq!(fs.attributes(small.ino).unwrap(), expected);
    assert_eq!(find(&fs, "d/sparse").blocks, 100_007_u64.div_ceil(512));
    assert_eq!(find(&fs, "d/null").device, (1, 3));
    assert_eq!(find(&fs, "d").n_links, 3);
    assert_eq!(find(&fs, "d/link").size, 5);
    assert_eq!(fs.read_link(find(&fs, "d/link").ino).unwrap(), b"small");
    // Handles: `.` works in all inodes, `..` leads up and stops at the root.
    assert_eq!(fs.lookup(small.ino, b".").unwrap(), expected);
    assert_eq!(find(&fs, "d/..").ino, Ino::ROOT);
    assert_eq!(find(&fs, "d/e/..").ino, find(&fs, "d").ino);
    assert_eq!(find(&fs, "..").ino, Ino::ROOT);
    let statistics = Statistics {
        blocks: (5 + (1_u64 << 30)).div_ceil(4096),
        inodes: 7,
        block_bytes: 4096,
        max_name_bytes: 255,
    };
    assert_eq!(fs.statfs(), statistics);
}

#[test]
fn questions_without_an_answer_are_errors() {
    let (fs, _) = one_layer(
        fake(pattern(10)),
        &[
            file("d/f", 5, &[(0, 0, 5)]),
            entry("fifo", TarKind::Fifo),
            entry("link", TarKind::Symlink(b"d".to_vec())),
        ],
    );
    let ino = |path| find(&fs, path).ino;
    let read = |ino| {
        fs.read(ino, 0, 9, &mut Vec::new(), Wait::ForDisk)
            .map(|_| ())
    };
    let long = [b'a'; 256];
    for (result, expected) in [
        (fs.lookup(Ino::ROOT, b"nothing").map(|_| ()), "NotFound"),
        (fs.lookup(Ino::ROOT, b"").map(|_| ()), "NotFound"),
        (fs.lookup(Ino::ROOT, &long).map(|_| ()), "NameTooLong"),
        (fs.lookup(Ino(99), b"f").map(|_| ()), "NotFound"),
        (fs.lookup(ino("d/f"), b"f").map(|_| ()), "NotDir"),
        (fs.lookup(ino("d/f"), b"..").map(|_| ()), "NotDir"),
        (fs.attributes(Ino(0)).map(|_| ()), "NotFound"),
        (fs.attributes(Ino(u64::MAX)).map(|_| ()), "NotFound"),
        (fs.read_link(ino("d")).map(|_| ()), "WrongType"),
        (fs.read_dir(ino("d/f"), 0).map(|_| ()), "NotDir"),
        (fs.get_xattr(ino("d/f"), b"user.a").map(|_| ()), "NoAttr"),
        (read(ino("d")), "IsDir"),
        (read(ino("fifo")), "WrongType"),
        (read(ino("link")), "WrongType"),
        (read(Ino(99)), "NotFound"),
    ] {
        assert_eq!(format!("{:?}", result.unwrap_err()), expected);
    }
}

#[test]
fn a_directory_can_be_listed_from_any_offset() {
    let names: Vec<String> = (0..5000).map(|it| format!("{it:04}")).collect();
    let entries: Vec<_> = names
        .iter()
        .map(|it| file(&format!("d/{it}"), 0, &[]))
        .collect();
    let (fs, _) = one_layer(fake(vec![]), &entries);
    let ino = find(&fs, "d").ino;
    let list = |offset| {
        let entries = fs.read_dir(ino, offset).unwrap().map(|it| it.unwrap());
        entries.map(|it| String::from_utf8(it.name.to_vec()).unwrap())
    };
    let all: Vec<String> = list(0).collect();
    assert_eq!(all[..2], [".", ".."]);
    assert_eq!(all[2..], names);
    // One entry at a time, each from where the one before it said.
    let (mut offset, mut one_by_one) = (0, Vec::new());
    while let Some(entry) = fs.read_dir(ino, offset).unwrap().next() {
        let entry = entry.unwrap();
        one_by_one.push(String::from_utf8(entry.name.to_vec()).unwrap());
        assert!(offset < entry.next_offset);
        offset = entry.next_offset;
    }
    assert_eq!(one_by_one, all);
    assert_eq!(list(5002).count(), 0);
    assert_eq!(list(u64::MAX).count(), 0);
    let dots: Vec<_> = fs
        .read_dir(ino, 0)
        .unwrap()
        .take(2)
        .map(|it| it.unwrap())
        .collect();
    assert_eq!(
        (dots[0].attributes.ino, dots[1].attributes.ino),
        (ino, Ino::ROOT)
    );
}

#[test]
fn extended_attributes_are_found_by_name() {
    let mut with = file("f", 0, &[]);
    with.xattrs = vec![
        (b"user.a".to_vec(), b"1".to_vec()),
        (b"security.capability".to_vec(), vec![0, 1, 2]),
    ];
    let (fs, _) = one_layer(fake(vec![]), &[with, file("g", 0, &[])]);
    let (f, g) = (find(&fs, "f").ino, find(&fs, "g").ino);
    assert!(fs.has_xattrs());
    assert_eq!(fs.get_xattr(f, b"security.capability").unwrap(), [0, 1, 2]);
    assert!(matches!(fs.get_xattr(f, b"user."), Err(FsError::NoAttr)));
    let mut names = fs.list_xattrs(f).unwrap();
    names.sort_unstable();
    assert_eq!(names, [&b"security.capability"[..], b"user.a"]);
    assert_eq!(fs.list_xattrs(g).unwrap().len(), 0);
    assert!(!one_layer(fake(vec![]), &[]).0.has_xattrs());
}

#[test]
fn a_read_names_exactly_the_missing_chunks() {
    let chunk = CHUNK_BYTES;
    let layer = fake(pattern(usize::try_from(4 * chunk).unwrap()));
    let size = 3 * chunk;
    // Behind its extent at the end of the layer, the file has a hole of two chunks, then the start.
    let extents = [(0, 3 * chunk - 10, 20), (size - 5, 0, 5)];
    let (fs, layer) = one_layer(layer, &[file("f", size, &extents)]);
    let ino = find(&fs, "f").ino;
    let read = |offset, len| {
        let mut buf = Vec::new();
        fs.read(ino, offset, len, &mut buf, Wait::Never).unwrap()
    };
    let absent = |chunks: &[u32]| {
        *layer.absent.lock().unwrap() = chunks.iter().copied().collect();
    };
    let missing = |ranges: &[(u32, u32)]| {
        let ranges = ranges.iter().map(|it| (layer.diff_id, it.0..it.1));
        ReadOutcome::Missing(ranges.collect())
    };
    absent(&[0, 1, 2, 3]);
    let all = u32::try_from(size).unwrap();
    assert_eq!(read(0, all), missing(&[(0, 1), (2, 4)]));
    assert_eq!(read(0, 10), missing(&[(2, 3)]));
    assert_eq!(read(0, 11), missing(&[(2, 4)]));
    assert_eq!(read(10, 1), missing(&[(3, 4)]));
    assert_eq!(read(20, 1000), ReadOutcome::Ready, "a hole needs no chunk");
    assert_eq!(
        layer.n_reads.load(Ordering::Relaxed),
        0,
        "nothing was read in vain"
    );
    absent(&[2]);
    assert_eq!(read(0, all), missing(&[(2, 3)]));
    absent(&[1]);
    assert_eq!(read(0, all), ReadOutcome::Ready);
    assert_eq!(read(size, 10), ReadOutcome::Ready);
    assert_eq!(read(u64::MAX, u32::MAX), ReadOutcome::Ready);
}

#[test]
fn an_eviction_during_the_read_is_noticed() {
    let (fs, layer) = one_layer(fake(pattern(100)), &[file("f", 100, &[(0, 0, 100)])]);
    let ino = find(&fs, "f").ino;
    let mut buf = Vec::new();
    *layer.evict_in_read.lock().unwrap() = Some(0);
    let outcome = fs.read(ino, 0, 100, &mut buf, Wait::ForDisk).unwrap();
    assert_eq!(outcome, ReadOutcome::Missing(vec![(layer.diff_id, 0..1)]));
    // Also if all is there again when the read is over.
    layer.absent.lock().unwrap().clear();
    layer.refills_in_read.store(true, Ordering::Relaxed);
    *layer.evict_in_read.lock().unwrap() = Some(0);
    let mut read = || fs.read(ino, 0, 100, &mut buf, Wait::ForDisk).unwrap();
    assert_eq!(read(), ReadOutcome::Evicted(layer.diff_id));
    assert_eq!(read(), ReadOutcome::Ready);
}

#[test]
fn a_read_that_may_not_wait_says_so() {
    let mut layer = fake(pattern(100));
    layer.cold = true;
    let (fs, _) = one_layer(layer, &[file("f", 100, &[(0, 0, 100)])]);
    let ino = find(&fs, "f").ino;
    let mut buf = Vec::new();
    let mut read = |wait| fs.read(ino, 0, 100, &mut buf, wait).unwrap();
    assert_eq!(read(Wait::Never), ReadOutcome::WouldBlock);
    assert_eq!(read(Wait::ForDisk), ReadOutcome::Ready);
}

#[test]
fn a_broken_disk_names_layer_and_offset() {
    let mut layer = fake(pattern(200));
    let index = index(&[(&layer, &[file("f", 50, &[(0, 60, 50)])])]);
    // The local copy has been cut.
    layer.bytes.truncate(100);
    let layer = Arc::new(layer);
    let fs = ClipFs::new(index, vec![layer.clone()], Metrics::new()).unwrap();
    let ino = find(&fs, "f").ino;
    match fs.read(ino, 8, 50, &mut Vec::new(), Wait::ForDisk) {
        Err(FsError::Io {
            layer: id,
            offset,
            source,
        }) => {
            assert_eq!((id, offset), (layer.diff_id, 68));
            assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_damaged_index_gives_errors_not_panics() {
    let entries = [
        file("d/f", 300, &[(10, 0, 50), (100, 60, 40)]),
        entry("l", TarKind::Symlink(b"d".to_vec())),
    ];
    let good = index(&[(&fake(pattern(200)), &entries)]).source().clone();
    let mut n_served = 0;
    for at in 4096..good.len() {
        for bits in [0xff, 0x01, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= bits;
            let Ok(index) = ImageIndex::open(bad) else {
                continue;
            };
            let layer: Arc<dyn LayerData> = Arc::new(fake(pattern(200)));
            let Ok(fs) = ClipFs::new(index, vec![layer], Metrics::new()) else {
                continue;
            };
            n_served += 1;
            for ino in (0..6).map(Ino) {
                let _ = (fs.lookup(ino, b"d"), fs.attributes(ino), fs.read_link(ino));
                let _ = fs.read_dir(ino, 0).map(|it| it.take(100).count());
                let _ = fs.read(ino, 3, 200, &mut Vec::new(), Wait::ForDisk);
                let _ = (fs.get_xattr(ino, b"a").is_ok(), fs.statfs());
                let _ = fs.list_xattrs(ino);
            }
        }
    }
    assert!(1000 < n_served, "{n_served}");
}

/// Extents of a file as `(hole before it, layer offset, len)`.
fn sparse_file() -> impl Strategy<Value = (Vec<(u64, u64, u64)>, u64)> {
    let extent = (0..300u64, 0..1800u64, 1..200u64);
    (prop::collection::vec(extent, 0..8), 0..300u64)
}

proptest! {
    #[test]
    fn reads_equal_a_naive_model(
        (extents, tail) in sparse_file(),
        reads in prop::collection::vec((0..5000u64, 0..3000u32), 1..20),
    ) {
        let layer = fake(pattern(2000));
        let (mut model, mut list) = (Vec::new(), Vec::new());
        for (hole, layer_offset, len) in extents {
            model.resize(model.len() + usize::try_from(hole).unwrap(), 0);
            list.push((model.len() as u64, layer_offset, len));
            let start = usize::try_from(layer_offset).unwrap();
            model.extend(&layer.bytes[start..start + usize::try_from(len).unwrap()]);
        }
        model.resize(model.len() + usize::try_from(tail).unwrap(), 0);
        let (fs, _) = one_layer(layer, &[file("f", model.len() as u64, &list)]);
        let ino = find(&fs, "f").ino;
        // One dirty buffer for all reads: holes must be written, not assumed.
        let mut buf = vec![0xee; 4000];
        for (offset, len) in reads {
            let outcome = fs.read(ino, offset, len, &mut buf, Wait::Never).unwrap();
            prop_assert_eq!(outcome, ReadOutcome::Ready);
            let start = usize::try_from(offset).unwrap().min(model.len());
            let end = (start + usize::try_from(len).unwrap()).min(model.len());
            prop_assert_eq!(&buf, &model[start..end]);
        }
    }
}
