//! Encodes and decodes the values of the remote content cache: bytes in, bytes out, no I/O.
//!
//! Specified in `docs/REMOTE_FORMAT.md`. Whatever is decoded here came from a store that others
//! write to: errors are fine, panics are bugs, and no length is believed before it is checked.

use crate::chunk;

mod access_map;
mod lease;
mod manifest;
mod packed;
mod profile;

pub(super) use access_map::{
    MAX_ACCESS_MAP_START_BYTES, decode_access_map_start, decode_raw_part, encode_access_map_start,
    max_access_map_bytes,
};
pub(super) use lease::LeaseRecord;
pub(super) use manifest::{MAX_MANIFEST_BYTES, RemoteLayer};
pub use manifest::{RemoteManifest, Trust};
pub(super) use packed::{decode_chunk, decode_part, encode_part};
pub(super) use profile::{PROFILE_TAG_BYTES, decode_profile, encode_profile};

/// The parts in which a value of `bytes` is stored, with their lengths: cut as a layer is cut into
/// chunks, so that whoever writes or reads it holds no more than for a chunk.
pub(super) fn parts(bytes: u64) -> impl Iterator<Item = (u32, usize)> {
    // What is longer than that was refused before.
    let n_parts = u32::try_from(chunk::n_chunks(bytes)).unwrap_or(u32::MAX);
    (0..n_parts).map(move |n| {
        let range = chunk::byte_range(n, bytes);
        // At most the bytes of a chunk.
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        (n, len)
    })
}

/// Says what is wrong with a value: for a log, because the caller treats all of them alike.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FormatError {
    /// The value is shorter or longer than its kind or its own fields demand.
    #[error("{what} has {len} bytes, not {expected}")]
    Length {
        what: &'static str,
        len: u64,
        expected: u64,
    },
    /// The value does not begin as its kind does.
    #[error("{what} has no valid magic, version or codec")]
    Magic { what: &'static str },
    /// A later version of the driver wrote it.
    #[error("{what} has version {found}, this driver knows version {known}")]
    Version {
        what: &'static str,
        found: u8,
        known: u8,
    },
    /// A field contradicts another one, or the key.
    #[error("{field} is inconsistent")]
    Field { field: &'static str },
    /// A field is above a configured limit.
    #[error("{field} is {value}, at most {max} is allowed")]
    Limit {
        field: &'static str,
        value: u64,
        max: u64,
    },
    /// The authentication code is wrong or missing.
    #[error(
        "it is not authenticated by this installation's key: \
         all nodes that share the store must have the same key"
    )]
    Unauthenticated,
    /// lz4 data is malformed.
    #[error("{what} does not decompress")]
    Codec { what: &'static str },
    /// The content is not what the digest names.
    #[error("{what} does not match its digest")]
    Digest { what: &'static str },
}

/// Converts a length for a message or a comparison; a `usize` always fits on our targets.
fn len64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}
