//! What the roles of a node say to each other.
//!
//! | who asks | whom | what |
//! |---|---|---|
//! | node | agent | [`AgentRequest::Prepare`], [`AgentRequest::Files`] |
//! | server | agent | [`AgentRequest::Adopt`], [`AgentRequest::Release`], [`AgentRequest::Present`], [`AgentRequest::Lend`], [`AgentRequest::Read`] |
//! | node | server | [`ServeRequest::Serve`], [`ServeRequest::Renew`], [`ServeRequest::List`] |
//! | server | its predecessor | [`ServeRequest::HandOver`], [`ServeRequest::Quit`] |
//! | agent | both others | `Status` |

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{
    digest::{DiffId, ManifestDigest},
    fuse::takeover::KernelOffer,
    mount::{ImageRequest, PodRef, PrepareError, Usage},
    tier::{Chunk, PresentError},
};

/// Names a source mount: the device number of its file system, which is no other's for as long as
/// it is there.
pub type MountKey = (u32, u32);

/// A source mount as whoever goes on with it has to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedMount {
    /// Its file system.
    pub device: MountKey,
    /// The image.
    pub manifest: ManifestDigest,
    /// How the image was asked for: what is not on disk is fetched with the same rights.
    pub request: ImageRequest,
    /// What the kernel offered, once the connection is initialised.
    pub offer: Option<KernelOffer>,
}

/// An image that the agent made ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyImage {
    /// The manifest that the reference meant.
    pub manifest: ManifestDigest,
    /// How much it holds.
    pub usage: Usage,
    /// Whether all of it is on disk, and may stay there for as long as it is mounted. An agent of an earlier release does
    /// not say.
    #[serde(default)]
    pub is_whole: bool,
}

/// One of the files of an image that is whole on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageFile {
    /// The image's index.
    Index,
    /// The bytes of the layer that comes next, from the bottom.
    Data,
    /// What the kernel is to keep open of that layer (`layer::whole`).
    Mounted,
}

/// Asked of the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum AgentRequest {
    /// Make the image ready. Answered by any number of [`AgentReply::Progress`], then
    /// [`AgentReply::Prepared`]. Nothing of it is evicted until the connection ends.
    Prepare(ImageRequest),
    /// Give the files of the image that was made ready last, all of which is on disk. Answered by an [`AgentReply::File`] for
    /// each, the index first, then [`AgentReply::FilesEnd`].
    Files,
    /// The mount is being served: be ready to make chunks of it present. Not answered.
    Adopt {
        /// The mount.
        device: MountKey,
        /// The image.
        manifest: ManifestDigest,
        /// How it was asked for.
        request: ImageRequest,
    },
    /// The mount is not served any more. Not answered.
    Release {
        /// The mount.
        device: MountKey,
    },
    /// Make chunks of a layer present. Answered by [`AgentReply::Present`].
    Present {
        /// Chosen by who asks, and given back.
        ticket: u64,
        /// The layer.
        layer: DiffId,
        /// Its chunks.
        chunks: Range<u32>,
        /// Whose readers want them. A server of an earlier release does not say.
        #[serde(default)]
        mount: Option<MountKey>,
    },
    /// These extents of a layer were read from the disk lately. Not answered.
    Read {
        /// The layer.
        layer: DiffId,
        /// Its extents.
        extents: Vec<Range<u32>>,
    },
    /// Give the bytes of a chunk past the disk. Answered by [`AgentReply::Lent`].
    Lend {
        /// Chosen by who asks, and given back.
        ticket: u64,
        /// The chunk.
        wanted: Chunk,
        /// As for chunks that are to be present.
        #[serde(default)]
        mount: Option<MountKey>,
    },
}

/// Said by the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum AgentReply {
    /// How far the preparation is, for a person.
    Progress(String),
    /// How the preparation ended.
    Prepared(Result<ReadyImage, PrepareError>),
    /// A file, whose descriptor comes with this.
    File(ImageFile),
    /// There are no more files, or why they are not given.
    FilesEnd(Result<(), String>),
    /// Whether the chunks are present.
    Present {
        /// As in the request.
        ticket: u64,
        /// Why they are not.
        outcome: Result<(), PresentError>,
    },
    /// The chunk's bytes, whose descriptor comes with this.
    Lent {
        /// As in the request.
        ticket: u64,
        /// Why there is no descriptor.
        outcome: Result<(), PresentError>,
    },
}

/// Asked of the server.
#[derive(Debug, Serialize, Deserialize)]
pub enum ServeRequest {
    /// Serve the connection that comes with this. Answered by [`ServeReply::Serving`]; one that is
    /// being served is no error.
    Serve(ServedMount),
    /// What the mount lacks on disk is fetched with the rights of this request from now on. Not answered.
    Renew {
        /// The mount.
        device: MountKey,
        /// How it is asked for now.
        request: ImageRequest,
    },
    /// Say what is served. Answered by a [`ServeReply::Mount`] for each, with its connection, then
    /// [`ServeReply::End`].
    List,
    /// As `List`, and serve nothing new until `Quit` comes, or the connection ends.
    HandOver,
    /// The successor serves all: end. Not answered.
    Quit,
    /// Answered by [`ServeReply::Status`].
    Status,
}

/// Said by the server.
#[derive(Debug, Serialize, Deserialize)]
pub enum ServeReply {
    /// The connection is served.
    Serving(KernelOffer),
    /// It cannot be.
    Refused(String),
    /// One mount.
    Mount(ServedMount),
    /// There are no more.
    End,
    /// How it is.
    Status(Status),
}

/// Asked of the node service.
#[derive(Debug, Serialize, Deserialize)]
pub enum NodeRequest {
    /// Answered by a [`Status`].
    Status,
    /// Answered by a list of [`Notice`]s, which are the asker's to pass on from then on.
    TakeNotices,
}

/// Something that an operator should see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// What kind of thing it is, in CamelCase, as Kubernetes' events have it.
    pub reason: String,
    /// What happened, and what to do.
    pub message: String,
    /// Whom it is about, if not the node. A release that does not know it tells it of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
}

/// How a role is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its metrics, in Prometheus' text format.
    pub metrics: String,
    /// What it lacks to be ready, for a person.
    pub missing: Option<String>,
}
