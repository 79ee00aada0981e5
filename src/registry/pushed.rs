//! Finds the index that was pushed beside an image, decides whether to believe it, and reads it.
//!
//! Believed is what the installation's key vouches for; and, if the configuration says so, what a
//! volume pins by its digest. Not more, because a layer is shared by all volumes of a node: what is
//! believed for one is served to all.
//!
//! What is found is kept for as long as the image's blobs are: its layers share one look. Without a pin
//! nothing that goes wrong here is an error, since the layers can be read without.

use std::{io::Read as _, sync::Arc, time::Duration};

use bytes::Bytes;
use oci_client::manifest::OCI_IMAGE_MEDIA_TYPE;
use tokio::{sync::OnceCell, time::timeout};

use super::{
    artifact::{Artifact, Part, PartKind},
    manifest::{self, Fault, Manifest},
    session::{Document, Form, Object, Route, Session},
    transport::{Op, protocol, unavailable},
};
use crate::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    integrity::IntegrityKey,
    tier::{PushedIndex, SourceError},
};

/// How long looking for an index may take, of which nobody said that there is one.
///
/// Two or three requests; a registry that takes longer is better asked for the layer.
const LOOK_DEADLINE: Duration = Duration::from_secs(10);

/// How long reading a layer's part of it may take then.
const READ_DEADLINE: Duration = Duration::from_secs(30);

/// Largest access map that is taken.
const MAX_ACCESS_MAP_BYTES: u64 = 64 << 20;

/// log2 of the largest zstd window that is taken: 8 MiB, as for layers.
const MAX_WINDOW_LOG: u32 = 23;

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

    /// Returns the index of a layer; see [`BlobSource::layer_index`](crate::tier::BlobSource::layer_index).
    pub(crate) async fn layer_index(
        &self,
        session: &Session,
        layer: &DiffId,
    ) -> Result<Option<PushedIndex>, SourceError> {
        let read = self.read(session, layer).await;
        let outcome = match &read {
            Ok(Some(_)) => Outcome::Hit,
            Ok(None) => Outcome::Miss,
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
                Ok(None)
            }
        }
    }

    async fn read(
        &self,
        session: &Session,
        layer: &DiffId,
    ) -> Result<Option<PushedIndex>, Unusable> {
        let found = self
            .found
            .get_or_init(|| self.find(session))
            .await
            .clone()?;
        let Some(artifact) = found else {
            return Ok(None);
        };
        let read = self.read_layer(session, &artifact, layer);
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
            Fault::Unsupported(reason) => SourceError::Unsupported {
                what: object.what.clone(),
                reason,
            },
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

    /// Reads what the artifact has about a layer.
    async fn read_layer(
        &self,
        session: &Session,
        artifact: &Artifact,
        layer: &DiffId,
    ) -> Result<Option<PushedIndex>, SourceError> {
        let Some(part) = artifact.part(PartKind::LayerIndex, layer) else {
            return Ok(None);
        };
        let max_index_bytes = self.options.max_index_bytes;
        // zstd makes nothing larger than it was, but for some bytes of framing.
        let compressed = blob(session, part, max_index_bytes).await?;
        let what = format!("the index of layer {layer}");
        let unpacked =
            tokio::task::spawn_blocking(move || decompress(&compressed, max_index_bytes))
                .await
                .map_err(|error| unavailable(&session.registry, format!("{what}: {error}")))?;
        let index =
            unpacked.map_err(|reason| protocol(&session.registry, format!("{what} {reason}")))?;
        let access_map = match artifact.part(PartKind::AccessMap, layer) {
            Some(part) => Some(blob(session, part, MAX_ACCESS_MAP_BYTES).await?),
            None => None,
        };
        Ok(Some(PushedIndex { index, access_map }))
    }
}

fn late(session: &Session, waited: Duration) -> Unusable {
    let reason = format!("no index within {} s", waited.as_secs());
    unavailable(&session.registry, reason).into()
}

/// Gets a blob of the artifact, checked against its digest.
async fn blob(session: &Session, part: &Part, max_bytes: u64) -> Result<Bytes, SourceError> {
    let object = Object {
        op: Op::Index,
        path: format!("blobs/{}", part.digest),
        what: format!("blob {} of the index of layer {}", part.digest, part.layer),
    };
    if max_bytes < part.size_bytes {
        return Err(SourceError::Unsupported {
            what: object.what,
            reason: format!("it has {} bytes, {max_bytes} are allowed", part.size_bytes),
        });
    }
    let form = Form {
        accept: None,
        max_len: usize::try_from(part.size_bytes).unwrap_or(usize::MAX),
    };
    let check = |document: Document| {
        let digest = BlobDigest::of(&document.bytes);
        if digest != part.digest {
            let reason = format!("{} has digest {digest}", object.what);
            return Err(protocol(&document.host, reason));
        }
        Ok(document.bytes)
    };
    let route = Route::MirrorsFirst;
    session.document(&object, form, route, check).await
}

/// Decompresses an index of at most `max_bytes`; says what is wrong with it.
fn decompress(compressed: &[u8], max_bytes: u64) -> Result<Bytes, String> {
    let broken = |error: std::io::Error| format!("cannot be decompressed: {error}");
    let mut decoder = zstd::stream::read::Decoder::new(compressed).map_err(broken)?;
    decoder.window_log_max(MAX_WINDOW_LOG).map_err(broken)?;
    let mut index = Vec::new();
    let mut bounded = decoder.take(max_bytes.saturating_add(1));
    bounded.read_to_end(&mut index).map_err(broken)?;
    if u64::try_from(index.len()).is_ok_and(|it| max_bytes < it) {
        return Err(format!(
            "is longer than cache.max_layer_index_bytes = {max_bytes}"
        ));
    }
    Ok(index.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bomb_is_refused_and_what_is_broken_told() {
        let plain = vec![7; 1 << 20];
        let packed = zstd::bulk::compress(&plain, 3).unwrap();
        assert_eq!(decompress(&packed, 1 << 20).unwrap(), plain);
        let error = decompress(&packed, (1 << 20) - 1).unwrap_err();
        assert_eq!(
            error,
            "is longer than cache.max_layer_index_bytes = 1048575"
        );
        for broken in [&packed[..packed.len() - 1], &b"no zstd"[..], &packed[1..]] {
            let error = decompress(broken, 1 << 20).unwrap_err();
            assert!(error.starts_with("cannot be decompressed"), "{error}");
        }
    }
}
