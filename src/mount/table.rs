//! The mount table: publishes volumes and takes them back.

use std::{
    collections::HashMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use prometheus::IntGauge;
use tracing::{info, warn};

use super::{
    ImageMounter, ImageRequest, MountEntry, MountError, MountInfo, PreparedImage, SOURCE_NAME,
    Sharing, TargetPath, View, VolumeId, VolumeRecord, bind,
    dead::DeadVolumes,
    lock,
    operations::Operations,
    pod_notices::{PodNotice, PodNotices, PodRef},
    preparations::Preparations,
    published::{self, Asked, Published},
    record::Records,
    recover::{LiveVolumes, WRITABLE_DIR},
    sources::Sources,
    target::{self, PublicationId, TargetDir},
    view, writable,
};
use crate::{digest::ManifestDigest, erofs, failpoint};

/// How a mount table works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountTableConfig {
    /// Where source mounts and records are.
    pub state_dir: PathBuf,
    /// How long a call waits for an image before it answers "still being prepared".
    pub prepare_wait: Duration,
    /// How long a source mount without volumes is kept for the next one.
    pub max_idle: Duration,
}

impl MountTableConfig {
    /// The wait that suits kubelet: it gives up on a call after two minutes
    /// (`csiTimeout` in pkg/volume/csi), and the answer must be there before.
    pub const PREPARE_WAIT: Duration = Duration::from_secs(100);
}

/// What is to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Where it is to appear.
    pub target: TargetPath,
    /// The image, and the rights to it.
    pub image: ImageRequest,
    /// How it is shown there.
    pub view: View,
    /// Whether it may be at other targets as well.
    pub sharing: Sharing,
}

/// What is to be taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpublishRequest {
    /// The volume.
    pub volume: VolumeId,
    /// Where it appeared.
    pub target: TargetPath,
}

/// Publishes images at target paths. Cheap to clone: all clones are one table.
#[derive(Debug, Clone)]
pub struct MountTable {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: MountTableConfig,
    operations: Arc<Operations>,
    preparations: Preparations,
    sources: Sources,
    records: Records,
    /// What this process published. std Mutex: held for a map lookup, taken alone.
    published: Mutex<HashMap<PublicationId, Published>>,
    gauge: IntGauge,
    /// What a former process published, and is not served.
    dead: DeadVolumes,
    notices: PodNotices,
    /// Held while the table lives: keeps another process off the state directory.
    _lock: File,
}

/// What was found in the state directory.
#[derive(Debug)]
pub(super) struct Recovery {
    pub(super) sources: Sources,
    pub(super) records: Records,
    /// Volumes whose mounts have survived.
    pub(super) live: LiveVolumes,
    pub(super) dead: DeadVolumes,
    /// What the pods of these should be told.
    pub(super) notices: PodNotices,
    /// Keeps another process off the directory.
    pub(super) lock: File,
}

/// What [`Inner::examine`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Exactly this, mounted and served.
    Live,
    /// Nothing, or what a dead mount or a crash left.
    NotLive,
}

impl MountTable {
    pub(super) fn new(
        config: MountTableConfig,
        mounter: Arc<dyn ImageMounter>,
        recovery: Recovery,
        gauge: IntGauge,
    ) -> Self {
        let Recovery {
            sources,
            records,
            live,
            dead,
            notices,
            lock,
        } = recovery;
        gauge.set(i64::try_from(live.len()).unwrap_or(i64::MAX));
        Self {
            inner: Arc::new(Inner {
                config,
                operations: Arc::default(),
                preparations: Preparations::new(mounter),
                sources,
                records,
                published: Mutex::new(live.into_iter().collect()),
                gauge,
                dead,
                notices,
                _lock: lock,
            }),
        }
    }

    /// Unmounts the source mounts that nobody has used for as long as they are kept, and counts the
    /// volumes whose sources have died. Call it now and then.
    ///
    /// # Blocking
    /// Waits for unmounts.
    pub fn look_after(&self) {
        self.inner.sources.retire_idle(self.inner.config.max_idle);
        let published: Vec<_> = {
            let published = lock(&self.inner.published);
            let published = published.iter();
            published.map(|(id, it)| (*id, it.clone())).collect()
        };
        let mut n_dead = 0;
        for (id, it) in published {
            if self.inner.sources.live(it.manifest, id).is_some() {
                continue;
            }
            n_dead += 1;
            if let Some(pod) = &it.asked.pod {
                self.inner.notices.add_dead(pod, it.manifest, &it.path);
            }
        }
        self.inner.dead.set_own(n_dead);
    }

