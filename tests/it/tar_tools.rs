//! What the tar tests give to the tools: trees of files, and commands that archive them.

#![expect(
    clippy::unwrap_used,
    reason = "a helper's failure is the test's failure"
)]

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Permissions},
    io::Write,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileExt, PermissionsExt, chown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, makedev, mknodat};

/// How much a format can express.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// Files, directories and links.
    V7,
    /// Also devices, fifos and long paths.
    Ustar,
    /// Also longer paths and targets, large ids, times before 1970, attributes, huge files.
    Rich,
}

/// A tool with its arguments.
#[derive(Debug)]
pub(crate) struct Maker {
    pub(crate) name: &'static str,
    tool: &'static str,
    args: &'static [&'static str],
    pub(crate) level: Level,
    pub(crate) nanoseconds: bool,
    pub(crate) xattrs: bool,
    pub(crate) sparse: bool,
}

const BARE: Maker = Maker {
    name: "",
    tool: "",
    args: &[],
    level: Level::Rich,
    nanoseconds: false,
    xattrs: false,
    sparse: false,
};

const GNU: Maker = Maker {
    tool: "tar",
    ..BARE
};
const GNU_PAX: Maker = Maker {
    nanoseconds: true,
    ..GNU
};
const BSD: Maker = Maker {
    tool: "bsdtar",
    ..BARE
};
const PYTHON: Maker = Maker {
    tool: "python3",
    ..BARE
};
const GO: Maker = Maker { tool: "go", ..BARE };

/// Every tool in every format that it writes.
pub(crate) const MAKERS: &[Maker] = &[
    Maker {
        name: "GNU v7",
        args: &["--format=v7"],
        level: Level::V7,
        ..GNU
    },
    Maker {
        name: "GNU ustar",
        args: &["--format=ustar"],
        level: Level::Ustar,
        ..GNU
    },
    Maker {
        name: "GNU gnu sparse",
        args: &["--format=gnu", "-S"],
        sparse: true,
        ..GNU
    },
    Maker {
        name: "GNU oldgnu",
        args: &["--format=oldgnu"],
        level: Level::Ustar,
        ..GNU
    },
    Maker {
        name: "GNU oldgnu sparse",
        args: &["--format=oldgnu", "-S"],
        level: Level::Ustar,
        sparse: true,
        ..GNU
    },
    Maker {
        name: "GNU pax",
        args: &["--format=pax", "--xattrs", "--xattrs-include=*"],
        level: Level::Ustar,
        xattrs: true,
        ..GNU_PAX
    },
    Maker {
        name: "GNU pax sparse 0.0",
        args: &["--format=pax", "-S", "--sparse-version=0.0"],
        sparse: true,
        ..GNU_PAX
    },
    Maker {
        name: "GNU pax sparse 0.1",
        args: &["--format=pax", "-S", "--sparse-version=0.1"],
        sparse: true,
        ..GNU_PAX
    },
    Maker {
        name: "GNU pax sparse 1.0",
        args: &[
            "--format=pax",
            "-S",
            "--sparse-version=1.0",
            "--xattrs",
            "--xattrs-include=*",
        ],
        sparse: true,
        xattrs: true,
        ..GNU_PAX
    },
    Maker {
        name: "bsdtar v7",
        args: &["--format=v7tar"],
        level: Level::V7,
        ..BSD
    },
    Maker {
        name: "bsdtar ustar",
        args: &["--format=ustar"],
        level: Level::Ustar,
        ..BSD
    },
    Maker {
        name: "bsdtar gnu",
        args: &["--format=gnutar"],
        level: Level::Ustar,
        ..BSD
    },
    Maker {
        name: "bsdtar pax",
        args: &["--format=pax", "--xattrs"],
        nanoseconds: true,
        xattrs: true,
        sparse: true,
        ..BSD
    },
    Maker {
        name: "Python ustar",
        args: &["USTAR"],
        level: Level::Ustar,
        ..PYTHON
    },
    Maker {
        name: "Python gnu",
        args: &["GNU"],
        level: Level::Ustar,
        ..PYTHON
    },
    Maker {
        name: "Python pax",
        args: &["PAX"],
        level: Level::Ustar,
        nanoseconds: true,
        ..PYTHON
    },
    Maker {
        name: "Go ustar",
        args: &["ustar"],
        level: Level::Ustar,
        ..GO
    },
    Maker {
        name: "Go gnu",
        args: &["gnu"],
        level: Level::Ustar,
        ..GO
    },
    Maker {
        name: "Go pax",
        args: &["pax"],
        level: Level::Ustar,
        nanoseconds: true,
        ..GO
    },
];

