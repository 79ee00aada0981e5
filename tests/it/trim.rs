//! Eviction of extents of layers in use, over real files: what goes, what stays, and what is read.

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clip_csi::{
    chunk::CHUNK_BYTES,
    digest::BlobDigest,
    layer::{
        CacheConfig,
        disk::DiskWait,
        store::{Layer, LayerStore},
    },
    metrics::Metrics,
    tier::{BlobSource, LayerDesc, PresentError},
};
use tokio::runtime::Handle;

use crate::layer_fixture::{FakeSource, Fixture, config, decompressions, open, present};

/// Chunks of an extent.
const EXTENT: u32 = 16;

/// Three extents, and a part of one.
const CONTENT_BYTES: usize = 50 * CHUNK_BYTES as usize;

/// Less than that by more than one extent.
const MAX_BYTES: u64 = 40_000_000;

fn open_bounded(dir: &Path, max_bytes: u64, metrics: &Metrics) -> LayerStore {
    let config = CacheConfig {
        max_bytes,
        ..config(dir)
    };
    LayerStore::open(config, None, metrics.clone(), Handle::current()).unwrap()
}

/// A layer that two processes have open: one without a bound, which has made it, and one with.
struct Case {
    _dir: tempfile::TempDir,
    fixture: Fixture,
    metrics: Metrics,
    source: Arc<FakeSource>,
    _maker: (LayerStore, Arc<Layer>),
    store: LayerStore,
    layer: Arc<Layer>,
}

impl Case {
    async fn new(fixture: Fixture, max_bytes: u64) -> Self {
        let source = fixture.source();
        Self::with_source(fixture, max_bytes, source).await
    }

    async fn with_source(fixture: Fixture, max_bytes: u64, source: Arc<FakeSource>) -> Self {
        let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
        let maker = open(dir.path(), None, &Metrics::new());
        let made = maker.layer(&fixture.desc, fixture.source()).await.unwrap();
        let store = open_bounded(dir.path(), max_bytes, &metrics);
        store.settle().await;
        let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
        assert!(layer.file().is_complete());
        Self {
            _dir: dir,
            fixture,
            metrics,
            source,
            _maker: (maker, made),
            store,
            layer,
        }
    }

    fn has(&self, extent: u32) -> bool {
        let end = ((extent + 1) * EXTENT).min(self.layer.file().n_chunks());
        self.layer.file().has(extent * EXTENT..end)
    }

    /// The extents of which all is there.
    fn whole(&self) -> Vec<u32> {
        (0..self.layer.file().n_chunks().div_ceil(EXTENT))
            .filter(|it| self.has(*it))
            .collect()
    }

    /// Reads a byte of each of these extents, later and later.
    async fn read(&self, extents: &[u32]) {
        for extent in extents {
            tokio::time::sleep(Duration::from_millis(80)).await;
            let chunk = extent * EXTENT;
            present(&self.store, self.fixture.desc.diff_id, chunk..chunk + 1)
                .await
                .unwrap();
            let (mut byte, offset) = ([0], u64::from(chunk) * CHUNK_BYTES);
            assert!(
                self.layer
                    .file()
                    .read_at(&mut byte, offset, DiskWait::Allowed)
                    .unwrap()
            );
        }
    }

    async fn sweep(&self) {
        self.store.sweep_soon();
        self.store.settle().await;
    }

    fn n_evicted(&self) -> u64 {
        let counter = &self.metrics.layer_cache_extent_evictions;
        counter.with_label_values(&["capacity"]).get()
    }

    /// Reads all of the layer, chunk by chunk, and compares it.
    async fn expect_all(&self) {
        for chunk in 0..self.layer.file().n_chunks() {
            present(&self.store, self.fixture.desc.diff_id, chunk..chunk + 1)
                .await
                .unwrap();
            self.fixture.expect_chunk(&self.layer, chunk);
        }
    }

    fn used_bytes(&self) -> u64 {
        u64::try_from(self.metrics.layer_cache_bytes.get()).unwrap()
    }
}

