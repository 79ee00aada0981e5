//! What only Redis does: expiry, passwords, a limit on memory, connections that break.

use std::time::Duration;

use bytes::Bytes;
use clip_csi::{
    digest::{DiffId, ManifestDigest},
    remote::RedisCache,
    secret::Secret,
    tier::{CacheKey, LayerCache, Put, TierError},
};

use super::servers::{RedisServer, redis_cache, redis_options};

fn chunk() -> CacheKey {
    CacheKey::Chunk(DiffId::of(b"layer"), 3)
}

#[tokio::test]
async fn chunks_and_profiles_expire_and_manifests_do_not() {
    let name = "chunks_and_profiles_expire_and_manifests_do_not";
    let Some(server) = RedisServer::start(name, &[]).await else {
        return;
    };
    let cache = server.cache();
    let layer = DiffId::of(b"layer");
    for put in [Put::IfAbsent, Put::Replace] {
        for (key, ttl) in [
            (CacheKey::Manifest(layer), -1..=-1),
            (CacheKey::Index(layer, 0), -1..=-1),
            (CacheKey::Chunk(layer, 0), 900..=1000),
            (CacheKey::Profile(ManifestDigest::of(b"image")), 900..=1000),
        ] {
            let value = Bytes::from_static(b"x");
            cache.put(key, value, put).await.unwrap();
            let mut command = redis::cmd("TTL");
            command.arg(key.to_string());
            let found: i64 = command.query(&mut server.raw()).unwrap();
            assert!(ttl.contains(&found), "{key} {put:?}: {found}");
        }
    }
}

#[tokio::test]
async fn a_full_store_says_so_and_still_serves() {
    let name = "a_full_store_says_so_and_still_serves";
    let arguments = ["--maxmemory", "5mb", "--maxmemory-policy", "noeviction"];
    let Some(server) = RedisServer::start(name, &arguments).await else {
        return;
    };
    let cache = server.cache();
    let layer = DiffId::of(b"layer");
    let value = Bytes::from(vec![1; 1 << 20]);
    let mut refused = None;
    for n in 0..10 {
        let key = CacheKey::Chunk(layer, n);
        if let Err(error) = cache.put(key, value.clone(), Put::IfAbsent).await {
            refused = Some((n, error));
            break;
        }
    }
    let (n, error) = refused.unwrap();
    assert!(0 < n, "nothing fitted");
    assert!(matches!(error, TierError::Full { .. }), "{error:?}");
    let got = cache.get(CacheKey::Chunk(layer, 0), 1 << 20).await;
    assert_eq!(got.unwrap(), Some(value));
}

