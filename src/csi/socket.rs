//! Binds the driver's sockets so that only their owner can open them, and removes them in the end.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, fchmod};
use tokio::net::{UnixListener, UnixSocket};
use tracing::warn;

/// Connections that may wait to be accepted: kubelet and three sidecars make a few each.
const BACKLOG: u32 = 128;

/// A Unix socket that listens. Its file goes with it.
#[derive(Debug)]
pub struct PrivateSocket {
    listener: UnixListener,
    file: SocketFile,
}

impl PrivateSocket {
    /// Parts the listener from the file, which is removed when the latter is dropped.
    pub(super) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

/// Binds a Unix socket with mode 0600.
///
/// It appears at `path` at once and listening: it is bound under a hidden name beside it, and
/// renamed. Who watches the directory, as kubelet does, can connect as soon as it sees the file.
///
/// The mode is set before the bind: Linux creates the file with the mode of the socket's own inode
/// (net/unix/af_unix.c, `unix_bind_bsd`), so that at no moment another user can connect, whatever
/// the umask, which is the whole process's. A socket that nobody listens on, left by a former
/// process, is replaced.
///
/// # Errors
/// `AddrInUse` if somebody listens there, `AlreadyExists` if there is something else than a
/// socket, or those of bind(2).
///
/// # Panics
/// Outside a tokio runtime.
pub fn bind_private(path: &Path) -> io::Result<PrivateSocket> {
    check_free(path)?;
    let hidden = hidden_beside(path)?;
    // Left by a process that ended between bind and rename.
    if is_socket(&hidden)? {
        fs::remove_file(&hidden)?;
    }
    let socket = UnixSocket::new_stream()?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&hidden)?;
    let mut file = SocketFile::of(hidden)?;
    let listener = socket.listen(BACKLOG)?;
    fs::rename(&file.path, path)?;
    file.path = path.to_owned();
    Ok(PrivateSocket { listener, file })
}

/// Refuses a path where a living process listens, or where something else is.
fn check_free(path: &Path) -> io::Result<()> {
    if !is_socket(path)? {
        return match fs::symlink_metadata(path) {
            Ok(_) => Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is not a socket: remove it", path.display()),
            )),
            Err(_) => Ok(()),
        };
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!("another process serves {}: stop it", path.display()),
        )),
        Err(err) if err.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(err) => Err(err),
    }
}

fn is_socket(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(found) => Ok(found.file_type().is_socket()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(err) => Err(err),
    }
}

/// The name that kubelet ignores: it starts with a dot. One byte longer, as paths of sockets may
/// have 107 bytes only.
fn hidden_beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| {
        let reason = format!("{} names no file", path.display());
        io::Error::new(io::ErrorKind::InvalidInput, reason)
    })?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    Ok(path.with_file_name(hidden))
}

/// The file of a socket. Dropped, it is removed, unless another one has taken its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: PathBuf) -> io::Result<Self> {
        let identity = identity(&path)?;
        Ok(Self { path, identity })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = identity(&self.path).is_ok_and(|it| it == self.identity);
        if is_ours && let Err(err) = fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), error = %err, "socket stays");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::PermissionsExt, net::UnixListener as StdListener};

    use super::*;

    #[tokio::test]
    async fn the_socket_is_its_owners_only_and_goes_in_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        let first = bind_private(&path).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600, "{mode:o}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let err = bind_private(&path).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::AddrInUse);
        UnixStream::connect(&path).unwrap();
        first.listener.accept().await.unwrap();
        drop(first);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn stale_sockets_are_replaced_under_both_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        for stale in ["csi.sock", ".csi.sock"] {
            drop(StdListener::bind(dir.path().join(stale)).unwrap());
        }
        let socket = bind_private(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        socket.listener.accept().await.unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[tokio::test]
    async fn a_socket_that_took_the_place_of_another_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        let first = bind_private(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let second = bind_private(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        second.listener.accept().await.unwrap();
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("csi.sock");
        std::os::unix::fs::symlink("/none", &path).unwrap();
        let err = bind_private(&path).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::AlreadyExists);
        assert!(fs::symlink_metadata(&path).unwrap().is_symlink());
    }
}
