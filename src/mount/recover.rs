//! Takes over the state directory at start: what a former process left is cleared or kept.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use tracing::info;

use super::{
    ImageMounter, MountError, MountTable, MountTableConfig, VolumeRecord,
    dead::DeadVolumes,
    pod_notices::PodNotices,
    published::{Asked, Published},
    record::Records,
    sources::{self, Sources},
    table::{Recovery, mounts},
    target::PublicationId,
    writable,
};
use crate::metrics::Metrics;

/// Name of the file whose lock says that a process uses the directory.
pub(super) const LOCK_FILE: &str = "lock";

/// Name of the directory where layers that can be written are, while they are mounted.
pub(super) const WRITABLE_DIR: &str = "writable";

/// What was found at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// Volumes that a former process published. Those whose mounts are dead are so until they are
    /// published again; unpublish knows them.
    pub volumes: usize,
    /// Those of them whose mounts are dead.
    pub dead_volumes: usize,
    /// Records of volumes whose pod is gone, removed.
    pub orphans: usize,
    /// Records that could not be read, put aside.
    pub bad_records: usize,
    /// Source mounts of a former process, detached.
    pub stale_sources: usize,
}

impl MountTable {
    /// Takes over `config.state_dir`, and makes the table.
    ///
    /// # Errors
    /// [`MountError::System`] if the directory cannot be used, or another process uses it. Nothing
    /// that is wrong with one record or one stale mount is an error.
    ///
    /// # Blocking
    /// Waits for the disk: call it at start, before anything is served.
    pub fn recover(
        config: MountTableConfig,
        mounter: Arc<dyn ImageMounter>,
        metrics: &Metrics,
    ) -> Result<(Self, Recovered), MountError> {
        let state_dir = make_dir(&config.state_dir)?;
        let sources_dir = make_dir(&state_dir.join("sources"))?;
        let volumes_dir = make_dir(&state_dir.join("volumes"))?;
        let writable_dir = make_dir(&state_dir.join(WRITABLE_DIR))?;
        // Before anything is touched: the mounts of a living process are not stale.
        let lock = lock_dir(&state_dir)?;
        let survivors = mounter.survivors();
        let alive = survivors.iter().map(|it| it.device).collect();
        let stale_sources = sources::clear_stale(&sources_dir, &alive)
            .map_err(|err| MountError::system("clearing", &sources_dir, err))?;
        writable::clear_stale(&writable_dir)
            .map_err(|err| MountError::system("clearing", &writable_dir, err))?;
        let sources = Sources::new(
            sources_dir,
            Arc::clone(&mounter),
            sources::Gauges {
                all: metrics.mounts.clone(),
                kernel: metrics.kernel_mounts.clone(),
            },
            config.max_idle,
        );
        sources.adopt(survivors, &mounts()?);
        let records = Records::new(volumes_dir.clone());
        let swept = records
            .sweep()
            .map_err(|err| MountError::system("reading records in", &volumes_dir, err))?;
        let notices = PodNotices::default();
        let (live, dead) = sort_volumes(&swept.kept, &sources, &notices)?;
        let recovered = Recovered {
            volumes: swept.kept.len(),
            dead_volumes: dead.len(),
            orphans: swept.dropped,
            bad_records: swept.bad,
            stale_sources,
        };
        info!(
            path = %state_dir.display(),
            volumes = recovered.volumes,
            live_volumes = live.len(),
            dead_volumes = recovered.dead_volumes,
            orphans = recovered.orphans,
            bad_records = recovered.bad_records,
            stale_sources = recovered.stale_sources,
            "recovered mount state"
        );
        let recovery = Recovery {
            sources,
            records,
            live,
            dead: DeadVolumes::new(dead, metrics.dead_volumes.clone()),
            notices,
            lock,
        };
        let table = Self::new(config, mounter, recovery, metrics.volumes.clone());
        Ok((table, recovered))
    }
}

/// Volumes whose mounts have survived, and where they are.
pub(super) type LiveVolumes = Vec<(PublicationId, Published)>;

/// Sorts the volumes of `records` whose target still has a mount: those whose source is served, with
/// where they are, and those whose mount is dead, which their pods are told. After a reboot there is no mount, and the volume is
/// merely not published.
fn sort_volumes(
    records: &[VolumeRecord],
    sources: &Sources,
    notices: &PodNotices,
) -> Result<(LiveVolumes, Vec<PublicationId>), MountError> {
    let info = mounts()?;
    let (mut live, mut dead) = (Vec::new(), Vec::new());
    for record in records {
        let Some(path) = record.target.resolve().ok().flatten() else {
            continue;
        };
        let Some(seen) = info.at(&path).last() else {
            continue;
        };
        let id = record.id();
        let source = match record.written_over {
            Some(below) => writable::is_writable(seen).then(|| below.device()),
            None => Some(seen.device),
        };
        if source.is_some_and(|it| sources.rejoin(record.manifest, it, id)) {
            let asked = Asked {
                work: None,
                pod: record.pod.clone(),
            };
            live.push((id, Published::of(record, path, asked)));
        } else {
            if let Some(pod) = &record.pod {
                notices.add_dead(pod, record.manifest, &path);
            }
            dead.push(id);
        }
    }
    Ok((live, dead))
}

/// Makes a directory for the driver alone, and returns its path as mountinfo has it.
fn make_dir(path: &Path) -> Result<PathBuf, MountError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .and_then(|()| path.canonicalize())
        .map_err(|err| MountError::system("creating state directory", path, err))
}

/// Locks the directory for as long as the returned file is open.
fn lock_dir(dir: &Path) -> Result<File, MountError> {
    let path = dir.join(LOCK_FILE);
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|err| MountError::system("opening", &path, err))?;
    let err = match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => io::Error::new(
            io::ErrorKind::ResourceBusy,
            "another clip-csi process uses this state directory: stop it, or use another directory",
        ),
        Err(TryLockError::Error(err)) => err,
    };
    Err(MountError::system("locking", &path, err))
}
