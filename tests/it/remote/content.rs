//! A store that lies, dies, or belongs to somebody else: nothing wrong is ever returned.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use clip_csi::{
    chunk,
    clock::{Clock, SystemClock},
    digest::{ChunkDigest, DiffId},
    fair::Claimant,
    remote::{Trust, UploadOptions, UploadOutcome, UploadSource, Uploader},
    tier::{CacheKey, LayerCache, Put, TierError},
};

use super::{
    fixture::{
        Call, FakeClock, Fault, Flaky, Layer, PATIENCE, Shared, content, dir_cache, index_of, key,
        verify_failures,
    },
    servers::{RedisServer, redis_cache},
};

fn system_clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}

/// Uploads `layer` to `engine` as a node with `key` does.
async fn fill<T: LayerCache + 'static>(
    engine: &Arc<T>,
    layer: &Arc<Layer>,
    key: Option<clip_csi::integrity::IntegrityKey>,
) {
    let (cache, _) = content(engine, key, system_clock());
    let uploader = Uploader::start(cache, UploadOptions::default());
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    let outcomes = layer.outcomes();
    let last = outcomes.last();
    assert!(
        matches!(last, Some(UploadOutcome::Uploaded { .. })),
        "{outcomes:?}"
    );
}

#[tokio::test]
async fn what_was_uploaded_comes_back() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(engine);
    let layer = Arc::new(Layer::new(1, 5));
    fill(&engine, &layer, Some(key(1))).await;
    for (reader, trust) in [
        (Some(key(1)), Trust::Authenticated),
        (None, Trust::Unverified),
    ] {
        let (cache, metrics) = content(&engine, reader, system_clock());
        let manifest = cache.manifest(&layer.diff_id()).await.unwrap();
        assert_eq!(manifest.trust, trust);
        assert_eq!(manifest.diff_id, layer.diff_id());
        assert_eq!(manifest.blob, layer.blob());
        assert_eq!(manifest.blob_bytes, 9);
        assert_eq!(manifest.layer_bytes, layer.layer_bytes());
        assert_eq!(manifest.chunk_digests, layer.chunk_digests());
        assert_eq!(index_of(&cache, &manifest).await, Some(layer.index.clone()));
        for n in 0..5 {
            assert!(layer.fetch(&cache, n).await, "chunk {n}");
        }
        assert_eq!(verify_failures(&metrics), 0);
        let gets = |outcome| metrics.remote_requests.with_label_values(&["get", outcome]);
        assert_eq!(gets("hit").get(), 7);
        assert_eq!(gets("miss").get() + gets("error").get(), 0);
    }
    let (cache, metrics) = content(&engine, None, system_clock());
    let absent = DiffId::of(b"absent");
    assert!(cache.manifest(&absent).await.is_none());
    let misses = metrics.remote_requests.with_label_values(&["get", "miss"]);
    assert_eq!(misses.get(), 1);
    assert_eq!(verify_failures(&metrics), 0);
}

fn lz4_bomb(len: usize) -> Vec<u8> {
    [&[1][..], &lz4_flex::block::compress(&vec![0; len])].concat()
}

/// What a chunk's value may be turned into; the second value is another chunk's.
type Poison = fn(&[u8], &[u8]) -> Vec<u8>;

const CHUNK_POISONS: [(&str, Poison); 12] = [
    ("bit flip at the beginning", |it, _| flip(it, 0)),
    ("bit flip in the middle", |it, _| flip(it, it.len() / 2)),
    ("bit flip at the end", |it, _| flip(it, it.len() - 1)),
    ("swapped with another chunk", |_, other| other.to_vec()),
    ("truncated by one", |it, _| it[..it.len() - 1].to_vec()),
    ("truncated to the codec", |it, _| it[..1].to_vec()),
    ("one byte longer", |it, _| [it, b"x"].concat()),
    ("garbage", |it, _| vec![0xa5; it.len().min(999)]),
    ("lz4 bomb", |_, _| lz4_bomb(51_000_000)),
    ("empty", |_, _| Vec::new()),
    ("7 MiB", |_, _| vec![0; 7 << 20]),
    ("zeros that inflate to the right length", |_, _| {
        lz4_bomb(usize::try_from(chunk::CHUNK_BYTES).unwrap())
    }),
];

fn flip(value: &[u8], at: usize) -> Vec<u8> {
    let mut value = value.to_vec();
    value[at] ^= 0x20;
    value
}

async fn raw(engine: &dyn LayerCache, key: CacheKey) -> Option<Bytes> {
    engine.get(key, 64 << 20).await.unwrap()
}

