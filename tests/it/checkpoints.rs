//! Begins in the middle of what gzip, pigz, Go and zstd write, and at places that are none.

#![expect(
    clippy::unwrap_used,
    reason = "a helper's failure is the test's failure"
)]

use std::{
    collections::BTreeSet,
    io::{self, Read, Write},
};

use clip_csi::{
    codec::{
        CodecError, Compression, Decoder, Subject,
        access_map::{AccessMap, AccessMapWriter},
        checkpoint::Checkpoint,
    },
    digest::{BlobDigest, DiffId},
};
use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::codec::{gzip, skippable, text, through, zstd};

/// A stride with many checkpoints in a few megabytes.
const STRIDE_BYTES: u64 = 64 << 10;

/// Bytes as in a layer: text, runs, and what no compressor makes smaller.
fn mixed(len: usize) -> Vec<u8> {
    let (words, mut state) = (text(len), 7_u64);
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let piece = 1 + usize::try_from(state >> 48).unwrap();
        match state >> 40 & 3 {
            0 => bytes.resize(bytes.len() + piece, b'='),
            1 => bytes.extend((0..piece).map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                state.to_be_bytes()[0]
            })),
            _ => {
                let at = bytes.len();
                bytes.extend_from_slice(&words[at..(at + piece).min(len)]);
            }
        }
    }
    bytes.truncate(len);
    bytes
}

