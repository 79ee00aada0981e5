//! Keeps the node's own credentials: a docker config file that is read again when it changes.
//!
//! Kubelet renews a mounted Secret by pointing a link at a new directory, so that the file is
//! another one afterwards; an editor writes the same one. Both are seen by looking at the file's
//! identity and times, which costs one stat(2) per publish.
//!
//! A file that has become unreadable or malformed leaves the last good one in use, and a warning:
//! the registry is who decides whether those credentials still hold.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::{config::RegistryConfigError, credentials::DockerConfig};

/// Longest file: Kubernetes takes secrets up to 1 MiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A docker config file, as it was last read.
#[derive(Debug)]
pub(crate) struct NodeCredentials {
    path: PathBuf,
    /// std Mutex: held to look at the file and, when it changed, to read it. It is small.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` if the file was not there when it was last looked at.
    version: Option<Version>,
    config: Arc<DockerConfig>,
}

/// What changes when the file does: device, inode, size, and times in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version(u64, u64, u64, [i64; 4]);

impl NodeCredentials {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`RegistryConfigError::DockerConfigFile`], which names the file and never its content.
    pub(crate) fn open(path: &Path) -> Result<Self, RegistryConfigError> {
        let wrong = |reason: String| RegistryConfigError::DockerConfigFile {
            path: path.to_owned(),
            reason,
        };
        // The version first: what changes after it is seen next time.
        let version = version(path).map_err(|err| wrong(err.to_string()))?;
        let config = read(path).map_err(wrong)?;
        Ok(Self {
            path: path.to_owned(),
            state: Mutex::new(State {
                version: Some(version),
                config: Arc::new(config),
            }),
        })
    }

    /// Returns what the file says now, or said when it was last well-formed.
    ///
    /// # Blocking
    /// One stat(2), and a read of the small file when it changed.
    pub(crate) fn current(&self) -> Arc<DockerConfig> {
        // After a panic the state is still one or the other.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (version, found) = match version(&self.path) {
            Ok(version) => (Some(version), Ok(())),
            Err(err) => (None, Err(err.to_string())),
        };
        if state.version == version {
            return Arc::clone(&state.config);
        }
        state.version = version;
        match found.and_then(|()| read(&self.path)) {
            Ok(config) => {
                state.config = Arc::new(config);
                tracing::info!(path = %self.path.display(), "registry credentials of the node read anew");
            }
            Err(reason) => {
                tracing::warn!(path = %self.path.display(), reason,
                    "registry credentials of the node cannot be read: the former ones stay in use");
            }
        }
        Arc::clone(&state.config)
    }
}

fn version(path: &Path) -> io::Result<Version> {
    let found = fs::metadata(path)?;
    let times = [
        found.mtime(),
        found.mtime_nsec(),
        found.ctime(),
        found.ctime_nsec(),
    ];
    Ok(Version(found.dev(), found.ino(), found.size(), times))
}

fn read(path: &Path) -> Result<DockerConfig, String> {
    let mut text = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text))
        .map_err(|err| err.to_string())?;
    if MAX_FILE_BYTES < text.len() as u64 {
        return Err(format!("it is longer than {MAX_FILE_BYTES} bytes"));
    }
    DockerConfig::parse(&text).map_err(|err| err.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Credentials;

    fn file(user: &str) -> String {
        format!(r#"{{"auths": {{"r.x": {{"username": "{user}", "password": "hunter2"}}}}}}"#)
    }

    /// Writes in place, as an editor does.
    fn write(path: &Path, text: &str) {
        io::Write::write_all(&mut File::create(path).unwrap(), text.as_bytes()).unwrap();
    }

    fn user(credentials: &NodeCredentials) -> String {
        match credentials.current().for_image(&"r.x/app".parse().unwrap()) {
            Credentials::Anonymous => String::new(),
            Credentials::Basic { username, .. } => username,
        }
    }

    #[test]
    fn a_renewed_secret_is_read_and_a_broken_one_leaves_the_last_good_one() {
        let dir = tempfile::tempdir().unwrap();
        // As kubelet mounts a Secret: a link to a link to a directory of its own.
        let path = dir.path().join("config.json");
        for (version, user) in [("v1", "one"), ("v2", "two")] {
            fs::create_dir(dir.path().join(version)).unwrap();
            write(&dir.path().join(version).join("config.json"), &file(user));
        }
        let point_at = |version: &str| {
            let new = dir.path().join("..data_tmp");
            std::os::unix::fs::symlink(version, &new).unwrap();
            fs::rename(&new, dir.path().join("..data")).unwrap();
        };
        point_at("v1");
        std::os::unix::fs::symlink("..data/config.json", &path).unwrap();
        let credentials = NodeCredentials::open(&path).unwrap();
        assert_eq!(user(&credentials), "one");
        point_at("v2");
        assert_eq!(user(&credentials), "two");
        // In place, of another length.
        write(&path, &file("three"));
        assert_eq!(user(&credentials), "three");
        write(&path, "{");
        assert_eq!(user(&credentials), "three");
        fs::remove_file(&path).unwrap();
        assert_eq!(user(&credentials), "three");
        write(&path, &file("four"));
        assert_eq!(user(&credentials), "four");
        write(&path, "{}");
        assert_eq!(user(&credentials), "");
    }

    #[test]
    fn a_file_that_cannot_be_used_is_named_and_not_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let error = || NodeCredentials::open(&path).unwrap_err().to_string();
        let named = format!("registry docker_config_file {}: ", path.display());
        assert!(error().starts_with(&named), "{}", error());
        for text in ["hunter2", r#"{"auths": {"r.x": {"auth": "hunter2"}}}"#] {
            write(&path, text);
            assert!(error().starts_with(&named), "{}", error());
            assert!(!error().contains("hunter2"), "{}", error());
        }
        write(&path, &" ".repeat(1 << 21));
        assert!(error().contains("longer than 1048576 bytes"), "{}", error());
    }
}
