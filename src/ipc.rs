//! Messages between the roles of a node: JSON over private Unix sockets, with a file descriptor
//! where one is handed over.
//!
//! Sockets are of type `SOCK_SEQPACKET`: a message is sent whole or not at all, from any thread. A
//! peer is root, this user, or the owner of the socket's directory: nobody else is
//! answered. All calls block, because one role has no event loop; those that have one run them on
//! threads of their own.

use std::{
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{FileTypeExt, MetadataExt, chown},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{Mode, fchmod},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
        accept_with, bind, connect, listen, recv, recvmsg, sendmsg, shutdown, socket_with, sockopt,
    },
};
use serde::{Serialize, de::DeserializeOwned};

use crate::sys;

/// Longest message. The largest has a pull secret in it; the kernel's send buffer is 208 KiB.
const MAX_MESSAGE_BYTES: usize = 128 << 10;

/// How long a peer may take to make room for a message. Only one that hangs takes any time.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Where the roles of one node meet: a directory that belongs to the agent's and the server's user.
#[derive(Debug, Clone)]
pub struct RunDir(PathBuf);

impl RunDir {
    /// Names the places in `dir`; touches nothing.
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// Where the agent listens.
    pub fn agent(&self) -> PathBuf {
        self.0.join("agent.sock")
    }

    /// Where the server listens.
    pub fn serve(&self) -> PathBuf {
        self.0.join("serve.sock")
    }

    /// Where the node service says how it is.
    pub fn node(&self) -> PathBuf {
        self.0.join("node.sock")
    }

    /// Locked by the server for as long as its process lives.
    pub fn serve_lock(&self) -> PathBuf {
        self.0.join("serve.lock")
    }
}

