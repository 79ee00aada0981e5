//! Speaks with the Kubernetes API: watches, a lease for who leads, events.
//!
//! Nothing here knows what is watched, or what is led.

mod events;
mod lease;
mod message;
mod watch;

use std::{path::Path, time::Duration};

use kube::{
    Client, Config,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

pub use events::{EventKind, Events};
pub use lease::{Elector, LeaseName};
pub use message::bounded;
pub use watch::{Seen, Selector, watch};

/// How long a connection may take to be made, and a request to be sent.
///
/// How long an answer may take is not bounded here: a watch has its own end.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Says why the API server cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum NoCluster {
    /// There is no service account to be it with.
    #[error(
        "not in a pod of a cluster: set automountServiceAccountToken for this pod, or give --kubeconfig"
    )]
    NotInPod(#[source] InClusterError),
    /// The file that says how cannot be used.
    #[error("the kubeconfig cannot be used")]
    Kubeconfig(#[source] KubeconfigError),
}

/// Finds the API server: as `kubeconfig` says, or else as a pod does.
///
/// # Errors
/// [`NoCluster`] says what is missing.
pub async fn find(kubeconfig: Option<&Path>) -> Result<Config, NoCluster> {
    let Some(path) = kubeconfig else {
        return Config::incluster().map_err(NoCluster::NotInPod);
    };
    let file = Kubeconfig::read_from(path).map_err(NoCluster::Kubeconfig)?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    config.map_err(NoCluster::Kubeconfig)
}

/// Makes a client that may watch.
///
/// # Errors
/// If no client can be made of the configuration.
pub fn client(mut cluster: Config) -> kube::Result<Client> {
    cluster.connect_timeout = Some(CONNECT_TIMEOUT);
    cluster.write_timeout = Some(CONNECT_TIMEOUT);
    Client::try_from(cluster)
}
