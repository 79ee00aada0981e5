//! Keeps one source mount per image and kind, for as long as somebody uses it.
//!
//! There are two kinds: one that a process serves, and one that the kernel serves alone, of an image that is
//! whole on disk. An image that became whole after it was mounted may have both: who comes then is given
//! the second.
//!
//! Each source has a slot with a lock of its own, so that a mount that hangs stops only those who
//! want the same image. A slot that has become empty is `Gone` and leaves the map; whoever got it
//! from the map just before sees that, and looks again.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use prometheus::IntGauge;
use tracing::{info, warn};

use super::{
    Device, ImageMounter, MountError, MountInfo, PreparedImage, SourceMount, Survivor, bind, lock,
    target::{PublicationId, remove},
};
use crate::{
    digest::{self, ManifestDigest},
    erofs,
};

/// Who serves a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// A process.
    Served,
    /// The kernel alone.
    Kernel,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Served, Self::Kernel];

    /// Name of the mount point in an image's directory.
    fn mount_point(self) -> &'static str {
        match self {
            Self::Served => "mnt",
            Self::Kernel => "kernel",
        }
    }
}

/// Names a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct SourceId {
    manifest: ManifestDigest,
    kind: Kind,
}

/// A source that the kernel serves, as long as it is mounted.
#[derive(Debug)]
struct InKernel;

impl SourceMount for InKernel {
    fn is_alive(&self) -> bool {
        true
    }

    fn unmount(self: Box<Self>, dir: &Path) -> io::Result<()> {
        bind::detach(dir)
    }
}

/// The source mounts of this process.
#[derive(Debug)]
pub(super) struct Sources {
    dir: PathBuf,
    mounter: Arc<dyn ImageMounter>,
    gauges: Gauges,
    /// How long a source without users is kept for the next one.
    max_idle: Duration,
    /// std Mutex: held for a map lookup. May be taken while a slot is held, not the reverse.
    slots: Mutex<HashMap<SourceId, Arc<Slot>>>,
}

/// How many sources there are.
#[derive(Debug, Clone)]
pub(super) struct Gauges {
    /// Of both kinds.
    pub(super) all: IntGauge,
    /// That the kernel serves.
    pub(super) kernel: IntGauge,
}

impl Gauges {
    fn add(&self, kind: Kind, n: i64) {
        self.all.add(n);
        if kind == Kind::Kernel {
            self.kernel.add(n);
        }
    }
}

/// std Mutex: held while its image is mounted, bound or unmounted, on the blocking pool only.
#[derive(Debug, Default)]
struct Slot(Mutex<SlotState>);

#[derive(Debug, Default)]
enum SlotState {
    #[default]
    Vacant,
    Mounted(Source),
    Gone,
}

#[derive(Debug)]
struct Source {
    session: Box<dyn SourceMount>,
    device: Device,
    users: HashSet<PublicationId>,
    /// Since when it has had no users.
    idle_since: Option<Instant>,
}

impl Sources {
    pub(super) fn new(
        dir: PathBuf,
        mounter: Arc<dyn ImageMounter>,
        gauges: Gauges,
        max_idle: Duration,
    ) -> Self {
        Self {
            dir,
            mounter,
            gauges,
            max_idle,
            slots: Mutex::default(),
        }
    }

    /// Takes the source mounts over that a former process made and that are still served: by another process,
    /// or by the kernel. Those that are not mounted where they should be end with their last user.
    pub(super) fn adopt(&self, survivors: Vec<Survivor>, info: &MountInfo) {
        let served = survivors.into_iter().map(|it| (Kind::Served, it));
        let by_kernel = kernel_mounts(&self.dir, info)
            .into_iter()
            .map(|it| (Kind::Kernel, it));
        for (kind, survivor) in served.chain(by_kernel) {
            let id = SourceId {
                manifest: survivor.manifest,
                kind,
            };
            let mount_point = self.mount_point(id);
            let topmost = info.at(&mount_point).last().map(|it| it.device);
            if topmost != Some(survivor.device) || !survivor.session.is_alive() {
                info!(image.manifest = %id.manifest, "a mount survived that is bound to volumes only");
                continue;
            }
            let source = Source {
                session: survivor.session,
                device: survivor.device,
                users: HashSet::new(),
                idle_since: Some(Instant::now()),
            };
            self.gauges.add(kind, 1);
            info!(image.manifest = %id.manifest, path = %mount_point.display(), "a mount survived");
            let slot = Arc::new(Slot(Mutex::new(SlotState::Mounted(source))));
            lock(&self.slots).insert(id, slot);
        }
    }

