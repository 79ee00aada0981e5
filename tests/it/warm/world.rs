//! A registry with an image, a remote content cache, and processes that warm.

use std::{
    path::PathBuf,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU16, Ordering},
    },
    time::Duration,
};

use clip_csi::{
    chunk::CHUNK_BYTES,
    digest::{BlobDigest, ManifestDigest},
    indexer::Indexer,
    layer::{
        CacheConfig,
        store::{LayerStore, Remote},
    },
    metrics::Metrics,
    registry::{
        Credentials, HostConfig, ImageRef, Platform, RegistryClient, RegistryConfig, Requester,
    },
    remote::{UploadOptions, Uploader},
    warm::{
        FillLimits, FillRequest, Filled, LocalCopy, Origin, Pace, SeedRequest, Seeded, WarmError,
        WarmWhat, Warmer,
    },
};
use serde_json::json;
use tokio::runtime::Handle;

use crate::{
    http_server::{HttpServer, Reply},
    layer_fixture::{Fixture, config, files_below, key_file, remote_in},
};

pub(super) const N_CHUNKS: u32 = 6;

/// Longer than anything here takes, on any machine.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);

/// The layers of the image, of which the second is there twice.
pub(super) fn fixtures() -> &'static [Fixture; 2] {
    static FIXTURES: LazyLock<[Fixture; 2]> = LazyLock::new(|| {
        let bytes = N_CHUNKS as usize * CHUNK_BYTES as usize - 5000;
        [Fixture::sized(81, bytes), Fixture::sized(82, bytes)]
    });
    &FIXTURES
}

pub(super) fn layer_bytes() -> u64 {
    fixtures().iter().map(|it| it.tar.len() as u64).sum()
}

/// An image with its documents.
pub(super) struct Image {
    pub(super) manifest: Vec<u8>,
    config: Vec<u8>,
}

impl Image {
    pub(super) fn new() -> Self {
        let [lower, upper] = fixtures();
        let layers = [lower, upper, upper];
        let config = json!({
            "os": "linux", "architecture": "amd64",
            "rootfs": {"type": "layers",
                "diff_ids": layers.map(|it| it.desc.diff_id.to_string())},
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": BlobDigest::of(&config).to_string(), "size": config.len(),
            },
            "layers": layers.map(|it| json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": it.desc.blob.to_string(), "size": it.blob.len(),
            })),
        });
        Self {
            manifest: manifest.to_string().into_bytes(),
            config,
        }
    }

    pub(super) fn digest(&self) -> ManifestDigest {
        ManifestDigest::of(&self.manifest)
    }
}

/// A registry with the image, and a remote content cache.
pub(super) struct World {
    pub(super) dir: tempfile::TempDir,
    pub(super) image: Arc<Image>,
    pub(super) registry: HttpServer,
    /// What the registry answers instead, if not 0.
    pub(super) refusal: Arc<AtomicU16>,
    /// What is done when a layer is asked for, once.
    pub(super) at_layer: Arc<Mutex<Option<Deed>>>,
}

pub(super) type Deed = Box<dyn FnOnce() + Send>;

impl World {
    pub(super) async fn new() -> Self {
        let (image, refusal) = (Arc::new(Image::new()), Arc::new(AtomicU16::new(0)));
        let (of, refuses) = (Arc::clone(&image), Arc::clone(&refusal));
        let at_layer = Arc::<Mutex<Option<Deed>>>::default();
        let deed = Arc::clone(&at_layer);
        let registry = HttpServer::start(move |request| {
            let status = refuses.load(Ordering::SeqCst);
            if status != 0 {
                return Reply::new(status, "{}");
            }
            let path = &request.path;
            if path.contains("/manifests/") {
                return Reply::new(200, of.manifest.clone());
            }
            if path.ends_with(&BlobDigest::of(&of.config).to_string()) {
                return Reply::new(200, of.config.clone());
            }
            let mut layers = fixtures().iter();
            let Some(layer) = layers.find(|it| path.ends_with(&it.desc.blob.to_string())) else {
                return Reply::new(404, "{}");
            };
            if let Some(deed) = deed.lock().unwrap().take() {
                deed();
            }
            match request.range_start() {
                None => Reply::new(200, layer.blob.clone()),
                Some(start) => {
                    let (end, len) = (layer.blob.len() - 1, layer.blob.len());
                    let range = format!("bytes {start}-{end}/{len}");
                    Reply::new(206, &layer.blob[start..]).with("content-range", range)
                }
            }
        });
        Self {
            dir: tempfile::tempdir().unwrap(),
            image,
            registry: registry.await,
            refusal,
            at_layer,
        }
    }

