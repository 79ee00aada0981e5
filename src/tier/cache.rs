//! The contract of a tier that all nodes share: keys, values, and what an engine does with them.

use std::{fmt, num::ParseIntError, str::FromStr, time::Duration};

use bytes::Bytes;
use futures_util::{StreamExt, stream};

use super::{BoxFuture, BoxStream};
use crate::digest::{BlobDigest, DiffId, ManifestDigest};

/// Names a value in the remote content cache.
///
/// Keys carry no `{hash tag}`, so that the chunks of one layer spread over all shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheKey {
    /// The layer's manifest: size, chunk digests.
    Manifest(DiffId),
    /// Part `n` of the layer's index, its tar entries: cut as the layer is cut into chunks.
    Index(DiffId, u32),
    /// Chunk `n` of the layer.
    Chunk(DiffId, u32),
    /// Where reading of the layer's blob may begin, part `n`; one layer may come in several blobs.
    AccessMap(DiffId, BlobDigest, u32),
    /// Who makes the layer from the registry just now; only for [`LayerCache::lease`].
    Lease(DiffId),
    /// Which chunks of the image were touched first.
    Profile(ManifestDigest),
    /// The image's manifest, as its registry gave it.
    ImageManifest(ManifestDigest),
    /// An image's configuration, as its registry gave it.
    ImageConfig(BlobDigest),
}

impl fmt::Display for CacheKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manifest(layer) => write!(f, "clip:oci:layer:decompressed:{layer}"),
            Self::Index(layer, n) => write!(f, "clip:oci:layer:decompressed:{layer}:index:{n}"),
            Self::Chunk(layer, n) => write!(f, "clip:oci:layer:decompressed:{layer}:o:{n}"),
            Self::AccessMap(layer, blob, n) => {
                write!(f, "clip:oci:layer:decompressed:{layer}:access:{blob}:{n}")
            }
            Self::Lease(layer) => write!(f, "clip:oci:layer:decompressed:{layer}:lease"),
            Self::Profile(image) => write!(f, "clip:oci:image:profile:{image}"),
            Self::ImageManifest(image) => write!(f, "clip:oci:image:manifest:{image}"),
            Self::ImageConfig(config) => write!(f, "clip:oci:image:config:{config}"),
        }
    }
}

/// Names one holder of a lease: a random number, new for each lease that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseHolder(u128);

impl LeaseHolder {
    /// Makes one that no other node and no other lease has.
    pub fn random() -> Self {
        use std::hash::{BuildHasher, Hasher, RandomState};
        // std seeds each hasher from the system's randomness.
        let half = || u128::from(RandomState::new().build_hasher().finish());
        Self(half() << 64 | half())
    }
}

impl fmt::Display for LeaseHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for LeaseHolder {
    type Err = ParseIntError;

    /// Parses what `Display` writes.
    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        u128::from_str_radix(text, 16).map(Self)
    }
}

/// Whether a write may replace what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// Leaves a value that is already there.
    IfAbsent,
    /// Replaces it.
    Replace,
}

/// Values that are asked for at once, at most: chunks of 4 MiB together.
///
/// With a round trip of 10 ms that is 400 MB/s. What was asked for waits in the server's memory and in
/// both kernels'.
pub const GETS_AHEAD: usize = 4;

/// What [`LayerCache::get_each`] is where nothing can be asked for ahead.
pub fn one_by_one<T: LayerCache + ?Sized>(
    cache: &T,
    keys: Vec<CacheKey>,
    max_bytes: usize,
) -> BoxStream<'_, Result<Option<Bytes>, TierError>> {
    Box::pin(stream::iter(keys).then(move |key| cache.get(key, max_bytes)))
}

/// A store of bytes that all nodes share, and that may lose or corrupt any of them.
///
/// Bytes that come from it are hostile until the caller has verified them.
pub trait LayerCache: Send + Sync + fmt::Debug {
    /// The engine's name, for logs and metrics: from a closed set.
    fn engine(&self) -> &'static str;

    /// Returns the value of `key`, or `None` if the store does not have it.
    ///
    /// # Errors
    /// [`TierError::Corrupt`] if the value is longer than `max_bytes`, before it is held in memory
    /// where the engine allows that; the other variants when the tier is broken.
    ///
    /// # Cancellation
    /// Safe: an abandoned call leaves nothing behind, and never hands its answer to another.
    fn get(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> BoxFuture<'_, Result<Option<Bytes>, TierError>>;

    /// Returns the values of `keys` in their order, each as [`get`](Self::get) does; ends after an error
    /// of which the engine does not recover.
    ///
    /// Up to [`GETS_AHEAD`] are asked for before their turn, where the engine can do that without holding
    /// more than one in memory, so that together they cost the time of one request.
    ///
    /// # Errors
    /// Those of [`get`](Self::get), for each.
    ///
    /// # Cancellation
    /// Safe, as for [`get`](Self::get).
    fn get_each(
        &self,
        keys: Vec<CacheKey>,
        max_bytes: usize,
    ) -> BoxStream<'_, Result<Option<Bytes>, TierError>> {
        one_by_one(self, keys, max_bytes)
    }

