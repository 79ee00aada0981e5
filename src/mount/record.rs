//! Remembers what is published, across restarts: one small JSON file per volume and target.
//!
//! Layout: `<state-dir>/volumes/<publication>.json`, version 3 (those before are read, too), written whole or not at all. A file that
//! cannot be read is renamed to `….json.bad`, once, and stands in nobody's way: unpublish knows
//! the driver's mounts without it.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{
    Device, MountError, PodRef, TargetPath, Usage, VolumeId,
    target::{PublicationId, remove},
};
use crate::{
    digest::{ManifestDigest, from_hex, to_hex},
    disk,
};

/// The format that is written. Version 1 had neither `usage` nor `written_over`, version 2 no `pod`.
const RECORD_VERSION: u32 = 3;

/// The oldest format that is read.
const OLDEST_VERSION: u32 = 1;

/// Longest file that is read: a record is a path and some names, 6 KiB at most.
const MAX_RECORD_BYTES: u64 = 64 << 10;

/// Says why a file is not a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is not JSON, or lacks a field, or has another.
    #[error("not a volume record")]
    Json(#[from] serde_json::Error),
    /// Another release wrote it.
    #[error("record version {found}, this release reads {OLDEST_VERSION} to {RECORD_VERSION}")]
    Version {
        /// The version in the file.
        found: u32,
    },
    /// A field does not say what it should.
    #[error("field {field} is malformed")]
    Field {
        /// The field.
        field: &'static str,
    },
}

/// What is published at one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Where it is.
    pub target: TargetPath,
    /// The image reference, for people.
    pub image: String,
    /// What the reference meant.
    pub manifest: ManifestDigest,
    /// Digest of what was asked for: tells a repeated call from another one.
    pub attributes: [u8; 32],
    /// How much it holds; unknown in a record of an earlier release.
    pub usage: Option<Usage>,
    /// What lies below the layer that can be written, if there is one.
    pub written_over: Option<WrittenOver>,
    /// Whose it is, if kubelet has said so.
    pub pod: Option<PodRef>,
}

/// The source mount below a layer that can be written: the volume is alive for as long as that is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenOver {
    /// Its file system's major number.
    pub major: u32,
    /// Its file system's minor number.
    pub minor: u32,
}

/// The record as JSON has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wire {
    version: u32,
    volume_id: String,
    target_path: String,
    image: String,
    manifest: String,
    attributes: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    written_over: Option<WrittenOver>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pod: Option<PodRef>,
}

impl From<Device> for WrittenOver {
    fn from(Device { major, minor }: Device) -> Self {
        Self { major, minor }
    }
}

impl WrittenOver {
    pub(super) fn device(self) -> Device {
        let Self { major, minor } = self;
        Device { major, minor }
    }
}

impl VolumeRecord {
    /// Parses a record.
    ///
    /// # Errors
    /// Those of [`RecordError`].
    pub fn parse(content: &[u8]) -> Result<Self, RecordError> {
        // The version first: another one may have other fields.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let Versioned { version } = serde_json::from_slice(content)?;
        if !(OLDEST_VERSION..=RECORD_VERSION).contains(&version) {
            return Err(RecordError::Version { found: version });
        }
        let wire: Wire = serde_json::from_slice(content)?;
        let field = |field| RecordError::Field { field };
        Ok(Self {
            volume: VolumeId::parse(&wire.volume_id).map_err(|_| field("volume_id"))?,
            target: TargetPath::parse(&wire.target_path).map_err(|_| field("target_path"))?,
            image: wire.image,
            manifest: wire.manifest.parse().map_err(|_| field("manifest"))?,
            attributes: from_hex(&wire.attributes).ok_or(field("attributes"))?,
            usage: wire.usage,
            written_over: wire.written_over,
            pod: wire.pod,
        })
    }

    /// Writes the record as JSON, with a final newline.
    ///
    /// # Errors
    /// None that these fields can cause.
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let mut content = serde_json::to_vec(&Wire {
            version: RECORD_VERSION,
            volume_id: self.volume.to_string(),
            target_path: self.target.to_string(),
            image: self.image.clone(),
            manifest: self.manifest.to_string(),
            attributes: to_hex(&self.attributes),
            usage: self.usage,
            written_over: self.written_over,
            pod: self.pod.clone(),
        })?;
        content.push(b'\n');
        Ok(content)
    }

    pub(super) fn id(&self) -> PublicationId {
        PublicationId::of(&self.volume, &self.target)
    }
}

/// The directory of records.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
}

/// What [`Records::sweep`] did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Swept {
    pub(super) kept: Vec<VolumeRecord>,
    pub(super) dropped: usize,
    pub(super) bad: usize,
}

