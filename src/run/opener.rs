//! Opens images for pods: parses what they ask for, resolves it, has the index made.

use std::{borrow::Cow, sync::Arc};

use super::{
    counted::Counted,
    engine::{Engine, Wanted},
};
use crate::{
    digest::ManifestDigest,
    index::image::ImageIndex,
    indexer::{IndexerError, OpenImage},
    mount::{ImageRequest, PrepareError, Progress, PullCredentials, PullPolicy, Usage},
    registry::{
        Credentials, DockerConfig, ImageRef, Platform, RegistryClient, Requester,
        ServiceAccountName, ServiceAccountTokens, VolumeRequester, VolumeSecret,
    },
    roles::{
        agent::{Held, Images},
        protocol::ReadyImage,
    },
    sys::{self, MappedFile},
    tier::{BlobSource, BoxFuture, LayerDesc},
    warm::{Warmer, Warms},
};

/// Opens images with an [`Engine`].
#[derive(Debug)]
pub(super) struct Opener {
    engine: Engine,
}

impl Opener {
    pub(super) fn new(engine: Engine) -> Self {
        Self { engine }
    }

    /// What opens images.
    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Resolves the image, and has what is needed of it made ready.
    pub(super) async fn open(
        &self,
        request: &ImageRequest,
        progress: &Arc<Progress>,
    ) -> Result<(ManifestDigest, OpenImage), PrepareError> {
        let wanted = wanted(request)?;
        let known = self.known(&wanted, request.pull_policy)?;
        if let Some(manifest) = known
            && request.pull_policy == Some(PullPolicy::Never)
            && self.engine.trust_pull_policy_never
        {
            return Ok((manifest, self.open_known(manifest, request).await?));
        }
        let registry = self.registry(request, &wanted.image)?;
        let Wanted {
            image,
            platform,
            requester,
            index_digest,
        } = wanted;
        progress.set_phase("asking the registry");
        // Also what the node knows: whether these credentials may have it.
        let at_known = known.map(|it| image.at_digest(it));
        let asked = at_known.as_ref().unwrap_or(&image);
        let resolved = registry.resolve(asked, &platform, &requester).await?;
        self.engine
            .references
            .note(&image, &platform, resolved.manifest);
        // What asked the registry does not run while layers are decompressed, which takes most.
        sys::drop_code();
        let paths = self.engine.store.paths();
        let missing = resolved.layers.iter();
        let is_here = |it: &LayerDesc| paths.layer(it.diff_id).exists();
        let missing =
            missing.filter(|it| !is_here(it) && !it.by_toc().is_some_and(|it| is_here(&it)));
        let missing: Vec<_> = missing.map(|it| it.blob_bytes).collect();
        progress.set_total(missing.iter().sum());
        progress.set_phase(format!(
            "fetching {} of {} layers",
            missing.len(),
            resolved.layers.len()
        ));
        let blobs: Arc<dyn BlobSource> = Arc::new(Counted {
            source: registry.image_blobs(&image, &requester, resolved.manifest, index_digest),
            progress: Arc::clone(progress),
        });
        let opened = self.engine.indexer.open(&resolved, &blobs).await?;
        Ok((resolved.manifest, opened))
    }

    /// What the node says that the image is, if that is wanted and it knows.
    fn known(
        &self,
        wanted: &Wanted,
        policy: Option<PullPolicy>,
    ) -> Result<Option<ManifestDigest>, PrepareError> {
        let known = || {
            let by_tag = || {
                self.engine
                    .references
                    .known(&wanted.image, &wanted.platform)
            };
            // As for kubelet: what was removed from the node is not present.
            let is_here = |it: &ManifestDigest| self.engine.store.paths().image(*it).exists();
            by_tag().filter(is_here)
        };
        match policy {
            None | Some(PullPolicy::Always) => Ok(None),
            Some(PullPolicy::IfNotPresent) => Ok(known()),
            Some(PullPolicy::Never) => known().map(Some).ok_or(PrepareError::NotPresent),
        }
    }

    /// Who is asked: plain http is for volumes that want it, and hosts that the configuration names.
    fn registry(
        &self,
        request: &ImageRequest,
        image: &ImageRef,
    ) -> Result<&RegistryClient, PrepareError> {
        if !request.insecure {
            return Ok(&self.engine.registry);
        }
        let insecure = &self.engine.insecure;
        let host = image.registry();
        if insecure
            .hosts
            .iter()
            .any(|it| it.eq_ignore_ascii_case(host))
        {
            return Ok(&insecure.registry);
        }
        Err(PrepareError::Invalid {
            field: Cow::Borrowed("insecure"),
            reason: format!(
                "plain http to {host} is not allowed: its operator adds it to registry.insecure_hosts"
            ),
        })
    }

