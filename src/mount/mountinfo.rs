//! Reads `/proc/self/mountinfo`: what is mounted, without touching any of it.
//!
//! A `stat` of a dead FUSE mount fails, and that of a hung one blocks for ever; this file never
//! does either. The format is that of proc_pid_mountinfo(5).

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// Says which line is not one of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("mountinfo line {line} is malformed")]
pub struct MountInfoError {
    /// Counted from one.
    pub line: usize,
}

/// Major and minor number: equal for all mounts of one file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    /// The major number.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// The file system.
    pub device: Device,
    /// The directory of the file system that is seen, `/` for all of it.
    pub root: PathBuf,
    /// Where it is seen.
    pub mount_point: PathBuf,
    /// The options of this mount, comma-separated.
    pub options: String,
    /// The file system's type, such as `ext4` or `fuse.sshfs`.
    pub fs_type: String,
    /// What is mounted: a device, or the name that a FUSE server gave.
    pub source: OsString,
}

/// All mounts of this process's namespace, in the kernel's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountInfo(Vec<MountEntry>);

impl MountInfo {
    /// Reads the mounts of this process.
    ///
    /// # Errors
    /// Those of the file system; `InvalidData` if the kernel writes another format.
    ///
    /// # Blocking
    /// No: the kernel writes it from memory.
    pub fn read() -> io::Result<Self> {
        Self::parse(&fs::read("/proc/self/mountinfo")?)
            .map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
    }

    /// Parses the file's content.
    ///
    /// # Errors
    /// For a line that is not one of mountinfo.
    pub fn parse(content: &[u8]) -> Result<Self, MountInfoError> {
        content
            .split(|byte| *byte == b'\n')
            .enumerate()
            .filter(|(_, line)| !line.is_empty())
            .map(|(at, line)| parse_line(line).ok_or(MountInfoError { line: at + 1 }))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The mounts at exactly `path`; more than one if they are stacked.
    pub fn at<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a MountEntry> {
        self.0.iter().filter(move |it| it.mount_point == path)
    }

    /// The mounts below `path`, not the one at it.
    pub fn below<'a>(&'a self, path: &'a Path) -> impl DoubleEndedIterator<Item = &'a MountEntry> {
        self.0
            .iter()
            .filter(move |it| it.mount_point != path && it.mount_point.starts_with(path))
    }
}

/// `36 35 98:0 /root /point rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|byte| *byte == b' ');
    let _id: u64 = text(fields.next()?)?.parse().ok()?;
    let _parent: u64 = text(fields.next()?)?.parse().ok()?;
    let (major, minor) = text(fields.next()?)?.split_once(':')?;
    let device = Device {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    };
    let root = unescape(fields.next()?)?;
    let mount_point = unescape(fields.next()?)?;
    let options = text(fields.next()?)?.to_owned();
    // Any number of optional fields, ended by a dash.
    fields.find(|it| *it == b"-")?;
    let fs_type = String::from_utf8(unescape(fields.next()?)?).ok()?;
    let source = unescape(fields.next()?)?;
    Some(MountEntry {
        device,
        root: OsString::from_vec(root).into(),
        mount_point: OsString::from_vec(mount_point).into(),
        options,
        fs_type,
        source: OsString::from_vec(source),
    })
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// Undoes the kernel's `\ooo` for space, tab, newline, backslash and `#` (fs/seq_file.c).
fn unescape(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut plain = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((first, tail)) = rest.split_first() {
        if *first != b'\\' {
            plain.push(*first);
            rest = tail;
            continue;
        }
        let (digits, tail) = tail.split_at_checked(3)?;
        let value = u8::from_str_radix(text(digits)?, 8).ok()?;
        plain.push(value);
        rest = tail;
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn lines_of_the_manual_and_of_real_nodes_are_read() {
        let content = b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
            100 36 0:53 / /var/lib/kubelet/pods/x\\040y/volumes/kubernetes.io~csi/\\134a\\011b/mount ro,nosuid,nodev shared:5 master:7 propagate_from:2 - fuse.clip clip-csi ro,user_id=0\n\
            101 36 0:54 / /none rw -  none rw\n\
            102 36 0:55 /sub /a\\012b//deleted rw - tmpfs \\043x rw\n";
        let info = MountInfo::parse(content).unwrap();
        assert_eq!(info.0.len(), 4);
        assert_eq!(
            info.0[0],
            MountEntry {
                device: Device {
                    major: 98,
                    minor: 0
                },
                root: "/mnt1".into(),
                mount_point: "/mnt2".into(),
                options: "rw,noatime".into(),
                fs_type: "ext3".into(),
                source: "/dev/root".into(),
            }
        );
        assert_eq!(
            info.0[1].mount_point.as_os_str().as_bytes(),
            b"/var/lib/kubelet/pods/x y/volumes/kubernetes.io~csi/\\a\tb/mount"
        );
        assert_eq!(
            info.0[1].device,
            Device {
                major: 0,
                minor: 53
            }
        );
        assert_eq!(info.0[1].source, "clip-csi");
        assert_eq!(
            (info.0[2].fs_type.as_str(), info.0[2].source.len()),
            ("", 4)
        );
        assert_eq!(
            info.0[3].mount_point.as_os_str().as_bytes(),
            b"/a\nb//deleted"
        );
        assert_eq!(info.0[3].source, "#x");
    }

    #[test]
    fn malformed_lines_are_named() {
        for line in [
            "x 35 98:0 / /mnt rw - ext3 /dev/root rw",
            "36 35 98 / /mnt rw - ext3 /dev/root rw",
            "36 35 98:0 / /mnt rw master:1 ext3 /dev/root rw",
            "36 35 98:0 / /mnt\\04 rw - ext3 /dev/root rw",
            "36 35 98:0 / /mnt\\999 rw - ext3 /dev/root rw",
            "36 35 98:0 / /mnt\\777 rw - ext3 /dev/root rw",
            "36 35 98:0 / /mnt rw - ext3",
            "36",
        ] {
            let content = format!("36 35 98:0 / /good rw - ext3 /dev/root rw\n{line}\n");
            assert_eq!(
                MountInfo::parse(content.as_bytes()),
                Err(MountInfoError { line: 2 }),
                "{line}"
            );
        }
    }

    #[test]
    fn stacked_mounts_are_all_at_their_path_and_neighbours_are_not_below() {
        let content = b"1 0 0:1 / /a rw - t s rw\n2 1 0:2 / /a/b rw - t s rw\n\
            3 2 0:3 / /a/b rw - t s rw\n4 1 0:4 / /ab rw - t s rw\n";
        let info = MountInfo::parse(content).unwrap();
        let minors = |entries: Vec<&MountEntry>| -> Vec<u32> {
            entries.iter().map(|it| it.device.minor).collect()
        };
        assert_eq!(minors(info.at(Path::new("/a/b")).collect()), [2, 3]);
        assert_eq!(minors(info.below(Path::new("/a")).collect()), [2, 3]);
        assert_eq!(minors(info.at(Path::new("/b")).collect()), [] as [u32; 0]);
    }

    #[test]
    fn the_running_kernels_own_is_read() {
        let info = MountInfo::read().unwrap();
        assert_ne!(info.at(Path::new("/proc")).count(), 0);
    }

    proptest::proptest! {
        #[test]
        fn errors_are_fine_and_panics_are_bugs(content: Vec<u8>) {
            // Only that it returns.
            let _ = MountInfo::parse(&content);
        }
    }
}
