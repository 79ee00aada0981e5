//! One bit of each chunk of a layer is another one than it was, on the disk and in the remote content
//! cache: no reader gets a wrong byte, and what was wrong is right afterwards.

use std::{fs, os::unix::fs::FileExt, path::Path, time::Duration};

use clip_csi::{
    chunk::{self, CHUNK_BYTES},
    metrics::Metrics,
};

use crate::layer_fixture::{Fixture, files_below, key_file, open, present, remote_in};

const N_CHUNKS: u32 = 9;

fn fixture(seed: u64) -> Fixture {
    Fixture::sized(seed, N_CHUNKS as usize * CHUNK_BYTES as usize - 5000)
}

/// Flips a bit of the byte at `offset`.
fn flip(path: &Path, offset: u64) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 1 << (offset % 8);
    file.write_all_at(&byte, offset).unwrap();
}

#[tokio::test]
async fn on_the_disk_after_an_unclean_stop() {
    let (dir, metrics, fixture) = (tempfile::tempdir().unwrap(), Metrics::new(), fixture(61));
    let source = fixture.source();
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    assert_eq!(layer.file().n_chunks(), N_CHUNKS);
    let place = layer.file().dir().to_owned();
    drop((layer, store));
    fs::remove_file(place.join("state")).unwrap();
    for n in 0..N_CHUNKS {
        let range = chunk::byte_range(n, fixture.tar.len() as u64);
        // Another place in each.
        let offset = range.start + (range.end - range.start - 1) * u64::from(n) / 8;
        flip(&place.join("data"), offset);
    }

    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    for n in (0..N_CHUNKS).rev() {
        present(&store, fixture.desc.diff_id, n..n + 1)
            .await
            .unwrap();
        fixture.expect_chunk(&layer, n);
    }
    fixture.expect_all(&store, &layer).await;
    assert!(1 < source.n_opened(), "the wrong chunks were fetched anew");
}

#[tokio::test]
async fn in_the_remote_content_cache() {
    let (dir, metrics, fixture) = (tempfile::tempdir().unwrap(), Metrics::new(), fixture(62));
    let (shared, key) = (dir.path().join("remote"), key_file(dir.path()));
    let source = fixture.source();
    let node = |name: &str, metrics: &Metrics| {
        let remote = remote_in(&shared, Some(&key), metrics);
        open(&dir.path().join(name), remote, metrics)
    };
    let a = node("a", &metrics);
    a.layer(&fixture.desc, source.clone()).await.unwrap();
    a.shutdown(Duration::from_secs(20)).await;
    let chunks: Vec<_> = files_below(&shared)
        .into_iter()
        .filter(|it| it.to_string_lossy().contains("/o-"))
        .collect();
    assert_eq!(
        chunks.len(),
        N_CHUNKS as usize,
        "{:?}",
        files_below(&shared)
    );
    for (n, path) in (1..).zip(&chunks) {
        let stored_bytes = fs::metadata(path).unwrap().len();
        flip(path, (stored_bytes - 1) * n / u64::from(N_CHUNKS));
    }

    let b_metrics = Metrics::new();
    let b = node("b", &b_metrics);
    let layer = b.layer(&fixture.desc, source.clone()).await.unwrap();
    for n in (0..N_CHUNKS).rev() {
        present(&b, fixture.desc.diff_id, n..n + 1).await.unwrap();
        fixture.expect_chunk(&layer, n);
    }
    fixture.expect_all(&b, &layer).await;
    let failures = b_metrics
        .verify_failures
        .with_label_values(&["content_cache"]);
    assert!(0 < failures.get(), "what was wrong is counted");
    b.shutdown(Duration::from_secs(20)).await;

    // What b met it deleted, and put right when it had all of the layer.
    let n_stored = files_below(&shared)
        .iter()
        .filter(|it| it.to_string_lossy().contains("/o-"))
        .count();
    assert_eq!(n_stored, N_CHUNKS as usize);
}
