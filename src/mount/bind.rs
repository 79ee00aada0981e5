//! The system calls on mounts: bind and detach.

use std::{io, path::Path};

use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags, mount_bind, mount_remount, unmount},
};

use super::mountinfo::MountInfo;

/// What a target is mounted with, beside being a bind.
///
/// An image volume is another image's files, seen as data: its setuid bits and device nodes were
/// made for its own container, and must give nothing to the pod that mounts it. They stay visible
/// in modes, since the source shows the tree as it is. Executing is what image volumes are for.
fn target_flags() -> MountFlags {
    MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV
}

/// Binds `source` read-only at `target`.
///
/// mount(2) ignores all flags but `MS_BIND` at first, hence the two calls.
///
/// # Errors
/// Those of mount(2); then nothing is mounted.
pub(super) fn bind_read_only(source: &Path, target: &Path) -> io::Result<()> {
    mount_bind(source, target)?;
    let restricted = mount_remount(target, target_flags(), "");
    if let Err(err) = restricted {
        detach(target)?;
        return Err(err.into());
    }
    Ok(())
}

/// Detaches the topmost mount at `path`, busy or dead; none there is as good.
///
/// # Errors
/// Those of umount2(2).
pub(super) fn detach(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Not a mount point, or not there.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => Ok(()),
        Err(err) => Err(err.into()),
    }
}

/// Detaches all mounts that are stacked at `path`.
///
/// # Errors
/// Those of umount2(2), and of reading mountinfo.
pub(super) fn detach_all(path: &Path) -> io::Result<()> {
    let n_mounts = MountInfo::read()?.at(path).count();
    for _ in 0..n_mounts {
        detach(path)?;
    }
    Ok(())
}
