//! Gives layers that are whole on disk to whoever mounts them, and keeps their bytes as long as they are mounted.
//!
//! The kernel reads such a layer without asking anybody: it does not look at the bits of chunks, and takes no lock. So
//! nothing of it may be taken away while it is mounted, and a mount outlives every process of the driver.
//! Therefore the mount itself says so. Each layer has an empty file, `mounted`, that is a device of every file
//! system that reads the layer. It is never read, but the kernel has it open as long as the file system is there, and whether
//! anybody has a file open the kernel says (`sys::is_open_elsewhere`): after any crash, and without
//! a word between processes.
//!
//! Between the look whether a layer is whole and the mount there is a lock of the same file, which whoever
//! mounts it is given with the file.

use std::{fs::File, io, path::Path};

use super::{
    disk::{DATA, LayerFile, MOUNTED},
    lock::{self, Held},
    store::{Layer, LayerStore},
};
use crate::sys;

/// What whoever mounts a layer needs of it. As long as `mounted` is open, nothing of the layer is taken away.
#[derive(Debug)]
pub struct WholeLayer {
    /// Its bytes.
    pub data: File,
    /// What the kernel is to keep open.
    pub mounted: File,
}

impl LayerStore {
    /// Whether there is room for layers that cannot be evicted as long as they are mounted: what is mounted so never takes
    /// more than the low watermark allows, because all of it was in the cache when it was mounted.
    pub fn has_room_for_mounted(&self) -> bool {
        self.inner().room.is_below_low()
    }
}

impl Layer {
    /// Whether all of it is on disk.
    pub fn is_whole(&self) -> bool {
        self.file.is_complete()
    }

    /// Gives the layer to be mounted; `None` if it is not whole, or not to be in a moment.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn give_whole(&self) -> io::Result<Option<WholeLayer>> {
        let dir = self.file.dir();
        let Some(mounted) = lock::try_mount(&dir.join(MOUNTED))? else {
            return Ok(None);
        };
        // Where there are no leases, nobody would know of the mount.
        if !self.is_whole() || !can_know(&mounted)? {
            return Ok(None);
        }
        let data = File::open(dir.join(DATA))?;
        Ok(Some(WholeLayer { data, mounted }))
    }
}

/// Whether it can be known if others have the file open.
fn can_know(mounted: &File) -> io::Result<bool> {
    match sys::is_open_elsewhere(mounted) {
        Ok(_) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::InvalidInput => Ok(false),
        Err(err) => Err(err),
    }
}

/// Keeps the layer in `dir` from being mounted until the result is dropped; `None` if it is mounted.
///
/// # Errors
/// Those of the file system.
pub(super) fn try_unmounted(dir: &Path) -> io::Result<Option<Held>> {
    lock::try_unmounted(&dir.join(MOUNTED))
}

impl LayerFile {
    /// Whether the kernel has it mounted, or somebody is about to mount it.
    pub fn is_mounted(&self) -> bool {
        let mounted = self.dir().join(MOUNTED);
        // Without the file it was never.
        mounted.exists() && !matches!(lock::try_unmounted(&mounted), Ok(Some(_)))
    }
}
