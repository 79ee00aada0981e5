//! Publishes files atomically: a reader, or a restart after a crash, sees all of a file or none.
//! Also asks for the space of a disk, and notes the use of a file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

/// How much of a file that is to be mapped is written at once.
const MAPPED_PIECE_BYTES: usize = 32 << 10;

/// Suffix of names that are not published yet; what a crash leaves behind ends in it.
pub const TEMPORARY_SUFFIX: &str = ".tmp";

/// Returns a name beside `path` that no other process or thread uses.
///
/// The process id alone would do on one node but for pid namespaces: two containers may share the
/// directory and the pid, hence the random part.
pub fn temporary_beside(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(
        ".{}-{:016x}-{count}{TEMPORARY_SUFFIX}",
        std::process::id(),
        random()
    ));
    path.with_file_name(name)
}

/// A number that differs between processes: std seeds each hasher from the system's randomness.
fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish()
}

/// Writes `content` to `path`: temporary name, fsync, rename, fsync of the directory.
///
/// # Errors
/// Those of the file system; then `path` is as it was, and the temporary file is gone.
///
/// # Blocking
/// Waits for the disk.
pub fn publish(path: &Path, content: &[u8]) -> io::Result<()> {
    replace(path, content, Durability::PowerCut)
}

/// Writes `content` to `path` by rename, without waiting for the disk.
///
/// For files with a checksum of their own that can be made anew: a power cut may tear or lose them,
/// a crash of the process does not.
///
/// # Errors
/// As for [`publish`].
pub fn publish_unsynced(path: &Path, content: &[u8]) -> io::Result<()> {
    replace(path, content, Durability::Crash)
}

/// Writes a file that is to be mapped.
///
/// The page cache keeps what comes in one write in folios of up to 2 MiB, and from Linux 6.18 on one
/// access to a mapping maps all of its folio: so much would be resident for each byte that is read.
///
/// # Errors
/// Those of the file system.
pub fn write_to_map(mut file: impl Write, content: &[u8]) -> io::Result<()> {
    let mut pieces = content.chunks(MAPPED_PIECE_BYTES);
    pieces.try_for_each(|piece| file.write_all(piece))
}

/// Copies what is read to a file that is to be mapped; returns how many bytes there were.
///
/// # Errors
/// Those of the file system.
pub fn copy_to_map(mut from: impl Read, mut file: impl Write) -> io::Result<u64> {
    let (mut piece, mut copied_bytes) = (vec![0; MAPPED_PIECE_BYTES], 0);
    loop {
        match from.read(&mut piece)? {
            0 => return Ok(copied_bytes),
            len => {
                file.write_all(&piece[..len])?;
                copied_bytes += len as u64;
            }
        }
    }
}

/// What a file must survive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durability {
    Crash,
    PowerCut,
}

fn replace(path: &Path, content: &[u8], durability: Durability) -> io::Result<()> {
    let mut unpublished = Unpublished::create(path)?;
    write_to_map(&mut unpublished.file, content)?;
    if durability == Durability::PowerCut {
        unpublished.file.sync_all()?;
    }
    unpublished.publish()?;
    if durability == Durability::PowerCut {
        sync_parent(path)?;
    }
    Ok(())
}

/// A file that nobody sees until it is complete, and that is removed if it never is.
#[derive(Debug)]
pub struct Unpublished {
    file: File,
    temporary: PathBuf,
    place: PathBuf,
}

impl Unpublished {
    /// Makes an empty file that is to come to `path`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(path: &Path) -> io::Result<Self> {
        let temporary = temporary_beside(path);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&temporary)?;
        Ok(Self {
            file,
            temporary,
            place: path.to_owned(),
        })
    }

    /// The file, to be written; as [`write_to_map`] does if it is to be mapped.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Puts the file into its place, in place of what was there, without waiting for the disk.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn publish(self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.place)
    }
}

impl Drop for Unpublished {
    fn drop(&mut self) {
        // It is not there any more if it came into its place; what fails is removed at start.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Makes a file without a name, to be written and read, in the directory `dir`.
///
/// # Errors
/// Those of the file system.
pub fn nameless(dir: &Path) -> io::Result<File> {
    // O_TMPFILE is not there on every file system.
    let name = temporary_beside(&dir.join("scratch"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&name)?;
    fs::remove_file(&name)?;
    Ok(file)
}

/// Makes the entry of `path` in its directory durable.
///
/// # Errors
/// Those of the file system.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

/// Space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskSpace {
    /// Bytes that users without privileges may still take.
    pub free_bytes: u64,
    /// All bytes.
    pub size_bytes: u64,
    /// Files that users without privileges may still make; `None` where the file system has no bound.
    pub free_inodes: Option<u64>,
}

/// Asks for the space of the file system of `path`, which reads no disk.
///
/// # Errors
/// Those of statvfs(3).
pub fn space(path: &Path) -> io::Result<DiskSpace> {
    let disk = rustix::fs::statvfs(path)?;
    Ok(DiskSpace {
        free_bytes: disk.f_bavail.saturating_mul(disk.f_frsize),
        size_bytes: disk.f_blocks.saturating_mul(disk.f_frsize),
        // btrfs says that it has none of those that it has.
        free_inodes: (0 < disk.f_files).then_some(disk.f_favail),
    })
}

/// Notes that the file is used now: its modification time says when that was last.
///
/// # Errors
/// Those of futimens(3).
pub fn touch(file: &File) -> io::Result<()> {
    file.set_modified(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_file_replaces_the_old_one_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        publish(&path, b"old").unwrap();
        publish(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_publish_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("occupied");
        fs::create_dir(&path).unwrap();
        assert!(publish(&path, b"new").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_without_a_name_is_gone_with_its_user() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().unwrap();
        let file = nameless(dir.path()).unwrap();
        file.write_all_at(b"x", 1).unwrap();
        let mut read = [1; 2];
        file.read_exact_at(&mut read, 0).unwrap();
        assert_eq!(read, *b"\0x");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_published_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(Unpublished::create(&dir.path().join("file")).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn temporary_names_differ() {
        let path = Path::new("/x/y");
        assert_ne!(temporary_beside(path), temporary_beside(path));
        assert_eq!(temporary_beside(path).parent(), path.parent());
    }
}
