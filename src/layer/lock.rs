//! Says across processes who fills a layer, who removes it, and who uses it: flocks, which the
//! kernel drops when their process dies.
//!
//! - The *fill lock*, a file of its own, is held by the one process that fills or removes a layer.
//! - The *pin* is on the layer's data file: shared by all who have the layer open, exclusive while
//!   it is taken away. Whoever wants it exclusively holds the fill lock, so that the holder of the
//!   fill lock can always pin.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

/// Holds the fill lock until it is dropped, or its process dies.
#[derive(Debug)]
pub(super) struct FillLock {
    /// Closing it releases the lock.
    _file: File,
    path: PathBuf,
}

impl FillLock {
    /// Removes the lock's file and releases the lock: the layer is gone.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

/// Takes the fill lock at `path` if nobody has it.
///
/// # Errors
/// Those of the file system.
pub(super) fn try_lock(path: &Path) -> io::Result<Option<FillLock>> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)?;
        if !try_flock(&file, FlockOperation::NonBlockingLockExclusive)? {
            return Ok(None);
        }
        // Its last holder may have removed the file: then nobody else sees this lock.
        if is_at(&file, path)? {
            return Ok(Some(FillLock {
                _file: file,
                path: path.to_owned(),
            }));
        }
    }
}

/// Pins the layer with this data file, until the file is closed; `false` if it is being removed.
///
/// # Errors
/// Those of flock(2).
pub(super) fn try_pin(data: &File) -> io::Result<bool> {
    try_flock(data, FlockOperation::NonBlockingLockShared)
}

/// Keeps everybody from pinning, until the file is closed; `false` if somebody has pinned.
///
/// # Errors
/// Those of flock(2).
pub(super) fn try_claim(data: &File) -> io::Result<bool> {
    try_flock(data, FlockOperation::NonBlockingLockExclusive)
}

/// Whether `path` still names the open `file`.
///
/// # Errors
/// Those of the file system.
pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (open.dev(), open.ino())),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(err) => Err(err),
    }
}

fn try_flock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_exclusive_and_released_on_drop() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("locks/x");
        let held = try_lock(&path).unwrap();
        assert!(held.is_some());
        assert!(try_lock(&path).unwrap().is_none());
        drop(held);
        assert!(try_lock(&path).unwrap().is_some());
    }

    #[test]
    fn a_lock_whose_file_was_removed_is_not_taken_for_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("locks/x");
        let held = try_lock(&path).unwrap().unwrap();
        // As one who opened the file just before it was removed, and locks it just after.
        let late = File::open(&path).unwrap();
        held.remove().unwrap();
        assert!(try_flock(&late, FlockOperation::NonBlockingLockExclusive).unwrap());
        assert!(!is_at(&late, &path).unwrap());
        assert!(try_lock(&path).unwrap().is_some());
    }

    #[test]
    fn pins_are_shared_and_exclude_a_claim() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let open = || {
            let mut options = OpenOptions::new();
            let options = options.create(true).truncate(false).write(true);
            options.open(&path).unwrap()
        };
        let (one, other, remover) = (open(), open(), open());
        assert!(try_pin(&one).unwrap() && try_pin(&other).unwrap());
        assert!(!try_claim(&remover).unwrap());
        drop(one);
        assert!(!try_claim(&remover).unwrap());
        drop(other);
        assert!(try_claim(&remover).unwrap());
        assert!(!try_pin(&open()).unwrap());
    }
}
