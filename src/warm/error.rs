//! Says why an image is not warm, for people: a word for conditions and events, and what to do.

use crate::{
    digest::{DiffId, ManifestDigest},
    index::IndexError,
    indexer::IndexerError,
    tier::{PresentError, SourceError},
};

/// Says why an image could not be seeded or filled.
///
/// Its text says what to do. It holds no secret.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WarmError {
    /// There is no remote content cache, and nowhere else to take the image from.
    #[error("no remote content cache is configured: set remote.kind and what belongs to it")]
    NoRemote,
    /// The remote content cache does not answer.
    #[error(
        "the remote content cache ({engine}) does not answer: see that it runs and can be reached from here; {reason}"
    )]
    RemoteDown {
        /// Which engine.
        engine: &'static str,
        /// What was seen.
        reason: String,
    },
    /// The remote content cache takes no more, or loses what it was given.
    #[error("the remote content cache ({engine}) did not take layer {layer}: {reason}")]
    RemoteRefuses {
        /// Which engine.
        engine: &'static str,
        /// The layer.
        layer: DiffId,
        /// What was seen, and what to do.
        reason: String,
    },
    /// The remote content cache lacks a part of the image.
    #[error(
        "the remote content cache lacks {what} of image {manifest}: seed it (again), with the installation's key"
    )]
    NotSeeded {
        /// The image.
        manifest: ManifestDigest,
        /// What is missing.
        what: String,
    },
    /// The registry did not give what was asked.
    #[error(transparent)]
    Registry(SourceError),
    /// The image cannot be used.
    #[error("image {manifest} cannot be used: {reason}")]
    Refused {
        /// The image.
        manifest: ManifestDigest,
        /// What is wrong with it.
        reason: String,
    },
    /// The image exceeds a limit of the configuration.
    #[error("image {manifest} exceeds {limit} = {max}: raise the limit if the image is trusted")]
    TooLarge {
        /// The image.
        manifest: ManifestDigest,
        /// The limit's name.
        limit: String,
        /// Its value.
        max: u64,
    },
    /// There is no room for the image that is nobody's.
    #[error(
        "image {manifest} needs {needs_bytes} bytes more on the cache disk, of which {free_bytes} may be used for it: {hint}"
    )]
    NoSpace {
        /// The image.
        manifest: ManifestDigest,
        /// Bytes that are missing of it.
        needs_bytes: u64,
        /// Bytes that may come for it.
        free_bytes: u64,
        /// What to do.
        hint: &'static str,
    },
    /// The cache disk failed.
    #[error("the cache disk failed: {reason}")]
    Disk {
        /// What failed, on which file.
        reason: String,
    },
    /// The process is stopping.
    #[error("warming was stopped with the process; it goes on with the next one")]
    Cancelled,
}

/// What to do where the disk is too small.
pub(super) const ROOM_HINT: &str = "free space on it, give the cache a larger disk or cache.max_bytes, or warm less; what is in use, or was \
     lately, is not evicted for it";

impl WarmError {
    /// What it means that a layer could not be had; needed and free bytes are told where it matters.
    pub(super) fn of_layer(
        manifest: ManifestDigest,
        err: PresentError,
        needs_bytes: u64,
        free_bytes: u64,
    ) -> Self {
        match err {
            PresentError::Origin { source, .. } => Self::Registry(source),
            PresentError::NoSpace { .. } | PresentError::CacheFull { .. } => Self::NoSpace {
                manifest,
                needs_bytes,
                free_bytes,
                hint: ROOM_HINT,
            },
            PresentError::Limit { limit, max, .. } => Self::TooLarge {
                manifest,
                limit: limit.into_owned(),
                max,
            },
            PresentError::Refused { .. } => Self::Refused {
                manifest,
                reason: err.to_string(),
            },
            PresentError::Disk { reason } => Self::Disk { reason },
            PresentError::Timeout { .. } => Self::Registry(SourceError::Unavailable {
                registry: "the registry".to_owned(),
                reason: err.to_string(),
            }),
            PresentError::Unknown { .. } => Self::Cancelled,
        }
    }

    /// What it means that the image's index could not be made.
    pub(super) fn of_index(
        manifest: ManifestDigest,
        err: IndexerError,
        needs_bytes: u64,
        free_bytes: u64,
    ) -> Self {
        match err {
            IndexerError::Layer(err) => Self::of_layer(manifest, err, needs_bytes, free_bytes),
            IndexerError::Merge {
                source: IndexError::Limit { limit, max },
                ..
            } => Self::TooLarge {
                manifest,
                limit: limit.to_owned(),
                max,
            },
            IndexerError::Merge { source, .. } => Self::Refused {
                manifest,
                reason: source.to_string(),
            },
            IndexerError::Disk { .. } => Self::Disk {
                reason: err.to_string(),
            },
        }
    }

    /// Its name in conditions, events and metrics: from a closed set, in upper camel case.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoRemote => "NoRemote",
            Self::RemoteDown { .. } => "RemoteDown",
            Self::RemoteRefuses { .. } => "RemoteRefuses",
            Self::NotSeeded { .. } => "NotSeeded",
            Self::Registry(SourceError::NotFound { .. }) => "NotFound",
            Self::Registry(SourceError::WrongPlatform { .. }) => "WrongPlatform",
            Self::Registry(SourceError::Unauthorized { .. }) => "Unauthorized",
            Self::Registry(SourceError::Forbidden { .. }) => "Forbidden",
            Self::Registry(SourceError::RateLimited { .. }) => "RateLimited",
            Self::Registry(SourceError::Unavailable { .. }) => "RegistryDown",
            Self::Registry(SourceError::Protocol { .. }) => "RegistryError",
            Self::Registry(SourceError::Unsupported { .. }) => "Unsupported",
            Self::Refused { .. } => "ImageRefused",
            Self::TooLarge { .. } => "TooLarge",
            Self::NoSpace { .. } => "NoSpace",
            Self::Disk { .. } => "DiskFailed",
            Self::Cancelled => "Cancelled",
        }
    }

    /// Whether trying again later may succeed without anybody doing something.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RemoteDown { .. }
            | Self::RemoteRefuses { .. }
            | Self::NotSeeded { .. }
            | Self::NoSpace { .. }
            | Self::Disk { .. }
            | Self::Cancelled => true,
            Self::Registry(err) => err.is_transient(),
            Self::NoRemote | Self::Refused { .. } | Self::TooLarge { .. } => false,
        }
    }
}
