//! What is not given to the kernel.

use std::fs::File;

use clip_csi::{
    erofs::{self, ErofsError, LayerFiles, METADATA_NAME},
    index::{image::ImageIndex, source::IndexBytes},
    tar::TarKind,
};
use proptest::prelude::*;
use rustix::fs::OFlags;

use super::{layer_files, padded};
use crate::fuse_fakes::{LayerText, build, noise};

#[test]
fn what_a_small_index_would_make_large_is_refused() {
    let mut layer = LayerText::default();
    // Half a megabyte of metadata each, which the index has in a hundred bytes.
    for at in 0..2100 {
        layer.sparse_file(&format!("file-{at}"), 1 << 25, &[(512, &[7; 512])]);
    }
    let (index, _) = build(padded(vec![layer]));
    assert!(index.len() < 500_000, "{}", index.len());
    let file = tempfile::tempfile().unwrap();
    let refused = erofs::write(&ImageIndex::open(index).unwrap(), &file).unwrap_err();
    assert!(
        matches!(&refused, ErofsError::Unfit { what, .. } if what.contains("too large")),
        "{refused}"
    );
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn what_has_no_form_is_refused() {
    let unfit = |make: &dyn Fn(&mut LayerText)| {
        let mut layer = LayerText::default();
        layer.file("first", b"first");
        make(&mut layer);
        let (index, _) = build(vec![layer]);
        let index = ImageIndex::open(index).unwrap();
        match erofs::write(&index, &tempfile::tempfile().unwrap()) {
            Err(ErofsError::Unfit { what, .. }) => what,
            other => panic!("{other:?}"),
        }
    };
    let pad = |layer: &mut LayerText| layer.bytes.resize(1024, 0);
    assert_eq!(unfit(&|_| {}), "an archive that ends within a block");
    assert_eq!(
        unfit(&|layer| {
            pad(layer);
            let acl = (b"system.posix_acl_access".to_vec(), vec![2, 0, 0, 0]);
            layer.push("acl", TarKind::Directory).xattrs = vec![acl];
        }),
        "an extended attribute of another kind"
    );
    assert_eq!(
        unfit(&|layer| {
            pad(layer);
            let long = (b"user.long".to_vec(), vec![1; 70_000]);
            layer.push("long", TarKind::Directory).xattrs = vec![long];
        }),
        "a long extended attribute"
    );
    assert_eq!(
        unfit(&|layer| {
            layer.sparse_file("odd", 10_000, &[(100, b"odd")]);
            pad(layer);
        }),
        "a file whose parts do not begin and end with blocks"
    );
    assert_eq!(
        unfit(&|layer| {
            layer.sparse_file("short", 10_000, &[(512, b"short")]);
            pad(layer);
        }),
        "a file whose parts do not begin and end with blocks"
    );
    assert_eq!(
        unfit(&|layer| {
            let block = noise(512, 1);
            layer.sparse_file("many", 1 << 26, &[(512, &block)]);
            layer.bytes.resize(2048, 0);
        }),
        "a sparse file of too many parts"
    );
    assert_eq!(
        unfit(&|layer| {
            pad(layer);
            layer.bytes.extend(b"as a piece behind another one lies");
            let TarKind::File { extents, .. } = &mut layer.entries[0].kind else {
                panic!("a file");
            };
            extents[0].layer_offset = 7;
        }),
        "content that does not begin a block"
    );
    assert_eq!(
        unfit(&|layer| {
            pad(layer);
            let (major, minor) = (4096, 0);
            layer.push("device", TarKind::CharDevice { major, minor });
        }),
        "a device number beyond what Linux has"
    );
}

#[test]
fn only_files_that_their_owner_may_read_are_mounted() {
    let dir = tempfile::tempdir().unwrap();
    let metadata = dir.path().join(METADATA_NAME);
    File::create(&metadata).unwrap();
    let good = || layer_files(&[vec![0; 512]], dir.path()).remove(0);
    let named = |flags| {
        let mode = rustix::fs::Mode::empty();
        rustix::fs::open(dir.path().join("data-0"), flags, mode).unwrap()
    };
    let directory = File::open(dir.path()).unwrap().into();
    drop(good());
    for data in [named(OFlags::PATH), named(OFlags::WRONLY), directory] {
        let files = LayerFiles { data, ..good() };
        let err = erofs::mount(&metadata, &[files], dir.path()).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::EBADF));
    }
}

