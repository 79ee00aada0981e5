//! Answers whoever must know why there is nothing: what an image is made of, and whether a layer is all
//! there.
//!
//! An image's manifest and configuration are stored as its registry gave them. Each is named by its
//! digest, which its reader compares: nobody need vouch for them, and no key is needed.

use std::sync::Arc;

use bytes::Bytes;
use tracing::debug;

use super::{
    content::{ContentCache, hit},
    format::{FormatError, RemoteManifest},
    gate::Refusal,
};
use crate::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    fair::Claimant,
    tier::{CacheKey, Put},
};

/// What the remote content cache says to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer<T> {
    /// It has that.
    Has(T),
    /// It does not, or what it had was wrong, which was counted.
    Lacks,
    /// It does not answer, or not sensibly.
    Down {
        /// What was seen.
        reason: String,
    },
}

impl ContentCache {
    /// Fetches an image's manifest; one of more than `max_bytes`, or with another digest, is deleted.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn image_manifest(&self, image: &ManifestDigest, max_bytes: usize) -> Answer<Bytes> {
        let expect = *image;
        let is_right = move |value: &[u8]| ManifestDigest::of(value) == expect;
        self.document(CacheKey::ImageManifest(*image), max_bytes, is_right)
            .await
    }

    /// Fetches an image's configuration; one of more than `max_bytes`, or with another digest, is
    /// deleted.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn image_config(&self, config: &BlobDigest, max_bytes: usize) -> Answer<Bytes> {
        let expect = *config;
        let is_right = move |value: &[u8]| BlobDigest::of(value) == expect;
        self.document(CacheKey::ImageConfig(*config), max_bytes, is_right)
            .await
    }

    /// Stores an image's manifest and configuration, named by their digests: the configuration first, so
    /// that a manifest that is there leads to it.
    ///
    /// # Errors
    /// What the store said when it did not take them.
    pub async fn put_image(&self, manifest: Bytes, config: Bytes) -> Result<(), String> {
        let documents = [
            (CacheKey::ImageConfig(BlobDigest::of(&config)), config),
            (
                CacheKey::ImageManifest(ManifestDigest::of(&manifest)),
                manifest,
            ),
        ];
        for (key, value) in documents {
            let put = self.gate().put(key, value, Put::Replace).await;
            put.map_err(|refusal| reason(&refusal))?;
        }
        Ok(())
    }

    /// As [`manifest`](Self::manifest), for who must know why there is none.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn ask_manifest(&self, layer: &DiffId) -> Answer<Arc<RemoteManifest>> {
        match self.stored_manifest(layer).await {
            Ok(Some(manifest)) => Answer::Has(hit(manifest)),
            Ok(None) => Answer::Lacks,
            Err(refusal) => self.missed_document(CacheKey::Manifest(*layer), refusal),
        }
    }

    /// Whether the store has something for chunk `n` of `layer`, without fetching it.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn has_chunk(&self, layer: &DiffId, n: u32) -> Answer<()> {
        match self.gate().has(CacheKey::Chunk(*layer, n)).await {
            Ok(true) => Answer::Has(()),
            Ok(false) => Answer::Lacks,
            Err(refusal) => Answer::Down {
                reason: reason(&refusal),
            },
        }
    }

    async fn document(
        &self,
        key: CacheKey,
        max_bytes: usize,
        is_right: impl FnOnce(&[u8]) -> bool + Send + 'static,
    ) -> Answer<Bytes> {
        let verify = move |value: Bytes| match is_right(&value) {
            true => Ok(value),
            false => Err(FormatError::Digest { what: "document" }),
        };
        match self
            .gate()
            .get(Claimant::Publish, key, max_bytes, verify)
            .await
        {
            Ok(Some(document)) => {
                debug!(%key, bytes = document.len(), "remote cache hit");
                Answer::Has(document)
            }
            Ok(None) => Answer::Lacks,
            Err(refusal @ Refusal::Wrong(_)) => {
                self.missed_for_good(key, refusal).await;
                Answer::Lacks
            }
            Err(refusal) => self.missed_document(key, refusal),
        }
    }

    fn missed_document<T>(&self, key: CacheKey, refusal: Refusal) -> Answer<T> {
        match refusal {
            Refusal::Wrong(_) => {
                self.missed(key, refusal);
                Answer::Lacks
            }
            Refusal::Skipped(_) | Refusal::Failed(_) => Answer::Down {
                reason: reason(&refusal),
            },
        }
    }
}

fn reason(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Skipped(wait) => {
            format!(
                "it failed before, and is asked again in {} s",
                wait.as_secs() + 1
            )
        }
        Refusal::Failed(error) => error.to_string(),
        Refusal::Wrong(error) => error.clone(),
    }
}
