//! Makes a mount, runs its session, and takes it down.
//!
//! A mount is never looked at with stat(2) or the like, which would ask the very server that may be
//! slow or dead: `/proc/self/mountinfo` says all there is to know.

use std::{
    ffi::{CString, OsStr},
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use fuser::{Session, SessionACL};
use rustix::mount::{MountFlags, UnmountFlags};
use tracing::{debug, info, warn};

use super::{
    Served,
    adapter::Adapter,
    pool::ReadPool,
    takeover::{self, KernelOffer},
};
use crate::{
    fs::{ClipFs, ServedBytes},
    tier::MakePresent,
};

/// File system type as mountinfo shows it.
pub const FS_TYPE: &str = "fuse.clip";

/// How long [`FuseMount::unmount`] waits for the last user of the mount.
///
/// Kubernetes unmounts after the containers are gone, so that there is usually nothing to wait for;
/// a session that ends does so within milliseconds.
const UNMOUNT_DEADLINE: Duration = Duration::from_secs(2);

/// Stack of the thread that only waits for fuser's threads.
const STACK_BYTES: usize = 128 << 10;

/// How an image is mounted.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// What mountinfo shows as the source: the image's reference or digest.
    pub fs_name: String,
    /// FUSE threads. One is enough: it never waits for disk or network.
    pub n_threads: usize,
    /// How far the kernel reads ahead. 256 KiB suits images of many files; 512 large files read
    /// from end to end; more makes random access slow.
    pub read_ahead_kib: u32,
}

impl MountOptions {
    /// Options as they suit nearly all images.
    pub fn new(fs_name: impl Into<String>) -> Self {
        Self {
            fs_name: fs_name.into(),
            n_threads: 1,
            read_ahead_kib: 256,
        }
    }
}