async fn poisoned_chunks_are_detected<T: LayerCache + 'static>(engine: T) {
    let engine = Arc::new(engine);
    let layer = Arc::new(Layer::new(1, 4));
    fill(&engine, &layer, Some(key(1))).await;
    let (cache, metrics) = content(&engine, Some(key(1)), system_clock());
    let id = layer.diff_id();
    let mut n_failures = 0;
    // Chunk 0 is stored raw, chunk 1 as lz4.
    for (n, codec) in [(0, 0), (1, 1)] {
        let at = CacheKey::Chunk(id, n);
        let good = raw(&*engine, at).await.unwrap();
        assert_eq!(good[0], codec);
        let other = raw(&*engine, CacheKey::Chunk(id, n + 2)).await.unwrap();
        for (what, poison) in CHUNK_POISONS {
            let bad = Bytes::from(poison(&good, &other));
            engine.put(at, bad, Put::Replace).await.unwrap();
            assert!(!layer.fetch(&cache, n).await, "{what}: was returned");
            n_failures += 1;
            assert_eq!(verify_failures(&metrics), n_failures, "{what}: not counted");
            assert_eq!(raw(&*engine, at).await, None, "{what}: not deleted");
            assert!(!layer.fetch(&cache, n).await, "{what}: nothing to return");
            assert_eq!(verify_failures(&metrics), n_failures, "{what}: a miss");
        }
        engine.put(at, good, Put::IfAbsent).await.unwrap();
        assert!(layer.fetch(&cache, n).await, "repaired");
    }
}

#[tokio::test]
async fn poisoned_chunks_in_a_dir_are_detected() {
    let (engine, _dir) = dir_cache();
    poisoned_chunks_are_detected(engine).await;
}

#[tokio::test]
async fn poisoned_chunks_in_redis_are_detected() {
    let name = "poisoned_chunks_in_redis_are_detected";
    if let Some(server) = RedisServer::start(name, &[]).await {
        poisoned_chunks_are_detected(server.cache()).await;
    }
}

#[tokio::test]
async fn poisoned_manifests_are_detected() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(engine);
    let (layer, other) = (Arc::new(Layer::new(1, 2)), Arc::new(Layer::new(2, 2)));
    let at = CacheKey::Manifest(layer.diff_id());
    fill(&engine, &layer, None).await;
    let unsigned = raw(&*engine, at).await.unwrap();
    engine.delete(at).await.unwrap();
    fill(&engine, &layer, Some(key(2))).await;
    let foreign = raw(&*engine, at).await.unwrap();
    engine.delete(at).await.unwrap();
    fill(&engine, &layer, Some(key(1))).await;
    let good = raw(&*engine, at).await.unwrap();
    fill(&engine, &other, Some(key(1))).await;
    let others = raw(&*engine, CacheKey::Manifest(other.diff_id()))
        .await
        .unwrap();

    let mut poisons: Vec<(String, Bytes)> = vec![
        ("unsigned".to_owned(), unsigned.clone()),
        ("of another installation".to_owned(), foreign),
        ("of another layer".to_owned(), others.clone()),
        ("empty".to_owned(), Bytes::new()),
        ("garbage".to_owned(), vec![0xa5; 500].into()),
        (
            "a raw layer, as other tools store it".to_owned(),
            layer.content.clone().into(),
        ),
        ("truncated".to_owned(), good.slice(..good.len() - 32)),
        ("longer".to_owned(), [&good[..], &[0; 32]].concat().into()),
    ];
    for byte in (0..good.len()).step_by(9) {
        poisons.push((format!("bit flip at {byte}"), flip(&good, byte).into()));
    }
    let (cache, metrics) = content(&engine, Some(key(1)), system_clock());
    for (n, (what, bad)) in (1..).zip(poisons) {
        engine.put(at, bad, Put::Replace).await.unwrap();
        let got = cache.manifest(&layer.diff_id()).await;
        assert_eq!(got, None, "{what}");
        assert_eq!(verify_failures(&metrics), n, "{what}: not counted");
    }
    engine.put(at, good, Put::Replace).await.unwrap();
    assert!(cache.manifest(&layer.diff_id()).await.is_some());

    // Without a key, the wrong layer's is still found out; a lie is for the caller to find out.
    let (cache, metrics) = content(&engine, None, system_clock());
    engine.put(at, others, Put::Replace).await.unwrap();
    assert_eq!(cache.manifest(&layer.diff_id()).await, None);
    assert_eq!(verify_failures(&metrics), 1);
    let lie = Bytes::from(flip(&unsigned, 150));
    engine.put(at, lie, Put::Replace).await.unwrap();
    let manifest = cache.manifest(&layer.diff_id()).await.unwrap();
    assert_eq!(manifest.trust, Trust::Unverified);
    cache.reject(&layer.diff_id()).await;
    assert_eq!(verify_failures(&metrics), 2);
    assert_eq!(raw(&*engine, at).await, None, "rejected, hence deleted");
}

