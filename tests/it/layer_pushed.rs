//! A layer whose index was pushed beside its image is there before a byte of it was read.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clip_csi::{
    digest::{BlobDigest, DiffId},
    index::layer_index::LayerIndex,
    indexer::rebuild,
    layer::store::LayerStore,
    metrics::Metrics,
    tier::{BlobSource, BlobStream, BoxFuture, KeepPushed, PresentError, PushedPart, SourceError},
};
use tokio::runtime::Handle;

use crate::layer_fixture::{
    FakeSource, Fixture, config, decompressions, key_file, open, present, remote_in,
};

/// Generous: the machine may be busy, and no test waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(20);

/// What was pushed about a layer.
#[derive(Debug, Clone)]
struct Pushed {
    index: Bytes,
    access_map: Option<Bytes>,
}

/// A registry that has an index beside the image, or says why not.
#[derive(Debug)]
struct Indexed {
    blobs: Arc<FakeSource>,
    pushed: Result<Option<Pushed>, SourceError>,
    n_asked: AtomicU32,
}

impl BlobSource for Indexed {
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        self.blobs.open(blob, blob_bytes, range)
    }

    fn layer_index<'a>(
        &'a self,
        _: &'a DiffId,
        keep: &'a mut dyn KeepPushed,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        self.n_asked.fetch_add(1, Ordering::SeqCst);
        let found = self.pushed.clone().map(|found| {
            let Some(pushed) = found else { return false };
            // What a mirror had comes first, and is longer.
            let wrong = [&pushed.index, &b"wrong"[..]].concat();
            for index in [&wrong, &pushed.index[..]] {
                keep.begin(PushedPart::Index).unwrap();
                index.chunks(1000).for_each(|it| keep.take(it).unwrap());
            }
            if let Some(map) = pushed.access_map {
                keep.begin(PushedPart::AccessMap).unwrap();
                keep.take(&map).unwrap();
            }
            true
        });
        Box::pin(std::future::ready(found))
    }
}

fn indexed(fixture: &Fixture, pushed: Result<Option<Pushed>, SourceError>) -> Arc<Indexed> {
    Arc::new(Indexed {
        blobs: fixture.source(),
        pushed,
        n_asked: AtomicU32::new(0),
    })
}

/// Readers have the last chunk before the stream that brought it has ended.
async fn stream_has_ended(metrics: &Metrics) {
    let ended = async {
        while decompressions(metrics) == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ended).await.unwrap();
}

/// The index of the layer, as another node has made it.
async fn index_of(fixture: &Fixture) -> Bytes {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
    let index = layer.file().index().as_bytes().to_vec();
    assert_eq!(rebuild::layer_index(layer.file()).unwrap(), index);
    index.into()
}

fn pushed(index: Bytes) -> Result<Option<Pushed>, SourceError> {
    Ok(Some(Pushed {
        index,
        access_map: Some(Bytes::from_static(b"map")),
    }))
}

#[tokio::test]
async fn a_layer_with_a_pushed_index_is_there_before_its_blob_is_read() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(1),
    );
    let source = indexed(&fixture, pushed(index_of(&fixture).await));
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    assert_eq!(source.blobs.n_opened(), 0);
    assert_eq!(layer.file().present_bytes(), 0);
    let map = store.paths().access_map(fixture.desc.diff_id);
    assert_eq!(std::fs::read(map).unwrap(), b"map");

    fixture.expect_all(&store, &layer).await;
    stream_has_ended(&metrics).await;
    assert_eq!(source.blobs.n_opened(), 1);
    // What is on disk is asked of nobody.
    drop(layer);
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    fixture.expect_all(&store, &layer).await;
    assert_eq!(source.n_asked.load(Ordering::SeqCst), 1);
    assert_eq!(source.blobs.n_opened(), 1);
}

#[tokio::test]
async fn a_blob_that_is_not_what_the_index_says_reaches_no_reader() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(2),
    );
    let source = Arc::new(Indexed {
        blobs: Fixture::new(3).source(),
        pushed: pushed(index_of(&fixture).await),
        n_asked: AtomicU32::new(0),
    });
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source).await.unwrap();
    let refused = present(&store, fixture.desc.diff_id, 0..1).await;
    assert!(
        matches!(refused, Err(PresentError::Refused { .. })),
        "{refused:?}"
    );
    assert_eq!(layer.file().present_bytes(), 0);
}

