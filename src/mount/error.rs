//! Says why a volume was not published, one variant per thing that the caller does differently.

use std::{borrow::Cow, io, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    digest::ManifestDigest,
    tier::{PresentError, SourceError, shorten},
};

/// Says why an image could not be made ready.
///
/// Cloneable, because everybody who waits for the same image is told.
#[derive(Debug, Clone, thiserror::Error, Serialize, Deserialize)]
pub enum PrepareError {
    /// The request itself is wrong: a reference or a platform that cannot be read.
    #[error("{field}: {reason}")]
    Invalid {
        /// The attribute's name.
        field: Cow<'static, str>,
        /// What is wrong with it, and what would do.
        reason: String,
    },
    /// The origin failed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The bytes failed, or the disk they go to.
    #[error(transparent)]
    Present(#[from] PresentError),
    /// The node does not know the image, and the registry is not to be asked.
    #[error(
        "this node has not mounted it before, and pullPolicy is Never: mount it here once with another pullPolicy"
    )]
    NotPresent,
    /// The image exceeds a configured limit.
    #[error("it exceeds {limit} = {max}: raise the limit if the image is trusted")]
    Limit {
        /// The limit's name in the configuration.
        limit: Cow<'static, str>,
        /// Its value.
        max: u64,
    },
    /// The image's layers do not make a tree.
    #[error("{reason}")]
    Refused {
        /// What is wrong with it.
        reason: String,
    },
    /// Who prepares images is not there: it is being started.
    #[error("{reason}")]
    Away {
        /// Who, where, and what to do.
        reason: String,
    },
    /// Something failed on this node that the request did not cause.
    #[error("{reason}")]
    Internal {
        /// What failed.
        reason: String,
    },
}

impl PrepareError {
    /// Whether the same may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Source(source) => source.is_transient(),
            Self::Present(PresentError::Origin { source, .. }) => source.is_transient(),
            Self::Present(present) => {
                present.is_of_disk() || matches!(present, PresentError::Timeout { .. })
            }
            Self::Away { .. } => true,
            Self::Invalid { .. }
            | Self::Refused { .. }
            | Self::NotPresent
            | Self::Limit { .. }
            | Self::Internal { .. } => false,
        }
    }

    /// The same, with no text longer than can be passed on.
    #[must_use]
    pub fn shortened(mut self) -> Self {
        match &mut self {
            Self::Source(source) => return Self::Source(source.clone().shortened()),
            Self::Present(present) => return Self::Present(present.clone().shortened()),
            Self::Invalid { reason, .. }
            | Self::Refused { reason }
            | Self::Away { reason }
            | Self::Internal { reason } => shorten(reason),
            Self::NotPresent | Self::Limit { .. } => {}
        }
        self
    }
}

