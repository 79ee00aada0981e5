//! Decides where in the layer each piece lies, so that every node decides alike.
//!
//! Pieces come in the order of the blob. One that is larger than a chunk begins at a chunk's start and has its
//! chunks for itself. The others follow one another, but begin a new chunk where they would lie in two, or
//! where the chunk's pieces would be strewn too far over the blob. What begins a block of its file begins one
//! in the layer, as in a tar, so that what is whole can be mounted as a tar can. Nothing else is in the layer: what is left
//! of a block or a chunk is zeros, and the layer ends with a whole block.

use crate::{
    chunk::CHUNK_BYTES,
    codec::piece_map::{BLOCK_BYTES, MAX_GROUP_BLOB_BYTES, MAX_PIECE_BYTES},
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
        self.end.next_multiple_of(BLOCK_BYTES)
    }

    /// Places a piece of `len` bytes, which is decompressed from `blob_offset` on and lies at `file_offset` of
    /// its file; `None` if there is no place for it in any layer.
    pub fn place(&mut self, len: u64, blob_offset: u64, file_offset: u64) -> Option<u64> {
        if len == 0 || MAX_PIECE_BYTES < len {
            return None;
        }
        let next = match file_offset.is_multiple_of(BLOCK_BYTES) {
            true => self.next.checked_next_multiple_of(BLOCK_BYTES)?,
            false => self.next,
        };
        let in_chunk = next % CHUNK_BYTES;
        let is_near = blob_offset.saturating_sub(self.group_start) < MAX_GROUP_BLOB_BYTES;
        let joins = 0 < in_chunk && len <= CHUNK_BYTES - in_chunk && is_near;
        let start = match joins {
            true => next,
            false => next.checked_next_multiple_of(CHUNK_BYTES)?,
        };
        let end = start.checked_add(len)?;
        // Where its block and its chunk end is a number, too.
        let behind = end.checked_next_multiple_of(CHUNK_BYTES)?;
        let next = match CHUNK_BYTES < len {
            true => behind,
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
            (chunk - 512, 512),
            (1, chunk),
            (chunk, 2 * chunk),
            (513, 3 * chunk),
            // It does not fit behind the first of its chunk.
            (chunk - 1023, 4 * chunk),
            (6, 5 * chunk - 512),
            (1025, 5 * chunk),
            (1, 5 * chunk + 1536),
            (chunk + 1, 6 * chunk),
            (1, 8 * chunk),
            (MAX_PIECE_BYTES, 9 * chunk),
            (1, 26 * chunk),
        ] {
            assert_eq!(layout.place(len, 0, 0), Some(start), "{len}");
            let end = (start + len).next_multiple_of(512);
            assert_eq!(layout.layer_bytes(), end);
        }
        assert_eq!(layout.place(0, 0, 0), None);
        assert_eq!(layout.place(MAX_PIECE_BYTES + 1, 0, 0), None);
        layout.next = u64::MAX - 5;
        assert_eq!(layout.place(10, 0, 0), None);
    }

    #[test]
    fn pieces_of_a_file_follow_on_where_they_begin_no_block() {
        let mut layout = Layout::default();
        for (len, file_offset, start) in [
            (1000, 0, 0),
            (1000, 1000, 1000),
            (96, 2000, 2000),
            // Of the file's fourth block.
            (1, 2048, 2560),
            (CHUNK_BYTES - 2561, 2049, 2561),
            (1, 7, CHUNK_BYTES),
        ] {
            assert_eq!(layout.place(len, 0, file_offset), Some(start), "{start}");
        }
    }

    #[test]
    fn pieces_that_are_far_apart_in_the_blob_share_no_chunk() {
        let mut layout = Layout::default();
        let far = MAX_GROUP_BLOB_BYTES;
        for (blob_offset, start) in [
            (100, 0),
            (99 + far, 512),
            (100 + far, CHUNK_BYTES),
            (99 + 2 * far, CHUNK_BYTES + 512),
        ] {
            assert_eq!(
                layout.place(1, blob_offset, 0),
                Some(start),
                "{blob_offset}"
            );
        }
    }
}
