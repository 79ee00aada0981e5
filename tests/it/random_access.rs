//! Parts of layers whose index is known are read at random out of their blobs, and the rest is
//! streamed beside it, on more than one core.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clip_csi::{
    chunk::CHUNK_BYTES,
    layer::{
        CacheConfig,
        store::{Layer, LayerStore},
    },
    metrics::Metrics,
};
use tokio::{runtime::Handle, sync::Semaphore};

use crate::layer_fixture::{
    FakeSource, Fixture, config, decompressions, let_go_on, names, open, present,
};

const N_CHUNKS: u32 = 21;

/// A store whose one layer was filled, and then lost all its chunks.
struct Emptied {
    dir: tempfile::TempDir,
    metrics: Metrics,
    fixture: Fixture,
    store: LayerStore,
    source: Arc<FakeSource>,
    layer: Arc<Layer>,
}

impl Emptied {
    async fn new(seed: u64, complete_layers: bool) -> Self {
        Self::with(seed, |it| CacheConfig {
            complete_layers,
            ..it
        })
        .await
    }

    async fn with(seed: u64, change: impl FnOnce(CacheConfig) -> CacheConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let metrics = Metrics::new();
        let fixture = Fixture::sized(seed, N_CHUNKS as usize * CHUNK_BYTES as usize - 5000);
        let config = change(config(dir.path()));
        let store = LayerStore::open(config, None, metrics.clone(), Handle::current()).unwrap();
        let source = fixture.source();
        let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
        source.opened.lock().unwrap().clear();
        let emptied = Self {
            dir,
            metrics,
            fixture,
            store,
            source,
            layer,
        };
        emptied.empty();
        emptied
    }

    fn empty(&self) {
        assert_eq!(self.layer.file().n_chunks(), N_CHUNKS);
        for chunk in 0..N_CHUNKS {
            self.layer.file().drop_chunk(chunk);
        }
        // What is dropped is not to be found on the disk either.
        let data = std::fs::File::options()
            .write(true)
            .open(self.layer.file().dir().join("data"))
            .unwrap();
        data.set_len(0).unwrap();
        data.set_len(self.layer.file().layer_bytes()).unwrap();
    }

    async fn present(&self, chunk: u32) {
        present(&self.store, self.fixture.desc.diff_id, chunk..chunk + 1)
            .await
            .unwrap();
        self.fixture.expect_chunk(&self.layer, chunk);
    }

    /// Another layer of the store, which lost all its chunks as well.
    async fn another(&self, seed: u64) -> (Fixture, Arc<FakeSource>, Arc<Layer>) {
        let fixture = Fixture::sized(seed, 5 << 20);
        let source = fixture.source();
        let layer = self
            .store
            .layer(&fixture.desc, source.clone())
            .await
            .unwrap();
        (0..layer.file().n_chunks()).for_each(|it| layer.file().drop_chunk(it));
        source.opened.lock().unwrap().clear();
        (fixture, source, layer)
    }

    fn random_reads(&self, outcome: &str) -> u64 {
        let counter = self
            .metrics
            .layer_random_reads
            .with_label_values(&[outcome]);
        counter.get()
    }

    /// Waits for what is counted or kept when a piece of work has ended, not when its bytes are there.
    async fn eventually(&self, what: impl Fn(&Self) -> bool) {
        let comes = async {
            while !what(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), comes)
            .await
            .expect("it should come to that");
    }

    /// Waits until the stream beside has brought all.
    async fn complete(&self) {
        self.eventually(|it| it.layer.file().is_complete()).await;
        self.fixture.expect_all(&self.store, &self.layer).await;
    }
}

#[tokio::test]
async fn a_chunk_costs_one_request_for_a_part() {
    let it = Emptied::new(31, false).await;
    for chunk in [20, 11, 2, 0, 7] {
        it.source.opened.lock().unwrap().clear();
        it.present(chunk).await;
        let opened = it.source.opened.lock().unwrap().clone();
        assert_eq!(opened.len(), 1, "chunk {chunk}: {opened:?}");
        let blob_bytes = it.fixture.desc.blob_bytes;
        let part = opened[0].end - opened[0].start;
        // A stride of two chunks, and what is read around it.
        assert!(part < blob_bytes / 5, "{part} of {blob_bytes} bytes");
    }
    it.eventually(|it| it.random_reads("ok") == 5).await;
    let inflated = it.metrics.layer_decompressed_bytes.get() - it.fixture.tar.len() as u64;
    assert!(inflated <= 5 * (4 << 20), "{inflated} bytes for five reads");
    assert_eq!(it.random_reads("ok"), 5);
    assert_eq!(
        decompressions(&it.metrics),
        1,
        "nothing was streamed beside"
    );
}

