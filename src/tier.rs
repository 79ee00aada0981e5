//! The contract between who reads a layer and where its bytes come from.
//!
//! Three seams, outermost first:
//!
//! - [`MakePresent`]: "make these chunks of this layer present on local disk". The side that
//!   serves FUSE knows only this. It takes a callback, not a future, so that a server of plain
//!   threads can use it as well as one with a runtime.
//! - [`LayerCache`]: a shared tier that may miss. `Ok(None)` is a miss; an error is a broken tier,
//!   and the next one is asked.
//! - [`BlobSource`]: the origin. Its errors are the only ones that reach a reader.

mod cache;
pub mod lent;
mod toc;

pub use toc::{Toc, TocKind};

pub use cache::{CacheKey, GETS_AHEAD, LayerCache, LeaseHolder, Put, TierError, one_by_one};

use std::{
    borrow::Cow, fmt, future::Future, io, ops::Range, path::PathBuf, pin::Pin, str::FromStr,
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use serde::{Deserialize, Serialize};

use self::lent::LentChunk;
use crate::digest::{BlobDigest, DiffId};

/// Longest text in an error: what a registry says may be of any length, and people read no more. All
/// texts of an error fit into a message between the roles of a node (`ipc`) many times.
const MAX_TEXT_BYTES: usize = 1024;

/// Cuts a text for people to a length that can be passed on, and marks that.
pub(crate) fn shorten(text: &mut String) {
    if MAX_TEXT_BYTES < text.len() {
        text.truncate(text.floor_char_boundary(MAX_TEXT_BYTES));
        text.push('…');
    }
}

/// A boxed future, as object-safe async traits need it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A boxed stream.
pub type BoxStream<'a, T> = Pin<Box<dyn Stream<Item = T> + Send + 'a>>;

/// The compressed bytes of a blob, in order.
pub type BlobStream = BoxStream<'static, Result<Bytes, SourceError>>;

/// What an image's manifest and config say about one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDesc {
    /// Names the uncompressed tar.
    pub diff_id: DiffId,
    /// Names the blob in the registry.
    pub blob: BlobDigest,
    /// Size of the blob in the registry.
    pub blob_bytes: u64,
    /// The blob's table of contents, if the manifest names one.
    pub toc: Option<Toc>,
}

/// What is fetched of a mounted image before anybody asks for it. The later ones want more.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Prefetch {
    /// Nothing.
    None,
    /// What its readers wanted first when the image was mounted before, here or on another node.
    #[default]
    Recorded,
    /// That, then all the rest.
    All,
}

impl Prefetch {
    /// Its name in configurations and volume attributes.
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Recorded => "recorded",
            Self::All => "all",
        }
    }
}

/// Says that a text is no [`Prefetch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be none, recorded or all")]
pub struct NoPrefetch;

impl FromStr for Prefetch {
    type Err = NoPrefetch;

    fn from_str(text: &str) -> Result<Self, NoPrefetch> {
        let all = [Self::None, Self::Recorded, Self::All];
        all.into_iter()
            .find(|it| it.label() == text)
            .ok_or(NoPrefetch)
    }
}

/// Called once, with the outcome, from any thread.
pub type PresentCallback = Box<dyn FnOnce(Result<(), PresentError>) + Send>;

/// Called once, with the outcome, from any thread.
pub type LendCallback = Box<dyn FnOnce(Result<LentChunk, PresentError>) + Send>;

/// Makes chunks of layers present on local disk, verified.
pub trait MakePresent: Send + Sync + fmt::Debug {
    /// Makes `chunks` of `layer` present, then calls `done`.
    ///
    /// Returns at once. The wait is bounded: `done` is called in any case.
    fn make_present(&self, layer: DiffId, chunks: Range<u32>, done: PresentCallback);

    /// Gives the verified bytes of `wanted` past the local disk, then calls `done`.
    ///
    /// For a reader who was told that the disk cannot take the chunk ([`PresentError::is_of_disk`]), or
    /// could not read there what is present: that is then marked absent, unless it can be read after
    /// all. It takes memory: whoever asks keeps to [`lent::MAX_LENT`] chunks at once.
    ///
    /// Returns at once. The wait is bounded: `done` is called in any case.
    fn lend(&self, wanted: Chunk, done: LendCallback);
}

