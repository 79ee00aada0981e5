//! Lays a layer that can be written over an image: overlayfs, whose upper layer is a tmpfs of bounded size.
//!
//! The tmpfs is mounted in a directory of the driver's for a moment only: overlayfs keeps what it was given
//! (`clone_private_mount`, fs/overlayfs/super.c), so that the name can go at once. From then on the written
//! layer is part of the mount at the target: it lives as long as that is mounted, whatever becomes of this
//! process, and ends with it. What is written is memory, and accounted to the pod that writes.

use std::{fs, io, path::Path};

use rustix::{
    fs::{
        AtFlags, Gid, Mode, Timespec, Timestamps, Uid, chmodat, chownat, fstat, mkdirat, utimensat,
    },
    mount::{MountFlags, mount},
};
use tracing::warn;

use super::{
    MountEntry, MountInfo, SOURCE_NAME, bind,
    target::remove,
    view::{open_own, path_of},
};
use crate::failpoint;

/// Names in the tmpfs: what overlayfs wants.
const UPPER: &str = "upper";
const WORK: &str = "work";

/// Bytes of a written layer for each inode that it may have: as ext4 has it, `inode_ratio` of mke2fs.conf.
const BYTES_PER_INODE: u64 = 16 << 10;

/// Inodes that every written layer may have.
const MIN_INODES: u64 = 1024;

/// Mounts the directory `lower`, with a layer of at most `bytes` above it, at `target`. `staging` is a
/// directory that does not exist, and does not afterwards.
///
/// # Errors
/// Those of the system; then nothing is mounted.
pub(super) fn mount_over(
    lower: &std::os::fd::OwnedFd,
    bytes: u64,
    staging: &Path,
    target: &Path,
) -> io::Result<()> {
    fs::create_dir(staging)?;
    let mounted = stage(lower, bytes, staging, target);
    // Also after success: see above.
    let cleared = clear(staging);
    match (mounted, cleared) {
        (Ok(()), Err(err)) => {
            bind::detach(target)?;
            Err(err)
        }
        (outcome, _) => outcome,
    }
}

fn stage(
    lower: &std::os::fd::OwnedFd,
    bytes: u64,
    staging: &Path,
    target: &Path,
) -> io::Result<()> {
    let nothing_special = MountFlags::NOSUID | MountFlags::NODEV;
    let n_inodes = (bytes / BYTES_PER_INODE).max(MIN_INODES);
    let size = format!("size={bytes},nr_inodes={n_inodes},mode=0700");
    let size = std::ffi::CString::new(size)?;
    mount(
        SOURCE_NAME,
        staging,
        "tmpfs",
        nothing_special,
        size.as_c_str(),
    )?;
    failpoint::reached("publish:staged");
    let tmpfs = open_own(staging)?;
    mkdirat(&tmpfs, UPPER, Mode::RWXU)?;
    mkdirat(&tmpfs, WORK, Mode::RWXU)?;
    // The root of an overlay is its upper layer's.
    let root = fstat(lower)?;
    let (uid, gid) = (Uid::from_raw(root.st_uid), Gid::from_raw(root.st_gid));
    chownat(
        &tmpfs,
        UPPER,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    chmodat(
        &tmpfs,
        UPPER,
        Mode::from_raw_mode(root.st_mode),
        AtFlags::empty(),
    )?;
    let times = Timestamps {
        last_access: time(root.st_atime, root.st_atime_nsec),
        last_modification: time(root.st_mtime, root.st_mtime_nsec),
    };
    utimensat(&tmpfs, UPPER, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    // By descriptor: a path could have a character that overlayfs takes for its own.
    let (upper, lower) = (path_of(&tmpfs), path_of(lower));
    let options = format!(
        "lowerdir={},upperdir={upper}/{UPPER},workdir={upper}/{WORK},index=off,metacopy=off,redirect_dir=on",
        lower.display(),
        upper = upper.display(),
    );
    let options = std::ffi::CString::new(options)?;
    mount(
        SOURCE_NAME,
        target,
        "overlay",
        nothing_special,
        options.as_c_str(),
    )?;
    Ok(())
}

fn time(seconds: i64, nanoseconds: u64) -> Timespec {
    Timespec {
        tv_sec: seconds,
        // Below a thousand million.
        tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
    }
}

/// Whether a mount is one that [`mount_over`] made.
pub(super) fn is_writable(entry: &MountEntry) -> bool {
    entry.source == SOURCE_NAME && entry.fs_type == "overlay"
}

/// Detaches what is mounted at `staging`, and removes the directory.
fn clear(staging: &Path) -> io::Result<()> {
    bind::detach_all(staging)?;
    remove(staging)
}

/// Clears what a process left in `dir` that ended while it mounted.
///
/// # Errors
/// Those of reading mountinfo and `dir`. What cannot be cleared is logged: it is in nobody's way.
pub(super) fn clear_stale(dir: &Path) -> io::Result<()> {
    for entry in MountInfo::read()?.below(dir).rev() {
        if let Err(err) = bind::detach(&entry.mount_point) {
            warn!(path = %entry.mount_point.display(), error = %err, "unfinished writable layer stays");
        }
    }
    for entry in fs::read_dir(dir)? {
        let staging = entry?.path();
        if let Err(err) = remove(&staging) {
            warn!(path = %staging.display(), error = %err, "unfinished writable layer stays");
        }
    }
    Ok(())
}
