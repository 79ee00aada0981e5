//! Says how a volume shows its image: all of it or a directory of it, to be read or to be written over.

use std::{
    fmt, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags, open, openat2},
    io::Errno,
};
use sha2::Sha256;

use super::{MountError, image::field};

/// Longest path into an image, as long as the kernel takes, without the final NUL (PATH_MAX).
const MAX_SUB_PATH_BYTES: usize = 4095;

/// At how many targets of a node a volume may be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sharing {
    /// At any number.
    #[default]
    Many,
    /// At one.
    One,
}

/// How a volume shows its image. The default is all of it, read-only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    /// The directory of the image that is seen, instead of all of it.
    pub path: Option<SubPath>,
    /// What may be written over the image, in a layer that ends with the volume; read-only if absent.
    pub writable: Option<Writable>,
}

/// How much may be written over an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writable {
    /// How many bytes the volume asks for; as many as the node allows if absent.
    pub size_bytes: Option<u64>,
    /// How many bytes the node allows; 0 if none. A volume that is there keeps what it was allowed.
    pub max_bytes: u64,
}

impl Writable {
    /// How many bytes a layer that is made now may have.
    ///
    /// # Errors
    /// [`MountError::Invalid`] if the node allows none, or not as many.
    pub fn bytes(self) -> Result<u64, MountError> {
        let max_bytes = self.max_bytes;
        if max_bytes == 0 {
            return Err(invalid(
                "writable",
                "is not allowed on this node: its operator sets node.max_writable_bytes".to_owned(),
            ));
        }
        match self.size_bytes {
            Some(bytes) if max_bytes < bytes => Err(invalid(
                "writableSize",
                format!("is {bytes} bytes, this node allows {max_bytes} (node.max_writable_bytes)"),
            )),
            size_bytes => Ok(size_bytes.unwrap_or(max_bytes)),
        }
    }
}

/// Names a directory inside an image: a relative path without `.` and `..`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubPath(String);

impl SubPath {
    /// Parses a path.
    ///
    /// # Errors
    /// [`MountError::Invalid`] if it is empty, absolute, too long, or climbs.
    pub fn parse(text: &str) -> Result<Self, MountError> {
        let is_plain = |it: &str| !matches!(it, "" | "." | "..");
        let reason = if text.is_empty() {
            "is empty: leave the attribute out to see all of the image".to_owned()
        } else if MAX_SUB_PATH_BYTES < text.len() {
            format!("has {} bytes, {MAX_SUB_PATH_BYTES} are allowed", text.len())
        } else if !text.split('/').all(is_plain) || text.contains('\0') {
            "must be relative to the image's root and have neither \".\" nor \"..\", such as usr/share"
                .to_owned()
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(invalid("path", reason))
    }
}

impl fmt::Display for SubPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl View {
    /// Tells two views apart, as part of what was asked for. The default adds nothing, so that records
    /// of releases that knew no views stay right.
    pub(super) fn hash(&self, hash: &mut Sha256) {
        if let Some(path) = &self.path {
            field(hash, b"path");
            field(hash, path.0.as_bytes());
        }
        if let Some(writable) = self.writable {
            field(hash, b"writable");
            // What is asked for: the operator may change what the node allows while the volume is there.
            let size_bytes = writable.size_bytes.map(u64::to_le_bytes);
            field(hash, size_bytes.as_ref().map_or(&[], |it| it.as_slice()));
        }
    }

    /// The view by which an earlier release told a volume apart: one that asks for no size was taken for one
    /// that asks for as much as the node allows.
    pub(super) fn former(&self) -> Self {
        let sized = |it: Writable| Writable {
            size_bytes: it.size_bytes.or(Some(it.max_bytes)),
            ..it
        };
        Self {
            path: self.path.clone(),
            writable: self.writable.map(sized),
        }
    }

    /// As [`Writable::bytes`]; `None` if it is read-only.
    pub(super) fn writable_bytes(&self) -> Result<Option<u64>, MountError> {
        self.writable.map(Writable::bytes).transpose()
    }

    /// Opens the directory that is seen of the image that is mounted at `source`.
    ///
    /// The image is foreign: nothing in it leads out of it, and no link is followed.
    ///
    /// # Errors
    /// [`MountError::Invalid`] if the image has no such directory.
    ///
    /// # Blocking
    /// Waits for whoever serves the image, if a path is given.
    pub(super) fn open(&self, source: &Path) -> Result<OwnedFd, MountError> {
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let failed = |err: Errno| MountError::system("opening the image at", source, err.into());
        let root = open(source, directory, Mode::empty()).map_err(failed)?;
        let Some(path) = &self.path else {
            return Ok(root);
        };
        let beneath = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        openat2(&root, &path.0, directory, Mode::empty(), beneath).map_err(|err| match err {
            Errno::NOENT => invalid("path", format!("the image has no directory {:?}", path.0)),
            Errno::NOTDIR => invalid(
                "path",
                format!(
                    "{:?} is not a directory of the image: to see a file, use the container's subPath",
                    path.0
                ),
            ),
            Errno::LOOP => invalid(
                "path",
                format!(
                    "{:?} leads through a symbolic link of the image, which is not followed: give \
                     the path that it leads to",
                    path.0
                ),
            ),
            err => failed(err),
        })
    }
}

/// A path by which mount(2) finds an open directory, whatever has happened to its name.
pub(super) fn path_of(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

/// Opens a directory of the driver's own, not to be read.
pub(super) fn open_own(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, dir, flags, Mode::empty())?)
}

