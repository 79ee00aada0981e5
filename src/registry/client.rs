//! Resolves image references to layers, and hands out their blobs.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use oci_client::manifest::{OciImageIndex, OciImageManifest};

use super::{
    blob::RepositoryBlobs,
    config::{RegistryConfig, RegistryConfigError},
    documents::{DocumentLimits, ImageDocuments, KeptConfigs},
    keyring::Keyring,
    manifest::{self, Choice, Fault, Manifest},
    node_credentials::NodeCredentials,
    platform::Platform,
    providers::Providers,
    push::{self, LayerPush, PushError, Pushed},
    pushed::{ImageIndexes, PushedIndexOptions},
    reference::ImageRef,
    requester::{Requester, ServiceAccounts},
    session::{Document, Form, Object, Route, Session},
    transport::{Op, Transport, protocol, unsupported},
};
use crate::{
    digest::{BlobDigest, ManifestDigest},
    integrity::IntegrityKey,
    metrics::Metrics,
    tier::{BlobSource, LayerDesc, SourceError, SourceIdentity},
};

/// Sessions that are remembered, so that an image's blobs use the token its manifest was got with.
const MAX_SESSIONS: usize = 8;

/// How long the registry's word counts that a digest may be pulled, for who asks with the same
/// credentials: pods of one Deployment start within seconds of each other.
const PROOF_LIFE: Duration = Duration::from_secs(10);

/// Proofs that are remembered.
const MAX_PROOFS: usize = 32;

/// Indexes nested in an index that are looked into.
const MAX_NESTED_INDEXES: usize = 4;

/// Reads images from registries.
#[derive(Debug)]
pub struct RegistryClient {
    transport: Arc<Transport>,
    keyring: Arc<Keyring>,
    /// Without them, no index is looked for in the registry.
    pushed_indexes: Option<PushedIndexOptions>,
    /// Asked for configurations before the registry is.
    kept_configs: Option<Arc<dyn KeptConfigs>>,
    /// Latest last. std Mutex: held for a look at a short list, never across an await.
    sessions: Mutex<Vec<Arc<Session>>>,
    /// Latest last. std Mutex, likewise.
    proofs: Mutex<Vec<Proof>>,
    /// Makes numbers of requesters, with keys that nobody knows: nothing can be learned from these. A
    /// client that speaks in another way to the same host makes others.
    requesters: RandomState,
}

/// What a registry gave to somebody a moment ago.
#[derive(Debug)]
struct Proof {
    at: Instant,
    image: ImageRef,
    platform: Platform,
    requester: Requester,
    resolved: ResolvedImage,
}

/// An image, as far as its registry knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedImage {
    /// The digest of the platform's own manifest, never of an index.
    pub manifest: ManifestDigest,
    /// Its layers, lowest first.
    pub layers: Vec<LayerDesc>,
}

impl RegistryClient {
    /// Makes a client. Configured files are read now, the machine's certificate authorities on
    /// first use.
    ///
    /// # Errors
    /// [`RegistryConfigError`] if a value is out of range or a file cannot be used.
    pub fn new(config: RegistryConfig, metrics: Metrics) -> Result<Self, RegistryConfigError> {
        let mut keyring = Keyring::default();
        if let Some(path) = &config.docker_config_file {
            keyring.node = Some(NodeCredentials::open(path)?);
        }
        if let Some((file, bin_dir)) = config.credential_providers()? {
            keyring.providers = Some(Providers::open(file, bin_dir)?);
        }
        Ok(Self {
            transport: Arc::new(Transport::new(config, metrics)?),
            keyring: Arc::new(keyring),
            pushed_indexes: None,
            kept_configs: None,
            sessions: Mutex::default(),
            proofs: Mutex::default(),
            requesters: RandomState::new(),
        })
    }

