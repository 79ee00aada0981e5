//! Access maps in parts: opaque bytes, and how many there are.
//!
//! Specified in `docs/REMOTE_FORMAT.md`, "Access map".

use bytes::Bytes;

use super::{FormatError, len64, parts};
use crate::chunk::CHUNK_BYTES;

/// Bytes of an access map at most.
const MAX_ACCESS_MAP_BYTES: u64 = 64 << 20;

/// What an access map has beside what grows with the layer: the least layer has one, too.
const LEAST_ACCESS_MAP_BYTES: u64 = 4 << 10;

/// Bytes of the length before the first part.
const LENGTH_BYTES: usize = 8;

/// Bytes of the first part at most, its length included.
#[expect(clippy::cast_possible_truncation, reason = "a chunk is about 1 MiB")]
pub(crate) const MAX_ACCESS_MAP_START_BYTES: usize = LENGTH_BYTES + CHUNK_BYTES as usize;

const WHAT: &str = "access map";

/// Bytes that the access map of a layer of `layer_bytes` may have: a longer one would be no help.
pub(crate) fn max_access_map_bytes(layer_bytes: u64) -> u64 {
    layer_bytes
        .saturating_add(LEAST_ACCESS_MAP_BYTES)
        .min(MAX_ACCESS_MAP_BYTES)
}

/// Encodes the first part of a map that has `map_bytes` in all.
pub(crate) fn encode_access_map_start(map_bytes: u64, part: &[u8]) -> Vec<u8> {
    let mut value = Vec::with_capacity(LENGTH_BYTES + part.len());
    value.extend(map_bytes.to_le_bytes());
    value.extend(part);
    value
}

/// Decodes the first part of a map that has at most `max_map_bytes`; returns how many it has.
pub(crate) fn decode_access_map_start(
    mut value: Bytes,
    max_map_bytes: u64,
) -> Result<(u64, Bytes), FormatError> {
    let Some(length) = value.first_chunk::<LENGTH_BYTES>() else {
        return Err(FormatError::Length {
            what: WHAT,
            len: len64(value.len()),
            expected: len64(LENGTH_BYTES),
        });
    };
    let map_bytes = u64::from_le_bytes(*length);
    if max_map_bytes < map_bytes {
        return Err(FormatError::Limit {
            field: "length of an access map",
            value: map_bytes,
            max: max_map_bytes,
        });
    }
    let first = parts(map_bytes).next().map_or(0, |(_, len)| len);
    let part = decode_raw_part(value.split_off(LENGTH_BYTES), first, WHAT)?;
    Ok((map_bytes, part))
}

/// Takes a part as it is, if it has the length that it must have.
pub(crate) fn decode_raw_part(
    value: Bytes,
    len: usize,
    what: &'static str,
) -> Result<Bytes, FormatError> {
    match value.len() == len {
        true => Ok(value),
        false => Err(FormatError::Length {
            what,
            len: len64(value.len()),
            expected: len64(len),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_says_how_long_the_map_is() {
        // Format changed? Say so in docs/REMOTE_FORMAT.md.
        let value = encode_access_map_start(3, b"map");
        assert_eq!(value, b"\x03\0\0\0\0\0\0\0map");
        let decode =
            |value: &[u8], max| decode_access_map_start(Bytes::copy_from_slice(value), max);
        assert_eq!(decode(&value, 3), Ok((3, Bytes::from_static(b"map"))));
        assert!(matches!(decode(&value, 2), Err(FormatError::Limit { .. })));
        assert!(matches!(
            decode(&value[..10], 3),
            Err(FormatError::Length { .. })
        ));
        assert!(matches!(
            decode(&value[..7], 3),
            Err(FormatError::Length { .. })
        ));
        let long =
            encode_access_map_start(CHUNK_BYTES + 1, &vec![7; MAX_ACCESS_MAP_START_BYTES - 8]);
        let (map_bytes, start) = decode(&long, u64::MAX).unwrap();
        assert_eq!(
            (map_bytes, start.len() as u64),
            (CHUNK_BYTES + 1, CHUNK_BYTES)
        );
        assert!(decode(&encode_access_map_start(u64::MAX, b"map"), u64::MAX).is_err());
    }

    #[test]
    fn no_map_is_longer_than_its_layer_by_much() {
        assert_eq!(max_access_map_bytes(0), 4096);
        assert_eq!(max_access_map_bytes(u64::MAX), 64 << 20);
    }
}
