//! Says which errno each failure of the file system becomes.
//!
//! The kernel caches no error: after [`Errno::EIO`] the next read asks again.

use fuser::Errno;

use crate::fs::FsError;

/// What a reader sees.
pub(super) fn errno(error: &FsError) -> Errno {
    match error {
        FsError::NotFound => Errno::ENOENT,
        FsError::NotDir => Errno::ENOTDIR,
        FsError::IsDir => Errno::EISDIR,
        FsError::WrongType => Errno::EINVAL,
        FsError::NameTooLong => Errno::ENAMETOOLONG,
        FsError::ReadOnly => Errno::EROFS,
        FsError::NoAttr => Errno::ENODATA,
        FsError::Damaged { .. } | FsError::Io { .. } => Errno::EIO,
    }
}

/// Whether the error is a failure, to be logged and counted; otherwise it is the right answer.
pub(super) fn is_failure(error: &FsError) -> bool {
    match error {
        FsError::NotFound
        | FsError::NotDir
        | FsError::IsDir
        | FsError::WrongType
        | FsError::NameTooLong
        | FsError::ReadOnly
        | FsError::NoAttr => false,
        FsError::Damaged { .. } | FsError::Io { .. } => true,
    }
}
