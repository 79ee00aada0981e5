//! Cuts a decompressed layer into chunks: the unit of presence, verification and remote storage.

use std::ops::Range;

/// Bytes in each chunk of a decompressed layer but the last.
///
/// 1 MiB − 4 KiB: a multiple of the page size, and a power of two would cost a Redis value 25 %
/// more memory, because with its header it falls into the allocator's next size class.
pub const CHUNK_BYTES: u64 = 1_044_480;

/// Returns how many chunks a layer of `layer_bytes` has.
pub fn n_chunks(layer_bytes: u64) -> u64 {
    layer_bytes.div_ceil(CHUNK_BYTES)
}

/// Returns the bytes of the layer that chunk `chunk` covers, cut at the layer's end.
pub fn byte_range(chunk: u32, layer_bytes: u64) -> Range<u64> {
    let start = (u64::from(chunk) * CHUNK_BYTES).min(layer_bytes);
    start..(start + CHUNK_BYTES).min(layer_bytes)
}

/// Returns the chunks that hold the bytes `[offset, offset + len)` of a layer.
///
/// `None` if the range overflows or a chunk number does not fit, which no checked extent does.
pub fn covering(offset: u64, len: u64) -> Option<Range<u32>> {
    let first = u32::try_from(offset / CHUNK_BYTES).ok()?;
    let end = u32::try_from(offset.checked_add(len)?.div_ceil(CHUNK_BYTES)).ok()?;
    Some(if len == 0 { first..first } else { first..end })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_tile_the_layer() {
        for layer_bytes in [
            0,
            1,
            CHUNK_BYTES - 1,
            CHUNK_BYTES,
            CHUNK_BYTES + 1,
            10 * CHUNK_BYTES + 7,
        ] {
            let mut at = 0;
            for chunk in 0..u32::try_from(n_chunks(layer_bytes)).unwrap() {
                let range = byte_range(chunk, layer_bytes);
                assert_eq!(range.start, at);
                assert!(range.start < range.end);
                at = range.end;
            }
            assert_eq!(at, layer_bytes);
        }
    }

    #[test]
    fn covering_names_first_and_last_chunk() {
        assert_eq!(covering(0, 0), Some(0..0));
        assert_eq!(covering(0, 1), Some(0..1));
        assert_eq!(covering(CHUNK_BYTES - 1, 1), Some(0..1));
        assert_eq!(covering(CHUNK_BYTES - 1, 2), Some(0..2));
        assert_eq!(covering(CHUNK_BYTES, CHUNK_BYTES), Some(1..2));
        assert_eq!(covering(u64::MAX, 2), None);
    }
}
