//! Where what is more than memory may hold is kept while an index is made, and what is laid out there.
//!
//! An image may have millions of files, and whoever merges its layers must stay small: tables are
//! files without a name, of which a bounded number of pages is in memory. What fits there never
//! reaches a disk, so that a usual image costs nothing for it.
//!
//! - `paged`: a file of which some pages are held;
//! - `sorted`: a map from bytes to a number, in order, in such a file;
//! - `output`: writes a finished file with its checksum.

use std::{fmt, io};

pub(super) mod output;
pub(super) mod paged;
pub(super) mod sorted;

/// A file that is written at offsets.
pub trait WriteAt: fmt::Debug {
    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// Those of the file system.
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;
}

/// A file that only its user knows, and that goes with it; what was never written of it is zeros.
pub trait Scratch: WriteAt + Sized {
    /// Makes another one, empty, of the same kind.
    fn another(&self) -> Self;

    /// Fills `buf` from `offset`; something behind that was written.
    ///
    /// # Errors
    /// Those of the file system.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// In memory, for what is known to be small.
impl Scratch for Vec<u8> {
    fn another(&self) -> Self {
        Self::new()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let found = self.get(start..start.saturating_add(buf.len()));
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl WriteAt for Vec<u8> {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start + bytes.len();
        if self.len() < end {
            self.resize(end, 0);
        }
        self[start..end].copy_from_slice(bytes);
        Ok(())
    }
}
