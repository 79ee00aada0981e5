//! `clip-csi controller`: makes volumes for PersistentVolumeClaims, and serves no mounts.

use std::{process::ExitCode, sync::Arc};

use anyhow::Context;
use tracing::info;

use super::{
    BadConfig,
    in_process::serve_admin,
    node::{socket_path, stop_signal, stopped},
};
use crate::{
    admin::Ready,
    cli::ControllerArgs,
    csi::{PluginName, Server, bind_private},
    metrics::Metrics,
};

/// Serves until a signal asks for the end.
pub(super) async fn run(args: ControllerArgs) -> anyhow::Result<ExitCode> {
    info!(
        version = env!("CARGO_PKG_VERSION"),
        "clip-csi controller starts"
    );
    let socket = socket_path(&args.endpoint)?;
    let plugin_name: PluginName = args.driver_name.parse().map_err(BadConfig::new)?;
    let metrics = Metrics::new();
    let ready = Arc::new(Ready::not_yet("starting"));
    let stop = stop_signal()?;
    let admin = serve_admin(args.metrics_addr, metrics.clone(), &ready, &stop).await?;
    let server = Server::controller(plugin_name, &metrics);
    let bound = bind_private(&socket).with_context(|| format!("socket {}", socket.display()))?;
    info!(path = %socket.display(), "serving CSI");
    ready.set();
    server.serve(bound, stopped(stop)).await?;
    ready.unset("stopping");
    if let Some(admin) = admin {
        admin.await.context("serving /metrics")?;
    }
    Ok(ExitCode::SUCCESS)
}