/// Names one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// The layer.
    pub layer: DiffId,
    /// Which of its chunks.
    pub number: u32,
    /// How many bytes it has, as far as whoever names it knows.
    pub bytes: u64,
}

/// Says why chunks could not be made present.
///
/// Cloneable, because everybody who waits for the same fill is told; serializable, because some of
/// them wait in another process.
#[derive(Debug, Clone, thiserror::Error, Serialize, Deserialize)]
pub enum PresentError {
    /// The origin failed, after its retries.
    #[error("fetching layer {layer}")]
    Origin {
        /// The layer that was wanted.
        layer: DiffId,
        /// What the origin said.
        #[source]
        source: SourceError,
    },
    /// The bytes are not what they claim to be, or not what this driver takes.
    #[error("layer {layer} is refused: {reason}")]
    Refused {
        /// The layer that was wanted.
        layer: DiffId,
        /// What is wrong with it.
        reason: String,
    },
    /// The local disk has no room.
    #[error("cache disk {path} is full: free space there, or give the cache a larger disk")]
    NoSpace {
        /// The cache directory.
        path: PathBuf,
    },
    /// What is in use leaves too little of the cache's own bound.
    #[error(
        "layer {layer} does not fit into the cache {}: what is in use leaves too little of \
         cache.max_bytes = {max_bytes}; raise it, or unmount images of this node",
        .path.display()
    )]
    CacheFull {
        /// The layer that was wanted.
        layer: DiffId,
        /// The cache directory.
        path: PathBuf,
        /// The bound.
        max_bytes: u64,
    },
    /// The local disk failed.
    #[error("cache disk: {reason}")]
    Disk {
        /// What failed, on which file.
        reason: String,
    },
    /// A configured limit was exceeded.
    #[error("layer {layer} exceeds {limit} = {max}: raise the limit if the image is trusted")]
    Limit {
        /// The layer that was wanted.
        layer: DiffId,
        /// The limit's name in the configuration.
        limit: Cow<'static, str>,
        /// Its value.
        max: u64,
    },
    /// The work took longer than a reader may wait.
    #[error("layer {layer}: no progress for {waited:?}")]
    Timeout {
        /// The layer that was wanted.
        layer: DiffId,
        /// How long nothing came.
        waited: Duration,
    },
    /// The process is stopping, or the layer is not registered with it.
    #[error("layer {layer} is not served by this process")]
    Unknown {
        /// The layer that was wanted.
        layer: DiffId,
    },
}

impl PresentError {
    /// Whether the local disk alone is at fault, so that the bytes can be had without it.
    pub fn is_of_disk(&self) -> bool {
        match self {
            Self::NoSpace { .. } | Self::CacheFull { .. } | Self::Disk { .. } => true,
            Self::Origin { .. }
            | Self::Refused { .. }
            | Self::Limit { .. }
            | Self::Timeout { .. }
            | Self::Unknown { .. } => false,
        }
    }

    /// The same, with no text longer than can be passed on.
    #[must_use]
    pub fn shortened(self) -> Self {
        match self {
            Self::Origin { layer, source } => Self::Origin {
                layer,
                source: source.shortened(),
            },
            Self::Refused { layer, mut reason } => {
                shorten(&mut reason);
                Self::Refused { layer, reason }
            }
            Self::Disk { mut reason } => {
                shorten(&mut reason);
                Self::Disk { reason }
            }
            Self::NoSpace { .. }
            | Self::CacheFull { .. }
            | Self::Limit { .. }
            | Self::Timeout { .. }
            | Self::Unknown { .. } => self,
        }
    }
}

/// Whom a source asks, and as whom: of two that are equal, one gives what the other does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceIdentity {
    /// The registry and the repository there, as logs name them.
    pub repository: String,
    /// A number that is the same for the same credentials, and tells nothing of them.
    pub requester: u64,
}

