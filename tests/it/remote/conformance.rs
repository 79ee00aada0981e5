//! What every engine must do, plain and under faults.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use clip_csi::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    remote::{RedisCache, RedisOptions},
    secret::Secret,
    tier::{CacheKey, LayerCache, LeaseHolder, Put, TierError},
};
use futures_util::{StreamExt, future::join_all};

use super::{
    fixture::{Fault, Flaky, PATIENCE, dir_cache},
    servers::{
        RedisCluster, RedisServer, S3Server, free_port, redis_cache, redis_options, s3_cache,
    },
};

/// Runs the whole kit; each part has a layer of its own.
async fn conforms(cache: &dyn LayerCache) {
    misses_and_hits(cache).await;
    is_binary_safe(cache).await;
    refuses_oversize(cache).await;
    keeps_or_replaces(cache).await;
    deletes(cache).await;
    fills_once(cache).await;
    replaces_atomically(cache).await;
    survives_cancelled_gets(cache).await;
    gives_each_in_order(cache).await;
    leases_to_one(cache).await;
    leases_expire(cache).await;
}

const MAX: usize = 8 << 20;

fn keys(layer: &str) -> [CacheKey; 10] {
    let image = ManifestDigest::of(layer.as_bytes());
    let config = BlobDigest::of(layer.as_bytes());
    let layer = DiffId::of(layer.as_bytes());
    [
        CacheKey::Manifest(layer),
        CacheKey::Index(layer, 0),
        CacheKey::Chunk(layer, 0),
        CacheKey::Chunk(layer, u32::MAX),
        CacheKey::AccessMap(layer, BlobDigest::of(b""), 0),
        CacheKey::Profile(image),
        CacheKey::Index(layer, 1),
        CacheKey::AccessMap(layer, BlobDigest::of(b""), 1),
        CacheKey::ImageManifest(image),
        CacheKey::ImageConfig(config),
    ]
}

async fn got(cache: &dyn LayerCache, key: CacheKey) -> Option<Bytes> {
    cache.get(key, MAX).await.unwrap()
}

async fn put(cache: &dyn LayerCache, key: CacheKey, value: &[u8], put: Put) {
    let value = Bytes::copy_from_slice(value);
    cache.put(key, value, put).await.unwrap();
}

async fn misses_and_hits(cache: &dyn LayerCache) {
    for key in keys("hits") {
        assert_eq!(got(cache, key).await, None, "{key}");
        assert_eq!(cache.get(key, 1).await.unwrap(), None, "{key}");
        let value = key.to_string();
        put(cache, key, value.as_bytes(), Put::IfAbsent).await;
    }
    for key in keys("hits") {
        let value = Bytes::from(key.to_string());
        assert_eq!(got(cache, key).await, Some(value), "{key}");
    }
}

async fn is_binary_safe(cache: &dyn LayerCache) {
    let all: Vec<u8> = (0..=255).collect();
    let [_, _, key, ..] = keys("binary");
    for value in [&all[..], b"", b"\0", b"$-1\r\n", b"\r\n", &[0xff; 70_000]] {
        put(cache, key, value, Put::Replace).await;
        assert_eq!(got(cache, key).await.as_deref(), Some(value));
    }
}

async fn refuses_oversize(cache: &dyn LayerCache) {
    let [_, index, chunk, ..] = keys("oversize");
    // The second one is above what an engine may fetch without measuring.
    for (key, len) in [(chunk, 1000), (index, 5 << 20)] {
        let value = vec![7; len];
        put(cache, key, &value, Put::Replace).await;
        for max in [0, 1, len - 1] {
            let refused = cache.get(key, max).await;
            let is_right =
                matches!(&refused, Err(TierError::Corrupt { key: it, .. }) if *it == key);
            assert!(is_right, "{len} of {max}: {refused:?}");
        }
        for max in [len, len + 1, usize::MAX / 2] {
            let value_got = cache.get(key, max).await.unwrap().unwrap();
            assert!(value_got == value, "{len} of {max}");
        }
    }
}

async fn keeps_or_replaces(cache: &dyn LayerCache) {
    for key in keys("replace") {
        put(cache, key, b"first", Put::IfAbsent).await;
        put(cache, key, b"second", Put::IfAbsent).await;
        assert_eq!(got(cache, key).await.as_deref(), Some(&b"first"[..]));
        put(cache, key, b"3", Put::Replace).await;
        assert_eq!(got(cache, key).await.as_deref(), Some(&b"3"[..]));
    }
}

