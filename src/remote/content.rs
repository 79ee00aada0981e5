//! Answers for layers: fetches manifests, indices and chunks, and lets nothing wrong pass.
//!
//! No function here returns an error. A remote that is down, slow, lying or full is a miss: the
//! caller goes on to the registry, and the fault is in the metrics and the log.

use std::{
    collections::HashSet,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tracing::{debug, info, warn};

use crate::{
    clock::Clock,
    digest::{BlobDigest, ChunkDigest, DiffId, ManifestDigest},
    fair::Claimant,
    integrity::IntegrityKey,
    metrics::{Metrics, Tier},
    tier::{CacheKey, LayerCache, Put},
};

use super::{
    breaker::BackOff,
    format::{self, FormatError, MAX_MANIFEST_BYTES, RemoteManifest, Trust},
    gate::{Gate, Refusal},
};

/// Layers whose wrong manifest was logged, at most, before they are logged anew.
const REMEMBERED_WARNINGS: usize = 1024;

/// Whoever asks for anything but chunks makes an image or a layer ready.
const PUBLISH: Claimant = Claimant::Publish;

/// What a [`ContentCache`] can be told.
#[derive(Debug, Clone)]
pub struct ContentOptions {
    /// The installation's key; without it manifests are [`Trust::Unverified`].
    pub key: Option<IntegrityKey>,
    /// Bytes of an index at most, decompressed.
    pub max_index_bytes: u64,
    /// How long a remote that is down is left alone.
    pub back_off: BackOff,
    /// How long a lease lives that is not renewed.
    pub lease_ttl: Duration,
    /// How long this node waits for a layer that another one makes; zero: it neither waits nor has
    /// others wait.
    pub lease_wait: Duration,
}

/// The remote content cache, as the layer store uses it. Cheap to clone; all clones share one
/// state.
#[derive(Debug, Clone)]
pub struct ContentCache(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    gate: Gate,
    options: ContentOptions,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    /// std Mutex: held for a lookup, never across an await.
    warned: Mutex<HashSet<DiffId>>,
}

impl ContentCache {
    /// Puts the layout, the verification and the breaker on top of an engine. Does no I/O.
    pub fn new(
        backend: Arc<dyn LayerCache>,
        options: ContentOptions,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self(Arc::new(Inner {
            gate: Gate::new(
                backend,
                options.back_off,
                metrics.clone(),
                Arc::clone(&clock),
            ),
            options,
            metrics,
            clock,
            warned: Mutex::default(),
        }))
    }

    /// The engine's name.
    pub fn engine(&self) -> &'static str {
        self.0.gate.engine()
    }

    /// Fetches the manifest of a complete layer; ask once per layer and keep it.
    ///
    /// With a key configured, one that is not authenticated by it is a miss. Without a key, read
    /// [`Trust::Unverified`] before using it.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn manifest(&self, diff_id: &DiffId) -> Option<Arc<RemoteManifest>> {
        let manifest = match self.stored_manifest(diff_id).await {
            Ok(found) => found?,
            Err(refusal) => {
                self.missed(CacheKey::Manifest(*diff_id), refusal);
                return None;
            }
        };
        Some(hit(manifest))
    }

    /// Fetches the layer's index part by part, and has `keep` take each; whether that was all of it,
    /// and verified against the manifest.
    ///
    /// Until then nothing vouches for what was kept.
    ///
    /// # Errors
    /// Those of `keep`.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn index(
        &self,
        manifest: &RemoteManifest,
        mut keep: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        let diff_id = manifest.diff_id;
        let mut hasher = blake3::Hasher::new();
        for (n, len) in format::parts(manifest.index_bytes) {
            let key = CacheKey::Index(diff_id, n);
            let decode = move |value| format::decode_part(value, len, "index");
            // No writer stores more than the raw part and its codec.
            match self.0.gate.get(PUBLISH, key, len + 1, decode).await {
                Ok(Some(part)) => {
                    hasher.update(&part);
                    keep(&part)?;
                }
                Ok(None) => return Ok(false),
                // Not deleted: an upload replaces it, and during one a reader may see the new index
                // with the old manifest.
                Err(refusal) => {
                    self.missed(key, refusal);
                    return Ok(false);
                }
            }
        }
        if hasher.finalize() != *manifest.index_digest.as_bytes() {
            let reason = FormatError::Digest { what: "index" }.to_string();
            self.missed(CacheKey::Index(diff_id, 0), Refusal::Wrong(reason));
            return Ok(false);
        }
        info!(
            layer.diff_id = %diff_id,
            bytes = manifest.layer_bytes,
            index_bytes = manifest.index_bytes,
            "loaded from remote cache"
        );
        Ok(true)
    }

    /// Fetches chunk `n` for `who`, which must have `expected_len` bytes and the digest `expect`.
    ///
    /// A chunk that is anything else is deleted from the store.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn chunk(
        &self,
        who: Claimant,
        diff_id: &DiffId,
        n: u32,
        expected_len: usize,
        expect: &ChunkDigest,
    ) -> Option<Bytes> {
        let key = CacheKey::Chunk(*diff_id, n);
        let expect = *expect;
        let decode = move |value| format::decode_chunk(value, expected_len, &expect);
        // No writer stores more than the raw chunk and its codec.
        let max_bytes = expected_len.saturating_add(1);
        match self.0.gate.get(who, key, max_bytes, decode).await {
            Ok(Some(content)) => {
                debug!(layer.diff_id = %diff_id, chunk = n, bytes = expected_len, "remote cache hit");
                Some(content)
            }
            Ok(None) => None,
            Err(refusal) => {
                self.missed_for_good(key, refusal).await;
                None
            }
        }
    }

    /// Fetches the access map of the layer's `blob` part by part, as it was uploaded, and has `keep`
    /// take each; whether that was all of it.
    ///
    /// Nobody vouches for it: its reader checks its form and its checksum, tells
    /// [`reject_access_map`](Self::reject_access_map) if they are wrong, and verifies what it leads
    /// to by the chunks' digests.
    ///
    /// # Errors
    /// Those of `keep`.
    pub async fn access_map(
        &self,
        diff_id: &DiffId,
        blob: &BlobDigest,
        layer_bytes: u64,
        mut keep: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<bool> {
        let key = |n| CacheKey::AccessMap(*diff_id, *blob, n);
        let max_map_bytes = format::max_access_map_bytes(layer_bytes);
        let decode = move |value| format::decode_access_map_start(value, max_map_bytes);
        let start = self
            .0
            .gate
            .get(PUBLISH, key(0), format::MAX_ACCESS_MAP_START_BYTES, decode);
        let (map_bytes, start) = match start.await {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(false),
            Err(refusal) => {
                self.missed_for_good(key(0), refusal).await;
                return Ok(false);
            }
        };
        keep(&start)?;
        drop(start);
        for (n, len) in format::parts(map_bytes).skip(1) {
            let decode = move |value| format::decode_raw_part(value, len, "access map");
            let refusal = match self.0.gate.get(PUBLISH, key(n), len, decode).await {
                Ok(Some(part)) => {
                    keep(&part)?;
                    continue;
                }
                Ok(None) => Refusal::Wrong(format!("part {n} of it is missing")),
                Err(refusal) => refusal,
            };
            // Without its start it is put again.
            self.missed_for_good(key(0), refusal).await;
            return Ok(false);
        }
        Ok(true)
    }

    /// Takes an access map out of the store, because its content is wrong; `reason` says how.
    pub async fn reject_access_map(&self, diff_id: &DiffId, blob: &BlobDigest, reason: String) {
        let key = CacheKey::AccessMap(*diff_id, *blob, 0);
        self.missed(key, Refusal::Wrong(reason));
        self.delete(key).await;
    }

    /// Fetches the profile of an image, as [`put_profile`](Self::put_profile) was given it; one of
    /// more than `max_bytes` is a miss.
    ///
    /// With a key configured, one that is not authenticated by it is a miss, too. Its reader checks
    /// its form: a wrong one is replaced by who records the next.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn profile(&self, image: &ManifestDigest, max_bytes: usize) -> Option<Bytes> {
        let key = CacheKey::Profile(*image);
        let this = Arc::clone(&self.0);
        let decode = move |value| format::decode_profile(value, this.options.key.as_ref());
        let max_bytes = max_bytes.saturating_add(format::PROFILE_TAG_BYTES);
        match self.0.gate.get(PUBLISH, key, max_bytes, decode).await {
            Ok(found) => found,
            Err(refusal) => {
                self.missed(key, refusal);
                None
            }
        }
    }

    /// Stores the profile of an image, in place of another one; whether the store took it.
    pub async fn put_profile(&self, image: &ManifestDigest, profile: &[u8]) -> bool {
        let key = CacheKey::Profile(*image);
        let value = format::encode_profile(profile, self.key());
        match self.0.gate.put(key, value.into(), Put::Replace).await {
            Ok(()) => true,
            // The next node records one of its own.
            Err(refusal) => {
                debug!(%key, ?refusal, "profile of an image was not stored in remote cache");
                false
            }
        }
    }

    /// Takes a layer's manifest out of the store, because its chunks turned out not to be the
    /// layer: for callers who were given a [`Trust::Unverified`] one.
    pub async fn reject(&self, diff_id: &DiffId) {
        let key = CacheKey::Manifest(*diff_id);
        let reason = "the chunks it names are not those of the layer".to_owned();
        self.missed(key, Refusal::Wrong(reason));
        self.delete(key).await;
    }

    /// The manifest, or why there is none; nothing is logged.
    pub(super) async fn stored_manifest(
        &self,
        diff_id: &DiffId,
    ) -> Result<Option<RemoteManifest>, Refusal> {
        let layer = *diff_id;
        let this = Arc::clone(&self.0);
        let decode = move |value: Bytes| {
            let options = &this.options;
            let (key, max) = (options.key.as_ref(), options.max_index_bytes);
            RemoteManifest::decode(&value, &layer, key, max)
        };
        let key = CacheKey::Manifest(layer);
        let found = self
            .0
            .gate
            .get(PUBLISH, key, MAX_MANIFEST_BYTES, decode)
            .await?;
        Ok(found.flatten())
    }

    /// Whether there is a key, by which what others have put is believed.
    pub fn authenticates(&self) -> bool {
        self.key().is_some()
    }

    pub(super) fn gate(&self) -> &Gate {
        &self.0.gate
    }

    pub(super) fn options(&self) -> &ContentOptions {
        &self.0.options
    }

    pub(super) fn key(&self) -> Option<&IntegrityKey> {
        self.options().key.as_ref()
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.0.metrics
    }

    pub(super) fn clock(&self) -> &dyn Clock {
        self.0.clock.as_ref()
    }

    async fn delete(&self, key: CacheKey) {
        match self.0.gate.delete(key).await {
            Ok(()) => {}
            // The next reader finds the same and tries again.
            Err(refusal) => debug!(%key, ?refusal, "wrong value was not deleted from remote cache"),
        }
    }

    /// Does as [`Self::missed`], and deletes a wrong value, which nobody replaces while it is there.
    pub(super) async fn missed_for_good(&self, key: CacheKey, refusal: Refusal) {
        let is_wrong = matches!(refusal, Refusal::Wrong(_));
        self.missed(key, refusal);
        if is_wrong {
            self.delete(key).await;
        }
    }

    /// Counts and logs why there was no answer; the gate has done it for a broken remote.
    pub(super) fn missed(&self, key: CacheKey, refusal: Refusal) {
        let Refusal::Wrong(error) = refusal else {
            return;
        };
        self.0
            .metrics
            .verify_failures
            .with_label_values(&[Tier::ContentCache.label()])
            .inc();
        if self.is_news(key) {
            let engine = self.engine();
            warn!(%key, engine, error, "remote cache holds a wrong value, not using it");
        } else {
            debug!(%key, error, "remote cache holds a wrong value, not using it");
        }
    }

    /// Whether a wrong value at `key` is to be logged: manifests once per layer, because they stay
    /// until somebody uploads the layer; others always, because they are deleted, or
    /// are asked for once in a mount.
    fn is_news(&self, key: CacheKey) -> bool {
        let layer = match key {
            CacheKey::Manifest(layer) | CacheKey::Index(layer, _) => layer,
            CacheKey::Chunk(..)
            | CacheKey::AccessMap(..)
            | CacheKey::Lease(_)
            | CacheKey::Profile(_)
            | CacheKey::ImageManifest(_)
            | CacheKey::ImageConfig(_) => return true,
        };
        // Nothing panics with the lock held.
        let mut warned = self.0.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.len() >= REMEMBERED_WARNINGS {
            warned.clear();
        }
        warned.insert(layer)
    }
}

/// Says in the log that the remote has a layer.
pub(super) fn hit(manifest: RemoteManifest) -> Arc<RemoteManifest> {
    info!(
        layer.diff_id = %manifest.diff_id,
        bytes = manifest.layer_bytes,
        chunks = manifest.chunk_digests.len(),
        verified = manifest.trust == Trust::Authenticated,
        "remote cache hit"
    );
    Arc::new(manifest)
}
