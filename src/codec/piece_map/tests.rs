use proptest::prelude::*;

use super::*;
use crate::{codec::map_frame::seal, digest::DiffId};

const LAYER_BYTES: u64 = 5 * CHUNK_BYTES + 30;

fn subject() -> Subject {
    Subject {
        compression: Compression::Gzip,
        blob: BlobDigest::of(b"blob"),
        blob_bytes: 1 << 30,
        diff_id: DiffId::of(b"layer"),
        layer_bytes: LAYER_BYTES,
    }
}

fn piece(layer_offset: u64, len: u64, blob: Range<u64>, skipped: u64) -> Piece {
    Piece {
        layer_offset,
        len,
        blob,
        skipped,
        digest: BlobDigest::of(&layer_offset.to_le_bytes()),
    }
}

/// Two small ones in the first chunk, of one gzip member; a large one in three; small ones in the fifth
/// and the last.
fn pieces() -> Vec<Piece> {
    vec![
        piece(0, 100, 700..1000, 0),
        piece(100, 50, 700..1000, 612),
        piece(CHUNK_BYTES, 2 * CHUNK_BYTES + 7, 1000..500_000, 0),
        piece(4 * CHUNK_BYTES, 10, 500_000..500_100, 0),
        piece(4 * CHUNK_BYTES + 10, CHUNK_BYTES - 10, 500_100..600_000, 0),
        piece(5 * CHUNK_BYTES, 30, 700_000..700_040, 0),
    ]
}

fn write(pieces: &[Piece]) -> io::Result<Vec<u8>> {
    let mut writer = PieceMapWriter::new(Vec::new())?;
    pieces.iter().try_for_each(|it| writer.push(it))?;
    let map_bytes = writer.map_bytes();
    let written = writer.finish(&subject())?;
    assert_eq!(written.len() as u64, map_bytes);
    Ok(written)
}

#[test]
fn what_was_written_is_read_back() {
    let written = write(&pieces()).unwrap();
    assert!(PieceMap::<Vec<u8>>::is_one(&written) && !PieceMap::<Vec<u8>>::is_one(b"CLIPAMAP"));
    let map = PieceMap::decode(written).unwrap();
    assert_eq!(*map.subject(), subject());
    assert_eq!((map.n_pieces(), map.compression()), (6, Compression::Gzip));
    let read: Vec<_> = (0..6).map(|it| map.piece(it)).collect();
    assert_eq!(read, pieces());
}

#[test]
fn chunks_come_with_those_that_share_a_piece() {
    let map = PieceMap::decode(write(&pieces()).unwrap()).unwrap();
    for (chunks, whole, pieces, blob) in [
        (0..1, 0..1, 0..2, 700..1000),
        (1..2, 1..4, 2..3, 1000..500_000),
        (3..4, 1..4, 2..3, 1000..500_000),
        (4..5, 4..5, 3..5, 500_000..600_000),
        (5..6, 5..6, 5..6, 700_000..700_040),
        (0..2, 0..4, 0..3, 700..500_000),
        (3..5, 1..5, 2..5, 1000..600_000),
        (0..6, 0..6, 0..6, 700..700_040),
    ] {
        assert_eq!(map.whole(chunks.clone()), whole, "{chunks:?}");
        assert_eq!(map.pieces_in(&chunks), pieces, "{chunks:?}");
        assert_eq!(map.blob(&pieces), blob, "{chunks:?}");
    }
    // What no index names, but a reader may.
    for beyond in [6..7, u32::MAX - 1..u32::MAX] {
        assert_eq!(map.whole(beyond.clone()), beyond);
        assert!(map.pieces_in(&beyond).is_empty());
    }
}