#[tokio::test]
async fn passwords_come_from_the_url_or_apart() {
    let name = "passwords_come_from_the_url_or_apart";
    let Some(server) = RedisServer::start(name, &["--requirepass", "hunter2"]).await else {
        return;
    };
    let with = |url: String, password: Option<&str>| {
        let password = password.map(|it| Secret::new(it.to_owned()));
        RedisCache::connect(&Secret::new(url), password.as_ref(), redis_options()).unwrap()
    };
    let port = server.port;
    for (cache, is_right) in [
        (
            with(format!("redis://:hunter2@127.0.0.1:{port}"), None),
            true,
        ),
        (with(server.url(), Some("hunter2")), true),
        (
            with(format!("redis://:old@127.0.0.1:{port}"), Some("hunter2")),
            true,
        ),
        (with(server.url(), None), false),
        (with(server.url(), Some("swordfish")), false),
    ] {
        let got = cache.get(chunk(), 10).await;
        match is_right {
            true => assert_eq!(got.unwrap(), None),
            false => {
                let error = got.unwrap_err();
                assert!(!format!("{error:?}").contains("swordfish"), "{error:?}");
                assert!(
                    matches!(error, TierError::Unavailable { .. } | TierError::Io { .. }),
                    "{error:?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_value_of_another_type_is_corrupt() {
    let name = "a_value_of_another_type_is_corrupt";
    let Some(server) = RedisServer::start(name, &[]).await else {
        return;
    };
    let mut command = redis::cmd("LPUSH");
    command.arg(chunk().to_string()).arg("x");
    let () = command.query(&mut server.raw()).unwrap();
    let got = server.cache().get(chunk(), 10).await;
    assert!(matches!(got, Err(TierError::Corrupt { .. })), "{got:?}");
}

#[tokio::test]
async fn a_connection_closed_by_the_server_is_replaced_unnoticed() {
    let name = "a_connection_closed_by_the_server_is_replaced_unnoticed";
    let Some(mut server) = RedisServer::start(name, &[]).await else {
        return;
    };
    let cache = server.cache();
    let value = Bytes::from_static(b"x");
    cache
        .put(chunk(), value.clone(), Put::Replace)
        .await
        .unwrap();
    let mut command = redis::cmd("CLIENT");
    command.arg("KILL").arg("TYPE").arg("normal");
    let _: redis::RedisResult<u64> = command.query(&mut server.raw());
    assert_eq!(cache.get(chunk(), 10).await.unwrap(), Some(value));
    server.kill();
    server.restart().await;
    assert_eq!(cache.get(chunk(), 10).await.unwrap(), None);
}

#[tokio::test]
async fn a_dead_server_is_unavailable_and_a_silent_one_times_out() {
    let dead = redis_cache(&format!(
        "redis://127.0.0.1:{}",
        super::servers::free_port()
    ));
    let got = dead.get(chunk(), 10).await;
    assert!(matches!(got, Err(TierError::Unavailable { .. })), "{got:?}");

    // The kernel accepts for a listener; nobody ever answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    let mut options = redis_options();
    options.connect_timeout = Duration::from_millis(30);
    let silent = RedisCache::connect(&Secret::new(url), None, options).unwrap();
    let is_right =
        |it: &TierError| matches!(it, TierError::Timeout { after } if after.as_millis() == 30);
    // Those who wait for one attempt to connect share its failure.
    let all = futures_util::future::join_all((0..50).map(|_| silent.delete(chunk())));
    for ended in all.await {
        let error = ended.unwrap_err();
        assert!(is_right(&error), "{error:?}");
    }
    listener.set_nonblocking(true).unwrap();
    let n_connections = std::iter::from_fn(|| listener.accept().ok()).count();
    assert_eq!(n_connections, 1, "each made its own attempt");
    let error = silent.get(chunk(), 10).await.unwrap_err();
    assert!(is_right(&error), "{error:?}");
}

/// Stops the server's process: requests are sent, answers do not come.
#[tokio::test]
async fn a_request_that_times_out_hands_its_answer_to_nobody() {
    let name = "a_request_that_times_out_hands_its_answer_to_nobody";
    let Some(server) = RedisServer::start(name, &[]).await else {
        return;
    };
    let layer = DiffId::of(b"layer");
    let key = |n| CacheKey::Chunk(layer, n);
    let patient = server.cache();
    for n in 0..4u8 {
        let value = Bytes::from(vec![n; 100_000]);
        let put = patient.put(key(u32::from(n)), value, Put::Replace);
        put.await.unwrap();
    }
    let mut options = redis_options();
    options.request_timeout = Duration::from_millis(1000);
    let url = Secret::new(server.url());
    let cache = RedisCache::connect(&url, None, options).unwrap();
    assert!(cache.get(key(0), 100_000).await.unwrap().is_some());
    let mut command = redis::cmd("CLIENT");
    command.arg("PAUSE").arg(1500).arg("ALL");
    let () = command.query(&mut server.raw()).unwrap();
    let got = cache.get(key(1), 100_000).await;
    assert!(matches!(got, Err(TierError::Timeout { .. })), "{got:?}");
    super::fixture::until("the server answers again", || {
        redis::cmd("PING")
            .query::<String>(&mut server.raw())
            .is_ok()
    })
    .await;
    for n in [2u8, 3] {
        let got = cache.get(key(u32::from(n)), 100_000).await.unwrap();
        assert!(got.unwrap().iter().all(|it| *it == n), "{n}");
    }
}
