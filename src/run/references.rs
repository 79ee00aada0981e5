//! Remembers on disk what image references meant on this node, for volumes that do not want the registry to
//! say.
//!
//! Layout: `<cache>/references/<sha256>`, where the digest is of reference and platform; a file holds the digest
//! of a manifest as text. What cannot be read is not known.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use tracing::debug;

use crate::{
    digest::ManifestDigest,
    disk,
    registry::{ImageRef, Platform},
};

/// How many references are remembered; the oldest files go first.
const MAX_REFERENCES: usize = 4096;

/// Longest file that is read: a digest and a line's end.
const MAX_BYTES: u64 = 128;

/// The references that were resolved on this node.
#[derive(Debug)]
pub(super) struct References {
    dir: PathBuf,
}

impl References {
    /// Those that are kept in a cache directory.
    pub(super) fn new(cache: &Path) -> Self {
        Self {
            dir: cache.join("references"),
        }
    }

    /// What a reference meant when it was last resolved.
    pub(super) fn known(&self, image: &ImageRef, platform: &Platform) -> Option<ManifestDigest> {
        let path = self.path(image, platform);
        let file = fs::symlink_metadata(&path).ok()?;
        if !file.is_file() || MAX_BYTES < file.len() {
            return None;
        }
        fs::read_to_string(&path).ok()?.trim().parse().ok()
    }

    /// Notes what a reference means. What fails is no harm: it is asked of the registry again.
    pub(super) fn note(&self, image: &ImageRef, platform: &Platform, manifest: ManifestDigest) {
        if self.known(image, platform) == Some(manifest) {
            return;
        }
        if let Err(err) = self.write(&self.path(image, platform), manifest) {
            debug!(image.ref = %image, error = %err, "not remembering what the reference means");
        }
    }

    fn write(&self, path: &Path, manifest: ManifestDigest) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        if !path.exists() {
            self.make_room()?;
        }
        disk::publish_unsynced(path, format!("{manifest}\n").as_bytes())
    }

    fn make_room(&self) -> io::Result<()> {
        let entries = fs::read_dir(&self.dir)?.collect::<io::Result<Vec<_>>>()?;
        if entries.len() < MAX_REFERENCES {
            return Ok(());
        }
        let mut dated = Vec::new();
        for entry in entries {
            dated.push((entry.metadata()?.modified()?, entry.path()));
        }
        dated.sort_unstable();
        // Some more, so that not every new reference has to look.
        for (_, path) in dated.into_iter().take(MAX_REFERENCES / 16) {
            fs::remove_file(path)?;
        }
        Ok(())
    }

    fn path(&self, image: &ImageRef, platform: &Platform) -> PathBuf {
        let key = format!("{image}\n{platform}");
        self.dir.join(ManifestDigest::of(key.as_bytes()).hex())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(text: &str) -> ImageRef {
        text.parse().unwrap()
    }

    #[test]
    fn what_was_noted_last_is_known_for_its_platform() {
        let cache = tempfile::tempdir().unwrap();
        let references = References::new(cache.path());
        let (here, there) = ("linux/amd64", "linux/arm64");
        let (here, there): (Platform, Platform) = (here.parse().unwrap(), there.parse().unwrap());
        let app = image("r.example/app:1");
        assert_eq!(references.known(&app, &here), None);
        for content in [b"one", b"two"] {
            let manifest = ManifestDigest::of(content);
            references.note(&app, &here, manifest);
            assert_eq!(references.known(&app, &here), Some(manifest));
        }
        assert_eq!(references.known(&app, &there), None);
        assert_eq!(references.known(&image("r.example/app:2"), &here), None);
        // What is no digest is not known, and mended by the next note.
        let path = references.path(&app, &here);
        for bad in ["", "sha256:1", &"a".repeat(4096)] {
            disk::publish_unsynced(&path, bad.as_bytes()).unwrap();
            assert_eq!(references.known(&app, &here), None);
        }
        references.note(&app, &here, ManifestDigest::of(b"one"));
        assert_eq!(
            references.known(&app, &here),
            Some(ManifestDigest::of(b"one"))
        );
    }

    #[test]
    fn the_number_of_references_is_bounded() {
        let cache = tempfile::tempdir().unwrap();
        let references = References::new(cache.path());
        let here = Platform::host();
        for number in 0..=MAX_REFERENCES {
            let it = image(&format!("r.example/app:{number}"));
            references.note(&it, &here, ManifestDigest::of(b""));
        }
        let n_files = fs::read_dir(&references.dir).unwrap().count();
        assert_eq!(n_files, MAX_REFERENCES - MAX_REFERENCES / 16 + 1);
        let newest = image(&format!("r.example/app:{MAX_REFERENCES}"));
        assert!(references.known(&newest, &here).is_some());
    }
}
