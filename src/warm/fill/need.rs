//! Finds out what an image is made of, and what of it will come.

use std::{collections::HashSet, sync::Arc};

use super::{Filling, Origin};
use crate::{
    layer::store::Layer,
    registry::{ImageDocuments, ResolvedImage},
    remote::{Answer, ContentCache, Trust},
    tier::LayerDesc,
    warm::{WarmError, WarmWhat},
};

/// What is known of the layers before any of them is fetched.
#[derive(Debug, Default)]
pub(super) struct Need {
    /// Of each layer that the disk lacks: bytes that come with its index.
    pub(super) absent_bytes: Vec<Option<u64>>,
    /// What the disk has of them: open, so that it is not evicted to make room for the rest.
    pub(super) on_disk: Vec<Arc<Layer>>,
    /// Bytes that come in all, as far as that is known.
    pub(super) bytes: u64,
}

/// `image` as if its layers had no tables of contents: it was put into the remote so.
fn by_diff_ids(mut image: ResolvedImage) -> ResolvedImage {
    image.layers.iter_mut().for_each(|it| it.toc = None);
    image
}

impl Filling<'_> {
    /// What the image is made of: as the disk knows it, or the remote, or its registry.
    pub(super) async fn resolved(&self) -> Result<ResolvedImage, WarmError> {
        let manifest = self.request.manifest;
        if let Some(layers) = self.warmer.indexer.known_layers(manifest).await {
            return Ok(ResolvedImage { manifest, layers });
        }
        let registry = self.warmer.registry;
        let found = match self.warmer.store.remote() {
            Some(cache) => self.documents(cache).await,
            None => Err(WarmError::NoRemote),
        };
        match (&self.request.origin, found) {
            (_, Ok(documents)) => {
                let resolved = documents.resolved(registry.document_limits());
                let resolved = resolved.map_err(|err| self.refused(err.to_string()));
                resolved.map(by_diff_ids)
            }
            (Origin::Remote, Err(err)) => Err(err),
            (
                Origin::Registry {
                    image,
                    platform,
                    requester,
                },
                Err(_),
            ) => {
                let image = image.at_digest(manifest);
                let resolved = registry.resolve(&image, platform, requester).await;
                resolved.map(by_diff_ids).map_err(WarmError::Registry)
            }
        }
    }

    async fn documents(&self, cache: &ContentCache) -> Result<ImageDocuments, WarmError> {
        let limits = self.warmer.registry.document_limits();
        let manifest = cache.image_manifest(&self.request.manifest, limits.max_bytes);
        let manifest = self.answered(cache, manifest.await, "the manifest")?;
        let config = ImageDocuments::config_of(&manifest, limits);
        let config = config.map_err(|err| self.refused(err.to_string()))?;
        let config = cache.image_config(&config, limits.max_bytes);
        let config = self.answered(cache, config.await, "the configuration")?;
        Ok(ImageDocuments { manifest, config })
    }

    /// Finds out what will come. Fails where it cannot.
    pub(super) async fn need(&self, image: &ResolvedImage) -> Result<Need, WarmError> {
        let all = self.request.what == WarmWhat::All;
        let mut need = Need::default();
        let mut seen = HashSet::new();
        for desc in &image.layers {
            // Some images have a layer twice.
            if !seen.insert(desc.diff_id) {
                need.absent_bytes.push(None);
                continue;
            }
            let store = self.warmer.store;
            let on_disk = store.layer_on_disk(desc, Arc::clone(&self.source));
            let on_disk = on_disk.map_err(|err| self.failed(err, 0))?;
            let (absent_bytes, later_bytes) = match &on_disk {
                Some(layer) if all => {
                    let file = layer.file();
                    (None, file.absent_bytes())
                }
                Some(_) => (None, 0),
                None => {
                    let (absent_bytes, later_bytes) = self.need_of_absent(desc).await?;
                    (Some(absent_bytes), if all { later_bytes } else { 0 })
                }
            };
            need.absent_bytes.push(absent_bytes);
            need.on_disk.extend(on_disk);
            let bytes = absent_bytes.unwrap_or(0).saturating_add(later_bytes);
            need.bytes = need.bytes.saturating_add(bytes);
        }
        Ok(need)
    }

    /// Bytes that come with the index of a layer that the disk lacks, and bytes that are left then.
    async fn need_of_absent(&self, desc: &LayerDesc) -> Result<(u64, u64), WarmError> {
        let may_ask_registry = matches!(self.request.origin, Origin::Registry { .. });
        let Some(cache) = self.warmer.store.remote() else {
            return match may_ask_registry {
                true => Ok((desc.blob_bytes, 0)),
                false => Err(WarmError::NoRemote),
            };
        };
        match cache.ask_manifest(&desc.diff_id).await {
            Answer::Has(it) => Ok(match it.trust {
                Trust::Authenticated => (it.index_bytes, it.layer_bytes),
                Trust::Unverified => (it.layer_bytes.saturating_add(it.index_bytes), 0),
            }),
            // How large it becomes is not known.
            _ if may_ask_registry => Ok((desc.blob_bytes, 0)),
            lacking => {
                let what = format!("layer {}", desc.diff_id);
                self.answered(cache, lacking, &what).map(|_| (0, 0))
            }
        }
    }
}
