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
    /// How many bytes may be written over the image, in a layer that ends with the volume; read-only
    /// if absent.
    pub writable_bytes: Option<u64>,
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
        Err(invalid(reason))
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
        if let Some(bytes) = self.writable_bytes {
            field(hash, b"writable");
            field(hash, &bytes.to_le_bytes());
        }
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
            Errno::NOENT => invalid(format!("the image has no directory {:?}", path.0)),
            Errno::NOTDIR => invalid(format!(
                "{:?} is not a directory of the image: to see a file, use the container's subPath",
                path.0
            )),
            Errno::LOOP => invalid(format!(
                "{:?} leads through a symbolic link of the image, which is not followed: give the \
                 path that it leads to",
                path.0
            )),
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

fn invalid(reason: String) -> MountError {
    MountError::Invalid {
        field: "path".into(),
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
                writable_bytes: None,
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
        let view = |path: Option<&str>, writable_bytes| View {
            path: path.map(|it| SubPath::parse(it).unwrap()),
            writable_bytes,
        };
        let views = [
            view(None, None),
            view(Some("a"), None),
            view(Some("b"), None),
            view(None, Some(1)),
            view(None, Some(2)),
            view(Some("a"), Some(1)),
        ];
        for (at, one) in views.iter().enumerate() {
            for (other_at, other) in views.iter().enumerate() {
                assert_eq!(digest(one) == digest(other), at == other_at);
            }
        }
        assert_eq!(digest(&views[0]), Sha256::new().finalize());
    }
}