    /// Makes `user` a user of the source if `device` is its file system; says whether it is.
    pub(super) fn rejoin(
        &self,
        manifest: ManifestDigest,
        device: Device,
        user: PublicationId,
    ) -> bool {
        let mut slots = self.of_image(manifest);
        slots.any(|(_, slot)| match &mut *lock(&slot.0) {
            SlotState::Mounted(source) if source.device == device => {
                source.users.insert(user);
                source.idle_since = None;
                true
            }
            SlotState::Mounted(_) | SlotState::Vacant | SlotState::Gone => false,
        })
    }

    /// Unmounts the sources that nobody has used for `max_idle`.
    pub(super) fn retire_idle(&self, max_idle: Duration) {
        let slots: Vec<_> = {
            let slots = lock(&self.slots);
            slots.iter().map(|(id, it)| (*id, Arc::clone(it))).collect()
        };
        for (id, slot) in slots {
            let mut state = lock(&slot.0);
            let is_idle = |it: Instant| max_idle <= it.elapsed();
            if matches!(&*state, SlotState::Mounted(source) if source.idle_since.is_some_and(is_idle))
            {
                self.retire(id, &mut state);
            }
        }
    }

    /// Makes `user` a user of a source of the image, mounting it first if nobody has, and binds it: of the one
    /// that the kernel serves, if that is there, or if the image is whole and it is possible.
    ///
    /// # Errors
    /// Those of the mount and of `bind`; then `user` is none, and a source without users is gone.
    pub(super) fn attach(
        &self,
        image: &PreparedImage,
        user: PublicationId,
        bind: impl FnOnce(&Path, Device) -> Result<(), MountError>,
    ) -> Result<(), MountError> {
        let id = |kind| SourceId {
            manifest: image.manifest,
            kind,
        };
        let mut bind = Some(bind);
        if image.is_whole || self.is_mounted(id(Kind::Kernel)) {
            match self.attach_to(id(Kind::Kernel), image, user, &mut bind) {
                // It was not mounted: what came to nothing is not bound.
                Err(err) if bind.is_some() => {
                    info!(image.manifest = %image.manifest, error = &err as &dyn std::error::Error, "image is not mounted in the kernel, and served");
                }
                outcome => return outcome,
            }
        }
        self.attach_to(id(Kind::Served), image, user, &mut bind)
    }

    /// As [`attach`](Self::attach), to this source. `bind` is taken when it is mounted.
    fn attach_to(
        &self,
        id: SourceId,
        image: &PreparedImage,
        user: PublicationId,
        bind: &mut Option<impl FnOnce(&Path, Device) -> Result<(), MountError>>,
    ) -> Result<(), MountError> {
        loop {
            let slot = Arc::clone(lock(&self.slots).entry(id).or_default());
            let mut state = lock(&slot.0);
            match &*state {
                SlotState::Gone => continue,
                // Its users see the mount as dead; being published again gives them the new one.
                SlotState::Mounted(source) if !source.session.is_alive() => {
                    warn!(image.manifest = %id.manifest, "source mount is dead, mounting anew");
                    self.dismantle(id, &mut state);
                }
                SlotState::Mounted(_) | SlotState::Vacant => {}
            }
            let is_shared = matches!(&*state, SlotState::Mounted(_));
            let outcome = self.mounted(id, image, &mut state).and_then(|source| {
                if let Some(bind) = bind.take() {
                    bind(&self.mount_point(id), source.device)?;
                }
                source.users.insert(user);
                source.idle_since = None;
                Ok(())
            });
            match &outcome {
                Ok(()) if is_shared && id.kind == Kind::Served => {
                    drop(state);
                    self.mounter.share(image);
                }
                Ok(()) => {}
                Err(_) => self.retire_unused(id, &mut state),
            }
            return outcome;
        }
    }

