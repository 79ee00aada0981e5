//! What every run mode shares: registry client, layer store, indexer.

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context;
use bytes::Bytes;
use tokio::runtime::Handle;

use super::{BadConfig, references::References};
use crate::{
    cli::ImageArgs,
    clock::{Clock, SystemClock},
    config::Config,
    digest::{BlobDigest, ManifestDigest},
    indexer::{Indexer, OpenImage},
    layer::store::{LayerStore, Remote},
    metrics::Metrics,
    node_taint,
    registry::{
        Credentials, DockerConfig, ImageRef, KeptConfigs, Platform, PushedIndexOptions,
        RegistryClient, RegistryConfig, Requester, ResolvedImage, ServiceAccounts,
    },
    remote::{self, Answer, ContentCache, Uploader},
    service_accounts::ClusterServiceAccounts,
    tier::BoxFuture,
    warm::{Warmer, Warms},
};

/// Opens images.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) registry: RegistryClient,
    /// The same, speaking plain http to some hosts, for volumes that want that.
    pub(super) insecure: Insecure,
    /// What references meant on this node.
    pub(super) references: References,
    /// Whether a volume that wants no registry to be asked has none asked.
    pub(super) trust_pull_policy_never: bool,
    pub(super) store: LayerStore,
    pub(super) indexer: Indexer,
    pub(super) metrics: Metrics,
}

/// The configurations of images that were warmed.
#[derive(Debug)]
struct RemoteConfigs(ContentCache);

impl KeptConfigs for RemoteConfigs {
    fn config<'a>(
        &'a self,
        digest: &'a BlobDigest,
        max_bytes: usize,
    ) -> BoxFuture<'a, Option<Bytes>> {
        Box::pin(async move {
            match self.0.image_config(digest, max_bytes).await {
                Answer::Has(config) => Some(config),
                Answer::Lacks | Answer::Down { .. } => None,
            }
        })
    }
}

/// A client that speaks plain http to certain hosts.
#[derive(Debug)]
pub(super) struct Insecure {
    pub(super) hosts: Vec<String>,
    pub(super) registry: RegistryClient,
}

/// Which image is wanted, parsed.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) image: ImageRef,
    pub(super) platform: Platform,
    pub(super) requester: Requester,
    /// The pushed index to use.
    pub(super) index_digest: Option<ManifestDigest>,
}