    /// One that is seeded.
    pub(super) async fn seeded() -> Self {
        let world = Self::new().await;
        world.node("seeder").seed(WarmWhat::All).await.unwrap();
        world
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(super) fn remote_dir(&self) -> PathBuf {
        self.path("remote")
    }

    pub(super) fn node(&self, name: &str) -> Node {
        self.node_with(name, HasRemote::WithKey, |it| it)
    }

    pub(super) fn node_with(
        &self,
        name: &str,
        has_remote: HasRemote,
        with: impl FnOnce(CacheConfig) -> CacheConfig,
    ) -> Node {
        let metrics = Metrics::new();
        let key = key_file(self.dir.path());
        let remote = match has_remote {
            HasRemote::WithKey => remote_in(&self.remote_dir(), Some(&key), &metrics),
            HasRemote::WithoutKey => remote_in(&self.remote_dir(), None, &metrics),
            HasRemote::ThatIsTriedForLong => {
                let remote = remote_in(&self.remote_dir(), Some(&key), &metrics);
                remote.map(|Remote { cache, .. }| {
                    let options = UploadOptions {
                        attempts: 1000,
                        ..UploadOptions::default()
                    };
                    let uploader = Arc::new(Uploader::start(cache.clone(), options));
                    Remote { cache, uploader }
                })
            }
            HasRemote::No => None,
        };
        let config = with(config(&self.path(name)));
        let store = LayerStore::open(config, remote, metrics.clone(), Handle::current()).unwrap();
        let plain = HostConfig {
            plain_http: true,
            ..HostConfig::default()
        };
        let registry = RegistryConfig {
            hosts: [(self.registry.host(), plain)].into(),
            retries: 0,
            max_backoff_seconds: 0,
            ..RegistryConfig::default()
        };
        Node {
            registry: RegistryClient::new(registry, metrics.clone()).unwrap(),
            indexer: Indexer::new(store.clone(), metrics.clone(), 1000),
            store,
            metrics,
            image: format!("{}/team/app:v1", self.registry.host())
                .parse()
                .unwrap(),
            manifest: self.image.digest(),
        }
    }

    /// How often each layer's blob was asked for.
    pub(super) fn blob_gets(&self) -> [usize; 2] {
        let gets = |it: &Fixture| self.registry.requests(&it.desc.blob.to_string()).len();
        let [lower, upper] = fixtures();
        [gets(lower), gets(upper)]
    }

    /// The files of the remote with this name.
    pub(super) fn stored(&self, name: &str) -> Vec<PathBuf> {
        let files = files_below(&self.remote_dir()).into_iter();
        files.filter(|it| it.file_name().unwrap() == name).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HasRemote {
    WithKey,
    WithoutKey,
    /// By the uploader: it gives no layer up while a test runs.
    ThatIsTriedForLong,
    No,
}

/// A process that warms.
pub(super) struct Node {
    pub(super) registry: RegistryClient,
    pub(super) store: LayerStore,
    pub(super) indexer: Indexer,
    pub(super) metrics: Metrics,
    pub(super) image: ImageRef,
    pub(super) manifest: ManifestDigest,
}

impl Node {
    pub(super) fn warmer(&self) -> Warmer<'_> {
        Warmer {
            registry: &self.registry,
            store: &self.store,
            indexer: &self.indexer,
        }
    }

    pub(super) fn seed_request(&self, what: WarmWhat) -> SeedRequest {
        SeedRequest {
            image: self.image.clone(),
            platform: platform(),
            requester: Requester::Exactly(Credentials::Anonymous),
            what,
            local: LocalCopy::Remove,
            pace: Arc::new(Pace::new(0)),
        }
    }

    pub(super) async fn seed(&self, what: WarmWhat) -> Result<Seeded, WarmError> {
        let progress = Arc::default();
        self.warmer()
            .seed(&self.seed_request(what), &progress)
            .await
    }

    pub(super) fn fill_request(&self, what: WarmWhat) -> FillRequest {
        FillRequest {
            manifest: self.manifest,
            what,
            origin: Origin::Remote,
            limits: limits(),
        }
    }

    pub(super) fn origin_with_registry(&self) -> Origin {
        Origin::Registry {
            image: self.image.clone(),
            platform: platform(),
            requester: Requester::Node,
        }
    }

    pub(super) async fn fill(&self, what: WarmWhat) -> Result<Filled, WarmError> {
        self.fill_as(self.fill_request(what)).await
    }

    pub(super) async fn fill_as(&self, request: FillRequest) -> Result<Filled, WarmError> {
        let progress = Arc::default();
        self.warmer().fill(&request, &progress).await
    }

    pub(super) fn remote_gets(&self) -> u64 {
        let get = |it| self.metrics.remote_requests.with_label_values(&["get", it]);
        ["hit", "miss", "error"]
            .map(|it| get(it).get())
            .iter()
            .sum()
    }

    /// Which chunks the disk has, of each layer that it has.
    pub(super) async fn chunks(&self) -> [Option<Vec<u32>>; 2] {
        let layers = fixtures().iter().map(|fixture| {
            let layer = self.store.layer_on_disk(&fixture.desc, fixture.source());
            let layer = layer.unwrap()?;
            let there = (0..N_CHUNKS).filter(|it| layer.file().has(*it..*it + 1));
            Some(there.collect())
        });
        layers.collect::<Vec<_>>().try_into().unwrap()
    }
}

pub(super) fn platform() -> Platform {
    "linux/amd64".parse().unwrap()
}

pub(super) fn limits() -> FillLimits {
    FillLimits {
        pace: Arc::new(Pace::new(0)),
        max_new_bytes: None,
        evict_unused_for: None,
    }
}

pub(super) fn all() -> Option<Vec<u32>> {
    Some((0..N_CHUNKS).collect())
}

pub(super) fn reason<T: std::fmt::Debug>(outcome: Result<T, WarmError>) -> (&'static str, String) {
    let err = outcome.unwrap_err();
    (err.reason(), err.to_string())
}
