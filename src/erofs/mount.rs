//! Mounts metadata and layers.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, OFlags, fcntl_getfl, fstat, fstatfs},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
    },
};

/// File system type as mountinfo shows it.
pub const FS_TYPE: &str = "erofs";

/// The name of the file with the metadata, by which mountinfo shows a mount as the driver's.
pub const METADATA_NAME: &str = "clip-csi";

/// What statfs(2) says of overlayfs (linux/magic.h): what is laid over a mount of files there would be one
/// file system too many for the kernel.
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;

/// How much of what the kernel has to say of a failure is read at once.
const MESSAGE_BYTES: usize = 512;

/// A layer that is whole on disk.
#[derive(Debug)]
pub struct LayerFiles {
    /// Its bytes.
    pub data: OwnedFd,
    /// A file that whoever mounts the layer has the kernel keep open: `layer::whole` says what for.
    pub mounted: OwnedFd,
}

/// Mounts the file system with this metadata, as [`write`](fn@super::write) makes it, and these layers at
/// `dir`, read-only.
///
/// The files' names may go at once. Descriptors that come from somebody with fewer rights are checked to
/// be open for reading: the kernel opens what they name anew, with the rights of this process.
///
/// # Errors
/// `Unsupported` if this kernel has no such file system, or not for files that are where these are; those of
/// the system.
pub fn mount(metadata: &Path, layers: &[LayerFiles], dir: &Path) -> io::Result<()> {
    check_file(File::open(metadata)?.as_fd())?;
    for LayerFiles { data, mounted } in layers {
        check_file(data.as_fd())?;
        check_file(mounted.as_fd())?;
    }
    let fs = fsopen(FS_TYPE, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|err| match err {
        Errno::NODEV => unsupported("this kernel has no EROFS"),
        err => err.into(),
    })?;
    let made = configure(fs.as_fd(), metadata, layers).and_then(|()| fsconfig_create(fs.as_fd()));
    made.map_err(|err| match err {
        // Before Linux 6.12 only block devices are mounted.
        Errno::NOTBLK => unsupported("this kernel has no EROFS of files: Linux 6.12 has"),
        err => explained(err, fs.as_fd()),
    })?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let mount = fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let from_here = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(mount.as_fd(), "", CWD, dir, from_here)?)
}

fn configure(fs: BorrowedFd<'_>, metadata: &Path, layers: &[LayerFiles]) -> Result<(), Errno> {
    fsconfig_set_flag(fs, "ro")?;
    fsconfig_set_string(fs, "source", metadata)?;
    for LayerFiles { data, mounted } in layers {
        for file in [data, mounted] {
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            fsconfig_set_string(fs, "device", path)?;
        }
    }
    Ok(())
}

/// Checks that a descriptor is one of a file that whoever opened it may read, on a file system that can be
/// below this one.
///
/// # Errors
/// `EBADF` if it is of something else, `Unsupported` on overlayfs; those of the system.
pub fn check_file(file: BorrowedFd<'_>) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    let is_regular = FileType::from_raw_mode(fstat(file)?.st_mode) == FileType::RegularFile;
    if !is_regular || flags.contains(OFlags::PATH) || flags.contains(OFlags::WRONLY) {
        return Err(Errno::BADF.into());
    }
    match u64::try_from(fstatfs(file)?.f_type) {
        Ok(OVERLAYFS_MAGIC) => Err(unsupported("its files are on overlayfs")),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// An error with what the kernel says of it.
fn explained(err: Errno, fs: BorrowedFd<'_>) -> io::Error {
    let mut message = [0; MESSAGE_BYTES];
    let err = io::Error::from(err);
    match rustix::io::read(fs, &mut message) {
        Ok(len) => {
            let text = String::from_utf8_lossy(&message[..len]);
            io::Error::new(err.kind(), format!("{err}: {}", text.trim()))
        }
        Err(_) => err,
    }
}

fn unsupported(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, reason)
}

impl LayerFiles {
    /// Size of the layer, as its file has it.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn layer_bytes(&self) -> io::Result<u64> {
        Ok(u64::try_from(fstat(&self.data)?.st_size).unwrap_or(0))
    }
}
