//! Reads the table of contents that a layer's blob carries (eStargz, zstd:chunked), and lays the layer out
//! by it: pure, no I/O of its own, and the input is hostile.
//!
//! [`footer`] finds an eStargz table in its blob; [`read`](read()) goes through a table as it streams by, and
//! gives each entry as an archive's entry, with the ranges of the laid out layer where its data lie, and
//! each piece of data with the part of the blob that it is decompressed from. Nothing of a table is held but
//! the entry under way.
//!
//! # What a layer has by its table
//! - The entries of the table, in its order, under the rules that hold for those of a tar, whiteouts
//!   included. Not eStargz' own files, at the root: its landmarks and the table.
//! - The content of files in pieces, each with a SHA-256, laid out as [`layout`] says.
//! - Times as the table has them: eStargz rounds them to seconds.
//!
//! # What makes a table unusable
//! Whoever is given a [`TocError::Unusable`] reads the layer as if it had no table. That is for whatever a
//! reader would have to guess about: chunks that are no partition of their file in order, pieces that are not
//! in the order of the blob, without a digest, or too large; types that are not known; names that JSON could
//! not hold, which are not UTF-8; a layer without content, of which streaming costs nothing.
//!
//! # References
//! `docs/estargz.md` of containerd's stargz-snapshotter; `pkg/chunked` of containers/storage.

mod entry;
pub mod footer;
mod input;
pub mod layout;
mod read;
mod time;

pub use read::{Contents, TocSink, read};

use std::io;

/// What one table may make the reader do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TocLimits {
    /// Bytes of the table at most, decompressed. Default: 1 GiB, of some three million files.
    pub max_table_bytes: u64,
    /// Bytes of one entry at most. Default: 1 MiB, as for the metadata of a tar's entry.
    pub max_entry_bytes: u64,
    /// Most entries. Default: 10 million, as of a tar.
    pub max_entries: u64,
    /// Bytes of a path or link target at most. Default: 32 KiB, as in a tar.
    pub max_path_bytes: usize,
    /// Runs of one file's data at most. Default: 131,072, as in a tar.
    pub max_extents: usize,
    /// Bytes of the layer at most. Default: none.
    pub max_layer_bytes: u64,
}

impl Default for TocLimits {
    fn default() -> Self {
        Self {
            max_table_bytes: 1 << 30,
            max_entry_bytes: 1 << 20,
            max_entries: 10_000_000,
            max_path_bytes: 32 << 10,
            max_extents: 128 << 10,
            max_layer_bytes: u64::MAX,
        }
    }
}

/// Says why a table could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TocError<E> {
    /// Its bytes could not be had, which says nothing about them.
    #[error("reading the table of contents")]
    Input(#[source] io::Error),
    /// It is not one that can be used.
    #[error("{0}")]
    Unusable(String),
    /// None of the layer's entries has content: streaming the layer costs no more than the table does.
    #[error("the layer has no content")]
    NoContent,
    /// Whoever takes what it says failed.
    #[error("{0}")]
    Sink(E),
}