impl Maker {
    /// Archives the tree; `false` where the tool is not installed.
    pub(crate) fn make(&self, dir: &Path, root: &Path, archive: &Path) -> bool {
        let mut command = match self.tool {
            "go" => match go_reader(dir) {
                Some(program) => Command::new(program),
                None => {
                    skipped(self.name, "no go");
                    return false;
                }
            },
            tool => Command::new(tool),
        };
        match self.tool {
            "python3" => command
                .args(["-c", PYTHON_PROGRAM])
                .args(self.args)
                .args([archive, root]),
            "go" => command.arg("write").args(self.args).args([archive, root]),
            _ => command
                .args(self.args)
                .arg("-cf")
                .args([archive, Path::new("-C"), root])
                .arg("."),
        };
        match command.env("LC_ALL", "C.UTF-8").output() {
            Err(error) => {
                skipped(self.name, &error.to_string());
                false
            }
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{}: {text}", self.name);
                true
            }
        }
    }
}

/// Says that a part of a test did not run.
pub(crate) fn skipped(name: &str, why: &str) {
    eprintln!("SKIP {name}: {why}");
}

/// Builds the Go program in `dir`, once; `None` without Go.
pub(crate) fn go_reader(dir: &Path) -> Option<PathBuf> {
    let program = dir.join("gotar");
    if program.exists() {
        return Some(program);
    }
    write(&dir.join("main.go"), GO_PROGRAM.as_bytes());
    let mut build = Command::new("go");
    build
        .args(["build", "-o"])
        .args([&program, &dir.join("main.go")]);
    let output = build
        .env("GOTOOLCHAIN", "local")
        .env("GOFLAGS", "")
        .output()
        .ok()?;
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(program)
}

fn write(path: &Path, bytes: &[u8]) {
    File::create(path).unwrap().write_all(bytes).unwrap();
}

/// Writes the tree of a level below `dir`.
pub(crate) fn make_tree(dir: &Path, level: Level) -> PathBuf {
    let root = dir.join(format!("{level:?}"));
    fs::create_dir_all(root.join("dir/empty")).unwrap();
    for len in [0, 1, 511, 512, 513, 100_000] {
        let bytes: Vec<u8> = (0..len)
            .map(|at: u32| at.to_le_bytes()[at as usize % 3])
            .collect();
        write(&root.join(format!("dir/{len}")), &bytes);
    }
    write(&root.join("zeros"), &[0; 5000]);
    symlink("../dir/./513", root.join("symlink")).unwrap();
    fs::hard_link(root.join("dir/513"), root.join("hard-link")).unwrap();
    for (name, mode) in [("dir/0", 0o4755), ("dir/1", 0o2000), ("dir/empty", 0o1777)] {
        fs::set_permissions(root.join(name), Permissions::from_mode(mode)).unwrap();
    }
    chown(root.join("dir/511"), Some(1000), Some(70_000)).unwrap();
    if Level::Ustar <= level {
        add_special(&root);
    }
    if Level::Rich <= level {
        add_rich(&root);
    }
    set_times(&root, level);
    root
}