    /// Takes what pods should be told about their volumes: it is the caller's to pass on.
    pub fn take_pod_notices(&self) -> Vec<PodNotice> {
        self.inner.notices.take()
    }

    pub(super) fn retire_all_idle(&self) {
        self.inner.sources.retire_idle(Duration::ZERO);
    }

    pub(super) fn record(&self, id: PublicationId) -> Result<Option<VolumeRecord>, MountError> {
        self.inner.records.load(id)
    }

    pub(super) fn state_dir(&self) -> &Path {
        &self.inner.config.state_dir
    }

    /// Mounts the image at the target path.
    ///
    /// A repeated call finds the volume and succeeds at once. A volume that a former process
    /// published, or whose source died, is mounted anew.
    ///
    /// # Errors
    /// Those of [`MountError`]. After one that is not transient, nothing of the volume is left at
    /// the target.
    ///
    /// # Cancellation
    /// Safe: the image goes on being prepared, and a mount that has begun is completed.
    pub async fn publish(&self, request: PublishRequest) -> Result<(), MountError> {
        let PublishRequest {
            volume,
            target,
            image,
            view,
            sharing,
        } = request;
        let operation = self.inner.operations.begin(&volume, &target)?;
        let mut record = VolumeRecord {
            volume,
            target,
            image: image.image.clone(),
            // Known once the image is resolved.
            manifest: ManifestDigest::from_bytes([0; 32]),
            attributes: image.attributes(&view),
            usage: None,
            written_over: None,
            pod: image.pod.as_deref().map(PodRef::from),
        };
        let former = image.attributes(&view.former());
        let (inner, wanted, seen) = (Arc::clone(&self.inner), record.clone(), view.clone());
        match on_blocking_pool(move || inner.examine(&wanted, former, &seen, sharing)).await? {
            Found::Live => {
                let inner = &self.inner;
                published::renew(&inner.published, &inner.preparations, &record, &image).await;
                return Ok(());
            }
            Found::NotLive => {}
        }
        let patience = self.inner.config.prepare_wait;
        let asked = Asked {
            work: Some(image.work()),
            pod: record.pod.clone(),
        };
        let when_slow = |progress: String| {
            if let Some(pod) = &asked.pod {
                let message = format!(
                    "image {} takes long to be ready: {progress}; the pod starts when it is",
                    record.image
                );
                self.inner.notices.add(pod, "VolumeSlow", message);
            }
        };
        let prepared = self
            .inner
            .preparations
            .wait(image, patience, when_slow)
            .await;
        let inner = Arc::clone(&self.inner);
        // The operation goes along: it ends with the work, not with the caller's patience.
        on_blocking_pool(move || {
            let _operation = operation;
            match prepared {
                Ok(prepared) => {
                    record.manifest = prepared.manifest;
                    record.usage = Some(prepared.usage);
                    inner.mount(record, &view, &prepared, asked)
                }
                Err(err) => {
                    if !err.is_transient() {
                        inner.drop_dead(&record);
                    }
                    Err(err)
                }
            }
        })
        .await
    }

    /// Unmounts the volume from the target path and removes that directory.
    ///
    /// Succeeds for what is not there, dead, or was never published.
    ///
    /// # Errors
    /// [`MountError::Busy`], or [`MountError::System`] if the mount cannot be detached or the
    /// directory not be removed: to be tried again.
    ///
    /// # Cancellation
    /// Safe: an unmount that has begun is completed.
    pub async fn unpublish(&self, request: UnpublishRequest) -> Result<(), MountError> {
        let UnpublishRequest { volume, target } = request;
        let operation = self.inner.operations.begin(&volume, &target)?;
        let inner = Arc::clone(&self.inner);
        on_blocking_pool(move || {
            let _operation = operation;
            inner.take_back(&volume, &target)
        })
        .await
    }
}

impl Inner {
    /// Looks, before the long work, at what is there. `former` are the attributes as an earlier release
    /// would have written them.
    ///
    /// # Errors
    /// Whatever will not be better once the image is ready.
    fn examine(
        &self,
        wanted: &VolumeRecord,
        former: [u8; 32],
        view: &View,
        sharing: Sharing,
    ) -> Result<Found, MountError> {
        let id = wanted.id();
        let path = resolve_for_publish(&wanted.target)?;
        let record = self.records.load(id)?;
        let is_other = record
            .as_ref()
            .is_some_and(|it| ![wanted.attributes, former].contains(&it.attributes));
        // A record without a mount, as a reboot leaves it, is written over.
        if is_other && mounts()?.at(&path).next().is_some() {
            return Err(MountError::AlreadyExists {
                volume: wanted.volume.to_string(),
                path,
            });
        }
        if record.is_some() && self.is_live(id, &path)? {
            return Ok(Found::Live);
        }
        if sharing == Sharing::One
            && let Some(path) = self.elsewhere(id, &wanted.volume)
        {
            return Err(MountError::InUse {
                volume: wanted.volume.to_string(),
                path,
            });
        }
        self.check_target(id, &path, record.is_some())?;
        // Only now: a volume that is there keeps what it was allowed.
        if let Err(err) = view.writable_bytes() {
            self.drop_dead(wanted);
            return Err(err);
        }
        Ok(Found::NotLive)
    }