/// Reads blobs of one repository, with the credentials of one image.
///
/// An implementation retries and resumes by itself, bounded; what it reports is final.
pub trait BlobSource: Send + Sync + fmt::Debug {
    /// Opens the bytes `range` of `blob`, whose size is `blob_bytes`.
    ///
    /// # Errors
    /// Those of [`SourceError`]. The stream ends early only with an error; the caller verifies the
    /// digest, the source does not.
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>>;

    /// Whom it asks, and as whom; `None` if that is like no other source.
    fn identity(&self) -> Option<SourceIdentity> {
        None
    }

    /// Says that what came for `blob` was not what its digest names, and returns whether it may
    /// come right when it is opened again, because it may have been somebody else's mistake: a
    /// mirror's.
    fn distrust(&self, _blob: &BlobDigest) -> bool {
        false
    }

    /// Whether this source is of use only as long as a layer has no other one: it brings no right of its
    /// own to ask the origin, and must not take the place of one that does.
    fn gives_way(&self) -> bool {
        false
    }

    /// Whether whoever wants the image demands a certain index of it, so that none is made in another way.
    fn pins_index(&self) -> bool {
        false
    }

    /// Has `keep` take the index of `layer` that somebody who is trusted has pushed beside the image;
    /// `false` if there is none that may be believed.
    ///
    /// Costs requests: to be asked when the layer would else be read as a whole. What was kept may be
    /// used only if this returns `true`. That the index is one, and of this layer, is the caller's check.
    ///
    /// # Errors
    /// Only if whoever wants the image demands a certain index, and that cannot be had. What `keep`
    /// fails with is a failure like any other: it knows better.
    fn layer_index<'a>(
        &'a self,
        _layer: &'a DiffId,
        _keep: &'a mut dyn KeepPushed,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        Box::pin(std::future::ready(Ok(false)))
    }
}

/// What may have been pushed beside an image about one of its layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushedPart {
    /// The layer's index.
    Index,
    /// Where reading may begin in the middle of the layer's blob.
    AccessMap,
}

/// Takes what was pushed about a layer as it comes: an index may be larger than all that the process may hold.
pub trait KeepPushed: Send {
    /// Begins with a part; or begins it anew, because what came of it was wrong.
    ///
    /// # Errors
    /// Those of where it is kept.
    fn begin(&mut self, part: PushedPart) -> io::Result<()>;

    /// Takes the next bytes of the part that was begun.
    ///
    /// # Errors
    /// As for [`begin`](Self::begin).
    fn take(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Says why the origin did not give what was asked.
///
/// Texts end up in `kubectl describe pod`: they name the object and what to do, never a secret.
#[derive(Debug, Clone, thiserror::Error, Serialize, Deserialize)]
pub enum SourceError {
    /// The registry has no such image or blob.
    #[error("{what} was not found at {registry}: check the name, and that it was pushed")]
    NotFound {
        /// What was asked for.
        what: String,
        /// The registry's host.
        registry: String,
    },
    /// The image exists, but not for the platform asked for.
    #[error(
        "{image} has no manifest for platform {wanted}; it has: {available}; push it for {wanted}, or set the platform attribute"
    )]
    WrongPlatform {
        /// The image reference.
        image: String,
        /// The platform wanted, as `os/arch[/variant]`.
        wanted: String,
        /// The platforms of the image, comma-separated.
        available: String,
    },
    /// Credentials are missing or wrong (HTTP 401).
    #[error("{registry} wants credentials for {what}: {hint}")]
    Unauthorized {
        /// What was asked for.
        what: String,
        /// The registry's host.
        registry: String,
        /// What to do.
        hint: String,
    },
    /// Credentials are right, but give no access (HTTP 403).
    #[error(
        "{registry} refuses access to {what}: the credentials lack the right to pull it: have it granted, or give others"
    )]
    Forbidden {
        /// What was asked for.
        what: String,
        /// The registry's host.
        registry: String,
    },
    /// Too many requests (HTTP 429), after the retries.
    #[error("{registry} limits requests (HTTP 429){}", .retry_after.map(|it| format!("; it asks to wait {} s", it.as_secs())).unwrap_or_default())]
    RateLimited {
        /// The registry's host.
        registry: String,
        /// What `Retry-After` said.
        retry_after: Option<Duration>,
    },
    /// The registry is down, slow, or fails, after the retries.
    #[error("{registry} is unavailable: {reason}")]
    Unavailable {
        /// The registry's host.
        registry: String,
        /// What was seen.
        reason: String,
    },
    /// The registry answers, but not what its protocol demands, or not what the digest names.
    #[error("{registry} answered wrongly: {reason}")]
    Protocol {
        /// The registry's host.
        registry: String,
        /// What was seen.
        reason: String,
    },
    /// The image is of a kind that cannot be mounted, or the reference cannot be read.
    #[error("{what}: {reason}")]
    Unsupported {
        /// What was asked for.
        what: String,
        /// Why not, and what would do.
        reason: String,
    },
}

