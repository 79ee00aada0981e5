//! A reader that is killed while the kernel reads for it: what others find then.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io,
    os::unix::process::ExitStatusExt,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        mpsc::{self, Receiver},
    },
    time::{Duration, SystemTime},
};

use clip_csi::erofs::{self, LayerFiles};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, KernelConfig,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, Request,
};

use super::mount_opened;
use crate::fuse_fakes::{LayerText, noise};

const FILE: INodeNo = INodeNo(2);
const PAGE_BYTES: usize = 4096;
/// As much as the kernel asks a file below for at once.
const FILE_BYTES: usize = 16 * PAGE_BYTES;
const FOREVER: Duration = Duration::from_secs(3600);

/// A file system of one file, `data`, which gives page by page and kills who reads before the third.
#[derive(Debug)]
struct Killing {
    data: Vec<u8>,
    readers: Mutex<Receiver<Child>>,
    killed: mpsc::Sender<Option<i32>>,
}

fn attributes(ino: INodeNo, kind: FileType, size: usize) -> FileAttr {
    let time = SystemTime::UNIX_EPOCH;
    FileAttr {
        ino,
        size: size as u64,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm: 0o755,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl Filesystem for Killing {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Less than a page is none: each is asked for alone, and waited for.
        config.set_max_readahead(1).unwrap();
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name != "data" {
            return reply.error(Errno::ENOENT);
        }
        let file = attributes(FILE, FileType::RegularFile, self.data.len());
        reply.entry(&FOREVER, &file, Generation(0));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let found = match ino {
            FILE => attributes(FILE, FileType::RegularFile, self.data.len()),
            _ => attributes(ino, FileType::Directory, 0),
        };
        reply.attr(&FOREVER, &found);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let start = usize::try_from(offset).unwrap().min(self.data.len());
        let end = (start + size as usize).min(self.data.len());
        if start == 2 * PAGE_BYTES {
            // There is one, unless it is read again.
            let reader = self.readers.lock().unwrap().recv();
            if let Ok(mut reader) = reader {
                reader.kill().unwrap();
                self.killed.send(reader.wait().unwrap().signal()).unwrap();
            }
        }
        reply.data(&self.data[start..end]);
    }
}

#[test]
fn a_killed_reader_leaves_no_zeros_to_others() {
    let test = "a_killed_reader_leaves_no_zeros_to_others";
    // With the variable, it fails on kernels that are not trusted, and so says why they are not (`make kernels`).
    let trusts_any = std::env::var_os("CLIP_CSI_TEST_ANY_KERNEL").is_some();
    if let Some(reason) = erofs::unavailable(trusts_any) {
        return eprintln!("SKIP {test}: {reason}");
    }
    let content = noise(FILE_BYTES, 5);
    let mut layer = LayerText::default();
    layer.file("file", &content);
    let (reading, readers) = mpsc::channel();
    let (killed, was_killed) = mpsc::channel();
    // Unmounted last.
    let mut session = None;
    let mounted = mount_opened(test, vec![layer], |layers, dir| {
        let killing = Killing {
            data: layers.concat(),
            readers: Mutex::new(readers),
            killed,
        };
        let below = dir.join("below");
        fs::create_dir(&below)?;
        session = Some(fuser::spawn_mount(killing, &below, &Config::default())?);
        Ok(vec![LayerFiles {
            data: File::open(below.join("data"))?.into(),
            mounted: tempfile::tempfile()?.into(),
        }])
    });
    let Some(mut mounted) = mounted else {
        return;
    };
    let file = mounted.path("file");
    let reader = Command::new("cat").arg(&file).stdout(Stdio::null()).spawn();
    reading.send(reader.unwrap()).unwrap();
    drop(reading);
    let signal = was_killed.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(signal, Some(9), "it was killed while it read");
    assert!(fs::read(&file).unwrap() == content, "all of it is there");
    mounted.unmount();
}