#[tokio::test]
async fn an_index_that_is_not_the_layers_is_not_used() {
    let (metrics, fixture) = (Metrics::new(), Fixture::new(4));
    let good = index_of(&fixture).await;
    let other = index_of(&Fixture::new(5)).await;
    let mut changed = good.to_vec();
    changed[100] ^= 1;
    for (what, index) in [
        ("of another layer", other),
        ("changed", changed.into()),
        ("truncated", good.slice(..good.len() - 1)),
        ("empty", Bytes::new()),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let source = indexed(&fixture, pushed(index));
        let store = open(dir.path(), None, &metrics);
        let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
        assert_eq!(source.blobs.n_opened(), 1, "{what}");
        assert!(layer.file().is_complete(), "{what}");
        // The stream made one.
        let map = std::fs::read(store.paths().access_map(fixture.desc.diff_id)).unwrap();
        assert_ne!(map, b"map");
        fixture.expect_all(&store, &layer).await;
    }
}

#[tokio::test]
async fn a_demanded_index_that_cannot_be_had_is_the_layers_error() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(6),
    );
    let missing = SourceError::NotFound {
        what: "index sha256:x".to_owned(),
        registry: "r.x".to_owned(),
    };
    let source = indexed(&fixture, Err(missing));
    let store = open(dir.path(), None, &metrics);
    let refused = store.layer(&fixture.desc, source.clone()).await;
    assert!(
        matches!(
            refused,
            Err(PresentError::Origin {
                source: SourceError::NotFound { .. },
                ..
            })
        ),
        "{refused:?}"
    );
    assert_eq!(source.blobs.n_opened(), 0);
}

#[tokio::test]
async fn limits_hold_for_layers_with_a_pushed_index() {
    let (metrics, fixture) = (Metrics::new(), Fixture::new(7));
    let index = index_of(&fixture).await;
    let layer_bytes = LayerIndex::decode(&*index).unwrap().layer_bytes();
    let open_with = |dir: &Path, max_layer_bytes, max_layer_entries| {
        let config = clip_csi::layer::CacheConfig {
            max_layer_bytes,
            max_layer_entries,
            ..config(dir)
        };
        LayerStore::open(config, None, metrics.clone(), Handle::current()).unwrap()
    };
    for (max_bytes, max_entries, expected) in [
        (layer_bytes, 1, None),
        (layer_bytes - 1, 1, Some("cache.max_layer_bytes")),
        (layer_bytes, 0, Some("cache.max_layer_entries")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let store = open_with(dir.path(), max_bytes, max_entries);
        let source = indexed(&fixture, pushed(index.clone()));
        let exceeded = match store.layer(&fixture.desc, source).await {
            Ok(_) => None,
            Err(PresentError::Limit { limit, .. }) => Some(limit.into_owned()),
            Err(err) => panic!("{err}"),
        };
        assert_eq!(exceeded.as_deref(), expected);
    }
}

#[tokio::test]
async fn the_remote_content_cache_is_asked_first_and_gets_what_was_read() {
    let (shared, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(8),
    );
    let key = key_file(shared.path());
    let remote = || remote_in(&shared.path().join("remote"), Some(&key), &metrics);
    let source = indexed(&fixture, pushed(index_of(&fixture).await));

    let first = tempfile::tempdir().unwrap();
    let store = open(first.path(), remote(), &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    assert_eq!(source.n_asked.load(Ordering::SeqCst), 1);
    fixture.expect_all(&store, &layer).await;
    stream_has_ended(&metrics).await;
    store.shutdown(PATIENCE).await;

    let second = tempfile::tempdir().unwrap();
    let store = open(second.path(), remote(), &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    fixture.expect_all(&store, &layer).await;
    assert_eq!(source.n_asked.load(Ordering::SeqCst), 1);
    assert_eq!(source.blobs.n_opened(), 1);
}

#[tokio::test]
async fn what_is_vouched_for_is_the_layer_itself() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(9),
    );
    let index = index_of(&fixture).await;
    let store = open(dir.path(), None, &metrics);
    let source = indexed(&fixture, pushed(index.clone()));
    let layer = store.layer(&fixture.desc, source).await.unwrap();
    // Nothing of it is here.
    let error = rebuild::layer_index(layer.file()).unwrap_err().to_string();
    assert!(error.contains("has DiffID"), "{error}");
    fixture.expect_all(&store, &layer).await;
    assert_eq!(rebuild::layer_index(layer.file()).unwrap(), index);
}
