//! `clip-csi prewarm-controller`, and the part of the agent that warms its node.

use std::{path::Path, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use kube::Client;
use tracing::{info, warn};

use super::{
    BadConfig,
    engine::Engine,
    in_process::serve_admin,
    node::{stop_signal, stopped},
};
use crate::{
    admin::Ready,
    cli::PrewarmControllerArgs,
    cluster::{self, LeaseName},
    config::Config,
    metrics::{Metrics, Role},
    prewarm::{
        agent::{self, NodeWarming},
        controller::{self, Controller},
    },
    registry::Platform,
    remote::RemoteKind,
    warm::{Fills, Warms},
};

/// Seeds and paces until a signal asks for the end.
pub(super) async fn control(
    args: PrewarmControllerArgs,
    config: Config,
) -> anyhow::Result<ExitCode> {
    info!(
        version = env!("CARGO_PKG_VERSION"),
        "clip-csi prewarm-controller starts"
    );
    let client = client(args.kubeconfig.as_deref()).await?;
    let metrics = Metrics::of(Role::PrewarmController);
    let stop = stop_signal()?;
    let ready = Arc::new(Ready::not_yet("starting"));
    let engine = Arc::new(Engine::start(&config, metrics.clone())?);
    let admin = serve_admin(args.metrics_addr, metrics.clone(), &ready, &stop).await?;
    let has_remote = config.remote.kind != RemoteKind::None;
    if !has_remote {
        warn!(
            "no remote content cache is configured: nodes take images from the registry themselves"
        );
    }
    let settings = controller::Settings {
        lease: LeaseName {
            namespace: args.lease_namespace,
            name: args.lease_name,
        },
        identity: args.identity,
        driver_name: args.driver_name,
        platform: Platform::host().to_string(),
        has_remote,
        discover: args.discover,
        parallel_images: config.prewarm.parallel_images,
        bytes_per_second: config.prewarm.bytes_per_second,
    };
    let parts: Arc<dyn Warms> = Arc::<Engine>::clone(&engine);
    ready.set();
    Controller::new(client, parts, settings, metrics)
        .run(stopped(stop))
        .await;
    ready.unset("stopping");
    engine
        .stop(Duration::from_secs(config.node.drain_seconds))
        .await;
    if let Some(admin) = admin {
        admin.await.context("serving /metrics")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Makes a client of the Kubernetes API.
pub(super) async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    // One provider of cryptography for every TLS connection; a second call changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cluster = cluster::find(kubeconfig).await.map_err(BadConfig::new)?;
    Ok(cluster::client(cluster).map_err(BadConfig::new)?)
}

/// What warms the node of an agent; `pods_of` is the driver if its pods are looked at.
pub(super) fn node_warming(
    client: Client,
    node: &str,
    pods_of: Option<String>,
    parts: Arc<dyn Fills>,
    config: &Config,
    metrics: &Metrics,
) -> NodeWarming {
    let settings = agent::Settings {
        node: node.to_owned(),
        platform: Platform::host().to_string(),
        has_remote: config.remote.kind != RemoteKind::None,
        config: config.prewarm.clone(),
        pods_of,
    };
    NodeWarming::new(client, parts, settings, metrics.clone())
}
