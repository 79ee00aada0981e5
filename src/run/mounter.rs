//! Mounts images in this process: registry, cache, index and FUSE behind one seam.

use std::{
    any::Any,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    engine::Engine,
    opener::{Opener, usage_of},
};
use crate::{
    config::FuseConfig,
    digest::ManifestDigest,
    fs::ClipFs,
    fuse::{
        pool::{PoolConfig, ReadPool},
        session::{self, FuseMount, MountOptions},
    },
    indexer::OpenImage,
    layer::images::ImageUse,
    mount::{
        ImageMounter, ImageRequest, PrepareError, PreparedImage, Progress, SOURCE_NAME,
        SourceMount, Survivor,
    },
    sys::MappedFile,
    tier::BoxFuture,
};

/// Opens images with an [`Engine`] and serves them from this process.
#[derive(Debug)]
pub(super) struct InProcess {
    opener: Opener,
    pool: Arc<ReadPool>,
    fuse: FuseConfig,
    n_served: AtomicU64,
}

impl InProcess {
    /// Starts the threads that read from the cache disk.
    pub(super) fn new(engine: Engine, fuse: FuseConfig) -> io::Result<Self> {
        let pool = ReadPool::new(PoolConfig {
            n_threads: fuse.read_threads,
            ..PoolConfig::default()
        })?;
        Ok(Self {
            opener: Opener::new(engine),
            pool,
            fuse,
            n_served: AtomicU64::new(0),
        })
    }

    /// What opens images.
    pub(super) fn engine(&self) -> &Engine {
        self.opener.engine()
    }

    /// Makes an open image servable.
    pub(super) fn file_system(&self, image: OpenImage) -> anyhow::Result<Arc<Servable>> {
        let layers = image.layers.into_iter().map(|it| it as _).collect();
        Ok(Arc::new(ClipFs::new(
            image.index,
            layers,
            self.engine().metrics.clone(),
        )?))
    }

    /// Mounts it at `dir` and serves it until it is unmounted.
    pub(super) fn serve(&self, image: &Arc<Servable>, dir: &Path) -> io::Result<FuseMount> {
        let options = MountOptions {
            fs_name: SOURCE_NAME.to_owned(),
            n_threads: self.fuse.threads_per_mount,
            read_ahead_kib: self.fuse.read_ahead_kib,
        };
        let number = self.n_served.fetch_add(1, Ordering::Relaxed);
        let provider = self.engine().store.of_mount(number);
        session::mount(
            Arc::clone(image),
            provider,
            Arc::clone(&self.pool),
            dir,
            &options,
        )
        .map_err(io::Error::other)
    }
}

/// An image's file system.
pub(super) type Servable = ClipFs<MappedFile>;

/// An image that is ready to be mounted.
#[derive(Debug)]
struct Prepared {
    fs: Arc<Servable>,
    image: ImageUse,
}

impl ImageMounter for InProcess {
    fn prepare<'a>(
        &'a self,
        request: &'a ImageRequest,
        progress: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<PreparedImage, PrepareError>> {
        Box::pin(async move {
            let (manifest, opened) = self.opener.open(request, progress).await?;
            let usage = usage_of(&opened);
            let store = &self.engine().store;
            let image = store.use_image(manifest, &opened.layers, request.prefetch);
            let fs = self
                .file_system(opened)
                .map_err(|err| PrepareError::Internal {
                    reason: err.to_string(),
                })?;
            Ok(PreparedImage {
                manifest,
                usage,
                is_whole: false,
                token: Arc::new(Prepared { fs, image }),
            })
        })
    }

    fn mount(&self, image: &PreparedImage, dir: &Path) -> io::Result<Box<dyn SourceMount>> {
        let token: Arc<dyn Any + Send + Sync> = Arc::clone(&image.token);
        let prepared: Arc<Prepared> = token
            .downcast()
            .map_err(|_| io::Error::other("the image was prepared by somebody else"))?;
        Ok(Box::new(Served {
            mount: self.serve(&prepared.fs, dir)?,
            _image: prepared.image.clone(),
        }))
    }

    fn mount_in_kernel(&self, _: &PreparedImage, _: &Path) -> io::Result<()> {
        // All is served from here.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn renew<'a>(
        &'a self,
        manifest: ManifestDigest,
        request: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<(), PrepareError>> {
        // The layers that are open are given the source that comes with it.
        Box::pin(async move { self.opener.open_known(manifest, request).await.map(drop) })
    }

    fn share(&self, _: &PreparedImage) {
        // The layers that are open were given the source when the image was prepared.
    }

    fn survivors(&self) -> Vec<Survivor> {
        // What this process serves ends with it.
        Vec::new()
    }
}

/// A source mount that this process serves.
#[derive(Debug)]
struct Served {
    mount: FuseMount,
    /// What is fetched ahead is so until it is unmounted.
    _image: ImageUse,
}

impl SourceMount for Served {
    fn is_alive(&self) -> bool {
        !self.mount.has_ended()
    }

    fn unmount(self: Box<Self>, _: &Path) -> io::Result<()> {
        // A source that is still bound somewhere is served until that bind goes.
        let _ = self.mount.unmount();
        Ok(())
    }
}
