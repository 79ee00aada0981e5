//! The layer store over real files: tiers, single flight, verification, restarts.

use std::{sync::Arc, time::Duration};

use clip_csi::{
    chunk::CHUNK_BYTES,
    digest::{BlobDigest, DiffId},
    fair::Claimant,
    layer::{CacheConfig, disk::DiskWait, store::LayerStore},
    metrics::Metrics,
    tier::{LayerDesc, PresentError, SourceError},
};
use futures_util::future;
use tokio::{runtime::Handle, sync::Semaphore};

use crate::layer_fixture::{
    FakeSource, Fixture, config, decompressions, files_below, key_file, names, open, present,
    remote_in,
};

#[tokio::test]
async fn many_first_accesses_decompress_once() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(1),
    );
    let source = fixture.source();
    // Two stores on one directory stand for two processes: flock knows no difference.
    let stores = [
        open(dir.path(), None, &metrics),
        open(dir.path(), None, &metrics),
    ];
    let wanted = stores
        .iter()
        .flat_map(|store| (0..5).map(|_| store.layer(&fixture.desc, source.clone())));
    let layers = future::try_join_all(wanted).await.unwrap();
    assert_eq!((decompressions(&metrics), source.n_opened()), (1, 1));
    fixture.expect_all(&stores[0], &layers[0]).await;
    fixture.expect_all(&stores[1], &layers[9]).await;
    assert_eq!(
        names(&stores[0].paths().layers()),
        [fixture.desc.diff_id.hex()]
    );
    assert_eq!(names(&dir.path().join("tmp")), [""; 0]);
}

#[tokio::test]
async fn a_restarted_store_has_what_it_had() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(2),
    );
    let source = fixture.source();
    open(dir.path(), None, &metrics)
        .layer(&fixture.desc, source.clone())
        .await
        .unwrap();
    let leftover = dir
        .path()
        .join("tmp")
        .join(format!("{}.1-2-3.tmp", fixture.desc.diff_id.hex()));
    std::fs::create_dir(&leftover).unwrap();
    let store = open(dir.path(), None, &metrics);
    assert!(!leftover.exists());
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    fixture.expect_all(&store, &layer).await;
    assert_eq!(source.n_opened(), 1);
    // What the disk gave to it: blocks for the data, one each for index and state.
    let used_bytes = usize::try_from(metrics.layer_cache_bytes.get()).unwrap();
    assert!((fixture.tar.len()..fixture.tar.len() + (16 << 10)).contains(&used_bytes));
    assert_eq!(metrics.layer_cache_layers.get(), 1);
}

#[tokio::test]
async fn layers_that_lie_are_refused_and_leave_nothing() {
    let fixture = Fixture::new(3);
    let truncated = &fixture.blob[..fixture.blob.len() / 2];
    let other_tar = Fixture::new(4);
    let mut flipped = fixture.blob.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let garbage = vec![0x5a; 4096];
    let describe = |blob: &[u8], diff_id| LayerDesc {
        diff_id,
        blob: BlobDigest::of(blob),
        blob_bytes: blob.len() as u64,
        toc: None,
    };
    let diff_id = fixture.desc.diff_id;
    for (what, blob, desc, expected) in [
        (
            "truncated",
            truncated,
            describe(truncated, diff_id),
            "decompressed",
        ),
        (
            "lying about its DiffID",
            &other_tar.blob,
            describe(&other_tar.blob, diff_id),
            "DiffID",
        ),
        ("not the blob", &flipped, fixture.desc.clone(), ""),
        (
            "not a tar",
            &garbage,
            describe(&garbage, DiffId::of(&garbage)),
            "",
        ),
    ] {
        let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
        let store = open(dir.path(), None, &metrics);
        let source = FakeSource::new(blob.to_vec());
        let error = store.layer(&desc, source).await.unwrap_err();
        let PresentError::Refused { layer, reason } = &error else {
            panic!("{what}: {error}")
        };
        assert_eq!(*layer, desc.diff_id, "{what}");
        assert!(reason.contains(expected), "{what}: {reason}");
        assert_eq!(names(&store.paths().layers()), [""; 0], "{what}");
        assert_eq!(names(&dir.path().join("tmp")), [""; 0], "{what}");
        assert_eq!(
            metrics
                .layer_decompressions
                .with_label_values(&["error"])
                .get(),
            1,
            "{what}"
        );
    }
}

