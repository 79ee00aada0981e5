use super::*;
use crate::chunk::CHUNK_BYTES;

fn entry(path: &str, kind: TarKind) -> TarEntry {
    TarEntry {
        path: path.into(),
        kind,
        mode: 0o644,
        uid: 1,
        gid: 2,
        mtime_seconds: -3,
        mtime_nanoseconds: 4,
        xattrs: vec![(b"user.k".to_vec(), b"v".to_vec())],
    }
}

fn sample() -> Vec<u8> {
    let mut builder = LayerIndexBuilder::default();
    let extents = vec![TarExtent {
        file_offset: 0,
        layer_offset: 512,
        len: 5,
    }];
    builder
        .push_entry(&entry("a", TarKind::File { size: 5, extents }))
        .unwrap();
    builder
        .push_entry(&entry("l", TarKind::Symlink(b"a".to_vec())))
        .unwrap();
    builder
        .push_entry(&entry("d", TarKind::CharDevice { major: 1, minor: 3 }))
        .unwrap();
    builder.push_chunk(&ChunkDigest::of(b"one"));
    builder.push_chunk(&ChunkDigest::of(b"two"));
    builder.finish(DiffId::of(b"layer"), CHUNK_BYTES + 1)
}

#[test]
fn what_was_built_is_read_back() {
    let index = LayerIndex::decode(sample()).unwrap();
    assert_eq!(index.diff_id(), DiffId::of(b"layer"));
    assert_eq!(index.layer_bytes(), CHUNK_BYTES + 1);
    assert_eq!(index.chunk_digest(1), Some(ChunkDigest::of(b"two")));
    assert_eq!(index.chunk_digest(2), None);
    let entries: Vec<_> = index.entries().map(Result::unwrap).collect();
    assert_eq!(entries.len(), 3);
    assert_eq!(entries[0].path, b"a");
    assert_eq!(
        (entries[0].uid, entries[0].gid, entries[0].mtime_seconds),
        (1, 2, -3)
    );
    assert_eq!(entries[0].xattrs, vec![(&b"user.k"[..], &b"v"[..])]);
    let EntryKind::File { size: 5, extents } = &entries[0].kind else {
        panic!("{entries:?}")
    };
    assert_eq!(
        extents[..],
        [TarExtent {
            file_offset: 0,
            layer_offset: 512,
            len: 5
        }]
    );
    assert!(matches!(entries[1].kind, EntryKind::Symlink(b"a")));
    assert!(matches!(entries[2].kind, EntryKind::CharDevice(1, 3)));
}

#[test]
fn golden_bytes() {
    // Format changed: raise LAYER_INDEX_VERSION, and say so in docs/INDEX_FORMAT.md.
    let bytes = sample();
    assert_eq!(&bytes[..16], b"CLIPLYIX\x01\0\0\0\0\0\0\0");
    assert_eq!(bytes.len(), 366);
    assert_eq!(
        blake3::hash(&bytes).to_hex().as_str(),
        "e56028c67a32317bc026c12a070fb6319f33b57e81c5da3f144210b5c73aa55a"
    );
}

#[test]
fn every_flipped_bit_is_noticed() {
    let good = sample();
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(LayerIndex::decode(bad).is_err(), "bit {bit}");
    }
    for len in 0..good.len() {
        assert!(
            LayerIndex::decode(good[..len].to_vec()).is_err(),
            "length {len}"
        );
    }
}

#[test]
fn an_extent_outside_the_layer_is_refused() {
    for extent in [
        TarExtent {
            file_offset: 0,
            layer_offset: CHUNK_BYTES,
            len: 2,
        },
        TarExtent {
            file_offset: 4,
            layer_offset: 0,
            len: 2,
        },
        TarExtent {
            file_offset: 0,
            layer_offset: u64::MAX,
            len: 5,
        },
    ] {
        let mut builder = LayerIndexBuilder::default();
        let kind = TarKind::File {
            size: 5,
            extents: vec![extent],
        };
        builder.push_entry(&entry("a", kind)).unwrap();
        builder.push_chunk(&ChunkDigest::of(b""));
        builder.push_chunk(&ChunkDigest::of(b""));
        let bytes = builder.finish(DiffId::of(b""), CHUNK_BYTES + 1);
        let index = LayerIndex::decode(bytes).unwrap();
        assert!(index.entries().next().unwrap().is_err(), "{extent:?}");
    }
}