async fn deletes(cache: &dyn LayerCache) {
    for key in keys("delete") {
        cache.delete(key).await.unwrap();
        put(cache, key, b"value", Put::IfAbsent).await;
        cache.delete(key).await.unwrap();
        cache.delete(key).await.unwrap();
        assert_eq!(got(cache, key).await, None);
        put(cache, key, b"again", Put::IfAbsent).await;
        assert_eq!(got(cache, key).await.as_deref(), Some(&b"again"[..]));
    }
}

/// A value that shows its writer in every byte.
fn uniform(writer: u8) -> Bytes {
    vec![writer; 200_000].into()
}

fn writer_of(value: &Bytes) -> u8 {
    assert_eq!(value.len(), 200_000, "a part was seen");
    assert!(value.iter().all(|it| *it == value[0]), "values were mixed");
    value[0]
}

async fn fills_once(cache: &dyn LayerCache) {
    let [_, _, key, ..] = keys("fill");
    let writers = join_all((1..=8).map(|writer| cache.put(key, uniform(writer), Put::IfAbsent)));
    let readers = join_all((0..8).map(|_| async {
        let mut seen = Vec::new();
        for _ in 0..5 {
            seen.extend(got(cache, key).await.as_ref().map(writer_of));
        }
        seen
    }));
    let (written, mut seen) = tokio::join!(writers, readers);
    for result in written {
        result.unwrap();
    }
    let winner = writer_of(&got(cache, key).await.unwrap());
    seen.push(vec![winner]);
    assert!(seen.iter().flatten().all(|it| *it == winner), "{seen:?}");
}

async fn replaces_atomically(cache: &dyn LayerCache) {
    let [_, _, key, ..] = keys("atomic");
    put(cache, key, &uniform(1), Put::Replace).await;
    let writers = async {
        for writer in 2..12 {
            put(cache, key, &uniform(writer), Put::Replace).await;
        }
    };
    let readers = join_all((0..4).map(|_| async {
        let mut last = 1;
        for _ in 0..10 {
            let writer = writer_of(&got(cache, key).await.unwrap());
            assert!(last <= writer, "{writer} came after {last}");
            last = writer;
        }
    }));
    tokio::join!(writers, readers);
    assert_eq!(writer_of(&got(cache, key).await.unwrap()), 11);
}

