//! Nodes that want the same layer at once: one of them reads it from the registry.

use std::{path::Path, sync::Arc, time::Duration};

use clip_csi::{
    layer::store::{LayerStore, Remote},
    metrics::Metrics,
    remote::{UploadOptions, Uploader},
};
use futures_util::future;

use crate::layer_fixture::{FakeSource, Fixture, decompressions, key_file, open, remote_in};

/// A node with a cache directory of its own, on the remote content cache in `shared`.
struct Node {
    store: LayerStore,
    metrics: Metrics,
    _dir: tempfile::TempDir,
}

impl Node {
    fn new(shared: &Path, key: Option<&Path>) -> Self {
        let metrics = Metrics::new();
        let remote = remote_in(shared, key, &metrics);
        Self::with(remote, metrics)
    }

    fn with(remote: Option<Remote>, metrics: Metrics) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            store: open(dir.path(), remote, &metrics),
            metrics,
            _dir: dir,
        }
    }

    fn waits(&self, outcome: &str) -> u64 {
        let waits = &self.metrics.remote_lease_waits;
        waits.with_label_values(&[outcome]).get()
    }
}

async fn all_get(nodes: &[Node], fixture: &Fixture, source: &Arc<FakeSource>) {
    let wanted = nodes
        .iter()
        .map(|it| it.store.layer(&fixture.desc, source.clone()));
    let layers = future::try_join_all(wanted).await.unwrap();
    for (node, layer) in nodes.iter().zip(&layers) {
        fixture.expect_all(&node.store, layer).await;
    }
}

#[tokio::test]
async fn nodes_that_start_together_ask_the_registry_once() {
    let shared = tempfile::tempdir().unwrap();
    let key = key_file(shared.path());
    for key in [Some(&*key), None] {
        let remote = tempfile::tempdir().unwrap();
        let nodes: Vec<_> = (0..6).map(|_| Node::new(remote.path(), key)).collect();
        let fixture = Fixture::new(21);
        let source = fixture.source();
        all_get(&nodes, &fixture, &source).await;
        assert_eq!(source.n_opened(), 1, "with a key: {}", key.is_some());
        let n_decompressions: u64 = nodes.iter().map(|it| decompressions(&it.metrics)).sum();
        assert_eq!(n_decompressions, 1);
        let n_made: u64 = nodes.iter().map(|it| it.waits("made")).sum();
        assert_eq!(n_made, 5);
    }
}

/// The one that makes the layer fails: the next one makes it.
#[tokio::test]
async fn a_node_that_fails_is_succeeded_by_one_that_waits() {
    let remote = tempfile::tempdir().unwrap();
    let key = key_file(remote.path());
    let (a, b) = (
        Node::new(remote.path(), Some(&key)),
        Node::new(remote.path(), Some(&key)),
    );
    let fixture = Fixture::new(22);
    // Half of the blob, and then nothing more, until it is given up.
    let stuck = FakeSource::new(fixture.blob[..fixture.blob.len() / 2].to_vec());
    stuck
        .pieces
        .forget_permits(tokio::sync::Semaphore::MAX_PERMITS);
    stuck.pieces.add_permits(1);
    let source = fixture.source();
    let failing = async {
        let b_waits = async {
            let lease = &b.metrics.remote_requests;
            while lease.with_label_values(&["lease", "miss"]).get() == 0 {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::select! {
            made = a.store.layer(&fixture.desc, stuck.clone()) => panic!("{made:?}"),
            () = b_waits => {}
        }
    };
    let waiting = async {
        while stuck.n_opened() == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        b.store.layer(&fixture.desc, source.clone()).await.unwrap()
    };
    let ((), layer) = tokio::join!(failing, waiting);
    fixture.expect_all(&b.store, &layer).await;
    assert_eq!((stuck.n_opened(), source.n_opened()), (1, 1));
    assert_eq!(b.waits("taken"), 1);
}

/// Who cannot upload has nobody wait, and waits for nobody.
#[tokio::test]
async fn a_node_that_cannot_upload_takes_no_lease() {
    let shared = tempfile::tempdir().unwrap();
    let metrics = Metrics::new();
    let remote = remote_in(shared.path(), None, &metrics).unwrap();
    let options = UploadOptions {
        queue_layers: 0,
        ..UploadOptions::default()
    };
    let uploader = Arc::new(Uploader::start(remote.cache.clone(), options));
    let node = Node::with(Some(Remote { uploader, ..remote }), metrics);
    let fixture = Fixture::new(23);
    let layer = node
        .store
        .layer(&fixture.desc, fixture.source())
        .await
        .unwrap();
    fixture.expect_all(&node.store, &layer).await;
    for outcome in ["hit", "miss", "error"] {
        let requests = &node.metrics.remote_requests;
        assert_eq!(requests.with_label_values(&["lease", outcome]).get(), 0);
    }
}
