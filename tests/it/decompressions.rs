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
use tokio::{runtime::Handle, sync::Semaphore, task::JoinHandle};

use crate::{
    by_toc::{PATIENCE, eventually},
    layer_fixture::{
        FakeSource, Fixture, config, files_below, key_file, let_go_on, present, remote_in,
    },
};

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
    // Else they could be read at random.
    for layer in &layers {
        std::fs::remove_file(layer.file().dir().join("access")).unwrap();
    }
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

/// A layer without chunks whose stream waits for the only turn, which the stream of another layer has.
struct Waiting {
    dir: tempfile::TempDir,
    store: LayerStore,
    fixture: Fixture,
    source: Arc<FakeSource>,
    layer: Arc<Layer>,
    /// The other one waits here.
    hold: Arc<Semaphore>,
    streams: Vec<JoinHandle<()>>,
    _other: Arc<Layer>,
}

/// Whether it is known where the layer's blob can be entered.
#[derive(PartialEq)]
enum Map {
    Known,
    Lost,
}

/// Longer than the layer's readers wait for a stream that has stalled.
const STALLED_TWICE: Duration = Duration::from_millis(2500);

impl Waiting {
    /// Two layers, which a remote content cache has as well.
    async fn new(seed: u64, map: Map) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = CacheConfig {
            max_decompressions: 1,
            stall_timeout_seconds: 1,
            ..config(&dir.path().join("cache"))
        };
        let metrics = Metrics::new();
        let key = key_file(dir.path());
        let remote = remote_in(&dir.path().join("remote"), Some(&key), &metrics);
        let store = LayerStore::open(config, remote, metrics, Handle::current()).unwrap();
        let (other, fixture) = (Fixture::new(seed), Fixture::sized(seed + 1, 9 << 20));
        let (held, source) = (other.source(), fixture.source());
        let mut layers = Vec::new();
        for (fixture, source) in [(&other, &held), (&fixture, &source)] {
            let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
            let uploading = layer.file().dir().join("upload");
            eventually(|| !uploading.exists()).await;
            (0..layer.file().n_chunks()).for_each(|it| layer.file().drop_chunk(it));
            source.opened.lock().unwrap().clear();
            layers.push(layer);
        }
        let mut waiting = Self {
            dir,
            store,
            fixture,
            source,
            layer: layers.pop().unwrap(),
            hold: Arc::new(Semaphore::new(0)),
            streams: Vec::new(),
            _other: layers.pop().unwrap(),
        };
        if map == Map::Lost {
            std::fs::remove_file(waiting.layer.file().dir().join("access")).unwrap();
            waiting.lose("access-");
        }
        *held.hold.lock().unwrap() = Some(Arc::clone(&waiting.hold));
        waiting.stream(Arc::clone(&waiting._other));
        eventually(|| held.n_opened() == 1).await;
        waiting.stream(Arc::clone(&waiting.layer));
        let_go_on().await;
        waiting
    }

    /// Takes what has such a name out of the remote content cache.
    fn lose(&self, prefix: &str) {
        for path in files_below(&self.dir.path().join("remote")) {
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with(prefix) {
                std::fs::remove_file(path).unwrap();
            }
        }
    }

    fn stream(&mut self, layer: Arc<Layer>) {
        let store = self.store.clone();
        self.streams.push(tokio::spawn(async move {
            store.stream_all(&layer).await.unwrap();
        }));
    }

    async fn read(&self, chunk: u32) {
        let read = present(&self.store, self.fixture.desc.diff_id, chunk..chunk + 1);
        let read = tokio::time::timeout(PATIENCE, read).await;
        read.expect("it should not wait for the other stream")
            .unwrap();
        self.fixture.expect_chunk(&self.layer, chunk);
    }

    /// Has the other stream go on, and waits for both.
    async fn end(self) {
        self.hold.add_permits(100);
        for stream in self.streams {
            stream.await.unwrap();
        }
        assert!(self.layer.file().is_complete());
    }
}

#[tokio::test]
async fn a_stream_that_has_not_begun_keeps_no_reader_from_reading_at_random() {
    let waiting = Waiting::new(770, Map::Known).await;
    waiting.lose("o-");
    waiting.read(3).await;
    let opened = waiting.source.opened.lock().unwrap().clone();
    assert_eq!(opened.len(), 1, "{opened:?}");
    assert!(opened[0].end < waiting.fixture.desc.blob_bytes);
    waiting.end().await;
}

#[tokio::test]
async fn a_stream_that_has_not_begun_keeps_no_reader_from_the_remote() {
    for (seed, map) in [(772, Map::Known), (774, Map::Lost)] {
        let waiting = Waiting::new(seed, map).await;
        waiting.read(3).await;
        assert_eq!(waiting.source.n_opened(), 0);
        waiting.end().await;
    }
}

#[tokio::test]
async fn who_has_no_other_way_waits_for_a_stream_that_waits_for_its_turn() {
    let waiting = Waiting::new(776, Map::Lost).await;
    waiting.lose("o-");
    let go_on = async {
        tokio::time::sleep(STALLED_TWICE).await;
        assert_eq!(waiting.source.n_opened(), 0, "it had its turn");
        waiting.hold.add_permits(100);
    };
    tokio::join!(waiting.read(3), go_on);
    waiting.end().await;
}
