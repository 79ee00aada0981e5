//! Finds the index that was pushed beside an image, decides whether to believe it, and reads it.
//!
//! Believed is what the installation's key vouches for; and, if the configuration says so, what a
//! volume pins by its digest. Not more, because a layer is shared by all volumes of a node: what is
//! believed for one is served to all.
//!
//! What is found is kept for as long as the image's blobs are: its layers share one look. Without a pin
//! nothing that goes wrong here is an error, since the layers can be read without.

use std::{sync::Arc, time::Duration};

use oci_client::manifest::OCI_IMAGE_MEDIA_TYPE;
use sha2::{Digest as _, Sha256};
use tokio::{sync::OnceCell, time::timeout};

use super::{
    artifact::{Artifact, Part, PartKind},
    blob::BlobReader,
    manifest::{self, Fault, Manifest},
    session::{Document, Form, Object, Route, Session},
    transport::{Op, protocol, unavailable, unsupported},
    unpack::Unpack,
};
use crate::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    integrity::IntegrityKey,
    tier::{KeepPushed, PushedPart, SourceError},
};

/// How long looking for an index may take, of which nobody said that there is one.
///
/// Two or three requests; a registry that takes longer is better asked for the layer.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);

/// How long reading a layer's part of it may take then.
const READ_DEADLINE: Duration = Duration::from_secs(30);

/// Largest access map that is taken.
const MAX_ACCESS_MAP_BYTES: u64 = 64 << 20;

/// What is believed of pushed indexes.
#[derive(Debug, Clone)]
pub struct PushedIndexOptions {
    /// The installation's key.
    pub key: Option<IntegrityKey>,
    /// Bytes of a layer's index at most, decompressed.
    pub max_index_bytes: u64,
}

/// How a look for a layer's index ended: the label `outcome`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Hit,
    Miss,
    Untrusted,
    Error,
}

impl Outcome {
    const fn label(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Untrusted => "untrusted",
            Self::Error => "error",
        }
    }
}

/// Why an artifact is not used.
#[derive(Debug, Clone)]
enum Unusable {
    /// It is not there, or not what it should be.
    Source(SourceError),
    /// Nobody who is believed vouches for it.
    Untrusted(SourceError),
}

impl From<SourceError> for Unusable {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

type Found = Result<Option<Arc<Artifact>>, Unusable>;

/// The index of one image.
#[derive(Debug)]
pub(crate) struct ImageIndexes {
    options: PushedIndexOptions,
    image: ManifestDigest,
    /// The artifact that whoever wants the image demands.
    pinned: Option<ManifestDigest>,
    found: OnceCell<Found>,
}

impl ImageIndexes {
    pub(crate) fn new(
        options: PushedIndexOptions,
        image: ManifestDigest,
        pinned: Option<ManifestDigest>,
    ) -> Self {
        Self {
            options,
            image,
            pinned,
            found: OnceCell::new(),
        }
    }

    /// Whether a certain one is demanded.
    pub(crate) fn is_pinned(&self) -> bool {
        self.pinned.is_some()
    }

    /// Has the index of a layer kept; see [`BlobSource::layer_index`](crate::tier::BlobSource::layer_index).
    pub(crate) async fn layer_index(
        &self,
        session: &Arc<Session>,
        layer: &DiffId,
        keep: &mut dyn KeepPushed,
    ) -> Result<bool, SourceError> {
        let read = self.read(session, layer, keep).await;
        let outcome = match &read {
            Ok(true) => Outcome::Hit,
            Ok(false) => Outcome::Miss,
            Err(Unusable::Untrusted(_)) => Outcome::Untrusted,
            Err(Unusable::Source(_)) => Outcome::Error,
        };
        let metrics = &session.transport.metrics;
        metrics
            .pushed_index_lookups
            .with_label_values(&[outcome.label()])
            .inc();
        match read {
            Ok(read) => Ok(read),
            Err(Unusable::Source(error) | Unusable::Untrusted(error)) if self.pinned.is_some() => {
                Err(error)
            }
            Err(Unusable::Source(error) | Unusable::Untrusted(error)) => {
                tracing::debug!(layer.diff_id = %layer, image.manifest = %self.image, %error,
                    "index in the registry is not used");
                Ok(false)
            }
        }
    }