fn add_special(root: &Path) {
    let nodes = [
        ("fifo", FileType::Fifo, 0),
        ("char", FileType::CharacterDevice, makedev(1, 3)),
        ("block", FileType::BlockDevice, makedev(259, 70)),
    ];
    for (name, kind, device) in nodes {
        mknodat(
            CWD,
            root.join(name),
            kind,
            Mode::from_raw_mode(0o640),
            device,
        )
        .unwrap();
    }
    let long = root.join(format!("{}/{}", "p".repeat(90), "d".repeat(50)));
    fs::create_dir_all(&long).unwrap();
    write(&long.join("n".repeat(90)), b"long");
    for name in ["user.raw", "user.empty"] {
        let value: &[u8] = if name == "user.raw" {
            b"a=b\n\x00\xff"
        } else {
            b""
        };
        lsetxattr(root.join("dir/1"), name, value, XattrFlags::empty()).unwrap();
    }
    // Sparse where the format can say so: data first, in the middle, at the end; only a hole;
    // many fragments, more than fit into a header.
    let sparse = File::create(root.join("sparse")).unwrap();
    for at in [0, 400_000, 999_000] {
        sparse.write_all_at(&[1; 1000], at).unwrap();
    }
    File::create(root.join("sparse-hole"))
        .unwrap()
        .set_len(300_000)
        .unwrap();
    let fragments = File::create(root.join("sparse-fragments")).unwrap();
    for at in 0..70 {
        let byte = u8::try_from(at + 1).unwrap();
        fragments
            .write_all_at(&[byte; 4096], at * 16_384 + 4096)
            .unwrap();
    }
    fragments.set_len(2_000_000).unwrap();
}

fn add_rich(root: &Path) {
    let deep = root.join("deep/".repeat(70)).join("x".repeat(255));
    fs::create_dir_all(&deep).unwrap();
    write(&deep.join("y".repeat(200)), b"deep");
    symlink("t/".repeat(150), root.join("long-target")).unwrap();
    let raw = OsString::from_vec(b"raw \xff\xfe\n=".to_vec());
    write(&root.join(&raw), b"raw");
    symlink(
        OsStr::from_bytes(b"raw \xff target"),
        root.join("raw-target"),
    )
    .unwrap();
    fs::hard_link(root.join(&raw), deep.join("hard-link")).unwrap();
    chown(
        root.join("dir/512"),
        Some(3_000_000_000),
        Some(4_000_000_000),
    )
    .unwrap();
    let huge = File::create(root.join("sparse-huge")).unwrap();
    let size: u64 = 9 << 30;
    for at in [0, 5 << 30, size - 5] {
        huge.write_all_at(b"bytes", at).unwrap();
    }
}

/// Gives every file a time whose fraction Python's floats can hold.
fn set_times(root: &Path, level: Level) {
    let set = |name: &str, time: SystemTime| {
        File::open(root.join(name))
            .unwrap()
            .set_modified(time)
            .unwrap();
    };
    let epoch = SystemTime::UNIX_EPOCH;
    for name in walk_files(root) {
        File::open(name)
            .unwrap()
            .set_modified(epoch + Duration::from_millis(1_700_000_000_250))
            .unwrap();
    }
    set("dir/1", epoch);
    if Level::Rich <= level {
        set("dir/1", epoch - Duration::from_millis(5250));
        set("dir/0", epoch - Duration::from_secs(10_000_000_000));
        set("dir/511", epoch + Duration::from_millis(9_000_000_000_500));
    }
    for name in ["dir/empty", "dir", "."] {
        set(name, epoch + Duration::from_millis(1_600_000_000_500));
    }
    // What cannot be opened keeps its time but for the fraction.
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        if !meta.is_file() && !meta.is_dir() {
            let time = rustix::fs::Timespec {
                tv_sec: 1_500_000_000,
                tv_nsec: 750_000_000,
            };
            let times = rustix::fs::Timestamps {
                last_access: time,
                last_modification: time,
            };
            let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::utimensat(CWD, &path, &times, flags).unwrap();
        }
    }
}