    /// Another target where the volume is.
    fn elsewhere(&self, id: PublicationId, volume: &VolumeId) -> Option<PathBuf> {
        let published = lock(&self.published);
        let mut others = published.iter().filter(|(other, _)| **other != id);
        others
            .find(|(_, it)| it.volume == *volume)
            .map(|(_, it)| it.path.clone())
    }

    /// Mounts what is prepared; undoes everything it did on an error.
    fn mount(
        &self,
        mut record: VolumeRecord,
        view: &View,
        image: &PreparedImage,
        asked: Asked,
    ) -> Result<(), MountError> {
        let id = record.id();
        let path = resolve_for_publish(&record.target)?;
        let has_record = self.records.load(id)?.is_some();
        // Again: the world moved on while the image was prepared.
        self.check_target(id, &path, has_record)?;
        self.detach_target(&path)?;
        self.dead.remove(id);
        self.forget(id);
        // Where a former life of the volume left a record, the directory is from it too.
        let ours = target::make(&path)? == TargetDir::Absent || has_record;
        let attached = self.sources.attach(image, id, |source, device| {
            record.written_over = view.writable.map(|_| device.into());
            self.records.store(&record)?;
            failpoint::reached("publish:recorded");
            self.show(id, view, source, &path)?;
            failpoint::reached("publish:bound");
            Ok(())
        });
        if let Err(err) = attached {
            // What these meet is logged: `err` is what says what happened.
            if let Err(left) = self.records.remove(id) {
                warn!(
                    error = &left as &dyn std::error::Error,
                    "record of a failed publish stays"
                );
            }
            if ours && let Err(left) = target::remove(&path) {
                warn!(path = %path.display(), error = %left, "directory of a failed publish stays");
            }
            return Err(err);
        }
        let published = Published::of(&record, path.clone(), asked);
        lock(&self.published).insert(id, published);
        self.gauge.inc();
        info!(
            volume.id = %record.volume,
            image.ref = %record.image,
            image.manifest = %image.manifest,
            path = %path.display(),
            "published volume"
        );
        Ok(())
    }

    /// Shows the source at `target`, as the view has it.
    fn show(
        &self,
        id: PublicationId,
        view: &View,
        source: &Path,
        target: &Path,
    ) -> Result<(), MountError> {
        let bound = match (&view.path, view.writable_bytes()?) {
            (None, None) => bind::bind_read_only(source, target),
            (Some(_), None) => bind::bind_read_only(&view::path_of(&view.open(source)?), target),
            (_, Some(bytes)) => {
                let staging = self.config.state_dir.join(WRITABLE_DIR).join(id.hex());
                writable::mount_over(&view.open(source)?, bytes, &staging, target)
            }
        };
        bound.map_err(|err| MountError::system("mounting the image at", target, err))
    }

    /// Undoes what a former life of the volume left, when it cannot be mounted anew: kubelet may
    /// never unpublish what failed for good.
    fn drop_dead(&self, record: &VolumeRecord) {
        let left = match self.records.load(record.id()) {
            Ok(None) => return,
            Ok(Some(_)) => self.take_back(&record.volume, &record.target),
            Err(err) => Err(err),
        };
        if let Err(err) = left {
            warn!(volume.id = %record.volume, error = &err as &dyn std::error::Error, "dead volume stays");
        }
    }

    /// Undoes a publication, whatever is left of it.
    fn take_back(&self, volume: &VolumeId, target: &TargetPath) -> Result<(), MountError> {
        let id = PublicationId::of(volume, target);
        let has_record = self.records.load(id)?.is_some();
        // Without a parent directory there is no mount and nothing to remove.
        if let Some(path) = target.resolve()? {
            match self.check_owner(id, &path, has_record) {
                Ok(()) => {
                    self.detach_target(&path)?;
                    failpoint::reached("unpublish:detached");
                    remove_target(&path)?;
                    failpoint::reached("unpublish:removed");
                }
                Err(err) => {
                    warn!(volume.id = %volume, error = %err, "target left as it is");
                }
            }
        }
        let was_published = self.forget(id);
        self.records.remove(id)?;
        self.dead.remove(id);
        if was_published || has_record {
            info!(volume.id = %volume, path = %target, "unpublished volume");
        }
        Ok(())
    }