#[test]
fn golden_bytes() {
    // Format changed: raise PIECE_MAP_VERSION, and say so in docs/INDEX_FORMAT.md.
    let mut writer = PieceMapWriter::new(Vec::new()).unwrap();
    writer.push(&piece(0, 30, 0x700..0x750, 9)).unwrap();
    let layer_bytes = 30;
    let subject = Subject {
        layer_bytes,
        ..subject()
    };
    let bytes = writer.finish(&subject).unwrap();
    assert_eq!(bytes.len(), 16 + 64 + 88 + 32);
    assert_eq!(&bytes[..16], b"CLIPPIEC\x01\0\0\0\0\0\0\0");
    assert_eq!(&bytes[16..32], b"\0\0\0\0\0\0\0\0\0\x07\0\0\0\0\0\0");
    assert_eq!(&bytes[32..48], b"\x50\0\0\0\x1e\0\0\0\x09\0\0\0\0\0\0\0");
    assert_eq!(bytes[48..80], BlobDigest::of(&[0; 8]).as_bytes()[..]);
    assert_eq!(bytes[80..88], [1, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(bytes[88..120], subject.blob.as_bytes()[..]);
    assert_eq!(bytes[120..128], (1u64 << 30).to_le_bytes());
    assert_eq!(bytes[128..160], subject.diff_id.as_bytes()[..]);
    assert_eq!(bytes[160..168], 30u64.to_le_bytes());
    assert_eq!(seal(bytes.clone()), bytes);
}

#[test]
fn pieces_that_cannot_be_fetched_alone_are_refused() {
    let large = MAX_PIECE_BYTES;
    for (what, wrong) in [
        ("nothing", vec![piece(0, 0, 1..2, 0)]),
        ("two chunks", vec![piece(1, CHUNK_BYTES, 1..9, 0)]),
        (
            "large within a chunk",
            vec![piece(1, CHUNK_BYTES + 1, 1..9, 0)],
        ),
        ("too large", vec![piece(0, large + 1, 1..9, 0)]),
        ("too far in", vec![piece(0, 1, 1..9, large + 1)]),
        ("no bytes of the blob", vec![piece(0, 1, 9..9, 0)]),
        ("too many of them", vec![piece(0, 1, 0..70_000, 0)]),
        ("overlap", vec![piece(0, 9, 1..9, 0), piece(8, 9, 9..10, 0)]),
        (
            "blob's order",
            vec![piece(0, 9, 2..9, 0), piece(9, 9, 1..9, 0)],
        ),
        (
            "in a large one's last chunk",
            vec![
                piece(0, CHUNK_BYTES + 1, 1..9, 0),
                piece(CHUNK_BYTES + 1, 9, 9..10, 0),
            ],
        ),
    ] {
        let refused = write(&wrong).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{what}");
    }
    // One that does not end with its layer's last block, or none.
    assert!(write(&[]).is_err() && write(&pieces()[..4]).is_err());
    let ends = |end: u64| {
        let mut pieces = pieces();
        pieces[5].len = end;
        write(&pieces).is_ok()
    };
    assert!(ends(1) && ends(30) && !ends(31));
    assert!(pieces()[4].ends_layer(LAYER_BYTES) && !pieces()[3].ends_layer(LAYER_BYTES));
}

#[test]
fn a_map_of_another_version_or_kind_is_told() {
    let good = write(&pieces()).unwrap();
    let mut version = good.clone();
    version[8] = 2;
    assert!(matches!(
        PieceMap::decode(version),
        Err(IndexError::Version { found: 2, .. })
    ));
    let mut flipped = good.clone();
    flipped[40] ^= 1;
    assert!(matches!(
        PieceMap::decode(flipped),
        Err(IndexError::Checksum { .. })
    ));
    assert!(matches!(
        PieceMap::decode(b"CLIPAMAP".repeat(20)),
        Err(IndexError::Magic { .. })
    ));
    for len in 0..good.len() {
        assert!(PieceMap::decode(&good[..len]).is_err(), "{len} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// A remote content cache may have anything, with a checksum.
    #[test]
    fn changed_maps_panic_nowhere(at in 0usize..520, byte: u8) {
        let mut bytes = write(&pieces()).unwrap();
        bytes[at] = byte;
        if let Ok(map) = PieceMap::decode(seal(bytes)) {
            for chunk in 0..6 {
                let whole = map.whole(chunk..chunk + 1);
                prop_assert!(whole.start <= chunk && chunk < whole.end && whole.end <= 6);
                let pieces = map.pieces_in(&whole);
                if !pieces.is_empty() {
                    let blob = map.blob(&pieces);
                    prop_assert!(blob.start < blob.end && blob.end <= map.subject().blob_bytes);
                }
            }
        }
    }
}