    /// Has the image pull secrets of pods' service accounts used, where the configuration says so.
    ///
    /// # Errors
    /// [`RegistryConfigError`] if a plugin needs to know service accounts, and nobody does.
    pub fn use_service_accounts(
        &mut self,
        accounts: Option<Arc<dyn ServiceAccounts>>,
    ) -> Result<(), RegistryConfigError> {
        let providers = self.keyring.providers.as_ref();
        if let Some(name) = providers.and_then(Providers::wants_annotations)
            && accounts.is_none()
        {
            return Err(RegistryConfigError::Annotations {
                provider: name.to_owned(),
            });
        }
        let keyring = Arc::get_mut(&mut self.keyring).expect("no session has it yet");
        keyring.service_accounts = accounts;
        Ok(())
    }

    /// Has indexes looked for that were pushed beside an image, unless the configuration says not to.
    #[must_use]
    pub fn with_pushed_indexes(mut self, options: PushedIndexOptions) -> Self {
        let is_wanted = self.transport.config.use_pushed_indexes;
        self.pushed_indexes = is_wanted.then_some(options);
        self
    }

    /// Has configurations of images taken from `kept` where it has them.
    #[must_use]
    pub fn with_kept_configs(mut self, kept: Option<Arc<dyn KeptConfigs>>) -> Self {
        self.kept_configs = kept;
        self
    }

    /// Finds an image's manifest for a platform, and its layers.
    ///
    /// The registry is always asked, on behalf of `requester` and with no token from before, so that
    /// success is also proof of the right to pull; for an image by digest, it is so for ten seconds more,
    /// for nobody else. Without credentials a mirror may be asked
    /// instead, unless the configuration says otherwise; what a digest names may come from mirrors
    /// in any case. All that is returned was checked against the
    /// digests that lead to it.
    ///
    /// # Errors
    /// [`SourceError`], after the configured retries.
    ///
    /// # Cancellation
    /// Safe: an abandoned call leaves nothing behind.
    pub async fn resolve(
        &self,
        image: &ImageRef,
        platform: &Platform,
        requester: impl Into<Requester>,
    ) -> Result<ResolvedImage, SourceError> {
        let requester = requester.into();
        if let Some(resolved) = self.proven(image, platform, &requester) {
            return Ok(resolved);
        }
        let (resolved, _documents) = self.ask(image, platform, &requester).await?;
        // What a tag means may change at any time.
        if image.digest().is_some() {
            let mut proofs = self.proofs.lock().expect("no panic while it is held");
            proofs.retain(|it| it.at.elapsed() < PROOF_LIFE);
            if MAX_PROOFS <= proofs.len() {
                proofs.remove(0);
            }
            proofs.push(Proof {
                at: Instant::now(),
                image: image.clone(),
                platform: platform.clone(),
                requester,
                resolved: resolved.clone(),
            });
        }
        Ok(resolved)
    }

    /// As [`resolve`](Self::resolve), and gives the documents that say so; the registry is asked in any case.
    ///
    /// # Errors
    /// As for [`resolve`](Self::resolve).
    ///
    /// # Cancellation
    /// Safe, likewise.
    pub async fn resolve_documents(
        &self,
        image: &ImageRef,
        platform: &Platform,
        requester: impl Into<Requester>,
    ) -> Result<(ResolvedImage, ImageDocuments), SourceError> {
        self.ask(image, platform, &requester.into()).await
    }

    /// What documents may have.
    pub fn document_limits(&self) -> DocumentLimits {
        let config = &self.transport.config;
        DocumentLimits {
            max_bytes: config.max_manifest_len(),
            max_layers: config.max_layers,
        }
    }

    async fn ask(
        &self,
        image: &ImageRef,
        platform: &Platform,
        requester: &Requester,
    ) -> Result<(ResolvedImage, ImageDocuments), SourceError> {
        let session = Arc::new(self.open_session(image, requester.clone()));
        let asks_origin = session.always_asks_origin() || session.credentials().await?.is_some();
        let resolving = Resolving {
            session: &session,
            image,
            platform,
            kept_configs: self.kept_configs.as_deref(),
            proof: if asks_origin {
                Route::OriginOnly
            } else {
                Route::MirrorsFirst
            },
        };
        let found = resolving.run().await?;
        self.remember(image, requester, session);
        Ok(found)
    }

