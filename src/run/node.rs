//! `clip-csi node`: serves CSI, mounts, and binds. Fetching and serving are for `agent` and `serve`; its
//! own program has no code for them.

use std::{
    borrow::Cow,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tracing::{info, warn};

use super::{BadConfig, budget, program::LogSettings};
use crate::{
    admin::Ready,
    config::NodeConfig,
    csi::{
        CsiConfig, PluginName, Registration, RegistrationConfig, RegistrationOutcome, Server,
        VolumeLimits, bind_private,
    },
    ipc::{Listener, RunDir},
    metrics::Metrics,
    mount::{ImageMounter, MountTable, MountTableConfig},
    roles::{NodeMounter, escrow::Escrow, notices::Notices, protocol::Status, status},
    sys,
    tier::BoxFuture,
};

/// How often the mounts are looked after.
const LOOK_AFTER: Duration = Duration::from_secs(5);

/// What the node service is to do, as its own program is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeSettings {
    pub(super) log: LogSettings,
    pub(super) run_dir: PathBuf,
    pub(super) endpoint: String,
    pub(super) node_id: String,
    pub(super) driver_name: String,
    pub(super) state_dir: PathBuf,
    pub(super) registration_dir: Option<PathBuf>,
    pub(super) node: NodeConfig,
    pub(super) read_ahead_kib: u32,
}

impl NodeSettings {
    /// Says what is wrong with them, before anything is bound or made.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        socket_path(&self.endpoint)?;
        let _: PluginName = self.driver_name.parse().map_err(BadConfig::new)?;
        Ok(())
    }
}

/// How images come to this node, and what else is done beside serving CSI.
pub(super) struct Parts {
    pub(super) mounter: Arc<dyn ImageMounter>,
    /// How long a source mount without volumes is kept.
    pub(super) max_idle: Duration,
    /// Goes on beside the calls, until it ends or they do.
    pub(super) aside: BoxFuture<'static, ()>,
    /// Done when the calls have ended.
    pub(super) end: BoxFuture<'static, anyhow::Result<()>>,
}

/// Serves until a signal asks for the end; agent and server do the rest.
///
/// # Errors
/// What keeps it from starting or going on.
pub fn run_with_others(settings: NodeSettings) -> anyhow::Result<ExitCode> {
    settings.log.start()?;
    // Before there is a thread that would keep it.
    sys::unix_sockets_only().context("giving up the network")?;
    super::in_runtime(async {
        let metrics = Metrics::new();
        let ready = Arc::new(Ready::not_yet("starting"));
        let stop = stop_signal()?;
        let notices = Arc::new(Notices::default());
        let run_dir = RunDir::new(&settings.run_dir);
        let deadline = Duration::from_secs(settings.node.server_deadline_seconds);
        let escrow = Escrow::start(&run_dir, deadline, metrics.clone(), Arc::clone(&notices))?;
        let listener = Listener::bind(&run_dir.node()).map_err(BadConfig::new)?;
        {
            let (metrics, ready) = (metrics.clone(), Arc::clone(&ready));
            let notices = Arc::clone(&notices);
            thread::Builder::new()
                .name("clip-status".to_owned())
                .spawn(move || {
                    status::serve_node(&listener, &notices, || Status {
                        metrics: metrics.encode().unwrap_or_default(),
                        missing: ready.missing().map(Cow::into_owned),
                    });
                })?;
        }
        let parts = Parts {
            mounter: Arc::new(NodeMounter::new(
                &run_dir,
                escrow,
                settings.read_ahead_kib,
                settings.node.kernel_mounts,
            )),
            max_idle: Duration::from_secs(settings.node.idle_source_seconds),
            aside: Box::pin(std::future::pending()),
            end: Box::pin(std::future::ready(Ok(()))),
        };
        serve(settings, parts, &metrics, &ready, &notices, stop).await
    })
}

