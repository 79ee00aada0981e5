//! `clip-csi node`: serves CSI, mounts, and binds; fetching and serving are for `agent` and `serve`,
//! or are done in this process too.

use std::{
    borrow::Cow,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinHandle,
};
use tracing::{info, warn};

use super::{
    engine::{BadConfig, Engine},
    mounter::InProcess,
};
use crate::{
    admin::{self, Ready},
    cli::NodeArgs,
    config::Config,
    csi::{
        CsiConfig, PluginName, Registration, RegistrationConfig, RegistrationOutcome, Server,
        bind_private,
    },
    ipc::{Listener, RunDir},
    metrics::Metrics,
    mount::{ImageMounter, MountTable, MountTableConfig},
    node_taint::{self, StartupTaint, TaintKey},
    roles::{NodeMounter, escrow::Escrow, protocol::Status, status},
    sys,
};

/// How often unused source mounts are looked for.
const IDLE_TICK: Duration = Duration::from_secs(5);

/// What the node service is made of, whether all is done in this process or not.
struct Parts {
    /// Fetches and serves, if this process does.
    in_process: Option<Arc<InProcess>>,
    mounter: Arc<dyn ImageMounter>,
    /// Serves /metrics, if this process does.
    admin: Option<JoinHandle<()>>,
}