/// Says why an image could not be mounted, or why its session ended.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// The directory cannot be mounted on.
    #[error("mount point {dir}")]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel has no FUSE, or this process may not use it.
    #[error("opening /dev/fuse: is the kernel module fuse loaded, and the container privileged?")]
    Device {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// mount(2) failed.
    #[error("mounting on {dir}")]
    Mount {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The session could not be started, or broke.
    #[error("FUSE session of {dir}")]
    Session {
        /// The directory.
        dir: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// What became of a mount that was taken down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// Nobody used it any more, and its session has ended.
    Ended,
    /// It has no name any more, but is bound elsewhere or has open files: it is served until the
    /// last user is gone.
    InUse,
}

/// A FUSE connection that this process serves, wherever it is mounted. Dropping it changes nothing:
/// it is served until the kernel says that it has ended.
#[derive(Debug)]
pub struct FuseSession {
    offer: KernelOffer,
    end: Arc<End>,
    thread: JoinHandle<()>,
}

/// A mounted image. Dropping it unmounts.
#[derive(Debug)]
pub struct FuseMount {
    dir: PathBuf,
    device: (u32, u32),
    end: Arc<End>,
    thread: Option<JoinHandle<()>>,
}

/// How a session ended, once it has.
#[derive(Debug, Default)]
struct End {
    /// std Mutex: held to look and to store.
    result: Mutex<Option<io::Result<()>>>,
    reached: Condvar,
}

/// Mounts `fs` on `dir` and serves it until it is unmounted.
///
/// # Errors
/// [`FuseError`]; nothing is left behind then.
pub fn mount<I: ServedBytes>(
    fs: Arc<ClipFs<I>>,
    provider: Arc<dyn MakePresent>,
    pool: Arc<ReadPool>,
    dir: &Path,
    options: &MountOptions,
) -> Result<FuseMount, FuseError> {
    let (dir, fuse, device) = make_mount(dir, &options.fs_name)?;
    let nothing = Box::new(|| {});
    let session = serve(fs, provider, pool, fuse, None, options.n_threads, nothing);
    let session = session.map_err(|source| {
        detach(&dir);
        FuseError::Session {
            dir: dir.clone(),
            source,
        }
    })?;
    set_read_ahead(device, options.read_ahead_kib);
    info!(dir = %dir.display(), image = options.fs_name, device.minor = device.1, "mounted");
    Ok(FuseMount {
        dir,
        device,
        end: session.end,
        thread: Some(session.thread),
    })
}

/// Mounts a connection on `dir` that nobody serves yet. Returns the directory as mountinfo has it,
/// the connection and its device number.
///
/// # Errors
/// [`FuseError`]; nothing is left behind then.
pub fn make_mount(dir: &Path, fs_name: &str) -> Result<(PathBuf, OwnedFd, (u32, u32)), FuseError> {
    let dir = dir.canonicalize().map_err(|source| FuseError::Directory {
        dir: dir.to_owned(),
        source,
    })?;
    let fuse = File::options().read(true).write(true).open("/dev/fuse");
    let fuse = OwnedFd::from(fuse.map_err(|source| FuseError::Device { source })?);
    let failed = |source| FuseError::Mount {
        dir: dir.clone(),
        source,
    };
    call_mount(&fuse, &dir, fs_name).map_err(failed)?;
    let found = std::fs::read("/proc/self/mountinfo").and_then(|mounts| {
        device_of(&mounts, &dir)
            .ok_or_else(|| io::Error::other("the new mount is not in /proc/self/mountinfo"))
    });
    match found {
        Ok(device) => Ok((dir, fuse, device)),
        Err(source) => {
            detach(&dir);
            Err(failed(source))
        }
    }
}

/// Calls mount(2), which answers before anybody serves.
fn call_mount(fuse: &OwnedFd, dir: &Path, fs_name: &str) -> io::Result<()> {
    // The root is a directory until getattr says what else it is.
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions,allow_other",
        fuse.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    );
    let flags = MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID;
    // The source is an argument of its own: its commas mean nothing.
    rustix::mount::mount(fs_name, dir, FS_TYPE, flags, &*CString::new(data)?)?;
    Ok(())
}

/// Serves `fs` on the connection `fuse` until it ends.
///
/// A new connection begins with the kernel's offer; one that another process began goes on with
/// what was offered then, and [`resend`](super::takeover::resend) is to follow. `on_end` is called
/// when it has ended, by its thread.
///
/// # Errors
/// Those of the system, and of fuser.
pub fn serve<I: ServedBytes>(
    fs: Arc<ClipFs<I>>,
    provider: Arc<dyn MakePresent>,
    pool: Arc<ReadPool>,
    fuse: OwnedFd,
    offer: Option<KernelOffer>,
    n_threads: usize,
    on_end: Box<dyn FnOnce() + Send>,
) -> io::Result<FuseSession> {
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(n_threads.max(1));
    config.clone_fd = false;
    let offered = Arc::new(OnceLock::new());
    let adapter = Adapter::new(Arc::new(Served::new(fs, provider, pool)), offered.clone());
    let session = match offer {
        Some(offer) => takeover::resume(adapter, &fuse, offer, config)?,
        None => Session::from_fd(adapter, fuse, SessionACL::All, config)?,
    };
    let offer = *offered
        .get()
        .ok_or_else(|| io::Error::other("fuser did not initialise the session"))?;
    let end = Arc::new(End::default());
    let reached = end.clone();
    let thread = thread::Builder::new()
        .name("clip-fuse".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            reached.set(clean(session.run()));
            on_end();
        })?;
    Ok(FuseSession { offer, end, thread })
}

impl FuseSession {
    /// What the kernel offered when the connection began.
    pub fn offer(&self) -> KernelOffer {
        self.offer
    }

    /// Whether the kernel has ended it: it was unmounted or aborted.
    pub fn has_ended(&self) -> bool {
        self.end.is_reached()
    }
}

/// Sets how far the kernel reads ahead in this mount; without it, 128 KiB.
///
/// Has an effect once the connection is served, because the kernel takes the least of what it and
/// the server say then.
pub fn set_read_ahead((major, minor): (u32, u32), kib: u32) {
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    let written = File::options()
        .write(true)
        .open(&path)
        .and_then(|mut file| {
            use io::Write as _;
            file.write_all(kib.to_string().as_bytes())
        });
    if let Err(error) = written {
        debug!(path, %error, "readahead stays at the kernel's default");
    }
}

/// Takes an unmount and an abort of the connection for what they are: a clean end.
fn clean(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::ECONNABORTED | libc::ENOTCONN)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

/// Takes a mount out of the tree; who uses it may go on. Not being mounted is no error.
fn detach(dir: &Path) {
    match rustix::mount::unmount(dir, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
        Err(error) => warn!(dir = %dir.display(), %error, "cannot unmount"),
    }
}

impl End {
    fn set(&self, end: io::Result<()>) {
        *self.result.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
        self.reached.notify_all();
    }