    /// What the registry gave to the same requester a moment ago.
    fn proven(
        &self,
        image: &ImageRef,
        platform: &Platform,
        requester: &Requester,
    ) -> Option<ResolvedImage> {
        let proofs = self.proofs.lock().expect("no panic while it is held");
        let mut proofs = proofs.iter().filter(|it| it.at.elapsed() < PROOF_LIFE);
        let found = proofs.find(|it| {
            it.image == *image && it.platform == *platform && it.requester == *requester
        });
        found.map(|it| it.resolved.clone())
    }

    /// Returns the blobs of an image's repository, read on behalf of `requester`.
    pub fn blobs(&self, image: &ImageRef, requester: impl Into<Requester>) -> Arc<dyn BlobSource> {
        self.repository_blobs(image, &requester.into(), None)
    }

    /// Returns the blobs of an image, and the index that was pushed beside it: the one that is
    /// `pinned`, or else any that can be believed.
    pub fn image_blobs(
        &self,
        image: &ImageRef,
        requester: impl Into<Requester>,
        manifest: ManifestDigest,
        pinned: Option<ManifestDigest>,
    ) -> Arc<dyn BlobSource> {
        let options = self.pushed_indexes.clone();
        let indexes = options.map(|it| ImageIndexes::new(it, manifest, pinned));
        self.repository_blobs(image, &requester.into(), indexes)
    }

    fn repository_blobs(
        &self,
        image: &ImageRef,
        requester: &Requester,
        indexes: Option<ImageIndexes>,
    ) -> Arc<dyn BlobSource> {
        let session = self.session(image, requester);
        let identity = SourceIdentity {
            repository: format!("{}/{}", image.registry(), image.repository()),
            requester: self.requesters.hash_one(requester),
        };
        Arc::new(RepositoryBlobs::new(session, identity, indexes))
    }

    /// Pushes the indexes of an image's layers beside its manifest, authenticated if there is a key.
    ///
    /// # Errors
    /// [`PushError`], after the configured retries.
    ///
    /// # Cancellation
    /// Safe: blobs that nothing refers to are the registry's to remove.
    pub async fn push_index(
        &self,
        image: &ImageRef,
        requester: impl Into<Requester>,
        manifest: ManifestDigest,
        layers: &[LayerPush],
        key: Option<&IntegrityKey>,
    ) -> Result<Pushed, PushError> {
        let transport = Arc::clone(&self.transport);
        let session = Session::to_push(transport, image, &self.keyring, requester.into());
        push::push_index(&session, manifest, layers, key).await
    }

    /// The session that the image was resolved with, or another one.
    fn session(&self, image: &ImageRef, requester: &Requester) -> Arc<Session> {
        let known = {
            let sessions = self.sessions.lock().expect("no panic while it is held");
            let mut sessions = sessions.iter();
            sessions.find(|it| it.is_for(image, requester)).cloned()
        };
        known.unwrap_or_else(|| Arc::new(self.open_session(image, requester.clone())))
    }

    fn open_session(&self, image: &ImageRef, requester: Requester) -> Session {
        let transport = Arc::clone(&self.transport);
        Session::new(transport, image, &self.keyring, requester)
    }

    fn remember(&self, image: &ImageRef, requester: &Requester, session: Arc<Session>) {
        let mut sessions = self.sessions.lock().expect("no panic while it is held");
        sessions.retain(|it| !it.is_for(image, requester));
        if sessions.len() == MAX_SESSIONS {
            sessions.remove(0);
        }
        sessions.push(session);
    }
}