    /// Makes `user` a user no more; the last one takes the source with it.
    pub(super) fn release(&self, manifest: ManifestDigest, user: PublicationId) {
        for (id, slot) in self.of_image(manifest) {
            let mut state = lock(&slot.0);
            if let SlotState::Mounted(source) = &mut *state
                && source.users.remove(&user)
            {
                self.retire_unused(id, &mut state);
            }
        }
    }

    /// The file system of the image's source that `user` uses, if it is served.
    pub(super) fn live(&self, manifest: ManifestDigest, user: PublicationId) -> Option<Device> {
        let mut slots = self.of_image(manifest);
        slots.find_map(|(_, slot)| match &*lock(&slot.0) {
            SlotState::Mounted(source)
                if source.users.contains(&user) && source.session.is_alive() =>
            {
                Some(source.device)
            }
            SlotState::Mounted(_) | SlotState::Vacant | SlotState::Gone => None,
        })
    }

    fn is_mounted(&self, id: SourceId) -> bool {
        let slot = lock(&self.slots).get(&id).cloned();
        slot.is_some_and(|it| matches!(&*lock(&it.0), SlotState::Mounted(_)))
    }

    /// The slots of an image's sources.
    fn of_image(&self, manifest: ManifestDigest) -> impl Iterator<Item = (SourceId, Arc<Slot>)> {
        let ids = Kind::ALL.map(|kind| SourceId { manifest, kind });
        let slots = lock(&self.slots);
        ids.map(|id| Some((id, Arc::clone(slots.get(&id)?))))
            .into_iter()
            .flatten()
    }

    /// The source in the slot, mounted first if there is none.
    fn mounted<'a>(
        &self,
        id: SourceId,
        image: &PreparedImage,
        state: &'a mut SlotState,
    ) -> Result<&'a mut Source, MountError> {
        if let SlotState::Vacant = state {
            let source = self.mount(id, image)?;
            self.gauges.add(id.kind, 1);
            *state = SlotState::Mounted(source);
        }
        match state {
            SlotState::Mounted(source) => Ok(source),
            SlotState::Vacant | SlotState::Gone => unreachable!("mounted above, never called gone"),
        }
    }

    fn mount(&self, id: SourceId, image: &PreparedImage) -> Result<Source, MountError> {
        let dir = self.mount_point(id);
        let mounted = fs::create_dir_all(&dir)
            .map_err(|err| MountError::system("creating", &dir, err))
            .and_then(|()| {
                let mounted = match id.kind {
                    Kind::Served => self.mounter.mount(image, &dir),
                    Kind::Kernel => self
                        .mounter
                        .mount_in_kernel(image, &dir)
                        .map(|()| Box::new(InKernel) as _),
                };
                mounted.map_err(|err| match err.kind() {
                    io::ErrorKind::NotConnected => MountError::NoServer {
                        image: image.manifest,
                        reason: err.to_string(),
                    },
                    _ => MountError::system("mounting the image at", &dir, err),
                })
            })
            .and_then(|session| {
                let device = device_at(&dir)
                    .map_err(|err| MountError::system("looking for the mount at", &dir, err))?;
                info!(image.manifest = %image.manifest, path = %dir.display(), "mounted image");
                Ok(Source {
                    session,
                    device,
                    users: HashSet::new(),
                    idle_since: None,
                })
            });
        if mounted.is_err() {
            self.clear(id);
        }
        mounted
    }

    /// Keeps a source that has lost its last user for the next one, or unmounts it.
    fn retire_unused(&self, id: SourceId, state: &mut SlotState) {
        if let SlotState::Mounted(source) = &mut *state {
            if !source.users.is_empty() {
                return;
            }
            if !self.max_idle.is_zero() && source.session.is_alive() {
                source.idle_since = Some(Instant::now());
                return;
            }
        }
        self.retire(id, state);
    }

    fn retire(&self, id: SourceId, state: &mut SlotState) {
        self.dismantle(id, state);
        *state = SlotState::Gone;
        lock(&self.slots).remove(&id);
    }

    /// Unmounts the slot's source, if there is one, and leaves the slot vacant.
    fn dismantle(&self, id: SourceId, state: &mut SlotState) {
        let SlotState::Mounted(source) = std::mem::take(state) else {
            return;
        };
        self.gauges.add(id.kind, -1);
        if let Err(err) = source.session.unmount(&self.mount_point(id)) {
            warn!(image.manifest = %id.manifest, error = %err, "unmounting a source failed, detaching it");
        }
        self.clear(id);
        info!(image.manifest = %id.manifest, "unmounted image");
    }

    /// Detaches what is left at a source's mount point, and removes its directories.
    fn clear(&self, id: SourceId) {
        let mount_point = self.mount_point(id);
        let cleared = bind::detach_all(&mount_point)
            .and_then(|()| remove(&mount_point))
            .and_then(|()| remove_source_dir(&self.source_dir(id.manifest)));
        if let Err(err) = cleared {
            // The next mount of the image uses the directories as they are.
            warn!(path = %mount_point.display(), error = %err, "source directory stays");
        }
    }

    fn source_dir(&self, manifest: ManifestDigest) -> PathBuf {
        self.dir.join(manifest.hex())
    }

    fn mount_point(&self, id: SourceId) -> PathBuf {
        self.source_dir(id.manifest).join(id.kind.mount_point())
    }
}