/// Returns the regular files and directories below `root`, the deepest first.
fn walk_files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).unwrap() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        if meta.is_dir() {
            found.extend(walk_files(&path));
        }
        if meta.is_dir() || meta.is_file() {
            found.push(path);
        }
    }
    found
}

const PYTHON_PROGRAM: &str = r#"
import sys, tarfile
format, archive, root = sys.argv[1:]
with tarfile.open(archive, "w", format=getattr(tarfile, format + "_FORMAT")) as tar:
    tar.add(root, ".")
"#;

const GO_PROGRAM: &str = r#"
package main

import (
	"archive/tar"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"time"
)

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	if os.Args[1] == "read" {
		read(os.Args[2])
	} else {
		write(os.Args[2], os.Args[3], os.Args[4])
	}
}

func read(archive string) {
	file, err := os.Open(archive)
	must(err)
	reader := tar.NewReader(file)
	for {
		header, err := reader.Next()
		if err == io.EOF {
			return
		}
		must(err)
		kind, size, detail := "", int64(0), ""
		device := fmt.Sprintf("%d:%d", header.Devmajor, header.Devminor)
		switch header.Typeflag {
		case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
			kind, size = "file", header.Size
		case tar.TypeLink:
			kind, detail = "link", fmt.Sprintf("%x", header.Linkname)
		case tar.TypeSymlink:
			kind, detail = "symlink", fmt.Sprintf("%x", header.Linkname)
		case tar.TypeDir:
			kind = "dir"
		case tar.TypeChar:
			kind, detail = "char", device
		case tar.TypeBlock:
			kind, detail = "block", device
		case tar.TypeFifo:
			kind = "fifo"
		}
		sum := crc32.NewIEEE()
		if 0 < size && size < 100000000 {
			_, err := io.Copy(sum, reader)
			must(err)
		}
		fmt.Printf("%x %s %d %s %o %d %d %d.%09d %08x", header.Name, kind, size, detail,
			header.Mode&07777, header.Uid, header.Gid, header.ModTime.Unix(),
			header.ModTime.Nanosecond(), sum.Sum32())
		var xattrs []string
		for key, value := range header.PAXRecords {
			if name, found := strings.CutPrefix(key, "SCHILY.xattr."); found {
				xattrs = append(xattrs, fmt.Sprintf(" %x=%x", name, value))
			}
		}
		sort.Strings(xattrs)
		fmt.Println(strings.Join(xattrs, ""))
	}
}

func write(format, archive, root string) {
	file, err := os.Create(archive)
	must(err)
	writer := tar.NewWriter(file)
	links := map[uint64]string{}
	must(filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		must(err)
		info, err := entry.Info()
		must(err)
		target := ""
		if info.Mode()&fs.ModeSymlink != 0 {
			target, err = os.Readlink(path)
			must(err)
		}
		header, err := tar.FileInfoHeader(info, target)
		must(err)
		header.Name, err = filepath.Rel(root, path)
		must(err)
		if info.IsDir() {
			header.Name += "/"
		}
		header.Uname, header.Gname = "", ""
		header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}
		header.Format = map[string]tar.Format{"ustar": tar.FormatUSTAR, "gnu": tar.FormatGNU, "pax": tar.FormatPAX}[format]
		if format != "pax" {
			header.ModTime = time.Unix(header.ModTime.Unix(), 0)
		}
		stat := info.Sys().(*syscall.Stat_t)
		if info.Mode().IsRegular() && stat.Nlink > 1 {
			if first, found := links[stat.Ino]; found {
				header.Typeflag, header.Linkname, header.Size = tar.TypeLink, first, 0
			}
			links[stat.Ino] = header.Name
		}
		must(writer.WriteHeader(header))
		if header.Typeflag == tar.TypeReg {
			content, err := os.Open(path)
			must(err)
			_, err = io.Copy(writer, content)
			must(err)
			must(content.Close())
		}
		return nil
	}))
	must(writer.Close())
	must(file.Close())
}
"#;