#[tokio::test]
async fn every_chunk_alone_is_right() {
    let it = Emptied::new(32, false).await;
    for (n_reads, chunk) in (1..).zip((0..N_CHUNKS).rev()) {
        it.empty();
        it.present(chunk).await;
        // What else the part has is to be on disk before that is emptied.
        it.eventually(|it| it.random_reads("ok") == n_reads).await;
    }
    assert_eq!(it.random_reads("error"), 0);
    assert_eq!(decompressions(&it.metrics), 1, "nothing was streamed");
}

#[tokio::test]
async fn who_reads_in_order_needs_few_requests() {
    let it = Emptied::new(33, false).await;
    for chunk in 0..N_CHUNKS {
        it.present(chunk).await;
    }
    // Strides of 1, 2, 4 and 4.
    assert_eq!(it.source.n_opened(), 4);
    assert!(it.layer.file().is_complete());
}

#[tokio::test]
async fn readers_of_one_part_share_its_request() {
    let it = Emptied::new(34, false).await;
    let layer = it.fixture.desc.diff_id;
    let reads = (0..16).map(|n| present(&it.store, layer, 10 + n % 2..11 + n % 2));
    futures_util::future::try_join_all(reads).await.unwrap();
    assert_eq!(it.source.n_opened(), 1);
}

#[tokio::test]
async fn many_readers_of_one_mount_keep_another_waiting_for_one() {
    let it = Emptied::new(43, false).await;
    let (other, other_source, _layer) = it.another(44).await;
    let go_on = Arc::new(Semaphore::new(0));
    for source in [&it.source, &other_source] {
        *source.hold.lock().unwrap() = Some(Arc::clone(&go_on));
    }
    let (many, few) = (it.store.of_mount(1), it.store.of_mount(2));
    for chunk in (0..N_CHUNKS).step_by(2).rev() {
        let layer = it.fixture.desc.diff_id;
        many.make_present(layer, chunk..chunk + 1, Box::new(|_| {}));
    }
    let_go_on().await;
    assert_eq!(it.source.n_opened(), 2, "so many parts at once");
    few.make_present(other.desc.diff_id, 0..1, Box::new(|_| {}));
    let_go_on().await;
    // One after the other.
    while other_source.n_opened() == 0 {
        let n_before = it.source.n_opened() + other_source.n_opened();
        go_on.add_permits(1);
        it.eventually(|it| n_before < it.source.n_opened() + other_source.n_opened())
            .await;
    }
    let n_opened = it.source.n_opened();
    assert!(n_opened <= 3, "{n_opened} of the other mount's before it");
}

#[tokio::test]
async fn who_waits_for_the_turn_of_a_part_does_not_read_all_of_the_blob() {
    let it = Emptied::with(45, |it| CacheConfig {
        complete_layers: false,
        stall_timeout_seconds: 1,
        ..it
    })
    .await;
    let (other, source, layer) = it.another(46).await;
    let go_on = Arc::new(Semaphore::new(0));
    *it.source.hold.lock().unwrap() = Some(Arc::clone(&go_on));
    for chunk in [2, 12] {
        let layer = it.fixture.desc.diff_id;
        (it.store.of_mount(1)).make_present(layer, chunk..chunk + 1, Box::new(|_| {}));
    }
    let_go_on().await;
    assert_eq!(it.source.n_opened(), 2, "so many parts at once");
    let goes_on = async {
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_eq!(source.n_opened(), 0, "it was read past the others");
        go_on.add_permits(100);
    };
    let read = present(&it.store, other.desc.diff_id, 0..1);
    let (read, ()) = tokio::join!(read, goes_on);
    read.unwrap();
    other.expect_chunk(&layer, 0);
    let opened = source.opened.lock().unwrap().clone();
    assert_eq!(opened.len(), 1, "{opened:?}");
    assert!(opened[0].end < other.desc.blob_bytes);
}

