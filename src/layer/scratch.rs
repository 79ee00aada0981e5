//! What is too large for memory while an index is made: files without a name in the cache directory.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path, sync::Arc};

use super::room::Room;
use crate::{
    disk,
    index::scratch::{Scratch, WriteAt},
};

/// A file without a name; it is made when it is first written.
///
/// Where the disk is full, layers that are not in use make room for it.
#[derive(Debug)]
pub struct ScratchFile {
    dir: Arc<Path>,
    room: Arc<Room>,
    file: Option<File>,
}

impl ScratchFile {
    /// One in `dir`.
    pub(super) fn new(dir: &Path, room: Arc<Room>) -> Self {
        Self {
            dir: dir.into(),
            room,
            file: None,
        }
    }
}

impl Scratch for ScratchFile {
    fn another(&self) -> Self {
        Self {
            dir: Arc::clone(&self.dir),
            room: Arc::clone(&self.room),
            file: None,
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let file = self.file.as_ref().ok_or(io::ErrorKind::UnexpectedEof)?;
        file.read_exact_at(buf, offset)
    }
}

impl WriteAt for ScratchFile {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let file = match self.file.take() {
            Some(file) => file,
            None => disk::nameless(&self.dir)?,
        };
        let file = self.file.insert(file);
        self.room.with_room(|| file.write_all_at(bytes, offset))
    }
}

/// A file of the cache in the making.
#[derive(Debug)]
pub struct NewFile<'a> {
    file: &'a File,
    room: &'a Room,
}

impl<'a> NewFile<'a> {
    /// Writes to `file`, which is empty.
    pub(super) fn new(file: &'a File, room: &'a Room) -> Self {
        Self { file, room }
    }
}

impl WriteAt for NewFile<'_> {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let Self { file, room } = self;
        room.with_room(|| file.write_all_at(bytes, offset))
    }
}