#[tokio::test]
async fn limits_stop_a_bomb() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(5),
    );
    for (config, limit) in [
        (
            CacheConfig {
                max_layer_bytes: 1 << 20,
                ..config(dir.path())
            },
            "cache.max_layer_bytes",
        ),
        (
            CacheConfig {
                max_layer_entries: 0,
                ..config(dir.path())
            },
            "cache.max_layer_entries",
        ),
    ] {
        let store = LayerStore::open(config, None, metrics.clone(), Handle::current()).unwrap();
        let error = store
            .layer(&fixture.desc, fixture.source())
            .await
            .unwrap_err();
        assert!(
            matches!(&error, PresentError::Limit { limit: it, .. } if *it == limit),
            "{error}"
        );
    }
    let config = CacheConfig {
        min_free_bytes: u64::MAX,
        ..config(dir.path())
    };
    let store = LayerStore::open(config, None, metrics, Handle::current()).unwrap();
    let error = store
        .layer(&fixture.desc, fixture.source())
        .await
        .unwrap_err();
    assert!(matches!(error, PresentError::NoSpace { .. }), "{error}");
    assert_eq!(names(&dir.path().join("tmp")), [""; 0]);
}

#[tokio::test]
async fn a_failing_source_is_told_and_tried_anew() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(6),
    );
    let store = open(dir.path(), None, &metrics);
    let mut failing = FakeSource::new(fixture.blob[..100_000].to_vec());
    Arc::get_mut(&mut failing).unwrap().failure = Some(SourceError::Unavailable {
        registry: "r".into(),
        reason: "down".into(),
    });
    let error = store.layer(&fixture.desc, failing).await.unwrap_err();
    assert!(matches!(error, PresentError::Origin { .. }), "{error}");
    let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
    fixture.expect_all(&store, &layer).await;
}

#[tokio::test]
async fn another_node_reads_by_chunk_from_the_remote() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(7),
    );
    let (shared, key) = (dir.path().join("remote"), key_file(dir.path()));
    let source = fixture.source();
    let a = open(
        &dir.path().join("a"),
        remote_in(&shared, Some(&key), &metrics),
        &metrics,
    );
    a.layer(&fixture.desc, source.clone()).await.unwrap();
    a.shutdown(Duration::from_secs(20)).await;
    let marker = a.paths().layer(fixture.desc.diff_id).join("upload");
    assert!(
        !marker.exists(),
        "the layer is uploaded, its mark should be gone"
    );

    let b_metrics = Metrics::new();
    let b = open(
        &dir.path().join("b"),
        remote_in(&shared, Some(&key), &b_metrics),
        &b_metrics,
    );
    let layer = b.layer(&fixture.desc, source.clone()).await.unwrap();
    assert!(
        !layer.file().has(0..1),
        "an index from the remote brings no chunks"
    );
    present(&b, fixture.desc.diff_id, 2..3).await.unwrap();
    assert!(layer.file().has(2..3) && !layer.file().has(1..2));
    fixture.expect_all(&b, &layer).await;
    assert_eq!((source.n_opened(), decompressions(&b_metrics)), (1, 0));
    assert_eq!(
        b_metrics
            .tier_reads
            .with_label_values(&["content_cache", "hit"])
            .get(),
        2
    );
}

#[tokio::test]
async fn without_a_key_the_whole_layer_is_checked_first() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(8),
    );
    let shared = dir.path().join("remote");
    let source = fixture.source();
    let a = open(
        &dir.path().join("a"),
        remote_in(&shared, None, &metrics),
        &metrics,
    );
    a.layer(&fixture.desc, source.clone()).await.unwrap();
    a.shutdown(Duration::from_secs(20)).await;

    let b_metrics = Metrics::new();
    let b = open(
        &dir.path().join("b"),
        remote_in(&shared, None, &b_metrics),
        &b_metrics,
    );
    let layer = b.layer(&fixture.desc, source.clone()).await.unwrap();
    assert!(layer.file().is_complete());
    fixture.expect_all(&b, &layer).await;
    assert_eq!((source.n_opened(), decompressions(&b_metrics)), (1, 0));
}

