//! A layer whose bytes come wrong is read once more, from its registry, if a mirror may have been
//! at fault.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use clip_csi::{
    digest::BlobDigest,
    metrics::Metrics,
    tier::{BlobSource, BlobStream, BoxFuture, PresentError, SourceError},
};

use crate::layer_fixture::{FakeSource, Fixture, decompressions, names, open};

/// A mirror, and the registry once the mirror is distrusted.
#[derive(Debug)]
struct Mirrored {
    mirror: Arc<FakeSource>,
    registry: Arc<FakeSource>,
    is_distrusted: AtomicBool,
}

impl BlobSource for Mirrored {
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        let source = if self.is_distrusted.load(Ordering::SeqCst) {
            &self.registry
        } else {
            &self.mirror
        };
        source.open(blob, blob_bytes, range)
    }

    fn distrust(&self, _: &BlobDigest) -> bool {
        !self.is_distrusted.swap(true, Ordering::SeqCst)
    }
}

/// A source whose mirror and registry give these bytes.
fn mirrored(mirror: &[u8], registry: &[u8]) -> Arc<Mirrored> {
    Arc::new(Mirrored {
        mirror: FakeSource::new(mirror.to_vec()),
        registry: FakeSource::new(registry.to_vec()),
        is_distrusted: AtomicBool::new(false),
    })
}

/// The blob with one bit wrong in its middle.
fn flipped(blob: &[u8]) -> Vec<u8> {
    let mut blob = blob.to_vec();
    let middle = blob.len() / 2;
    blob[middle] ^= 1;
    blob
}

#[tokio::test]
async fn a_first_fill_is_repeated_from_the_registry() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let fixture = Fixture::new(11);
    let source = mirrored(&flipped(&fixture.blob), &fixture.blob);
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    fixture.expect_all(&store, &layer).await;
    assert_eq!(
        (source.mirror.n_opened(), source.registry.n_opened()),
        (1, 1)
    );
    assert_eq!(decompressions(&metrics), 1);
}

#[tokio::test]
async fn a_refill_is_repeated_from_the_registry() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let fixture = Fixture::new(12);
    let path = {
        let store = open(dir.path(), None, &metrics);
        let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
        layer.file().dir().to_owned()
    };
    // No chunk is known to be there, and what is there is nothing.
    let data = std::fs::File::create(path.join("data")).unwrap();
    data.set_len(fixture.tar.len() as u64).unwrap();
    std::fs::remove_file(path.join("state")).unwrap();
    let source = mirrored(&flipped(&fixture.blob), &fixture.blob);
    let store = open(dir.path(), None, &metrics);
    let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
    fixture.expect_all(&store, &layer).await;
    assert!(source.is_distrusted.load(Ordering::SeqCst));
    assert!(0 < source.mirror.n_opened() && 0 < source.registry.n_opened());
}

#[tokio::test]
async fn what_is_wrong_at_the_registry_too_is_refused() {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let fixture = Fixture::new(13);
    let wrong = flipped(&fixture.blob);
    let source = mirrored(&wrong, &wrong);
    let store = open(dir.path(), None, &metrics);
    let err = store
        .layer(&fixture.desc, source.clone())
        .await
        .unwrap_err();
    assert!(matches!(err, PresentError::Refused { .. }), "{err}");
    assert_eq!(
        (source.mirror.n_opened(), source.registry.n_opened()),
        (1, 1)
    );
    assert_eq!(names(&dir.path().join("tmp")), [""; 0]);
}
