//! Keeps values as files of a directory: the embedded engine, also on NFS or any shared volume.
//!
//! ```text
//! <root>/<first 2 hex digits>/<64 hex digits of the DiffId>/manifest
//!                                                           index-<n>            part n
//!                                                           o-<n>                chunk n
//!                                                           access-<64 hex digits of the blob>-<n>
//!                                                           lease                who makes the layer
//!                                                           *.tmp                not published
//! <root>/<first 2 hex digits>/<64 hex digits of an image's manifest>/profile
//! ```
//! A value is written under a temporary name and then linked or renamed, so that a reader sees all
//! of it or none. Nothing is synced: a value that a crash of the machine tore does not match its
//! digest and is dropped by whoever reads it, while a sync per chunk would cost more than the
//! upload.
//!
//! Deliberately absent: eviction (delete the directories of old layers with any tool, at any time)
//! and removal of `*.tmp` files that a killed process left (likewise).
//!
//! The directories are 0700, because a layer of a private image must not be readable by every
//! user of the node.

mod lease;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use tokio::sync::Semaphore;

use crate::{
    digest::DiffId,
    disk::temporary_beside,
    tier::{BoxFuture, CacheKey, LayerCache, LeaseHolder, Put, TierError},
};

use super::gate::time_for;

/// File operations at a time, hung ones included.
///
/// A call on a dead NFS server hangs in the kernel and keeps its thread, whatever the caller does:
/// this bounds how many threads that can cost.
const MAX_OPERATIONS: usize = 4;

/// A remote content cache in a directory.
#[derive(Debug, Clone)]
pub struct DirCache {
    root: Arc<Path>,
    timeout: Duration,
    operations: Arc<Semaphore>,
}

impl DirCache {
    /// Wraps the directory `root`, which is made at the first write. Does no I/O.
    ///
    /// A call for a chunk ends after `timeout`; one for a larger value may take longer in
    /// proportion.
    pub fn new(root: &Path, timeout: Duration) -> Self {
        Self {
            root: root.into(),
            timeout,
            operations: Arc::new(Semaphore::new(MAX_OPERATIONS)),
        }
    }

    fn path(&self, key: CacheKey) -> PathBuf {
        let place = |hex: String| self.root.join(&hex[..2]).join(&hex);
        let layer = |layer: DiffId| place(layer.hex());
        match key {
            CacheKey::Manifest(id) => layer(id).join("manifest"),
            CacheKey::Index(id, n) => layer(id).join(format!("index-{n}")),
            CacheKey::Chunk(id, n) => layer(id).join(format!("o-{n}")),
            CacheKey::AccessMap(id, blob, n) => {
                layer(id).join(format!("access-{}-{n}", blob.hex()))
            }
            CacheKey::Lease(id) => layer(id).join("lease"),
            CacheKey::Profile(image) => place(image.hex()).join("profile"),
            CacheKey::ImageManifest(image) => place(image.hex()).join("image-manifest"),
            CacheKey::ImageConfig(config) => place(config.hex()).join("image-config"),
        }
    }

    /// Runs `work` on the blocking pool, and waits for it for a bounded time.
    async fn run<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, TierError> + Send + 'static,
    ) -> Result<T, TierError> {
        let after = time_for(self.timeout, bytes);
        let operations = Arc::clone(&self.operations);
        let waited = tokio::time::timeout(after, async move {
            let permit = operations
                .acquire_owned()
                .await
                .expect("the semaphore is never closed");
            // The permit goes with the work, which a timeout does not end.
            tokio::task::spawn_blocking(move || {
                let result = work();
                drop(permit);
                result
            })
            .await
        });
        match waited.await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(TierError::Io {
                reason: format!("file operation was cut off: {error}"),
            }),
            Err(_) => Err(TierError::Timeout { after }),
        }
    }
}

impl LayerCache for DirCache {
    fn engine(&self) -> &'static str {
        "dir"
    }

    fn get(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> BoxFuture<'_, Result<Option<Bytes>, TierError>> {
        let path = self.path(key);
        Box::pin(async move {
            // Opening gets the short time; only a file that is large gets the time to read it.
            let opened = move || open(&path, key, max_bytes);
            let Some((file, len)) = self.run(0, opened).await? else {
                return Ok(None);
            };
            self.run(len, move || read(&file, key, len)).await.map(Some)
        })
    }

    fn put(&self, key: CacheKey, value: Bytes, put: Put) -> BoxFuture<'_, Result<(), TierError>> {
        let path = self.path(key);
        Box::pin(self.run(value.len(), move || {
            write(&path, &value, put).map_err(|error| tier_error("writing", &path, &error))
        }))
    }

    fn delete(&self, key: CacheKey) -> BoxFuture<'_, Result<(), TierError>> {
        let path = self.path(key);
        Box::pin(self.run(0, move || match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(tier_error("deleting", &path, &error))
            }
            _ => Ok(()),
        }))
    }

    fn lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<bool, TierError>> {
        let path = self.path(key);
        Box::pin(self.run(0, move || lease::take(&path, key, holder, ttl)))
    }

    fn release(&self, key: CacheKey, holder: LeaseHolder) -> BoxFuture<'_, Result<(), TierError>> {
        let path = self.path(key);
        Box::pin(self.run(0, move || lease::release(&path, key, holder)))
    }
}

