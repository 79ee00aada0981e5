//! The merged tree of an image, as data: no I/O, no runtime.
//!
//! Two kinds of index, one made from the other:
//!
//! - [`layer_index`]: what one layer's tar contains, in tar order, with its chunk digests. It is a
//!   function of the layer's bytes alone, so every image that has the layer shares it.
//! - [`image`]: the tree that the layers make together ([`merge`] applies them as the OCI image
//!   specification says), as a `.clip` file that is served from a memory map with no decoding.
//!
//! Beside them, [`profile`]: in which order an image's chunks were touched first.
//!
//! What is larger than memory should hold while these are made is in a [`scratch`] file, of a kind that
//! the caller brings.
//!
//! All formats are described in `docs/INDEX_FORMAT.md`; golden-bytes tests keep them.
//! Invariant: a byte of foreign origin can cause an [`IndexError`], never a panic.

use std::io;

pub mod image;
pub mod layer_index;
pub mod merge;
pub mod path;
pub mod profile;
pub mod scratch;
pub mod source;

pub(crate) mod wire;

mod tree;
mod writer;

/// Says why an index cannot be read or made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// The file is of another kind.
    #[error("not a {what}: its first bytes are wrong")]
    Magic {
        /// What was expected.
        what: &'static str,
    },
    /// The file is of a version that this program does not read.
    #[error("{what} has version {found}, this program reads up to {max}: rebuild it")]
    Version {
        /// What was expected.
        what: &'static str,
        /// The version found.
        found: u32,
        /// The newest version that is understood.
        max: u32,
    },
    /// The file ends too early, or a length in it points outside.
    #[error("{what} is truncated or damaged")]
    Truncated {
        /// Which part.
        what: &'static str,
    },
    /// The content does not match its checksum.
    #[error("{what} does not match its checksum")]
    Checksum {
        /// Which part.
        what: &'static str,
    },
    /// A limit of the configuration, or of the format, is exceeded.
    #[error("the image exceeds {limit} = {max}")]
    Limit {
        /// The limit's name.
        limit: &'static str,
        /// Its value.
        max: u64,
    },
    /// An entry of a layer cannot be applied to the tree.
    #[error("entry {path:?}: {reason}")]
    Entry {
        /// The entry's path, as far as it is text.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A file that is written while an index is made failed.
    #[error("making the index: {reason}")]
    Scratch {
        /// What kind of failure it was.
        kind: io::ErrorKind,
        /// What failed.
        reason: String,
    },
}

impl From<io::Error> for IndexError {
    fn from(err: io::Error) -> Self {
        Self::Scratch {
            kind: err.kind(),
            reason: err.to_string(),
        }
    }
}