#[tokio::test]
async fn the_rest_is_streamed_beside() {
    let it = Emptied::new(35, true).await;
    it.present(15).await;
    it.complete().await;
    let opened = it.source.opened.lock().unwrap().clone();
    assert_eq!(opened.len(), 2, "a part, then all: {opened:?}");
    assert_eq!(opened[1], 0..it.fixture.desc.blob_bytes);
    it.eventually(|it| decompressions(&it.metrics) == 2).await;
}

#[tokio::test]
async fn a_stream_ends_when_nobody_has_the_layer_open() {
    let it = Emptied::new(36, true).await;
    it.source.is_slow.store(true, Ordering::SeqCst);
    it.present(15).await;
    let Emptied {
        dir: _dir,
        store,
        layer,
        source,
        metrics,
        ..
    } = it;
    drop(layer);
    // Whoever streams holds the source.
    let ended = async {
        while 1 < Arc::strong_count(&source) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended)
        .await
        .expect("the stream should end");
    assert_eq!(source.n_opened(), 2, "no stream was begun");
    assert_eq!(decompressions(&metrics), 1, "it was read to its end");
    assert_eq!(names(&store.paths().root().join("tmp")), [""; 0]);
}

#[tokio::test]
async fn a_map_that_a_killed_stream_was_making_is_removed() {
    let it = Emptied::new(47, false).await;
    std::fs::remove_file(it.layer.file().dir().join("access")).unwrap();
    it.source.is_slow.store(true, Ordering::SeqCst);
    let layer = it.fixture.desc.diff_id;
    (it.store.of_mount(1)).make_present(layer, 20..21, Box::new(|_| {}));
    let tmp = it.dir.path().join("tmp");
    it.eventually(|_| !names(&tmp).is_empty()).await;
    let name = names(&tmp).remove(0);
    // In another cache, whose process had got as far.
    let dir = tempfile::tempdir().unwrap();
    let tmp = dir.path().join("tmp");
    std::fs::create_dir(&tmp).unwrap();
    clip_csi::disk::publish(&tmp.join(&name), b"half a map").unwrap();
    let _store = open(dir.path(), None, &it.metrics);
    assert_eq!(names(&tmp), [""; 0]);
}

#[tokio::test]
async fn wrong_parts_are_streamed_instead() {
    let it = Emptied::new(37, false).await;
    it.source.parts_are_wrong.store(true, Ordering::SeqCst);
    it.present(12).await;
    assert_eq!(it.random_reads("error"), 1);
    let failures = it.metrics.verify_failures.with_label_values(&["registry"]);
    assert_eq!(failures.get(), 1);
    it.complete().await;
}

#[tokio::test]
async fn a_flipped_bit_in_the_part_of_any_chunk_is_noticed() {
    let it = Emptied::new(41, false).await;
    it.source.parts_are_wrong.store(true, Ordering::SeqCst);
    for (n_reads, chunk) in (1..).zip(0..N_CHUNKS) {
        it.empty();
        // Right, by way of the stream.
        it.present(chunk).await;
        it.complete().await;
        it.eventually(|it| it.random_reads("error") == n_reads)
            .await;
        it.eventually(|it| decompressions(&it.metrics) == 1 + n_reads)
            .await;
    }
    assert_eq!(it.random_reads("ok"), 0);
}

#[tokio::test]
async fn a_server_that_knows_no_ranges_is_asked_for_one_once() {
    let it = Emptied::new(42, false).await;
    it.source.refuses_parts.store(true, Ordering::SeqCst);
    it.source.is_slow.store(true, Ordering::SeqCst);
    it.present(0).await;
    // Too far ahead of the stream to wait for it, if there were another way.
    it.present(20).await;
    let opened = it.source.opened.lock().unwrap().clone();
    assert_eq!(opened.len(), 2, "a part, then all: {opened:?}");
    assert_eq!(opened[1], 0..it.fixture.desc.blob_bytes);
}

#[tokio::test]
async fn a_damaged_map_is_made_anew_by_the_stream() {
    for (seed, damage) in [(38, 0), (39, 7), (40, usize::MAX)] {
        let it = Emptied::new(seed, false).await;
        let path = it.layer.file().dir().join("access");
        let map = std::fs::read(&path).unwrap();
        clip_csi::disk::publish(&path, &map[..damage.min(map.len() - 1)]).unwrap();
        it.present(12).await;
        assert_eq!(it.random_reads("ok"), 0, "a damaged map was used");
        it.complete().await;
        it.eventually(|_| std::fs::read(&path).is_ok_and(|it| it == map))
            .await;
    }
}
