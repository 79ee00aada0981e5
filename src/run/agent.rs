//! `clip-csi agent`: network and cache of a node.

use std::{path::PathBuf, process::ExitCode, sync::Arc, thread, time::Duration};

use anyhow::Context;
use tokio::runtime::Handle;
use tracing::{info, warn};

use super::{
    BadConfig,
    engine::Engine,
    in_process::{bind_admin, startup_taint},
    node::{stop_signal, stopped},
    opener::Opener,
};
use crate::{
    admin::{self, Page, Ready},
    cli::AgentArgs,
    config::Config,
    exposition,
    ipc::{Listener, RunDir},
    metrics::{Metrics, Role},
    node_events::NodeEvents,
    node_taint,
    roles::{agent::Agent, status},
    sys,
    tier::BoxFuture,
};

/// How often the other processes are asked whether they are ready.
const ASK: Duration = Duration::from_secs(1);

/// Serves until a signal asks for the end.
pub(super) async fn run(args: AgentArgs, config: Config) -> anyhow::Result<ExitCode> {
    info!(version = env!("CARGO_PKG_VERSION"), "clip-csi agent starts");
    let run_dir = RunDir::new(&args.run.run_dir);
    let taint = match (&args.startup_taint, &args.node_id) {
        (Some(key), Some(node)) => {
            Some(startup_taint(key, node, &args.driver_name).context("--startup-taint")?)
        }
        (_, _) => None,
    };
    let events = match (args.events, &args.node_id) {
        (true, Some(node)) => {
            let cluster = node_taint::cluster_of_this_pod().map_err(BadConfig::new);
            let cluster = cluster.context("--events")?;
            Some(NodeEvents::new(cluster, node, &args.driver_name).context("--events")?)
        }
        (_, _) => None,
    };
    let metrics = Metrics::of(Role::Agent);
    let stop = stop_signal()?;
    let ready = Arc::new(Ready::not_yet("starting"));
    let engine = Engine::start(&config, metrics.clone())?;
    sys::drop_code();
    let page = Pages {
        own: metrics,
        run_dir: run_dir.clone(),
    };
    let admin = match args.metrics_addr {
        Some(address) => {
            let listener = bind_admin(address).await?;
            let shutdown = stopped(stop.clone());
            Some(tokio::spawn(admin::serve(
                listener,
                page,
                Arc::clone(&ready),
                shutdown,
            )))
        }
        None => None,
    };
    let store = engine.store.clone();
    let opener = Arc::new(Opener::new(engine));
    let agent = Agent::new(Arc::clone(&opener) as _, store, Handle::current());
    let listener = Arc::new(Listener::bind(&run_dir.agent()).map_err(BadConfig::new)?);
    info!(path = %run_dir.agent().display(), "serving the node service and the server");
    let (serving, serving_agent) = (Arc::clone(&listener), agent.clone());
    thread::Builder::new()
        .name("clip-accept".to_owned())
        .spawn(move || serving_agent.serve(&serving))?;
    let watching = watch_others(&run_dir, &ready, events.as_ref());
    let untaint = async {
        if let Some((cluster, taint)) = taint {
            Box::pin(node_taint::remove(cluster, taint)).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = stopped(stop.clone()) => {}
        () = watching => {}
        () = untaint => {}
    }
    ready.unset("stopping");
    info!("stopping: reads of what is on disk go on, others wait for the next agent");
    // At once: who connects from now on is the next one's.
    drop(std::fs::remove_file(run_dir.agent()));
    agent.stop();
    let drain = Duration::from_secs(config.node.drain_seconds);
    opener.engine().stop(drain).await;
    if let Some(admin) = admin {
        admin.await.context("serving /metrics")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows whether all of this node's processes are ready, and passes on what operators should see.
async fn watch_others(run_dir: &RunDir, ready: &Ready, events: Option<&NodeEvents>) {
    loop {
        if let Some(events) = events {
            let node = run_dir.node();
            let taken = tokio::task::spawn_blocking(move || status::take_notices(&node));
            // A node service that is away has its notices still.
            for notice in taken.await.into_iter().flatten().flatten() {
                events.warn(&notice.reason, &notice.message).await;
            }
        }
        let (node, serve) = (run_dir.node(), run_dir.serve());
        let missing = tokio::task::spawn_blocking(move || {
            let missing =
                |who: &str, asked: std::io::Result<crate::roles::protocol::Status>| match asked {
                    Ok(status) => status.missing,
                    Err(err) => Some(format!("clip-csi {who} does not answer: {err}")),
                };
            missing("node", status::of_node(&node))
                .or_else(|| missing("serve", status::of_server(&serve)))
        });
        match missing.await {
            Ok(None) => ready.set(),
            Ok(Some(reason)) => ready.unset(reason),
            Err(err) => warn!(error = %err, "asking the other processes failed"),
        }
        tokio::time::sleep(ASK).await;
        sys::drop_code();
    }
}

/// The metrics of all processes of this node.
struct Pages {
    own: Metrics,
    run_dir: RunDir,
}

impl Page for Pages {
    fn page(&self) -> BoxFuture<'_, prometheus::Result<String>> {
        Box::pin(async {
            let (node, serve): (PathBuf, PathBuf) = (self.run_dir.node(), self.run_dir.serve());
            let others = tokio::task::spawn_blocking(move || {
                [status::of_node(&node), status::of_server(&serve)]
            });
            let mut pages = vec![self.own.encode()?];
            // One that does not answer is missing on the page, which an alert is there for.
            for status in others.await.into_iter().flatten().flatten() {
                pages.push(status.metrics);
            }
            Ok(exposition::join(&pages))
        })
    }
}
