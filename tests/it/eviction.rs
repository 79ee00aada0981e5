//! Eviction over real files and locks: what goes, what stays, and what a crash leaves.

use std::{path::Path, sync::Arc, time::Duration};

use clip_csi::{
    digest::ManifestDigest,
    indexer::Indexer,
    layer::{
        CacheConfig,
        catalog::{self, Removed},
        disk::CachePaths,
        store::{Layer, LayerStore},
    },
    metrics::Metrics,
    registry::ResolvedImage,
    tier::{BlobSource, PresentError},
};
use tokio::runtime::Handle;

use crate::layer_fixture::{Fixture, config, names, open, remote_in};

/// Room for two layers of the fixture, which take 3.16 MB each, below the low watermark.
const TWO_LAYERS: u64 = 8_000_000;

fn open_bounded(dir: &Path, max_bytes: u64, metrics: &Metrics) -> LayerStore {
    let config = CacheConfig {
        max_bytes,
        ..config(dir)
    };
    LayerStore::open(config, None, metrics.clone(), Handle::current()).unwrap()
}

/// Has the layer made, and closes it again.
async fn use_once(store: &LayerStore, fixture: &Fixture) {
    drop(layer(store, fixture).await.unwrap());
    store.settle().await;
}

async fn layer(store: &LayerStore, fixture: &Fixture) -> Result<Arc<Layer>, PresentError> {
    store.layer(&fixture.desc, fixture.source()).await
}

/// Which of the layers the cache directory has.
fn kept(dir: &Path, fixtures: &[Fixture]) -> Vec<usize> {
    let kept = catalog::layers(&CachePaths::new(dir)).unwrap();
    (0..fixtures.len())
        .filter(|it| kept.contains(&fixtures[*it].desc.diff_id))
        .collect()
}

fn fixtures<const N: usize>() -> [Fixture; N] {
    std::array::from_fn(|n| Fixture::new(100 + n as u64))
}

fn evictions(metrics: &Metrics) -> [u64; 2] {
    ["capacity", "disk"].map(|it| metrics.layer_cache_evictions.with_label_values(&[it]).get())
}

#[tokio::test]
async fn the_least_recently_used_layer_goes_first_also_after_a_restart() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 4] = fixtures();
    let store = open_bounded(dir.path(), TWO_LAYERS, &metrics);
    use_once(&store, &layers[0]).await;
    use_once(&store, &layers[1]).await;
    assert_eq!(kept(dir.path(), &layers), [0, 1]);
    // Used again, so that the other one is older.
    use_once(&store, &layers[0]).await;
    drop(store);
    let store = open_bounded(dir.path(), TWO_LAYERS, &metrics);
    use_once(&store, &layers[2]).await;
    assert_eq!(kept(dir.path(), &layers), [0, 2]);
    // Looking at a layer is no use of it.
    let looked_at = catalog::open(store.paths(), layers[0].desc.diff_id).unwrap();
    assert!(looked_at.is_some());
    drop(looked_at);
    use_once(&store, &layers[3]).await;
    assert_eq!(kept(dir.path(), &layers), [2, 3]);
    assert_eq!(evictions(&metrics), [2, 0]);
    let evicted_bytes = metrics.layer_cache_evicted_bytes.get();
    assert!((2 * 3_145_000..2 * 3_200_000).contains(&evicted_bytes));
    assert_eq!(metrics.layer_cache_layers.get(), 2);
    assert_eq!(metrics.layer_cache_capacity_bytes.get(), 8_000_000);
    // Locks of layers that are gone do not pile up.
    assert_eq!(names(&dir.path().join("locks")).len(), 2);
    assert_eq!(names(&dir.path().join("tmp")), [""; 0]);
    // What was evicted comes back whole.
    let again = layer(&store, &layers[0]).await.unwrap();
    layers[0].expect_all(&store, &again).await;
}