impl Records {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Reads a record; `None` if there is none, or one that had to be put aside.
    pub(super) fn load(&self, id: PublicationId) -> Result<Option<VolumeRecord>, MountError> {
        let path = self.path(id);
        let content = match read_bounded(&path) {
            Ok(content) => content,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(MountError::system("reading record", &path, err)),
        };
        match VolumeRecord::parse(&content) {
            Ok(record) if record.id() == id => Ok(Some(record)),
            Ok(_) => {
                put_aside(&path, &RecordError::Field { field: "volume_id" });
                Ok(None)
            }
            Err(err) => {
                put_aside(&path, &err);
                Ok(None)
            }
        }
    }

    /// Writes a record, in place of an older one.
    pub(super) fn store(&self, record: &VolumeRecord) -> Result<(), MountError> {
        let path = self.path(record.id());
        record
            .encode()
            .map_err(io::Error::other)
            .and_then(|content| disk::publish(&path, &content))
            .map_err(|err| MountError::system("writing record", &path, err))
    }

    /// Removes a record; one that is not there is as good.
    pub(super) fn remove(&self, id: PublicationId) -> Result<(), MountError> {
        let path = self.path(id);
        let removed = match fs::remove_file(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
            outcome => outcome.and_then(|()| disk::sync_parent(&path)),
        };
        removed.map_err(|err| MountError::system("removing record", &path, err))
    }

    /// Goes through all files at start: removes what a crash left unfinished, puts aside what
    /// cannot be read, and drops records of targets whose pod is gone.
    ///
    /// Nothing that is wrong with one file stops the others, or the start.
    pub(super) fn sweep(&self) -> io::Result<Swept> {
        let mut swept = Swept::default();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let extension = path.extension().and_then(OsStr::to_str);
            if extension == disk::TEMPORARY_SUFFIX.strip_prefix('.') {
                if let Err(err) = fs::remove_file(&path) {
                    warn!(path = %path.display(), error = %err, "unfinished record stays");
                }
                continue;
            }
            if extension != Some("json") {
                continue;
            }
            let record = read_bounded(&path)
                .map_err(|err| RecordError::Json(serde::de::Error::custom(err)))
                .and_then(|content| VolumeRecord::parse(&content));
            match record {
                Ok(record) if self.path(record.id()) != path => {
                    put_aside(&path, &RecordError::Field { field: "volume_id" });
                    swept.bad += 1;
                }
                // Kubelet removed the pod's directory while nobody was here to be told.
                Ok(record) if matches!(record.target.resolve(), Ok(None)) => {
                    match self.remove(record.id()) {
                        Ok(()) => swept.dropped += 1,
                        Err(err) => {
                            warn!(path = %path.display(), error = %err, "old record stays");
                        }
                    }
                }
                Ok(record) => swept.kept.push(record),
                Err(err) => {
                    put_aside(&path, &err);
                    swept.bad += 1;
                }
            }
        }
        Ok(swept)
    }

    fn path(&self, id: PublicationId) -> PathBuf {
        self.dir.join(format!("{}.json", id.hex()))
    }
}

/// Reads a file that must not be larger than a record can be.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path)?
        .take(MAX_RECORD_BYTES)
        .read_to_end(&mut content)?;
    Ok(content)
}

