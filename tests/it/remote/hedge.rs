//! What a reader waits for unusually long is asked for again, within bounds.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clip_csi::{
    clock::SystemClock,
    digest::{ChunkDigest, DiffId},
    fair::Claimant,
    metrics::Metrics,
    remote::{ContentCache, WantedChunk},
    tier::{CacheKey, LayerCache, Put},
};

use super::{
    fixture::{Fault, Flaky, PATIENCE, content, dir_cache, key},
    proxy::Proxy,
    servers::{RedisServer, S3Server, redis_cache, s3_cache},
};
const READER: Claimant = Claimant::Mount(1);

fn layer() -> DiffId {
    DiffId::of(b"hedge")
}

fn chunk(number: u32) -> (Bytes, WantedChunk) {
    let content = Bytes::from(format!("chunk {number}, ").repeat(1000));
    let wanted = WantedChunk {
        number,
        len: content.len(),
        digest: ChunkDigest::of(&content),
    };
    (content, wanted)
}

/// Puts so many chunks into the store, as they are (docs/REMOTE_FORMAT.md, "Chunk").
async fn fill(engine: &dyn LayerCache, n_chunks: u32) {
    for number in 0..n_chunks {
        let value = [&[0], &chunk(number).0[..]].concat();
        let key = CacheKey::Chunk(layer(), number);
        engine.put(key, value.into(), Put::Replace).await.unwrap();
    }
}

async fn read(cache: &ContentCache, who: Claimant, number: u32) {
    let (content, it) = chunk(number);
    let got = cache.chunk(who, &layer(), number, it.len, &it.digest).await;
    assert_eq!(got, Some(content));
}

fn n_hedges(metrics: &Metrics, outcome: &str) -> u64 {
    metrics.remote_hedges.with_label_values(&[outcome]).get()
}

/// Whether readers come by what a connection that stalls does not bring, without the time that they
/// would wait for that, and without the remote being taken for one that is down. So many connections that
/// are made next stall as well.
async fn goes_round_a_stall<T: LayerCache + 'static>(
    direct: &T,
    proxied: T,
    proxy: &Proxy,
    n_next: usize,
    word: &str,
) {
    fill(direct, 60).await;
    let (cache, metrics) = content(
        &Arc::new(proxied),
        Some(key(1)),
        Arc::new(SystemClock::new()),
    );
    for number in 0..60 {
        read(&cache, READER, number).await;
    }
    let usual = n_hedges(&metrics, "won") + n_hedges(&metrics, "lost");
    assert!(usual <= 3, "{usual} for 60 reads");
    let won = n_hedges(&metrics, "won");
    proxy.stall(n_next);
    let started = std::time::Instant::now();
    read(&cache, READER, 7).await;
    assert_eq!(n_hedges(&metrics, "won"), won + 1);
    // Several at once, of which the first does not come.
    for number in 0..60 {
        read(&cache, READER, number).await;
    }
    let won = n_hedges(&metrics, "won");
    proxy.stall(n_next);
    let wanted = (10..18).map(|it| chunk(it).1).collect();
    let mut run = cache.chunks(READER, &layer(), wanted);
    for number in 10..18 {
        let content = Some(chunk(number).0);
        assert_eq!(run.next().await, Some((number, content)));
    }
    assert_eq!(run.next().await, None);
    drop(run);
    assert!(n_hedges(&metrics, "won") > won);
    assert!(started.elapsed() < PATIENCE, "nobody waited for a timeout");
    assert_eq!(metrics.remote_up.get(), 1);
    // Several readers, all of whose connections stall.
    let [one, other] = [4, 5].map(|it| read(&cache, READER, it));
    tokio::join!(one, other);
    for number in 0..60 {
        read(&cache, READER, number).await;
    }
    proxy.stall(2 * n_next);
    let [one, other] = [4, 5].map(|it| read(&cache, READER, it));
    tokio::join!(one, other);
    assert!(started.elapsed() < PATIENCE, "nobody waited for a timeout");
    // All that were idle have stalled, and not only the one that is taken.
    for number in 0..60 {
        read(&cache, READER, number).await;
    }
    let [one, other] = [4, 5].map(|it| read(&cache, READER, it));
    tokio::join!(one, other);
    proxy.stall(n_next);
    read(&cache, READER, 6).await;
    assert!(started.elapsed() < PATIENCE, "nobody waited for a timeout");
    // What nobody waits for has time.
    for number in 0..60 {
        read(&cache, READER, number).await;
    }
    for who in [Claimant::Background, Claimant::Publish] {
        proxy.hold(true);
        let n_before = proxy.n_asked(word);
        tokio::select! {
            () = read(&cache, who, 3) => panic!("nothing may come"),
            () = tokio::time::sleep(Duration::from_millis(500)) => {}
        }
        assert_eq!(proxy.n_asked(word), n_before + 1, "{who:?}");
        proxy.hold(false);
        read(&cache, who, 3).await;
    }
}

#[tokio::test]
async fn a_connection_to_redis_that_stalls_is_gone_round() {
    let name = "a_connection_to_redis_that_stalls_is_gone_round";
    let Some(server) = RedisServer::start(name, &[]).await else {
        return;
    };
    let proxy = Proxy::to(server.port).await;
    let proxied = redis_cache(&format!("redis://127.0.0.1:{}", proxy.port));
    goes_round_a_stall(&server.cache(), proxied, &proxy, 0, "GETRANGE").await;
}

#[tokio::test]
async fn a_connection_to_a_bucket_that_stalls_is_gone_round() {
    let Some(server) = S3Server::start("a_connection_to_a_bucket_that_stalls_is_gone_round").await
    else {
        return;
    };
    let proxy = Proxy::to(server.port).await;
    let proxied = s3_cache(proxy.port, "hunter2", PATIENCE);
    // This server closes each connection after its answer.
    goes_round_a_stall(&server.cache(), proxied, &proxy, 1, "GET /").await;
}

#[tokio::test]
async fn a_store_that_is_slow_altogether_is_asked_hardly_more() {
    let (engine, _dir) = dir_cache();
    fill(&engine, 1).await;
    let engine = Arc::new(Flaky::new(engine));
    let (cache, metrics) = content(&engine, Some(key(1)), Arc::new(SystemClock::new()));
    for _ in 0..100 {
        read(&cache, READER, 0).await;
    }
    // From now on each takes longer than all before.
    engine.always(Some(Fault::Delay(Duration::from_millis(60))));
    for _ in 0..40 {
        read(&cache, READER, 0).await;
    }
    let n_hedges = n_hedges(&metrics, "won") + n_hedges(&metrics, "lost");
    assert!((1..=7).contains(&n_hedges), "{n_hedges} for 140 reads");
    assert_eq!(engine.n_calls() as u64, 140 + n_hedges);
}
