//! What only a cluster of Redis servers does: keys are spread, slots move, one server of several dies.

use bytes::Bytes;
use clip_csi::{
    digest::DiffId,
    tier::{CacheKey, LayerCache, Put, TierError},
};

use super::servers::{RedisCluster, RedisServer};

fn chunk(n: u32) -> CacheKey {
    CacheKey::Chunk(DiffId::of(b"layer"), n)
}

fn value(n: u32) -> Bytes {
    Bytes::from(vec![n as u8; 10_000])
}

/// Runs a command of the administrator's on a server.
fn ask<T: redis::FromRedisValue>(server: &RedisServer, words: &[&str]) -> T {
    let mut command = redis::cmd("CLUSTER");
    for word in words {
        command.arg(*word);
    }
    command.query(&mut server.raw()).unwrap()
}

#[tokio::test]
async fn chunks_are_on_all_servers_of_a_cluster() {
    let Some(cluster) = RedisCluster::start("chunks_are_on_all_servers_of_a_cluster").await else {
        return;
    };
    let cache = cluster.cache();
    for n in 0..60 {
        cache.put(chunk(n), value(n), Put::IfAbsent).await.unwrap();
    }
    let n_keys = cluster.n_keys();
    assert_eq!(n_keys.iter().sum::<usize>(), 60);
    assert!(n_keys.iter().all(|it| 5 < *it), "{n_keys:?}");
    for n in 0..60 {
        assert_eq!(cache.get(chunk(n), 10_000).await.unwrap(), Some(value(n)));
    }
}

#[tokio::test]
async fn a_slot_that_moves_is_followed() {
    let Some(cluster) = RedisCluster::start("a_slot_that_moves_is_followed").await else {
        return;
    };
    let cache = cluster.cache();
    assert_eq!(cache.get(chunk(0), 10_000).await.unwrap(), None);
    let slot: u64 = ask(&cluster.servers[0], &["KEYSLOT", &chunk(0).to_string()]);
    // Of three thirds, by number.
    let owner = usize::try_from(slot * 3 / 16384).unwrap();
    let next = (owner + 1) % 3;
    let id = |at: usize| -> String { ask(&cluster.servers[at], &["MYID"]) };
    let tell = |at: usize, what: &str, id: &str| {
        let words = ["SETSLOT", &slot.to_string(), what, id];
        let () = ask(&cluster.servers[at], &words);
    };
    // As `redis-cli --cluster reshard` does it. Who took a slot that was importing has the newest say in whose it is, so that no message
    // of before takes it back; who gives it away is told last.
    tell(next, "IMPORTING", &id(owner));
    tell(owner, "MIGRATING", &id(next));
    for at in [next, (owner + 2) % 3, owner] {
        tell(at, "NODE", &id(next));
    }
    cache.put(chunk(0), value(7), Put::IfAbsent).await.unwrap();
    assert_eq!(cache.get(chunk(0), 10_000).await.unwrap(), Some(value(7)));
    let mut expected = vec![0; 3];
    expected[next] = 1;
    assert_eq!(cluster.n_keys(), expected);
}

#[tokio::test]
async fn a_server_that_dies_takes_its_own_chunks_alone_and_gives_them_back() {
    let name = "a_server_that_dies_takes_its_own_chunks_alone_and_gives_them_back";
    let Some(mut cluster) = RedisCluster::start(name).await else {
        return;
    };
    let cache = cluster.cache();
    for n in 0..30 {
        cache.put(chunk(n), value(n), Put::IfAbsent).await.unwrap();
    }
    let n_lost = cluster.n_keys()[0];
    cluster.servers[0].kill();
    let mut n_failed = 0;
    for n in 0..30 {
        match cache.get(chunk(n), 10_000).await {
            Ok(found) => assert_eq!(found, Some(value(n))),
            Err(error) => {
                let is_right = matches!(
                    error,
                    TierError::Unavailable { .. }
                        | TierError::Io { .. }
                        | TierError::Timeout { .. }
                );
                assert!(is_right, "{error:?}");
                n_failed += 1;
            }
        }
    }
    assert_eq!(n_failed, n_lost);
    // It keeps nothing, but it knows which slots are its own.
    cluster.servers[0].restart().await;
    cluster.come_together().await;
    for n in 0..30 {
        cache.put(chunk(n), value(n), Put::IfAbsent).await.unwrap();
        assert_eq!(cache.get(chunk(n), 10_000).await.unwrap(), Some(value(n)));
    }
}
