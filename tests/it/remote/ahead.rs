//! What is wanted together is asked for together, and who reads in order is read ahead of.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use clip_csi::{
    digest::DiffId,
    fair::Claimant,
    layer::store::{Layer, LayerStore},
    remote::DirCache,
    tier::{CacheKey, GETS_AHEAD, LayerCache, Put},
};
use futures_util::StreamExt;
use tokio::sync::Semaphore;

use super::{
    fixture::{Call, Fault, Flaky, PATIENCE},
    proxy::Proxy,
    reading::{ask, reading, uploaded},
    servers::{RedisServer, S3Server, redis_cache, s3_cache},
};
use crate::layer_fixture::{Fixture, let_go_on};

const N_CHUNKS: u32 = 20;

/// A node that has a layer's index, and none of its chunks.
struct Reader {
    _dir: tempfile::TempDir,
    fixture: Fixture,
    store: LayerStore,
    layer: Arc<Layer>,
    engine: Arc<Flaky<DirCache>>,
    from: usize,
}

impl Reader {
    async fn new(seed: u64) -> Self {
        Self::with_cache(seed, 0).await
    }

    async fn with_cache(seed: u64, max_bytes: u64) -> Self {
        let chunk_bytes = clip_csi::chunk::CHUNK_BYTES as usize;
        let fixture = Fixture::sized(seed, N_CHUNKS as usize * chunk_bytes - 5000);
        let dir = uploaded(&[&fixture]).await;
        let (store, engine) = reading(&dir, max_bytes);
        let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
        assert_eq!(layer.file().n_chunks(), N_CHUNKS);
        Self {
            _dir: dir,
            from: engine.n_calls(),
            fixture,
            store,
            layer,
            engine,
        }
    }

    async fn present(&self, chunk: u32) {
        let (sender, outcome) = tokio::sync::oneshot::channel();
        self.store.make_present_for(
            Claimant::Mount(1),
            self.fixture.desc.diff_id,
            chunk..chunk + 1,
            Box::new(|it| drop(sender.send(it))),
        );
        outcome.await.unwrap().unwrap();
        self.fixture.expect_chunk(&self.layer, chunk);
    }

    /// The chunks that the engine was asked for.
    fn asked(&self) -> Vec<u32> {
        let calls = self.engine.calls();
        let chunks = calls[self.from..].iter().filter_map(|it| match it {
            Call::Get(CacheKey::Chunk(_, chunk)) => Some(*chunk),
            _ => None,
        });
        chunks.collect()
    }

