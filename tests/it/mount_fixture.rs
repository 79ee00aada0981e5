//! A mount table over a fake image mounter, whose source mounts are real: a tmpfs each.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use clip_csi::{
    digest::ManifestDigest,
    disk,
    metrics::Metrics,
    mount::{
        ImageMounter, ImageRequest, MountInfo, MountTable, MountTableConfig, PrepareError,
        PreparedImage, Progress, PublishRequest, PullCredentials, Recovered, Sharing, SourceMount,
        Survivor, TargetPath, UnpublishRequest, Usage, View, VolumeId,
    },
    tier::BoxFuture,
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::sync::Semaphore;

use crate::fuse_fakes::LayerText;

/// Says why a test that mounts does not run here, if so.
pub(crate) fn mounts_refused() -> Option<io::Error> {
    let dir = tempfile::tempdir().unwrap();
    match mount("none", dir.path(), "tmpfs", MountFlags::empty(), None) {
        Ok(()) => {
            unmount(dir.path(), UnmountFlags::DETACH).unwrap();
            None
        }
        Err(err) => Some(err.into()),
    }
}

/// Returns from the test, saying so, where mounts are not permitted.
macro_rules! skip_without_mounts {
    ($name:literal) => {
        if let Some(err) = crate::mount_fixture::mounts_refused() {
            eprintln!("SKIP {}: mount(2): {err}", $name);
            return;
        }
    };
}
pub(crate) use skip_without_mounts;

/// A directory that is unmounted and removed in the end, whatever happens.
#[derive(Debug)]
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// As mountinfo has it.
    pub(crate) fn path(&self) -> PathBuf {
        self.0.path().canonicalize().unwrap()
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.path().join("state")
    }

    /// A target whose parent exists, as kubelet leaves it.
    pub(crate) fn target(&self, pod: &str) -> PathBuf {
        let parent = self.path().join("pods").join(pod);
        fs::create_dir_all(&parent).unwrap();
        parent.join("mount")
    }

    /// Paths relative to the directory where something is mounted.
    pub(crate) fn mounted(&self) -> Vec<PathBuf> {
        let root = self.path();
        let info = MountInfo::read().unwrap();
        let mut mounted: Vec<_> = info
            .below(&root)
            .map(|it| it.mount_point.strip_prefix(&root).unwrap().to_owned())
            .collect();
        mounted.sort();
        mounted
    }

    /// Names in a directory of the state, sorted.
    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.state_dir().join(dir))
            .unwrap()
            .map(|it| it.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn recover(
        &self,
        mounter: &Arc<FakeMounter>,
        metrics: &Metrics,
    ) -> (MountTable, Recovered) {
        MountTable::recover(self.config(), Arc::clone(mounter) as _, metrics).unwrap()
    }

    pub(crate) fn config(&self) -> MountTableConfig {
        MountTableConfig {
            state_dir: self.state_dir(),
            // Long enough for what is not held up on purpose, on a busy machine.
            prepare_wait: Duration::from_millis(400),
            max_idle: Duration::ZERO,
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let Ok(info) = MountInfo::read() else { return };
        for entry in info.below(&self.path()).rev() {
            // The directory cannot be removed then, which the test's output shows.
            let _ = unmount(&entry.mount_point, UnmountFlags::DETACH);
        }
    }
}

/// Prepares any image at once, unless told otherwise.
#[derive(Debug)]
pub(crate) struct FakeMounter {
    /// What was prepared.
    pub(crate) prepared: Mutex<Vec<ImageRequest>>,
    /// Whose rights mounted images were to be read with.
    pub(crate) renewed: Mutex<Vec<(ManifestDigest, ImageRequest)>>,
    /// Images whose mount another volume was given, too.
    pub(crate) shared: Mutex<Vec<ManifestDigest>>,
    /// How often something was mounted.
    pub(crate) n_mounts: AtomicUsize,
    /// What fails, by image.
    pub(crate) failures: Mutex<HashMap<String, PrepareError>>,
    /// Lets one preparation of an image whose name starts with `slow` go on, per permit.
    pub(crate) gate: Semaphore,
    /// Whether mounts fail.
    pub(crate) mount_fails: AtomicBool,
    /// Whether those of the kernel's own file system do.
    pub(crate) kernel_fails: AtomicBool,
    /// How often one was to be made.
    pub(crate) n_kernel_mounts: AtomicUsize,
    /// Whether images are whole on disk.
    pub(crate) is_whole: AtomicBool,
    /// Whether the "process" dies without unmounting.
    pub(crate) crashed: Arc<AtomicBool>,
    /// Whether the sources are served.
    pub(crate) alive: Arc<AtomicBool>,
}

impl FakeMounter {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            prepared: Mutex::default(),
            renewed: Mutex::default(),
            shared: Mutex::default(),
            n_mounts: AtomicUsize::new(0),
            failures: Mutex::default(),
            gate: Semaphore::new(0),
            mount_fails: AtomicBool::new(false),
            kernel_fails: AtomicBool::new(false),
            n_kernel_mounts: AtomicUsize::new(0),
            is_whole: AtomicBool::new(false),
            crashed: Arc::default(),
            alive: Arc::new(AtomicBool::new(true)),
        })
    }

    pub(crate) fn n_prepared(&self) -> usize {
        self.prepared.lock().unwrap().len()
    }

    pub(crate) fn n_mounts(&self) -> usize {
        self.n_mounts.load(Ordering::SeqCst)
    }

    pub(crate) fn fail(&self, image: &str, with: impl Into<PrepareError>) {
        self.failures
            .lock()
            .unwrap()
            .insert(image.to_owned(), with.into());
    }
}

