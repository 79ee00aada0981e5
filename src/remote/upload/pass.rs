//! Goes once over a layer and puts what the store lacks: chunks, the access map, the index, and last
//! the manifest.

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use tracing::debug;

use super::{Repair, UploadSource, queue::Job};
use crate::{
    chunk,
    digest::{ChunkDigest, DiffId},
    remote::{
        content::ContentCache,
        format::{self, RemoteLayer, RemoteManifest},
        gate::Refusal,
    },
    tier::{CacheKey, Put, TierError},
};

/// The wait after a request that failed while the breaker stayed closed.
const SHORT_WAIT: Duration = Duration::from_millis(100);

/// Says why a pass ended early.
#[derive(Debug)]
pub(super) enum Stop {
    /// The remote failed; try again after this time.
    Later { wait: Duration, error: String },
    /// The remote was not asked, because it failed before; try again after this time.
    Skipped { wait: Duration },
    /// The store is full, or the local copy is bad: trying again is of no use.
    Never { error: String },
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Skipped(wait) => Self::Skipped { wait },
            Refusal::Failed(error @ TierError::Full { .. }) => Self::Never {
                error: error.to_string(),
            },
            Refusal::Failed(error) => Self::Later {
                wait: SHORT_WAIT,
                error: error.to_string(),
            },
            Refusal::Wrong(error) => Self::Later {
                wait: SHORT_WAIT,
                error,
            },
        }
    }
}

/// What a pass has to put.
#[derive(Debug, PartialEq, Eq)]
enum Plan {
    Nothing,
    /// Some chunks, which replace what is there; and index and manifest, if they differ.
    Parts {
        chunks: Vec<u32>,
        index: bool,
    },
    /// All chunks that are absent, then index and manifest.
    All,
}

/// Decides what to put, from what the store says and what it should say.
fn plan(stored: Option<&RemoteManifest>, layer: &RemoteLayer, repair: &Repair) -> Plan {
    let stored = match stored {
        Some(it)
            if it.layer_bytes == layer.layer_bytes && it.chunk_digests == layer.chunk_digests =>
        {
            it
        }
        _ => return Plan::All,
    };
    let n_chunks = chunk::n_chunks(layer.layer_bytes);
    let wanted = repair.chunks.iter().copied();
    let chunks: Vec<_> = wanted.filter(|n| u64::from(*n) < n_chunks).collect();
    // Another version of the driver may have written another index of the same layer.
    let index = repair.index
        || stored.index_digest != layer.index_digest
        || stored.index_bytes != layer.index_bytes;
    match chunks.is_empty() && !index {
        true => Plan::Nothing,
        false => Plan::Parts { chunks, index },
    }
}

/// The passes over one layer.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    cache: &'a ContentCache,
    job: &'a Job,
    diff_id: DiffId,
    sent_bytes: u64,
}

impl<'a> Pass<'a> {
    pub(super) fn new(cache: &'a ContentCache, job: &'a Job) -> Self {
        Self {
            cache,
            job,
            diff_id: job.diff_id(),
            sent_bytes: 0,
        }
    }

    /// Bytes sent in all passes so far.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Makes one pass. Returns the layer's size, or `None` if the store had all of it already.
    pub(super) async fn run(&mut self) -> Result<Option<u64>, Stop> {
        let stored = match self.cache.stored_manifest(&self.diff_id).await {
            Ok(stored) => stored,
            // It is replaced at the end.
            Err(Refusal::Wrong(_)) => None,
            Err(refusal) => return Err(refusal.into()),
        };
        let layer = self.local(describe).await?;
        let plan = plan(stored.as_ref(), &layer, self.job.repair());
        drop(stored);
        match &plan {
            Plan::Nothing => {}
            Plan::Parts { chunks, .. } => {
                for n in chunks {
                    self.put_chunk(*n, &layer, Put::Replace).await?;
                }
            }
            Plan::All => {
                for n in 0..u32::try_from(layer.chunk_digests.len()).unwrap_or(u32::MAX) {
                    let key = CacheKey::Chunk(self.diff_id, n);
                    // Cheap, while a put sends the chunk even if it is there.
                    if !self.cache.gate().has(key).await? {
                        self.put_chunk(n, &layer, Put::IfAbsent).await?;
                    }
                }
            }
        }
        // Whoever uploaded the layer first may have had none.
        let has_put_map = self.put_access_map(&layer).await?;
        match plan {
            Plan::Nothing if !has_put_map => return Ok(None),
            Plan::Nothing | Plan::Parts { index: false, .. } => {}
            Plan::Parts { .. } | Plan::All => self.put_manifest(&layer).await?,
        }
        Ok(Some(layer.layer_bytes))
    }