    async fn eventually(&self, what: impl Fn(&Self) -> bool) {
        let comes = async {
            while !what(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, comes).await.unwrap();
    }
}

#[tokio::test]
async fn who_reads_in_order_finds_what_comes_next() {
    let it = Reader::new(71).await;
    it.present(0).await;
    let_go_on().await;
    assert_eq!(it.asked(), [0], "nothing says that it is a reader in order");
    it.present(1).await;
    it.eventually(|it| it.layer.file().has(2..4)).await;
    it.present(4).await;
    it.eventually(|it| it.layer.file().has(5..9)).await;
    it.present(9).await;
    it.eventually(|it| it.layer.file().has(10..18)).await;
    let_go_on().await;
    assert!(!it.layer.file().has(18..19));
    it.present(18).await;
    it.eventually(|it| it.layer.file().is_complete()).await;
    let mut asked = it.asked();
    asked.sort_unstable();
    let all: Vec<_> = (0..N_CHUNKS).collect();
    assert_eq!(asked, all, "each once");
}

#[tokio::test]
async fn nothing_is_evicted_for_what_nobody_wants_yet() {
    // Two more chunks would be above the high watermark.
    let it = Reader::with_cache(75, 3 << 20).await;
    for chunk in [0, 1] {
        it.present(chunk).await;
    }
    let_go_on().await;
    assert_eq!(it.asked(), [0, 1]);
}

#[tokio::test]
async fn who_reads_here_and_there_costs_what_they_want() {
    let it = Reader::new(72).await;
    for chunk in [12, 3, 17, 8, 5, 0] {
        it.present(chunk).await;
    }
    let_go_on().await;
    assert_eq!(it.asked(), [12, 3, 17, 8, 5, 0]);
}

#[tokio::test]
async fn who_comes_for_a_chunk_on_its_way_waits_for_that_one_alone() {
    let it = Reader::new(73).await;
    it.present(0).await;
    let go_on = Arc::new(Semaphore::new(0));
    it.engine.always(Some(Fault::Hold(Arc::clone(&go_on))));
    let mount = it.store.of_mount(1);
    ask(&*mount, &it.fixture, 1);
    it.eventually(|it| it.asked().len() == 3).await;
    assert_eq!(it.asked(), [0, 1, 2]);
    let second = it.present(2);
    tokio::pin!(second);
    go_on.add_permits(2);
    tokio::time::timeout(PATIENCE, &mut second).await.unwrap();
    it.eventually(|it| it.asked().len() == 4).await;
    assert_eq!(it.asked(), [0, 1, 2, 3], "and was not asked for again");
    assert!(!it.layer.file().has(3..4));
    go_on.add_permits(1);
    it.eventually(|it| it.layer.file().has(0..4)).await;
}

/// Whether an engine asks for so many values, and no more, before the first has come; all come in order.
async fn asks_ahead(direct: &dyn LayerCache, proxied: &dyn LayerCache, proxy: &Proxy, word: &str) {
    let layer = DiffId::of(b"ahead");
    let value = |n: u32| Bytes::from(vec![u8::try_from(n).unwrap(); 300_000]);
    let keys: Vec<_> = (0..10).map(|n| CacheKey::Chunk(layer, n)).collect();
    for (key, n) in keys.iter().zip(0..) {
        // One is not there, and one is empty.
        match n {
            6 => {}
            7 => direct.put(*key, Bytes::new(), Put::Replace).await.unwrap(),
            n => direct.put(*key, value(n), Put::Replace).await.unwrap(),
        }
    }
    // A connection is there, so that what is seen is how many requests pass.
    let before = proxied.get(keys[0], 300_000).await.unwrap();
    assert_eq!(before, Some(value(0)));
    proxy.hold(true);
    let n_before = proxy.n_asked(word);
    let mut values = proxied.get_each(keys.clone(), 300_000);
    let asked = async {
        while proxy.n_asked(word) - n_before < GETS_AHEAD {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let_go_on().await;
    };
    tokio::select! {
        () = asked => {}
        value = values.next() => panic!("nothing may come: {value:?}"),
        () = tokio::time::sleep(PATIENCE) => panic!("{} were asked for", proxy.n_asked(word) - n_before),
    }
    assert_eq!(proxy.n_asked(word) - n_before, GETS_AHEAD);
    proxy.hold(false);
    for n in 0..10 {
        let expected = match n {
            6 => None,
            7 => Some(Bytes::new()),
            n => Some(value(n)),
        };
        let got = values.next().await.unwrap().unwrap();
        assert!(
            got == expected,
            "value {n}: {:?} bytes",
            got.map(|it| it.len())
        );
    }
    assert!(values.next().await.is_none());
}

#[tokio::test]
async fn redis_is_asked_for_several_values_at_once() {
    let name = "redis_is_asked_for_several_values_at_once";
    let Some(server) = RedisServer::start(name, &[]).await else {
        return;
    };
    let proxy = Proxy::to(server.port).await;
    let proxied = redis_cache(&format!("redis://127.0.0.1:{}", proxy.port));
    asks_ahead(&server.cache(), &proxied, &proxy, "GETRANGE").await;
    // One for all values but the empty one, which was asked for again meanwhile, and one for all else.
    assert_eq!(proxy.n_connections(), 3);
}

#[tokio::test]
async fn a_bucket_is_asked_for_several_values_at_once() {
    let Some(server) = S3Server::start("a_bucket_is_asked_for_several_values_at_once").await else {
        return;
    };
    let proxy = Proxy::to(server.port).await;
    let proxied = s3_cache(proxy.port, "hunter2", PATIENCE);
    asks_ahead(&server.cache(), &proxied, &proxy, "GET /").await;
}
