//! What an image is made of, in a store that lies, dies, or has nothing.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clip_csi::{
    clock::{Clock, SystemClock},
    digest::{BlobDigest, ManifestDigest},
    remote::{Answer, UploadOptions, UploadOutcome, UploadSource, Uploader},
    tier::{CacheKey, LayerCache, Put, TierError},
};

use super::{
    fixture::{
        Call, Fault, Flaky, Layer, PATIENCE, Shared, content, dir_cache, key, verify_failures,
    },
    servers::{RedisServer, S3Server},
};

const MAX_BYTES: usize = 4096;

fn system_clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}

/// Puts two documents, then spoils each in turn.
async fn keeps_documents<T: LayerCache + 'static>(engine: T) {
    let engine = Arc::new(engine);
    // Nobody vouches for a document: readers with another key, or none, take it as well.
    let (writer, _) = content(&engine, Some(key(1)), system_clock());
    let (reader, metrics) = content(&engine, Some(key(2)), system_clock());
    let [manifest, config] = [&b"{\"manifest\":1}"[..], b"{\"config\":1}"].map(Bytes::from_static);
    let (image, named) = (ManifestDigest::of(&manifest), BlobDigest::of(&config));
    let manifest_of = || reader.image_manifest(&image, MAX_BYTES);
    let config_of = || reader.image_config(&named, MAX_BYTES);
    assert_eq!(manifest_of().await, Answer::Lacks);
    assert_eq!(config_of().await, Answer::Lacks);
    let put = writer.put_image(manifest.clone(), config.clone());
    assert_eq!(put.await, Ok(()));
    assert_eq!(manifest_of().await, Answer::Has(manifest.clone()));
    assert_eq!(config_of().await, Answer::Has(config.clone()));
    assert_eq!(verify_failures(&metrics), 0);
    let mut n_failures = 0;
    for (at, good) in [
        (CacheKey::ImageManifest(image), &manifest),
        (CacheKey::ImageConfig(named), &config),
    ] {
        for (what, bad) in [
            ("another document", Bytes::from_static(b"{\"manifest\":2}")),
            ("truncated", good.slice(..good.len() - 1)),
            ("longer", [&good[..], b" "].concat().into()),
            ("empty", Bytes::new()),
            ("above the limit", vec![b' '; MAX_BYTES + 1].into()),
        ] {
            engine.put(at, bad, Put::Replace).await.unwrap();
            let got = match at {
                CacheKey::ImageManifest(_) => manifest_of().await,
                _ => config_of().await,
            };
            assert_eq!(got, Answer::Lacks, "{at}: {what}");
            n_failures += 1;
            assert_eq!(verify_failures(&metrics), n_failures, "{at}: {what}");
            let left = engine.get(at, 1 << 20).await.unwrap();
            assert_eq!(left, None, "{at}: {what} was not deleted");
        }
    }
    assert_eq!(writer.put_image(manifest.clone(), config).await, Ok(()));
    assert_eq!(manifest_of().await, Answer::Has(manifest));
}

#[tokio::test]
async fn a_dir_keeps_documents() {
    let (engine, _dir) = dir_cache();
    keeps_documents(engine).await;
}

#[tokio::test]
async fn redis_keeps_documents() {
    if let Some(server) = RedisServer::start("redis_keeps_documents", &[]).await {
        keeps_documents(server.cache()).await;
    }
}

#[tokio::test]
async fn s3_keeps_documents() {
    if let Some(server) = S3Server::start("s3_keeps_documents").await {
        keeps_documents(server.cache()).await;
    }
}

/// The manifest of the image comes last: who finds it finds the other one.
#[tokio::test]
async fn a_manifest_never_comes_before_its_configuration() {
    let (engine, _dir) = dir_cache();
    let full = Fault::Fail(TierError::Full {
        reason: "OOM".to_owned(),
    });
    let engine = Arc::new(Flaky::new(engine).on(0, full));
    let (cache, _) = content(&engine, None, system_clock());
    let [manifest, config] = [&b"m"[..], b"c"].map(Bytes::from_static);
    let refused = cache.put_image(manifest, config.clone()).await;
    assert!(refused.is_err_and(|it| it.contains("OOM")));
    let put = Call::Put(CacheKey::ImageConfig(BlobDigest::of(&config)));
    assert_eq!(engine.calls(), [put]);
}

#[tokio::test]
async fn a_store_that_is_down_does_not_say_that_it_lacks_something() {
    let (engine, _dir) = dir_cache();
    let engine = Arc::new(engine);
    let layer = Arc::new(Layer::new(1, 2));
    let (cache, _) = content(&engine, None, system_clock());
    let uploader = Uploader::start(cache, UploadOptions::default());
    uploader.enqueue(layer.clone());
    uploader.drain(PATIENCE).await;
    assert!(matches!(
        layer.outcomes().last(),
        Some(UploadOutcome::Uploaded { .. })
    ));
    let flaky = Arc::new(Flaky::new(Shared(engine)));
    let (cache, _) = content(&flaky, None, system_clock());
    let id = layer.diff_id();
    assert!(matches!(cache.ask_manifest(&id).await, Answer::Has(_)));
    assert_eq!(cache.has_chunk(&id, 1).await, Answer::Has(()));
    assert_eq!(cache.has_chunk(&id, 2).await, Answer::Lacks);
    let timeout = Fault::Fail(TierError::Timeout {
        after: Duration::from_secs(1),
    });
    flaky.always(Some(timeout));
    let is_down = |reason: &str| reason.contains("did not answer") || reason.contains("before");
    let Answer::Down { reason } = cache.has_chunk(&id, 1).await else {
        panic!("it is down");
    };
    assert!(is_down(&reason), "{reason}");
    // The breaker answers from here on.
    let Answer::Down { reason } = cache.ask_manifest(&id).await else {
        panic!("it is down");
    };
    assert!(is_down(&reason), "{reason}");
    let image = ManifestDigest::of(b"");
    let asked = cache.image_manifest(&image, MAX_BYTES).await;
    assert!(matches!(asked, Answer::Down { .. }), "{asked:?}");
}
