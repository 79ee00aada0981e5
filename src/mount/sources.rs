//! Keeps one source mount per image, for as long as somebody uses it.
//!
//! Each image has a slot with a lock of its own, so that a mount that hangs stops only those who
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
use crate::digest::ManifestDigest;

/// Name of the mount point in a source's directory.
const MOUNT_POINT: &str = "mnt";

/// The source mounts of this process.
#[derive(Debug)]
pub(super) struct Sources {
    dir: PathBuf,
    mounter: Arc<dyn ImageMounter>,
    gauge: IntGauge,
    /// How long a source without users is kept for the next one.
    max_idle: Duration,
    /// std Mutex: held for a map lookup. May be taken while a slot is held, not the reverse.
    slots: Mutex<HashMap<ManifestDigest, Arc<Slot>>>,
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
        gauge: IntGauge,
        max_idle: Duration,
    ) -> Self {
        Self {
            dir,
            mounter,
            gauge,
            max_idle,
            slots: Mutex::default(),
        }
    }

    /// Takes the source mounts over that a former process made and another one serves. Those that are
    /// not mounted where they should be end with their last user.
    pub(super) fn adopt(&self, survivors: Vec<Survivor>, info: &MountInfo) {
        for survivor in survivors {
            let mount_point = self.mount_point(survivor.manifest);
            let topmost = info.at(&mount_point).last().map(|it| it.device);
            if topmost != Some(survivor.device) || !survivor.session.is_alive() {
                info!(image.manifest = %survivor.manifest, "a mount survived that is bound to volumes only");
                continue;
            }
            let source = Source {
                session: survivor.session,
                device: survivor.device,
                users: HashSet::new(),
                idle_since: Some(Instant::now()),
            };
            self.gauge.inc();
            info!(image.manifest = %survivor.manifest, path = %mount_point.display(), "a mount survived");
            let slot = Arc::new(Slot(Mutex::new(SlotState::Mounted(source))));
            lock(&self.slots).insert(survivor.manifest, slot);
        }
    }

    /// Makes `user` a user of the source if `device` is its file system; says whether it is.
    pub(super) fn rejoin(
        &self,
        manifest: ManifestDigest,
        device: Device,
        user: PublicationId,
    ) -> bool {
        let Some(slot) = lock(&self.slots).get(&manifest).cloned() else {
            return false;
        };
        match &mut *lock(&slot.0) {
            SlotState::Mounted(source) if source.device == device => {
                source.users.insert(user);
                source.idle_since = None;
                true
            }
            SlotState::Mounted(_) | SlotState::Vacant | SlotState::Gone => false,
        }
    }

    /// Unmounts the sources that nobody has used for `max_idle`.
    pub(super) fn retire_idle(&self, max_idle: Duration) {
        let slots: Vec<_> = {
            let slots = lock(&self.slots);
            slots
                .iter()
                .map(|(manifest, it)| (*manifest, Arc::clone(it)))
                .collect()
        };
        for (manifest, slot) in slots {
            let mut state = lock(&slot.0);
            let is_idle = |it: Instant| max_idle <= it.elapsed();
            if matches!(&*state, SlotState::Mounted(source) if source.idle_since.is_some_and(is_idle))
            {
                self.retire(manifest, &mut state);
            }
        }
    }

    /// Makes `user` a user of the image's source, mounting it first if nobody has, and binds it.
    ///
    /// # Errors
    /// Those of the mount and of `bind`; then `user` is none, and a source without users is gone.
    pub(super) fn attach(
        &self,
        image: &PreparedImage,
        user: PublicationId,
        bind: impl FnOnce(&Path, Device) -> Result<(), MountError>,
    ) -> Result<(), MountError> {
        let manifest = image.manifest;
        loop {
            let slot = Arc::clone(lock(&self.slots).entry(manifest).or_default());
            let mut state = lock(&slot.0);
            match &*state {
                SlotState::Gone => continue,
                // Its users see the mount as dead; being published again gives them the new one.
                SlotState::Mounted(source) if !source.session.is_alive() => {
                    warn!(image.manifest = %manifest, "source mount is dead, mounting anew");
                    self.dismantle(manifest, &mut state);
                }
                SlotState::Mounted(_) | SlotState::Vacant => {}
            }
            let outcome = self.mounted(image, &mut state).and_then(|source| {
                bind(&self.mount_point(manifest), source.device)?;
                source.users.insert(user);
                source.idle_since = None;
                Ok(())
            });
            if outcome.is_err() {
                self.retire_unused(manifest, &mut state);
            }
            return outcome;
        }
    }

    /// Makes `user` a user no more; the last one takes the source with it.
    pub(super) fn release(&self, manifest: ManifestDigest, user: PublicationId) {
        let Some(slot) = lock(&self.slots).get(&manifest).cloned() else {
            return;
        };
        let mut state = lock(&slot.0);
        if let SlotState::Mounted(source) = &mut *state {
            source.users.remove(&user);
            self.retire_unused(manifest, &mut state);
        }
    }

    /// The file system of the image's source, if `user` uses it and it is served.
    pub(super) fn live(&self, manifest: ManifestDigest, user: PublicationId) -> Option<Device> {
        let slot = lock(&self.slots).get(&manifest).cloned()?;
        let state = lock(&slot.0);
        match &*state {
            SlotState::Mounted(source)
                if source.users.contains(&user) && source.session.is_alive() =>
            {
                Some(source.device)
            }
            SlotState::Mounted(_) | SlotState::Vacant | SlotState::Gone => None,
        }
    }

    /// The source in the slot, mounted first if there is none.
    fn mounted<'a>(
        &self,
        image: &PreparedImage,
        state: &'a mut SlotState,
    ) -> Result<&'a mut Source, MountError> {
        if let SlotState::Vacant = state {
            let source = self.mount(image)?;
            self.gauge.inc();
            *state = SlotState::Mounted(source);
        }
        match state {
            SlotState::Mounted(source) => Ok(source),
            SlotState::Vacant | SlotState::Gone => unreachable!("mounted above, never called gone"),
        }
    }

    fn mount(&self, image: &PreparedImage) -> Result<Source, MountError> {
        let dir = self.mount_point(image.manifest);
        let mounted = fs::create_dir_all(&dir)
            .map_err(|err| MountError::system("creating", &dir, err))
            .and_then(|()| {
                self.mounter
                    .mount(image, &dir)
                    .map_err(|err| match err.kind() {
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
            self.clear(image.manifest);
        }
        mounted
    }

    /// Keeps a source that has lost its last user for the next one, or unmounts it.
    fn retire_unused(&self, manifest: ManifestDigest, state: &mut SlotState) {
        if let SlotState::Mounted(source) = &mut *state {
            if !source.users.is_empty() {
                return;
            }
            if !self.max_idle.is_zero() && source.session.is_alive() {
                source.idle_since = Some(Instant::now());
                return;
            }
        }
        self.retire(manifest, state);
    }

    fn retire(&self, manifest: ManifestDigest, state: &mut SlotState) {
        self.dismantle(manifest, state);
        *state = SlotState::Gone;
        lock(&self.slots).remove(&manifest);
    }

    /// Unmounts the slot's source, if there is one, and leaves the slot vacant.
    fn dismantle(&self, manifest: ManifestDigest, state: &mut SlotState) {
        let SlotState::Mounted(source) = std::mem::take(state) else {
            return;
        };
        self.gauge.dec();
        if let Err(err) = source.session.unmount(&self.mount_point(manifest)) {
            warn!(image.manifest = %manifest, error = %err, "unmounting a source failed, detaching it");
        }
        self.clear(manifest);
        info!(image.manifest = %manifest, "unmounted image");
    }

    /// Detaches what is left at a source's mount point, and removes its directories.
    fn clear(&self, manifest: ManifestDigest) {
        let mount_point = self.mount_point(manifest);
        let cleared = bind::detach_all(&mount_point)
            .and_then(|()| remove(&mount_point))
            .and_then(|()| remove(&self.source_dir(manifest)));
        if let Err(err) = cleared {
            // The next mount of the image uses the directories as they are.
            warn!(path = %mount_point.display(), error = %err, "source directory stays");
        }
    }

    fn source_dir(&self, manifest: ManifestDigest) -> PathBuf {
        self.dir.join(manifest.hex())
    }

    fn mount_point(&self, manifest: ManifestDigest) -> PathBuf {
        self.source_dir(manifest).join(MOUNT_POINT)
    }
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

/// Detaches the source mounts that a former process left below `dir`, except those of `alive`, and
/// removes their directories. Returns how many mounts there were.
///
/// What cannot be cleared is in nobody's way but its own image's, so it is logged and left.
///
/// # Errors
/// Those of reading mountinfo and of reading `dir`.
pub(super) fn clear_stale(dir: &Path, alive: &HashSet<Device>) -> io::Result<usize> {
    let info = MountInfo::read()?;
    let mut n_stale = 0;
    // The latest first: it lies on top.
    for entry in info.below(dir).rev() {
        if alive.contains(&entry.device) {
            continue;
        }
        n_stale += 1;
        if let Err(err) = bind::detach(&entry.mount_point) {
            warn!(path = %entry.mount_point.display(), error = %err, "stale source mount stays");
        }
    }
    for entry in fs::read_dir(dir)? {
        let source_dir = entry?.path();
        // Read anew, as the mounts above are gone.
        if MountInfo::read()?
            .at(&source_dir.join(MOUNT_POINT))
            .next()
            .is_some()
        {
            continue;
        }
        let removed = remove(&source_dir.join(MOUNT_POINT)).and_then(|()| remove(&source_dir));
        if let Err(err) = removed {
            warn!(path = %source_dir.display(), error = %err, "stale source directory stays");
        }
    }
    Ok(n_stale)
}
