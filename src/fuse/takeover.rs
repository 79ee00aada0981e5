//! Goes on with a FUSE connection that another process began.
//!
//! A connection lives as long as any process has its device open, and is initialised once. fuser
//! insists on reading the kernel's INIT request, so it is given one over a socket pair, made of what
//! the kernel offered when the connection began; then the device takes the socket's place under the
//! session's descriptor number.
//!
//! Requests that the former process had read and not answered stay with the kernel. It sends them
//! again when it is asked to (`FUSE_NOTIFY_RESEND`, Linux 6.9): once nobody can answer them any more,
//! because the former process is dead.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use fuser::{Filesystem, Session, SessionACL};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use serde::{Deserialize, Serialize};

use crate::sys;

/// What the kernel offered in INIT (fuse.h, `struct fuse_init_in`); the same for every connection
/// of one boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelOffer {
    /// Minor number of the protocol.
    pub minor: u32,
    /// What the kernel can do: `flags`, and `flags2` above them.
    pub flags: u64,
}

/// Opcode of INIT (fuse.h).
const FUSE_INIT: u32 = 26;

/// Code of the notification that asks for requests again (fuse.h).
const FUSE_NOTIFY_RESEND: u32 = 7;

/// Bytes of `struct fuse_in_header` and `struct fuse_init_in`.
const INIT_BYTES: u32 = 40 + 64;

/// Whether the kernel has ended the connection: it was unmounted or aborted (`fuse_dev_poll`).
///
/// It has before the number of the file system is free for another one.
pub fn has_ended(device: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(device, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let polled = poll(&mut fds, Some(&now));
    polled.is_ok() && fds[0].revents().contains(PollFlags::ERR)
}

/// Makes a session of the connection `device`, without a word to the kernel.
///
/// # Errors
/// Those of the system, and of fuser.
pub(super) fn resume<F: Filesystem>(
    fs: F,
    device: &OwnedFd,
    offer: KernelOffer,
    config: fuser::Config,
) -> io::Result<Session<F>> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::io::write(&ours, &init_request(offer))?;
    let session = Session::from_fd(fs, theirs, SessionACL::All, config)?;
    sys::replace_descriptor(session.as_fd(), device.as_fd())?;
    Ok(session)
}

/// Asks the kernel to send again what was read by a process that is dead.
///
/// # Errors
/// `InvalidInput` from a kernel before 6.9, which cannot: readers of those requests wait until the
/// connection is aborted.
pub fn resend(device: impl AsFd) -> io::Result<()> {
    // `struct fuse_out_header`: length, code, and no request that is answered.
    let mut message = [0; 16];
    message[..4].copy_from_slice(&16u32.to_ne_bytes());
    message[4..8].copy_from_slice(&FUSE_NOTIFY_RESEND.to_ne_bytes());
    rustix::io::write(device, &message)?;
    Ok(())
}

/// An INIT request as the kernel writes it (fuse.h).
fn init_request(offer: KernelOffer) -> Vec<u8> {
    const MAX_READAHEAD_BYTES: u32 = 128 << 10;
    /// Of no other request: the kernel counts by two from 2, and this goes to nobody.
    const UNIQUE: u64 = 2;
    let low = |flags: u64| u32::try_from(flags & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    let mut request = Vec::new();
    let mut put = |word: u32| request.extend_from_slice(&word.to_ne_bytes());
    put(INIT_BYTES);
    put(FUSE_INIT);
    for half in UNIQUE.to_ne_bytes().chunks_exact(4) {
        put(u32::from_ne_bytes([half[0], half[1], half[2], half[3]]));
    }
    // The root's inode number, caller, and lengths of extensions: nobody looks.
    for _ in 0..6 {
        put(0);
    }
    for word in [
        7,
        offer.minor,
        MAX_READAHEAD_BYTES,
        low(offer.flags),
        low(offer.flags >> 32),
    ] {
        put(word);
    }
    request.resize(usize::try_from(INIT_BYTES).unwrap_or(0), 0);
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_has_the_kernels_layout() {
        let request = init_request(KernelOffer {
            minor: 45,
            flags: 0x1122_3344_5566_7788,
        });
        assert_eq!(request.len(), 104);
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        assert_eq!([word(0), word(4)], [104, FUSE_INIT]);
        let init = [word(40), word(44), word(48), word(52), word(56)];
        assert_eq!(init, [7, 45, 128 << 10, 0x5566_7788, 0x1122_3344]);
    }
}