/// How much every image of the fake holds.
pub(crate) const USAGE: Usage = Usage {
    bytes: 5000,
    inodes: 7,
};

/// The manifest that the fake resolves an image to.
pub(crate) fn manifest(image: &str) -> ManifestDigest {
    ManifestDigest::of(image.as_bytes())
}

impl ImageMounter for FakeMounter {
    fn prepare<'a>(
        &'a self,
        request: &'a ImageRequest,
        progress: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<PreparedImage, PrepareError>> {
        Box::pin(async move {
            self.prepared.lock().unwrap().push(request.clone());
            if request.image.starts_with("slow") {
                progress.set_phase("streaming layer 1 of 2");
                progress.set_total(60_000_000);
                progress.add_done(20_000_000);
                self.gate.acquire().await.unwrap().forget();
            }
            assert_ne!(request.image, "panic", "told to panic");
            if let Some(failure) = self.failures.lock().unwrap().get(&request.image) {
                return Err(failure.clone());
            }
            Ok(PreparedImage {
                manifest: manifest(&request.image),
                usage: USAGE,
                is_whole: self.is_whole.load(Ordering::SeqCst),
                token: Arc::new(request.image.clone()),
            })
        })
    }

    fn mount(&self, image: &PreparedImage, dir: &Path) -> io::Result<Box<dyn SourceMount>> {
        if self.mount_fails.load(Ordering::SeqCst) {
            return Err(io::Error::other("no /dev/fuse"));
        }
        mount("fake", dir, "tmpfs", MountFlags::empty(), None)?;
        self.n_mounts.fetch_add(1, Ordering::SeqCst);
        let name: &String = image.token.downcast_ref().unwrap();
        disk::publish(&dir.join("image"), name.as_bytes())?;
        fs::create_dir_all(dir.join("usr/share"))?;
        disk::publish(&dir.join("usr/share/words"), b"a")?;
        std::os::unix::fs::symlink("/", dir.join("out"))?;
        Ok(Box::new(FakeSource {
            dir: dir.to_owned(),
            crashed: Arc::clone(&self.crashed),
            alive: Arc::clone(&self.alive),
        }))
    }

    fn mount_in_kernel(&self, image: &PreparedImage, dir: &Path) -> io::Result<()> {
        self.n_kernel_mounts.fetch_add(1, Ordering::SeqCst);
        if self.kernel_fails.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let name: &String = image.token.downcast_ref().unwrap();
        let mut layer = LayerText::default();
        layer.file("image", name.as_bytes());
        let files = tempfile::tempdir()?;
        crate::erofs::mount_at(dir, files.path(), vec![layer])
    }

    fn renew<'a>(
        &'a self,
        manifest: ManifestDigest,
        request: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<(), PrepareError>> {
        Box::pin(async move {
            let renewed = (manifest, request.clone());
            self.renewed.lock().unwrap().push(renewed);
            let failures = self.failures.lock().unwrap();
            failures.get(&request.image).cloned().map_or(Ok(()), Err)
        })
    }

    fn share(&self, image: &PreparedImage) {
        self.shared.lock().unwrap().push(image.manifest);
    }

    fn survivors(&self) -> Vec<Survivor> {
        Vec::new()
    }
}

#[derive(Debug)]
struct FakeSource {
    dir: PathBuf,
    crashed: Arc<AtomicBool>,
    alive: Arc<AtomicBool>,
}

impl SourceMount for FakeSource {
    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::SeqCst)
    }

    fn unmount(self: Box<Self>, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for FakeSource {
    fn drop(&mut self) {
        if !self.crashed.load(Ordering::SeqCst) {
            unmount(&self.dir, UnmountFlags::DETACH).unwrap();
        }
    }
}

pub(crate) fn publish_request(volume: &str, target: &Path, image: &str) -> PublishRequest {
    PublishRequest {
        volume: VolumeId::parse(volume).unwrap(),
        target: TargetPath::parse(target.to_str().unwrap()).unwrap(),
        image: ImageRequest {
            image: image.to_owned(),
            platform: None,
            index_digest: None,
            prefetch: None,
            pull_policy: None,
            insecure: false,
            credentials: PullCredentials::None,
            pod: None,
        },
        view: View::default(),
        sharing: Sharing::Many,
    }
}

pub(crate) fn unpublish_request(volume: &str, target: &Path) -> UnpublishRequest {
    UnpublishRequest {
        volume: VolumeId::parse(volume).unwrap(),
        target: TargetPath::parse(target.to_str().unwrap()).unwrap(),
    }
}