/// An index of each kind of thing.
fn varied() -> Vec<u8> {
    let mut layer = LayerText::default();
    layer.push("d", TarKind::Directory);
    layer.push("d/e", TarKind::Directory);
    let file = layer.file("d/file", &noise(5000, 1));
    file.xattrs = vec![(b"user.note".to_vec(), b"hello".to_vec())];
    layer.sparse_file(
        "d/sparse",
        20_000,
        &[(4096, &[7; 512]), (8192, &noise(512, 2))],
    );
    layer.push("d/e/hard", TarKind::HardLink(b"d/file".to_vec()));
    layer.push("link", TarKind::Symlink(b"d/file".to_vec()));
    layer.push("null", TarKind::CharDevice { major: 1, minor: 3 });
    build(padded(vec![layer])).0
}

/// Writes the metadata of an index; whether that was to be had.
fn write(bytes: impl IndexBytes) -> bool {
    let Ok(index) = ImageIndex::open(bytes) else {
        return false;
    };
    erofs::write(&index, &tempfile::tempfile().unwrap()).is_ok()
}

#[test]
fn an_index_that_is_cut_short_is_refused() {
    let whole = varied();
    assert!(write(whole.clone()));
    for len in 0..whole.len() {
        assert!(!write(whole[..len].to_vec()), "{len} bytes");
    }
}

#[test]
fn directories_that_make_no_tree_are_refused() {
    let mut layer = LayerText::default();
    for path in ["a", "a/inner", "b"] {
        layer.push(path, TarKind::Directory);
    }
    layer.file("c", b"c");
    let good = build(padded(vec![layer])).0;
    // The native section begins at 4096, its list of tables at 96 (docs/INDEX_FORMAT.md): names are the second,
    // in the order of directories, of 12 bytes each, of which the last four are a node.
    let table = good[4096 + 96 + 16..].first_chunk().unwrap();
    let names = 4096 + usize::try_from(u64::from_le_bytes(*table)).unwrap();
    let node_of = |bytes: &[u8], at: usize| {
        let node = bytes[names + 12 * at + 8..].first_chunk().unwrap();
        u32::from_le_bytes(*node)
    };
    let nodes: Vec<_> = (0..4).map(|it| node_of(&good, it)).collect();
    assert_eq!(nodes, [1, 2, 3, 4], "a, b, c and a/inner");
    assert!(write(good.clone()));
    // `b` is `a`, or what is in it; what is in `a` is `b`, `a` itself, or the root.
    for (at, node) in [(1, 1), (1, 4), (3, 2), (3, 1), (3, 0)] {
        let mut bytes = good.clone();
        bytes[names + 12 * at + 8..][..4].copy_from_slice(&u32::to_le_bytes(node));
        let index = ImageIndex::open(bytes).unwrap();
        let refused = erofs::write(&index, &tempfile::tempfile().unwrap()).unwrap_err();
        let what = "a directory with two places";
        assert!(
            matches!(refused, ErofsError::Damaged { what: found, .. } if found == what),
            "{at} {node}: {refused}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn errors_are_fine_and_panics_are_bugs(at in 4096_usize..1 << 16, word: u32) {
        let mut bytes = varied();
        let at = 4096 + (at - 4096) % (bytes.len() - 4100);
        bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        // Only that it returns.
        let _ = write(bytes);
    }
}