    async fn read(
        &self,
        session: &Arc<Session>,
        layer: &DiffId,
        keep: &mut dyn KeepPushed,
    ) -> Result<bool, Unusable> {
        let found = self
            .found
            .get_or_init(|| self.find(session))
            .await
            .clone()?;
        let Some(artifact) = found else {
            return Ok(false);
        };
        let read = self.read_layer(session, &artifact, layer, keep);
        if self.pinned.is_some() {
            return Ok(read.await?);
        }
        match timeout(READ_DEADLINE, read).await {
            Ok(read) => Ok(read?),
            Err(_) => Err(late(session, READ_DEADLINE)),
        }
    }

    async fn find(&self, session: &Session) -> Found {
        if let Some(digest) = self.pinned {
            return self.artifact(session, digest).await.map(Some);
        }
        // Without a key nothing could be believed.
        if self.options.key.is_none() {
            return Ok(None);
        }
        match timeout(LOOK_DEADLINE, self.discover(session)).await {
            Ok(found) => found,
            Err(_) => Err(late(session, LOOK_DEADLINE)),
        }
    }

    /// Looks through what refers to the image for an artifact that can be believed.
    async fn discover(&self, session: &Session) -> Found {
        let candidates = session.index_candidates(&self.image).await?;
        let mut unusable = None;
        for digest in candidates {
            match self.artifact(session, digest).await {
                Ok(artifact) => return Ok(Some(artifact)),
                Err(why) => {
                    let (Unusable::Source(error) | Unusable::Untrusted(error)) = &why;
                    tracing::debug!(artifact = %digest, %error, "artifact is not used");
                    // That there was something to distrust is worth more than the rest.
                    if !matches!(unusable, Some(Unusable::Untrusted(_))) {
                        unusable = Some(why);
                    }
                }
            }
        }
        unusable.map_or(Ok(None), Err)
    }

    /// Gets an artifact, if it is the image's and can be believed.
    async fn artifact(
        &self,
        session: &Session,
        digest: ManifestDigest,
    ) -> Result<Arc<Artifact>, Unusable> {
        let object = Object {
            op: Op::Index,
            path: format!("manifests/{digest}"),
            what: format!("index {digest}"),
        };
        let form = Form {
            accept: Some(OCI_IMAGE_MEDIA_TYPE),
            max_len: session.transport.config.max_manifest_len(),
        };
        let error = |host: &str, fault| match fault {
            Fault::Unsupported(reason) => unsupported(object.what.clone(), reason),
            Fault::Wrong(reason) => protocol(host, format!("{}: {reason}", object.what)),
        };
        let check = |document: Document| {
            let has = ManifestDigest::of(&document.bytes);
            if has != digest {
                let reason = format!("{} has digest {has}", object.what);
                return Err(protocol(&document.host, reason));
            }
            let parsed = manifest::parse(&document.bytes, document.content_type.as_deref());
            let artifact = parsed.and_then(|it| match it {
                Manifest::Image(manifest) => Artifact::parse(&manifest),
                Manifest::Index(_) => Err(Fault::Unsupported("it is an image index".to_owned())),
            });
            artifact.map_err(|fault| error(&document.host, fault))
        };
        let route = Route::MirrorsFirst;
        let artifact = session.document(&object, form, route, check).await?;
        if artifact.subject != self.image {
            let reason = format!(
                "it is of image manifest {}, not of {}: correct indexDigest",
                artifact.subject, self.image
            );
            return Err(Unusable::Untrusted(SourceError::Unsupported {
                what: object.what,
                reason,
            }));
        }
        if !self.is_believed(session, &artifact) {
            let reason = "it is not authenticated by this installation's key: push it again with \
                          remote.hmac_key_file set, or set registry.trust_pinned_indexes";
            return Err(Unusable::Untrusted(SourceError::Unsupported {
                what: object.what,
                reason: reason.to_owned(),
            }));
        }
        Ok(Arc::new(artifact))
    }

    fn is_believed(&self, session: &Session, artifact: &Artifact) -> bool {
        let key = self.options.key.as_ref();
        key.is_some_and(|it| artifact.is_authenticated_by(it))
            || (self.pinned.is_some() && session.transport.config.trust_pinned_indexes)
    }