#[tokio::test]
async fn poisoned_indices_are_detected() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(engine);
    let layer = Arc::new(Layer::new(1, 1));
    fill(&engine, &layer, Some(key(1))).await;
    let (cache, metrics) = content(&engine, Some(key(1)), system_clock());
    let manifest = cache.manifest(&layer.diff_id()).await.unwrap();
    let at = CacheKey::Index(layer.diff_id(), 0);
    let good = raw(&*engine, at).await.unwrap();
    assert_eq!(good[0], 1, "it is compressed");
    for (n, (what, bad)) in (1..).zip([
        ("bit flip in the codec", flip(&good, 0)),
        ("bit flip in the payload", flip(&good, 5)),
        ("truncated", good[..good.len() - 1].to_vec()),
        ("codec only", good[..1].to_vec()),
        ("empty", Vec::new()),
        ("bomb", lz4_bomb(150_000)),
        ("too long", lz4_bomb(51_000_000)),
        ("another index", [&[0][..], &[7; 650]].concat()),
    ]) {
        engine.put(at, bad.into(), Put::Replace).await.unwrap();
        assert_eq!(index_of(&cache, &manifest).await, None, "{what}");
        assert_eq!(verify_failures(&metrics), n, "{what}: not counted");
    }
    engine.put(at, good, Put::Replace).await.unwrap();
    assert_eq!(index_of(&cache, &manifest).await, Some(layer.index.clone()));
    engine.delete(at).await.unwrap();
    assert_eq!(index_of(&cache, &manifest).await, None);
}

#[tokio::test]
async fn faults_on_the_way_are_misses() {
    let (engine, _dir) = dir_cache();
    let layer = Arc::new(Layer::new(1, 3));
    let engine = Arc::new(engine);
    fill(&engine, &layer, Some(key(1))).await;
    let flaky = Flaky::new(Shared(engine))
        .on(0, Fault::Truncate)
        .on(1, Fault::Corrupt)
        .on(3, Fault::Truncate)
        .on(6, Fault::Corrupt);
    let flaky = Arc::new(flaky);
    let (cache, metrics) = content(&flaky, Some(key(1)), system_clock());
    let id = layer.diff_id();
    assert_eq!(cache.manifest(&id).await, None, "truncated");
    assert_eq!(cache.manifest(&id).await, None, "corrupted");
    let manifest = cache.manifest(&id).await.unwrap();
    assert_eq!(index_of(&cache, &manifest).await, None, "truncated");
    assert_eq!(index_of(&cache, &manifest).await, Some(layer.index.clone()));
    assert!(layer.fetch(&cache, 0).await);
    assert!(!layer.fetch(&cache, 1).await, "corrupted");
    assert_eq!(verify_failures(&metrics), 4);
    assert_eq!(metrics.remote_up.get(), 1, "it answers, it is not down");
    let last = flaky.calls().last().copied();
    assert_eq!(last, Some(Call::Delete(CacheKey::Chunk(id, 1))));
}

/// Calls that reach a dead engine: one, then none until the back-off has passed.
async fn costs_one_call<T: LayerCache + 'static>(engine: T, error: &str) {
    let engine = Arc::new(Flaky::new(engine));
    let clock = Arc::new(FakeClock::default());
    let (cache, metrics) = content(&engine, None, clock.clone());
    let layer = DiffId::of(b"layer");
    let digest = ChunkDigest::of(b"x");
    assert_eq!(metrics.remote_up.get(), 1);
    let mut n_calls = 0;
    // The waits at most: the jitter only shortens them, down to half.
    for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
        assert_eq!(cache.manifest(&layer).await, None);
        n_calls += 1;
        assert_eq!(engine.n_calls(), n_calls, "{error}: was not asked");
        assert_eq!(metrics.remote_up.get(), 0);
        for _ in 0..20 {
            assert_eq!(cache.manifest(&layer).await, None);
            assert_eq!(
                cache.chunk(Claimant::Mount(0), &layer, 0, 1, &digest).await,
                None
            );
        }
        clock.advance(Duration::from_millis(wait * 500 - 1));
        assert_eq!(
            cache.chunk(Claimant::Mount(0), &layer, 0, 1, &digest).await,
            None
        );
        assert_eq!(engine.n_calls(), n_calls, "{error}: was not skipped");
        clock.advance(Duration::from_millis(wait * 500 + 1));
    }
    let errors = metrics.remote_requests.with_label_values(&["get", "error"]);
    assert_eq!(errors.get(), u64::try_from(n_calls).unwrap());
    assert_eq!(verify_failures(&metrics), 0, "down is not wrong");
}