async fn survives_cancelled_gets(cache: &dyn LayerCache) {
    let layer = DiffId::of(b"cancel");
    let key = |n: u8| CacheKey::Chunk(layer, u32::from(n));
    for n in 1..=4 {
        put(cache, key(n), &uniform(n), Put::Replace).await;
    }
    let mut n_cancelled = 0;
    for round in 0..100u8 {
        // Given up after some turns of the scheduler: before, amid and after the answer.
        let turns = async {
            for _ in 0..round % 20 {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            value = cache.get(key(1 + round % 4), MAX) => {
                assert_eq!(writer_of(&value.unwrap().unwrap()), 1 + round % 4);
            }
            () = turns => n_cancelled += 1,
        }
        let n = 1 + (round + 1) % 4;
        assert_eq!(writer_of(&got(cache, key(n)).await.unwrap()), n);
    }
    assert!(5 <= n_cancelled, "{n_cancelled} gets were cancelled");
}

async fn gives_each_in_order(cache: &dyn LayerCache) {
    let layer = DiffId::of(b"each");
    let keys: Vec<_> = (0..12).map(|n| CacheKey::Chunk(layer, n)).collect();
    for (key, n) in keys.iter().zip(0..12u8) {
        match n {
            3 => {}
            4 => put(cache, *key, b"", Put::Replace).await,
            5 => put(cache, *key, &vec![5; 200_001], Put::Replace).await,
            n => put(cache, *key, &uniform(n), Put::Replace).await,
        }
    }
    let mut n_values = 0;
    let mut values = cache.get_each(keys.clone(), 200_000);
    while let Some(value) = values.next().await {
        match (n_values, value) {
            (3, value) => assert_eq!(value.unwrap(), None),
            (4, value) => assert_eq!(value.unwrap(), Some(Bytes::new())),
            (5, value) => assert!(matches!(value, Err(TierError::Corrupt { .. })), "{value:?}"),
            (n, value) => assert_eq!(writer_of(&value.unwrap().unwrap()), n),
        }
        n_values += 1;
    }
    assert_eq!(n_values, 12);
    assert!(cache.get_each(Vec::new(), 1).next().await.is_none());
    // Given up with some of it on the way: the next ones get their own.
    for n_taken in 0..4 {
        let mut values = cache.get_each(keys[6..].to_vec(), 200_000);
        for n in 0..n_taken {
            assert_eq!(
                writer_of(&values.next().await.unwrap().unwrap().unwrap()),
                6 + n
            );
        }
        let turns = async {
            for _ in 0..n_taken {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            value = values.next() => assert_eq!(writer_of(&value.unwrap().unwrap().unwrap()), 6 + n_taken),
            () = turns => {}
        }
        drop(values);
        assert_eq!(writer_of(&got(cache, keys[1]).await.unwrap()), 1);
    }
}

/// So long that no test sees it pass.
const LONG: Duration = Duration::from_secs(600);

/// So short that no test waits for long until it has passed.
const SHORT: Duration = Duration::from_millis(50);

async fn leases_to_one(cache: &dyn LayerCache) {
    let key = CacheKey::Lease(DiffId::of(b"lease"));
    let other_key = CacheKey::Lease(DiffId::of(b"other lease"));
    let [first, second] = [(); 2].map(|()| LeaseHolder::random());
    let lease = |key, holder| async move { cache.lease(key, holder, LONG).await.unwrap() };
    let release = |holder| async move { cache.release(key, holder).await.unwrap() };
    // Nobody has it: that is no error.
    release(first).await;
    assert!(lease(key, first).await);
    assert!(!lease(key, second).await);
    assert!(lease(other_key, second).await, "another layer's is free");
    assert!(lease(key, first).await, "its holder renews it");
    release(second).await;
    assert!(!lease(key, second).await, "it was not second's to release");
    release(first).await;
    assert!(lease(key, second).await);
    assert!(!lease(key, first).await);
    release(second).await;
    release(second).await;
    // Of many that begin at once, one has it in the end.
    let holders: Vec<_> = (0..8).map(|_| LeaseHolder::random()).collect();
    let taken = join_all(holders.iter().map(|it| lease(key, *it))).await;
    assert_eq!(taken.iter().filter(|it| **it).count(), 1, "{taken:?}");
    let renewed = join_all(holders.iter().map(|it| lease(key, *it))).await;
    assert_eq!(renewed, taken);
}

async fn leases_expire(cache: &dyn LayerCache) {
    let key = CacheKey::Lease(DiffId::of(b"expiring lease"));
    let [first, second] = [(); 2].map(|()| LeaseHolder::random());
    assert!(cache.lease(key, first, SHORT).await.unwrap());
    // The renewal counts, and not what was before.
    assert!(cache.lease(key, first, LONG).await.unwrap());
    tokio::time::sleep(SHORT).await;
    assert!(!cache.lease(key, second, LONG).await.unwrap());
    assert!(cache.lease(key, first, SHORT).await.unwrap());
    let taken = async {
        while !cache.lease(key, second, LONG).await.unwrap() {
            tokio::time::sleep(SHORT / 10).await;
        }
    };
    let taken = tokio::time::timeout(PATIENCE, taken).await;
    taken.expect("it has ended");
    // Its former holder has learned nothing, and can do no harm.
    cache.release(key, first).await.unwrap();
    assert!(!cache.lease(key, first, LONG).await.unwrap());
}

/// Delays some calls, so that they end in another order than they began.
fn delayed<T: LayerCache>(cache: T) -> Flaky<T> {
    (0..3000).step_by(7).fold(Flaky::new(cache), |flaky, nth| {
        flaky.on(nth, Fault::Delay(Duration::from_millis(1)))
    })
}

/// A call that fails on its way changes nothing, and the next one is right.
async fn failures_change_nothing<T: LayerCache>(cache: T) {
    let down = Fault::Fail(TierError::Unavailable {
        reason: "test".to_owned(),
    });
    let cache = (1..4).fold(Flaky::new(cache), |it, nth| it.on(nth, down.clone()));
    let [_, _, key, ..] = keys("failures");
    put(&cache, key, b"value", Put::IfAbsent).await;
    assert!(cache.get(key, MAX).await.is_err());
    let replaced = cache.put(key, Bytes::from_static(b"other"), Put::Replace);
    assert!(replaced.await.is_err());
    assert!(cache.delete(key).await.is_err());
    assert_eq!(got(&cache, key).await.as_deref(), Some(&b"value"[..]));
}

#[tokio::test]
async fn dir_conforms() {
    let (cache, _dir) = dir_cache();
    conforms(&cache).await;
}

#[tokio::test]
async fn dir_conforms_under_faults() {
    let (cache, _dir) = dir_cache();
    conforms(&delayed(cache.clone())).await;
    failures_change_nothing(cache).await;
}

#[tokio::test]
async fn two_handles_of_one_dir_conform() {
    let (first, dir) = dir_cache();
    let second = clip_csi::remote::DirCache::new(dir.path(), super::fixture::PATIENCE);
    let [_, _, key, ..] = keys("nodes");
    put(&first, key, b"of first", Put::IfAbsent).await;
    put(&second, key, b"of second", Put::IfAbsent).await;
    assert_eq!(got(&second, key).await.as_deref(), Some(&b"of first"[..]));
}

#[tokio::test]
async fn redis_conforms() {
    let Some(server) = RedisServer::start("redis_conforms", &[]).await else {
        return;
    };
    conforms(&server.cache()).await;
}

#[tokio::test]
async fn redis_conforms_under_faults() {
    let Some(server) = RedisServer::start("redis_conforms_under_faults", &[]).await else {
        return;
    };
    conforms(&delayed(server.cache())).await;
    failures_change_nothing(server.cache()).await;
}

#[tokio::test]
async fn redis_cluster_conforms() {
    if let Some(cluster) = RedisCluster::start("redis_cluster_conforms").await {
        conforms(&cluster.cache()).await;
    }
}

#[tokio::test]
async fn redis_cluster_conforms_under_faults() {
    let name = "redis_cluster_conforms_under_faults";
    let Some(cluster) = RedisCluster::start(name).await else {
        return;
    };
    conforms(&delayed(cluster.cache())).await;
    failures_change_nothing(cluster.cache()).await;
}

#[tokio::test]
async fn s3_conforms() {
    if let Some(server) = S3Server::start("s3_conforms").await {
        conforms(&server.cache()).await;
    }
}

#[tokio::test]
async fn s3_conforms_under_faults() {
    let Some(server) = S3Server::start("s3_conforms_under_faults").await else {
        return;
    };
    conforms(&delayed(server.cache())).await;
    failures_change_nothing(server.cache()).await;
}

/// Asks everything of a server that is not there, or does not answer.
async fn fails_without_a_server(cache: &dyn LayerCache, is_right: impl Fn(&TierError) -> bool) {
    let [_, _, key, ..] = keys("dead");
    let lease = CacheKey::Lease(DiffId::of(b"dead"));
    let holder = LeaseHolder::random();
    let value = Bytes::from_static(b"value");
    let errors = [
        cache.get(key, MAX).await.unwrap_err(),
        cache.get(key, 0).await.unwrap_err(),
        cache
            .put(key, value.clone(), Put::IfAbsent)
            .await
            .unwrap_err(),
        cache.put(key, value, Put::Replace).await.unwrap_err(),
        cache.delete(key).await.unwrap_err(),
        cache.lease(lease, holder, LONG).await.unwrap_err(),
        cache.release(lease, holder).await.unwrap_err(),
    ];
    for error in errors {
        assert!(is_right(&error), "{error:?}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn a_dead_server_is_unavailable() {
    let is_right = |error: &TierError| matches!(error, TierError::Unavailable { .. });
    let port = free_port();
    let redis = redis_cache(&format!("redis://:hunter2@127.0.0.1:{port}"));
    fails_without_a_server(&redis, is_right).await;
    let cluster = redis_cache(&format!("redis-cluster://:hunter2@127.0.0.1:{port}"));
    fails_without_a_server(&cluster, is_right).await;
    let s3 = s3_cache(port, "hunter2", PATIENCE);
    fails_without_a_server(&s3, is_right).await;
}

#[tokio::test]
async fn a_slow_server_costs_the_time_it_is_given() {
    // Connections are accepted by the kernel, and nobody reads.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let is_right = |error: &TierError| matches!(error, TierError::Timeout { .. });
    let short = Duration::from_millis(50);
    let options = RedisOptions {
        connect_timeout: short,
        request_timeout: short,
        ..redis_options()
    };
    let url = Secret::new(format!("redis://:hunter2@127.0.0.1:{port}"));
    let redis = RedisCache::connect(&url, None, options).unwrap();
    let url = Secret::new(format!("redis-cluster://:hunter2@127.0.0.1:{port}"));
    let cluster = RedisCache::connect(&url, None, options).unwrap();
    let s3 = s3_cache(port, "hunter2", short);
    let started = Instant::now();
    fails_without_a_server(&redis, is_right).await;
    fails_without_a_server(&cluster, is_right).await;
    fails_without_a_server(&s3, is_right).await;
    assert!(started.elapsed() < PATIENCE);
}

/// Threads of a runtime with several workers share one connection.
#[tokio::test]
async fn redis_answers_many_at_once_rightly() {
    let name = "redis_answers_many_at_once_rightly";
    let Some(server) = RedisServer::start(name, &[]).await else {
        return;
    };
    let cache = Arc::new(server.cache());
    let layer = DiffId::of(b"many");
    let tasks = (1..=40u8).map(|n| {
        let cache = Arc::clone(&cache);
        tokio::spawn(async move {
            let key = CacheKey::Chunk(layer, u32::from(n));
            put(&*cache, key, &uniform(n), Put::IfAbsent).await;
            assert_eq!(writer_of(&got(&*cache, key).await.unwrap()), n);
        })
    });
    for task in join_all(tasks).await {
        task.unwrap();
    }
}
