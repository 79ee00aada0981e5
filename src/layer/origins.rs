//! Where a layer's bytes come from: its blob, at the registry of an image that has it.

use std::{ops::Range, sync::Arc, time::Instant};

use tracing::warn;

use super::reach::{Answered, Reach};
use crate::{
    fair::Claimant,
    tier::{BlobSource, BlobStream, LayerDesc, PresentError},
};

/// Where a layer comes from: its blob, and a source with the credentials of whoever asked last.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) desc: LayerDesc,
    pub(super) source: Arc<dyn BlobSource>,
    /// Whether it answers.
    pub(super) reach: Arc<Reach>,
}

impl Origin {
    pub(super) fn new(desc: &LayerDesc, source: Arc<dyn BlobSource>) -> Self {
        Self {
            desc: desc.clone(),
            source,
            reach: Arc::default(),
        }
    }

    /// Those who want the image that the source is of.
    pub(super) fn claimant(&self) -> Claimant {
        // No other source has its address as long as this one waits for a turn.
        Claimant::Image(Arc::as_ptr(&self.source).addr() as u64)
    }

    /// Opens a part of the blob.
    pub(super) async fn open(&self, range: Range<u64>) -> Result<BlobStream, PresentError> {
        let LayerDesc {
            diff_id,
            blob,
            blob_bytes,
            ..
        } = &self.desc;
        let opened = self.source.open(blob, *blob_bytes, range).await;
        let answer = match &opened {
            Ok(_) => Answered::Yes,
            Err(_) => Answered::No,
        };
        self.reach.note(answer, Instant::now());
        opened.map_err(|source| PresentError::Origin {
            layer: *diff_id,
            source,
        })
    }

    /// Opens all of the blob.
    pub(super) async fn open_all(&self) -> Result<BlobStream, PresentError> {
        self.open(0..self.desc.blob_bytes).await
    }

    /// Whether a fill that failed with `err` is worth another attempt at once: the bytes were
    /// wrong, and may have been a mirror's.
    pub(super) fn distrusts(&self, err: &PresentError) -> bool {
        let is_wrong = matches!(
            err,
            PresentError::Refused { .. } | PresentError::Limit { .. }
        );
        let again = is_wrong && self.source.distrust(&self.desc.blob);
        if again {
            warn!(layer.diff_id = %self.desc.diff_id, layer.blob = %self.desc.blob,
                error = %err, "layer came wrong, reading it from its registry and no mirror");
        }
        again
    }
}
