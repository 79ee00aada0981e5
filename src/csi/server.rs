//! The gRPC server: all services on one socket, until it is told to stop.

use std::{future::Future, time::Duration};

use tokio::{sync::oneshot, time::sleep};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server as Transport;

use super::{
    PluginName, PrivateSocket, VolumeLimits, controller::ControllerService,
    identity::IdentityService, node::NodeService, observe::Observer,
};
use crate::{
    metrics::Metrics,
    mount::MountTable,
    pb::v1::{
        controller_server::ControllerServer, identity_server::IdentityServer,
        node_server::NodeServer,
    },
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
    /// What volumes may be.
    pub limits: VolumeLimits,
}

/// The CSI server.
#[derive(Debug)]
pub struct Server {
    identity: IdentityService,
    controller: ControllerService,
    /// Only on a node.
    node: Option<NodeService>,
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
            controller: ControllerService::new(observer.clone()),
            node: Some(NodeService::new(
                config.node_id,
                config.limits,
                table,
                metrics,
            )),
        }
    }

    /// Makes a server that makes volumes and mounts none: of a controller.
    pub fn controller(plugin_name: PluginName, metrics: &Metrics) -> Self {
        let observer = Observer::new(metrics.clone());
        Self {
            identity: IdentityService {
                name: plugin_name,
                observer: observer.clone(),
            },
            controller: ControllerService::new(observer),
            node: None,
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
        let identity = IdentityServer::new(self.identity);
        let controller = ControllerServer::new(self.controller);
        let node = self.node.map(NodeServer::new);
        let serving = Transport::builder()
            .add_service(identity.max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_service(controller.max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_optional_service(node.map(|it| it.max_decoding_message_size(MAX_REQUEST_BYTES)))
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