    /// Reads what the artifact has about a layer; `false` if that is nothing.
    async fn read_layer(
        &self,
        session: &Arc<Session>,
        artifact: &Artifact,
        layer: &DiffId,
        keep: &mut dyn KeepPushed,
    ) -> Result<bool, SourceError> {
        let Some(index) = artifact.part(PartKind::LayerIndex, layer) else {
            return Ok(false);
        };
        read_part(session, index, self.options.max_index_bytes, keep).await?;
        if let Some(map) = artifact.part(PartKind::AccessMap, layer) {
            read_part(session, map, MAX_ACCESS_MAP_BYTES, keep).await?;
        }
        Ok(true)
    }
}

fn late(session: &Session, waited: Duration) -> Unusable {
    let reason = format!("no index within {} s", waited.as_secs());
    unavailable(&session.registry, reason).into()
}

/// Why a part of an artifact is not kept.
enum Failed {
    /// It is not what the artifact names; why not.
    Wrong(String),
    Source(SourceError),
}

impl From<SourceError> for Failed {
    fn from(error: SourceError) -> Self {
        Self::Source(error)
    }
}

/// Has a part of the artifact kept, of at most `max_bytes`; a mirror that has something else is passed over.
async fn read_part(
    session: &Arc<Session>,
    part: &Part,
    max_bytes: u64,
    keep: &mut dyn KeepPushed,
) -> Result<(), SourceError> {
    let object = Object {
        op: Op::Index,
        path: format!("blobs/{}", part.digest),
        what: format!("blob {} of the index of layer {}", part.digest, part.layer),
    };
    // zstd makes nothing larger than it was, but for some bytes of framing.
    if max_bytes < part.size_bytes {
        return Err(SourceError::Unsupported {
            what: object.what,
            reason: format!("it has {} bytes, {max_bytes} are allowed", part.size_bytes),
        });
    }
    // Beyond all mirrors is the registry.
    let mut hosts = vec![usize::MAX];
    if session.has_mirrors() {
        hosts.push(session.next_endpoint(0));
    }
    loop {
        let nth = hosts.pop().unwrap_or(usize::MAX);
        match read_from(session, nth, &object, part, max_bytes, keep).await {
            Ok(()) => return Ok(()),
            Err(Failed::Source(error)) => return Err(error),
            Err(Failed::Wrong(reason)) if hosts.is_empty() => {
                let reason = format!("{} {reason}", object.what);
                return Err(protocol(&session.registry, reason));
            }
            Err(Failed::Wrong(_)) => {}
        }
    }
}

/// Reads a part from the `nth` host on.
async fn read_from(
    session: &Arc<Session>,
    nth: usize,
    object: &Object,
    part: &Part,
    max_bytes: u64,
    keep: &mut dyn KeepPushed,
) -> Result<(), Failed> {
    let kept = |done: std::io::Result<()>| {
        done.map_err(|error| unavailable(&session.registry, format!("keeping an index: {error}")))
    };
    let (kind, mut unpack) = match part.kind {
        PartKind::LayerIndex => (PushedPart::Index, Some(Unpack::new(max_bytes))),
        PartKind::AccessMap => (PushedPart::AccessMap, None),
    };
    kept(keep.begin(kind))?;
    let whole = 0..part.size_bytes;
    let session = Arc::clone(session);
    let mut reader = BlobReader::new(session, object.clone(), part.size_bytes, whole, nth)?;
    let mut hasher = Sha256::new();
    while let Some(bytes) = reader.next().await? {
        hasher.update(&bytes);
        match &mut unpack {
            None => kept(keep.take(&bytes))?,
            Some(unpack) => {
                let mut left = &bytes[..];
                while let Some(unpacked) = unpack.next(&mut left).map_err(Failed::Wrong)? {
                    kept(keep.take(unpacked))?;
                }
            }
        }
    }
    let digest = BlobDigest::from_bytes(hasher.finalize().into());
    if digest != part.digest {
        return Err(Failed::Wrong(format!("has digest {digest}")));
    }
    unpack.map_or(Ok(()), Unpack::finish).map_err(Failed::Wrong)
}
