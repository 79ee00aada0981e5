//! Converts attributes to what fuser sends.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, INodeNo};

use crate::{
    fs::Attributes,
    index::image::{FileType, Ino},
};

/// An inode number as the kernel knows it.
pub(super) fn ino(ino: INodeNo) -> Ino {
    Ino(ino.0)
}

/// Attributes as fuser sends them.
pub(super) fn file_attr(attributes: &Attributes) -> FileAttr {
    let mtime = time(attributes.mtime_seconds, attributes.mtime_nanoseconds);
    FileAttr {
        ino: INodeNo(attributes.ino.0),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: mtime,
        mtime,
        ctime: mtime,
        crtime: mtime,
        kind: file_type(attributes.file_type),
        perm: attributes.permissions,
        nlink: attributes.n_links,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: device_number(attributes.device),
        blksize: attributes.block_bytes,
        flags: 0,
    }
}

/// What tells the kernel that a name does not exist, for as long as its entry is valid: inode 0
/// (fuse.h, `fuse_entry_out.nodeid`).
pub(super) const NO_ENTRY: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: UNIX_EPOCH,
    mtime: UNIX_EPOCH,
    ctime: UNIX_EPOCH,
    crtime: UNIX_EPOCH,
    kind: fuser::FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 0,
    flags: 0,
};

/// A file type as fuser sends it.
pub(super) fn file_type(file_type: FileType) -> fuser::FileType {
    match file_type {
        FileType::Directory => fuser::FileType::Directory,
        FileType::Regular => fuser::FileType::RegularFile,
        FileType::Symlink => fuser::FileType::Symlink,
        FileType::CharDevice => fuser::FileType::CharDevice,
        FileType::BlockDevice => fuser::FileType::BlockDevice,
        FileType::Fifo => fuser::FileType::NamedPipe,
    }
}

/// A device number in the 32 bits of the protocol (linux/kdev_t.h, `new_encode_dev`).
fn device_number((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

/// A time; one that does not fit becomes the epoch.
fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 {
        UNIX_EPOCH.checked_sub(whole)
    } else {
        UNIX_EPOCH.checked_add(whole)
    };
    base.and_then(|it| it.checked_add(Duration::from_nanos(u64::from(nanoseconds))))
        .unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_are_the_kernels() {
        // Compared with makedev(3), which agrees below 2^32.
        for (major, minor) in [(1, 3), (8, 255), (259, 256), (0xfff, 0xf_ffff), (0, 0)] {
            let expected = libc::makedev(major, minor);
            assert_eq!(u64::from(device_number((major, minor))), expected);
        }
    }

    #[test]
    fn times_of_every_size_are_taken() {
        let before = UNIX_EPOCH - Duration::new(1, 200_000_000);
        assert_eq!(time(-2, 800_000_000), before);
        assert_eq!(time(2, 5), UNIX_EPOCH + Duration::new(2, 5));
        for seconds in [i64::MIN, i64::MAX] {
            let _ = time(seconds, u32::MAX);
        }
    }
}
