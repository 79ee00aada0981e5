use proptest::prelude::*;

use super::*;
use crate::codec::map_frame::seal;

fn subject(compression: Compression) -> Subject {
    Subject {
        compression,
        blob: BlobDigest::of(b"blob"),
        blob_bytes: 3000,
        diff_id: DiffId::of(b"layer"),
        layer_bytes: 9000,
    }
}

fn checkpoint(layer_offset: u64, blob_offset: u64, bit_offset: u8, window: &[u8]) -> Checkpoint {
    Checkpoint {
        blob_offset,
        bit_offset,
        layer_offset,
        window: window.to_vec(),
    }
}

fn checkpoints() -> Vec<Checkpoint> {
    vec![
        Checkpoint::START,
        checkpoint(2000, 700, 3, &[7; 2000]),
        checkpoint(4000, 1400, 0, &[]),
        checkpoint(8000, 2100, 0, &[9; WINDOW_BYTES]),
    ]
}

fn write(checkpoints: &[Checkpoint], subject: &Subject) -> io::Result<Vec<u8>> {
    let mut writer = AccessMapWriter::new(Vec::new())?;
    for checkpoint in checkpoints {
        writer.push(checkpoint)?;
    }
    writer.finish(subject)
}

fn sample() -> Vec<u8> {
    write(&checkpoints(), &subject(Compression::Gzip)).unwrap()
}

#[test]
fn what_was_written_is_read_back() {
    let map = AccessMap::decode(sample()).unwrap();
    assert_eq!(*map.subject(), subject(Compression::Gzip));
    assert_eq!(map.n_checkpoints(), 4);
    let ends = [701, 1400, 2100, 3000];
    for (index, expected) in (0..).zip(checkpoints()) {
        assert_eq!(map.checkpoint(index).unwrap(), expected);
        assert_eq!(map.layer_offset(index), expected.layer_offset);
        assert_eq!(map.blob_offset(index), expected.blob_offset);
        assert_eq!(map.blob_end(index), ends[index as usize]);
    }
    let sought = [
        (0, 0),
        (1999, 0),
        (2000, 1),
        (7999, 2),
        (8000, 3),
        (u64::MAX, 3),
    ];
    for (layer_offset, index) in sought {
        assert_eq!(map.at_or_before(layer_offset), index, "{layer_offset}");
    }
    let ends = [(0, 0), (1, 701), (2000, 701), (2001, 1400), (9000, 3000)];
    for (layer_end, blob_end) in ends {
        assert_eq!(map.blob_end_for(layer_end), blob_end, "{layer_end}");
    }
}

#[test]
fn golden_bytes() {
    // Format changed: raise ACCESS_MAP_VERSION, and say so in docs/INDEX_FORMAT.md.
    let bytes = write(&[Checkpoint::START], &subject(Compression::Zstd)).unwrap();
    assert_eq!(bytes.len(), 168);
    assert_eq!(&bytes[..16], b"CLIPAMAP\x01\0\0\0\0\0\0\0");
    let record = [&[0; 16][..], &[16], &[0; 15]].concat();
    assert_eq!(bytes[16..48], record);
    assert_eq!(bytes[48..56], [2, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(bytes[56..88], *BlobDigest::of(b"blob").as_bytes());
    assert_eq!(bytes[88..96], 3000_u64.to_le_bytes());
    assert_eq!(bytes[96..128], *DiffId::of(b"layer").as_bytes());
    assert_eq!(bytes[128..136], 9000_u64.to_le_bytes());
    assert_eq!(bytes[136..], *blake3::hash(&bytes[..136]).as_bytes());

    // Of the windows all but zstd's own choice, which may change with its version.
    let bytes = sample();
    let records = &bytes[bytes.len() - 120 - 4 * 32..];
    assert_eq!(records[32..40], 2000_u64.to_le_bytes());
    assert_eq!(records[40..48], 700_u64.to_le_bytes());
    assert_eq!(records[48..56], 16_u64.to_le_bytes());
    assert_eq!(records[60..64], 3_u32.to_le_bytes());
    let window_bytes = u32::from_le_bytes(*records[56..].first_chunk().unwrap());
    let window = &bytes[16..16 + window_bytes as usize];
    assert_eq!(zstd::bulk::decompress(window, 2000).unwrap(), [7; 2000]);
}

#[test]
fn a_map_of_another_kind_version_or_length_is_refused() {
    let what = FORMAT.what;
    let bytes = sample();
    let mut other = bytes.clone();
    other[0] ^= 1;
    assert_eq!(
        AccessMap::decode(other).unwrap_err(),
        IndexError::Magic { what }
    );
    let mut newer = bytes.clone();
    newer[8] = 2;
    let error = AccessMap::decode(newer).unwrap_err();
    assert!(matches!(
        error,
        IndexError::Version {
            found: 2,
            max: 1,
            ..
        }
    ));
    for len in 0..bytes.len() {
        assert!(AccessMap::decode(&bytes[..len]).is_err(), "{len}");
        if CHECKSUM_BYTES <= len {
            assert!(
                AccessMap::decode(seal(bytes[..len].to_vec())).is_err(),
                "{len}"
            );
        }
    }
}

#[test]
fn flipped_bits_are_refused() {
    let bytes = sample();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            assert!(AccessMap::decode(damaged).is_err(), "{at}.{bit}");
        }
    }
}