/// Opens a value and measures it.
fn open(path: &Path, key: CacheKey, max_bytes: usize) -> Result<Option<(File, usize)>, TierError> {
    let corrupt = |reason: String| Err(TierError::Corrupt { key, reason });
    // NONBLOCK and NOFOLLOW: others write to a shared directory, and opening a fifo would hang.
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let flags = flags.bits().cast_signed();
    let file = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return corrupt("is a symbolic link".to_owned());
        }
        Err(error) => return Err(tier_error("opening", path, &error)),
    };
    let metadata = file
        .metadata()
        .map_err(|error| tier_error("measuring", path, &error))?;
    if !metadata.is_file() {
        return corrupt("is not a regular file".to_owned());
    }
    match usize::try_from(metadata.len()) {
        Ok(len) if len <= max_bytes => Ok(Some((file, len))),
        _ => {
            let len = metadata.len();
            corrupt(format!("has {len} bytes, at most {max_bytes} are expected"))
        }
    }
}

/// Reads `len` bytes, or fewer if the file has shrunk: published files do not change, and one that
/// does will not match its digest.
fn read(file: &File, key: CacheKey, len: usize) -> Result<Bytes, TierError> {
    let mut value = Vec::with_capacity(len);
    let limit = u64::try_from(len).unwrap_or(u64::MAX);
    match file.take(limit).read_to_end(&mut value) {
        Ok(_) => Ok(value.into()),
        Err(error) => Err(TierError::Io {
            reason: format!("reading {key}: {error}"),
        }),
    }
}

fn write(path: &Path, value: &[u8], put: Put) -> io::Result<()> {
    if put == Put::IfAbsent && path.exists() {
        return Ok(());
    }
    let temporary = write_beside(path, value)?;
    let placed = match put {
        Put::Replace => fs::rename(&temporary, path),
        Put::IfAbsent => link_if_absent(&temporary, path).map(|_is_new| ()),
    };
    if put == Put::IfAbsent || placed.is_err() {
        // A link leaves the first name; after a rename there is none.
        let _ = fs::remove_file(&temporary);
    }
    placed
}

/// Writes `value` to a file beside `path` that is not published yet, and returns its name.
fn write_beside(path: &Path, value: &[u8]) -> io::Result<PathBuf> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    let temporary = temporary_beside(path);
    let mut new = OpenOptions::new();
    new.write(true).create_new(true).mode(0o600);
    let written = new
        .open(&temporary)
        .and_then(|mut file| file.write_all(value));
    if written.is_err() {
        // It may not even exist.
        let _ = fs::remove_file(&temporary);
    }
    written.map(|()| temporary)
}

/// Gives `temporary` the name `path` unless that exists; whether it did.
fn link_if_absent(temporary: &Path, path: &Path) -> io::Result<bool> {
    let linked = match fs::hard_link(temporary, path) {
        // Some file systems have no hard links (vfat, some in user space); NFS on the other hand
        // has no RENAME_NOREPLACE.
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EPERM | libc::EOPNOTSUPP | libc::ENOSYS)
            ) =>
        {
            renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE)
                .map_err(io::Error::from)
        }
        linked => linked,
    };
    match linked {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        linked => linked.map(|()| true),
    }
}

fn tier_error(doing: &str, path: &Path, error: &io::Error) -> TierError {
    let reason = format!("{doing} {}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => TierError::Full { reason },
        _ => TierError::Io { reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::{BlobDigest, ManifestDigest};

    fn cache(root: &Path) -> DirCache {
        DirCache::new(root, Duration::from_secs(30))
    }

    /// Docs: the tree in the module's description.
    #[tokio::test]
    async fn files_are_where_the_description_says() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("made/at/first/write");
        let cache = cache(&root);
        let layer = DiffId::of(b"");
        for key in [
            CacheKey::Manifest(layer),
            CacheKey::Index(layer, 0),
            CacheKey::Index(layer, 1),
            CacheKey::Chunk(layer, 17),
            CacheKey::AccessMap(layer, BlobDigest::of(b""), 0),
            CacheKey::Profile(ManifestDigest::of(b"")),
            CacheKey::ImageManifest(ManifestDigest::of(b"")),
            CacheKey::ImageConfig(BlobDigest::of(b"")),
        ] {
            for put in [Put::IfAbsent, Put::Replace] {
                cache
                    .put(key, Bytes::from_static(b"value"), put)
                    .await
                    .unwrap();
            }
        }
        let (lease, holder) = (CacheKey::Lease(layer), LeaseHolder::random());
        let ttl = Duration::from_secs(15);
        assert!(cache.lease(lease, holder, ttl).await.unwrap());
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let mut names: Vec<_> = fs::read_dir(root.join("e3").join(hex))
            .unwrap()
            .map(|it| it.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(
            names,
            [
                &format!("access-{hex}-0"),
                "image-config",
                "image-manifest",
                "index-0",
                "index-1",
                "lease",
                "manifest",
                "o-17",
                "profile"
            ]
        );
    }

    #[tokio::test]
    async fn what_is_not_a_file_is_corrupt_and_never_hangs() {
        let dir = tempfile::tempdir().unwrap();
        let cache = cache(dir.path());
        let layer = DiffId::of(b"x");
        let path = |n| cache.path(CacheKey::Chunk(layer, n));
        fs::create_dir_all(path(0)).unwrap();
        rustix::fs::mkfifoat(CWD, path(1), rustix::fs::Mode::RUSR).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", path(2)).unwrap();
        for n in 0..3 {
            let got = cache.get(CacheKey::Chunk(layer, n), 1 << 20).await;
            assert!(
                matches!(got, Err(TierError::Corrupt { .. })),
                "{n}: {got:?}"
            );
        }
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let error = tier_error("writing", Path::new("/x"), &full);
        assert!(matches!(error, TierError::Full { .. }), "{error:?}");
        let broken = io::Error::from_raw_os_error(libc::EIO);
        let error = tier_error("writing", Path::new("/x"), &broken);
        assert!(matches!(error, TierError::Io { .. }), "{error:?}");
    }
}