    /// Opens an image that was made ready before, by this process or another one. Asks no registry, unless
    /// a layer is gone or damaged.
    pub(super) async fn open_known(
        &self,
        manifest: ManifestDigest,
        request: &ImageRequest,
    ) -> Result<OpenImage, PrepareError> {
        let wanted = wanted(request)?;
        let unusable = |err: &dyn std::fmt::Display| PrepareError::Internal {
            reason: format!("the index of image {manifest} in the cache: {err}"),
        };
        let pin = self.engine.store.paths().pin_image(manifest);
        let pin = pin.map_err(|err| unusable(&err))?;
        let mapped = MappedFile::new(&pin).map_err(|err| unusable(&err))?;
        let index = ImageIndex::open(mapped).map_err(|err| unusable(&err))?;
        let source = self.registry(request, &wanted.image)?.image_blobs(
            &wanted.image,
            &wanted.requester,
            manifest,
            wanted.index_digest,
        );
        let mut layers = Vec::new();
        for at in 0..index.n_layers() {
            let layer = index.layer(at).ok_or_else(|| unusable(&"it is damaged"))?;
            let desc = LayerDesc {
                diff_id: layer.diff_id,
                blob: layer.blob,
                blob_bytes: layer.blob_bytes,
                toc: None,
            };
            layers.push(self.engine.store.layer(&desc, Arc::clone(&source)).await?);
        }
        Ok(OpenImage { index, layers, pin })
    }

    /// Whether all of the image is on disk, and may stay there for as long as it is mounted.
    fn is_whole(&self, image: &OpenImage) -> bool {
        image.layers.iter().all(|it| it.is_whole()) && self.engine.store.has_room_for_mounted()
    }

    /// Keeps the layers and the index of an image, and has fetched ahead what the request wants of it.
    fn hold(&self, manifest: ManifestDigest, request: &ImageRequest, opened: OpenImage) -> Held {
        let OpenImage { layers, pin, .. } = opened;
        let image = self
            .engine
            .store
            .use_image(manifest, &layers, request.prefetch);
        Held {
            layers,
            index: Some(pin),
            image: Some(image),
        }
    }
}

/// Parses what a pod asks for.
fn wanted(request: &ImageRequest) -> Result<Wanted, PrepareError> {
    let invalid = |field, reason: String| PrepareError::Invalid {
        field: Cow::Borrowed(field),
        reason,
    };
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
    let secret = match &request.credentials {
        PullCredentials::None => None,
        PullCredentials::Basic { username, password } => {
            Some(VolumeSecret::Basic(Credentials::Basic {
                username: username.clone(),
                password: password.clone(),
            }))
        }
        PullCredentials::DockerConfig(config) => {
            let config = DockerConfig::parse(config.expose().as_bytes())
                .map_err(|err| invalid("nodePublishSecretRef", err.to_string()))?;
            Some(VolumeSecret::DockerConfig(config))
        }
    };
    let mut volume = VolumeRequester {
        secret,
        ..VolumeRequester::default()
    };
    if let Some(pod) = &request.pod {
        volume.pod = Some(ServiceAccountName {
            namespace: pod.namespace.clone(),
            name: pod.service_account.clone(),
        });
        let tokens = pod.tokens.expose();
        if !tokens.is_empty() {
            volume.tokens = ServiceAccountTokens::parse(tokens)
                .map_err(|err| invalid("csi.storage.k8s.io/serviceAccount.tokens", err))?;
        }
    }
    Ok(Wanted {
        image,
        platform,
        requester: Requester::Volume(volume),
        index_digest: request.index_digest,
    })
}

impl Warms for Opener {
    fn warmer(&self) -> Warmer<'_> {
        self.engine.warmer()
    }
}

/// How much the image holds.
pub(super) fn usage_of(image: &OpenImage) -> Usage {
    Usage {
        bytes: image.index.content_bytes(),
        inodes: image.index.n_nodes(),
    }
}

impl Images for Opener {
    fn prepare<'a>(
        &'a self,
        request: &'a ImageRequest,
        progress: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<(ReadyImage, Held), PrepareError>> {
        Box::pin(async move {
            let (manifest, opened) = self.open(request, progress).await?;
            let usage = usage_of(&opened);
            let ready = ReadyImage {
                manifest,
                usage,
                is_whole: self.is_whole(&opened),
            };
            Ok((ready, self.hold(manifest, request, opened)))
        })
    }

    fn adopt<'a>(
        &'a self,
        manifest: ManifestDigest,
        request: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<Held, PrepareError>> {
        Box::pin(async move {
            let opened = self.open_known(manifest, request).await?;
            Ok(self.hold(manifest, request, opened))
        })
    }
}

impl From<IndexerError> for PrepareError {
    fn from(err: IndexerError) -> Self {
        match err {
            IndexerError::Layer(err) => Self::Present(err),
            IndexerError::Merge {
                source: crate::index::IndexError::Limit { limit, max },
                ..
            } => Self::Limit {
                limit: limit.into(),
                max,
            },
            IndexerError::Merge { ref source, .. } => Self::Refused {
                reason: format!("{err}: {source}"),
            },
            IndexerError::Disk { .. } => Self::Internal {
                reason: err.to_string(),
            },
        }
    }
}