impl SourceError {
    /// Whether asking again later may succeed without anybody doing something.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { .. } | Self::Unavailable { .. } => true,
            Self::NotFound { .. }
            | Self::WrongPlatform { .. }
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::Protocol { .. }
            | Self::Unsupported { .. } => false,
        }
    }

    /// The same, with no text longer than can be passed on: whoever makes one of what a registry said
    /// has it shortened there.
    #[must_use]
    pub fn shortened(mut self) -> Self {
        match &mut self {
            Self::NotFound { what, registry } | Self::Forbidden { what, registry } => {
                [what, registry].into_iter().for_each(shorten)
            }
            Self::WrongPlatform {
                image,
                wanted,
                available,
            } => [image, wanted, available].into_iter().for_each(shorten),
            Self::Unauthorized {
                what,
                registry,
                hint,
            } => [what, registry, hint].into_iter().for_each(shorten),
            Self::RateLimited { registry, .. } => shorten(registry),
            Self::Unavailable { registry, reason } | Self::Protocol { registry, reason } => {
                [registry, reason].into_iter().for_each(shorten)
            }
            Self::Unsupported { what, reason } => [what, reason].into_iter().for_each(shorten),
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_of_an_error_is_long_and_its_kind_stays() {
        let long = || "x…".repeat(200 << 10);
        let (what, registry, reason) = (long, long, long);
        let errors = [
            SourceError::NotFound {
                what: what(),
                registry: registry(),
            },
            SourceError::WrongPlatform {
                image: what(),
                wanted: long(),
                available: long(),
            },
            SourceError::Unauthorized {
                what: what(),
                registry: registry(),
                hint: long(),
            },
            SourceError::Forbidden {
                what: what(),
                registry: registry(),
            },
            SourceError::RateLimited {
                registry: registry(),
                retry_after: None,
            },
            SourceError::Unavailable {
                registry: registry(),
                reason: reason(),
            },
            SourceError::Protocol {
                registry: registry(),
                reason: reason(),
            },
            SourceError::Unsupported {
                what: what(),
                reason: reason(),
            },
        ];
        let layer = DiffId::of(b"layer");
        let errors = errors.map(|source| PresentError::Origin { layer, source });
        let others = [
            PresentError::Refused {
                layer,
                reason: reason(),
            },
            PresentError::Disk { reason: reason() },
        ];
        for err in errors.into_iter().chain(others) {
            let short = err.clone().shortened();
            let source = |it: &PresentError| match it {
                PresentError::Origin { source, .. } => Some(std::mem::discriminant(source)),
                _ => None,
            };
            assert_eq!(source(&short), source(&err));
            assert_eq!(std::mem::discriminant(&short), std::mem::discriminant(&err));
            let sent = serde_json::to_string(&short).unwrap();
            assert!(sent.contains('…') && sent.len() < 4096, "{}", sent.len());
        }
        let mut text = "x…".repeat(256);
        shorten(&mut text);
        assert_eq!(text, "x…".repeat(256), "what just fits is not touched");
    }

    #[test]
    fn prefetches_have_one_name_everywhere_and_an_order() {
        let all = [Prefetch::None, Prefetch::Recorded, Prefetch::All];
        assert!(all.is_sorted());
        for prefetch in all {
            let label = prefetch.label();
            assert_eq!(label.parse(), Ok(prefetch));
            let json = serde_json::to_string(&prefetch).unwrap();
            assert_eq!(json, format!("{label:?}"));
        }
        assert_eq!("All".parse::<Prefetch>(), Err(NoPrefetch));
    }
}
