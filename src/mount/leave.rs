//! Leaves the state directory at the end: when no volume is published, nothing of it stays.

use std::{fs, io, path::Path};

use tracing::{info, warn};

use super::{
    MountTable,
    recover::{LOCK_FILE, WRITABLE_DIR},
    target::remove,
};

impl MountTable {
    /// Removes the state directory if it holds no records and no mounts, as after the last
    /// unpublish; leaves it alone otherwise.
    ///
    /// Says whether it is gone. The table cannot be used afterwards.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub fn leave(self) -> bool {
        self.retire_all_idle();
        let dir = self.state_dir();
        match remove_state(dir) {
            Ok(gone) => {
                if gone {
                    info!(path = %dir.display(), "no volume is left, removed the state directory");
                }
                gone
            }
            Err(err) => {
                warn!(path = %dir.display(), error = %err, "state directory stays");
                false
            }
        }
    }
}

/// Removes what an unused state directory consists of, and nothing that it does not know.
fn remove_state(dir: &Path) -> io::Result<bool> {
    for part in ["volumes", "sources", WRITABLE_DIR] {
        if !remove_empty(&dir.join(part))? {
            return Ok(false);
        }
    }
    // While this process still holds the lock: another one cannot have taken it.
    fs::remove_file(dir.join(LOCK_FILE))?;
    remove_empty(dir)
}

/// rmdir(2); false if there is something in the directory.
fn remove_empty(dir: &Path) -> io::Result<bool> {
    match remove(dir) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
        Err(err) => Err(err),
    }
}
