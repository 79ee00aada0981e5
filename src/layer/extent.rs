//! Extents: what of a layer in use is evicted at once.

use std::ops::Range;

/// Chunks of an extent: 16.7 MB.
///
/// As many as the remote content cache keeps in one object on S3, so that what was evicted comes back
/// with one; and they divide the 64 of a word of the bitmap, so that they are taken away in one step.
/// Smaller ones would keep more of what is read apart from what is not, at a word of the state and a
/// system call each; what is read in order is evicted in order with any.
pub(super) const EXTENT_CHUNKS: u32 = 16;

/// How many extents `n_chunks` have.
pub(super) fn n_extents(n_chunks: u32) -> u32 {
    n_chunks.div_ceil(EXTENT_CHUNKS)
}

/// The chunks of `extent` in a layer of `n_chunks`.
pub(super) fn chunks(extent: u32, n_chunks: u32) -> Range<u32> {
    let start = extent.saturating_mul(EXTENT_CHUNKS).min(n_chunks);
    start..start.saturating_add(EXTENT_CHUNKS).min(n_chunks)
}

/// The extents that `chunks` lie in, of a layer of `n_chunks`.
pub(super) fn covering(chunks: &Range<u32>, n_chunks: u32) -> Range<u32> {
    let end = chunks.end.min(n_chunks);
    match chunks.start < end {
        true => chunks.start / EXTENT_CHUNKS..n_extents(end),
        false => 0..0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_cover_their_chunks_and_no_more() {
        assert_eq!((n_extents(0), n_extents(16), n_extents(17)), (0, 1, 2));
        assert_eq!(
            (chunks(0, 20), chunks(1, 20), chunks(2, 20)),
            (0..16, 16..20, 20..20)
        );
        assert_eq!(chunks(u32::MAX, 20), 20..20);
        for (of, expected) in [
            (0..1, 0..1),
            (15..17, 0..2),
            (16..20, 1..2),
            (16..99, 1..2),
            (20..99, 0..0),
            (5..5, 0..0),
        ] {
            assert_eq!(covering(&of, 20), expected, "{of:?}");
        }
    }
}
