//! `clip-csi node --in-process`: serves CSI, fetches and mounts, all in one process. Mounts end with it.

use std::{net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tracing::{info, warn};

use super::{
    BadConfig,
    engine::Engine,
    mounter::InProcess,
    node::{self, NodeSettings, Parts, stop_signal, stopped},
};
use crate::{
    admin::{self, Page, Ready},
    cli::NodeArgs,
    config::Config,
    metrics::Metrics,
    node_taint::{self, StartupTaint, TaintKey},
    roles::notices::Notices,
};

/// Serves until a signal asks for the end.
pub(super) async fn run(
    args: NodeArgs,
    settings: NodeSettings,
    config: Config,
) -> anyhow::Result<ExitCode> {
    let metrics = Metrics::new();
    // Listening for signals begins before there is anything that they could leave behind.
    let stop = stop_signal()?;
    let ready = Arc::new(Ready::not_yet("starting"));
    let taint = match &args.startup_taint {
        Some(key) => {
            let taint = startup_taint(key, &args.node_id, &args.driver_name);
            Some(taint.context("--startup-taint")?)
        }
        None => None,
    };
    // Before anything is bound: configured files are read here.
    let engine = Engine::of_node(&config, metrics.clone(), &args.driver_name)?;
    let admin = serve_admin(args.metrics_addr, metrics.clone(), &ready, &stop).await?;
    let mounter = Arc::new(InProcess::new(engine, config.fuse.clone())?);
    let drain = Duration::from_secs(config.node.drain_seconds);
    let parts = Parts {
        mounter: Arc::clone(&mounter) as _,
        // What this process serves costs it memory.
        max_idle: Duration::ZERO,
        aside: Box::pin(async {
            if let Some((cluster, taint)) = taint {
                node_taint::remove(cluster, taint).await;
            }
            std::future::pending().await
        }),
        end: Box::pin(async move {
            // This process serves the mounts: pods that still use them see them end with it.
            warn!("stopping: mounts that pods still use end with this process");
            mounter.engine().stop(drain).await;
            match admin {
                Some(admin) => admin.await.context("serving /metrics"),
                None => Ok(()),
            }
        }),
    };
    node::serve(settings, parts, &metrics, &ready, &Notices::default(), stop).await
}

/// Serves /metrics and the like until the stop, if an address is given; what is returned ends then.
pub(super) async fn serve_admin(
    address: Option<SocketAddr>,
    page: impl Page,
    ready: &Arc<Ready>,
    stop: &watch::Receiver<bool>,
) -> anyhow::Result<Option<JoinHandle<()>>> {
    let Some(address) = address else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("binding --metrics-addr {address}"))?;
    info!(address = %listener.local_addr()?, "serving /metrics, /healthz and /readyz");
    let shutdown = stopped(stop.clone());
    let serving = admin::serve(listener, page, Arc::clone(ready), shutdown);
    Ok(Some(tokio::spawn(serving)))
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
