//! Binds [`ClipFs`](crate::fs::ClipFs) to fuser: converts, decides nothing.
//!
//! What makes reads native-fast is what never gets here. The kernel keeps names, attributes,
//! directories, links and pages for as long as it likes, because nothing ever changes; it sends no
//! open, opendir, release or flush after the first was answered with ENOSYS (fuse.h,
//! `FUSE_NO_OPEN_SUPPORT`), which also means "keep the cache".
//!
//! Absent on purpose: forget, because inode numbers are positions in the index and hold nothing;
//! access, because the kernel checks permissions (`default_permissions`); everything that writes,
//! because the mount is read-only and the kernel answers EROFS itself. Interrupt: fuser answers
//! ENOSYS; a reader that is killed while its read is pending leaves at once all the same.

use std::{
    ffi::OsStr,
    io,
    os::unix::ffi::OsStrExt,
    sync::{Arc, OnceLock},
    time::Duration,
};

use fuser::{
    AccessFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};

use super::{
    Served,
    convert::{NO_ENTRY, file_attr, ino},
    counters::Op,
    errno::errno,
    read::PendingRead,
    takeover::KernelOffer,
};
use crate::fs::{ClipFs, FsError, ServedBytes};

/// How long the kernel may keep what it was told. Images do not change: for ever, in effect.
const TTL: Duration = Duration::from_secs(365 * 24 * 3600);

/// Inode numbers are never used again for another file.
const GENERATION: Generation = Generation(0);

/// Largest read: what the kernel grants at most by default (`fs.fuse.max_pages_limit`). fuser
/// derives it from the largest write.
const MAX_READ_BYTES: u32 = 1 << 20;

/// Readahead requests of a mount that may be under way; the kernel lets no further one pass, also for what is
/// on disk.
///
/// Four of each of 64 readers that wait for a layer whose registry does not answer: with 64, and two of each,
/// nobody else read anything in that mount until it did.
const MAX_BACKGROUND: u16 = 256;

/// What is asked of the kernel, as far as it can.
///
/// `EXPORT_SUPPORT`: lookups of `.` and `..` work, so that file handles do too. `ALLOW_IDMAP`: pods
/// with user namespaces map the owners of volumes; we never look at who asks.
const WANTED: InitFlags = InitFlags::FUSE_ASYNC_READ
    .union(InitFlags::FUSE_ASYNC_DIO)
    .union(InitFlags::FUSE_PARALLEL_DIROPS)
    .union(InitFlags::FUSE_DO_READDIRPLUS)
    .union(InitFlags::FUSE_CACHE_SYMLINKS)
    .union(InitFlags::FUSE_EXPLICIT_INVAL_DATA)
    .union(InitFlags::FUSE_NO_OPEN_SUPPORT)
    .union(InitFlags::FUSE_NO_OPENDIR_SUPPORT)
    .union(InitFlags::FUSE_EXPORT_SUPPORT)
    .union(InitFlags::FUSE_ABORT_ERROR)
    .union(InitFlags::FUSE_ALLOW_IDMAP);

/// What fuser calls.
#[derive(Debug)]
pub(super) struct Adapter<I> {
    served: Arc<Served<I>>,
    /// What the kernel offered, once it has; for who takes the connection over.
    offer: Arc<OnceLock<KernelOffer>>,
    /// Whether the kernel takes ENOSYS for "never ask again" (Linux 3.16 for files, 5.1 for
    /// directories).
    no_open: bool,
    no_opendir: bool,
}

/// Replies that can carry an errno.
trait Refuse {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}

refuse!(
    ReplyAttr,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyLseek,
    ReplyStatfs,
    ReplyXattr
);

impl<I: ServedBytes> Adapter<I> {
    pub(super) fn new(served: Arc<Served<I>>, offer: Arc<OnceLock<KernelOffer>>) -> Self {
        Self {
            served,
            offer,
            no_open: false,
            no_opendir: false,
        }
    }

    /// Asks the file system and sends what it says.
    fn answer<'a, R: Refuse, T>(
        &'a self,
        op: Op,
        reply: R,
        ask: impl FnOnce(&'a ClipFs<I>) -> Result<T, FsError>,
        send: impl FnOnce(R, T),
    ) {
        self.served.guard(op, || {
            let answer = ask(&self.served.fs);
            self.served.count(op, answer.as_ref().err());
            match answer {
                Ok(answer) => send(reply, answer),
                Err(error) => reply.refuse(errno(&error)),
            }
        });
    }

    /// Tells the kernel never to ask this again.
    fn never(&self, op: Op, reply: impl Refuse) {
        self.served.count(op, None);
        reply.refuse(Errno::ENOSYS);
    }

    fn open_nothing(&self, op: Op, no_more: bool, flags: FopenFlags, reply: ReplyOpen) {
        self.served.count(op, None);
        if no_more {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), flags);
        }
    }
}