/// Serves until a signal asks for the end.
pub(super) async fn run(args: NodeArgs, config: Config) -> anyhow::Result<ExitCode> {
    info!(version = env!("CARGO_PKG_VERSION"), "clip-csi node starts");
    let socket = socket_path(&args.endpoint)?;
    let plugin_name: PluginName = args.driver_name.parse().map_err(BadConfig::new)?;
    let metrics = Metrics::new();
    // Listening for signals begins before there is anything that they could leave behind.
    let stop = stop_signal()?;
    let ready = Arc::new(Ready::not_yet("starting"));
    let (parts, taint) = if args.in_process {
        in_process(&args, &config, &metrics, &ready, &stop).await?
    } else {
        (with_others(&args, &config, &metrics, &ready)?, None)
    };
    let plugin_dir = plugin_dir(&socket, &args.state_dir).map(Path::to_owned);
    let table_config = MountTableConfig {
        state_dir: args.state_dir,
        prepare_wait: Duration::from_secs(config.node.publish_wait_seconds),
        // What this process serves costs it memory.
        max_idle: match &parts.in_process {
            Some(_) => Duration::ZERO,
            None => Duration::from_secs(config.node.idle_source_seconds),
        },
    };
    let (table, _recovered) =
        MountTable::recover(table_config, Arc::clone(&parts.mounter), &metrics)?;
    let csi_config = CsiConfig {
        plugin_name: plugin_name.clone(),
        node_id: args.node_id,
    };
    let server = Server::new(csi_config, table.clone(), &metrics);
    let bound = bind_private(&socket).with_context(|| format!("socket {}", socket.display()))?;
    info!(path = %socket.display(), "serving CSI Identity and Node");
    let calls = async { anyhow::Ok(server.serve(bound, stopped(stop.clone())).await?) };
    // After the CSI socket listens: kubelet calls it as soon as it sees the registration.
    let registration = args.registration_dir.map(|dir| RegistrationConfig {
        plugin_name,
        csi_socket: socket,
        dir,
    });
    let registration = register(registration, &metrics, &ready, stopped(stop.clone()));
    let aside = async {
        let untaint = async {
            if let Some((cluster, taint)) = taint {
                Box::pin(node_taint::remove(cluster, taint)).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = untaint => {}
            () = retire_idle(table.clone()) => {}
            () = stopped(stop.clone()) => {}
        }
        Ok(())
    };
    let served = tokio::try_join!(calls, registration, aside);
    ready.unset("stopping");
    if let Some(mounter) = &parts.in_process {
        // This process serves the mounts: pods that still use them see them end with it.
        warn!("stopping: mounts that pods still use end with this process");
        let drain = Duration::from_secs(config.node.drain_seconds);
        mounter.engine().stop(drain).await;
    }
    leave(table, plugin_dir.as_deref());
    if let Some(admin) = parts.admin {
        admin.await.context("serving /metrics")?;
    }
    served?;
    Ok(ExitCode::SUCCESS)
}

/// Fetches and serves in this process.
async fn in_process(
    args: &NodeArgs,
    config: &Config,
    metrics: &Metrics,
    ready: &Arc<Ready>,
    stop: &watch::Receiver<bool>,
) -> anyhow::Result<(Parts, Option<(kube::Config, StartupTaint)>)> {
    let taint = match &args.startup_taint {
        Some(key) => {
            let taint = startup_taint(key, &args.node_id, &args.driver_name);
            Some(taint.context("--startup-taint")?)
        }
        None => None,
    };
    // Before anything is bound: configured files are read here.
    let engine = Engine::start(config, metrics.clone())?;
    let admin = match args.metrics_addr {
        Some(address) => {
            let listener = bind_admin(address).await?;
            let (metrics, ready) = (metrics.clone(), Arc::clone(ready));
            let shutdown = stopped(stop.clone());
            Some(tokio::spawn(admin::serve(listener, metrics, ready, shutdown)))
        }
        None => None,
    };
    let mounter = Arc::new(InProcess::new(engine, config.fuse.clone())?);
    let parts = Parts {
        mounter: Arc::clone(&mounter) as _,
        in_process: Some(mounter),
        admin,
    };
    Ok((parts, taint))
}

/// Has the agent fetch and the server serve.
fn with_others(
    args: &NodeArgs,
    config: &Config,
    metrics: &Metrics,
    ready: &Arc<Ready>,
) -> anyhow::Result<Parts> {
    if args.metrics_addr.is_some() || args.startup_taint.is_some() {
        return Err(BadConfig::new(io::Error::other(
            "--metrics-addr and --startup-taint are for `clip-csi agent`, or for --in-process",
        ))
        .into());
    }
    sys::unix_sockets_only().context("giving up the network")?;
    let run_dir = RunDir::new(&args.run.run_dir);
    let deadline = Duration::from_secs(config.node.server_deadline_seconds);
    let escrow = Escrow::start(&run_dir, deadline, metrics.clone())?;
    let listener = Listener::bind(&run_dir.node()).map_err(BadConfig::new)?;
    let (metrics, ready) = (metrics.clone(), Arc::clone(ready));
    thread::Builder::new()
        .name("clip-status".to_owned())
        .spawn(move || {
            status::serve_node(&listener, || Status {
                metrics: metrics.encode().unwrap_or_default(),
                missing: ready.missing().map(Cow::into_owned),
            });
        })?;
    let mounter = NodeMounter::new(&run_dir, escrow, config.fuse.read_ahead_kib);
    Ok(Parts {
        in_process: None,
        mounter: Arc::new(mounter),
        admin: None,
    })
}

/// Unmounts what nobody uses any more, for ever.
async fn retire_idle(table: MountTable) {
    loop {
        tokio::time::sleep(IDLE_TICK).await;
        let table = table.clone();
        if let Err(err) = tokio::task::spawn_blocking(move || table.retire_idle()).await {
            warn!(error = %err, "looking for unused mounts failed");
        }
    }
}

/// Listens for who asks for /metrics and the like.
pub(super) async fn bind_admin(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("binding --metrics-addr {address}"))?;
    info!(address = %listener.local_addr()?, "serving /metrics, /healthz and /readyz");
    Ok(listener)
}

/// What `--startup-taint` asks for, and where.
pub(super) fn startup_taint(
    key: &str,
    node: &str,
    driver: &str,
) -> Result<(kube::Config, StartupTaint), BadConfig> {
    let key: TaintKey = key.parse().map_err(BadConfig::new)?;
    let cluster = node_taint::cluster_of_this_pod().map_err(BadConfig::new)?;
    let taint = StartupTaint {
        node: node.to_owned(),
        driver: driver.to_owned(),
        key,
    };
    Ok((cluster, taint))
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
fn socket_path(endpoint: &str) -> anyhow::Result<PathBuf> {
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