/// One image being resolved.
struct Resolving<'a> {
    session: &'a Session,
    image: &'a ImageRef,
    platform: &'a Platform,
    kept_configs: Option<&'a dyn KeptConfigs>,
    /// Who may answer for the first manifest, which proves the right to pull.
    proof: Route,
}

/// A document that was checked against its digest.
struct Checked<T> {
    parsed: T,
    digest: ManifestDigest,
    bytes: Bytes,
}

type ImageManifest = Checked<Box<OciImageManifest>>;

impl Checked<Manifest> {
    /// The image's manifest, or the index that it is instead.
    fn into_image(self) -> Result<ImageManifest, OciImageIndex> {
        match self.parsed {
            Manifest::Image(parsed) => Ok(Checked {
                parsed,
                digest: self.digest,
                bytes: self.bytes,
            }),
            Manifest::Index(index) => Err(index),
        }
    }
}

impl Resolving<'_> {
    async fn run(&self) -> Result<(ResolvedImage, ImageDocuments), SourceError> {
        let selector = self.image.manifest_selector();
        let top = self
            .manifest(&selector, self.image.digest(), self.proof)
            .await?;
        let manifest = match top.into_image() {
            Ok(manifest) => manifest,
            Err(index) => {
                let choice =
                    manifest::choose(&index, self.platform).map_err(|it| self.error(it))?;
                match choice {
                    Choice::Manifest(digest) => self.image_manifest(digest).await?,
                    Choice::Nested(nested) => self.nested(&nested).await?,
                    Choice::None(available) => return Err(self.wrong_platform(&available)),
                }
            }
        };
        let config = manifest::config_desc(&manifest.parsed).map_err(|it| self.error(it))?;
        let (config, config_bytes) = self.config(config).await?;
        if let Some(platform) = config.platform()
            && self.platform.fit(&platform).is_none()
        {
            return Err(self.wrong_platform(&[platform.to_string()]));
        }
        let max_layers = self.session.transport.config.max_layers;
        let layers =
            manifest::layers(&manifest.parsed, &config, max_layers).map_err(|it| self.error(it))?;
        let resolved = ResolvedImage {
            manifest: manifest.digest,
            layers,
        };
        let documents = ImageDocuments {
            manifest: manifest.bytes,
            config: config_bytes,
        };
        Ok((resolved, documents))
    }

    /// Looks into the indexes of an index, one level deep.
    async fn nested(&self, nested: &[ManifestDigest]) -> Result<ImageManifest, SourceError> {
        let mut seen = Vec::new();
        for digest in nested.iter().take(MAX_NESTED_INDEXES) {
            match self.by_digest(*digest).await?.into_image() {
                Ok(manifest) => return Ok(manifest),
                Err(index) => {
                    match manifest::choose(&index, self.platform).map_err(|it| self.error(it))? {
                        Choice::Manifest(digest) => return self.image_manifest(digest).await,
                        Choice::Nested(_) => {
                            return Err(self.error(Fault::Unsupported(
                                "its index nests indexes more than one level deep".to_owned(),
                            )));
                        }
                        Choice::None(available) => seen.extend(available),
                    }
                }
            }
        }
        Err(self.wrong_platform(&seen))
    }

    /// Gets a manifest that must be an image's.
    async fn image_manifest(&self, digest: ManifestDigest) -> Result<ImageManifest, SourceError> {
        self.by_digest(digest)
            .await?
            .into_image()
            .map_err(|_index| {
                self.error(Fault::Unsupported(
                    "its index has another index where an image should be".to_owned(),
                ))
            })
    }

    /// Gets a manifest or an index that a checked index names.
    async fn by_digest(&self, digest: ManifestDigest) -> Result<Checked<Manifest>, SourceError> {
        self.manifest(&digest.to_string(), Some(digest), Route::MirrorsFirst)
            .await
    }

    /// Gets a manifest or an index, checked against its digest.
    async fn manifest(
        &self,
        selector: &str,
        expected: Option<ManifestDigest>,
        route: Route,
    ) -> Result<Checked<Manifest>, SourceError> {
        let object = Object {
            op: Op::Manifest,
            path: format!("manifests/{selector}"),
            what: format!("image {}", self.image),
        };
        let form = Form {
            accept: Some(manifest::ACCEPT),
            max_len: self.session.transport.config.max_manifest_len(),
        };
        let check = |document: Document| {
            let digest = ManifestDigest::of(&document.bytes);
            let claimed = document
                .digest_header
                .as_deref()
                .and_then(|it| it.parse().ok());
            if let Some(wanted) = expected.or(claimed)
                && wanted != digest
            {
                let reason = format!(
                    "the manifest of {} has digest {digest}, not {wanted}",
                    self.image
                );
                return Err(protocol(&document.host, reason));
            }
            let manifest = manifest::parse(&document.bytes, document.content_type.as_deref())
                .map_err(|it| self.error(it))?;
            Ok(Checked {
                parsed: manifest,
                digest,
                bytes: document.bytes,
            })
        };
        self.session.document(&object, form, route, check).await
    }

    /// Gets the image's configuration, checked against its digest.
    async fn config(
        &self,
        config: manifest::ConfigDesc,
    ) -> Result<(manifest::ImageConfig, Bytes), SourceError> {
        let settings = &self.session.transport.config;
        if settings.max_manifest_bytes < config.size_bytes {
            return Err(self.error(Fault::Unsupported(format!(
                "its configuration has {} bytes, more than max_manifest_bytes = {}: raise the limit if the image is trusted",
                config.size_bytes, settings.max_manifest_bytes
            ))));
        }
        if let Some(kept) = self.kept_config(&config.digest).await {
            return Ok(kept);
        }
        let object = Object {
            op: Op::Config,
            path: format!("blobs/{}", config.digest),
            what: format!("the configuration of image {}", self.image),
        };
        let form = Form {
            accept: None,
            max_len: usize::try_from(config.size_bytes).unwrap_or(usize::MAX),
        };
        let check = |document: Document| {
            let digest = BlobDigest::of(&document.bytes);
            if digest != config.digest {
                let reason = format!("{} has digest {digest}, not {}", object.what, config.digest);
                return Err(protocol(&document.host, reason));
            }
            let parsed = manifest::parse_config(&document.bytes).map_err(|it| self.error(it))?;
            Ok((parsed, document.bytes))
        };
        self.session
            .document(&object, form, Route::MirrorsFirst, check)
            .await
    }

    /// The image's configuration, if it was kept where it is nearer.
    async fn kept_config(&self, digest: &BlobDigest) -> Option<(manifest::ImageConfig, Bytes)> {
        // Not the size that the manifest gives: one that lies must not have it thrown away as too large.
        let max_bytes = self.session.transport.config.max_manifest_len();
        let bytes = self.kept_configs?.config(digest, max_bytes).await?;
        let parsed = manifest::parse_config(&bytes).ok()?;
        (BlobDigest::of(&bytes) == *digest).then_some((parsed, bytes))
    }

    fn error(&self, fault: Fault) -> SourceError {
        match fault {
            Fault::Unsupported(reason) => unsupported(format!("image {}", self.image), reason),
            Fault::Wrong(reason) => protocol(
                &self.session.registry,
                format!("image {}: {reason}", self.image),
            ),
        }
    }

    fn wrong_platform(&self, available: &[String]) -> SourceError {
        let available = if available.is_empty() {
            "none".to_owned()
        } else {
            // Bounded, because an index may name thousands.
            available
                .iter()
                .take(20)
                .cloned()
                .collect::<Vec<_>>()
                .join(", ")
        };
        SourceError::WrongPlatform {
            image: self.image.to_string(),
            wanted: self.platform.to_string(),
            available,
        }
        .shortened()
    }
}
