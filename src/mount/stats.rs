//! Says how much a volume holds, without a look at the image.
//!
//! What an image holds is in the volume's record, and never changes. Only a layer that can be written is
//! asked, which is the kernel's memory.

use std::{path::Path, time::Duration};

use rustix::fs::statfs;
use tokio::time::timeout;

use super::{MountError, MountTable, TargetPath, Usage, VolumeId, target::PublicationId};

/// How long the kernel may take to answer. It answers at once, unless a mount hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// How much there is of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// In all.
    pub total: u64,
    /// Taken.
    pub used: u64,
    /// To be had.
    pub available: u64,
}

/// How much a volume holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeStats {
    /// In bytes.
    pub bytes: Space,
    /// In inodes.
    pub inodes: Space,
}

impl From<Usage> for VolumeStats {
    fn from(usage: Usage) -> Self {
        let full = |used| Space {
            total: used,
            used,
            available: 0,
        };
        Self {
            bytes: full(usage.bytes),
            inodes: full(usage.inodes),
        }
    }
}

impl MountTable {
    /// Says how much the volume at the target path holds: the whole image, also if a directory of it is
    /// seen; or the layer that can be written, if there is one.
    ///
    /// # Errors
    /// [`MountError::Invalid`] if the volume's id cannot be one, [`MountError::VolumeNotFound`] if it is
    /// not published there.
    pub async fn stats(&self, volume: &str, path: &str) -> Result<VolumeStats, MountError> {
        let volume = VolumeId::parse(volume)?;
        if path.is_empty() {
            return Err(MountError::Invalid {
                field: "volume_path".into(),
                reason: "is required".to_owned(),
            });
        }
        let not_found = || MountError::VolumeNotFound {
            what: format!("volume {volume} at {path}"),
        };
        // What cannot be a target is none.
        let target = TargetPath::parse(path).map_err(|_| not_found())?;
        let id = PublicationId::of(&volume, &target);
        let table = self.clone();
        let answer = tokio::task::spawn_blocking(move || table.measure(id, &target));
        match timeout(PATIENCE, answer).await {
            Ok(Ok(outcome)) => outcome?.ok_or_else(not_found),
            Ok(Err(err)) => Err(failed(path, std::io::Error::other(err))),
            // It is answered, or an error, when the mount is served again, or given up.
            Err(_) => Err(failed(path, std::io::ErrorKind::TimedOut.into())),
        }
    }

    /// The volume's figures; `None` if there is no such volume.
    fn measure(
        &self,
        id: PublicationId,
        target: &TargetPath,
    ) -> Result<Option<VolumeStats>, MountError> {
        let Some(record) = self.record(id)? else {
            return Ok(None);
        };
        match (record.usage, record.written_over) {
            (Some(usage), None) => Ok(Some(usage.into())),
            // An earlier release did not note it.
            (None, _) | (_, Some(_)) => match target.resolve()? {
                Some(path) => ask_kernel(&path).map(Some),
                None => Ok(None),
            },
        }
    }
}

fn ask_kernel(path: &Path) -> Result<VolumeStats, MountError> {
    let answer = statfs(path).map_err(|err| failed(&path.display().to_string(), err.into()))?;
    let block = u64::try_from(answer.f_bsize).unwrap_or(0);
    Ok(VolumeStats {
        bytes: Space {
            total: answer.f_blocks * block,
            used: answer.f_blocks.saturating_sub(answer.f_bfree) * block,
            available: answer.f_bavail * block,
        },
        inodes: Space {
            total: answer.f_files,
            used: answer.f_files.saturating_sub(answer.f_ffree),
            available: answer.f_ffree,
        },
    })
}

fn failed(path: &str, source: std::io::Error) -> MountError {
    MountError::System {
        doing: format!("asking how full {path} is"),
        source,
    }
}
