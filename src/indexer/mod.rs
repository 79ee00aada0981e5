//! Builds an image's index from its layers.
//!
//! The layers' own indexes come from wherever the layer store finds them; merging them is cheap and
//! deterministic, so an image's index is never fetched, only kept: `images/<manifest-hex>.clip` in
//! the cache directory.

pub mod rebuild;

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use futures_util::future;
use tokio::sync::Mutex;
use tracing::{debug, info, warn};

use crate::{
    digest::ManifestDigest,
    disk,
    index::{IndexError, image::ImageIndex, merge::Merge},
    layer::{
        disk::CachePaths,
        store::{Layer, LayerStore},
    },
    metrics::Metrics,
    registry::ResolvedImage,
    sys::{self, MappedFile},
    tier::{BlobSource, LayerDesc, PresentError},
};

/// Says why an image has no index.
#[derive(Debug, Clone, thiserror::Error)]
pub enum IndexerError {
    /// A layer cannot be had.
    #[error(transparent)]
    Layer(#[from] PresentError),
    /// The layers cannot be merged.
    #[error("image {manifest} cannot be mounted: {source}")]
    Merge {
        /// The image.
        manifest: ManifestDigest,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// The local disk failed.
    #[error("image index {path}: {reason}")]
    Disk {
        /// The file.
        path: PathBuf,
        /// What failed.
        reason: String,
    },
}

/// An image that can be served: its tree, and its layers in the index's order.
#[derive(Debug)]
pub struct OpenImage {
    /// The tree.
    pub index: ImageIndex<MappedFile>,
    /// The layers, bottom first.
    pub layers: Vec<Arc<Layer>>,
    /// Keeps the file of the index in the cache: whoever serves the image opens it by its name.
    pub pin: File,
}

/// Opens images: has their layers made ready, and their indexes built.
#[derive(Debug)]
pub struct Indexer {
    store: LayerStore,
    metrics: Metrics,
    max_index_nodes: u32,
    uses_no_toc: bool,
    /// tokio Mutex, held while a merge runs: one at a time, because each holds some MiB.
    merging: Arc<Mutex<()>>,
}

impl Indexer {
    /// Opens images out of `store`; an image of more than `max_index_nodes` inodes is refused.
    pub fn new(store: LayerStore, metrics: Metrics, max_index_nodes: u32) -> Self {
        Self {
            store,
            metrics,
            max_index_nodes,
            uses_no_toc: false,
            merging: Arc::default(),
        }
    }

    /// Opens `image`, whose blobs `source` reads.
    ///
    /// # Errors
    /// [`IndexerError`]; what was fetched before stays in the cache.
    pub async fn open(
        &self,
        image: &ResolvedImage,
        source: &Arc<dyn BlobSource>,
    ) -> Result<OpenImage, IndexerError> {
        let started = Instant::now();
        let descs = self.descs(image).await;
        let layers = descs
            .iter()
            .map(|it| self.store.layer(it, Arc::clone(source)));
        let layers = future::try_join_all(layers).await?;
        let path = self.store.paths().image(image.manifest);
        if let Some((index, pin)) = open_index(self.store.paths(), image, &layers) {
            return Ok(OpenImage { index, layers, pin });
        }
        let (index, pin) = self.merge(image, &layers, &path).await?;
        self.store.sweep_soon();
        let elapsed = started.elapsed();
        self.metrics
            .index_build_duration
            .observe(elapsed.as_secs_f64());
        info!(image.manifest = %image.manifest, inodes = index.n_nodes(), layers = layers.len(),
            duration_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            path = %path.display(), "image index built");
        Ok(OpenImage { index, layers, pin })
    }

    /// Opens layers by their DiffIds alone from now on, whatever tables of contents their blobs have: for who
    /// vouches for layers to others.
    pub fn use_no_toc(&mut self) {
        self.uses_no_toc = true;
    }

    /// The layers of `image`, by the names that they are to have.
    ///
    /// A layer that was read by its table of contents has another name than its DiffId. As long as the
    /// layers are on disk by whose names the image's index knows them, they keep these: a mount may be
    /// served by that index, and whoever adopts it opens the layers that it names.
    async fn descs(&self, image: &ResolvedImage) -> Vec<LayerDesc> {
        if self.uses_no_toc {
            return image.layers.iter().map(LayerDesc::without_toc).collect();
        }
        let (paths, manifest) = (self.store.paths().clone(), image.manifest);
        let layers = image.layers.clone();
        let known = tokio::task::spawn_blocking(move || known_as(&paths, manifest, &layers));
        let known = known.await.ok().flatten();
        known.unwrap_or_else(|| image.layers.clone())
    }

    /// The layers of an image whose index is on disk, lowest first; asks nobody.
    pub async fn known_layers(&self, manifest: ManifestDigest) -> Option<Vec<LayerDesc>> {
        let path = self.store.paths().image(manifest);
        let read = tokio::task::spawn_blocking(move || map_index(&File::open(path).ok()?).ok());
        let index = read.await.ok()??;
        if index.manifest() != manifest {
            return None;
        }
        let layers = (0..index.n_layers()).map(|at| {
            let layer = index.layer(at)?;
            Some(LayerDesc {
                diff_id: layer.diff_id,
                blob: layer.blob,
                blob_bytes: layer.blob_bytes,
                toc: None,
            })
        });
        layers.collect()
    }

    /// Merges the layers' indexes and keeps the result at `path`.
    async fn merge(
        &self,
        image: &ResolvedImage,
        layers: &[Arc<Layer>],
        path: &Path,
    ) -> Result<(ImageIndex<MappedFile>, File), IndexerError> {
        let manifest = image.manifest;
        let (layers, descs) = (layers.to_vec(), image.layers.clone());
        let (path, max_index_nodes) = (path.to_owned(), self.max_index_nodes);
        let store = self.store.clone();
        let turn = Arc::clone(&self.merging).lock_owned().await;
        let merged = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            // What brought the layers here is over, and the tables need its place.
            sys::trim_allocator();
            sys::drop_code();
            let wrong = |source| merge_error(source, manifest, &path);
            let failed = |err: io::Error| disk_error(&path, err.to_string());
            // The index has a checksum and can be made anew: no reader waits for the disk.
            let new = disk::Unpublished::create(&path).map_err(failed)?;
            let mut merge = Merge::in_scratch(&store.scratch(), max_index_nodes);
            for (layer, desc) in layers.iter().zip(&descs) {
                let index = layer.file().index();
                let added = merge.add_layer(index, desc.blob, desc.blob_bytes);
                index.source().drop_resident();
                added.map_err(wrong)?;
            }
            let finished = merge.finish_in(&mut store.writer(new.file()), manifest);
            finished.map_err(wrong)?;
            // An eviction may look for room at this very moment.
            let file = new.file().try_clone().map_err(failed)?;
            CachePaths::pin_new_image(&file).map_err(failed)?;
            new.publish().map_err(failed)?;
            sys::trim_allocator();
            let mapped = MappedFile::new(&File::open(&path).map_err(failed)?).map_err(failed)?;
            Ok((ImageIndex::open(mapped).map_err(wrong)?, file))
        });
        merged.await.unwrap_or_else(|err| {
            let path = self.store.paths().image(manifest);
            Err(disk_error(&path, format!("merging ended early: {err}")))
        })
    }
}