    fn is_reached(&self) -> bool {
        let result = self.result.lock();
        result.unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits until the session has ended or the deadline has passed; says whether it has ended.
    fn wait_until(&self, deadline: Instant) -> bool {
        let mut result = self.result.lock().unwrap_or_else(PoisonError::into_inner);
        while result.is_none() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            let woken = self.reached.wait_timeout(result, left);
            result = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl FuseMount {
    /// Where it is mounted.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Device number, by which mountinfo names this mount and the binds of it.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    /// Whether nobody serves it any more: it was unmounted or aborted, or its session broke.
    pub fn has_ended(&self) -> bool {
        self.end.is_reached()
    }

    /// Waits until the session ends: when somebody unmounts it, or it breaks.
    ///
    /// # Errors
    /// [`FuseError::Session`] if it broke. Said once; asked again, it is `Ok`.
    ///
    /// # Blocking
    /// Without a deadline: for a process that does nothing but serve.
    pub fn wait(&self) -> Result<(), FuseError> {
        let lock = self.end.result.lock();
        let mut result = lock.unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(end) = result.as_mut() {
                return std::mem::replace(end, Ok(())).map_err(|source| FuseError::Session {
                    dir: self.dir.clone(),
                    source,
                });
            }
            let woken = self.end.reached.wait(result);
            result = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Unmounts, and waits up to two seconds for the session to end.
    pub fn unmount(mut self) -> Unmounted {
        self.take_down()
    }

    fn take_down(&mut self) -> Unmounted {
        let Some(thread) = self.thread.take() else {
            return Unmounted::Ended;
        };
        // Somebody else may have unmounted it and mounted something else there, which can have the
        // same device number, but only after this session has ended.
        let mounts = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        let is_there = device_of(&mounts, &self.dir) == Some(self.device);
        if is_there && !self.end.wait_until(Instant::now()) {
            detach(&self.dir);
        }
        if self.end.wait_until(Instant::now() + UNMOUNT_DEADLINE) {
            // It has stored its result: only its return is left, and it cannot panic there.
            let _ = thread.join();
            info!(dir = %self.dir.display(), "unmounted");
            Unmounted::Ended
        } else {
            // The thread ends with the last user; nothing waits for it, and the process may exit.
            info!(dir = %self.dir.display(), "unmounted, but still in use elsewhere");
            Unmounted::InUse
        }
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        self.take_down();
    }
}

/// Finds the device number of the topmost mount on `dir` (proc(5), `/proc/pid/mountinfo`).
fn device_of(mountinfo: &[u8], dir: &Path) -> Option<(u32, u32)> {
    let lines = mountinfo.split(|it| *it == b'\n').rev();
    lines
        .filter_map(|line| {
            let mut fields = line.split(|it| *it == b' ');
            let device = std::str::from_utf8(fields.nth(2)?).ok()?;
            let mount_point = unescape(fields.nth(1)?);
            if Path::new(OsStr::from_bytes(&mount_point)) != dir {
                return None;
            }
            let (major, minor) = device.split_once(':')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        })
        .next()
}

/// Resolves the `\ooo` that mountinfo writes for blanks, line ends and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let octal = behind.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|it| std::str::from_utf8(it).ok());
        match octal.and_then(|it| u8::from_str_radix(it, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = &behind[3..];
            }
            None => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_topmost_mount_is_found() {
        let mountinfo = b"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
            30 21 0:50 / /a\\040b\\134c rw - fuse.clip x ro\n\
            31 21 0:51 / /a rw - fuse.clip x ro\n\
            32 31 0:52 / /a rw - fuse.clip x ro\n";
        for (dir, expected) in [
            ("/", Some((8, 1))),
            ("/a b\\c", Some((0, 50))),
            ("/a", Some((0, 52))),
            ("/b", None),
        ] {
            assert_eq!(device_of(mountinfo, Path::new(dir)), expected, "{dir}");
        }
        assert_eq!(device_of(b"\n1\n1 2 3\n", Path::new("/")), None);
    }

    #[test]
    fn escapes_are_resolved_and_others_kept() {
        for (text, expected) in [("a", "a"), ("\\011", "\t"), ("\\9", "\\9"), ("\\", "\\")] {
            assert_eq!(unescape(text.as_bytes()), expected.as_bytes());
        }
    }

    #[test]
    fn an_abort_is_a_clean_end() {
        for code in [libc::ENODEV, libc::ECONNABORTED] {
            assert!(clean(Err(io::Error::from_raw_os_error(code))).is_ok());
        }
        assert!(clean(Err(io::Error::from_raw_os_error(libc::EIO))).is_err());
        assert!(clean(Err(io::Error::other("panicked"))).is_err());
    }
}
