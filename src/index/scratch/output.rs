//! Writes a file from its start to its end, in small pieces, and hashes it on the way.

use std::io;

use super::{
    Scratch, WriteAt,
    paged::{PAGE_BYTES, Paged},
};

/// Bytes of a piece. The file is mapped later, and what comes in one write is mapped as one: see
/// `disk::write_to_map`.
const PIECE_BYTES: usize = 32 << 10;

/// The end of a file in the making.
#[derive(Debug)]
pub(in crate::index) struct Output<'a, S> {
    file: &'a mut S,
    offset: u64,
    piece: Vec<u8>,
    hasher: blake3::Hasher,
}

impl<'a, S: WriteAt> Output<'a, S> {
    /// Begins at `offset`: what is before it is not hashed.
    pub(in crate::index) fn new(file: &'a mut S, offset: u64) -> Self {
        Self {
            file,
            offset,
            piece: Vec::with_capacity(PIECE_BYTES),
            hasher: blake3::Hasher::new(),
        }
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn put(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let len = bytes.len().min(PIECE_BYTES - self.piece.len());
            let (head, rest) = bytes.split_at(len);
            self.piece.extend_from_slice(head);
            bytes = rest;
            if self.piece.len() == PIECE_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Appends all of `table`.
    ///
    /// # Errors
    /// Those of either file.
    pub(in crate::index) fn put_table<T: Scratch>(
        &mut self,
        table: &mut Paged<T>,
    ) -> io::Result<()> {
        let mut rest = table.len();
        for number in 0.. {
            // At most a page.
            let len = usize::try_from(rest.min(PAGE_BYTES as u64)).map_err(io::Error::other)?;
            if len == 0 {
                break;
            }
            self.put(&table.page(number)?[..len])?;
            rest -= len as u64;
        }
        Ok(())
    }

    /// Writes what is left; returns the digest of all, and where it ends.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn finish(mut self) -> io::Result<(blake3::Hash, u64)> {
        self.flush()?;
        Ok((self.hasher.finalize(), self.offset))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hasher.update(&self.piece);
        self.file.write_at(&self.piece, self.offset)?;
        self.offset += self.piece.len() as u64;
        self.piece.clear();
        Ok(())
    }
}