    /// Puts the access map, if the layer has one and the store has none; whether it did.
    async fn put_access_map(&mut self, layer: &RemoteLayer) -> Result<bool, Stop> {
        let found = match self.local(|source| source.access_map()).await {
            Ok(found) => found,
            Err(Stop::Never { error }) => {
                debug!(layer.diff_id = %self.diff_id, error, "access map is not uploaded");
                None
            }
            Err(stop) => return Err(stop),
        };
        // Readers take no longer one.
        let max_bytes = format::max_access_map_bytes(layer.layer_bytes);
        let Some((blob, map_bytes)) = found.filter(|(_, map_bytes)| *map_bytes <= max_bytes) else {
            return Ok(false);
        };
        let key = |n| CacheKey::AccessMap(self.diff_id, blob, n);
        if self.cache.gate().has(key(0)).await? {
            return Ok(false);
        }
        // The first part comes last: with it, the map is complete.
        let mut parts: Vec<_> = format::parts(map_bytes).collect();
        while let Some((n, len)) = parts.pop() {
            let offset = chunk::byte_range(n, map_bytes).start;
            let read = move |source: &dyn UploadSource| {
                let mut part = vec![0; len];
                source.read_access_map(&mut part, offset)?;
                Ok(match n {
                    0 => format::encode_access_map_start(map_bytes, &part),
                    _ => part,
                })
            };
            match self.local(read).await {
                Ok(value) => {
                    let key = CacheKey::AccessMap(self.diff_id, blob, n);
                    self.put(key, value, Put::Replace).await?;
                }
                Err(Stop::Never { error }) => {
                    debug!(layer.diff_id = %self.diff_id, error, "access map is not uploaded");
                    return Ok(false);
                }
                Err(stop) => return Err(stop),
            }
        }
        Ok(true)
    }

    async fn put_chunk(&mut self, n: u32, layer: &RemoteLayer, put: Put) -> Result<(), Stop> {
        let range = chunk::byte_range(n, layer.layer_bytes);
        let expect = usize::try_from(n)
            .ok()
            .and_then(|at| layer.chunk_digests.get(at));
        let expect = *expect.ok_or_else(|| Stop::Never {
            error: format!("chunk {n} has no digest"),
        })?;
        let value = self
            .local(move |source| read_chunk(source, n, range.end - range.start, &expect))
            .await?;
        self.put(CacheKey::Chunk(self.diff_id, n), value, put).await
    }

    /// Puts the index, then the manifest: with it, the layer is complete.
    async fn put_manifest(&mut self, layer: &RemoteLayer) -> Result<(), Stop> {
        let mut hasher = blake3::Hasher::new();
        for (n, len) in format::parts(layer.index_bytes) {
            let offset = chunk::byte_range(n, layer.index_bytes).start;
            let read = move |source: &dyn UploadSource| {
                let mut part = vec![0; len];
                source.read_index(&mut part, offset)?;
                hasher.update(&part);
                Ok((format::encode_part(&part), hasher))
            };
            let (value, hashed) = self.local(read).await?;
            hasher = hashed;
            self.put(CacheKey::Index(self.diff_id, n), value, Put::Replace)
                .await?;
        }
        if hasher.finalize() != *layer.index_digest.as_bytes() {
            return Err(Stop::Never {
                error: "local copy: the index has changed".to_owned(),
            });
        }
        let manifest = layer.encode(self.cache.key());
        let manifest = manifest.map_err(|error| Stop::Never {
            error: error.to_string(),
        })?;
        let key = CacheKey::Manifest(self.diff_id);
        self.put(key, manifest, Put::Replace).await
    }

    async fn put(&mut self, key: CacheKey, value: impl Into<Bytes>, put: Put) -> Result<(), Stop> {
        let value = value.into();
        let bytes = u64::try_from(value.len()).unwrap_or(u64::MAX);
        self.cache.gate().put(key, value, put).await?;
        self.sent_bytes = self.sent_bytes.saturating_add(bytes);
        self.cache.metrics().remote_upload_bytes.inc_by(bytes);
        Ok(())
    }