/// Says why a volume could not be published or unpublished.
///
/// The texts end up in `kubectl describe pod`; those with a cause are read with it.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The call is wrong, and will be each time.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field or attribute.
        field: Cow<'static, str>,
        /// What is wrong with it, and what would do.
        reason: String,
    },
    /// Another operation holds the volume or the target.
    #[error("another operation on {what} is under way: this one is tried again when it ends")]
    Busy {
        /// The volume or the target path.
        what: String,
    },
    /// The image is not ready yet; the work goes on.
    #[error(
        "image {image} is still being prepared after {} s ({progress}): it is mounted once it is ready, nothing needs to be done",
        .waited.as_secs()
    )]
    Preparing {
        /// The image reference.
        image: String,
        /// How long the work has gone on.
        waited: Duration,
        /// How far it has come.
        progress: String,
    },
    /// Too many images are being prepared.
    #[error("{max} images are being prepared on this node: this one has to wait its turn")]
    Overloaded {
        /// How many may be at once.
        max: usize,
    },
    /// Volumes are published faster than the node is meant to.
    #[error(
        "more than {per_second} volumes a second are being published on this node: this one has to wait its turn"
    )]
    RateLimited {
        /// How many may be.
        per_second: u32,
    },
    /// A volume of this name was made with other parameters.
    #[error("volume {name} was made with other parameters or another size: delete it first")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// There is no such volume.
    #[error("{what} is not known here")]
    VolumeNotFound {
        /// The volume, and where it was looked for.
        what: String,
    },
    /// A volume that may be at one target is at another one.
    #[error("volume {volume} may be used by one pod, and is published at {} already", .path.display())]
    InUse {
        /// The volume.
        volume: String,
        /// Where it is.
        path: PathBuf,
    },
    /// The volume is published at the target with other attributes.
    #[error(
        "volume {volume} is published at {} with other attributes: unpublish it first",
        .path.display()
    )]
    AlreadyExists {
        /// The volume.
        volume: String,
        /// The target path.
        path: PathBuf,
    },
    /// The registry does not have the image, or not for this platform.
    #[error("cannot mount image {image}")]
    ImageNotFound {
        /// The image reference.
        image: String,
        /// What the registry said.
        #[source]
        cause: Box<PrepareError>,
    },
    /// The registry wants credentials, or others.
    #[error("cannot mount image {image}")]
    Unauthorized {
        /// The image reference.
        image: String,
        /// What the registry said.
        #[source]
        cause: Box<PrepareError>,
    },
    /// The registry knows who asks, and refuses.
    #[error("cannot mount image {image}")]
    Forbidden {
        /// The image reference.
        image: String,
        /// What the registry said.
        #[source]
        cause: Box<PrepareError>,
    },
    /// The registry or the way to it is down: later may be better.
    #[error("cannot mount image {image} now")]
    Unavailable {
        /// The image reference.
        image: String,
        /// What was seen.
        #[source]
        cause: Box<PrepareError>,
    },
    /// Who serves mounts is not there: it is being started.
    #[error("cannot mount image {image} now: {reason}")]
    NoServer {
        /// The image.
        image: ManifestDigest,
        /// Who, where, and what to do.
        reason: String,
    },
    /// A disk of the node is full.
    #[error("the disk of {} is full: free space there, or give it a larger one", .path.display())]
    NoSpace {
        /// The directory.
        path: PathBuf,
    },
    /// The cache has no room for the image beside what is in use.
    #[error("cannot mount image {image} now")]
    CacheFull {
        /// The image reference.
        image: String,
        /// Which layer, and what to do.
        #[source]
        cause: Box<PrepareError>,
    },
    /// The target path is not the driver's to use.
    #[error("target path {} {reason}", .path.display())]
    Foreign {
        /// The target path.
        path: PathBuf,
        /// What is there, and what to do.
        reason: &'static str,
    },
    /// The image is corrupt, or not what its digests claim.
    #[error("image {image} is refused")]
    Refused {
        /// The image reference.
        image: String,
        /// What is wrong with it.
        #[source]
        cause: Box<PrepareError>,
    },
    /// The image exceeds a configured limit.
    #[error("image {image} is refused")]
    Limit {
        /// The image reference.
        image: String,
        /// Which limit.
        #[source]
        cause: Box<PrepareError>,
    },
    /// The system refused an operation that ought to succeed.
    #[error("{doing}")]
    System {
        /// What was being done, and to what.
        doing: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

impl MountError {
    /// Whether the same call may succeed later without anybody changing it.
    ///
    /// After any other one nothing of the volume is left on the node.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Busy { .. }
            | Self::Preparing { .. }
            | Self::Overloaded { .. }
            | Self::RateLimited { .. }
            | Self::Unavailable { .. }
            | Self::NoServer { .. }
            | Self::NoSpace { .. }
            | Self::CacheFull { .. } => true,
            Self::Invalid { .. }
            | Self::AlreadyExists { .. }
            | Self::NameTaken { .. }
            | Self::VolumeNotFound { .. }
            | Self::InUse { .. }
            | Self::ImageNotFound { .. }
            | Self::Unauthorized { .. }
            | Self::Forbidden { .. }
            | Self::Foreign { .. }
            | Self::Refused { .. }
            | Self::Limit { .. }
            | Self::System { .. } => false,
        }
    }

    /// Sorts why `image` is not ready into what the caller does about it.
    pub fn of_image(image: &str, cause: PrepareError) -> Self {
        let image = image.to_owned();
        let cause = Box::new(cause);
        let source_error = match &*cause {
            PrepareError::Invalid { field, reason } => {
                return Self::Invalid {
                    field: field.clone(),
                    reason: reason.clone(),
                };
            }
            PrepareError::NotPresent => return Self::ImageNotFound { image, cause },
            PrepareError::Limit { .. } => return Self::Limit { image, cause },
            PrepareError::Refused { .. } => return Self::Refused { image, cause },
            PrepareError::Away { .. } => return Self::Unavailable { image, cause },
            PrepareError::Internal { reason } => {
                return Self::System {
                    doing: format!("preparing image {image}"),
                    source: io::Error::other(reason.clone()),
                };
            }
            PrepareError::Present(present) => match present {
                PresentError::Refused { .. } => return Self::Refused { image, cause },
                PresentError::NoSpace { path } => return Self::NoSpace { path: path.clone() },
                PresentError::CacheFull { .. } => return Self::CacheFull { image, cause },
                PresentError::Disk { reason } => {
                    return Self::System {
                        doing: format!("preparing image {image}"),
                        source: io::Error::other(reason.clone()),
                    };
                }
                PresentError::Limit { .. } => return Self::Limit { image, cause },
                PresentError::Timeout { .. } | PresentError::Unknown { .. } => {
                    return Self::Unavailable { image, cause };
                }
                PresentError::Origin { source, .. } => source,
            },
            PrepareError::Source(source) => source,
        };
        match source_error {
            SourceError::NotFound { .. } | SourceError::WrongPlatform { .. } => {
                Self::ImageNotFound { image, cause }
            }
            SourceError::Unauthorized { .. } => Self::Unauthorized { image, cause },
            SourceError::Forbidden { .. } => Self::Forbidden { image, cause },
            SourceError::RateLimited { .. } | SourceError::Unavailable { .. } => {
                Self::Unavailable { image, cause }
            }
            SourceError::Protocol { .. } => Self::Refused { image, cause },
            SourceError::Unsupported { .. } => Self::Invalid {
                field: "image".into(),
                reason: source_error.to_string(),
            },
        }
    }

    /// Wraps what the system said; a full disk is told apart, because it is worth a retry.
    pub(super) fn system(doing: impl Into<String>, path: &std::path::Path, err: io::Error) -> Self {
        if matches!(
            err.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        ) {
            return Self::NoSpace {
                path: path.to_owned(),
            };
        }
        Self::System {
            doing: format!("{} {}", doing.into(), path.display()),
            source: err,
        }
    }
}