    /// Does as [`get`](Self::get), on another way than a request that takes long, so that it may be answered
    /// before; `None` if there is none.
    fn get_again(
        &self,
        _key: CacheKey,
        _max_bytes: usize,
    ) -> Option<BoxFuture<'_, Result<Option<Bytes>, TierError>>> {
        None
    }

    /// Stores `value` under `key`. Readers see the old value or the new one, never a part.
    ///
    /// # Errors
    /// [`TierError::Full`] if the store takes no more; the other variants when the tier is broken.
    fn put(&self, key: CacheKey, value: Bytes, put: Put) -> BoxFuture<'_, Result<(), TierError>>;

    /// Deletes the value of `key`; no error if there is none.
    ///
    /// # Errors
    /// When the tier is broken.
    fn delete(&self, key: CacheKey) -> BoxFuture<'_, Result<(), TierError>>;

    /// Takes the lease `key`, or renews it: whether `holder` has it now, until `ttl` from now.
    ///
    /// A lease spares work, nothing more: an engine may grant one to two holders, in a race or
    /// because it knows no better, and a correct caller bears it.
    ///
    /// # Errors
    /// When the tier is broken, or this store cannot grant leases.
    ///
    /// # Cancellation
    /// Safe: what an abandoned call has taken ends after `ttl`.
    fn lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<bool, TierError>>;

    /// Ends the lease `key`, if `holder` has it; no error if not.
    ///
    /// # Errors
    /// When the tier is broken.
    fn release(&self, key: CacheKey, holder: LeaseHolder) -> BoxFuture<'_, Result<(), TierError>>;
}

/// Says how a tier is broken.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TierError {
    /// The engine answered with an error, or its disk failed.
    #[error("remote content cache: {reason}")]
    Io {
        /// What was seen.
        reason: String,
    },
    /// The value is not what was stored.
    #[error("remote content cache holds a wrong value for {key}: {reason}")]
    Corrupt {
        /// The key.
        key: CacheKey,
        /// What is wrong with it.
        reason: String,
    },
    /// No answer in time.
    #[error("remote content cache did not answer within {after:?}")]
    Timeout {
        /// How long was waited.
        after: Duration,
    },
    /// The engine cannot be reached.
    #[error("remote content cache cannot be reached: {reason}")]
    Unavailable {
        /// What was seen.
        reason: String,
    },
    /// The engine takes no more data.
    #[error("remote content cache is full: {reason}")]
    Full {
        /// What was seen.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_the_documented_ones() {
        let layer = DiffId::of(b"");
        let base = "clip:oci:layer:decompressed:sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(CacheKey::Manifest(layer).to_string(), base);
        assert_eq!(
            CacheKey::Index(layer, 17).to_string(),
            format!("{base}:index:17")
        );
        assert_eq!(
            CacheKey::Chunk(layer, 17).to_string(),
            format!("{base}:o:17")
        );
        let blob = BlobDigest::of(b"");
        assert_eq!(
            CacheKey::AccessMap(layer, blob, 17).to_string(),
            format!("{base}:access:{blob}:17")
        );
        assert_eq!(CacheKey::Lease(layer).to_string(), format!("{base}:lease"));
        let image = ManifestDigest::of(b"");
        assert_eq!(
            CacheKey::Profile(image).to_string(),
            format!("clip:oci:image:profile:{image}")
        );
        assert_eq!(
            CacheKey::ImageManifest(image).to_string(),
            format!("clip:oci:image:manifest:{image}")
        );
        assert_eq!(
            CacheKey::ImageConfig(blob).to_string(),
            format!("clip:oci:image:config:{blob}")
        );
    }

    #[test]
    fn lease_holders_differ_and_can_be_read_back() {
        let holder = LeaseHolder::random();
        assert_ne!(holder, LeaseHolder::random());
        assert_eq!(holder.to_string().len(), 32);
        assert_eq!(holder.to_string().parse(), Ok(holder));
        assert!("".parse::<LeaseHolder>().is_err());
    }
}
