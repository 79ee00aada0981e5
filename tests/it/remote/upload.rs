//! Uploads: in order, in bounded memory, through outages, and never of what is wrong.

use std::{
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use clip_csi::{
    clock::SystemClock,
    metrics::Metrics,
    remote::{
        BackOff, ContentCache, ContentOptions, Enqueued, Repair, UploadOptions, UploadOutcome,
        UploadSource, Uploader,
    },
    tier::{CacheKey, LayerCache, Put, TierError},
};

use super::{
    fixture::{
        Fault, Flaky, Layer, PATIENCE, access_map_of, content_options, content_with, dir_cache,
        index_of, key, until, verify_failures,
    },
    servers::{RedisServer, S3Server},
};

/// Starts an uploader whose back-off is short.
fn uploader<T: LayerCache + 'static>(
    engine: &Arc<T>,
    options: UploadOptions,
) -> (Uploader, ContentCache, Metrics) {
    let back_off = BackOff {
        first: Duration::from_millis(10),
        longest: Duration::from_millis(50),
    };
    uploader_with(engine, options, back_off)
}

fn uploader_with<T: LayerCache + 'static>(
    engine: &Arc<T>,
    options: UploadOptions,
    back_off: BackOff,
) -> (Uploader, ContentCache, Metrics) {
    let content = ContentOptions {
        back_off,
        ..content_options(Some(key(1)))
    };
    let (cache, metrics) = content_with(engine, content, Arc::new(SystemClock::new()));
    let uploader = Uploader::start(cache.clone(), options);
    (uploader, cache, metrics)
}

fn options() -> UploadOptions {
    UploadOptions {
        queue_layers: 100,
        attempts: 4,
    }
}

fn uploads(metrics: &Metrics, outcome: &str) -> u64 {
    metrics.remote_uploads.with_label_values(&[outcome]).get()
}

/// Asserts that all of `layer` can be had.
async fn is_whole(cache: &ContentCache, layer: &Layer) {
    let manifest = cache.manifest(&layer.diff_id()).await.unwrap();
    assert_eq!(index_of(cache, &manifest).await, Some(layer.index.clone()));
    for n in 0..layer.n_chunks() {
        assert!(layer.fetch(cache, n).await, "chunk {n}");
    }
}

fn unavailable() -> Fault {
    Fault::Fail(TierError::Unavailable {
        reason: "test".to_owned(),
    })
}

async fn puts_the_manifest_last<T: LayerCache + 'static>(engine: T) {
    let engine = Arc::new(Flaky::new(engine));
    let layer = Arc::new(Layer::new(1, 3));
    let id = layer.diff_id();
    let (uploader, cache, metrics) = uploader(&engine, options());
    assert_eq!(uploader.enqueue(layer.clone()), Enqueued::Accepted);
    until("the layer is uploaded", || !layer.outcomes().is_empty()).await;
    let everything = [
        CacheKey::Chunk(id, 0),
        CacheKey::Chunk(id, 1),
        CacheKey::Chunk(id, 2),
        CacheKey::Index(id, 0),
        CacheKey::Manifest(id),
    ];
    assert_eq!(engine.puts(), everything);
    is_whole(&cache, &layer).await;
    let sent_bytes = metrics.remote_upload_bytes.get();
    assert_eq!(layer.outcomes(), [UploadOutcome::Uploaded { sent_bytes }]);
    // Every other chunk is noise, the others are next to nothing.
    assert!((1_044_480..1_060_000).contains(&sent_bytes), "{sent_bytes}");
    assert_eq!(uploads(&metrics, "ok"), 1);

    // Once more: found out with one request, and nothing is read or sent.
    let before = (engine.n_calls(), layer.n_reads.load(Ordering::SeqCst));
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    assert_eq!(layer.outcomes()[1..], [UploadOutcome::AlreadyThere]);
    let after = (engine.n_calls(), layer.n_reads.load(Ordering::SeqCst));
    assert_eq!(after, (before.0 + 1, before.1));
    assert_eq!(uploads(&metrics, "ok"), 1);
}

