//! Says across processes who fills a layer, who removes it, and who uses it: flocks, which the
//! kernel drops when their process dies.
//!
//! - The *fill lock*, a file of its own, is held by the one process that fills or removes a layer.
//! - The *pin* is on the layer's data file: shared by all who have the layer open, exclusive while
//!   it is taken away. Whoever wants it exclusively holds the fill lock, so that the holder of the
//!   fill lock can always pin.
//! - The *write lock* is on the layer's state file: shared, for as long as it takes, by whoever writes a
//!   chunk and marks it present, exclusive while extents are evicted. Without it an eviction could punch
//!   what has just been filled. Threads of one process need it as well, so that each has a descriptor of
//!   its own.
//! - Whoever *keeps* the layer whole, because all of it is being read, shares a lock of its index, which
//!   whoever evicts extents wants exclusively, and waits for nobody.
//! - A layer that the kernel has *mounted* is in use for as long as the kernel has a file of its open: see
//!   `whole`. Whoever is about to mount it shares a lock of that file meanwhile.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};

use crate::sys;

/// How long a chunk waits to be written while extents of its layer are evicted, which takes a moment, or
/// as long as one fsync of a small file: then the disk counts as one that cannot take it.
const WRITE_PATIENCE: Duration = Duration::from_secs(5);

/// How long an eviction waits for chunks that are being written, and who keeps a layer for an eviction. A
/// chunk takes a millisecond, but while there are several readers there is often one.
const MOMENT: Duration = Duration::from_millis(50);

/// The wait between two looks at a lock.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

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

/// A lock that is held until this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    /// Closing it releases the lock.
    _file: File,
}

/// Allows to write chunks of the layer with this state file, and to mark them present.
///
/// # Errors
/// `TimedOut` if others evict for too long; those of the file system.
///
/// # Blocking
/// While extents of the layer are evicted.
pub(super) fn write(state: &Path) -> io::Result<Held> {
    let shared = FlockOperation::NonBlockingLockShared;
    wait(state, shared, WRITE_PATIENCE)?.ok_or_else(too_long)
}

fn too_long() -> io::Error {
    let reason = "extents of the layer are being evicted, and that takes too long";
    io::Error::new(io::ErrorKind::TimedOut, reason)
}

/// Keeps all others from writing chunks of the layer with this state file; `None` if they do not cease to.
///
/// # Errors
/// Those of the file system.
///
/// # Blocking
/// For a moment, while chunks are being written.
pub(super) fn try_write_alone(state: &Path) -> io::Result<Option<Held>> {
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    wait(state, exclusive, MOMENT)
}

/// Keeps extents of the layer with this index file from being evicted.
///
/// # Errors
/// `TimedOut` if one is being evicted, and that takes long; those of the file system.
///
/// # Blocking
/// For a moment, while an extent is evicted.
pub(super) fn keep(index: &Path) -> io::Result<Held> {
    let shared = FlockOperation::NonBlockingLockShared;
    wait(index, shared, MOMENT)?.ok_or_else(too_long)
}

/// Keeps others from keeping the layer with this index file; `None` if somebody does.
///
/// # Errors
/// Those of the file system.
pub(super) fn try_let_go(index: &Path) -> io::Result<Option<Held>> {
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    wait(index, exclusive, Duration::ZERO)
}

/// Keeps the layer from being taken away, for who is about to mount it; `None` if it is being taken away. The
/// lock goes with the file, whoever gets that.
///
/// # Errors
/// Those of the file system.
pub(super) fn try_mount(mounted: &Path) -> io::Result<Option<File>> {
    let file = open_mounted(mounted)?;
    let locked = try_flock(&file, FlockOperation::NonBlockingLockShared)?;
    Ok(locked.then_some(file))
}

/// Keeps others from mounting the layer; `None` if the kernel has it mounted, or somebody is about to mount it.
/// Who cannot know takes it for mounted.
///
/// # Errors
/// Those of the file system.
pub(super) fn try_unmounted(mounted: &Path) -> io::Result<Option<Held>> {
    let file = open_mounted(mounted)?;
    let locked = try_flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    let is_free = locked && !sys::is_open_elsewhere(&file).unwrap_or(true);
    Ok(is_free.then_some(Held { _file: file }))
}

fn open_mounted(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).create(true).truncate(false);
    options.open(path)
}

fn wait(path: &Path, operation: FlockOperation, patience: Duration) -> io::Result<Option<Held>> {
    let file = File::open(path)?;
    let since = Instant::now();
    while !try_flock(&file, operation)? {
        if patience <= since.elapsed() {
            return Ok(None);
        }
        thread::sleep(LOOK_AGAIN);
    }
    Ok(Some(Held { _file: file }))
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
    fn chunks_are_written_by_many_or_evicted_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        File::create(&path).unwrap();
        let writers = [write(&path).unwrap(), write(&path).unwrap()];
        assert!(try_write_alone(&path).unwrap().is_none());
        drop(writers);
        let alone = try_write_alone(&path).unwrap();
        assert!(alone.is_some() && try_write_alone(&path).unwrap().is_none());
        let waiting = thread::spawn({
            let path = path.clone();
            move || write(&path).map(|_| ())
        });
        thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        drop(alone);
        waiting.join().unwrap().unwrap();
        let kept = keep(&path).unwrap();
        assert!(try_let_go(&path).unwrap().is_none());
        drop(kept);
        assert!(try_let_go(&path).unwrap().is_some());
    }

    #[test]
    fn a_layer_is_mounted_by_many_or_taken_away_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mounted");
        let taken = try_unmounted(&path).unwrap();
        assert!(taken.is_some() && try_mount(&path).unwrap().is_none());
        assert!(try_unmounted(&path).unwrap().is_none());
        drop(taken);
        let mounts = [try_mount(&path).unwrap(), try_mount(&path).unwrap()];
        assert!(mounts.iter().all(Option::is_some));
        assert!(try_unmounted(&path).unwrap().is_none());
        // As the kernel has it open, which takes no lock.
        let kernel = File::open(&path).unwrap();
        drop(mounts);
        assert!(try_unmounted(&path).unwrap().is_none());
        drop(kernel);
        assert!(try_unmounted(&path).unwrap().is_some());
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
