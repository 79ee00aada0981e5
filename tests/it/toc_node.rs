//! A node with a cache of its own, which mounts images of layers in memory and reads them.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use clip_csi::{
    digest::ManifestDigest,
    index::image::{FileType, Ino},
    indexer::{Indexer, OpenImage},
    layer::{
        CacheConfig,
        disk::DiskWait,
        store::{LayerStore, Remote},
    },
    metrics::Metrics,
    registry::ResolvedImage,
    tier::{BlobSource, LayerDesc, PresentError},
};
use tokio::runtime::Handle;

use crate::layer_fixture::{FakeSource, config, key_file, present, remote_in};

/// A node with a cache of its own.
pub(crate) struct Node {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) metrics: Metrics,
    pub(crate) store: LayerStore,
    pub(crate) indexer: Indexer,
}

/// What a reader sees of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) file_type: FileType,
    pub(crate) attributes: (u16, u32, u32, u32, i64, u32),
    pub(crate) target: Vec<u8>,
    pub(crate) content: Vec<u8>,
}

impl Node {
    pub(crate) fn new() -> Self {
        Self::with(None, false, |it| it)
    }

    pub(crate) fn with(
        remote: Option<&Path>,
        complete_layers: bool,
        change: impl FnOnce(CacheConfig) -> CacheConfig,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Metrics::new();
        let remote = remote.and_then(|it| remote_of(it, &metrics));
        Self::start(dir, metrics, remote, complete_layers, change)
    }

    pub(crate) fn start(
        dir: tempfile::TempDir,
        metrics: Metrics,
        remote: Option<Remote>,
        complete_layers: bool,
        change: impl FnOnce(CacheConfig) -> CacheConfig,
    ) -> Self {
        let config = change(CacheConfig {
            complete_layers,
            ..config(dir.path())
        });
        let store = LayerStore::open(config, remote, metrics.clone(), Handle::current()).unwrap();
        let indexer = Indexer::new(store.clone(), metrics.clone(), 1000);
        Self {
            dir,
            metrics,
            store,
            indexer,
        }
    }

    /// The same node after a restart of the driver.
    pub(crate) fn restarted(self) -> Self {
        let Self { dir, .. } = self;
        Self::start(dir, Metrics::new(), None, false, |it| it)
    }

    pub(crate) async fn mount(&self, layers: &[LayerDesc], source: &Arc<FakeSource>) -> OpenImage {
        let image = ResolvedImage {
            manifest: ManifestDigest::of(b"an image"),
            layers: layers.to_vec(),
        };
        let source: Arc<dyn BlobSource> = source.clone();
        self.indexer.open(&image, &source).await.unwrap()
    }

    /// All files of an image, by their paths.
    pub(crate) async fn tree(&self, image: &OpenImage) -> BTreeMap<String, Seen> {
        let mut seen = BTreeMap::new();
        let mut left = vec![(String::new(), Ino::ROOT)];
        while let Some((path, ino)) = left.pop() {
            let node = image.index.node(ino).unwrap();
            for at in 0..image.index.n_names(&node) {
                let (name, ino) = image.index.name(&node, at).unwrap();
                let name = std::str::from_utf8(name).unwrap();
                left.push((format!("{path}/{name}"), ino));
            }
            let content = match node.file_type {
                FileType::Regular => self.content(image, ino).await.unwrap(),
                _ => Vec::new(),
            };
            let target = image.index.symlink_target(&node).unwrap_or_default();
            let attributes = (
                node.permissions,
                node.uid,
                node.gid,
                node.n_links,
                node.mtime_seconds,
                node.mtime_nanoseconds,
            );
            let file = Seen {
                file_type: node.file_type,
                attributes,
                target: target.to_vec(),
                content,
            };
            seen.insert(path, file);
        }
        seen
    }

    /// Reads a file as a reader does: has its chunks made present, then reads them.
    pub(crate) async fn content(
        &self,
        image: &OpenImage,
        ino: Ino,
    ) -> Result<Vec<u8>, PresentError> {
        let node = image.index.node(ino).unwrap();
        let mut content = vec![0; node.size as usize];
        let extents: Vec<_> = image.index.extents(&node, 0, node.size).collect();
        for extent in extents {
            let file = image.layers[extent.layer as usize].file();
            let chunks = clip_csi::chunk::covering(extent.layer_offset, extent.len).unwrap();
            present(&self.store, file.diff_id(), chunks.clone()).await?;
            assert!(file.has(chunks));
            let into = &mut content[extent.file_offset as usize..][..extent.len as usize];
            let read = file.read_at(into, extent.layer_offset, DiskWait::Allowed);
            assert!(read.unwrap());
        }
        Ok(content)
    }

    pub(crate) async fn file(
        &self,
        image: &OpenImage,
        path: &str,
    ) -> Result<Vec<u8>, PresentError> {
        let mut ino = Ino::ROOT;
        for name in path.split('/') {
            let node = image.index.node(ino).unwrap();
            ino = image.index.lookup(&node, name.as_bytes()).unwrap();
        }
        self.content(image, ino).await
    }

    pub(crate) fn lookups(&self, outcome: &str) -> u64 {
        let counter = self.metrics.toc_lookups.with_label_values(&[outcome]);
        counter.get()
    }
}

pub(crate) fn remote_of(dir: &Path, metrics: &Metrics) -> Option<Remote> {
    let key = key_file(dir);
    remote_in(&dir.join("remote"), Some(&key), metrics)
}