#[tokio::test]
async fn without_a_key_a_layer_that_is_said_to_be_too_large_comes_from_the_registry() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let (small, large) = (Fixture::new(16), Fixture::in_one_block(17, 8 << 20));
    let shared = dir.path().join("remote");
    let a = open(
        &dir.path().join("a"),
        remote_in(&shared, None, &metrics),
        &metrics,
    );
    a.layer(&large.desc, large.source()).await.unwrap();
    a.shutdown(Duration::from_secs(20)).await;
    // Somebody who can write to the remote says that the small one is as large, and has its chunks there.
    let place = |it: &Fixture| {
        let name = it.desc.diff_id.hex();
        shared.join(&name[..2]).join(name)
    };
    let is_manifest = |it: &std::path::PathBuf| std::fs::read(it).unwrap().starts_with(b"CLRM");
    let found = files_below(&place(&large)).into_iter().find(is_manifest);
    let found = found.unwrap();
    let mut lie = std::fs::read(&found).unwrap();
    let at = 8;
    assert_eq!(&lie[at..at + 32], large.desc.diff_id.as_bytes());
    lie[at..at + 32].copy_from_slice(small.desc.diff_id.as_bytes());
    std::fs::create_dir_all(place(&small)).unwrap();
    for path in files_below(&place(&large)) {
        std::fs::copy(&path, place(&small).join(path.file_name().unwrap())).unwrap();
    }
    let manifest = place(&small).join(found.file_name().unwrap());
    let too_large = [
        CacheConfig {
            max_layer_bytes: 7 << 20,
            ..config(&dir.path().join("b"))
        },
        CacheConfig {
            max_bytes: 7 << 20,
            ..config(&dir.path().join("c"))
        },
    ];
    for config in too_large {
        clip_csi::disk::publish(&manifest, &lie).unwrap();
        let metrics = Metrics::new();
        let remote = remote_in(&shared, None, &metrics);
        let store = LayerStore::open(config, remote, metrics, Handle::current()).unwrap();
        let layer = store.layer(&small.desc, small.source()).await.unwrap();
        small.expect_all(&store, &layer).await;
        store.shutdown(Duration::from_secs(20)).await;
    }
}

#[tokio::test]
async fn chunks_that_the_remote_lost_come_from_the_registry_and_go_back() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(9),
    );
    let (shared, key) = (dir.path().join("remote"), key_file(dir.path()));
    let source = fixture.source();
    let a = open(
        &dir.path().join("a"),
        remote_in(&shared, Some(&key), &metrics),
        &metrics,
    );
    a.layer(&fixture.desc, source.clone()).await.unwrap();
    a.shutdown(Duration::from_secs(20)).await;
    let remote = remote_in(&shared, Some(&key), &metrics).unwrap();
    let digest = {
        let store = open(&dir.path().join("a"), None, &metrics);
        let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
        layer.file().index().chunk_digest(1).unwrap()
    };
    // A wrong chunk is deleted by whoever meets it.
    let id = fixture.desc.diff_id;
    let mut n_files = 0;
    for path in files_below(&shared) {
        let name = path.to_string_lossy().into_owned();
        if name.contains(":o:1") || name.ends_with("o-1") || name.ends_with("o.1") {
            std::fs::remove_file(&path).unwrap();
            n_files += 1;
        }
    }
    assert_eq!(n_files, 1, "{:?}", files_below(&shared));
    let len = usize::try_from(CHUNK_BYTES).unwrap();
    assert!(
        remote
            .cache
            .chunk(Claimant::Mount(0), &id, 1, len, &digest)
            .await
            .is_none()
    );

    let b_metrics = Metrics::new();
    let b = open(
        &dir.path().join("b"),
        remote_in(&shared, Some(&key), &b_metrics),
        &b_metrics,
    );
    let layer = b.layer(&fixture.desc, source.clone()).await.unwrap();
    fixture.expect_all(&b, &layer).await;
    assert_eq!(source.n_opened(), 2);
    b.shutdown(Duration::from_secs(20)).await;
    assert!(
        remote
            .cache
            .chunk(Claimant::Mount(0), &id, 1, len, &digest)
            .await
            .is_some(),
        "the chunk was put again"
    );
}