#[tokio::test]
async fn a_layer_that_the_kernel_has_mounted_stays() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 3] = fixtures();
    let store = open_bounded(dir.path(), TWO_LAYERS, &metrics);
    let opened = layer(&store, &layers[0]).await.unwrap();
    assert!(store.has_room_for_mounted() && opened.is_whole());
    let given = opened.give_whole().unwrap().unwrap();
    let diff_id = layers[0].desc.diff_id;
    let place = store.paths().layer(diff_id).join("mounted");
    // As a mount has it open, whose makers are gone.
    let mounted = std::fs::File::open(&place).unwrap();
    drop((opened, given));
    let remove = || catalog::remove(store.paths(), diff_id).unwrap();
    assert_eq!(remove(), Removed::InUse);
    for it in &layers[1..] {
        use_once(&store, it).await;
    }
    assert_eq!(kept(dir.path(), &layers), [0, 2]);
    drop(mounted);
    // Who is about to mount it keeps it as well, though nobody has it open.
    let about_to = std::fs::File::open(&place).unwrap();
    rustix::fs::flock(&about_to, rustix::fs::FlockOperation::LockShared).unwrap();
    assert_eq!(remove(), Removed::InUse);
    drop(about_to);
    assert_eq!(remove(), Removed::Yes);
}

#[tokio::test]
async fn a_layer_that_another_process_has_open_stays() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 4] = fixtures();
    // Two stores on one directory stand for two processes: flock knows no difference.
    let mount = open_bounded(dir.path(), 0, &Metrics::new());
    let in_use = layer(&mount, &layers[0]).await.unwrap();
    let store = open_bounded(dir.path(), TWO_LAYERS, &metrics);
    for it in &layers[1..] {
        use_once(&store, it).await;
    }
    assert_eq!(kept(dir.path(), &layers), [0, 3]);
    layers[0].expect_all(&mount, &in_use).await;
    let diff_id = layers[0].desc.diff_id;
    assert_eq!(
        catalog::remove(store.paths(), diff_id).unwrap(),
        Removed::InUse
    );
    drop(in_use);
    assert_eq!(
        catalog::remove(store.paths(), diff_id).unwrap(),
        Removed::Yes
    );
    assert_eq!(
        catalog::remove(store.paths(), diff_id).unwrap(),
        Removed::Absent
    );
}

#[tokio::test]
async fn a_layer_that_does_not_fit_is_refused_and_fits_when_another_is_closed() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    // They cannot be entered in their middle: what is taken of them would not be had again by parts.
    let layers = [1, 2, 3].map(|it| Fixture::in_one_block(it, 8_000_000));
    let store = open_bounded(dir.path(), 21_000_000, &metrics);
    let first = layer(&store, &layers[0]).await.unwrap();
    let second = layer(&store, &layers[1]).await.unwrap();
    let source = layers[2].source();
    let refused = store.layer(&layers[2].desc, source.clone()).await;
    let error = refused.unwrap_err();
    let expected = format!(
        "layer {} does not fit into the cache {}: what is in use leaves too little of \
         cache.max_bytes = 21000000; raise it, or unmount images of this node",
        layers[2].desc.diff_id,
        dir.path().display()
    );
    assert_eq!(error.to_string(), expected);
    assert_eq!(source.n_opened(), 0, "it was fetched in vain");
    assert_eq!(kept(dir.path(), &layers), [0, 1]);
    assert_eq!(names(&dir.path().join("tmp")), [""; 0]);
    // Who has them open does not notice.
    layers[0].expect_all(&store, &first).await;
    layers[1].expect_all(&store, &second).await;
    drop(first);
    let third = layer(&store, &layers[2]).await.unwrap();
    layers[2].expect_all(&store, &third).await;
    assert_eq!(kept(dir.path(), &layers), [1, 2]);
}

#[tokio::test]
async fn a_layer_that_becomes_larger_than_its_blob_promised_is_refused_when_it_does() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 2] = fixtures();
    let unbounded = open(dir.path(), None, &metrics);
    let first = layer(&unbounded, &layers[0]).await.unwrap();
    unbounded.settle().await;
    let used_bytes = metrics.layer_cache_bytes.get();
    // The compressed layer would fit beside the first, what it contains does not.
    let between = (layers[1].blob.len() + layers[1].tar.len()) / 2;
    let max_bytes = u64::try_from(used_bytes).unwrap() + between as u64;
    let store = open_bounded(dir.path(), max_bytes, &metrics);
    let source = layers[1].source();
    let refused = store.layer(&layers[1].desc, source.clone()).await;
    let error = refused.unwrap_err();
    assert!(matches!(error, PresentError::CacheFull { .. }), "{error}");
    assert_eq!(source.n_opened(), 1);
    store.settle().await;
    assert_eq!(kept(dir.path(), &layers), [0]);
    assert_eq!(metrics.layer_cache_bytes.get(), used_bytes);
    drop(first);
}

