//! Mounts images in this process: registry, cache, index and FUSE behind one seam.

use std::{any::Any, io, path::Path, sync::Arc};

use super::{
    counted::Counted,
    engine::{Engine, Wanted},
};
use crate::{
    config::FuseConfig,
    fs::ClipFs,
    fuse::{
        pool::{PoolConfig, ReadPool},
        session::{self, FuseMount, MountOptions},
    },
    indexer::{IndexerError, OpenImage},
    layer::store::LayerStore,
    mount::{
        ImageMounter, ImageRequest, PrepareError, PreparedImage, Progress, PullCredentials,
        SOURCE_NAME, SourceMount,
    },
    registry::{Credentials, DockerConfig, ImageRef, Platform},
    sys::MappedFile,
    tier::{BlobSource, BoxFuture, MakePresent},
};

/// Opens images with an [`Engine`] and serves them from this process.
#[derive(Debug)]
pub(super) struct InProcess {
    engine: Engine,
    pool: Arc<ReadPool>,
    fuse: FuseConfig,
}

impl InProcess {
    /// Starts the threads that read from the cache disk.
    pub(super) fn new(engine: Engine, fuse: FuseConfig) -> io::Result<Self> {
        let pool = ReadPool::new(PoolConfig {
            n_threads: fuse.read_threads,
            ..PoolConfig::default()
        })?;
        Ok(Self { engine, pool, fuse })
    }

    /// What opens images.
    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Makes an open image servable.
    pub(super) fn file_system(&self, image: OpenImage) -> anyhow::Result<Arc<Servable>> {
        let layers = image.layers.into_iter().map(|it| it as _).collect();
        Ok(Arc::new(ClipFs::new(
            image.index,
            layers,
            self.engine.metrics.clone(),
        )?))
    }

    /// Mounts it at `dir` and serves it until it is unmounted.
    pub(super) fn serve(&self, image: &Arc<Servable>, dir: &Path) -> io::Result<FuseMount> {
        let options = MountOptions {
            fs_name: SOURCE_NAME.to_owned(),
            n_threads: self.fuse.threads_per_mount,
            read_ahead_kib: self.fuse.read_ahead_kib,
        };
        let store: LayerStore = self.engine.store.clone();
        let provider: Arc<dyn MakePresent> = Arc::new(store);
        session::mount(
            Arc::clone(image),
            provider,
            Arc::clone(&self.pool),
            dir,
            &options,
        )
        .map_err(io::Error::other)
    }

    /// Parses what a pod asks for. A secret of its own counts alone, the node's otherwise.
    fn wanted(&self, request: &ImageRequest) -> Result<Wanted, PrepareError> {
        let invalid = |field, reason: String| PrepareError::Invalid { field, reason };
        let image: ImageRef = request
            .image
            .parse()
            .map_err(|err| invalid("image", format!("{err}")))?;
        let platform = match &request.platform {
            Some(text) => text
                .parse()
                .map_err(|err| invalid("platform", format!("{err}")))?,
            None => Platform::host(),
        };
        let credentials = match &request.credentials {
            PullCredentials::None => self.engine.registry.node_credentials(&image),
            PullCredentials::Basic { username, password } => Credentials::Basic {
                username: username.clone(),
                password: password.clone(),
            },
            PullCredentials::DockerConfig(config) => DockerConfig::parse(config.expose())
                .map_err(|err| invalid("nodePublishSecretRef", err.to_string()))?
                .for_image(&image),
        };
        Ok(Wanted {
            image,
            platform,
            credentials,
        })
    }

    async fn open(
        &self,
        request: &ImageRequest,
        progress: &Arc<Progress>,
    ) -> Result<PreparedImage, PrepareError> {
        let Wanted {
            image,
            platform,
            credentials,
        } = self.wanted(request)?;
        progress.set_phase("asking the registry");
        let resolved = self
            .engine
            .registry
            .resolve(&image, &platform, &credentials)
            .await?;
        let paths = self.engine.store.paths();
        let missing = resolved.layers.iter();
        let missing = missing.filter(|it| !paths.layer(it.diff_id).exists());
        let missing: Vec<_> = missing.map(|it| it.blob_bytes).collect();
        progress.set_total(missing.iter().sum());
        progress.set_phase(format!(
            "fetching {} of {} layers",
            missing.len(),
            resolved.layers.len()
        ));
        let blobs: Arc<dyn BlobSource> = Arc::new(Counted {
            source: self.engine.registry.blobs(&image, &credentials),
            progress: Arc::clone(progress),
        });
        let opened = self.engine.indexer.open(&resolved, &blobs).await?;
        let fs = self
            .file_system(opened)
            .map_err(|err| PrepareError::Internal {
                reason: err.to_string(),
            })?;
        Ok(PreparedImage {
            manifest: resolved.manifest,
            token: fs,
        })
    }
}

/// An image's file system.
pub(super) type Servable = ClipFs<MappedFile>;

impl ImageMounter for InProcess {
    fn prepare<'a>(
        &'a self,
        request: &'a ImageRequest,
        progress: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<PreparedImage, PrepareError>> {
        Box::pin(self.open(request, progress))
    }

    fn mount(&self, image: &PreparedImage, dir: &Path) -> io::Result<Box<dyn SourceMount>> {
        let token: Arc<dyn Any + Send + Sync> = Arc::clone(&image.token);
        let fs: Arc<Servable> = token
            .downcast()
            .map_err(|_| io::Error::other("the image was prepared by somebody else"))?;
        Ok(Box::new(Served(self.serve(&fs, dir)?)))
    }
}

/// A source mount that this process serves.
#[derive(Debug)]
struct Served(FuseMount);

impl SourceMount for Served {
    fn is_alive(&self) -> bool {
        !self.0.has_ended()
    }

    fn unmount(self: Box<Self>) -> io::Result<()> {
        // A source that is still bound somewhere is served until that bind goes.
        let _ = self.0.unmount();
        Ok(())
    }
}

impl From<IndexerError> for PrepareError {
    fn from(err: IndexerError) -> Self {
        match err {
            IndexerError::Layer(err) => Self::Present(err),
            IndexerError::Merge {
                source: crate::index::IndexError::Limit { limit, max },
                ..
            } => Self::Limit { limit, max },
            IndexerError::Merge { ref source, .. } => Self::Refused {
                reason: format!("{err}: {source}"),
            },
            IndexerError::Disk { .. } => Self::Internal {
                reason: err.to_string(),
            },
        }
    }
}
