//! Readers go first: what is warmed waits while one of them waits for the remote.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use clip_csi::{
    clock::SystemClock,
    integrity::IntegrityKey,
    layer::{store::Remote, warm::Warmed},
    metrics::Metrics,
    remote::{BackOff, ContentCache, ContentOptions, DirCache, UploadOptions, Uploader},
    tier::{BoxFuture, CacheKey, LayerCache, LeaseHolder, Put, TierError},
};
use tokio::sync::Notify;

use super::world::{World, fixtures};
use crate::layer_fixture::{open, present};

/// How long a chunk takes: longer than a task that does not wait for it.
const CHUNK_TIME: Duration = Duration::from_millis(80);

/// A directory that takes its time for chunks, and notes when each came.
#[derive(Debug)]
struct Slow {
    inner: DirCache,
    /// A chunk was asked for.
    asked: Notify,
    came: Mutex<Vec<(u32, Instant, Instant)>>,
}

impl LayerCache for Slow {
    fn engine(&self) -> &'static str {
        "dir"
    }

    fn get(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> BoxFuture<'_, Result<Option<Bytes>, TierError>> {
        Box::pin(async move {
            let begin = Instant::now();
            if matches!(key, CacheKey::Chunk(..)) {
                self.asked.notify_one();
            }
            let got = self.inner.get(key, max_bytes).await;
            if let CacheKey::Chunk(_, chunk) = key {
                tokio::time::sleep(CHUNK_TIME).await;
                let came = (chunk, begin, Instant::now());
                self.came.lock().unwrap().push(came);
            }
            got
        })
    }

    fn put(&self, key: CacheKey, value: Bytes, put: Put) -> BoxFuture<'_, Result<(), TierError>> {
        self.inner.put(key, value, put)
    }

    fn delete(&self, key: CacheKey) -> BoxFuture<'_, Result<(), TierError>> {
        self.inner.delete(key)
    }

    fn lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<bool, TierError>> {
        self.inner.lease(key, holder, ttl)
    }

    fn release(&self, key: CacheKey, holder: LeaseHolder) -> BoxFuture<'_, Result<(), TierError>> {
        self.inner.release(key, holder)
    }
}

#[tokio::test]
async fn what_is_warmed_makes_way_for_a_reader() {
    let world = World::seeded().await;
    let metrics = Metrics::new();
    let engine = Arc::new(Slow {
        inner: DirCache::new(&world.remote_dir(), Duration::from_secs(20)),
        asked: Notify::new(),
        came: Mutex::default(),
    });
    // As in `key_file`.
    let options = ContentOptions {
        key: Some(IntegrityKey::new(&[7; 32]).unwrap()),
        max_index_bytes: 1 << 20,
        back_off: BackOff::default(),
        lease_ttl: Duration::from_secs(15),
        lease_wait: Duration::ZERO,
    };
    let clock = Arc::new(SystemClock::new());
    let cache = ContentCache::new(Arc::clone(&engine) as _, options, metrics.clone(), clock);
    let uploader = Arc::new(Uploader::start(cache.clone(), UploadOptions::default()));
    let store = open(
        &world.path("node"),
        Some(Remote { cache, uploader }),
        &metrics,
    );
    let [fixture, _] = fixtures();
    let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
    let reads = present(&store, fixture.desc.diff_id, 0..1);
    let warms = async {
        // The reader has asked by then, and has its answer long after.
        engine.asked.notified().await;
        store.warm_chunk(&layer, 1).await
    };
    let (read, warmed) = tokio::join!(reads, warms);
    read.unwrap();
    assert_eq!(warmed.unwrap(), Warmed::Fetched);
    let came = engine.came.lock().unwrap().clone();
    let [(0, _, reader_had), (1, warming_began, _)] = came[..] else {
        panic!("{came:?}");
    };
    assert!(reader_had <= warming_began, "both at once");
}
