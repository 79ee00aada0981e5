//! Work on layers that takes long leaves threads for readers, however much of it there is.

use std::{
    fs::File,
    sync::Arc,
    time::{Duration, Instant},
};

use clip_csi::{
    layer::store::{Layer, LayerStore},
    metrics::Metrics,
};
use rustix::fs::{FlockOperation, flock};
use tokio::sync::oneshot;

use crate::layer_fixture::{FakeSource, Fixture, open, present};

/// Less than it takes whoever may not write to a layer to give up: 5 s (`layer::lock`).
const SOON: Duration = Duration::from_secs(4);

/// How many blocking threads a runtime has in tests.
const N_THREADS: usize = 512;

/// Takes all blocking threads but two, until it is dropped.
struct Few(
    #[expect(dead_code, reason = "who waits hears that it is dropped")] Vec<oneshot::Sender<()>>,
);

impl Few {
    fn new() -> Self {
        let take = |_| {
            let (sender, receiver) = oneshot::channel();
            tokio::task::spawn_blocking(move || receiver.blocking_recv());
            sender
        };
        Self((2..N_THREADS).map(take).collect())
    }
}

/// Three layers that are on disk.
async fn three(store: &LayerStore, seed: u64) -> Vec<(Fixture, Arc<FakeSource>, Arc<Layer>)> {
    let mut layers = Vec::new();
    for seed in seed..seed + 3 {
        let fixture = Fixture::new(seed);
        let source = fixture.source();
        let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
        layers.push((fixture, source, layer));
    }
    layers
}

/// Lets nobody write to a layer, until the result is dropped.
fn alone(layer: &Layer) -> File {
    let state = File::open(layer.file().dir().join("state")).unwrap();
    flock(&state, FlockOperation::LockExclusive).unwrap();
    state
}

/// Reads the last chunk of a layer that lost it.
async fn expect_served_soon(store: &LayerStore, fixture: &Fixture, layer: &Layer) {
    let last = layer.file().n_chunks() - 1;
    layer.file().drop_chunk(last);
    let since = Instant::now();
    present(store, fixture.desc.diff_id, last..last + 1)
        .await
        .unwrap();
    fixture.expect_chunk(layer, last);
    let waited = since.elapsed();
    assert!(waited < SOON, "{waited:?}");
}

#[tokio::test]
async fn flushes() {
    let (_few, dir) = (Few::new(), tempfile::tempdir().unwrap());
    let store = open(dir.path(), None, &Metrics::new());
    let read = Fixture::new(790);
    let layer = store.layer(&read.desc, read.source()).await.unwrap();
    let layers = three(&store, 791).await;
    let _alone: Vec<_> = layers.iter().map(|it| alone(&it.2)).collect();
    // They begin a second after the layers were made.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    expect_served_soon(&store, &read, &layer).await;
}

#[tokio::test]
async fn what_is_verified_after_an_unclean_stop() {
    let (_few, dir) = (Few::new(), tempfile::tempdir().unwrap());
    let read = Fixture::new(795);
    let mut fixtures = Vec::new();
    {
        let store = open(dir.path(), None, &Metrics::new());
        for (fixture, _, layer) in three(&store, 796).await {
            std::fs::remove_file(layer.file().dir().join("state")).unwrap();
            fixtures.push(fixture);
        }
    }
    let store = open(dir.path(), None, &Metrics::new());
    let layer = store.layer(&read.desc, read.source()).await.unwrap();
    let mut alones = Vec::new();
    for fixture in &fixtures {
        let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
        assert!(!layer.file().is_complete());
        alones.push(alone(&layer));
        let store = store.clone();
        tokio::spawn(async move { store.stream_all(&layer).await });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    expect_served_soon(&store, &read, &layer).await;
}
