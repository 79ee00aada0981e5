//! Registers the driver with kubelet, where no node-driver-registrar sidecar does.
//!
//! Kubelet watches a directory, and asks every socket that appears there who it is
//! (`pluginregistration/v1`; kubernetes, `pkg/kubelet/pluginmanager`). It then calls NodeGetInfo on
//! the CSI socket, writes the node's `CSINode` object, and tells the outcome. When the socket goes,
//! the driver is registered no more. A refusal is final for this socket until kubelet tries again,
//! which it does by itself with back-off.

use std::{
    future::Future,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{sync::watch, time::sleep};
use tokio_stream::{StreamExt as _, wrappers::UnixListenerStream};
use tonic::{Request, Response, Status, transport::Server as Transport};
use tracing::{debug, error, info};

use super::{PluginName, PrivateSocket, ServeError, authority::MendedStream, bind_private};
use crate::{
    metrics::Metrics,
    pb::registration::{
        InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
        registration_server,
    },
};

/// The kind of plugin, as kubelet calls it (`registerapi.CSIPlugin`).
const CSI_PLUGIN: &str = "CSIPlugin";

/// The versions of CSI: what node-driver-registrar says for every driver of CSI 1.x.
const CSI_VERSIONS: &[&str] = &["1.0.0"];

/// Longest call: kubelet's own texts are far shorter.
const MAX_REQUEST_BYTES: usize = 64 << 10;

/// How long a call in flight may go on at the end; none does any work.
const DRAIN: Duration = Duration::from_secs(1);

/// What kubelet is told, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistrationConfig {
    /// The driver's name.
    pub plugin_name: PluginName,
    /// The CSI socket, as kubelet finds it.
    pub csi_socket: PathBuf,
    /// The directory that kubelet watches.
    pub dir: PathBuf,
}

impl RegistrationConfig {
    /// The socket in the watched directory.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(format!("{}-reg.sock", self.plugin_name))
    }
}

/// What kubelet made of the registration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrationOutcome {
    /// It has not said anything yet.
    Pending,
    /// The driver is registered.
    Registered,
    /// It was refused.
    Refused {
        /// Kubelet's words.
        reason: String,
    },
}

/// A registration that is offered to kubelet.
#[derive(Debug)]
pub struct Registration {
    socket: PrivateSocket,
    service: RegistrationService,
}

impl Registration {
    /// Offers the registration: kubelet may ask from now on, and calls CSI at once.
    ///
    /// What kubelet makes of it is seen through the receiver.
    ///
    /// # Errors
    /// Those of [`bind_private`].
    pub fn bind(
        config: &RegistrationConfig,
        metrics: &Metrics,
    ) -> io::Result<(Self, watch::Receiver<RegistrationOutcome>)> {
        let (outcome, seen) = watch::channel(RegistrationOutcome::Pending);
        let registration = Self {
            socket: bind_private(&config.socket())?,
            service: RegistrationService {
                info: plugin_info(&config.plugin_name, &config.csi_socket)?,
                outcome,
                metrics: metrics.clone(),
            },
        };
        Ok((registration, seen))
    }

    /// Answers kubelet until `shutdown` is ready, and takes the registration back then.
    ///
    /// # Errors
    /// [`ServeError`] if the socket fails.
    pub async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
        let (listener, file) = self.socket.into_parts();
        let incoming = UnixListenerStream::new(listener).map(|it| it.map(MendedStream::new));
        let (stopping, stopped) = tokio::sync::oneshot::channel();
        let service = registration_server::RegistrationServer::new(self.service)
            .max_decoding_message_size(MAX_REQUEST_BYTES);
        let serving = Transport::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, async {
                shutdown.await;
                // Before anything else ends: kubelet sends no more volumes then.
                drop(file);
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
            () = drained => Ok(()),
        }
    }
}

fn plugin_info(name: &PluginName, csi_socket: &Path) -> io::Result<PluginInfo> {
    let endpoint = csi_socket.to_str().ok_or_else(|| {
        let reason = format!("{} is not UTF-8: use another path", csi_socket.display());
        io::Error::new(io::ErrorKind::InvalidInput, reason)
    })?;
    Ok(PluginInfo {
        r#type: CSI_PLUGIN.to_owned(),
        name: name.to_string(),
        endpoint: endpoint.to_owned(),
        supported_versions: CSI_VERSIONS.iter().map(|it| (*it).to_owned()).collect(),
    })
}

/// The Registration service.
#[derive(Debug)]
struct RegistrationService {
    info: PluginInfo,
    outcome: watch::Sender<RegistrationOutcome>,
    metrics: Metrics,
}

#[tonic::async_trait]
impl registration_server::Registration for RegistrationService {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        debug!("kubelet asks which driver this is");
        Ok(Response::new(self.info.clone()))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        let outcome = if status.plugin_registered {
            info!("kubelet registered the driver");
            RegistrationOutcome::Registered
        } else {
            error!(
                error = status.error,
                "kubelet refused to register the driver"
            );
            RegistrationOutcome::Refused {
                reason: status.error,
            }
        };
        self.metrics
            .registered
            .set(i64::from(outcome == RegistrationOutcome::Registered));
        self.outcome.send_replace(outcome);
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}
