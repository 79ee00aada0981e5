//! What only S3 does: refusals with a code, servers without conditions, bodies that lie.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clip_csi::{
    digest::DiffId,
    tier::{CacheKey, LayerCache, LeaseHolder, Put, TierError},
};

use super::{
    fixture::PATIENCE,
    servers::{S3Server, s3_cache},
};
use crate::http_server::{HttpServer, Reply, Request};

const LONG: Duration = Duration::from_secs(600);

fn chunk() -> CacheKey {
    CacheKey::Chunk(DiffId::of(b"layer"), 3)
}

fn lease() -> CacheKey {
    CacheKey::Lease(DiffId::of(b"layer"))
}

fn port(server: &HttpServer) -> u16 {
    server.host().rsplit_once(':').unwrap().1.parse().unwrap()
}

/// An answer with what S3 sends with every object.
fn object(body: impl Into<Vec<u8>>) -> Reply {
    Reply::new(200, body)
        .with("etag", "\"1\"")
        .with("last-modified", "Tue, 24 Nov 2026 00:00:00 GMT")
}

fn refusal(status: u16, code: &str) -> Reply {
    Reply::new(status, format!("<Error><Code>{code}</Code></Error>"))
}

#[tokio::test]
async fn objects_are_where_the_documentation_says() {
    let server = HttpServer::start(|_| object("value")).await;
    let cache = s3_cache(port(&server), "hunter2", PATIENCE);
    let manifest = CacheKey::Manifest(DiffId::of(b""));
    cache.get(manifest, 10).await.unwrap().unwrap();
    let spread = blake3::hash(manifest.to_string().as_bytes()).to_hex();
    let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let name = format!("clip%3Aoci%3Alayer%3Adecompressed%3Asha256%3A{hex}");
    let path = format!("/layers/clip-csi/{}/{name}", &spread[..2]);
    let requests = server.requests("");
    assert_eq!(requests[0].path, path);
    let authorization = requests[0].header("authorization").unwrap();
    assert!(!authorization.contains("hunter2"), "{authorization}");
}

#[tokio::test]
async fn refusals_are_told_apart_and_say_what_to_do() {
    for (status, code, expected) in [
        (
            404,
            "NoSuchBucket",
            "Io: create it, or correct remote.s3.bucket",
        ),
        (403, "AccessDenied", "Io: to list the bucket"),
        (403, "SignatureDoesNotMatch", "Io: check the access key"),
        (301, "PermanentRedirect", "Io: check remote.s3.region"),
        (500, "InternalError", "Io: InternalError"),
        (503, "SlowDown", "Unavailable: HTTP 503 SlowDown"),
        (429, "", "Unavailable: HTTP 429"),
        (507, "XMinioStorageFull", "Full: HTTP 507"),
        (403, "QuotaExceeded", "Full: QuotaExceeded"),
    ] {
        let server = HttpServer::start(move |_| refusal(status, code)).await;
        let cache = s3_cache(port(&server), "hunter2", PATIENCE);
        let value = Bytes::from_static(b"value");
        for error in [
            cache.get(chunk(), 10).await.unwrap_err(),
            cache.put(chunk(), value, Put::Replace).await.unwrap_err(),
            cache.delete(chunk()).await.unwrap_err(),
        ] {
            let (kind, text) = expected.split_once(": ").unwrap();
            let shown = format!("{error:?}");
            assert!(shown.starts_with(kind), "{status} {code}: {shown}");
            assert!(shown.contains(text), "{status} {code}: {shown}");
            assert!(shown.contains("bucket layers"), "{shown}");
        }
    }
    // What is not there is no fault.
    let server = HttpServer::start(|_| refusal(404, "NoSuchKey")).await;
    let cache = s3_cache(port(&server), "hunter2", PATIENCE);
    assert_eq!(cache.get(chunk(), 10).await.unwrap(), None);
    cache.delete(chunk()).await.unwrap();
}