    /// Whether this process serves the publication, and it is what is seen at `path`.
    fn is_live(&self, id: PublicationId, path: &Path) -> Result<bool, MountError> {
        let Some(published) = lock(&self.published).get(&id).cloned() else {
            return Ok(false);
        };
        let Some(device) = self.sources.live(published.manifest, id) else {
            return Ok(false);
        };
        let info = mounts()?;
        Ok(info.at(path).last().is_some_and(|it| {
            if published.is_written_over {
                writable::is_writable(it)
            } else {
                it.device == device
            }
        }))
    }

    /// Refuses a target that is not there to be mounted over.
    fn check_target(
        &self,
        id: PublicationId,
        path: &Path,
        has_record: bool,
    ) -> Result<(), MountError> {
        self.check_owner(id, path, has_record)?;
        if mounts()?.at(path).next().is_none() {
            target::inspect(path)?;
        }
        Ok(())
    }

    /// Refuses a target where something is mounted that is not this publication's.
    ///
    /// A mount is the publication's if this process or a record knows it; or if it is a source's by
    /// name, and no other publication's: then the record was lost.
    fn check_owner(
        &self,
        id: PublicationId,
        path: &Path,
        has_record: bool,
    ) -> Result<(), MountError> {
        let foreign = |reason| MountError::Foreign {
            path: path.to_owned(),
            reason,
        };
        let (in_use, own) = {
            let published = lock(&self.published);
            let in_use = published
                .iter()
                .any(|(other, it)| *other != id && it.path == path);
            (in_use, has_record || published.contains_key(&id))
        };
        if in_use {
            return Err(foreign("is in use by another volume: unpublish that first"));
        }
        if !own && !mounts()?.at(path).all(is_source) {
            return Err(foreign(
                "is a mount point that is not this driver's: unmount it",
            ));
        }
        Ok(())
    }

    fn detach_target(&self, path: &Path) -> Result<(), MountError> {
        bind::detach_all(path).map_err(|err| MountError::system("unmounting", path, err))
    }

    /// Gives back what a publication of this process holds, and says whether it was one.
    fn forget(&self, id: PublicationId) -> bool {
        let published = lock(&self.published).remove(&id);
        let Some(published) = published else {
            return false;
        };
        self.gauge.dec();
        self.sources.release(published.manifest, id);
        true
    }
}

/// Whether a mount carries the name that this driver gives to what it mounts.
fn is_source(entry: &MountEntry) -> bool {
    entry.source == SOURCE_NAME && entry.fs_type.starts_with("fuse")
        || entry.fs_type == erofs::FS_TYPE
            && Path::new(&entry.source).ends_with(erofs::METADATA_NAME)
        || writable::is_writable(entry)
}

pub(super) fn mounts() -> Result<MountInfo, MountError> {
    MountInfo::read().map_err(|source| MountError::System {
        doing: "reading /proc/self/mountinfo".to_owned(),
        source,
    })
}

/// The target's path, whose parent the orchestrator has made (CSI spec v1.12,
/// NodePublishVolumeRequest, `target_path`).
fn resolve_for_publish(target: &TargetPath) -> Result<PathBuf, MountError> {
    target.resolve()?.ok_or_else(|| MountError::Invalid {
        field: "target_path".into(),
        reason: format!("the parent directory of {target} does not exist: create it first"),
    })
}

/// Removes the directory of a target. Files that somebody put there are not ours to delete.
fn remove_target(path: &Path) -> Result<(), MountError> {
    match target::remove(path) {
        Err(err)
            if matches!(
                err.kind(),
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotADirectory
            ) =>
        {
            warn!(path = %path.display(), error = %err, "target path is not an empty directory, it stays");
            Ok(())
        }
        outcome => outcome.map_err(|err| MountError::system("removing", path, err)),
    }
}

/// Runs work that blocks apart from the event loop, to its end even if the caller goes away.
async fn on_blocking_pool<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MountError> + Send + 'static,
) -> Result<T, MountError> {
    let span = tracing::Span::current();
    match tokio::task::spawn_blocking(move || span.in_scope(work)).await {
        Ok(outcome) => outcome,
        Err(err) => Err(MountError::System {
            doing: "working on a mount".to_owned(),
            source: io::Error::other(err),
        }),
    }
}
