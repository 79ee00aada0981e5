//! Serves the Container Storage Interface (CSI spec v1.12): Identity, Controller and Node.
//!
//! [`Server`] answers on a Unix socket that only its owner can open ([`bind_private`]). A call is
//! parsed once at this edge ([`Attributes`]), handed to the mount table, and its outcome becomes a
//! gRPC code in one place, `status.rs`. Each call is a span, a count and a duration.
//!
//! Every process serves the Controller service, as it needs nothing, and says so, as the specification wants
//! (GetPluginCapabilities: "All instances of the same version SHALL return the same set of capabilities").
//! Volumes are made, measured, and kept to one pod where that is asked for; they are neither staged nor
//! grown, listed nor copied. What is not advertised answers `UNIMPLEMENTED`.
//!
//! [`Registration`] makes kubelet know the driver, where no sidecar does.
//!
//! Known limit: grpc-go before 1.50 sends the socket's percent-encoded path as `:authority`, which
//! HTTP/2 does not allow, and the `h2` crate ends such a stream with `PROTOCOL_ERROR`. Kubelet
//! since 1.26 (kubernetes#112597) and sidecars that dial through csi-lib-utils are not concerned. For
//! the registration, which kubelet dials in that way still, `authority.rs` mends it.

mod attributes;
mod authority;
mod capability;
mod controller;
mod identity;
mod made;
mod node;
mod observe;
mod pod_info;
mod quantity;
mod rate;
mod registration;
mod server;
mod socket;
mod status;

pub use attributes::{ATTRIBUTES, Attributes, SECRET_KEYS, credentials};
pub use identity::{DEFAULT_PLUGIN_NAME, PluginName, PluginNameError};
pub use node::VolumeLimits;
pub use registration::{Registration, RegistrationConfig, RegistrationOutcome};
pub use server::{CsiConfig, ServeError, Server};
pub use socket::{PrivateSocket, bind_private};
