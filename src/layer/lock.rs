//! One process at a time fills a layer: an flock on a file that outlives the layer's directory.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::Path,
};

use rustix::fs::{FlockOperation, flock};

/// Holds the lock until it is dropped, or its process dies.
#[derive(Debug)]
pub(super) struct FillLock(
    #[expect(dead_code, reason = "closing the file releases the lock")] File,
);

/// Takes the lock at `path` if nobody has it.
///
/// The file is never removed: a process that waits on a removed file would hold a lock that nobody
/// else sees.
///
/// # Errors
/// Those of the file system.
pub(super) fn try_lock(path: &Path) -> io::Result<Option<FillLock>> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(FillLock(file))),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
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
}