#[tokio::test]
async fn an_upload_that_a_stop_cut_short_is_made_after_the_restart() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(10),
    );
    let (shared, key) = (dir.path().join("remote"), key_file(dir.path()));
    let source = fixture.source();
    let a = open(
        &dir.path().join("a"),
        remote_in(&shared, Some(&key), &metrics),
        &metrics,
    );
    a.layer(&fixture.desc, source.clone()).await.unwrap();
    a.shutdown(Duration::ZERO).await;
    assert!(
        a.paths()
            .layer(fixture.desc.diff_id)
            .join("upload")
            .exists()
    );
    drop(a);
    let again = open(
        &dir.path().join("a"),
        remote_in(&shared, Some(&key), &metrics),
        &metrics,
    );
    again.shutdown(Duration::from_secs(20)).await;
    let remote = remote_in(&shared, Some(&key), &metrics).unwrap();
    assert!(remote.cache.manifest(&fixture.desc.diff_id).await.is_some());
}

#[tokio::test]
async fn readers_are_served_behind_the_stream() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(11),
    );
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
    for chunk in 0..layer.file().n_chunks() {
        layer.file().drop_chunk(chunk);
    }
    drop(layer);
    // The blob's second half never comes.
    let held = fixture.source();
    let n_pieces = fixture.blob.len().div_ceil(64 << 10);
    held.pieces
        .forget_permits(Semaphore::MAX_PERMITS - n_pieces / 2);
    let layer = store.layer(&fixture.desc, held.clone()).await.unwrap();
    present(&store, fixture.desc.diff_id, 0..1).await.unwrap();
    assert!(layer.file().has(0..1) && !layer.file().has(3..4));
    let mut read = vec![0; 1 << 20];
    read.truncate(usize::try_from(CHUNK_BYTES).unwrap());
    layer
        .file()
        .read_at(&mut read, 0, DiskWait::Allowed)
        .unwrap();
    assert!(read == fixture.tar[..read.len()]);
    store.shutdown(Duration::ZERO).await;
}

#[tokio::test]
async fn a_blob_that_changed_is_never_served() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(12),
    );
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
    layer.file().drop_chunk(1);
    drop(layer);
    let other = Fixture::new(99).source();
    let layer = store.layer(&fixture.desc, other).await.unwrap();
    let error = present(&store, fixture.desc.diff_id, 1..2)
        .await
        .unwrap_err();
    assert!(matches!(error, PresentError::Refused { .. }), "{error}");
    assert!(!layer.file().has(1..2) && layer.file().has(0..1));
    drop(layer);
    // The right blob repairs it: an error is not remembered.
    let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
    fixture.expect_all(&store, &layer).await;
}

#[tokio::test]
async fn after_an_unclean_stop_chunks_are_verified_not_fetched() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(14),
    );
    let source = fixture.source();
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    let place = layer.file().dir().to_owned();
    drop((layer, store));
    // As if the bitmap had not reached the disk, and one chunk of the data neither.
    std::fs::remove_file(place.join("state")).unwrap();
    let data = std::fs::OpenOptions::new()
        .write(true)
        .open(place.join("data"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&data, b"torn", CHUNK_BYTES).unwrap();
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    assert!(!layer.file().has(0..1));
    present(&store, fixture.desc.diff_id, 0..1).await.unwrap();
    assert_eq!(source.n_opened(), 1, "the chunk on disk was right");
    fixture.expect_all(&store, &layer).await;
    assert_eq!(source.n_opened(), 2, "the torn chunk was not");
}

#[tokio::test]
async fn a_damaged_index_is_made_anew() {
    let (dir, metrics, fixture) = (
        tempfile::tempdir().unwrap(),
        Metrics::new(),
        Fixture::new(15),
    );
    let source = fixture.source();
    let store = open(dir.path(), None, &metrics);
    store.layer(&fixture.desc, source.clone()).await.unwrap();
    let index = store.paths().layer(fixture.desc.diff_id).join("index");
    for damage in [&b""[..], b"CLIPLYIX garbage"] {
        clip_csi::disk::publish(&index, damage).unwrap();
        let store = open(dir.path(), None, &metrics);
        let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
        fixture.expect_all(&store, &layer).await;
    }
    assert_eq!(decompressions(&metrics), 3);
}

#[tokio::test]
async fn a_new_cache_directory_is_private() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let cache = dir.path().join("cache");
    open(&cache, None, &metrics);
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&cache).unwrap());
    assert_eq!(mode & 0o777, 0o700);
}

#[tokio::test]
async fn an_unknown_layer_is_an_answer() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let store = open(dir.path(), None, &metrics);
    let error = present(&store, DiffId::of(b"?"), 0..1).await.unwrap_err();
    assert!(matches!(error, PresentError::Unknown { .. }), "{error}");
}