#[tokio::test]
async fn what_was_read_longest_ago_of_a_layer_in_use_goes_and_comes_back() {
    let case = Case::new(Fixture::sized(1, CONTENT_BYTES), MAX_BYTES).await;
    case.read(&[2, 0, 3, 1]).await;
    assert_eq!(
        case.whole(),
        [0, 1, 2, 3],
        "a bound is kept when somebody looks"
    );
    case.sweep().await;
    assert_eq!((case.whole(), case.n_evicted()), (vec![0, 1, 3], 1));
    assert!(case.used_bytes() < MAX_BYTES);
    // It comes back by parts, and the next one makes room for it.
    let before = decompressions(&case.metrics);
    case.expect_all().await;
    case.store.settle().await;
    assert!(1 < case.n_evicted());
    assert!(
        case.used_bytes() < MAX_BYTES + 16 * CHUNK_BYTES,
        "{} bytes",
        case.used_bytes()
    );
    case.expect_all().await;
    assert_eq!(
        decompressions(&case.metrics),
        before,
        "it was streamed whole"
    );
    let parts = case.source.opened.lock().unwrap();
    assert!(
        parts
            .iter()
            .all(|it| it.end - it.start < case.fixture.desc.blob_bytes / 2)
    );
    assert_eq!(
        case.metrics
            .layer_cache_evictions
            .with_label_values(&["capacity"])
            .get(),
        0
    );
    assert_eq!(
        case.metrics
            .verify_failures
            .with_label_values(&["disk"])
            .get(),
        0
    );
}

#[tokio::test]
async fn a_layer_that_was_cut_is_not_completed_for_nobody() {
    let case = Case::new(Fixture::sized(2, CONTENT_BYTES), MAX_BYTES).await;
    case.read(&[0, 1, 2, 3]).await;
    case.sweep().await;
    assert_eq!(case.whole(), [1, 2, 3]);
    case.read(&[0]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!case.has(0) && decompressions(&case.metrics) == 0);
}

#[tokio::test]
async fn an_image_that_comes_takes_the_room_of_what_is_read_no_more() {
    let case = Case::new(Fixture::sized(3, CONTENT_BYTES), 58_000_000).await;
    case.read(&[3, 2, 1, 0]).await;
    case.sweep().await;
    assert_eq!(case.whole(), [0, 1, 2, 3], "there is room");
    let other = Fixture::sized(4, 10_000_000);
    let layer = case.store.layer(&other.desc, other.source()).await.unwrap();
    case.store.settle().await;
    other.expect_all(&case.store, &layer).await;
    assert!(
        !case.whole().is_empty() && case.whole().len() < 4,
        "{:?} left",
        case.whole()
    );
    assert!(case.has(0), "it was read last");
    assert!(case.used_bytes() <= 58_000_000);
    case.expect_all().await;
}

#[tokio::test]
async fn an_image_that_would_not_fit_even_so_takes_nothing() {
    let case = Case::new(Fixture::sized(10, CONTENT_BYTES), 75_000_000).await;
    // Whose 21 MB stay, because it cannot be entered in its middle.
    let other = Fixture::in_one_block(11, 20 * CHUNK_BYTES as usize);
    let source = other.source();
    let _in_use = case.store.layer(&other.desc, source).await.unwrap();
    case.read(&[0, 1, 2, 3]).await;
    let large = Fixture::new(12);
    let desc = LayerDesc {
        blob_bytes: 60_000_000,
        ..large.desc.clone()
    };
    let refused = case.store.layer(&desc, large.source()).await;
    assert!(matches!(refused, Err(PresentError::CacheFull { .. })));
    case.store.settle().await;
    assert_eq!((case.whole(), case.n_evicted()), (vec![0, 1, 2, 3], 0));
    // One that would fit is let in.
    let desc = LayerDesc {
        blob_bytes: 50_000_000,
        ..desc
    };
    let wrong = case.store.layer(&desc, large.source()).await;
    assert!(
        matches!(wrong, Err(PresentError::Refused { .. })),
        "it is not that large"
    );
    assert!(0 < case.n_evicted());
}

