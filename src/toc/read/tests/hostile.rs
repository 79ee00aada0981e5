//! Tables that nobody wrote: whatever they say, nothing panics, and what is taken can be fetched.

use proptest::prelude::*;

use super::*;
use crate::codec::piece_map::BLOCK_BYTES;

fn entry_like() -> impl Strategy<Value = Value> {
    let names = prop::sample::select(vec![
        "f",
        "g",
        "d/",
        "../x",
        "/abs",
        ".",
        ".wh.f",
        ".wh..wh..opq",
    ]);
    let kinds = prop::sample::select(vec!["reg", "reg", "chunk", "chunk", "dir", "hardlink", "x"]);
    let numbers = || {
        prop::sample::select(vec![
            0u64,
            1,
            7,
            100,
            CHUNK_BYTES,
            CHUNK_BYTES + 1,
            1 << 24,
            1 << 40,
            u64::MAX,
        ])
    };
    let parts = (
        names,
        kinds,
        numbers(),
        numbers(),
        numbers(),
        0u64..2000,
        numbers(),
        any::<bool>(),
    );
    parts.prop_map(|(name, kind, size, chunk_offset, chunk_size, offset, inner, zeros)| json!({
        "name": name, "type": kind, "linkName": name, "size": size, "chunkOffset": chunk_offset,
        "chunkSize": chunk_size, "offset": offset, "innerOffset": inner, "digest": digest(name),
        "chunkDigest": digest(kind), "chunkType": if zeros { "zeros" } else { "" },
    }))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a table says, what comes of it can be fetched piece by piece, or it is refused.
    #[test]
    fn tables_panic_nowhere(mut entries in prop::collection::vec(entry_like(), 1..6), in_order: bool) {
        if in_order {
            entries.sort_by_key(|it| it["offset"].as_u64());
        }
        if let Ok((layer_bytes, kept)) = read_entries(&json!(entries)) {
            let mut writer = PieceMapWriter::new(Vec::new()).unwrap();
            for piece in &kept.pieces {
                prop_assert!(writer.push(piece).is_ok(), "{piece:?} of {:?}", kept.pieces);
                prop_assert!(piece.layer_end() <= layer_bytes && piece.blob.end <= DATA_END);
            }
            let end = kept.pieces.last().map(Piece::layer_end);
            prop_assert_eq!(end.map(|it| it.next_multiple_of(BLOCK_BYTES)), Some(layer_bytes));
        }
    }

    #[test]
    fn flipped_bytes_panic_nowhere(at in 0usize..1000, byte: u8) {
        let json = json!({ "version": 1, "entries": [
            { "name": "d", "type": "dir", "modtime": "2000-03-01T00:00:00Z", "xattrs": { "user.a": "AA==" } },
            with(file("f", 10, 100), &json!({ "chunkSize": 4 })),
            { "name": "f", "type": "chunk", "chunkOffset": 4, "offset": 200, "chunkDigest": digest("4") },
        ]});
        let mut json = json.to_string().into_bytes();
        let at = at % json.len();
        json[at] = byte;
        let _ = read_with(&chunked(&json), CHUNKED, &TocLimits::default());
        let mut table = estargz(&json);
        let at = at % table.len();
        table[at] = byte;
        let _ = read_with(&table, TocKind::Estargz, &TocLimits::default());
    }
}