/// Serves CSI until a signal asks for the end.
pub(super) async fn serve(
    settings: NodeSettings,
    parts: Parts,
    metrics: &Metrics,
    ready: &Ready,
    notices: &Notices,
    stop: watch::Receiver<bool>,
) -> anyhow::Result<ExitCode> {
    info!(version = env!("CARGO_PKG_VERSION"), "clip-csi node starts");
    let socket = socket_path(&settings.endpoint)?;
    let plugin_name: PluginName = settings.driver_name.parse().map_err(BadConfig::new)?;
    let plugin_dir = plugin_dir(&socket, &settings.state_dir).map(Path::to_owned);
    let table_config = MountTableConfig {
        state_dir: settings.state_dir,
        prepare_wait: Duration::from_secs(settings.node.publish_wait_seconds),
        max_idle: parts.max_idle,
    };
    let (table, recovered) = MountTable::recover(table_config, parts.mounter, metrics)?;
    if 0 < recovered.dead_volumes {
        let message = format!(
            "{} volumes of running pods lost their mounts while the driver was away, and every access to them fails; \
             delete the pods that use them",
            recovered.dead_volumes
        );
        notices.add("DeadVolumes", message);
    }
    let csi_config = CsiConfig {
        plugin_name: plugin_name.clone(),
        node_id: settings.node_id,
        limits: VolumeLimits {
            max_writable_bytes: settings.node.max_writable_bytes,
            max_volumes: budget::max_volumes(settings.node.max_volumes),
            publishes_per_second: settings.node.publishes_per_second,
        },
    };
    let server = Server::new(csi_config, table.clone(), metrics);
    let bound = bind_private(&socket).with_context(|| format!("socket {}", socket.display()))?;
    info!(path = %socket.display(), "serving CSI");
    sys::drop_code();
    let calls = async { anyhow::Ok(server.serve(bound, stopped(stop.clone())).await?) };
    // After the CSI socket listens: kubelet calls it as soon as it sees the registration.
    let registration = settings.registration_dir.map(|dir| RegistrationConfig {
        plugin_name,
        csi_socket: socket,
        dir,
    });
    let registration = register(registration, metrics, ready, stopped(stop.clone()));
    let aside = async {
        tokio::select! {
            () = parts.aside => {}
            () = look_after(table.clone(), notices) => {}
            () = stopped(stop.clone()) => {}
        }
        Ok(())
    };
    let served = tokio::try_join!(calls, registration, aside);
    ready.unset("stopping");
    let ended = parts.end.await;
    leave(table, plugin_dir.as_deref());
    served?;
    ended?;
    Ok(ExitCode::SUCCESS)
}

/// Unmounts what nobody uses any more, counts what is dead, and passes on what pods should be told, for
/// ever.
async fn look_after(table: MountTable, notices: &Notices) {
    loop {
        tokio::time::sleep(LOOK_AFTER).await;
        let looked_after = table.clone();
        if let Err(err) = tokio::task::spawn_blocking(move || looked_after.look_after()).await {
            warn!(error = %err, "looking after the mounts failed");
        }
        for notice in table.take_pod_notices() {
            notices.add_of_pod(notice);
        }
        sys::drop_code();
    }
}

/// Has kubelet register the driver, if this is asked for, and makes the driver ready once it did.
async fn register(
    config: Option<RegistrationConfig>,
    metrics: &Metrics,
    ready: &Ready,
    shutdown: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let Some(config) = config else {
        ready.set();
        return Ok(());
    };
    let path = config.socket();
    let (registration, mut seen) = Registration::bind(&config, metrics)
        .with_context(|| format!("registration socket {}", path.display()))?;
    info!(path = %path.display(), "waiting for kubelet to register the driver");
    let show = async {
        loop {
            match &*seen.borrow_and_update() {
                RegistrationOutcome::Pending => {
                    ready.unset("kubelet has not registered the driver yet");
                }
                RegistrationOutcome::Registered => ready.set(),
                RegistrationOutcome::Refused { reason } => {
                    ready.unset(format!("kubelet refused to register the driver: {reason}"));
                }
            }
            if seen.changed().await.is_err() {
                return;
            }
        }
    };
    let (served, ()) = tokio::join!(registration.serve(shutdown), show);
    Ok(served?)
}

/// The directory that socket and state share, as drivers have one below kubelet's `plugins`.
fn plugin_dir<'a>(socket: &Path, state_dir: &'a Path) -> Option<&'a Path> {
    state_dir.parent().filter(|it| Some(*it) == socket.parent())
}

/// Leaves no directory behind on a node without volumes, so that an uninstalled driver is gone.
/// The next start makes them again.
fn leave(table: MountTable, plugin_dir: Option<&Path>) {
    if let (true, Some(dir)) = (table.leave(), plugin_dir) {
        match fs::remove_dir(dir) {
            Ok(()) => info!(path = %dir.display(), "removed the plugin directory"),
            // A sidecar's file, or the directory is a mount point of this container.
            Err(err) => info!(path = %dir.display(), error = %err, "plugin directory stays"),
        }
    }
}

/// The path of a CSI endpoint, which is a Unix socket.
pub(super) fn socket_path(endpoint: &str) -> anyhow::Result<PathBuf> {
    let path = endpoint
        .strip_prefix("unix://")
        .or_else(|| endpoint.strip_prefix("unix:"));
    match path.map(PathBuf::from) {
        Some(path) if path.is_absolute() => Ok(path),
        _ => bail!("endpoint {endpoint:?}: a Unix socket is wanted, such as unix:///csi/csi.sock"),
    }
}

/// Turns SIGTERM and SIGINT into a value that all parts watch.
pub(super) fn stop_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    // Owned by the runtime, and ends with it: there is nothing to await.
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        sender.send_replace(true);
    });
    Ok(receiver)
}

/// Is ready when the process is to stop.
pub(super) async fn stopped(mut stop: watch::Receiver<bool>) {
    // The sender goes only after it has sent.
    let _ = stop.wait_for(|it| *it).await;
}