#[tokio::test]
async fn a_bound_that_is_smaller_than_what_is_there_is_kept_at_start_and_at_close() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 4] = fixtures();
    let unbounded = open(dir.path(), None, &Metrics::new());
    for it in &layers {
        use_once(&unbounded, it).await;
    }
    let in_use = [
        layer(&unbounded, &layers[0]).await.unwrap(),
        layer(&unbounded, &layers[1]).await.unwrap(),
    ];
    let store = open_bounded(dir.path(), 4_000_000, &metrics);
    store.settle().await;
    assert_eq!(kept(dir.path(), &layers), [0, 1], "in use by the other");
    // Opened here as well: a reader is never refused, and who closes last evicts.
    let here = layer(&store, &layers[1]).await.unwrap();
    drop(in_use);
    layers[1].expect_all(&store, &here).await;
    drop(here);
    store.settle().await;
    assert_eq!(kept(dir.path(), &layers), [1]);
}

#[tokio::test]
async fn a_disk_without_room_evicts_nothing_where_that_would_not_help() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 2] = fixtures();
    use_once(&open(dir.path(), None, &metrics), &layers[0]).await;
    let config = CacheConfig {
        min_free_bytes: u64::MAX,
        ..config(dir.path())
    };
    let store = LayerStore::open(config, None, metrics.clone(), Handle::current()).unwrap();
    let error = layer(&store, &layers[1]).await.unwrap_err();
    assert!(matches!(error, PresentError::NoSpace { .. }), "{error}");
    store.settle().await;
    assert_eq!(kept(dir.path(), &layers), [0]);
    assert_eq!(evictions(&metrics), [0, 0]);
}

#[tokio::test]
async fn what_a_killed_eviction_leaves_is_swept_and_the_layer_made_anew() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 1] = fixtures();
    let diff_id = layers[0].desc.diff_id;
    use_once(&open(dir.path(), None, &metrics), &layers[0]).await;
    let paths = CachePaths::new(dir.path());
    let place = paths.layer(diff_id);
    // Killed behind the rename, with one of the files removed already.
    let aside = dir
        .path()
        .join("tmp")
        .join(format!("{}.aside.1-2-3.tmp", diff_id.hex()));
    std::fs::rename(&place, &aside).unwrap();
    std::fs::remove_file(aside.join("state")).unwrap();
    // A lock without a layer, and an image index that was never published.
    let lock = dir.path().join("locks").join("ab".repeat(32));
    std::fs::File::create(&lock).unwrap();
    let unpublished = paths.images().join("x.clip.1-2-3.tmp");
    let file = std::fs::File::create(&unpublished).unwrap();
    let store = open(dir.path(), None, &metrics);
    assert!(!aside.exists() && !lock.exists());
    assert!(unpublished.exists(), "it may be being written");
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(2 * 60 * 60);
    file.set_modified(long_ago).unwrap();
    open(dir.path(), None, &metrics);
    assert!(!unpublished.exists());
    let source = layers[0].source();
    let layer = store.layer(&layers[0].desc, source.clone()).await.unwrap();
    layers[0].expect_all(&store, &layer).await;
    assert_eq!(source.n_opened(), 1);
}

#[tokio::test]
async fn a_directory_without_data_is_no_layer() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 1] = fixtures();
    let store = open(dir.path(), None, &metrics);
    use_once(&store, &layers[0]).await;
    let place = store.paths().layer(layers[0].desc.diff_id);
    std::fs::remove_file(place.join("data")).unwrap();
    // Its marks say that all is present.
    let layer = layer(&store, &layers[0]).await.unwrap();
    layers[0].expect_all(&store, &layer).await;
}

