//! The bytes of an index, and how all of them are read without holding all of them.

use std::ops::{Deref, Range};

/// How much is read at once where all is read.
const PIECE_BYTES: usize = 256 << 10;

/// The bytes of an index, in memory or mapped from a file.
pub trait IndexBytes: Deref<Target = [u8]> {
    /// Hears that `range` is read next; does nothing where that means nothing.
    fn will_read(&self, _range: Range<usize>) {}

    /// Gives the pages that were read back to the kernel; does nothing where that means nothing.
    fn drop_resident(&self) {}
}

impl IndexBytes for Vec<u8> {}

impl IndexBytes for &[u8] {}

/// BLAKE3 of `range`, which must be within `bytes`; holds no more than a piece of a mapped file.
pub(crate) fn hash(bytes: &impl IndexBytes, range: Range<usize>) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    let mut at = range.start;
    while at < range.end {
        let piece = at..range.end.min(at + PIECE_BYTES);
        bytes.will_read(piece.clone());
        at = piece.end;
        hasher.update(&bytes[piece]);
        bytes.drop_resident();
    }
    hasher.finalize()
}
