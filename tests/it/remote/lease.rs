//! Leases: one node makes a layer, the others wait for it, but never for long and never for nothing.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use clip_csi::{
    clock::SystemClock,
    digest::DiffId,
    metrics::Metrics,
    remote::{
        ContentCache, ContentOptions, DirCache, Enqueued, LeaseGuard, LeaseOutcome, Repair, Turn,
        UploadOptions, UploadOutcome, UploadSource, Uploader,
    },
    tier::{CacheKey, LayerCache, LeaseHolder, TierError},
};

use super::{
    fixture::{
        Call, Fault, Flaky, Layer, PATIENCE, content_options, content_with, dir_cache, key, until,
    },
    servers::{RedisServer, S3Server},
};

type Engine = Arc<Flaky<DirCache>>;

fn engine() -> (Engine, tempfile::TempDir) {
    let (engine, dir) = dir_cache();
    (Arc::new(Flaky::new(engine)), dir)
}

/// One more node on the store.
fn node<T: LayerCache + 'static>(engine: &Arc<T>) -> (ContentCache, Metrics) {
    node_with(engine, content_options(Some(key(1))))
}

fn node_with<T: LayerCache + 'static>(
    engine: &Arc<T>,
    options: ContentOptions,
) -> (ContentCache, Metrics) {
    content_with(engine, options, Arc::new(SystemClock::new()))
}

fn waits(metrics: &Metrics) -> [u64; 4] {
    ["made", "taken", "timeout", "error"].map(|outcome| {
        let waits = &metrics.remote_lease_waits;
        waits.with_label_values(&[outcome]).get()
    })
}

async fn held(cache: &ContentCache, layer: &DiffId) -> LeaseGuard {
    match cache.lease(layer).await {
        LeaseOutcome::Held(guard) => guard,
        other => panic!("{other:?}"),
    }
}

async fn is_elsewhere(cache: &ContentCache, layer: &DiffId) -> bool {
    matches!(cache.lease(layer).await, LeaseOutcome::Elsewhere)
}