impl Engine {
    /// Puts the parts together. Reads configured files; the registry and the remote may be down.
    pub(super) fn start(config: &Config, metrics: Metrics) -> anyhow::Result<Self> {
        // One provider of cryptography for every TLS connection; a second call changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let pushed_indexes = PushedIndexOptions {
            key: config.remote.integrity_key().map_err(BadConfig::new)?,
            max_index_bytes: config.cache.max_layer_index_bytes,
        };
        let remote = remote::open(&config.remote, &metrics, &clock).map_err(BadConfig::new)?;
        let kept_configs = remote.clone().map(|it| Arc::new(RemoteConfigs(it)) as _);
        let client = |config: RegistryConfig| {
            let client = RegistryClient::new(config, metrics.clone()).map_err(BadConfig::new)?;
            let client = client.with_kept_configs(Option::clone(&kept_configs));
            anyhow::Ok(client.with_pushed_indexes(pushed_indexes.clone()))
        };
        let registry = client(config.registry.clone())?;
        let mut with_plain_http = config.registry.clone();
        for host in &config.registry.insecure_hosts {
            let host = with_plain_http.hosts.entry(host.clone()).or_default();
            host.plain_http = true;
        }
        let insecure = Insecure {
            hosts: config.registry.insecure_hosts.clone(),
            registry: client(with_plain_http)?,
        };
        let remote = remote.map(|cache| {
            let options = config.remote.upload_options();
            let uploader = Arc::new(Uploader::start(cache.clone(), options));
            Remote { cache, uploader }
        });
        let store = LayerStore::open(
            config.cache.clone(),
            remote,
            metrics.clone(),
            Handle::current(),
        )?;
        let max_index_nodes = config.cache.max_index_nodes;
        let indexer = Indexer::new(store.clone(), metrics.clone(), max_index_nodes);
        Ok(Self {
            registry,
            insecure,
            references: References::new(&config.cache.dir),
            trust_pull_policy_never: config.registry.trust_pull_policy_never,
            store,
            indexer,
            metrics,
        })
    }

    /// Puts the parts together for volumes of pods, whose service accounts may count.
    pub(super) fn of_node(config: &Config, metrics: Metrics, driver: &str) -> anyhow::Result<Self> {
        let mut engine = Self::start(config, metrics)?;
        let accounts: Option<Arc<dyn ServiceAccounts>> =
            if config.registry.service_account_pull_secrets {
                const KEY: &str = "registry.service_account_pull_secrets";
                let cluster = node_taint::cluster_of_this_pod().map_err(BadConfig::new);
                let cluster = cluster.context(KEY)?;
                let accounts = ClusterServiceAccounts::new(cluster, driver).context(KEY)?;
                Some(Arc::new(accounts))
            } else {
                None
            };
        for client in [&mut engine.registry, &mut engine.insecure.registry] {
            let used = client.use_service_accounts(accounts.clone());
            used.map_err(BadConfig::new)?;
        }
        Ok(engine)
    }

    /// What warms images with these parts.
    pub(super) fn warmer(&self) -> Warmer<'_> {
        Warmer {
            registry: &self.registry,
            store: &self.store,
            indexer: &self.indexer,
        }
    }

    /// Resolves the image and opens it.
    pub(super) async fn open(&self, wanted: &Wanted) -> anyhow::Result<(ResolvedImage, OpenImage)> {
        let Wanted {
            image,
            platform,
            requester,
            index_digest,
        } = wanted;
        let cannot = || format!("image {image}");
        let resolved = self
            .registry
            .resolve(image, platform, requester)
            .await
            .with_context(cannot)?;
        let manifest = resolved.manifest;
        let blobs = self
            .registry
            .image_blobs(image, requester, manifest, *index_digest);
        let opened = self
            .indexer
            .open(&resolved, &blobs)
            .await
            .with_context(cannot)?;
        Ok((resolved, opened))
    }

    /// Ends uploads, at most until `deadline`, and all other work.
    pub(super) async fn stop(&self, deadline: Duration) {
        self.store.shutdown(deadline).await;
    }
}

impl Warms for Engine {
    fn warmer(&self) -> Warmer<'_> {
        Self::warmer(self)
    }
}

impl Wanted {
    /// Parses what a person typed, and applies their options to `config`.
    pub(super) fn from_args(args: &ImageArgs, config: &mut Config) -> anyhow::Result<Self> {
        for host in &args.plain_http {
            config
                .registry
                .hosts
                .entry(host.clone())
                .or_default()
                .plain_http = true;
        }
        let image: ImageRef = args.image.parse()?;
        let platform = match &args.platform {
            Some(text) => text.parse()?,
            None => Platform::host(),
        };
        let file = args.docker_config.as_ref();
        let file = file.or(config.registry.docker_config_file.as_ref());
        let requester = Requester::Exactly(credentials(file, &image)?);
        Ok(Self {
            image,
            platform,
            requester,
            index_digest: None,
        })
    }
}

/// Finds a person's credentials for `image` in `file`, or else in their own docker config, if they
/// have one.
fn credentials(file: Option<&PathBuf>, image: &ImageRef) -> anyhow::Result<Credentials> {
    let path = match (file, std::env::var_os("HOME")) {
        (Some(path), _) => path.clone(),
        (None, Some(home)) => {
            let path = PathBuf::from(home).join(".docker/config.json");
            if !path.exists() {
                return Ok(Credentials::Anonymous);
            }
            path
        }
        (None, None) => return Ok(Credentials::Anonymous),
    };
    let content = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let config =
        DockerConfig::parse(&content).with_context(|| format!("reading {}", path.display()))?;
    Ok(config.for_image(image))
}
