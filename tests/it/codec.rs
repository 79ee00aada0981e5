//! Decompresses what gzip, pigz and zstd write, and what is wrong with it.

#![expect(
    clippy::unwrap_used,
    reason = "a helper's failure is the test's failure"
)]

use std::{
    io::{self, BufRead, BufReader, Cursor, Read, Write},
    process::{Command, Stdio},
    thread,
};

use clip_csi::codec::{CodecError, Compression, Decoder};
use flate2::{GzBuilder, write::GzEncoder};

/// Text that compresses, but not to nothing.
pub(super) fn text(len: usize) -> Vec<u8> {
    let mut state: u32 = 1;
    let mut bytes = Vec::with_capacity(len + 16);
    while bytes.len() < len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bytes.extend_from_slice(format!("line {} of\n", state >> 22).as_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// One frame with a checksum of its content.
pub(super) fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A skippable zstd frame.
pub(super) fn skippable(payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).unwrap();
    [&[0x5a, 0x2a, 0x4d, 0x18], &len.to_le_bytes()[..], payload].concat()
}

/// Decompresses, and insists that looking for checkpoints changes nothing.
fn decode(blob: &[u8]) -> Result<Vec<u8>, CodecFault> {
    let decoded = decode_from(blob, 128 << 10);
    let with_checkpoints = Decoder::with_checkpoints(blob, 1000)
        .map_err(|error| fault(&error))
        .and_then(|decoder| drain(decoder, 1 << 10));
    match (&decoded, &with_checkpoints) {
        // Stopping at each block tells better how far it was.
        (Err(CodecFault::Corrupt(_)), Err(CodecFault::Corrupt(_))) => {}
        _ => assert_eq!(decoded, with_checkpoints),
    }
    decoded
}

/// Decompresses with an output buffer of `len` bytes, and insists that errors are repeated.
fn decode_from(input: impl BufRead, len: usize) -> Result<Vec<u8>, CodecFault> {
    drain(Decoder::new(input).map_err(|error| fault(&error))?, len)
}

fn drain(mut decoder: Decoder<impl BufRead>, len: usize) -> Result<Vec<u8>, CodecFault> {
    let (mut output, mut buffer) = (Vec::new(), vec![0; len]);
    loop {
        match decoder.read(&mut buffer) {
            Ok(0) => return Ok(output),
            Ok(n) => output.extend_from_slice(&buffer[..n]),
            Err(error) => {
                let found = fault(CodecError::of(&error).expect("the data's fault"));
                let again = decoder.read(&mut buffer).unwrap_err();
                assert_eq!(fault(CodecError::of(&again).unwrap()), found);
                assert_eq!(again.kind(), error.kind());
                return Err(found);
            }
        }
    }
}

/// A [`CodecError`] that can be compared.
#[derive(Debug, PartialEq, Eq)]
enum CodecFault {
    Empty,
    Truncated(u64),
    Corrupt(u64),
    WindowTooLarge,
    Source,
}

fn fault(error: &CodecError) -> CodecFault {
    match error {
        CodecError::Empty => CodecFault::Empty,
        CodecError::Truncated { at, .. } => CodecFault::Truncated(*at),
        CodecError::Corrupt { at, .. } => CodecFault::Corrupt(*at),
        CodecError::WindowTooLarge { .. } => CodecFault::WindowTooLarge,
        CodecError::Checkpoint { .. } => panic!("{error}"),
        CodecError::Source(_) => CodecFault::Source,
    }
}

/// Sends bytes through a command; `None` where it is not installed.
pub(super) fn through(command: &[&str], bytes: &[u8]) -> Option<Vec<u8>> {
    let mut process = Command::new(command[0]);
    process
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = match process.spawn() {
        Ok(child) => child,
        Err(error) => {
            eprintln!("SKIP {}: {error}", command.join(" "));
            return None;
        }
    };
    let mut stdin = child.stdin.take().unwrap();
    let output = thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{command:?}");
    Some(output.stdout)
}

#[test]
fn compression_is_told_by_the_first_bytes() {
    let cases: [(&[u8], Compression); 12] = [
        (&gzip(b""), Compression::Gzip),
        (b"\x1f\x8b", Compression::Gzip),
        (b"\x1f", Compression::None),
        (b"\x1f\x9d\x90", Compression::None),
        (&zstd(b""), Compression::Zstd),
        (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        (b"\x28\xb5\x2f", Compression::None),
        (b"\x50\x2a\x4d\x18", Compression::Zstd),
        (b"\x5f\x2a\x4d\x18", Compression::Zstd),
        (b"\x60\x2a\x4d\x18", Compression::None),
        (b"", Compression::None),
        (&[0; 512], Compression::None),
    ];
    for (bytes, compression) in cases {
        assert_eq!(
            Compression::sniff(bytes),
            compression,
            "{:?}",
            bytes.escape_ascii()
        );
    }
}

#[test]
fn layers_of_the_command_line_tools_are_read() {
    let content = text(1_500_000);
    let commands: &[&[&str]] = &[
        &["gzip", "-1"],
        &["gzip", "-9"],
        &["pigz", "-i", "-b", "128", "-p", "4"],
        &["pigz", "-9", "-b", "512", "-R"],
        &["zstd", "-1"],
        &["zstd", "-19", "-T2"],
        &["zstd", "--no-check", "--fast"],
        &["zstd", "-B100KB", "-T4"],
        &["cat"],
    ];
    for command in commands {
        let Some(blob) = through(command, &content) else {
            continue;
        };
        assert!(decode(&blob).unwrap() == content, "{command:?}");
        let twice = decode(&blob.repeat(2)).unwrap();
        assert!(twice == content.repeat(2), "{command:?} twice");
    }
}

#[test]
fn pieces_of_any_size_give_the_same_bytes() {
    let content = text(5000);
    for blob in [gzip(&content), zstd(&content), content.clone()] {
        for (input, output) in [(1, 100_000), (1, 1), (2, 7), (3, 4096), (5, 1), (8192, 1)] {
            let decoded = decode_from(BufReader::with_capacity(input, &blob[..]), output);
            assert!(decoded.unwrap() == content, "{input} {output}");
        }
    }
}

#[test]
fn members_and_frames_follow_each_other() {
    let (one, two) = (text(1000), text(70_000));
    let both = [&one[..], &two].concat();
    let none = Vec::new();
    let header = GzBuilder::new()
        .filename("layer.tar")
        .comment("c")
        .extra("extra")
        .mtime(7);
    let mut encoder = header.write(Vec::new(), flate2::Compression::fast());
    encoder.write_all(&two).unwrap();
    let named = encoder.finish().unwrap();
    let cases = [
        ("two members", [gzip(&one), gzip(&two)].concat(), &both),
        ("header fields", [gzip(&one), named].concat(), &both),
        (
            "empty members",
            [gzip(b""), gzip(&one), gzip(b""), gzip(&two), gzip(b"")].concat(),
            &both,
        ),
        ("only empty members", gzip(b"").repeat(3), &none),
        (
            "zeros after the end",
            [gzip(&both), vec![0; 100_000]].concat(),
            &both,
        ),
        ("two frames", [zstd(&one), zstd(&two)].concat(), &both),
        (
            "empty frames",
            [zstd(b""), zstd(&one), zstd(b""), zstd(&two), zstd(b"")].concat(),
            &both,
        ),
        (
            "skippable frames",
            [
                skippable(b"x"),
                zstd(&one),
                skippable(&[7; 5000]),
                skippable(b""),
                zstd(&two),
                skippable(b"index"),
            ]
            .concat(),
            &both,
        ),
        ("only a skippable frame", skippable(b"x"), &none),
    ];
    for (what, blob, content) in cases {
        for input in [1, 10, 64 << 10] {
            let decoded = decode_from(BufReader::with_capacity(input, &blob[..]), 32 << 10);
            assert!(
                decoded.as_ref() == Ok(content),
                "{what}: {:?}",
                decoded.map(|it| it.len())
            );
        }
    }
}

#[test]
fn foreign_data_after_the_end_is_corrupt() {
    let content = text(1000);
    let (gzip, zstd) = (gzip(&content), zstd(&content));
    let cases: [(&str, &[u8], &[u8]); 6] = [
        (
            "gzip, text",
            &gzip,
            b"garbage, longer than a member's header",
        ),
        ("gzip, zeros and text", &gzip, b"\0\0\0garbage"),
        (
            "gzip, zeros and a member",
            &gzip,
            &[b"\0", &gzip[..]].concat(),
        ),
        ("gzip, zstd", &gzip, &zstd),
        ("zstd, zeros", &zstd, &[0; 64]),
        ("zstd, gzip", &zstd, &gzip),
    ];
    for (what, blob, rest) in cases {
        let found = decode(&[blob, rest].concat());
        assert!(
            matches!(found, Err(CodecFault::Corrupt(at)) if blob.len() as u64 <= at),
            "{what}: {found:?}"
        );
    }
}

#[test]
fn truncation_is_found_wherever_it_is() {
    let content = text(2000);
    let frames = [skippable(b"abc"), zstd(&content), skippable(b"index")].concat();
    // Where one member or frame ends the blob may end as well, and nobody can tell.
    let ends = [gzip(&content).len(), 11, 11 + zstd(&content).len()];
    for (blob, ends) in [
        ([gzip(&content), gzip(&content)].concat(), &ends[..1]),
        (frames, &ends[1..]),
    ] {
        for len in 4..blob.len() {
            let decoded = decode(&blob[..len]);
            if ends.contains(&len) {
                decoded.unwrap();
            } else {
                let at = u64::try_from(len).unwrap();
                assert_eq!(
                    decoded,
                    Err(CodecFault::Truncated(at)),
                    "{len} of {}",
                    blob.len()
                );
            }
        }
    }
    assert_eq!(decode(b""), Err(CodecFault::Empty));
    assert_eq!(decode(&gzip(b"")[..2]), Err(CodecFault::Truncated(2)));
}

#[test]
fn flipped_bits_never_give_wrong_bytes() {
    let content = text(3000);
    for (blob, trailer) in [(gzip(&content), 8), (zstd(&content), 4)] {
        for at in 4..blob.len() {
            for bit in 0..8 {
                let mut damaged = blob.clone();
                damaged[at] ^= 1 << bit;
                match decode(&damaged) {
                    // Not every bit of a header means something to the content.
                    Ok(decoded) => {
                        assert!(decoded == content, "{at}.{bit}");
                        assert!(
                            at < blob.len() - trailer,
                            "checksum not checked: {at}.{bit}"
                        );
                    }
                    Err(found) => assert!(
                        matches!(
                            found,
                            CodecFault::Corrupt(_)
                                | CodecFault::Truncated(_)
                                | CodecFault::WindowTooLarge
                        ),
                        "{at}.{bit}: {found:?}"
                    ),
                }
            }
        }
    }
}

#[test]
fn checksum_error_names_place_and_cause() {
    let mut blob = gzip(&text(1000));
    let len = blob.len();
    blob[len - 8] ^= 1;
    let mut decoder = Decoder::new(&blob[..]).unwrap();
    assert_eq!(decoder.compression(), Compression::Gzip);
    let error = decoder.read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let text = error.to_string();
    assert!(
        text.starts_with("the gzip layer is corrupt near byte "),
        "{text}"
    );
    assert!(text.ends_with(": incorrect data check"), "{text}");
}

#[test]
fn windows_beyond_8_mib_are_refused_with_advice() {
    let content = text(100);
    for (log, refused) in [(10, false), (23, false), (24, true), (27, true)] {
        let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
        encoder.window_log(log).unwrap();
        // Without a flush the frame is stored in one segment, whose window is its size.
        encoder.write_all(&content).unwrap();
        encoder.flush().unwrap();
        encoder.write_all(&content).unwrap();
        let blob = encoder.finish().unwrap();
        let expected = if refused {
            Err(CodecFault::WindowTooLarge)
        } else {
            Ok(content.repeat(2))
        };
        assert_eq!(decode(&blob), expected, "{log}");
        if refused {
            let error = Decoder::new(&blob[..])
                .unwrap()
                .read(&mut [0; 10])
                .unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Unsupported);
            let advice = "needs a window of more than 8388608 bytes";
            assert!(error.to_string().contains(advice), "{error}");
        }
    }
    if let Some(blob) = through(&["zstd", "--ultra", "-22", "--long=27"], &content) {
        assert_eq!(decode(&blob), Err(CodecFault::WindowTooLarge));
    }
}

/// A source that gives some bytes, then an error once, then the rest.
struct Failing<'a> {
    before: Cursor<&'a [u8]>,
    error: Option<io::Error>,
    after: Cursor<&'a [u8]>,
}