/// Opens and evicts the same layer from two "processes" as fast as they can.
#[tokio::test]
async fn an_open_in_the_moment_of_eviction_gets_all_of_the_layer() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let fixture = Fixture::new(200);
    // The remover ends when this is gone, also when an assertion fails.
    let going = Arc::new(());
    let remover = {
        let (going, paths) = (Arc::downgrade(&going), CachePaths::new(dir.path()));
        let diff_id = fixture.desc.diff_id;
        tokio::task::spawn_blocking(move || {
            let mut n_removed = 0;
            while going.upgrade().is_some() {
                n_removed += u32::from(catalog::remove(&paths, diff_id).unwrap() == Removed::Yes);
                // Who wants the lock, too, asks for it every 5 ms.
                std::thread::sleep(Duration::from_millis(2));
            }
            n_removed
        })
    };
    let stores = [
        open(dir.path(), None, &metrics),
        open(dir.path(), None, &metrics),
    ];
    for _ in 0..40 {
        let both = stores.each_ref().map(|store| async {
            let layer = layer(store, &fixture).await.unwrap();
            fixture.expect_all(store, &layer).await;
            let removed = catalog::remove(store.paths(), fixture.desc.diff_id).unwrap();
            // "Filling", if the other remover has the lock.
            assert!(matches!(removed, Removed::InUse | Removed::Filling));
        });
        futures_util::future::join_all(both).await;
    }
    drop(going);
    let n_removed = remover.await.unwrap();
    assert!(0 < n_removed, "nothing was removed in between");
    assert_eq!(names(&dir.path().join("tmp")), [""; 0]);
}

#[tokio::test]
async fn a_layer_that_waits_for_its_upload_stays() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 3] = fixtures();
    let shared = dir.path().join("remote");
    let remote = remote_in(&shared, None, &metrics);
    // The remote is down: a file is where its directory should be.
    std::fs::File::create(&shared).unwrap();
    let cache = dir.path().join("cache");
    let config = CacheConfig {
        max_bytes: TWO_LAYERS,
        ..config(&cache)
    };
    let store = LayerStore::open(config, remote, metrics.clone(), Handle::current()).unwrap();
    use_once(&store, &layers[0]).await;
    use_once(&store, &layers[1]).await;
    let error = layer(&store, &layers[2]).await.unwrap_err();
    assert!(matches!(error, PresentError::CacheFull { .. }), "{error}");
    assert_eq!(kept(&cache, &layers), [0, 1]);
    store.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn the_index_of_an_image_that_is_open_stays() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let fixture = Fixture::in_one_block(300, 10_000_000);
    // Above the high watermark, and nothing to be evicted but the index.
    let store = open_bounded(dir.path(), 10_500_000, &metrics);
    let indexer = Indexer::new(store.clone(), metrics, 1000);
    let image = ResolvedImage {
        manifest: ManifestDigest::of(b"an image"),
        layers: vec![fixture.desc.clone()],
    };
    let source: Arc<dyn BlobSource> = fixture.source();
    let path = store.paths().image(image.manifest);
    // Made, and then found.
    for _ in 0..2 {
        let opened = indexer.open(&image, &source).await.unwrap();
        store.sweep_soon();
        store.settle().await;
        assert!(
            path.exists(),
            "whoever is to serve the image does not find it"
        );
        assert!(opened.layers[0].file().is_complete());
    }
    let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
    store.sweep_soon();
    store.settle().await;
    assert!(!path.exists(), "it takes room");
    drop(layer);
}

#[tokio::test]
async fn image_indexes_go_with_their_layers_and_do_not_pile_up() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let layers: [Fixture; 3] = fixtures();
    let store = open_bounded(dir.path(), TWO_LAYERS, &metrics);
    let indexer = Indexer::new(store.clone(), metrics.clone(), 1000);
    let mut images = Vec::new();
    for (n, it) in (0u8..).zip(&layers) {
        let image = ResolvedImage {
            manifest: ManifestDigest::of(&[n]),
            layers: vec![it.desc.clone()],
        };
        let source: Arc<dyn BlobSource> = it.source();
        drop(indexer.open(&image, &source).await.unwrap());
        store.settle().await;
        images.push(store.paths().image(image.manifest));
    }
    let is_kept: Vec<bool> = images.iter().map(|it| it.exists()).collect();
    assert_eq!(kept(dir.path(), &layers), [1, 2]);
    assert_eq!(is_kept, [false, true, true]);
    // More images than anybody runs, all of layers that are here: the oldest go.
    let whole = std::fs::read(&images[1]).unwrap();
    let place = store.paths().images();
    let store = open(dir.path(), None, &metrics);
    for n in 0..1100u32 {
        let path = store.paths().image(ManifestDigest::of(&n.to_le_bytes()));
        std::fs::hard_link(&images[2], &path).unwrap();
    }
    clip_csi::disk::publish(&images[1], &whole).unwrap();
    store.sweep_soon();
    store.settle().await;
    assert_eq!(names(&place).len(), 1000);
    assert!(images[1].exists(), "the newest");
}