fn invalid(field: &'static str, reason: String) -> MountError {
    MountError::Invalid {
        field: field.into(),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, symlink},
    };

    use sha2::Digest;

    use super::*;

    #[test]
    fn only_plain_relative_paths_are_taken() {
        let long = "a/".repeat(2048) + "a";
        for bad in [
            "",
            "/",
            "/usr",
            "usr/",
            "usr//share",
            ".",
            "usr/.",
            "..",
            "usr/../etc",
            "a\0b",
            &long,
        ] {
            let err = SubPath::parse(bad).unwrap_err();
            assert!(err.to_string().starts_with("path: "), "{bad:?}: {err}");
        }
        for good in ["usr", "usr/share", "...", "a b/ö", "-x"] {
            assert_eq!(SubPath::parse(good).unwrap().to_string(), good);
        }
    }

    #[test]
    fn what_is_seen_is_a_directory_of_the_image_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        fs::create_dir_all(image.join("usr/share")).unwrap();
        fs::create_dir(dir.path().join("secret")).unwrap();
        fs::File::create(image.join("file")).unwrap();
        symlink("usr", image.join("link")).unwrap();
        symlink("../secret", image.join("out")).unwrap();
        symlink("/", image.join("root")).unwrap();
        let open = |path: &str| {
            let view = View {
                path: Some(SubPath::parse(path).unwrap()),
                writable: None,
            };
            view.open(&image)
        };
        let seen = open("usr/share").unwrap();
        let want = fs::metadata(image.join("usr/share")).unwrap().ino();
        assert_eq!(rustix::fs::fstat(&seen).unwrap().st_ino, want);
        for (path, want) in [
            ("none", "path: the image has no directory \"none\""),
            (
                "usr/none/x",
                "path: the image has no directory \"usr/none/x\"",
            ),
            (
                "file",
                "path: \"file\" is not a directory of the image: to see a file, use the container's subPath",
            ),
            (
                "file/x",
                "path: \"file/x\" is not a directory of the image: to see a file, use the container's subPath",
            ),
            (
                "link",
                "path: \"link\" leads through a symbolic link of the image, which is not followed: give the path that it leads to",
            ),
            (
                "link/share",
                "path: \"link/share\" leads through a symbolic link of the image, which is not followed: give the path that it leads to",
            ),
            (
                "out",
                "path: \"out\" leads through a symbolic link of the image, which is not followed: give the path that it leads to",
            ),
            (
                "root/etc",
                "path: \"root/etc\" leads through a symbolic link of the image, which is not followed: give the path that it leads to",
            ),
        ] {
            assert_eq!(open(path).unwrap_err().to_string(), want);
        }
        assert!(View::default().open(&image).is_ok());
    }

    #[test]
    fn views_are_told_apart_and_the_plain_one_adds_nothing() {
        let digest = |view: &View| {
            let mut hash = Sha256::new();
            view.hash(&mut hash);
            hash.finalize()
        };
        let view = |path: Option<&str>, size_bytes: Option<Option<u64>>| View {
            path: path.map(|it| SubPath::parse(it).unwrap()),
            writable: size_bytes.map(|size_bytes| Writable {
                size_bytes,
                max_bytes: 2,
            }),
        };
        let views = [
            view(None, None),
            view(Some("a"), None),
            view(Some("b"), None),
            view(None, Some(None)),
            view(None, Some(Some(1))),
            view(None, Some(Some(2))),
            view(Some("a"), Some(None)),
            view(Some("a"), Some(Some(1))),
        ];
        for (at, one) in views.iter().enumerate() {
            for (other_at, other) in views.iter().enumerate() {
                assert_eq!(digest(one) == digest(other), at == other_at);
            }
        }
        assert_eq!(digest(&views[0]), Sha256::new().finalize());
        // An earlier release knew no difference between these two.
        assert_eq!(views[3].former(), views[5]);
        for same in [0, 1, 2, 4, 5, 7] {
            assert_eq!(views[same].former(), views[same]);
        }
    }

    #[test]
    fn what_the_node_allows_is_no_part_of_what_is_asked_for() {
        let digest = |size_bytes, max_bytes| {
            let mut hash = Sha256::new();
            let writable = Some(Writable {
                size_bytes,
                max_bytes,
            });
            let path = None;
            View { path, writable }.hash(&mut hash);
            hash.finalize()
        };
        for size_bytes in [None, Some(1)] {
            assert_eq!(digest(size_bytes, 1), digest(size_bytes, 2));
            assert_eq!(digest(size_bytes, 1), digest(size_bytes, 0));
        }
    }
}
