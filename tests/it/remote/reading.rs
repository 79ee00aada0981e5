//! A node that reads what another one has put into a directory.

use std::sync::Arc;

use clip_csi::{
    clock::SystemClock,
    layer::{
        CacheConfig,
        store::{LayerStore, Remote},
    },
    metrics::Metrics,
    remote::{DirCache, UploadOptions, Uploader},
    tier::MakePresent,
};
use tokio::runtime::Handle;

use super::fixture::{Flaky, PATIENCE, content, key};
use crate::layer_fixture::{Fixture, config, key_file, open, remote_in};

/// Another node has put the layers of `fixtures` into a directory.
pub(super) async fn uploaded(fixtures: &[&Fixture]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let metrics = Metrics::new();
    let remote = remote_in(
        &dir.path().join("remote"),
        Some(&key_file(dir.path())),
        &metrics,
    );
    let node = open(&dir.path().join("node"), remote, &metrics);
    for fixture in fixtures {
        node.layer(&fixture.desc, fixture.source()).await.unwrap();
    }
    node.shutdown(PATIENCE).await;
    dir
}

/// A node that reads from there, with a cache of so many bytes, and the engine that it asks.
pub(super) fn reading(
    dir: &tempfile::TempDir,
    max_bytes: u64,
) -> (LayerStore, Arc<Flaky<DirCache>>) {
    let engine = DirCache::new(&dir.path().join("remote"), PATIENCE);
    let engine = Arc::new(Flaky::new(engine));
    let (cache, metrics) = content(&engine, Some(key(7)), Arc::new(SystemClock::new()));
    let uploader = Arc::new(Uploader::start(cache.clone(), UploadOptions::default()));
    let remote = Some(Remote { cache, uploader });
    let config = CacheConfig {
        max_bytes,
        ..config(&dir.path().join("reader"))
    };
    let store = LayerStore::open(config, remote, metrics, Handle::current());
    (store.unwrap(), engine)
}

/// Asks for one chunk, and does not wait for it.
pub(super) fn ask(mount: &dyn MakePresent, fixture: &Fixture, chunk: u32) {
    let chunks = chunk..chunk + 1;
    mount.make_present(fixture.desc.diff_id, chunks, Box::new(|_| {}));
}