/// A socket that listens; its file goes with it, unless another one has taken its place.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Of the directory.
    owner: u32,
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`, with mode 0600 and for the owner of the directory, and replaces the socket
    /// that is there.
    ///
    /// It appears at once and listening: it is bound under a name of its own and renamed.
    ///
    /// # Errors
    /// `AlreadyExists` if there is something else than a socket, or those of bind(2).
    pub fn bind(path: &Path) -> io::Result<Self> {
        if fs::symlink_metadata(path).is_ok_and(|it| !it.file_type().is_socket()) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is not a socket: remove it", path.display()),
            ));
        }
        let owner = owner_of_dir(path)?;
        let hidden = path.with_extension(std::process::id().to_string());
        let in_path = |err: Errno| {
            let err = io::Error::from(err);
            io::Error::new(err.kind(), format!("socket {}: {err}", path.display()))
        };
        let socket = open_socket().map_err(in_path)?;
        // Before the bind: Linux gives the file the mode of the socket's inode.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(in_path)?;
        // Left by a process with the same number.
        let _ = fs::remove_file(&hidden);
        bind(&socket, &SocketAddrUnix::new(&hidden).map_err(in_path)?).map_err(in_path)?;
        listen(&socket, BACKLOG).map_err(in_path)?;
        let found = fs::symlink_metadata(&hidden)?;
        if found.uid() != owner && rustix::process::geteuid().is_root() {
            chown(&hidden, Some(owner), None)?;
        }
        fs::rename(&hidden, path)?;
        Ok(Self {
            socket,
            path: path.to_owned(),
            owner,
            identity: (found.dev(), found.ino()),
        })
    }

    /// Waits for a connection of somebody who may have one; others are closed unanswered.
    ///
    /// # Errors
    /// Those of accept(2).
    pub fn accept(&self) -> io::Result<Channel> {
        loop {
            let channel = match accept_with(&self.socket, SocketFlags::CLOEXEC) {
                Ok(socket) => Channel::new(socket)?,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(err) => return Err(err.into()),
            };
            let uid = channel.peer_uid()?;
            if may_talk(uid, self.owner) {
                return Ok(channel);
            }
            tracing::warn!(path = %self.path.display(), uid, "refused a connection of another user");
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let there = fs::symlink_metadata(&self.path);
        if there.is_ok_and(|it| (it.dev(), it.ino()) == self.identity) {
            // One that stays is replaced by the next process.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A connection to another role.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// A message, and what came with it.
pub type Received<T> = (T, Option<OwnedFd>);

impl Channel {
    fn new(socket: OwnedFd) -> io::Result<Self> {
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(SEND_TIMEOUT))?;
        Ok(Self(socket))
    }

    /// Connects to who listens at `path`.
    ///
    /// # Errors
    /// `PermissionDenied` if that is somebody who must not, or those of connect(2).
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = open_socket()?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        let channel = Self::new(socket)?;
        let uid = channel.peer_uid()?;
        if may_talk(uid, owner_of_dir(path)?) {
            return Ok(channel);
        }
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "{} is served by user {uid}, who does not own its directory",
                path.display()
            ),
        ))
    }

    /// Bounds how long [`Channel::receive`] waits; `None` is for ever.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn set_receive_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(
            &self.0,
            sockopt::Timeout::Recv,
            timeout,
        )?)
    }

    /// Sends a message, with `fd` if one is given.
    ///
    /// # Errors
    /// `ArgumentListTooLong` if it is too long, or those of sendmsg(2): the peer is gone, or hangs.
    pub fn send(&self, message: &impl Serialize, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if MAX_MESSAGE_BYTES < bytes.len() {
            return Err(io::Error::new(
                io::ErrorKind::ArgumentListTooLong,
                format!(
                    "a message of {} bytes is too long: {MAX_MESSAGE_BYTES} is the limit; is the pull secret that large?",
                    bytes.len()
                ),
            ));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.as_slice();
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let part = [io::IoSlice::new(&bytes)];
        loop {
            match sendmsg(&self.0, &part, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// Waits for a message; `None` if the peer has closed the connection.
    ///
    /// # Errors
    /// `InvalidData` if it is none that is expected, `WouldBlock` after the timeout, or those of
    /// recvmsg(2).
    pub fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<Received<T>>> {
        let len = loop {
            let flags = RecvFlags::PEEK | RecvFlags::TRUNC;
            match recv(&self.0, &mut [0u8; 0][..], flags) {
                Ok((_, len)) => break len,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(err) => return Err(err.into()),
            }
        };
        if MAX_MESSAGE_BYTES < len {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a message is too long",
            ));
        }
        let mut bytes = vec![0; len];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut part = [io::IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.0, &mut part, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(None),
                Err(err) => return Err(err.into()),
            }
        };
        let mut fd = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fds.last();
            }
        }
        // There are no empty messages.
        if received.bytes == 0 {
            return Ok(None);
        }
        Ok(Some((
            serde_json::from_slice(&bytes[..received.bytes])?,
            fd,
        )))
    }

    /// Ends the connection for both sides, also for a thread that waits in [`Channel::receive`].
    pub fn close(&self) {
        // It fails if the peer was faster.
        let _ = shutdown(&self.0, Shutdown::Both);
    }

    fn peer_uid(&self) -> io::Result<u32> {
        sys::peer_uid(self.0.as_fd())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Root, this user, or the owner of the directory in which the roles meet.
fn may_talk(uid: u32, owner: u32) -> bool {
    uid == 0 || uid == owner || uid == rustix::process::geteuid().as_raw()
}

/// Who owns the directory in which the roles meet: whoever may put sockets there is believed.
///
/// # Errors
/// `PermissionDenied` if that is somebody else, or others may write there too.
pub fn owner_of_dir(socket: &Path) -> io::Result<u32> {
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    let directory = socket.parent().unwrap_or(Path::new("."));
    let found = fs::metadata(directory)?;
    let (owner, own) = (found.uid(), rustix::process::geteuid());
    if found.mode() & WRITABLE_BY_OTHERS != 0 || !(own.is_root() || may_talk(owner, 0)) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!(
                "directory {} of user {owner} is not for sockets of user {}: give it to that user alone (clip-csi own)",
                directory.display(),
                own.as_raw(),
            ),
        ));
    }
    Ok(owner)
}

fn open_socket() -> rustix::io::Result<OwnedFd> {
    socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _, os::fd::AsFd as _, thread};

    use super::*;
    use crate::disk;

    #[test]
    fn messages_and_descriptors_arrive_and_the_end_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        let listener = Listener::bind(&path).unwrap();
        disk::publish(&dir.path().join("file"), b"content").unwrap();
        let file = File::open(dir.path().join("file")).unwrap();
        let sender = thread::spawn({
            let path = path.clone();
            move || {
                let channel = Channel::connect(&path).unwrap();
                channel.send(&"first", None).unwrap();
                channel.send(&"second", Some(file.as_fd())).unwrap();
                let long = channel.send(&"x".repeat(MAX_MESSAGE_BYTES), None);
                assert_eq!(long.unwrap_err().kind(), io::ErrorKind::ArgumentListTooLong);
            }
        });
        let channel = listener.accept().unwrap();
        let (text, fd) = channel.receive::<String>().unwrap().unwrap();
        assert_eq!(text, "first");
        assert!(fd.is_none());
        let (text, fd) = channel.receive::<String>().unwrap().unwrap();
        assert_eq!(text, "second");
        let mut content = String::new();
        File::from(fd.unwrap())
            .read_to_string(&mut content)
            .unwrap();
        assert_eq!(content, "content");
        sender.join().unwrap();
        assert!(channel.receive::<String>().unwrap().is_none());
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_wait_is_bounded_and_a_stranger_message_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&dir.path().join("x.sock")).unwrap();
        let client = Channel::connect(&dir.path().join("x.sock")).unwrap();
        let server = listener.accept().unwrap();
        let timeout = Some(Duration::from_millis(10));
        server.set_receive_timeout(timeout).unwrap();
        let err = server.receive::<u32>().unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::WouldBlock);
        client.send(&"text", None).unwrap();
        let err = server.receive::<u32>().unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_second_listener_replaces_the_first_one_and_stays_when_that_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        let first = Listener::bind(&path).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        let client = Channel::connect(&path).unwrap();
        client.send(&1, None).unwrap();
        let server = second.accept().unwrap();
        assert_eq!(server.receive::<u32>().unwrap().unwrap().0, 1);
        drop(second);
        File::create(&path).unwrap();
        let err = Listener::bind(&path).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::AlreadyExists);
    }
}