/// Waits until `cache` can take the lease.
async fn is_released(cache: &ContentCache, layer: &DiffId) -> LeaseGuard {
    let taken = async {
        loop {
            if let LeaseOutcome::Held(guard) = cache.lease(layer).await {
                return guard;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    let taken = tokio::time::timeout(PATIENCE, taken).await;
    taken.expect("the lease is released")
}

#[tokio::test]
async fn a_lease_is_renewed_until_it_is_dropped() {
    let (engine, _dir) = engine();
    let ttl = Duration::from_millis(1500);
    let options = ContentOptions {
        lease_ttl: ttl,
        ..content_options(None)
    };
    let (a, _) = node_with(&engine, options);
    let (b, _) = node(&engine);
    let layer = DiffId::of(b"layer");
    let started = Instant::now();
    let lease = held(&a, &layer).await;
    // Longer than its time to live.
    until("it was renewed", || 5 <= engine.n_leases()).await;
    assert!(ttl < started.elapsed());
    assert!(is_elsewhere(&b, &layer).await);
    drop(lease);
    drop(is_released(&b, &layer).await);
    until("both were released", || {
        let calls = engine.calls();
        let released = calls.iter().filter(|it| matches!(it, Call::Release(_)));
        released.count() == 2
    })
    .await;
    // Nobody renews what was released.
    let n_leases = engine.n_leases();
    tokio::time::sleep(ttl / 2).await;
    assert_eq!(engine.n_leases(), n_leases);
}

#[tokio::test]
async fn a_renewal_that_fails_is_followed_by_another() {
    let (engine, _dir) = engine();
    let options = ContentOptions {
        lease_ttl: Duration::from_millis(600),
        ..content_options(None)
    };
    let (a, _) = node_with(&engine, options);
    let (b, _) = node(&engine);
    let layer = DiffId::of(b"layer");
    // The engine answers, so that it is not taken for down.
    let io = Fault::Fail(TierError::Io {
        reason: "test".to_owned(),
    });
    engine.fault(1, io);
    let lease = held(&a, &layer).await;
    until("it was renewed", || 3 <= engine.n_leases()).await;
    assert!(is_elsewhere(&b, &layer).await);
    drop(lease);
    drop(is_released(&b, &layer).await);
}

/// A holds the lease and uploads; B and C have asked meanwhile.
async fn the_others_wait<T: LayerCache + 'static>(engine: Arc<T>) {
    let nodes = [(); 3].map(|()| node(&engine));
    let layer = Arc::new(Layer::new(1, 3));
    let id = layer.diff_id();
    let [(a, a_metrics), (b, b_metrics), (c, c_metrics)] = &nodes;
    let Turn::Ours(lease) = a.turn(&id, None).await else {
        panic!("nobody else wants it");
    };
    let uploader = Uploader::start(a.clone(), UploadOptions::default());
    let upload = async {
        // The others have looked once at least.
        until("the others wait", || {
            [b_metrics, c_metrics].iter().all(|it| {
                let elsewhere = it.remote_requests.with_label_values(&["lease", "miss"]);
                0 < elsewhere.get()
            })
        })
        .await;
        uploader.enqueue_leased(layer.clone(), lease);
        uploader.drain(PATIENCE).await;
    };
    let (b_turn, c_turn, ()) = tokio::join!(b.turn(&id, None), c.turn(&id, None), upload);
    for turn in [b_turn, c_turn] {
        let Turn::Made(manifest) = turn else {
            panic!("{turn:?}");
        };
        assert_eq!(manifest.chunk_digests, layer.chunk_digests());
    }
    assert_eq!(waits(a_metrics), [0; 4]);
    assert_eq!(waits(b_metrics), [1, 0, 0, 0]);
    assert_eq!(waits(c_metrics), [1, 0, 0, 0]);
    // The upload has released it, and so did whoever took it in vain.
    drop(is_released(a, &id).await);
}

#[tokio::test]
async fn the_others_wait_for_the_upload_in_a_dir() {
    let (engine, _dir) = engine();
    the_others_wait(engine).await;
}

#[tokio::test]
async fn the_others_wait_for_the_upload_in_redis() {
    let name = "the_others_wait_for_the_upload_in_redis";
    if let Some(server) = RedisServer::start(name, &[]).await {
        the_others_wait(Arc::new(server.cache())).await;
    }
}

#[tokio::test]
async fn the_others_wait_for_the_upload_in_s3() {
    if let Some(server) = S3Server::start("the_others_wait_for_the_upload_in_s3").await {
        the_others_wait(Arc::new(server.cache())).await;
    }
}

#[tokio::test]
async fn a_holder_that_died_is_succeeded() {
    let (engine, _dir) = engine();
    let layer = DiffId::of(b"layer");
    // Taken by a process that will never renew it.
    let ttl = Duration::from_millis(300);
    let lease = CacheKey::Lease(layer);
    let dead = LeaseHolder::random();
    assert!(engine.lease(lease, dead, ttl).await.unwrap());
    let (b, metrics) = node(&engine);
    let turn = b.turn(&layer, None).await;
    assert!(matches!(turn, Turn::Ours(_)), "{turn:?}");
    assert_eq!(waits(&metrics), [0, 1, 0, 0]);
}

#[tokio::test]
async fn a_wait_is_bounded() {
    let (engine, _dir) = engine();
    let layer = DiffId::of(b"layer");
    let (a, _) = node(&engine);
    let _lease = held(&a, &layer).await;
    let options = ContentOptions {
        lease_wait: Duration::from_millis(200),
        ..content_options(None)
    };
    let (b, metrics) = node_with(&engine, options);
    let started = Instant::now();
    let turn = b.turn(&layer, None).await;
    assert!(matches!(turn, Turn::Alone), "{turn:?}");
    assert!(started.elapsed() < PATIENCE);
    assert_eq!(waits(&metrics), [0, 0, 1, 0]);
}

#[tokio::test]
async fn nobody_waits_for_a_remote_that_is_broken() {
    let down = TierError::Unavailable {
        reason: "test".to_owned(),
    };
    let full = TierError::Full {
        reason: "test".to_owned(),
    };
    let no_scripts = TierError::Io {
        reason: "unknown command 'EVAL'".to_owned(),
    };
    for error in [down, full, no_scripts] {
        let (engine, _dir) = engine();
        let (a, metrics) = node(&engine);
        let layer = DiffId::of(b"layer");
        engine.fault(0, Fault::Fail(error.clone()));
        let turn = a.turn(&layer, None).await;
        assert!(matches!(turn, Turn::Alone), "{error}: {turn:?}");
        assert_eq!(waits(&metrics), [0; 4], "{error}");
        // Leases alone do not make it skipped.
        let is_up = i64::from(!matches!(error, TierError::Unavailable { .. }));
        assert_eq!(metrics.remote_up.get(), is_up, "{error}");
    }
    // It breaks while somebody waits.
    let (engine, _dir) = engine();
    let layer = DiffId::of(b"layer");
    let (a, _) = node(&engine);
    let lease = held(&a, &layer).await;
    let (b, metrics) = node(&engine);
    let breaks = async {
        until("b waits", || 2 <= engine.n_leases()).await;
        engine.always(Some(Fault::Fail(TierError::Unavailable {
            reason: "test".to_owned(),
        })));
    };
    let (turn, ()) = tokio::join!(b.turn(&layer, None), breaks);
    assert!(matches!(turn, Turn::Alone), "{turn:?}");
    assert_eq!(waits(&metrics), [0, 0, 0, 1]);
    drop(lease);
}

#[tokio::test]
async fn without_waiting_no_lease_is_asked_for() {
    let (engine, _dir) = engine();
    let options = ContentOptions {
        lease_wait: Duration::ZERO,
        ..content_options(None)
    };
    let (a, _) = node_with(&engine, options);
    let turn = a.turn(&DiffId::of(b"layer"), None).await;
    assert!(matches!(turn, Turn::Alone), "{turn:?}");
    assert_eq!(engine.calls(), []);
}

/// A node that could not use what the remote has makes it itself, unless it has changed.
#[tokio::test]
async fn a_useless_manifest_is_not_waited_for() {
    let (engine, _dir) = engine();
    let (a, _) = node(&engine);
    let layer = Arc::new(Layer::new(1, 1));
    let id = layer.diff_id();
    let uploader = Uploader::start(a.clone(), UploadOptions::default());
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    let useless = a.manifest(&id).await.unwrap();
    let turn = a.turn(&id, Some(&useless)).await;
    assert!(matches!(turn, Turn::Ours(_)), "{turn:?}");
    drop(turn);
    // Another version of the driver has put another index.
    let mut other = Layer::new(1, 1);
    other.index = b"of another version".to_vec().into();
    let uploader = Uploader::start(a.clone(), UploadOptions::default());
    uploader.enqueue(Arc::new(other));
    uploader.drain(PATIENCE).await;
    let turn = a.turn(&id, Some(&useless)).await;
    assert!(matches!(turn, Turn::Made(_)), "{turn:?}");
}

#[tokio::test]
async fn an_upload_that_fails_or_is_refused_ends_the_lease() {
    let (engine, _dir) = engine();
    let ((a, _), (b, _)) = (node(&engine), node(&engine));
    let mut rotten = Layer::new(1, 2);
    rotten.is_rotten = true;
    let rotten = Arc::new(rotten);
    let id = rotten.diff_id();
    let uploader = Uploader::start(a.clone(), UploadOptions::default());
    uploader.enqueue_leased(rotten.clone(), held(&a, &id).await);
    drop(is_released(&b, &id).await);
    assert_eq!(rotten.outcomes(), [UploadOutcome::Failed]);

    uploader.drain(PATIENCE).await;
    assert!(!uploader.has_room());
    let lease = is_released(&a, &id).await;
    assert_eq!(uploader.enqueue_leased(rotten, lease), Enqueued::Refused);
    drop(is_released(&b, &id).await);
}

/// The second request takes the place of the first one, and its lease.
#[tokio::test]
async fn a_merged_request_keeps_the_lease() {
    let (engine, _dir) = engine();
    let ((a, _), (b, _)) = (node(&engine), node(&engine));
    // The first layer's upload never ends, so that the second one's waits.
    let (first, second) = (Arc::new(Layer::new(1, 1)), Arc::new(Layer::new(2, 1)));
    let id = second.diff_id();
    let lease = held(&a, &id).await;
    engine.fault(engine.n_calls(), Fault::Hang);
    let uploader = Uploader::start(a.clone(), UploadOptions::default());
    uploader.enqueue(first);
    until("the first has begun", || engine.n_calls() == 2).await;
    uploader.enqueue_leased(second.clone(), lease);
    uploader.enqueue_repair(second.clone(), Repair::default());
    assert_eq!(second.outcomes(), [UploadOutcome::Merged]);
    assert!(is_elsewhere(&b, &id).await);
    drop(uploader);
    drop(is_released(&b, &id).await);
}
