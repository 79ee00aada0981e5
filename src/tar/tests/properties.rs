//! What holds for any bytes: how they are cut changes nothing, and nothing panics.

use proptest::prelude::*;

use super::{archive::*, *};

/// Cuts bytes at pseudo-random places, of very different distances.
fn cut(bytes: &[u8], lens: &[usize]) -> Vec<Vec<u8>> {
    let mut lens = lens.iter().cycle();
    let mut pieces = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (piece, others) = rest.split_at(rest.len().min(*lens.next().unwrap()));
        pieces.push(piece.to_vec());
        rest = others;
    }
    pieces
}

fn parse_cut(bytes: &[u8], lens: &[usize]) -> (Vec<TarEntry>, Result<Vec<TarEntry>, TarError>) {
    let pieces = cut(bytes, lens);
    parse_pieces(pieces.iter().map(Vec::as_slice), TarLimits::default())
}

/// Checks what the index relies on.
fn check(entry: &TarEntry, stream_len: u64) {
    assert!(!entry.path.is_empty() && !entry.path.contains(&0));
    assert_eq!(entry.mode & !0o7777, 0);
    assert!(entry.mtime_nanoseconds < 1_000_000_000);
    assert!(entry.xattrs.windows(2).all(|pair| pair[0].0 < pair[1].0));
    let TarKind::File { size, extents } = &entry.kind else {
        return;
    };
    let mut end = (0, 0);
    for extent in extents {
        assert!(0 < extent.len && end.0 <= extent.file_offset && end.1 <= extent.layer_offset);
        end = (
            extent.file_offset + extent.len,
            extent.layer_offset + extent.len,
        );
    }
    assert!(end.0 <= *size && end.1 <= stream_len);
}

fn lens() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(prop_oneof![1..4_usize, 500..530_usize, 1..3000_usize], 1..6)
}

/// Places and bytes to write there, some of them the ones that mean something to a parser.
fn mutations() -> impl Strategy<Value = Vec<(usize, u8)>> {
    let telling = prop::sample::select(b"\x00\x01\x7f\x80\xff 0157xgLKS,\n=9".to_vec());
    let byte = prop_oneof![telling, any::<u8>()];
    prop::collection::vec((0..everything().len(), byte), 1..12)
}

proptest! {
    #[test]
    fn cutting_the_stream_changes_nothing(lens in lens()) {
        let archive = everything();
        let whole = parse_cut(&archive, &[archive.len()]);
        prop_assert_eq!(whole.0.len(), 17);
        prop_assert!(whole.1.is_ok());
        prop_assert_eq!(parse_cut(&archive, &lens), whole);
    }

    #[test]
    fn errors_are_fine_panics_are_bugs(
        mutations in mutations(),
        repaired in any::<bool>(),
        len in 0..2 * everything().len(),
        lens in lens(),
    ) {
        let mut archive = everything();
        for (at, byte) in mutations {
            archive[at] = byte;
            let header = at - at % 512;
            // Otherwise the checksum hides nearly every mutation.
            if repaired && header + 512 <= archive.len() && archive[header + 257..].starts_with(b"ustar") {
                seal(&mut archive[header..header + 512]);
            }
        }
        archive.truncate(len);
        let whole = parse_cut(&archive, &[archive.len().max(1)]);
        prop_assert_eq!(&parse_cut(&archive, &lens), &whole);
        for entry in whole.1.unwrap_or_default() {
            check(&entry, u64::try_from(archive.len()).unwrap());
        }
    }

    #[test]
    fn any_bytes_behind_a_header_are_survived(
        typeflag in prop::sample::select(b"xgLKS01257".to_vec()),
        payload in prop::collection::vec(any::<u8>(), 0..1500),
    ) {
        let archive = [with_data(Head::new(b"a", typeflag), &payload), file(b"b", b"")].concat();
        for entry in parse(&archive).unwrap_or_default() {
            check(&entry, u64::try_from(archive.len()).unwrap());
        }
    }
}
