//! Counts what is read of blobs, for whoever waits for their image.

use std::{ops::Range, sync::Arc};

use futures_util::StreamExt as _;

use crate::{
    digest::{BlobDigest, DiffId},
    mount::Progress,
    tier::{BlobSource, BlobStream, BoxFuture, KeepPushed, SourceError, SourceIdentity},
};

/// A source whose bytes are added to a [`Progress`] as they come.
#[derive(Debug)]
pub(super) struct Counted {
    pub(super) source: Arc<dyn BlobSource>,
    pub(super) progress: Arc<Progress>,
}

impl BlobSource for Counted {
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        Box::pin(async move {
            let stream = self.source.open(blob, blob_bytes, range).await?;
            let progress = Arc::clone(&self.progress);
            let counted = stream.inspect(move |item| {
                if let Ok(bytes) = item {
                    progress.add_done(bytes.len() as u64);
                }
            });
            Ok(Box::pin(counted) as BlobStream)
        })
    }

    fn identity(&self) -> Option<SourceIdentity> {
        self.source.identity()
    }

    fn distrust(&self, blob: &BlobDigest) -> bool {
        self.source.distrust(blob)
    }

    fn pins_index(&self) -> bool {
        self.source.pins_index()
    }

    fn layer_index<'a>(
        &'a self,
        layer: &'a DiffId,
        keep: &'a mut dyn KeepPushed,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        self.source.layer_index(layer, keep)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use futures_util::stream;

    use super::*;

    /// Gives two pieces and breaks.
    #[derive(Debug)]
    struct Broken;

    impl BlobSource for Broken {
        fn open<'a>(
            &'a self,
            _: &'a BlobDigest,
            _: u64,
            _: Range<u64>,
        ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
            let failure = SourceError::Unavailable {
                registry: "r.x".to_owned(),
                reason: "down".to_owned(),
            };
            let piece = || Ok(Bytes::from(vec![0; 1_500_000]));
            let items = stream::iter([piece(), piece(), Err(failure)]);
            Box::pin(async { Ok(Box::pin(items) as BlobStream) })
        }

        fn distrust(&self, _: &BlobDigest) -> bool {
            true
        }
    }

    #[tokio::test]
    async fn what_was_read_is_counted_while_it_is_read() {
        let progress = Arc::new(Progress::default());
        progress.set_total(4_000_000);
        progress.set_phase("fetching 1 of 2 layers");
        let counted = Counted {
            source: Arc::new(Broken),
            progress: Arc::clone(&progress),
        };
        let blob = BlobDigest::of(b"");
        let mut stream = counted.open(&blob, 4_000_000, 0..4_000_000).await.unwrap();
        for shown in ["1 of 4 MB", "3 of 4 MB"] {
            assert_eq!(stream.next().await.unwrap().unwrap().len(), 1_500_000);
            let expected = format!("fetching 1 of 2 layers, {shown}");
            assert_eq!(progress.to_string(), expected);
        }
        assert!(stream.next().await.unwrap().is_err());
        assert!(counted.distrust(&blob));
    }
}