#[tokio::test]
async fn the_manifest_comes_last_in_a_dir() {
    let (engine, _dir) = dir_cache();
    puts_the_manifest_last(engine).await;
}

#[tokio::test]
async fn the_manifest_comes_last_in_redis() {
    let name = "the_manifest_comes_last_in_redis";
    if let Some(server) = RedisServer::start(name, &[]).await {
        puts_the_manifest_last(server.cache()).await;
    }
}

#[tokio::test]
async fn the_manifest_comes_last_in_s3() {
    if let Some(server) = S3Server::start("the_manifest_comes_last_in_s3").await {
        puts_the_manifest_last(server.cache()).await;
    }
}

#[tokio::test]
async fn an_upload_outlives_a_killed_redis() {
    let name = "an_upload_outlives_a_killed_redis";
    let Some(server) = RedisServer::start(name, &[]).await else {
        return;
    };
    let engine = Arc::new(server.cache());
    let server = Arc::new(Mutex::new(Some(server)));
    let killed = Arc::new(Mutex::new(None));
    let mut layer = Layer::new(1, 6);
    let (from, to) = (Arc::clone(&server), Arc::clone(&killed));
    // Killed before the fourth chunk is put; the three that were there are lost.
    layer.hook = Some(Box::new(move |n| {
        if n == 3
            && let Some(mut server) = from.lock().unwrap().take()
        {
            server.kill();
            *to.lock().unwrap() = Some(server);
        }
    }));
    let layer = Arc::new(layer);
    let patient = UploadOptions {
        attempts: 10_000,
        ..options()
    };
    let (uploader, cache, metrics) = uploader(&engine, patient);
    uploader.enqueue(layer.clone());
    until("the remote is found to be down", || {
        metrics.remote_up.get() == 0
    })
    .await;
    assert_eq!(layer.outcomes(), []);
    let mut server = killed.lock().unwrap().take().unwrap();
    server.restart().await;
    until("the layer is uploaded", || !layer.outcomes().is_empty()).await;
    assert!(
        matches!(layer.outcomes()[..], [UploadOutcome::Uploaded { .. }]),
        "{:?}",
        layer.outcomes()
    );
    is_whole(&cache, &layer).await;
    assert_eq!(metrics.remote_up.get(), 1);
    // Chunks 0 to 2 twice, 3 perhaps twice, 4 and 5 once.
    let n_reads = layer.n_reads.load(Ordering::SeqCst);
    assert!((9..=10).contains(&n_reads), "{n_reads}");
}

#[tokio::test]
async fn chunks_that_are_there_are_not_sent_again() {
    let (engine, _dir) = dir_cache();
    // Manifest, then per chunk whether it is there and the put: the second put fails.
    let engine = Arc::new(Flaky::new(engine).on(4, unavailable()));
    let layer = Arc::new(Layer::new(1, 3));
    let (uploader, cache, _) = uploader(&engine, options());
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    is_whole(&cache, &layer).await;
    let id = layer.diff_id();
    let expected = [
        CacheKey::Chunk(id, 0),
        CacheKey::Chunk(id, 1),
        CacheKey::Chunk(id, 1),
        CacheKey::Chunk(id, 2),
        CacheKey::Index(id, 0),
        CacheKey::Manifest(id),
    ];
    assert_eq!(engine.puts(), expected);
}

#[tokio::test]
async fn a_layer_is_given_up_after_some_attempts() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    engine.always(Some(unavailable()));
    let layer = Arc::new(Layer::new(1, 1));
    let (uploader, _, metrics) = uploader(&engine, options());
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    assert_eq!(layer.outcomes(), [UploadOutcome::Failed]);
    assert_eq!(uploads(&metrics, "error"), 1);
    assert_eq!(engine.n_calls(), 4);
}

#[tokio::test]
async fn that_the_remote_is_skipped_is_no_attempt() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    engine.always(Some(unavailable()));
    let layer = Arc::new(Layer::new(1, 1));
    // Longer than what the uploader itself waits after a failure: it comes too early each time.
    let wait = Duration::from_millis(400);
    let back_off = BackOff {
        first: wait,
        longest: wait,
    };
    let (uploader, _, _) = uploader_with(&engine, options(), back_off);
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    assert_eq!(layer.outcomes(), [UploadOutcome::Failed]);
    assert_eq!(engine.n_calls(), 4);
}