/// The first pieces of an endless error, and of a long value, are all that is ever read.
#[tokio::test]
async fn long_bodies_are_not_held() {
    let huge = vec![b'x'; 64 << 20];
    let error = huge.clone();
    let server = HttpServer::start(move |_| Reply::new(500, error.clone())).await;
    let cache = s3_cache(port(&server), "hunter2", PATIENCE);
    let got = cache.get(chunk(), 10).await;
    assert!(matches!(got, Err(TierError::Io { .. })), "{got:?}");
    // A body that never comes: it is refused by its length alone.
    let server = HttpServer::start(move |_| object(huge.clone()).stall(0)).await;
    let cache = s3_cache(port(&server), "hunter2", PATIENCE);
    let got = cache.get(chunk(), 1 << 20).await;
    assert!(matches!(got, Err(TierError::Corrupt { .. })), "{got:?}");
}

#[tokio::test]
async fn a_body_that_breaks_off_or_stops_is_an_error() {
    let server = HttpServer::start(|_| object(vec![1; 1000]).cut(500)).await;
    let cache = s3_cache(port(&server), "hunter2", PATIENCE);
    let got = cache.get(chunk(), 1000).await;
    assert!(matches!(got, Err(TierError::Unavailable { .. })), "{got:?}");
    let server = HttpServer::start(|_| object(vec![1; 1000]).stall(500)).await;
    let cache = s3_cache(port(&server), "hunter2", Duration::from_millis(100));
    let got = cache.get(chunk(), 1000).await;
    assert!(matches!(got, Err(TierError::Timeout { .. })), "{got:?}");
    // Without a length nothing can be bounded before it is held.
    let server = HttpServer::start(|_| object(vec![1; 1000]).without_length()).await;
    let cache = s3_cache(port(&server), "hunter2", PATIENCE);
    let got = cache.get(chunk(), 1000).await;
    assert!(matches!(got, Err(TierError::Io { .. })), "{got:?}");
}

/// A server that puts whatever the condition, or says that it knows none.
#[tokio::test]
async fn without_conditions_everybody_gets_the_lease() {
    let ignores = |_: &Request| object("");
    let refuses = |request: &Request| match request.header("if-none-match") {
        Some(_) => refusal(501, "NotImplemented"),
        None => object(""),
    };
    type Script = Box<dyn Fn(&Request) -> Reply + Send + Sync>;
    for script in [Box::new(ignores) as Script, Box::new(refuses)] {
        let server = HttpServer::start(script).await;
        let cache = s3_cache(port(&server), "hunter2", PATIENCE);
        for _ in 0..3 {
            let holder = LeaseHolder::random();
            assert!(cache.lease(lease(), holder, LONG).await.unwrap());
        }
        let probes = server.requests("probe").len();
        assert!((2..=4).contains(&probes), "asked once: {probes} requests");
        assert_eq!(server.requests("lease").len(), 0);
    }
}

/// A probe that failed says nothing: it is made again.
#[tokio::test]
async fn a_failed_probe_is_repeated() {
    let n_requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&n_requests);
    let server = HttpServer::start(move |_| match counted.fetch_add(1, Ordering::SeqCst) {
        0 => refusal(503, "SlowDown"),
        _ => object(""),
    })
    .await;
    let cache = s3_cache(port(&server), "hunter2", PATIENCE);
    let holder = LeaseHolder::random();
    let failed = cache.lease(lease(), holder, LONG).await;
    assert!(
        matches!(failed, Err(TierError::Unavailable { .. })),
        "{failed:?}"
    );
    assert!(cache.lease(lease(), holder, LONG).await.unwrap());
}

#[tokio::test]
async fn a_wrong_key_is_refused_by_a_real_server() {
    let Some(server) = S3Server::start("a_wrong_key_is_refused_by_a_real_server").await else {
        return;
    };
    let cache = s3_cache(server.port, "swordfish", PATIENCE);
    let error = cache.get(chunk(), 10).await.unwrap_err();
    let shown = format!("{error:?}");
    assert!(shown.contains("check the access key"), "{shown}");
    assert!(!shown.contains("swordfish"), "{shown}");
}