fn gzip_at(bytes: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Decompresses, and takes the checkpoints as a caller does who has no room for all of them.
fn decode(blob: &[u8], stride_bytes: u64, buffer: usize) -> (Vec<u8>, Vec<Checkpoint>) {
    let mut decoder = Decoder::with_checkpoints(blob, stride_bytes).unwrap();
    let (mut layer, mut checkpoints) = (Vec::new(), decoder.take_checkpoints());
    let mut buffer = vec![0; buffer];
    loop {
        let read = decoder.read(&mut buffer).unwrap();
        layer.extend_from_slice(&buffer[..read]);
        let taken = decoder.take_checkpoints();
        assert!(taken.len() <= 2, "{taken:?} are held");
        checkpoints.extend(taken);
        if read == 0 {
            return (layer, checkpoints);
        }
    }
}

fn map_of(blob: &[u8], layer: &[u8], checkpoints: &[Checkpoint]) -> AccessMap<Vec<u8>> {
    let mut writer = AccessMapWriter::new(Vec::new()).unwrap();
    for checkpoint in checkpoints {
        writer.push(checkpoint).unwrap();
    }
    let subject = Subject {
        compression: Compression::sniff(blob),
        blob: BlobDigest::of(blob),
        blob_bytes: blob.len() as u64,
        diff_id: DiffId::of(layer),
        layer_bytes: layer.len() as u64,
    };
    let map = AccessMap::decode(writer.finish(&subject).unwrap()).unwrap();
    assert_eq!(map.subject(), &subject);
    map
}

fn resume(blob: &[u8], compression: Compression, checkpoint: &Checkpoint) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    Decoder::resume(blob, compression, checkpoint)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// Checks each checkpoint of a blob by way of its map, and returns them.
fn check(what: &str, blob: &[u8], layer: &[u8], stride_bytes: u64) -> Vec<Checkpoint> {
    let (decoded, checkpoints) = decode(blob, stride_bytes, 50_000);
    assert!(decoded == layer, "{what}");
    let map = map_of(blob, layer, &checkpoints);
    let mut multiples = BTreeSet::new();
    for (index, checkpoint) in (0..).zip(&checkpoints) {
        let what = format!("{what}, {index}: {checkpoint:?}");
        assert_eq!(&map.checkpoint(index).unwrap(), checkpoint, "{what}");
        let multiple = checkpoint.layer_offset.div_ceil(stride_bytes);
        assert!(multiples.insert(multiple), "{what}: one for a multiple");

        // To the end of the layer, through all that follows.
        let rest = &blob[at(checkpoint.blob_offset)..];
        let resumed = resume(rest, map.compression(), checkpoint);
        let resumed = resumed.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(resumed == layer[at(checkpoint.layer_offset)..], "{what}");

        // To the next checkpoint, with no more of the blob than that takes.
        let end = match index + 1 == map.n_checkpoints() {
            true => map.layer_bytes(),
            false => map.layer_offset(index + 1),
        };
        let piece = &blob[at(map.blob_offset(index))..at(map.blob_end(index))];
        let mut decoder = Decoder::resume(piece, map.compression(), checkpoint).unwrap();
        let mut bytes = vec![0; at(end - checkpoint.layer_offset)];
        decoder.read_exact(&mut bytes).unwrap();
        assert!(
            bytes == layer[at(checkpoint.layer_offset)..at(end)],
            "{what}"
        );
    }
    checkpoints
}

/// Compresses with Go's compress/gzip, as most builders of images do.
fn go_gzip(bytes: &[u8]) -> Option<Vec<u8>> {
    const PROGRAM: &str = "package main\n\
        import (\"compress/gzip\"; \"io\"; \"os\")\n\
        func main() {\n\
            z := gzip.NewWriter(os.Stdout)\n\
            if _, err := io.Copy(z, os.Stdin); err != nil { panic(err) }\n\
            if err := z.Close(); err != nil { panic(err) }\n\
        }\n";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("main.go");
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(PROGRAM.as_bytes()).unwrap();
    let path = path.to_str().unwrap();
    through(&["go", "run", path], bytes)
        .or_else(|| through(&["/usr/local/go/bin/go", "run", path], bytes))
}

#[test]
fn every_checkpoint_of_gzip_gives_the_rest() {
    let layer = mixed(3_000_000);
    let commands: &[&[&str]] = &[
        &["gzip", "-1"],
        &["gzip", "-6"],
        &["gzip", "-9"],
        &["pigz", "-p", "4"],
        &["pigz", "-9", "-b", "512", "-i"],
    ];
    let made = commands
        .iter()
        .map(|command| (command.join(" "), through(command, &layer)));
    let made = made.chain([
        ("Go".to_owned(), go_gzip(&layer)),
        ("stored".to_owned(), Some(gzip_at(&layer, 0))),
        ("flate2 -9".to_owned(), Some(gzip_at(&layer, 9))),
    ]);
    let mut bit_offsets = BTreeSet::new();
    for (what, blob) in made {
        let Some(blob) = blob else { continue };
        let checkpoints = check(&what, &blob, &layer, STRIDE_BYTES);
        // A block of text holds about 100 kB.
        assert!(15 < checkpoints.len(), "{what}: {}", checkpoints.len());
        bit_offsets.extend(checkpoints.iter().map(|it| it.bit_offset));
        assert!(checkpoints[1..].iter().all(|it| !it.window.is_empty()));
    }
    assert_eq!(bit_offsets, (0..8).collect());
}

#[test]
fn every_checkpoint_of_many_members_gives_the_rest() {
    let layer = mixed(1_000_000);
    let tiny: Vec<u8> = layer.chunks(700).flat_map(gzip).collect();
    let with_empty_ones: Vec<u8> = layer
        .chunks(40_000)
        .flat_map(|it| [gzip(b""), gzip(it), gzip(b"")].concat())
        .collect();
    let large: Vec<u8> = layer.chunks(450_000).flat_map(gzip).collect();
    let padded = [gzip(&layer), vec![0; 1000]].concat();
    for (what, blob, without_window) in [
        ("tiny members", tiny, true),
        ("empty members in between", with_empty_ones, true),
        ("large members", large, false),
        ("zeros after the end", padded, false),
    ] {
        let checkpoints = check(what, &blob, &layer, STRIDE_BYTES);
        assert!(5 < checkpoints.len(), "{what}: {}", checkpoints.len());
        if without_window {
            assert!(
                checkpoints
                    .iter()
                    .any(|it| it.layer_offset != 0 && it.window.is_empty())
            );
        }
    }
}

#[test]
fn every_checkpoint_of_zstd_begins_a_frame() {
    let layer = mixed(1_000_000);
    let frames: Vec<u8> = layer
        .chunks(10_000)
        .flat_map(|it| [skippable(b"between"), zstd(it)].concat())
        .collect();
    let checkpoints = check("frames", &frames, &layer, STRIDE_BYTES);
    // The last frame that begins at or before each multiple.
    let expected: Vec<_> = (0..layer.len() as u64)
        .step_by(at(STRIDE_BYTES))
        .map(|multiple| multiple / 10_000 * 10_000)
        .collect();
    let found: Vec<_> = checkpoints.iter().map(|it| it.layer_offset).collect();
    assert_eq!(found, expected);
    assert!(checkpoints.iter().all(|it| it.window.is_empty()));

    let single = check("one frame", &zstd(&layer), &layer, STRIDE_BYTES);
    assert_eq!(single, [Checkpoint::START]);
}

#[test]
fn plain_tar_is_entered_anywhere() {
    let layer = mixed(300_000);
    let checkpoints = check("plain", &layer, &layer, STRIDE_BYTES);
    assert_eq!(checkpoints, [Checkpoint::START]);
    let map = map_of(&layer, &layer, &checkpoints);
    let (start, end) = (123_456, 234_567);
    let checkpoint = map.checkpoint_for(start).unwrap();
    let piece = &layer[at(checkpoint.blob_offset)..at(map.blob_end_for(end))];
    assert!(resume(piece, Compression::None, &checkpoint).unwrap() == layer[at(start)..at(end)]);
}

#[test]
fn any_range_is_read_by_way_of_the_map() {
    let layer = mixed(1_000_000);
    let blob = gzip(&layer);
    let map = map_of(&blob, &layer, &decode(&blob, STRIDE_BYTES, 4096).1);
    assert!(5 < map.n_checkpoints());
    for (start, end) in [
        (0, 1),
        (0, 1_000_000),
        (99_999, 300_001),
        (999_999, 1_000_000),
    ] {
        let checkpoint = map.checkpoint_for(start).unwrap();
        let piece = &blob[at(checkpoint.blob_offset)..at(map.blob_end_for(end))];
        let mut decoder = Decoder::resume(piece, map.compression(), &checkpoint).unwrap();
        let mut bytes = vec![0; at(end - checkpoint.layer_offset)];
        decoder.read_exact(&mut bytes).unwrap();
        assert!(bytes[at(start - checkpoint.layer_offset)..] == layer[at(start)..at(end)]);
    }
    assert_eq!(map.blob_end_for(0), 0);
    assert_eq!(map.blob_end_for(u64::MAX), map.blob_bytes());
}

#[test]
fn one_large_block_has_no_checkpoint_inside() {
    // 258 bytes a symbol: a block covers megabytes.
    let zeros = vec![0; 5_000_000];
    let checkpoints = check("zeros", &gzip(&zeros), &zeros, STRIDE_BYTES);
    assert!(checkpoints.len() < 5, "{}", checkpoints.len());
    // zlib-rs and zlib-ng, asked to be fast, write one block for all.
    let layer = mixed(1_000_000);
    let checkpoints = check("fast", &gzip_at(&layer, 1), &layer, STRIDE_BYTES);
    assert_eq!(checkpoints, [Checkpoint::START]);
}

#[test]
fn checksums_are_verified_where_all_was_seen() {
    let layer = mixed(400_000);
    let members = [gzip(&layer), gzip(&layer)];
    let blob = members.concat();
    let (_, checkpoints) = decode(&blob, STRIDE_BYTES, 4096);
    let inside = checkpoints.iter().find(|it| !it.window.is_empty()).unwrap();
    let rest = |blob: &[u8]| resume(&blob[at(inside.blob_offset)..], Compression::Gzip, inside);
    let mut damaged = blob.clone();
    damaged[members[0].len() - 8] ^= 1;
    assert_eq!(
        rest(&damaged).unwrap().len(),
        800_000 - at(inside.layer_offset)
    );
    damaged[blob.len() - 8] ^= 1;
    let error = rest(&damaged).unwrap_err();
    assert!(
        error.to_string().ends_with(": incorrect data check"),
        "{error}"
    );
    // Errors name the place in the blob, not in the input.
    let truncated = rest(&blob[..blob.len() - 3]).unwrap_err();
    let end = format!("it ends at byte {} of the blob", blob.len() - 3);
    assert!(truncated.to_string().contains(&end), "{truncated}");
}

#[test]
fn checkpoints_that_cannot_be_are_refused() {
    let place = |bit_offset, window| Checkpoint {
        blob_offset: 10,
        bit_offset,
        layer_offset: 100,
        window: vec![0; window],
    };
    for (compression, checkpoint) in [
        (Compression::Gzip, place(8, 100)),
        (Compression::Gzip, place(255, 0)),
        (Compression::Gzip, place(0, (32 << 10) + 1)),
        (Compression::Zstd, place(0, 1)),
        (Compression::Zstd, place(1, 0)),
        (Compression::None, place(1, 0)),
    ] {
        let refused = Decoder::resume(&b""[..], compression, &checkpoint);
        assert!(
            matches!(refused, Err(CodecError::Checkpoint { at: 10, .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn wrong_checkpoints_end_in_errors_or_in_wrong_bytes() {
    let layer = mixed(300_000);
    let blob = gzip(&layer);
    let (_, checkpoints) = decode(&blob, STRIDE_BYTES, 4096);
    let right = checkpoints.iter().find(|it| it.bit_offset != 0).unwrap();
    let truth = &layer[at(right.layer_offset)..];
    let wrong = [
        Checkpoint {
            bit_offset: (right.bit_offset + 1) % 8,
            ..right.clone()
        },
        Checkpoint {
            window: Vec::new(),
            ..right.clone()
        },
        Checkpoint {
            window: right.window[1000..].to_vec(),
            ..right.clone()
        },
        Checkpoint {
            window: vec![b'?'; 32 << 10],
            ..right.clone()
        },
    ];
    for checkpoint in wrong {
        let resumed = resume(
            &blob[at(right.blob_offset)..],
            Compression::Gzip,
            &checkpoint,
        );
        assert!(!resumed.is_ok_and(|it| it == truth), "{checkpoint:?}");
    }
    let far = Checkpoint {
        blob_offset: u64::MAX,
        layer_offset: u64::MAX,
        ..right.clone()
    };
    assert!(resume(&blob[at(right.blob_offset)..], Compression::Gzip, &far).unwrap() == truth);
}

/// What a layer may hold, in pieces.
fn layers() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        (any::<u8>(), 1..60_000_usize).prop_map(|(byte, len)| vec![byte; len]),
        (1..90_000_usize).prop_map(text),
        (1..90_000_usize).prop_map(mixed),
        proptest::collection::vec(any::<u8>(), 1..5000),
    ];
    proptest::collection::vec(piece, 1..8).prop_map(|it| it.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn checkpoints_of_any_layer_give_the_rest(
        layer in layers(),
        level in 0..10_u32,
        member in 1000..500_000_usize,
        stride_bytes in 1..300_000_u64,
        is_gzip in any::<bool>(),
    ) {
        let members = layer.chunks(member);
        let blob: Vec<u8> = match is_gzip {
            true => members.flat_map(|it| gzip_at(it, level)).collect(),
            false => members.flat_map(zstd).collect(),
        };
        check("any", &blob, &layer, stride_bytes);
    }

    #[test]
    fn hostile_checkpoints_and_input_do_no_harm(
        mut blob in proptest::collection::vec(any::<u8>(), 0..3000),
        genuine in any::<bool>(),
        compression in prop_oneof![
            Just(Compression::Gzip), Just(Compression::Gzip), Just(Compression::Zstd), Just(Compression::None),
        ],
        bit_offset in any::<u8>(),
        layer_offset in any::<u64>(),
        window in proptest::collection::vec(any::<u8>(), 0..40_000),
    ) {
        if genuine {
            blob = gzip(&[&text(4000)[..], &blob].concat());
        }
        let cut = at(layer_offset % (blob.len() as u64 + 1));
        let checkpoint = Checkpoint { blob_offset: layer_offset / 3, bit_offset: bit_offset % 9, layer_offset, window };
        if let Ok(decoder) = Decoder::resume(&blob[cut..], compression, &checkpoint) {
            // Deflate makes at most 1032 bytes of one, zstd 128 KiB of four.
            let n_bytes = io::copy(&mut decoder.take(1 << 30), &mut io::sink()).unwrap_or(0);
            prop_assert!(n_bytes < 1 << 30);
        }
    }
}