#[tokio::test]
async fn a_remote_where_nothing_listens_costs_one_call() {
    let port = super::servers::free_port();
    let engine = redis_cache(&format!("redis://127.0.0.1:{port}"));
    costs_one_call(engine, "refused").await;
}

#[tokio::test]
async fn a_remote_that_never_answers_costs_one_timeout() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let mut options = super::servers::redis_options();
    options.connect_timeout = Duration::from_millis(20);
    let url = clip_csi::secret::Secret::new(url);
    let engine = clip_csi::remote::RedisCache::connect(&url, None, options).unwrap();
    costs_one_call(engine, "silent").await;
}

#[tokio::test]
async fn many_readers_of_a_dead_remote_cost_two_calls_and_one_probes() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(Flaky::new(engine));
    let timeout = Fault::Fail(TierError::Timeout {
        after: Duration::from_secs(1),
    });
    engine.always(Some(timeout));
    let clock = Arc::new(FakeClock::default());
    let (cache, metrics) = content(&engine, None, clock.clone());
    let layer = DiffId::of(b"layer");
    let all = || futures_util::future::join_all((0..50).map(|_| cache.manifest(&layer)));
    all().await;
    // As many as may be in flight, at most.
    assert!((1..=2).contains(&engine.n_calls()), "{}", engine.n_calls());
    let before = engine.n_calls();
    clock.advance(Duration::from_secs(1));
    all().await;
    assert_eq!(engine.n_calls(), before + 1, "one probes");

    // A probe that is given up leaves its place to the next one.
    engine.always(Some(Fault::Hang));
    clock.advance(Duration::from_secs(2));
    let probe = tokio::time::timeout(Duration::from_millis(5), cache.manifest(&layer));
    assert!(probe.await.is_err());
    engine.always(None);
    assert_eq!(metrics.remote_up.get(), 0);
    cache.manifest(&layer).await;
    assert_eq!(metrics.remote_up.get(), 1, "it answers again");
    let before = engine.n_calls();
    all().await;
    assert_eq!(engine.n_calls(), before + 50);
}

/// A writer for `tracing_subscriber` that keeps what it is given.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Operators search for these messages.
#[tokio::test]
async fn the_log_has_one_line_per_layer_and_none_per_chunk() {
    // With a single subscriber in the process, tracing asks the current thread's for its interest
    // when an event is first met, and remembers "none" if another test's thread was first. With a
    // global one beside it, it asks both. Another test may have installed one: as good.
    let _ = tracing::subscriber::set_global_default(
        tracing_subscriber::fmt()
            .with_writer(std::io::sink)
            .finish(),
    );
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(engine);
    let layer = Arc::new(Layer::new(1, 3));
    fill(&engine, &layer, Some(key(1))).await;
    let (cache, _) = content(&engine, Some(key(1)), system_clock());
    let manifest = cache.manifest(&layer.diff_id()).await.unwrap();
    index_of(&cache, &manifest).await.unwrap();
    for n in 0..3 {
        assert!(layer.fetch(&cache, n).await);
    }
    let (stranger, _) = content(&engine, Some(key(2)), system_clock());
    for _ in 0..10 {
        assert!(stranger.manifest(&layer.diff_id()).await.is_none());
    }
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let expected = [
        ("INFO", "cached decompressed layer to remote cache"),
        ("INFO", "remote cache hit"),
        ("INFO", "loaded from remote cache"),
        ("WARN", "remote cache holds a wrong value, not using it"),
    ];
    assert_eq!(lines.len(), expected.len(), "{text}");
    for (line, (level, message)) in lines.iter().zip(expected) {
        assert!(line.contains(level) && line.contains(message), "{line}");
        assert!(line.contains(&layer.diff_id().to_string()), "{line}");
    }
    let fields = format!("bytes={} ", layer.layer_bytes());
    assert!(lines[0].contains(&fields), "{}", lines[0]);
    assert!(lines[0].contains("duration_ms="), "{}", lines[0]);
    assert!(
        lines[3].contains("all nodes"),
        "says what to do: {}",
        lines[3]
    );
}