#[test]
fn impossible_checkpoints_are_neither_written_nor_read() {
    let gzip = subject(Compression::Gzip);
    let start = Checkpoint::START;
    let wrong: [&[Checkpoint]; 8] = [
        &[],
        &[checkpoint(1, 1, 0, &[])],
        &[start.clone(), start.clone()],
        &[start.clone(), checkpoint(10, 20, 8, &[1])],
        &[start.clone(), checkpoint(10, 20, 0, &[1; WINDOW_BYTES + 1])],
        &[
            start.clone(),
            checkpoint(10, 20, 0, &[1]),
            checkpoint(11, 20, 0, &[1]),
        ],
        &[start.clone(), checkpoint(9000, 20, 0, &[1])],
        &[start.clone(), checkpoint(10, 3000, 0, &[1])],
    ];
    for checkpoints in wrong {
        let error = write(checkpoints, &gzip).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{checkpoints:?}");
    }
    // What a hostile writer can put into the records, from the end: offsets, window, bits.
    let bytes = sample();
    let last = bytes.len() - CHECKSUM_BYTES - FOOTER_BYTES - RECORD_BYTES;
    let wrong_u64 = [
        (0, 4000),
        (0, 9000),
        (8, 1400),
        (8, 3000),
        (16, 0),
        (16, u64::MAX),
    ];
    let wrong_u32 = [(24, u32::MAX), (28, 8), (28, u32::MAX)];
    let changes = wrong_u64
        .map(|(at, value)| (at, value.to_le_bytes().to_vec()))
        .into_iter()
        .chain(wrong_u32.map(|(at, value)| (at, value.to_le_bytes().to_vec())));
    for (at, value) in changes {
        let mut changed = bytes.clone();
        changed[last + at..last + at + value.len()].copy_from_slice(&value);
        assert!(AccessMap::decode(seal(changed)).is_err(), "{at}: {value:?}");
    }
    // A window where there is none to refer to: zstd, and plain tar.
    for code in [0, 2, 3] {
        let mut changed = bytes.clone();
        changed[bytes.len() - CHECKSUM_BYTES - FOOTER_BYTES] = code;
        assert!(AccessMap::decode(seal(changed)).is_err(), "{code}");
    }
}

#[test]
fn a_window_that_is_too_long_is_not_decompressed() {
    let start = Checkpoint::START;
    let checkpoints = [start, checkpoint(10, 20, 0, &[1; 100])];
    let mut bytes = write(&checkpoints, &subject(Compression::Gzip)).unwrap();
    let records = bytes.split_off(bytes.len() - CHECKSUM_BYTES - FOOTER_BYTES - 2 * RECORD_BYTES);
    let bomb = zstd::bulk::compress(&[1; WINDOW_BYTES + 1], 3).unwrap();
    let len = u32::try_from(bomb.len()).unwrap();
    let mut bytes = [&bytes[..HEADER_BYTES], &bomb, &records].concat();
    let last = bytes.len() - CHECKSUM_BYTES - FOOTER_BYTES - RECORD_BYTES;
    bytes[last + 24..last + 28].copy_from_slice(&len.to_le_bytes());
    let map = AccessMap::decode(seal(bytes)).unwrap();
    assert_eq!(map.checkpoint(1).unwrap_err(), DAMAGED);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Errors are fine, panics are bugs.
    #[test]
    fn a_hostile_map_does_no_harm(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        near_the_end in any::<bool>(),
        sought in any::<u64>(),
    ) {
        let mut bytes = sample();
        let (len, body) = (bytes.len(), bytes.len() - CHECKSUM_BYTES);
        for (index, value) in changes {
            let at = match near_the_end {
                true => len - 1 - CHECKSUM_BYTES - index.index(FOOTER_BYTES + 4 * RECORD_BYTES),
                false => index.index(body),
            };
            bytes[at] = value;
        }
        if let Ok(map) = AccessMap::decode(seal(bytes)) {
            for index in 0..map.n_checkpoints() {
                if let Ok(checkpoint) = map.checkpoint(index) {
                    prop_assert!(checkpoint.window.len() <= WINDOW_BYTES && checkpoint.bit_offset < 8);
                }
                prop_assert!(map.blob_offset(index) <= map.blob_end(index));
                prop_assert!(map.blob_end(index) <= map.blob_bytes());
            }
            prop_assert!(map.at_or_before(sought) < map.n_checkpoints());
            prop_assert!(map.blob_end_for(sought) <= map.blob_bytes());
            let _ = map.checkpoint_for(sought);
        }
    }
}
