//! Mounts images that are whole on disk with the kernel's own file system, EROFS, whose reads no process
//! serves.
//!
//! The metadata is made here, out of an image's index; the data are the layers as they lie in the
//! cache, each a device of the file system. That works because the content of a tar's files begins at
//! multiples of 512 bytes, which the file system has as the size of its blocks: Linux 6.12 and later can
//! mount files, without loop devices; [`unavailable`] says of which that is sound.
//!
//! - [`write`](fn@write) makes the metadata: what the kernel parses, it wrote, and checked what it wrote it from.
//! - [`mount`](fn@mount) mounts it.
//!
//! A mount keeps its files open, so that it is served as long as it is there, whoever runs or does not run.
//! What must not happen is that bytes of its layers are taken away: see `layer::whole`.
//!
//! References: fs/erofs/erofs_fs.h of Linux 6.12, Documentation/filesystems/erofs.rst.

mod directory;
mod format;
mod kernel;
mod mount;
mod plan;
mod write;

use crate::index::image::Ino;

pub use kernel::unavailable;
pub use mount::{FS_TYPE, LayerFiles, METADATA_NAME, check_file, mount};
pub use write::write;

/// Most inodes of an image that is mounted so: the metadata are written anew for each mount.
///
/// A million take a third of a second, and 120 MB of disk as long as the image is mounted.
pub const MAX_NODES: u64 = 1 << 20;

/// Says why an image's metadata could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// The image has something for which there is no form.
    #[error("inode {}: {what}", ino.0)]
    Unfit {
        /// What has it.
        ino: Ino,
        /// What it is.
        what: &'static str,
    },
    /// The index contradicts itself.
    #[error("inode {}: the image's index is damaged: {what}", ino.0)]
    Damaged {
        /// Where.
        ino: Ino,
        /// How.
        what: &'static str,
    },
    /// The disk failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}
