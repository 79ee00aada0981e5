//! Speaks with the Kubernetes API: watches, a lease for who leads, events.
//!
//! Nothing here knows what is watched, or what is led.

mod events;
mod lease;
mod watch;

use std::time::Duration;

use kube::{Client, Config};

pub use events::{EventKind, Events};
pub use lease::{Elector, LeaseName};
pub use watch::{Seen, Selector, watch};

/// How long a connection may take to be made, and a request to be sent.
///
/// How long an answer may take is not bounded here: a watch has its own end.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes a client that may watch.
///
/// # Errors
/// If no client can be made of the configuration.
pub fn client(mut cluster: Config) -> kube::Result<Client> {
    cluster.connect_timeout = Some(CONNECT_TIMEOUT);
    cluster.write_timeout = Some(CONNECT_TIMEOUT);
    Client::try_from(cluster)
}