#[tokio::test]
async fn a_full_store_is_left_alone() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    let full = TierError::Full {
        reason: "test".to_owned(),
    };
    let (uploader, cache, metrics) = uploader(&engine, options());
    let layers: Vec<_> = (0..3).map(|seed| Arc::new(Layer::new(seed, 2))).collect();
    uploader.enqueue(layers[0].clone());
    until("one is there", || !layers[0].outcomes().is_empty()).await;
    let n_puts = engine.puts().len();
    // The next call is the manifest, then comes the question for the chunk, then the put.
    engine.fault(engine.n_calls() + 2, Fault::Fail(full));
    uploader.enqueue(layers[1].clone());
    until("the store is full", || !layers[1].outcomes().is_empty()).await;
    assert_eq!(layers[1].outcomes(), [UploadOutcome::Failed]);
    uploader.enqueue(layers[2].clone());
    uploader.drain(Duration::from_millis(50)).await;
    assert_eq!(layers[2].outcomes(), [UploadOutcome::Stopped]);
    assert_eq!(engine.puts().len(), n_puts + 1, "no further put");
    assert_eq!(metrics.remote_up.get(), 1, "it is asked for reads");
    is_whole(&cache, &layers[0]).await;
}

#[tokio::test]
async fn local_rot_is_not_spread() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    let mut layer = Layer::new(1, 2);
    layer.is_rotten = true;
    let layer = Arc::new(layer);
    let (uploader, _, metrics) = uploader(&engine, options());
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    assert_eq!(layer.outcomes(), [UploadOutcome::Failed]);
    assert_eq!(engine.puts(), []);
    assert_eq!(uploads(&metrics, "error"), 1);
    assert_eq!(layer.n_reads.load(Ordering::SeqCst), 1, "no retry");
}

#[tokio::test]
async fn a_repair_puts_what_it_names() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    let layer = Arc::new(Layer::new(1, 4));
    let id = layer.diff_id();
    let (uploader, cache, _) = uploader(&engine, options());
    uploader.enqueue(layer.clone());
    until("the layer is uploaded", || layer.outcomes().len() == 1).await;
    let n_puts = engine.puts().len();
    engine.delete(CacheKey::Chunk(id, 1)).await.unwrap();
    let wrong = Bytes::from_static(b"wrong");
    for key in [CacheKey::Chunk(id, 2), CacheKey::Index(id, 0)] {
        engine.put(key, wrong.clone(), Put::Replace).await.unwrap();
    }
    let repair = |chunks: &[u32], index| Repair {
        chunks: chunks.to_vec(),
        index,
    };
    // Three requests before the worker runs: one upload. Chunk 99 does not exist.
    uploader.enqueue_repair(layer.clone(), repair(&[2, 1, 99], false));
    uploader.enqueue_repair(layer.clone(), repair(&[2], true));
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    let merged = UploadOutcome::Merged;
    assert_eq!(layer.outcomes()[1..3], [merged, merged]);
    let expected = [
        CacheKey::Chunk(id, 1),
        CacheKey::Chunk(id, 2),
        CacheKey::Index(id, 0),
        CacheKey::Manifest(id),
    ];
    // Two of the puts were the test's own.
    assert_eq!(engine.puts()[n_puts + 2..], expected);
    is_whole(&cache, &layer).await;
}

