//! Whose layer is decompressed next, where one at a time is: images take turns, and what nobody waits for makes way.

use std::{
    ops::Range,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use clip_csi::{
    digest::BlobDigest,
    layer::{
        CacheConfig,
        store::{Layer, LayerStore},
    },
    metrics::Metrics,
    tier::{BlobSource, BlobStream, BoxFuture, SourceError},
};
use futures_util::future::{join_all, try_join_all};
use tokio::runtime::Handle;

use crate::layer_fixture::{FakeSource, Fixture, config, present};

/// Long enough for whoever has begun to stand in the queue, and not to be decided by it that a test passes.
const A_WHILE: Duration = Duration::from_millis(50);

/// In which order blobs were opened: that of the turns.
type Order = Arc<Mutex<Vec<BlobDigest>>>;

/// The layers of one image, each of which takes its time.
#[derive(Debug)]
struct Image {
    layers: Vec<(BlobDigest, Arc<FakeSource>)>,
    order: Order,
}

impl Image {
    fn new(fixtures: &[Fixture], order: &Order) -> Arc<Self> {
        let slow = |it: &Fixture| {
            let source = it.source();
            source.is_slow.store(true, Ordering::SeqCst);
            (it.desc.blob, source)
        };
        Arc::new(Self {
            layers: fixtures.iter().map(slow).collect(),
            order: Arc::clone(order),
        })
    }
}

impl BlobSource for Image {
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        self.order.lock().unwrap().push(*blob);
        let (_, source) = self.layers.iter().find(|it| it.0 == *blob).unwrap();
        source.open(blob, blob_bytes, range)
    }
}

/// A store that decompresses one layer at a time, and the order in which it does.
struct World {
    _dir: tempfile::TempDir,
    store: LayerStore,
    order: Order,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = CacheConfig {
            max_decompressions: 1,
            ..config(dir.path())
        };
        let store = LayerStore::open(config, None, Metrics::new(), Handle::current()).unwrap();
        Self {
            _dir: dir,
            store,
            order: Order::default(),
        }
    }

    /// Makes all layers of an image, as a publish does.
    async fn make(&self, fixtures: &[Fixture]) -> Vec<Arc<Layer>> {
        let image = Image::new(fixtures, &self.order);
        let layers = fixtures
            .iter()
            .map(|it| self.store.layer(&it.desc, Arc::clone(&image) as _));
        try_join_all(layers).await.unwrap()
    }

    /// Layers that lost all their chunks.
    async fn emptied(&self, fixtures: &[Fixture]) -> Vec<Arc<Layer>> {
        let layers = self.make(fixtures).await;
        for layer in &layers {
            (0..layer.file().n_chunks()).for_each(|it| layer.file().drop_chunk(it));
        }
        self.order.lock().unwrap().clear();
        layers
    }

    fn place(&self, fixture: &Fixture) -> usize {
        let order = self.order.lock().unwrap();
        let mut found = order.iter();
        found.position(|it| *it == fixture.desc.blob).unwrap()
    }
}

fn fixtures(seed: u64, n: u64) -> Vec<Fixture> {
    (seed..seed + n).map(Fixture::new).collect()
}

#[tokio::test]
async fn a_small_image_does_not_wait_for_all_layers_of_a_large_one() {
    let world = World::new();
    let (large, small) = (fixtures(700, 6), fixtures(710, 1));
    let makes_small = async {
        tokio::time::sleep(A_WHILE).await;
        world.make(&small).await
    };
    tokio::join!(world.make(&large), makes_small);
    let place = world.place(&small[0]);
    assert!(place < 6, "it was the last one");
}

#[tokio::test]
async fn a_stream_that_nobody_waits_for_makes_way() {
    let world = World::new();
    let (large, small, rest) = (fixtures(720, 5), fixtures(730, 1), fixtures(740, 1));
    let layers = world.emptied(&rest).await;
    let makes_small = async {
        tokio::time::sleep(2 * A_WHILE).await;
        world.make(&small).await
    };
    let streams = async {
        tokio::time::sleep(A_WHILE).await;
        world.store.stream_all(&layers[0]).await.unwrap();
    };
    tokio::join!(world.make(&large), streams, makes_small);
    assert_eq!(world.place(&rest[0]), 6, "the last one");
    assert!(layers[0].file().is_complete());
}

#[tokio::test]
async fn a_reader_who_waits_for_a_stream_lends_it_its_turn() {
    let world = World::new();
    let (large, rest) = (fixtures(750, 5), fixtures(760, 2));
    let layers = world.emptied(&rest).await;
    let streams = async {
        tokio::time::sleep(A_WHILE).await;
        let streams = layers.iter().map(|it| world.store.stream_all(it));
        join_all(streams).await
    };
    let reads = async {
        tokio::time::sleep(2 * A_WHILE).await;
        let diff_id = rest[1].desc.diff_id;
        present(&world.store, diff_id, 0..1).await.unwrap();
        world.order.lock().unwrap().len()
    };
    let (_, streamed, n_begun) = tokio::join!(world.make(&large), streams, reads);
    assert!(streamed.iter().all(Result::is_ok));
    assert!(n_begun < 7, "all the others were before it");
    assert_eq!(world.place(&rest[0]), 6, "nobody waited for that one");
    rest[1].expect_chunk(&layers[1], 0);
}
