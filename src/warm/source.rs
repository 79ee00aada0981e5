//! Where blobs come from when an image is warmed: counted and paced, or from nowhere.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use futures_util::StreamExt as _;

use super::{Pace, WarmProgress};
use crate::{
    digest::BlobDigest,
    tier::{BlobSource, BlobStream, BoxFuture, SourceError, SourceIdentity},
};

/// A registry's blobs, whose bytes are counted, and come at a pace.
#[derive(Debug)]
pub(super) struct Measured {
    source: Arc<dyn BlobSource>,
    pace: Arc<Pace>,
    bytes: Arc<AtomicU64>,
    progress: Option<Arc<WarmProgress>>,
}

impl Measured {
    pub(super) fn new(
        source: Arc<dyn BlobSource>,
        pace: &Arc<Pace>,
        progress: Option<&Arc<WarmProgress>>,
    ) -> Self {
        Self {
            source,
            pace: Arc::clone(pace),
            bytes: Arc::default(),
            progress: progress.cloned(),
        }
    }

    /// Bytes that have come.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl BlobSource for Measured {
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        Box::pin(async move {
            let stream = self.source.open(blob, blob_bytes, range).await?;
            let (pace, total) = (Arc::clone(&self.pace), Arc::clone(&self.bytes));
            let progress = self.progress.clone();
            let measured = stream.then(move |item| {
                let (pace, total) = (Arc::clone(&pace), Arc::clone(&total));
                let progress = progress.clone();
                async move {
                    let bytes = item.as_ref().map_or(0, |it| it.len() as u64);
                    pace.take(bytes).await;
                    total.fetch_add(bytes, Ordering::Relaxed);
                    if let Some(progress) = progress {
                        progress.bytes_done(bytes);
                    }
                    item
                }
            });
            Ok(Box::pin(measured) as BlobStream)
        })
    }

    fn identity(&self) -> Option<SourceIdentity> {
        self.source.identity()
    }

    fn distrust(&self, blob: &BlobDigest) -> bool {
        self.source.distrust(blob)
    }

    /// A pod that has the layer open reads it with its own credentials.
    fn gives_way(&self) -> bool {
        true
    }
}

/// No registry at all: for who takes what the remote content cache has.
#[derive(Debug)]
pub(super) struct Nowhere;

impl BlobSource for Nowhere {
    fn open<'a>(
        &'a self,
        _: &'a BlobDigest,
        _: u64,
        _: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        let refused = SourceError::Unavailable {
            registry: "the registry".to_owned(),
            reason: "it is not asked for an image that is warmed out of the remote content cache"
                .to_owned(),
        };
        Box::pin(std::future::ready(Err(refused)))
    }

    fn gives_way(&self) -> bool {
        true
    }
}
