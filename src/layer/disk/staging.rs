//! Makes a layer's directory, which nobody sees before it is complete.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use super::{CachePaths, DATA, STATE};
use crate::{
    digest::DiffId,
    disk,
    layer::state::{self, Initial, State},
};

/// A layer directory in the making; removed when dropped unpublished.
#[derive(Debug)]
pub(in crate::layer) struct Staging {
    dir: PathBuf,
}

impl Staging {
    /// Makes a directory with a name of its own.
    ///
    /// # Errors
    /// Those of the file system.
    pub(in crate::layer) fn new(paths: &CachePaths, layer: DiffId) -> io::Result<Self> {
        let dir = disk::temporary_beside(&paths.temporary().join(layer.hex()));
        fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    pub(in crate::layer) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a file of the layer.
    ///
    /// Without fsync, which would delay the first reader: a file that a power cut tears fails its
    /// checksum or its boot's number when it is opened, and [`LayerFile::flush`] follows.
    ///
    /// # Errors
    /// Those of the file system.
    pub(in crate::layer) fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        disk::write_to_map(&mut self.create(name)?, content)
    }

    /// Makes an empty file of the layer, anew if there is one, to be written as [`write`](Self::write) does, and read.
    ///
    /// # Errors
    /// Those of the file system.
    pub(in crate::layer) fn create(&self, name: &str) -> io::Result<File> {
        let path = self.dir.join(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true);
        options.truncate(true).open(path)
    }

    /// Publishes a layer that has its index, and no data yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub(in crate::layer) fn publish_empty(
        self,
        paths: &CachePaths,
        layer: DiffId,
        layer_bytes: u64,
    ) -> io::Result<()> {
        self.create(DATA)?.set_len(layer_bytes)?;
        let state = State::initial(layer_bytes, Initial::Absent, state::boot());
        self.write(STATE, &state)?;
        self.publish(paths, layer)
    }

    /// Puts the directory into its place. The caller holds the layer's fill lock.
    ///
    /// # Errors
    /// Those of the file system.
    pub(in crate::layer) fn publish(self, paths: &CachePaths, layer: DiffId) -> io::Result<()> {
        let place = paths.layer(layer);
        fs::create_dir_all(paths.layers())?;
        if place.try_exists()? {
            // A damaged layer.
            fs::remove_dir_all(paths.set_aside(layer)?)?;
        }
        fs::rename(&self.dir, &place)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After `publish` there is nothing at this name; before it, what fails is removed at start.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