#[tokio::test]
async fn an_access_map_is_put_before_the_manifest_or_later() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    let (uploader, cache, _) = uploader(&engine, options());
    let map = Bytes::from_static(b"an access map");
    let mut new = Layer::new(1, 1);
    new.access_map = Some(map.clone());
    let new = Arc::new(new);
    let id = new.diff_id();
    uploader.enqueue(new.clone());
    until("it is uploaded", || new.outcomes().len() == 1).await;
    let at = CacheKey::AccessMap(id, new.blob(), 0);
    let expected = [
        CacheKey::Chunk(id, 0),
        at,
        CacheKey::Index(id, 0),
        CacheKey::Manifest(id),
    ];
    assert_eq!(engine.puts(), expected);
    let fetched = access_map_of(&cache, &new).await;
    assert_eq!(fetched, Some(map.clone()));
    // It is there: nothing is sent.
    uploader.enqueue(new.clone());
    until("it is uploaded", || new.outcomes().len() == 2).await;
    assert_eq!(new.outcomes()[1], UploadOutcome::AlreadyThere);
    // Its reader found it wrong: it is put again, alone.
    let reason = "wrong checksum".to_owned();
    cache.reject_access_map(&id, &new.blob(), reason).await;
    assert_eq!(access_map_of(&cache, &new).await, None);
    uploader.enqueue(new.clone());
    until("it is uploaded", || new.outcomes().len() == 3).await;
    assert_eq!(engine.puts()[4..], [at]);
    // Its length goes before it.
    let sent_bytes = 8 + map.len() as u64;
    assert_eq!(new.outcomes()[2], UploadOutcome::Uploaded { sent_bytes });
    uploader.drain(PATIENCE).await;
}

/// Bytes that do not repeat, so that parts that change places are noticed.
fn noise(name: &str, len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher
        .update(name.as_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

#[tokio::test]
async fn what_is_longer_than_a_chunk_comes_in_parts() {
    const PART_BYTES: usize = 1_044_480;
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    let (uploader, cache, metrics) = uploader(&engine, options());
    let mut layer = Layer::new(1, 3);
    layer.index = noise("index", 2 * PART_BYTES + 1);
    layer.access_map = Some(noise("map", 2 * PART_BYTES));
    let layer = Arc::new(layer);
    let (id, blob) = (layer.diff_id(), layer.blob());
    uploader.enqueue(layer.clone());
    until("it is uploaded", || layer.outcomes().len() == 1).await;
    // The map's start and the manifest say that all of them are there.
    let parts = [
        CacheKey::AccessMap(id, blob, 1),
        CacheKey::AccessMap(id, blob, 0),
        CacheKey::Index(id, 0),
        CacheKey::Index(id, 1),
        CacheKey::Index(id, 2),
        CacheKey::Manifest(id),
    ];
    assert_eq!(engine.puts()[3..], parts);
    is_whole(&cache, &layer).await;
    assert_eq!(access_map_of(&cache, &layer).await, layer.access_map);
    for key in parts {
        let value = engine.get(key, 2 << 20).await.unwrap().unwrap();
        assert!(value.len() <= PART_BYTES + 8, "{key}");
    }

    // A part of another version of the index: not all of it is wrong, and all of it is refused.
    let manifest = cache.manifest(&id).await.unwrap();
    let other = [&[0][..], &noise("other", PART_BYTES)].concat();
    let at = CacheKey::Index(id, 1);
    engine.put(at, other.into(), Put::Replace).await.unwrap();
    assert_eq!(index_of(&cache, &manifest).await, None);
    assert_eq!(verify_failures(&metrics), 1);
    engine.delete(at).await.unwrap();
    assert_eq!(index_of(&cache, &manifest).await, None);
    assert_eq!(verify_failures(&metrics), 1, "a miss is no failure");

    // A map of which a part went is no map: it is put again, all of it.
    engine
        .delete(CacheKey::AccessMap(id, blob, 1))
        .await
        .unwrap();
    assert_eq!(access_map_of(&cache, &layer).await, None);
    let start = CacheKey::AccessMap(id, blob, 0);
    assert_eq!(engine.get(start, 2 << 20).await.unwrap(), None);
    let repair = Repair {
        chunks: Vec::new(),
        index: true,
    };
    uploader.enqueue_repair(layer.clone(), repair);
    uploader.drain(PATIENCE).await;
    is_whole(&cache, &layer).await;
    assert_eq!(access_map_of(&cache, &layer).await, layer.access_map);
}

#[tokio::test]
async fn an_access_map_that_is_too_long_goes_nowhere() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    let (uploader, cache, metrics) = uploader(&engine, options());
    // The layer has 1234 bytes.
    let long = Bytes::from(vec![1; 1234 + 4096 + 1]);
    let mut layer = Layer::new(1, 1);
    layer.access_map = Some(long.clone());
    let layer = Arc::new(layer);
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    is_whole(&cache, &layer).await;
    let (id, blob) = (layer.diff_id(), layer.blob());
    let at = CacheKey::AccessMap(id, blob, 0);
    assert!(!engine.puts().contains(&at));
    // Somebody else puts one: it is not taken, and deleted.
    let long = [&(long.len() as u64).to_le_bytes(), &long[..]].concat();
    engine.put(at, long.into(), Put::Replace).await.unwrap();
    assert_eq!(access_map_of(&cache, &layer).await, None);
    assert_eq!(engine.get(at, usize::MAX / 2).await.unwrap(), None);
    assert_eq!(verify_failures(&metrics), 1);
}

#[tokio::test]
async fn a_manifest_that_lies_is_replaced() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(engine);
    let layer = Arc::new(Layer::new(1, 2));
    let at = CacheKey::Manifest(layer.diff_id());
    let lie = Bytes::from_static(b"not a manifest");
    engine.put(at, lie, Put::IfAbsent).await.unwrap();
    let (uploader, cache, _) = uploader(&engine, options());
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    is_whole(&cache, &layer).await;
}

