//! Reads images from OCI registries.
//!
//! [`RegistryClient`] turns an [`ImageRef`] into the layers of a [`ResolvedImage`], and gives their
//! bytes as a [`BlobSource`](crate::tier::BlobSource). It speaks the OCI distribution-spec v1.1 and
//! Docker's registry API v2.
//!
//! From the outside in: `client` (what an image is made of) and `blob` (a stream that resumes) ask
//! a `session` (one repository at its mirrors and its registry, on behalf of one `requester`), which asks
//! `auth` for a token, that the `keyring` for credentials, and `transport` for one GET, over connections as `tls` makes them. `retry`
//! alone decides what is tried again at a registry, `mirrors` what a mirror may cost. `reference`, `platform`, `credentials`, `manifest` and
//! `documents` are pure.
//!
//! An index that was pushed beside an image: `artifact` is its format (pure), `referrers` finds it,
//! `pushed` decides whether to believe it and reads it, `push` writes it.
//!
//! From oci-client come the types of manifests and indexes. Its requests are not used, with the
//! reasons in `auth` and `blob`, and because it keeps one user's credentials per registry for all
//! images, which would let one pod pull with another's.
//!
//! Who may pull: credentials go to the registry they are for, never to a mirror of it, and whoever
//! has any is checked by that registry. A mirror's word counts for volumes without credentials
//! only, and not even for those if `always_ask_origin` is set.
//!
//! Invariants: no wait without a deadline; no secret and no URL in an error or a log; plain http
//! only to hosts that the configuration names; a manifest and a configuration are checked against
//! their digests here, the bytes of a layer by whoever reads them.

mod artifact;
mod auth;
mod blob;
mod challenge;
mod client;
mod config;
mod credentials;
mod documents;
mod endpoint;
mod hosts_dir;
mod keyring;
mod manifest;
mod mirrors;
mod node_credentials;
mod platform;
mod providers;
mod push;
mod pushed;
mod reference;
mod referrers;
mod requester;
mod retry;
mod session;
mod tls;
mod toc;
mod transport;
mod unpack;

pub use client::{RegistryClient, ResolvedImage};
pub use config::{HostConfig, RegistryConfig, RegistryConfigError};
pub use credentials::{Credentials, DockerConfig, DockerConfigError};
pub use documents::{DocumentError, DocumentLimits, ImageDocuments, KeptConfigs};
pub use platform::{Platform, PlatformError};
pub use push::{LayerPush, PushError, Pushed};
pub use pushed::PushedIndexOptions;
pub use reference::{ImageRef, ReferenceError};
pub use requester::{
    PullSecret, Requester, ServiceAccount, ServiceAccountError, ServiceAccountName,
    ServiceAccountTokens, ServiceAccounts, VolumeRequester, VolumeSecret,
};