#[tokio::test]
async fn what_could_not_be_had_again_stays() {
    // One that cannot be entered in its middle, and one whose registry is away.
    let whole = Fixture::in_one_block(5, 20 * CHUNK_BYTES as usize);
    let case = Case::new(whole, 10_000_000).await;
    case.sweep().await;
    assert!(case.layer.file().is_complete());
    assert_eq!(case.source.n_opened(), 0, "nobody need be asked");

    let parts = Fixture::sized(6, CONTENT_BYTES);
    let source = parts.source();
    source.is_down.store(true, Ordering::SeqCst);
    let case = Case::with_source(parts, MAX_BYTES, source).await;
    case.sweep().await;
    case.sweep().await;
    assert_eq!((case.whole(), case.n_evicted()), (vec![0, 1, 2, 3], 0));
    assert_eq!(case.source.n_opened(), 1, "it is asked, and then let alone");
    let refused = case
        .store
        .layer(&Fixture::new(7).desc, Fixture::new(7).source())
        .await;
    assert!(
        matches!(refused, Err(PresentError::CacheFull { .. })),
        "{refused:?}"
    );
    // Nor does it count that another blob can be had.
    let junk = LayerDesc {
        blob: BlobDigest::of(b"junk"),
        blob_bytes: 4,
        ..case.fixture.desc.clone()
    };
    let source = FakeSource::new(b"junk".to_vec());
    drop(case.store.layer(&junk, source).await.unwrap());
    case.sweep().await;
    case.sweep().await;
    assert_eq!((case.whole(), case.n_evicted()), (vec![0, 1, 2, 3], 0));
    // Whoever asks with other rights may reach it.
    let again: Arc<dyn BlobSource> = case.fixture.source();
    drop(case.store.layer(&case.fixture.desc, again).await.unwrap());
    case.sweep().await;
    assert!(0 < case.n_evicted());
    case.expect_all().await;
}

#[tokio::test]
async fn a_layer_that_somebody_reads_all_of_is_left_whole() {
    let case = Case::new(Fixture::sized(8, CONTENT_BYTES), MAX_BYTES).await;
    // In another process, as far as locks go.
    let kept = case._maker.1.file().keep_whole().unwrap();
    case.sweep().await;
    assert_eq!(case.whole(), [0, 1, 2, 3]);
    drop(kept);
    case.sweep().await;
    assert_eq!(case.whole().len(), 3);
}

/// The bound is less than what one reader has in hand: what it reads goes before it can be read.
#[tokio::test]
async fn readers_of_more_than_the_cache_can_hold_are_served() {
    let case = Case::new(Fixture::sized(9, CONTENT_BYTES), 3_000_000).await;
    case.sweep().await;
    let readers = (0..8u32).map(|at| {
        let (store, diff_id) = (case.store.clone(), case.fixture.desc.diff_id);
        let n_chunks = case.layer.file().n_chunks();
        async move {
            for chunk in 0..n_chunks {
                let chunk = (chunk + at * 6) % n_chunks;
                present(&store, diff_id, chunk..chunk + 1).await.unwrap();
            }
        }
    });
    futures_util::future::join_all(readers).await;
    case.store.settle().await;
    assert!(
        case.used_bytes() < 3_000_000 + 4 * 16 * CHUNK_BYTES,
        "{} bytes",
        case.used_bytes()
    );
}

#[tokio::test]
async fn nothing_is_taken_off_a_layer_that_the_kernel_has_mounted() {
    let case = Case::new(Fixture::sized(1, CONTENT_BYTES), MAX_BYTES).await;
    case.read(&[2, 0, 3, 1]).await;
    let given = case.layer.give_whole().unwrap().unwrap();
    case.sweep().await;
    assert_eq!(case.n_evicted(), 0, "somebody is about to mount it");
    // As a mount has it open, whose maker is gone.
    let mounted = std::fs::File::open(case.layer.file().dir().join("mounted")).unwrap();
    drop(given);
    case.sweep().await;
    assert_eq!((case.whole(), case.n_evicted()), (vec![0, 1, 2, 3], 0));
    drop(mounted);
    case.sweep().await;
    assert_eq!((case.whole(), case.n_evicted()), (vec![0, 1, 3], 1));
    assert!(
        case.layer.give_whole().unwrap().is_none(),
        "it is not whole any more"
    );
    assert!(!case.store.has_room_for_mounted());
}