    /// Runs `work`, which reads the local disk, on the blocking pool.
    async fn local<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn UploadSource) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Stop> {
        let source = Arc::clone(self.job.source());
        let done = tokio::task::spawn_blocking(move || work(source.as_ref())).await;
        let done = done.unwrap_or_else(|error| Err(io::Error::other(error)));
        done.map_err(|error| Stop::Never {
            error: format!("local copy: {error}"),
        })
    }
}

/// Collects what the manifest says. The index is read twice rather than held.
fn describe(source: &dyn UploadSource) -> io::Result<RemoteLayer> {
    let (index_bytes, index_digest) = source.index()?;
    let layer = RemoteLayer {
        diff_id: source.diff_id(),
        blob: source.blob(),
        blob_bytes: source.blob_bytes(),
        layer_bytes: source.layer_bytes(),
        chunk_digests: source.chunk_digests(),
        index_digest,
        index_bytes,
    };
    let n_chunks = chunk::n_chunks(layer.layer_bytes);
    match usize::try_from(n_chunks) == Ok(layer.chunk_digests.len()) {
        true => Ok(layer),
        false => Err(invalid("the number of chunks is not that of the layer")),
    }
}

/// Reads and encodes a chunk, if it is still what its digest says: never spread local rot.
fn read_chunk(
    source: &dyn UploadSource,
    n: u32,
    len: u64,
    expect: &ChunkDigest,
) -> io::Result<Vec<u8>> {
    let mut content = Vec::with_capacity(usize::try_from(len).map_err(io::Error::other)?);
    source.read_chunk(n, &mut content)?;
    match ChunkDigest::of(&content) == *expect {
        true => Ok(format::encode_part(&content)),
        false => Err(invalid(&format!("chunk {n} does not match its digest"))),
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{chunk::CHUNK_BYTES, digest::BlobDigest, remote::Trust};

    fn layer() -> RemoteLayer {
        RemoteLayer {
            diff_id: DiffId::of(b"layer"),
            blob: BlobDigest::of(b"blob"),
            blob_bytes: 4,
            layer_bytes: CHUNK_BYTES + 1,
            chunk_digests: vec![ChunkDigest::of(b"0"), ChunkDigest::of(b"1")],
            index_digest: ChunkDigest::of(b"index"),
            index_bytes: 5,
        }
    }

    fn stored() -> RemoteManifest {
        let layer = layer();
        RemoteManifest {
            diff_id: layer.diff_id,
            blob: layer.blob,
            blob_bytes: layer.blob_bytes,
            layer_bytes: layer.layer_bytes,
            chunk_digests: layer.chunk_digests,
            index_digest: layer.index_digest,
            index_bytes: layer.index_bytes,
            trust: Trust::Unverified,
        }
    }

    #[test]
    fn only_what_differs_is_put() {
        let none = Repair::default();
        let repair = |chunks: &[u32], index| Repair {
            chunks: chunks.to_vec(),
            index,
        };
        let parts = |chunks: &[u32], index| Plan::Parts {
            chunks: chunks.to_vec(),
            index,
        };
        let (layer, same) = (layer(), stored());
        assert_eq!(plan(None, &layer, &none), Plan::All);
        assert_eq!(plan(None, &layer, &repair(&[1], false)), Plan::All);
        assert_eq!(plan(Some(&same), &layer, &none), Plan::Nothing);
        for (asked, expected) in [
            (repair(&[1], false), parts(&[1], false)),
            (repair(&[], true), parts(&[], true)),
            // Chunk 2 does not exist.
            (repair(&[0, 2], true), parts(&[0], true)),
            (repair(&[2], false), Plan::Nothing),
        ] {
            assert_eq!(plan(Some(&same), &layer, &asked), expected, "{asked:?}");
        }
        let mut other_index = stored();
        other_index.index_digest = ChunkDigest::of(b"other");
        assert_eq!(plan(Some(&other_index), &layer, &none), parts(&[], true));
        let mut lie = stored();
        lie.chunk_digests[1] = ChunkDigest::of(b"lie");
        assert_eq!(plan(Some(&lie), &layer, &none), Plan::All);
    }
}