/// Renames a bad record, so that it is met once.
fn put_aside(path: &Path, err: &RecordError) {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".bad");
    let outcome = if path.is_dir() {
        remove(path)
    } else {
        fs::rename(path, &aside)
    };
    match outcome {
        Ok(()) => warn!(path = %path.display(), error = %err, "volume record put aside as .bad"),
        Err(rename) => {
            warn!(path = %path.display(), error = %err, rename.error = %rename, "bad volume record stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of version 3: a change of them is a new version.
    const GOLDEN: &str = "{\"version\":3,\"volume_id\":\"csi-1\",\"target_path\":\"/pods/a b/mount\",\"image\":\"registry.example/app:1\",\"manifest\":\"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\",\"attributes\":\"0707070707070707070707070707070707070707070707070707070707070707\",\"usage\":{\"bytes\":5,\"inodes\":2},\"written_over\":{\"major\":0,\"minor\":53},\"pod\":{\"namespace\":\"team\",\"name\":\"web-0\",\"uid\":\"u1\"}}\n";

    /// What version 2 did not have.
    const POD: &str = ",\"pod\":{\"namespace\":\"team\",\"name\":\"web-0\",\"uid\":\"u1\"}";

    /// What version 1 did not have, either.
    const MORE: &str =
        ",\"usage\":{\"bytes\":5,\"inodes\":2},\"written_over\":{\"major\":0,\"minor\":53}";

    fn record() -> VolumeRecord {
        VolumeRecord {
            volume: VolumeId::parse("csi-1").unwrap(),
            target: TargetPath::parse("/pods/a b/mount").unwrap(),
            image: "registry.example/app:1".to_owned(),
            manifest: ManifestDigest::of(b""),
            attributes: [7; 32],
            usage: Some(Usage {
                bytes: 5,
                inodes: 2,
            }),
            written_over: Some(WrittenOver {
                major: 0,
                minor: 53,
            }),
            pod: Some(PodRef {
                namespace: "team".to_owned(),
                name: "web-0".to_owned(),
                uid: "u1".to_owned(),
            }),
        }
    }

    #[test]
    fn golden_bytes_of_all_versions() {
        assert_eq!(
            String::from_utf8(record().encode().unwrap()).unwrap(),
            GOLDEN
        );
        assert_eq!(VolumeRecord::parse(GOLDEN.as_bytes()).unwrap(), record());
        let second = GOLDEN
            .replace(POD, "")
            .replace("\"version\":3", "\"version\":2");
        let known = VolumeRecord {
            pod: None,
            ..record()
        };
        assert_eq!(VolumeRecord::parse(second.as_bytes()).unwrap(), known);
        let first = second
            .replace(MORE, "")
            .replace("\"version\":2", "\"version\":1");
        let known = VolumeRecord {
            usage: None,
            written_over: None,
            ..known
        };
        assert_eq!(VolumeRecord::parse(first.as_bytes()).unwrap(), known);
    }

    #[test]
    fn what_is_not_a_record_is_told_why() {
        for (from, to, want) in [
            (
                "\"version\":3",
                "\"version\":4,\"new\":0",
                "record version 4, this release reads 1 to 3",
            ),
            (
                "\"version\":3",
                "\"version\":3,\"new\":0",
                "not a volume record",
            ),
            ("\"csi-1\"", "\"\"", "field volume_id is malformed"),
            ("/pods/a b", "/pods/../b", "field target_path is malformed"),
            ("sha256:e3", "sha256:e", "field manifest is malformed"),
            ("\"0707", "\"070", "field attributes is malformed"),
            ("\"image\"", "\"img\"", "not a volume record"),
            ("}}", "}", "not a volume record"),
            ("\"inodes\":2", "\"inodes\":-2", "not a volume record"),
        ] {
            let changed = GOLDEN.replace(from, to);
            assert_ne!(changed, GOLDEN, "{from} is not in the record");
            let err = VolumeRecord::parse(changed.as_bytes()).unwrap_err();
            assert_eq!(err.to_string(), want, "{from} -> {to}");
        }
    }

    proptest::proptest! {
        #[test]
        fn errors_are_fine_and_panics_are_bugs(at in 0..GOLDEN.len(), byte: u8) {
            let mut content = GOLDEN.as_bytes().to_vec();
            content[at] = byte;
            // Only that it returns.
            let _ = VolumeRecord::parse(&content);
        }
    }

    #[test]
    fn records_are_stored_loaded_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        let record = record();
        assert_eq!(records.load(record.id()).unwrap(), None);
        records.store(&record).unwrap();
        assert_eq!(records.load(record.id()).unwrap(), Some(record.clone()));
        records.remove(record.id()).unwrap();
        records.remove(record.id()).unwrap();
        assert_eq!(records.load(record.id()).unwrap(), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_sweep_keeps_the_good_drops_the_orphaned_and_puts_the_bad_aside() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().to_owned());
        let pod = tempfile::tempdir().unwrap();
        let good = VolumeRecord {
            target: TargetPath::parse(pod.path().join("mount").to_str().unwrap()).unwrap(),
            ..record()
        };
        records.store(&good).unwrap();
        records.store(&record()).unwrap();
        let write = |name: &str, content: &str| {
            disk::publish(&dir.path().join(name), content.as_bytes()).unwrap();
        };
        write("broken.json", "{");
        write("misnamed.json", GOLDEN);
        write("half.json.1-2-3.tmp", "{");
        write("old.json.bad", "{");
        assert_eq!(
            records.sweep().unwrap(),
            Swept {
                kept: vec![good.clone()],
                dropped: 1,
                bad: 2
            }
        );
        let mut names: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|it| it.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let mut want = vec![
            format!("{}.json", good.id().hex()),
            "broken.json.bad".to_owned(),
            "misnamed.json.bad".to_owned(),
            "old.json.bad".to_owned(),
        ];
        want.sort();
        assert_eq!(names, want);
    }
}