/// However many layers wait and however slow the remote is, one chunk is in memory.
#[tokio::test]
async fn the_queue_is_bounded_and_holds_no_data() {
    let (engine, _dir) = dir_cache();
    // The manifest is absent, so is the chunk, and the first put never ends.
    let engine = Arc::new(Flaky::new(engine).on(2, Fault::Hang));
    let (uploader, _, metrics) = uploader(
        &engine,
        UploadOptions {
            queue_layers: 10,
            ..options()
        },
    );
    let layers: Vec<_> = (0..12).map(|seed| Arc::new(Layer::new(seed, 2))).collect();
    assert_eq!(uploader.enqueue(layers[0].clone()), Enqueued::Accepted);
    until("the put hangs", || engine.puts().len() == 1).await;
    for layer in &layers[1..11] {
        assert_eq!(uploader.enqueue(layer.clone()), Enqueued::Accepted);
    }
    assert_eq!(uploader.enqueue(layers[11].clone()), Enqueued::Refused);
    assert_eq!(uploads(&metrics, "dropped"), 1);
    // One that waits already takes no further place.
    assert_eq!(uploader.enqueue(layers[5].clone()), Enqueued::Accepted);
    let n_reads: usize = layers
        .iter()
        .map(|it| it.n_reads.load(Ordering::SeqCst))
        .sum();
    assert_eq!(n_reads, 1, "only the chunk that is being put was read");

    // The deadline passes: whatever is left is told.
    uploader.drain(Duration::from_millis(20)).await;
    assert_eq!(layers[0].outcomes(), [UploadOutcome::Stopped]);
    let both = [UploadOutcome::Merged, UploadOutcome::Stopped];
    assert_eq!(layers[5].outcomes(), both);
    assert_eq!(layers[10].outcomes(), [UploadOutcome::Stopped]);
    assert_eq!(layers[11].outcomes(), []);
    assert_eq!(uploader.enqueue(layers[11].clone()), Enqueued::Refused);
    assert_eq!(engine.puts().len(), 1);
}

#[tokio::test]
async fn a_dropped_uploader_tells_those_that_waited() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine).on(0, Fault::Hang));
    let layers: Vec<_> = (0..2).map(|seed| Arc::new(Layer::new(seed, 1))).collect();
    let (uploader, _, _) = uploader(&engine, options());
    for layer in &layers {
        uploader.enqueue(layer.clone());
    }
    until("the first has begun", || engine.n_calls() == 1).await;
    drop(uploader);
    for layer in layers {
        until("it is told", || {
            layer.outcomes() == [UploadOutcome::Stopped]
        })
        .await;
    }
}
