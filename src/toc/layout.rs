//! Decides where in the layer each piece lies, so that every node decides alike.
//!
//! Pieces come in the order of the blob. One that is larger than a chunk begins at a chunk's start and has its
//! chunks for itself. The others follow one another, but begin a new chunk where they would lie in two, or
//! where the chunk's pieces would be strewn too far over the blob. Nothing else is in the layer: what is left
//! of a chunk is zeros.

use crate::{
    chunk::CHUNK_BYTES,
    codec::piece_map::{MAX_GROUP_BLOB_BYTES, MAX_PIECE_BYTES},
};

/// Lays pieces out, one after the other.
#[derive(Debug, Default)]
pub struct Layout {
    /// Where the last piece ends.
    end: u64,
    /// Where the next may begin.
    next: u64,
    /// Where in the blob the first piece of the chunk that `next` lies in begins.
    group_start: u64,
}

impl Layout {
    /// Bytes of the layer so far.
    pub fn layer_bytes(&self) -> u64 {
        self.end
    }

    /// Places a piece of `len` bytes, which is decompressed from `blob_offset` on; `None` if there is no
    /// place for it in any layer.
    pub fn place(&mut self, len: u64, blob_offset: u64) -> Option<u64> {
        if len == 0 || MAX_PIECE_BYTES < len {
            return None;
        }
        let in_chunk = self.next % CHUNK_BYTES;
        let is_near = blob_offset.saturating_sub(self.group_start) < MAX_GROUP_BLOB_BYTES;
        let joins = 0 < in_chunk && len <= CHUNK_BYTES - in_chunk && is_near;
        let start = match joins {
            true => self.next,
            false => self.next.checked_next_multiple_of(CHUNK_BYTES)?,
        };
        let end = start.checked_add(len)?;
        let next = match CHUNK_BYTES < len {
            true => end.checked_next_multiple_of(CHUNK_BYTES)?,
            false => end,
        };
        if !joins {
            self.group_start = blob_offset;
        }
        (self.end, self.next) = (end, next);
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_pieces_share_chunks_and_large_ones_have_theirs() {
        let mut layout = Layout::default();
        let chunk = CHUNK_BYTES;
        for (len, start) in [
            (10, 0),
            (chunk - 10, 10),
            (1, chunk),
            (chunk, 2 * chunk),
            // It does not fit behind the first of its chunk.
            (7, 3 * chunk),
            (chunk - 6, 4 * chunk),
            (6, 5 * chunk - 6),
            (chunk + 1, 5 * chunk),
            (1, 7 * chunk),
            (MAX_PIECE_BYTES, 8 * chunk),
            (1, 25 * chunk),
        ] {
            assert_eq!(layout.place(len, 0), Some(start), "{len}");
            assert_eq!(layout.layer_bytes(), start + len);
        }
        assert_eq!(layout.place(0, 0), None);
        assert_eq!(layout.place(MAX_PIECE_BYTES + 1, 0), None);
        layout.next = u64::MAX - 5;
        assert_eq!(layout.place(10, 0), None);
    }

    #[test]
    fn pieces_that_are_far_apart_in_the_blob_share_no_chunk() {
        let mut layout = Layout::default();
        let far = MAX_GROUP_BLOB_BYTES;
        for (blob_offset, start) in [
            (100, 0),
            (99 + far, 1),
            (100 + far, CHUNK_BYTES),
            (99 + 2 * far, CHUNK_BYTES + 1),
        ] {
            assert_eq!(layout.place(1, blob_offset), Some(start), "{blob_offset}");
        }
    }
}
