//! `clip-csi own`: gives directories on the node to the user that the agent and the server run as.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
    process::ExitCode,
};

use anyhow::Context;
use rustix::fs::{AtFlags, CWD, Gid, Uid, chownat};

use crate::cli::OwnArgs;

/// Makes the directories if need be, and gives them and all below them to the user.
pub(super) fn run(args: &OwnArgs) -> anyhow::Result<ExitCode> {
    for dir in &args.dirs {
        let make = || -> io::Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
            // Made by somebody else, it may be open to all.
            fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
            give(dir, args.uid, args.gid)
        };
        make().with_context(|| format!("directory {}", dir.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Links are not followed.
fn give(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    let mut left = vec![path.to_owned()];
    while let Some(path) = left.pop() {
        match chownat(CWD, &path, uid, gid, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(()) => {}
            // A file of the cache may go at any time.
            Err(rustix::io::Errno::NOENT) => continue,
            Err(err) => return Err(err.into()),
        }
        if fs::symlink_metadata(&path).is_ok_and(|it| it.is_dir()) {
            for entry in fs::read_dir(&path)? {
                left.push(entry?.path());
            }
        }
    }
    Ok(())
}