/// Removes an image's directory, unless it has a source of the other kind.
fn remove_source_dir(dir: &Path) -> io::Result<()> {
    match remove(dir) {
        Err(err) if err.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        removed => removed,
    }
}

/// The sources below `dir` that the kernel serves, whoever mounted them.
fn kernel_mounts(dir: &Path, info: &MountInfo) -> Vec<Survivor> {
    let found = info.below(dir).filter_map(|entry| {
        let (image, name) = (entry.mount_point.parent()?, entry.mount_point.file_name()?);
        let is_ours = entry.fs_type == erofs::FS_TYPE
            && name == Kind::Kernel.mount_point()
            && image.parent() == Some(dir);
        let manifest = digest::from_hex(image.file_name()?.to_str()?)?;
        is_ours.then(|| Survivor {
            manifest: ManifestDigest::from_bytes(manifest),
            device: entry.device,
            session: Box::new(InKernel),
        })
    });
    found.collect()
}

fn device_at(path: &Path) -> io::Result<Device> {
    let info = MountInfo::read()?;
    let entry = info.at(path).last();
    entry.map(|it| it.device).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "nothing is mounted there although the mount succeeded",
        )
    })
}

/// Detaches the source mounts that a former process left below `dir`, except those of `alive` and those that the
/// kernel serves, and removes their directories. Returns how many mounts there were.
///
/// What cannot be cleared is in nobody's way but its own image's, so it is logged and left.
///
/// # Errors
/// Those of reading mountinfo and of reading `dir`.
pub(super) fn clear_stale(dir: &Path, alive: &HashSet<Device>) -> io::Result<usize> {
    let info = MountInfo::read()?;
    let by_kernel: HashSet<_> = kernel_mounts(dir, &info)
        .iter()
        .map(|it| it.device)
        .collect();
    let mut n_stale = 0;
    // The latest first: it lies on top.
    for entry in info.below(dir).rev() {
        if alive.contains(&entry.device) || by_kernel.contains(&entry.device) {
            continue;
        }
        n_stale += 1;
        if let Err(err) = bind::detach(&entry.mount_point) {
            warn!(path = %entry.mount_point.display(), error = %err, "stale source mount stays");
        }
    }
    for entry in fs::read_dir(dir)? {
        let source_dir = entry?.path();
        if let Err(err) = remove_files(&source_dir) {
            warn!(path = %source_dir.display(), error = %err, "files of an unfinished mount stay");
        }
        // Read anew, as the mounts above are gone.
        let info = MountInfo::read()?;
        let mount_points = Kind::ALL.map(|it| source_dir.join(it.mount_point()));
        let (used, unused): (Vec<_>, Vec<_>) = mount_points
            .iter()
            .partition(|it| info.at(it).next().is_some());
        let removed = unused.into_iter().try_for_each(|it| remove(it));
        let removed = removed.and_then(|()| match used.is_empty() {
            true => remove(&source_dir),
            false => Ok(()),
        });
        if let Err(err) = removed {
            warn!(path = %source_dir.display(), error = %err, "stale source directory stays");
        }
    }
    Ok(n_stale)
}

/// Removes what a process left that ended while it mounted: files, which are the driver's own.
fn remove_files(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
