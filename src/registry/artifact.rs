//! The artifact that carries an image's layer indexes beside it: pure, no I/O, and the input is hostile.
//!
//! An image manifest with an `artifactType`, an empty configuration and a `subject` (OCI image-spec
//! v1.1, `manifest.md`, "Guidelines for Artifact Usage"), specified in `docs/INDEX_FORMAT.md`. Where a
//! registry has no referrers API, a tag made of the subject's digest lists what refers to it (OCI
//! distribution-spec v1.1, "Referrers Tag Schema").
//!
//! Trust: the authentication code covers the subject and every blob, so that an artifact says nothing
//! about another image, and no blob can be replaced.

use std::collections::BTreeMap;

use oci_client::manifest::{
    OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE, OciDescriptor, OciImageIndex,
    OciImageManifest,
};
use serde_json::{Value, json};

use super::manifest::Fault;
use crate::{
    digest::{BlobDigest, DiffId, ManifestDigest, from_hex, to_hex},
    integrity::{IntegrityKey, TAG_BYTES},
};

/// The type of the artifact; another layout gets another one.
pub(crate) const ARTIFACT_TYPE: &str = "application/vnd.clip-csi.index.v1";

/// A layer's index, zstd-compressed.
const LAYER_INDEX_MEDIA_TYPE: &str = "application/vnd.clip-csi.layer-index.v1+zstd";

/// A layer's access map, as it is.
const ACCESS_MAP_MEDIA_TYPE: &str = "application/vnd.clip-csi.access-map.v1";

/// The configuration of what has none, and its type.
pub(crate) const EMPTY_CONFIG: &[u8] = b"{}";
const EMPTY_CONFIG_MEDIA_TYPE: &str = "application/vnd.oci.empty.v1+json";

/// Annotations of a blob: the layer that it is about, and that layer's blob.
const DIFF_ID: &str = "dev.clip-csi.layer.diff-id";
const LAYER_BLOB: &str = "dev.clip-csi.layer.blob";

/// Annotation of the artifact: its authentication code, hexadecimal.
const AUTHENTICATION: &str = "dev.clip-csi.hmac-sha256";

/// First bytes of what is authenticated: no other kind of content begins so.
const AUTHENTICATED_MAGIC: &[u8] = b"clip-csi.index.v1\0";

/// Artifacts of one image that are looked at, at most: who may push can push any number.
const MAX_CANDIDATES: usize = 4;

/// Largest blob of an artifact that is believed, whatever the configuration allows.
const MAX_BLOB_BYTES: u64 = 1 << 32;

/// What a blob of the artifact is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PartKind {
    LayerIndex,
    AccessMap,
}

impl PartKind {
    const fn media_type(self) -> &'static str {
        match self {
            Self::LayerIndex => LAYER_INDEX_MEDIA_TYPE,
            Self::AccessMap => ACCESS_MAP_MEDIA_TYPE,
        }
    }

    /// How it is authenticated.
    const fn code(self) -> u8 {
        match self {
            Self::LayerIndex => 1,
            Self::AccessMap => 2,
        }
    }
}

/// One blob of the artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) kind: PartKind,
    /// The layer that it is about.
    pub(crate) layer: DiffId,
    /// The blob that the layer was read from.
    pub(crate) layer_blob: BlobDigest,
    /// Its own digest.
    pub(crate) digest: BlobDigest,
    pub(crate) size_bytes: u64,
}

/// A manifest as others refer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) media_type: String,
    pub(crate) digest: ManifestDigest,
    pub(crate) size_bytes: u64,
}

/// An artifact's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Artifact {
    pub(crate) subject: ManifestDigest,
    pub(crate) parts: Vec<Part>,
    tag: Option<[u8; TAG_BYTES]>,
}

impl Artifact {
    /// Reads an artifact out of a manifest.
    pub(crate) fn parse(manifest: &OciImageManifest) -> Result<Self, Fault> {
        if manifest.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
            return Err(Fault::Unsupported(format!(
                "it is no index of this driver, whose artifactType is {ARTIFACT_TYPE}"
            )));
        }
        let wrong = |text: &str| Fault::Wrong(format!("the artifact {text}"));
        let subject = manifest
            .subject
            .as_ref()
            .and_then(|it| it.digest.parse().ok())
            .ok_or_else(|| wrong("has no usable subject"))?;
        let mut parts = Vec::new();
        for blob in &manifest.layers {
            let kind = match blob.media_type.as_str() {
                LAYER_INDEX_MEDIA_TYPE => PartKind::LayerIndex,
                ACCESS_MAP_MEDIA_TYPE => PartKind::AccessMap,
                // What a later release adds is not used by this one.
                _ => continue,
            };
            parts.push(part(kind, blob).ok_or_else(|| wrong("describes a blob wrongly"))?);
        }
        let tag = match annotation(manifest.annotations.as_ref(), AUTHENTICATION) {
            Some(text) => {
                Some(from_hex(text).ok_or_else(|| wrong("has a malformed authentication code"))?)
            }
            None => None,
        };
        Ok(Self {
            subject,
            parts,
            tag,
        })
    }

    /// Whether the installation's key vouches for it.
    pub(crate) fn is_authenticated_by(&self, key: &IntegrityKey) -> bool {
        let content = authenticated(&self.subject, &self.parts);
        self.tag.is_some_and(|tag| key.verifies(&content, &tag))
    }

    /// The blob of a kind about a layer.
    pub(crate) fn part(&self, kind: PartKind, layer: &DiffId) -> Option<&Part> {
        let mut parts = self.parts.iter();
        parts.find(|it| it.kind == kind && it.layer == *layer)
    }
}