impl Read for Failing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.before.read(buffer)? {
            0 => self
                .error
                .take()
                .map_or_else(|| self.after.read(buffer), Err),
            n => Ok(n),
        }
    }
}

#[test]
fn failures_of_the_source_pass_through_and_can_be_survived() {
    #[derive(Debug, thiserror::Error)]
    #[error("connection reset, request 7")]
    struct Reset;

    let content = text(20_000);
    for blob in [gzip(&content), zstd(&content), content.clone()] {
        let kinds = [
            io::ErrorKind::UnexpectedEof,
            io::ErrorKind::InvalidData,
            io::ErrorKind::Other,
        ];
        for (kind, at) in kinds.into_iter().zip([10, blob.len() / 2, blob.len()]) {
            let source = Failing {
                before: Cursor::new(&blob[..at]),
                error: Some(io::Error::new(kind, Reset)),
                after: Cursor::new(&blob[at..]),
            };
            let mut decoder = Decoder::new(BufReader::with_capacity(64, source)).unwrap();
            let mut decoded = Vec::new();
            let error = decoder.read_to_end(&mut decoded).unwrap_err();
            assert_eq!(error.kind(), kind);
            assert!(error.get_ref().unwrap().is::<Reset>(), "{error}");
            assert!(CodecError::of(&error).is_none());
            decoder.read_to_end(&mut decoded).unwrap();
            assert!(decoded == content, "{kind}");
            assert_eq!(
                decoder.compressed_offset(),
                u64::try_from(blob.len()).unwrap()
            );
        }
    }
    let source = Failing {
        before: Cursor::new(b"\x1f"),
        error: Some(io::Error::new(io::ErrorKind::TimedOut, Reset)),
        after: Cursor::new(b""),
    };
    let error = Decoder::new(BufReader::new(source)).unwrap_err();
    assert!(matches!(error, CodecError::Source(it) if it.get_ref().unwrap().is::<Reset>()));
}

#[test]
fn the_whole_blob_is_consumed() {
    let content = text(1000);
    let cases = [
        [gzip(&content), vec![0; 300_000]].concat(),
        [zstd(&content), skippable(&[1; 300_000])].concat(),
    ];
    for blob in cases {
        let mut decoder = Decoder::new(BufReader::new(Cursor::new(&blob))).unwrap();
        io::copy(&mut decoder, &mut io::sink()).unwrap();
        let mut input = decoder.into_inner();
        assert_eq!(input.read(&mut [0; 10]).unwrap(), 0);
    }
}
