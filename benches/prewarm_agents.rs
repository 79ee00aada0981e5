//! Many nodes in one process, each with the agent's own code of pre-warming and a connection of its own to a real API
//! server: what `make bench BENCH=prewarm` loads the controller and the API server with. Only that a disk is filled is
//! left out: an image takes a while instead.
//!
//! `cargo bench --bench prewarm_agents -- SERVER CA_FILE FILL_MILLISECONDS` reads lines of `NODE TOKEN`, and has each node
//! join as soon as it has read it. Ends with its input.

use std::{
    env,
    error::Error,
    io::{self, BufRead, Write},
    sync::Arc,
    thread,
    time::Duration,
};

use clip_csi::{
    cluster,
    metrics::{Metrics, Role},
    prewarm::{
        agent::{NodeWarming, Settings},
        config::PrewarmConfig,
    },
    registry::Platform,
    tier::BoxFuture,
    warm::{FillRequest, Filled, Fills, WarmError, WarmProgress},
};
use kube::{
    Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::{sync::mpsc, task::LocalSet, time::sleep};
use tracing::Level;

/// What an image is said to have.
const LAYERS_OF_AN_IMAGE: u32 = 25;
const BYTES_OF_AN_IMAGE: u64 = 1 << 30;

/// A disk that is filled as fast as this.
#[derive(Debug)]
struct Modelled {
    an_image_takes: Duration,
}

impl Fills for Modelled {
    fn fill<'a>(
        &'a self,
        _: &'a FillRequest,
        _: &'a Arc<WarmProgress>,
    ) -> BoxFuture<'a, Result<Filled, WarmError>> {
        Box::pin(async move {
            sleep(self.an_image_takes).await;
            Ok(Filled {
                n_layers: LAYERS_OF_AN_IMAGE,
                bytes_wanted: BYTES_OF_AN_IMAGE,
                bytes_from_remote: BYTES_OF_AN_IMAGE,
                ..Filled::default()
            })
        })
    }
}

/// Where the API server is, and who is speaking.
async fn config(server: &str, ca_file: &str, token: &str) -> Result<Config, Box<dyn Error>> {
    let kubeconfig: Kubeconfig = serde_json::from_value(serde_json::json!({
        "current-context": "bench",
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
        "clusters": [{"name": "bench", "cluster": {"server": server, "certificate-authority": ca_file}}],
        "users": [{"name": "bench", "user": {"token": token}}],
    }))?;
    Ok(Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds an option of its own.
    let words: Vec<_> = env::args()
        .skip(1)
        .filter(|it| !it.starts_with("--"))
        .collect();
    let [server, ca_file, milliseconds] = words.as_slice() else {
        writeln!(
            io::stderr(),
            "prewarm_agents: no API server is named: `make bench BENCH=prewarm` does"
        )?;
        return Ok(());
    };
    tracing_subscriber::fmt()
        .with_max_level(Level::WARN)
        .with_writer(io::stderr)
        .init();
    let _is_first = rustls::crypto::ring::default_provider().install_default();
    let parts = Arc::new(Modelled {
        an_image_takes: Duration::from_millis(milliseconds.parse()?),
    });
    let metrics = Metrics::of(Role::Agent);
    let (sender, mut lines) = mpsc::unbounded_channel();
    // A thread, because tokio has none for it without a feature more.
    thread::spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let agents = LocalSet::new();
    let joining = async {
        while let Some(line) = lines.recv().await {
            let (node, token) = line.split_once(' ').ok_or("want lines of NODE TOKEN")?;
            let settings = Settings {
                node: node.to_owned(),
                platform: Platform::host().to_string(),
                has_remote: true,
                config: PrewarmConfig::default(),
                pods_of: None,
            };
            let client = cluster::client(config(server, ca_file, token).await?)?;
            let fills = Arc::<Modelled>::clone(&parts);
            let agent = NodeWarming::new(client, fills, settings, metrics.clone());
            agents.spawn_local(agent.run());
        }
        Ok(())
    };
    agents.run_until(joining).await
}