fn part(kind: PartKind, blob: &OciDescriptor) -> Option<Part> {
    let size_bytes = u64::try_from(blob.size).ok()?;
    if MAX_BLOB_BYTES < size_bytes {
        return None;
    }
    let annotations = blob.annotations.as_ref();
    Some(Part {
        kind,
        layer: annotation(annotations, DIFF_ID)?.parse().ok()?,
        layer_blob: annotation(annotations, LAYER_BLOB)?.parse().ok()?,
        digest: blob.digest.parse().ok()?,
        size_bytes,
    })
}

fn annotation<'a>(from: Option<&'a BTreeMap<String, String>>, name: &str) -> Option<&'a str> {
    from?.get(name).map(String::as_str)
}

/// What the authentication code is of. Every field has a fixed length, so that no two artifacts have
/// the same.
fn authenticated(subject: &ManifestDigest, parts: &[Part]) -> Vec<u8> {
    let mut content = Vec::from(AUTHENTICATED_MAGIC);
    content.extend(subject.as_bytes());
    for part in parts {
        content.push(part.kind.code());
        content.extend(part.layer.as_bytes());
        content.extend(part.layer_blob.as_bytes());
        content.extend(part.digest.as_bytes());
        content.extend(part.size_bytes.to_le_bytes());
    }
    content
}

/// Writes the artifact's manifest; the same content gives the same bytes.
pub(crate) fn encode(subject: &Subject, parts: &[Part], key: Option<&IntegrityKey>) -> Vec<u8> {
    let layers: Vec<Value> = parts
        .iter()
        .map(|it| {
            json!({
                "mediaType": it.kind.media_type(), "digest": it.digest, "size": it.size_bytes,
                "annotations": {DIFF_ID: it.layer, LAYER_BLOB: it.layer_blob},
            })
        })
        .collect();
    let mut manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_IMAGE_MEDIA_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {
            "mediaType": EMPTY_CONFIG_MEDIA_TYPE,
            "digest": BlobDigest::of(EMPTY_CONFIG), "size": EMPTY_CONFIG.len(),
        },
        "layers": layers,
        "subject": {
            "mediaType": subject.media_type, "digest": subject.digest, "size": subject.size_bytes,
        },
    });
    if let Some(key) = key {
        let tag = key.tag(&authenticated(&subject.digest, parts));
        manifest["annotations"] = json!({AUTHENTICATION: to_hex(&tag)});
    }
    manifest.to_string().into_bytes()
}

/// The tag that lists what refers to a manifest, where a registry has no referrers API.
pub(crate) fn fallback_tag(subject: &ManifestDigest) -> String {
    format!("sha256-{}", subject.hex())
}

/// Chooses the artifacts worth looking at from what refers to an image: those that claim to be
/// authenticated first, then the latest, which is the last.
pub(crate) fn candidates(referrers: &OciImageIndex, max_bytes: u64) -> Vec<ManifestDigest> {
    let is_ours = |it: &&oci_client::manifest::ImageIndexEntry| {
        it.artifact_type.as_deref() == Some(ARTIFACT_TYPE)
            && it.media_type == OCI_IMAGE_MEDIA_TYPE
            && u64::try_from(it.size).is_ok_and(|size| size <= max_bytes)
    };
    let ours = referrers.manifests.iter().rev().filter(is_ours);
    let (mut chosen, others): (Vec<_>, Vec<_>) =
        ours.partition(|it| annotation(it.annotations.as_ref(), AUTHENTICATION).is_some());
    chosen.extend(others);
    let digests = chosen.into_iter().filter_map(|it| it.digest.parse().ok());
    digests.take(MAX_CANDIDATES).collect()
}

/// Adds the artifact with `manifest` to what the fallback tag lists, `None` if it is listed already.
///
/// `listed` is what the tag has now, if there is one; what others have put there stays as it is.
pub(crate) fn with_referrer(
    listed: Option<&[u8]>,
    manifest: &[u8],
) -> Result<Option<Vec<u8>>, Fault> {
    let no_index = || {
        Fault::Unsupported("the tag that lists what refers to it is no index: remove it".to_owned())
    };
    let mut index = match listed {
        Some(bytes) => serde_json::from_slice(bytes).map_err(|_| no_index())?,
        None => json!({
            "schemaVersion": 2, "mediaType": OCI_IMAGE_INDEX_MEDIA_TYPE, "manifests": [],
        }),
    };
    let manifests = index.get_mut("manifests").and_then(Value::as_array_mut);
    let manifests = manifests.ok_or_else(no_index)?;
    let digest = ManifestDigest::of(manifest).to_string();
    if manifests
        .iter()
        .any(|it| it.get("digest").and_then(Value::as_str) == Some(digest.as_str()))
    {
        return Ok(None);
    }
    let mut descriptor = json!({
        "mediaType": OCI_IMAGE_MEDIA_TYPE, "digest": digest, "size": manifest.len(),
        "artifactType": ARTIFACT_TYPE,
    });
    let parsed: Value = serde_json::from_slice(manifest)
        .map_err(|error| Fault::Wrong(format!("the artifact is not JSON: {error}")))?;
    if let Some(annotations) = parsed.get("annotations") {
        descriptor["annotations"] = annotations.clone();
    }
    manifests.push(descriptor);
    Ok(Some(index.to_string().into_bytes()))
}

#[cfg(test)]
mod tests;