/// The layers of an image by the names that its index knows them by, if it is on disk, and they are.
fn known_as(
    paths: &CachePaths,
    manifest: ManifestDigest,
    layers: &[LayerDesc],
) -> Option<Vec<LayerDesc>> {
    let mapped = MappedFile::new(&File::open(paths.image(manifest)).ok()?).ok()?;
    // Not verified as a whole: whatever it names is checked by who opens it.
    let index = ImageIndex::open(mapped).ok()?;
    if index.manifest() != manifest || index.n_layers() as usize != layers.len() {
        return None;
    }
    let known = (0..).zip(layers).map(|(at, desc)| {
        let known = index.layer(at).filter(|it| it.blob == desc.blob)?;
        let is_here = paths.layer(known.diff_id).exists();
        is_here.then(|| match known.diff_id == desc.diff_id {
            true => desc.without_toc(),
            false => LayerDesc {
                diff_id: known.diff_id,
                ..desc.clone()
            },
        })
    });
    known.collect()
}

fn disk_error(path: &Path, reason: String) -> IndexerError {
    IndexerError::Disk {
        path: path.to_owned(),
        reason,
    }
}

/// What an error of the merge of `manifest`, whose index was to come to `path`, means.
fn merge_error(source: IndexError, manifest: ManifestDigest, path: &Path) -> IndexerError {
    match source {
        IndexError::Scratch { .. } => disk_error(path, source.to_string()),
        source => IndexerError::Merge { manifest, source },
    }
}

/// Maps the index in `file` and checks that it is whole.
fn map_index(file: &File) -> Result<ImageIndex<MappedFile>, String> {
    // An empty file cannot be mapped.
    let mapped = MappedFile::new(file).map_err(|err| err.to_string())?;
    let index = ImageIndex::open(mapped).map_err(|err| err.to_string())?;
    index.verify().map_err(|err| err.to_string())?;
    // The checksum touched every page; few of them are needed again soon.
    index.source().drop_resident();
    Ok(index)
}

/// Opens the index of `image` if it is whole, and that of these layers; removes it if it is not.
fn open_index(
    paths: &CachePaths,
    image: &ResolvedImage,
    layers: &[Arc<Layer>],
) -> Option<(ImageIndex<MappedFile>, File)> {
    let path = paths.image(image.manifest);
    let file = paths.pin_image(image.manifest).ok()?;
    let opened = map_index(&file).and_then(|index| {
        let is_at = |at, layer: &Layer| {
            let known = index.layer(at);
            known.is_some_and(|it| it.diff_id == layer.file().diff_id())
        };
        let same_layers = index.n_layers() as usize == layers.len()
            && (0..).zip(layers).all(|(at, layer)| is_at(at, layer));
        if index.manifest() != image.manifest || !same_layers {
            return Err("it is of another image".to_owned());
        }
        Ok(index)
    });
    match opened {
        Ok(index) => {
            if let Err(err) = disk::touch(&file) {
                // Then it is evicted too early, if at all.
                debug!(path = %path.display(), error = %err, "noting the use of an image index");
            }
            Some((index, file))
        }
        Err(reason) => {
            warn!(path = %path.display(), reason, "image index is unusable, building it anew");
            // A file that cannot be removed will be replaced.
            let _ = fs::remove_file(&path);
            None
        }
    }
}
