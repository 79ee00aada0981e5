//! Names what is published: volume ids and target paths that cannot be wrong, and the directory
//! behind a target path.

use std::{
    fmt, fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Component, Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{MountError, image::field};

/// Longest volume id (CSI spec v1.12, "Size Limits").
const MAX_VOLUME_ID_BYTES: usize = 128;

/// Longest path that the kernel takes, without the final NUL (PATH_MAX).
const MAX_TARGET_PATH_BYTES: usize = 4095;

/// Mode of a target directory, as kubelet gives its parent; the mount hides it.
const TARGET_MODE: u32 = 0o750;

/// Names a volume; what kubelet made up or an administrator wrote.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VolumeId(String);

impl VolumeId {
    /// Parses a volume id.
    ///
    /// # Errors
    /// [`MountError::Invalid`] if it is empty or too long.
    pub fn parse(text: &str) -> Result<Self, MountError> {
        let reason = if text.is_empty() {
            "is required".to_owned()
        } else if MAX_VOLUME_ID_BYTES < text.len() {
            format!(
                "has {} bytes, {MAX_VOLUME_ID_BYTES} are allowed",
                text.len()
            )
        } else {
            return Ok(Self(text.to_owned()));
        };
        Err(MountError::Invalid {
            field: "volume_id".into(),
            reason,
        })
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An absolute path without `.` and `..`, where a pod's volume is to appear.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TargetPath(String);

impl TargetPath {
    /// Parses a target path.
    ///
    /// # Errors
    /// [`MountError::Invalid`] if it is not absolute, too long, the root, or climbs.
    pub fn parse(text: &str) -> Result<Self, MountError> {
        let path = Path::new(text);
        let plain = path
            .components()
            .all(|it| matches!(it, Component::RootDir | Component::Normal(_)));
        let reason = if text.is_empty() {
            "is required".to_owned()
        } else if MAX_TARGET_PATH_BYTES < text.len() {
            format!(
                "has {} bytes, {MAX_TARGET_PATH_BYTES} are allowed",
                text.len()
            )
        } else if !path.is_absolute() || !plain || text.contains('\0') {
            format!("{text:?} is not an absolute path without \"..\"")
        } else if path.parent().is_none() {
            "is the root directory".to_owned()
        } else {
            return Ok(Self(text.trim_end_matches('/').to_owned()));
        };
        Err(MountError::Invalid {
            field: "target_path".into(),
            reason,
        })
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path as mountinfo has it: links in the parent followed, the last component untouched.
    ///
    /// Kubelet's directory is often a link to a larger disk, and the target itself may be a dead
    /// mount, hence the difference. `None` if the parent does not exist.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn resolve(&self) -> Result<Option<PathBuf>, MountError> {
        let path = Path::new(&self.0);
        let (parent, name) = path
            .parent()
            .zip(path.file_name())
            .expect("parsed paths are below the root and end in a name");
        match fs::canonicalize(parent) {
            Ok(parent) => Ok(Some(parent.join(name))),
            Err(err)
                if matches!(
                    err.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(None)
            }
            Err(err) => Err(MountError::system("resolving", parent, err)),
        }
    }
}

impl fmt::Display for TargetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names one volume at one target: a volume may be published at several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct PublicationId([u8; 32]);

impl PublicationId {
    pub(super) fn of(volume: &VolumeId, target: &TargetPath) -> Self {
        let mut hash = Sha256::new();
        field(&mut hash, volume.as_str().as_bytes());
        field(&mut hash, target.as_str().as_bytes());
        Self(hash.finalize().into())
    }

    pub(super) fn hex(&self) -> String {
        crate::digest::to_hex(&self.0)
    }
}

/// What is at a target path where nothing is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TargetDir {
    Absent,
    Empty,
}

/// Looks at a target path where nothing is mounted.
///
/// # Errors
/// [`MountError::Foreign`] if there is something that a mount would hide or follow.
pub(super) fn inspect(path: &Path) -> Result<TargetDir, MountError> {
    let foreign = |reason| MountError::Foreign {
        path: path.to_owned(),
        reason,
    };
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => {
            Err(foreign("is a symbolic link: remove it, it is not followed"))
        }
        Ok(found) if !found.is_dir() => Err(foreign("is not a directory: remove it")),
        Ok(_) => {
            let mut entries =
                fs::read_dir(path).map_err(|err| MountError::system("reading", path, err))?;
            match entries.next() {
                None => Ok(TargetDir::Empty),
                Some(_) => Err(foreign(
                    "is a directory with files that a mount would hide: empty it",
                )),
            }
        }
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(TargetDir::Absent),
        Err(err) => Err(MountError::system("looking at", path, err)),
    }
}

/// Makes the target directory where there is none, and returns what was there.
///
/// # Errors
/// Those of [`inspect`] and of mkdir(2).
pub(super) fn make(path: &Path) -> Result<TargetDir, MountError> {
    let before = inspect(path)?;
    if before == TargetDir::Absent {
        fs::DirBuilder::new()
            .mode(TARGET_MODE)
            .create(path)
            .map_err(|err| MountError::system("creating target directory", path, err))?;
    }
    Ok(before)
}

/// Removes an empty directory; one that is not there is as good.
///
/// # Errors
/// Those of rmdir(2).
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_paths_that_could_lead_elsewhere_are_refused() {
        for text in [
            "",
            "/",
            "//",
            "relative/path",
            "/a/../b",
            "/a/b/..",
            "/a\0b",
            &format!("/{}", "a".repeat(MAX_TARGET_PATH_BYTES)),
        ] {
            assert!(
                matches!(
                    TargetPath::parse(text),
                    Err(MountError::Invalid { field, .. }) if field == "target_path"
                ),
                "{text:?} was taken"
            );
        }
        assert_eq!(TargetPath::parse("/a/b/").unwrap().as_str(), "/a/b");
        assert!(TargetPath::parse(&format!("/{}", "a".repeat(4094))).is_ok());
    }

    #[test]
    fn volume_ids_are_bounded() {
        assert!(VolumeId::parse("").is_err());
        assert!(VolumeId::parse(&"v".repeat(129)).is_err());
        assert_eq!(
            VolumeId::parse(&"v".repeat(128)).unwrap().as_str().len(),
            128
        );
    }

    #[test]
    fn a_link_in_the_parent_is_followed_and_the_last_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("/", real.join("mount")).unwrap();
        let parse = |path: PathBuf| TargetPath::parse(path.to_str().unwrap()).unwrap();
        let target = parse(dir.path().join("link/mount"));
        let resolved = target.resolve().unwrap();
        assert_eq!(resolved, Some(real.join("mount")));
        assert!(matches!(
            inspect(&real.join("mount")),
            Err(MountError::Foreign { .. })
        ));
        let orphan = parse(dir.path().join("none/mount"));
        assert_eq!(orphan.resolve().unwrap(), None);
    }

    #[test]
    fn only_an_empty_directory_may_be_mounted_over() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("mount");
        assert_eq!(make(&target).unwrap(), TargetDir::Absent);
        assert_eq!(make(&target).unwrap(), TargetDir::Empty);
        fs::create_dir(target.join("file")).unwrap();
        assert!(matches!(make(&target), Err(MountError::Foreign { .. })));
        assert!(remove(&target).is_err());
        remove(&target.join("file")).unwrap();
        remove(&target).unwrap();
        remove(&target).unwrap();
    }

    #[test]
    fn a_publication_is_named_by_both_parts() {
        let id = |volume: &str, target: &str| {
            PublicationId::of(
                &VolumeId::parse(volume).unwrap(),
                &TargetPath::parse(target).unwrap(),
            )
        };
        assert_eq!(id("v", "/a"), id("v", "/a/"));
        assert_ne!(id("v", "/a"), id("v", "/b"));
        assert_ne!(id("v", "/a"), id("w", "/a"));
        assert_ne!(id("v/", "/a"), id("v", "//a"));
    }
}
