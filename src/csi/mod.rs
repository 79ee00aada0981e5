//! Serves the Container Storage Interface (CSI spec v1.12): Identity and Node.
//!
//! [`Server`] answers on a Unix socket that only its owner can open ([`bind_private`]). A call is
//! parsed once at this edge ([`Attributes`]), handed to the mount table, and its outcome becomes a
//! gRPC code in one place, `status.rs`. Each call is a span, a count and a duration.
//!
//! Advertised: nothing. Identity has no capabilities, because there is no controller; Node has
//! none, because volumes are neither staged nor measured nor grown. What is not advertised answers
//! `UNIMPLEMENTED`.
//!
//! [`Registration`] makes kubelet know the driver, where no sidecar does.
//!
//! Known limit: grpc-go before 1.50 sends the socket's percent-encoded path as `:authority`, which
//! HTTP/2 does not allow, and the `h2` crate ends such a stream with `PROTOCOL_ERROR`. Kubelet
//! since 1.26 (kubernetes#112597) and sidecars that dial through csi-lib-utils are not concerned. For
//! the registration, which kubelet dials in that way still, `authority.rs` mends it.

mod attributes;
mod authority;
mod identity;
mod node;
mod observe;
mod registration;
mod server;
mod socket;
mod status;

pub use attributes::{Attributes, credentials};
pub use identity::{DEFAULT_PLUGIN_NAME, PluginName, PluginNameError};
pub use registration::{Registration, RegistrationConfig, RegistrationOutcome};
pub use server::{CsiConfig, ServeError, Server};
pub use socket::{PrivateSocket, bind_private};