impl<I: ServedBytes> Filesystem for Adapter<I> {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let abi = config.kernel_abi();
        // A second call does not happen.
        let _ = self.offer.set(KernelOffer {
            minor: abi.1,
            flags: config.capabilities().bits(),
        });
        let granted = WANTED & config.capabilities();
        self.no_open = granted.contains(InitFlags::FUSE_NO_OPEN_SUPPORT);
        self.no_opendir = granted.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        let refused = |what: &str| io::Error::other(format!("fuser refuses {what}"));
        config
            .add_capabilities(granted)
            .map_err(|_| refused("capabilities that the kernel offers"))?;
        config
            .set_max_write(MAX_READ_BYTES)
            .map_err(|_| refused("the largest read"))?;
        config
            .set_max_background(MAX_BACKGROUND)
            .map_err(|_| refused("the number of background requests"))?;
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let ask = |fs: &ClipFs<I>| match fs.lookup(ino(parent), name.as_bytes()) {
            Ok(attributes) => Ok(file_attr(&attributes)),
            Err(FsError::NotFound) => Ok(NO_ENTRY),
            Err(error) => Err(error),
        };
        self.answer(Op::Lookup, reply, ask, |reply, attr| {
            reply.entry(&TTL, &attr, GENERATION);
        });
    }

    fn getattr(&self, _req: &Request, of: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let ask = |fs: &ClipFs<I>| fs.attributes(ino(of));
        self.answer(Op::GetAttr, reply, ask, |reply, attributes| {
            reply.attr(&TTL, &file_attr(&attributes));
        });
    }

    fn readlink(&self, _req: &Request, of: INodeNo, reply: ReplyData) {
        self.answer(
            Op::ReadLink,
            reply,
            |fs| fs.read_link(ino(of)),
            |reply, target| reply.data(target),
        );
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.open_nothing(Op::Open, self.no_open, FopenFlags::FOPEN_KEEP_CACHE, reply);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
        self.open_nothing(Op::OpenDir, self.no_opendir, flags, reply);
    }

    fn read(
        &self,
        _req: &Request,
        of: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.served.guard(Op::Read, || {
            PendingRead::new(self.served.clone(), ino(of), offset, size, reply).start();
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        of: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.answer(
            Op::ReadDir,
            reply,
            |fs| fs.read_dir(ino(of), offset),
            |mut reply, entries| {
                for entry in entries {
                    let entry = match entry {
                        Ok(entry) => entry,
                        Err(error) => return reply.error(errno(&error)),
                    };
                    let attr = file_attr(&entry.attributes);
                    let name = OsStr::from_bytes(entry.name);
                    if reply.add(attr.ino, entry.next_offset, attr.kind, name) {
                        break;
                    }
                }
                reply.ok();
            },
        );
    }

    fn readdirplus(
        &self,
        _req: &Request,
        of: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.answer(
            Op::ReadDirPlus,
            reply,
            |fs| fs.read_dir(ino(of), offset),
            |mut reply, entries| {
                for entry in entries {
                    let entry = match entry {
                        Ok(entry) => entry,
                        Err(error) => return reply.error(errno(&error)),
                    };
                    let attr = file_attr(&entry.attributes);
                    let name = OsStr::from_bytes(entry.name);
                    if reply.add(attr.ino, entry.next_offset, name, &TTL, &attr, GENERATION) {
                        break;
                    }
                }
                reply.ok();
            },
        );
    }

    fn getxattr(&self, _req: &Request, of: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.served.fs.has_xattrs() {
            return self.never(Op::GetXattr, reply);
        }
        let ask = |fs: &'_ ClipFs<I>| Ok(fs.get_xattr(ino(of), name.as_bytes())?.to_vec());
        self.answer(Op::GetXattr, reply, ask, |reply, value| {
            send_sized(reply, size, &value);
        });
    }

    fn listxattr(&self, _req: &Request, of: INodeNo, size: u32, reply: ReplyXattr) {
        // Asked seldom, unlike a single attribute: an image without any has an empty list, because
        // tools that copy a tree take "not supported" for a fault.
        let ask = |fs: &'_ ClipFs<I>| {
            let mut names = fs.list_xattrs(ino(of))?.join(&0);
            if !names.is_empty() {
                names.push(0);
            }
            Ok(names)
        };
        self.answer(Op::ListXattr, reply, ask, |reply, names| {
            send_sized(reply, size, &names);
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.answer(
            Op::StatFs,
            reply,
            |fs| Ok(fs.statfs()),
            |reply, it| {
                let (size, names) = (it.block_bytes, it.max_name_bytes);
                reply.statfs(it.blocks, 0, 0, it.inodes, 0, size, names, size);
            },
        );
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        self.never(Op::Other, reply);
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.never(Op::Other, reply);
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.never(Op::Other, reply);
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.never(Op::Other, reply);
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        self.never(Op::Other, reply);
    }
}

/// Sends an attribute's bytes, or only how many there are if the caller has no room yet.
fn send_sized(reply: ReplyXattr, room: u32, bytes: &[u8]) {
    match u32::try_from(bytes.len()) {
        Ok(len) if room == 0 => reply.size(len),
        Ok(len) if len <= room => reply.data(bytes),
        _ => reply.error(Errno::ERANGE),
    }
}
