//! `clip-csi agent`: network and cache of a node.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::runtime::Handle;
use tracing::{info, warn};

use super::{
    BadConfig,
    engine::Engine,
    in_process::{serve_admin, startup_taint},
    node::{stop_signal, stopped},
    opener::Opener,
    prewarm,
};
use crate::{
    admin::{Page, Ready},
    cli::AgentArgs,
    config::Config,
    exposition,
    health::{self, Counted, State},
    ipc::{Listener, RunDir},
    metrics::{Metrics, Role},
    mount::PodRef,
    node_events::NodeEvents,
    node_taint,
    remote::RemoteKind,
    roles::{agent::Agent, protocol::Notice, status},
    sys,
    tier::BoxFuture,
};

/// How often the other processes are asked whether they are ready.
const ASK: Duration = Duration::from_secs(1);

/// How often it is judged how well the volumes are: what is counted meanwhile is the ground.
const HEALTH: Duration = Duration::from_secs(60);

/// How long a state that comes and goes is not told of again.
const HEALTH_TOLD: Duration = Duration::from_secs(1800);

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
    let prewarm = match (args.prewarm, &args.node_id) {
        (true, Some(node)) => {
            let client = prewarm::client(args.kubeconfig.as_deref()).await;
            Some((client.context("--prewarm")?, node.as_str()))
        }
        (_, _) => None,
    };
    let pods_of = args.discover.then(|| args.driver_name.clone());
    let metrics = Metrics::of(Role::Agent);
    let stop = stop_signal()?;
    let ready = Arc::new(Ready::not_yet("starting"));
    let engine = Engine::of_node(&config, metrics.clone(), &args.driver_name)?;
    sys::drop_code();
    let page = Pages {
        own: metrics.clone(),
        run_dir: run_dir.clone(),
    };
    let admin = serve_admin(args.metrics_addr, page, &ready, &stop).await?;
    let store = engine.store.clone();
    let opener = Arc::new(Opener::new(engine));
    let agent = Agent::new(Arc::clone(&opener) as _, store, Handle::current());
    let listener = Arc::new(Listener::bind(&run_dir.agent()).map_err(BadConfig::new)?);
    info!(path = %run_dir.agent().display(), "serving the node service and the server");
    let (serving, serving_agent) = (Arc::clone(&listener), agent.clone());
    thread::Builder::new()
        .name("clip-accept".to_owned())
        .spawn(move || serving_agent.serve(&serving))?;
    let watching = watch_others(&run_dir, &ready);
    let telling = async {
        match &events {
            Some(events) => tell(&run_dir, events, args.pod_events).await,
            None => std::future::pending().await,
        }
    };
    let judged = Pages {
        own: metrics.clone(),
        run_dir: run_dir.clone(),
    };
    let has_remote = config.remote.kind != RemoteKind::None;
    let judging = watch_health(&judged, &metrics, has_remote, events.as_ref());
    let prewarming = async {
        if let Some((client, node)) = prewarm {
            let parts = Arc::clone(&opener) as _;
            prewarm::node_warming(client, node, pods_of, parts, &config, &metrics)
                .run()
                .await;
        }
        std::future::pending::<()>().await;
    };
    let untaint = async {
        if let Some((cluster, taint)) = taint {
            Box::pin(node_taint::remove(cluster, taint)).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = stopped(stop.clone()) => {}
        () = watching => {}
        () = telling => {}
        () = judging => {}
        () = untaint => {}
        () = prewarming => {}
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

/// Shows whether all of this node's processes are ready, for ever.
async fn watch_others(run_dir: &RunDir, ready: &Ready) {
    loop {
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

/// Passes on what people should see of this node and its pods, for ever. The API server may be slow:
/// nothing waits for it.
async fn tell(run_dir: &RunDir, events: &NodeEvents, of_pods: bool) {
    loop {
        let node = run_dir.node();
        let taken = tokio::task::spawn_blocking(move || status::take_notices(&node));
        // A node service that is away has its notices still.
        for notice in taken.await.into_iter().flatten().flatten() {
            let Notice {
                reason,
                message,
                pod,
            } = notice;
            match pod {
                None => events.warn(&reason, &message).await,
                Some(pod) if of_pods => {
                    let PodRef {
                        namespace,
                        name,
                        uid,
                    } = pod;
                    let told = events.warn_of_pod(&namespace, &name, &uid, &reason, &message);
                    told.await;
                }
                Some(pod) => {
                    info!(
                        pod.namespace = pod.namespace,
                        pod.name = pod.name,
                        reason,
                        message,
                        "a pod is to be told, for which --pod-events is not set"
                    );
                }
            }
        }
        tokio::time::sleep(ASK).await;
    }
}

/// Judges every minute how well the volumes are, for ever: shows it, and tells of what is new.
async fn watch_health(
    pages: &Pages,
    metrics: &Metrics,
    has_remote: bool,
    events: Option<&NodeEvents>,
) {
    let mut before: Option<Counted> = None;
    let mut told: BTreeMap<State, Instant> = BTreeMap::new();
    loop {
        let page = pages.page().await.unwrap_or_default();
        let now = Counted::parse(&page);
        let found = match &before {
            Some(before) => health::assess(before, &now, has_remote),
            None => Vec::new(),
        };
        for state in State::ALL {
            let is_so = found.contains(&state);
            metrics
                .health
                .with_label_values(&[state.label()])
                .set(i64::from(is_so));
            let is_known = told
                .get(&state)
                .is_some_and(|it| it.elapsed() < HEALTH_TOLD);
            if !is_so || is_known {
                continue;
            }
            told.insert(state, Instant::now());
            warn!(state = state.label(), "{}", state.message());
            if let Some(events) = events {
                events.warn(state.reason(), state.message()).await;
            }
        }
        before = Some(now);
        tokio::time::sleep(HEALTH).await;
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
