//! Parses tar archives as they stream by: one parser for every layer, pure, no I/O.
//!
//! [`Parser::push`] takes the uncompressed layer in pieces of any size and reports each entry as
//! soon as its headers are complete, with the ranges of the stream where its data lie. Payload is
//! counted, never copied, and memory is bounded by [`TarLimits`], not by the archive.
//!
//! # Which reading of tar
//! Readers of tar differ, and a difference about where the next header is lets a nested archive's
//! entries become real for one of them. So:
//! - Where GNU tar, libarchive, Python and Go agree about the layout, theirs is ours.
//! - Where they disagree about the *layout*, the archive is refused ([`TarError::Ambiguous`]): a
//!   size on a symbolic link, a device or a fifo; a PAX size on anything without data; a lone zero
//!   block before more data; a size, path or sparse map for all files in a global PAX header; two
//!   PAX headers for one entry.
//! - Where they disagree about an entry's *name or metadata* only, Go's `archive/tar` decides,
//!   because the container runtimes use it: a GNU long name beats a PAX path whatever their order,
//!   the last of duplicate PAX records counts, an empty record restores the header's own field.
//!   Exceptions: `LIBARCHIVE.xattr` is understood; an extended attribute may have an empty value;
//!   uid, gid and mtime in a global PAX header hold for the entries after it, as POSIX says.
//! - A PAX size beats the header's. A directory or hard link with a size in its header has no data.
//! - Unknown typeflags are refused, as the runtimes do: to leave the entry out or to take it for a
//!   file would each be a guess about the image. `7` (contiguous) is a file.
//! - A file whose name ends in `/` is a directory, and refused if it has data.
//! - The archive ends with two zero blocks, with one, or with the stream; what follows two zero
//!   blocks is ignored. Only the padding of the last payload may be missing.
//!
//! # References
//! POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; the GNU tar manual,
//! "Basic Tar Format" and "Storing Sparse Files"; `tar(5)` of libarchive.

mod entry;
mod header;
mod parser;
mod pax;
mod sparse;
#[cfg(test)]
mod tests;

pub use parser::Parser;

/// What one archive may make the parser hold or report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TarLimits {
    /// Most bytes of one extended header or long name. Default: 1 MiB, which has room for a dozen
    /// extended attributes of the kernel's largest size, 64 KiB.
    pub max_metadata_bytes: u64,
    /// Most entries of the archive. Default: 10 million.
    pub max_entries: u64,
    /// Most data segments of one sparse file. Default: 131,072, which are 3 MiB of extents: a
    /// file of 1 GiB with a hole in every 8 KiB.
    pub max_sparse_segments: usize,
    /// Most bytes of a path or link target. Default: 32 KiB, eight times Linux' `PATH_MAX`,
    /// because deep trees can be archived by relative steps.
    pub max_path_bytes: usize,
}

impl Default for TarLimits {
    fn default() -> Self {
        Self {
            max_metadata_bytes: 1 << 20,
            max_entries: 10_000_000,
            max_sparse_segments: 128 << 10,
            max_path_bytes: 32 << 10,
        }
    }
}

/// One file, directory, link or special file of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// The path, byte for byte as in the archive: `./`, `..`, a leading or trailing `/` included.
    /// Never empty, without NUL.
    pub path: Vec<u8>,
    /// What it is, and what only such entries have.
    pub kind: TarKind,
    /// Permission bits with setuid, setgid and sticky: `0o7777` at most.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Modification time: seconds since the epoch, rounded down.
    pub mtime_seconds: i64,
    /// Modification time: what to add to the seconds, below 1,000,000,000.
    pub mtime_nanoseconds: u32,
    /// Extended attributes in order of their names, each name once.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarKind {
    /// A regular file.
    File {
        /// The file's length, holes included.
        size: u64,
        /// Where the data are: in order of `file_offset`, apart, none empty, none beyond `size`.
        /// What no extent covers is a hole.
        extents: Vec<TarExtent>,
    },
    /// Another name for the entry of this path, which is as raw as [`TarEntry::path`].
    HardLink(Vec<u8>),
    /// A symbolic link with this target.
    Symlink(Vec<u8>),
    /// A directory.
    Directory,
    /// A character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
}

/// A range of a file's data in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TarExtent {
    /// Where the range starts in the file.
    pub file_offset: u64,
    /// Where the range starts in the uncompressed layer.
    pub layer_offset: u64,
    /// Its length, never 0.
    pub len: u64,
}

/// Why an archive is refused; `offset` is the place in the uncompressed layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// The stream ended too early.
    #[error("the tar stream ends at offset {offset}, inside {what}")]
    Truncated {
        /// The stream's length.
        offset: u64,
        /// What is incomplete.
        what: &'static str,
    },
    /// A header breaks its format's rules.
    #[error("malformed tar header at offset {offset}: {what}")]
    Malformed {
        /// Where the header starts.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Readers of tar differ about this entry, so it is refused.
    #[error("ambiguous tar header at offset {offset}: {what}")]
    Ambiguous {
        /// Where the header starts.
        offset: u64,
        /// What has two meanings.
        what: &'static str,
    },
    /// A part of the format that is known, but not read.
    #[error("unsupported tar header at offset {offset}: {what}")]
    Unsupported {
        /// Where the header starts.
        offset: u64,
        /// What is unsupported.
        what: &'static str,
    },
    /// No kind of file is known by this typeflag.
    #[error("unsupported tar header at offset {offset}: unknown typeflag {:?}", char::from(*typeflag))]
    UnknownType {
        /// Where the header starts.
        offset: u64,
        /// The byte.
        typeflag: u8,
    },
    /// The archive exceeds one of the [`TarLimits`].
    #[error("tar header at offset {offset}: more than {max} {what}")]
    Limit {
        /// Where the header starts.
        offset: u64,
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        max: u64,
    },
}

/// What is wrong with a header whose place the caller knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Malformed(&'static str),
    Ambiguous(&'static str),
    Unsupported(&'static str),
    UnknownType(u8),
    Limit { what: &'static str, max: u64 },
}

impl Fault {
    fn at(self, offset: u64) -> TarError {
        match self {
            Self::Malformed(what) => TarError::Malformed { offset, what },
            Self::Ambiguous(what) => TarError::Ambiguous { offset, what },
            Self::Unsupported(what) => TarError::Unsupported { offset, what },
            Self::UnknownType(typeflag) => TarError::UnknownType { offset, typeflag },
            Self::Limit { what, max } => TarError::Limit { offset, what, max },
        }
    }

    fn limit(what: &'static str, max: usize) -> Self {
        let max = u64::try_from(max).unwrap_or(u64::MAX);
        Self::Limit { what, max }
    }
}
