//! Chunks and parts of the index: bytes that are compressed where that pays.
//!
//! Specified in `docs/REMOTE_FORMAT.md`, "Chunk" and "Index".

use bytes::Bytes;
use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};

use super::{FormatError, len64};
use crate::digest::ChunkDigest;

const RAW: u8 = 0;
const LZ4: u8 = 1;

/// lz4 is stored only if it saves at least one part in this many: below 5 % the reader's time to
/// decompress costs more than the transfer.
const LEAST_SAVING: usize = 20;

/// An lz4 sequence makes at most 255 bytes out of each input byte, and some are literals.
const MAX_LZ4_RATIO: u64 = 255;

/// Returns exactly `len` bytes and not one more, whatever the payload claims.
fn unpack(codec: u8, payload: Bytes, len: usize, what: &'static str) -> Result<Bytes, FormatError> {
    let wrong_length = |found: usize| FormatError::Length {
        what,
        len: len64(found),
        expected: len64(len),
    };
    match codec {
        RAW if payload.len() == len => Ok(payload),
        RAW => Err(wrong_length(payload.len())),
        LZ4 => {
            if len64(payload.len()).saturating_mul(MAX_LZ4_RATIO) < len64(len) {
                return Err(FormatError::Codec { what });
            }
            let mut content = vec![0; len];
            match decompress_into(&payload, &mut content) {
                Ok(found) if found == len => Ok(content.into()),
                Ok(found) => Err(wrong_length(found)),
                Err(_) => Err(FormatError::Codec { what }),
            }
        }
        _ => Err(FormatError::Magic { what }),
    }
}

/// Encodes a chunk, or a part of an index, compressed if that pays.
pub(crate) fn encode_part(content: &[u8]) -> Vec<u8> {
    // Zeros from the allocator: of so large a block, what is not written is no memory.
    let mut value = vec![0; 1 + get_maximum_output_size(content.len())];
    let worth = content.len() - content.len() / LEAST_SAVING;
    match compress_into(content, &mut value[1..]) {
        Ok(len) if len < worth => {
            value.truncate(1 + len);
            value[0] = LZ4;
        }
        // An error would mean that the buffer is too small; raw is right in any case.
        _ => {
            value.truncate(1);
            value.extend(content);
            value[0] = RAW;
        }
    }
    value
}

/// Decodes a part that has `len` bytes; that they are the right ones is for its reader to see.
pub(crate) fn decode_part(
    mut value: Bytes,
    len: usize,
    what: &'static str,
) -> Result<Bytes, FormatError> {
    if value.is_empty() {
        return Err(FormatError::Magic { what });
    }
    let payload = value.split_off(1);
    unpack(value[0], payload, len, what)
}

/// Decodes the value of a chunk that has `len` bytes and the digest `expect`.
pub(crate) fn decode_chunk(
    value: Bytes,
    len: usize,
    expect: &ChunkDigest,
) -> Result<Bytes, FormatError> {
    let content = decode_part(value, len, "chunk")?;
    match ChunkDigest::of(&content) == *expect {
        true => Ok(content),
        false => Err(FormatError::Digest { what: "chunk" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that lz4 cannot shrink.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..len).map(|_| next()).collect()
    }

    fn roundtrip(content: &[u8]) -> u8 {
        let digest = ChunkDigest::of(content);
        let chunk = encode_part(content);
        let decoded = decode_chunk(chunk.clone().into(), content.len(), &digest);
        assert_eq!(decoded.unwrap(), content);
        chunk[0]
    }

    #[test]
    fn lz4_is_used_where_it_pays() {
        assert_eq!(roundtrip(&[]), RAW);
        assert_eq!(roundtrip(b"x"), RAW);
        assert_eq!(roundtrip(&[7; 1_044_480]), LZ4);
        assert_eq!(roundtrip(&noise(1_044_480)), RAW);
        // 4 % are zeros: not enough. 8 % are.
        for (percent, codec) in [(4, RAW), (8, LZ4)] {
            let mut content = noise(100_000);
            content[..percent * 1000].fill(0);
            assert_eq!(roundtrip(&content), codec, "{percent} %");
        }
    }

    /// Format changed? Bump the version and say so in docs/REMOTE_FORMAT.md.
    #[test]
    fn golden_bytes_of_a_part() {
        assert_eq!(encode_part(b"abc"), b"\0abc");
        // By hand, from the LZ4 block format: 1 literal, a match of 4 + 15 + 75 bytes at offset 1,
        // then 5 literals. Encoders may choose otherwise, decoders must take it.
        let lz4 = b"\x1fa\x01\x00\x4b\x50aaaaa";
        let content = [b'a'; 100];
        let digest = ChunkDigest::of(&content);
        let chunk = [b"\x01", &lz4[..]].concat();
        assert_eq!(
            decode_chunk(chunk.into(), 100, &digest).unwrap(),
            &content[..]
        );
        assert_eq!(encode_part(&content)[0], LZ4);
    }

    #[test]
    fn wrong_chunks_are_told_apart() {
        let content = b"some content, some content, some content, some content".repeat(9);
        let (len, digest) = (content.len(), ChunkDigest::of(&content));
        let good = encode_part(&content);
        assert_eq!(good[0], LZ4);
        let decode = |value: Vec<u8>| decode_chunk(value.into(), len, &digest);
        let what = "chunk";
        let mut flipped = good.clone();
        // A literal near the beginning.
        flipped[3] ^= 1;
        assert_eq!(decode(flipped), Err(FormatError::Digest { what }));
        let raw = |content: &[u8]| [&[RAW], content].concat();
        assert_eq!(decode(raw(&content)), Ok(content.clone().into()));
        let other = noise(len);
        assert_eq!(decode(raw(&other)), Err(FormatError::Digest { what }));
        for (found, value) in [(len - 1, &content[1..]), (0, &[])] {
            let error = FormatError::Length {
                what,
                len: len64(found),
                expected: len64(len),
            };
            assert_eq!(decode(raw(value)), Err(error));
        }
        assert_eq!(decode(vec![]), Err(FormatError::Magic { what }));
        assert_eq!(decode(vec![9; 50]), Err(FormatError::Magic { what }));
        assert_eq!(decode(vec![LZ4; 50]), Err(FormatError::Codec { what }));
        // A bomb: 51 MB of zeros where 486 bytes are expected.
        let bomb = encode_part(&vec![0; 51_000_000]);
        assert_eq!(decode(bomb), Err(FormatError::Codec { what }));
        for cut in 0..good.len() {
            assert!(decode(good[..cut].to_vec()).is_err(), "cut to {cut}");
        }
    }

    #[test]
    fn an_index_that_cannot_be_that_large_allocates_nothing() {
        let payload = [0; 1000];
        let got = unpack(LZ4, Bytes::copy_from_slice(&payload), 1 << 40, "index");
        assert_eq!(got, Err(FormatError::Codec { what: "index" }));
    }

    proptest::proptest! {
        /// Errors are fine, panics are bugs.
        #[test]
        fn garbage_never_panics(value: Vec<u8>, codec in 0u8..2, len in 0usize..100_000) {
            let digest = ChunkDigest::of(b"");
            let chunk = [&[codec], &value[..]].concat();
            let _ = decode_chunk(chunk.into(), len, &digest);
        }
    }
}
