//! The gRPC server: both services on one socket, until it is told to stop.

use std::{future::Future, time::Duration};

use tokio::{sync::oneshot, time::sleep};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server as Transport;

use super::{
    PluginName, PrivateSocket, identity::IdentityService, node::NodeService, observe::Observer,
};
use crate::{
    metrics::Metrics,
    mount::MountTable,
    pb::v1::{identity_server::IdentityServer, node_server::NodeServer},
};

/// Largest request: a secret of 1 MiB, the most that Kubernetes takes, and the rest.
const MAX_REQUEST_BYTES: usize = 2 << 20;

/// How long calls in flight may go on after the server was told to stop.
///
/// A mount that has begun takes milliseconds; a call that waits for an image is better cut off, as
/// it is not final for kubelet, and kubelet kills the driver after 30 seconds
/// (`terminationGracePeriodSeconds`).
const DRAIN: Duration = Duration::from_secs(5);

/// Says why the server stopped by itself.
#[derive(Debug, thiserror::Error)]
#[error("serving calls")]
pub struct ServeError(#[from] tonic::transport::Error);

/// What the driver says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CsiConfig {
    /// The driver's name.
    pub plugin_name: PluginName,
    /// This node's name in Kubernetes.
    pub node_id: String,
}

/// The CSI server.
#[derive(Debug)]
pub struct Server {
    identity: IdentityService,
    node: NodeService,
}

impl Server {
    /// Makes a server that publishes through `table`.
    pub fn new(config: CsiConfig, table: MountTable, metrics: &Metrics) -> Self {
        let observer = Observer::new(metrics.clone());
        Self {
            identity: IdentityService {
                name: config.plugin_name,
                observer: observer.clone(),
            },
            node: NodeService {
                node_id: config.node_id,
                table,
                registered: metrics.registered.clone(),
                observer,
            },
        }
    }

    /// Serves until `shutdown` is ready, and then lets calls in flight end, for five seconds. The
    /// socket's file goes in the end.
    ///
    /// # Errors
    /// [`ServeError`] if the socket fails.
    pub async fn serve(
        self,
        socket: PrivateSocket,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), ServeError> {
        let (listener, _file) = socket.into_parts();
        let (stopping, stopped) = oneshot::channel();
        let serving = Transport::builder()
            .add_service(
                IdentityServer::new(self.identity).max_decoding_message_size(MAX_REQUEST_BYTES),
            )
            .add_service(NodeServer::new(self.node).max_decoding_message_size(MAX_REQUEST_BYTES))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async {
                shutdown.await;
                // Nobody listens only when serving has ended.
                let _ = stopping.send(());
            });
        let drained = async {
            match stopped.await {
                Ok(()) => sleep(DRAIN).await,
                // Serving has ended by itself, and its outcome is what counts.
                Err(_) => std::future::pending().await,
            }
        };
        tokio::select! {
            outcome = serving => Ok(outcome?),
            () = drained => {
                tracing::warn!("calls in flight cut off at the end of the drain");
                Ok(())
            }
        }
    }
}
