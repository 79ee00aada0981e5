//! Reads manifests, indexes and image configurations: pure, no I/O, and the input is hostile.
//!
//! Follows the OCI image-spec v1.1 (`manifest.md`, `image-index.md`, `config.md`) and Docker's
//! image manifest version 2, schema 2. The structs are oci-client's; which of them applies is
//! decided here, because its untagged enum would take a document that is both.

use std::collections::BTreeSet;

use oci_client::manifest::{
    IMAGE_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_CONFIG_MEDIA_TYPE, IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE,
    IMAGE_DOCKER_LAYER_TAR_MEDIA_TYPE, IMAGE_LAYER_GZIP_MEDIA_TYPE, IMAGE_LAYER_MEDIA_TYPE,
    IMAGE_MANIFEST_LIST_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_INDEX_MEDIA_TYPE,
    OCI_IMAGE_MEDIA_TYPE, OciDescriptor, OciImageIndex, OciImageManifest,
};
use serde::{Deserialize, de::IgnoredAny};

use super::{
    platform::{Fit, Platform},
    toc,
};
use crate::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    tier::LayerDesc,
};

/// What to accept: a registry says 404 to a manifest whose type is missing here.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// Largest blob that is believed: the largest image on Docker Hub has layers of some 100 GB.
const MAX_BLOB_BYTES: u64 = 1 << 40;

/// Says why a document is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is something else than an image that can be mounted.
    Unsupported(String),
    /// It breaks its specification.
    Wrong(String),
}

/// A parsed manifest.
#[derive(Debug)]
pub(crate) enum Manifest {
    Image(Box<OciImageManifest>),
    Index(OciImageIndex),
}

/// What an index offers for a platform.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// This manifest.
    Manifest(ManifestDigest),
    /// Nothing, but these indexes are nested in it.
    Nested(Vec<ManifestDigest>),
    /// Nothing; it has these platforms.
    None(Vec<String>),
}

/// The digest and size of an image's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConfigDesc {
    pub(crate) digest: BlobDigest,
    pub(crate) size_bytes: u64,
}

/// The fields that tell kinds of manifests apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    schema_version: Option<i64>,
    media_type: Option<String>,
    config: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    manifests: Option<IgnoredAny>,
    fs_layers: Option<IgnoredAny>,
}

/// The fields of an image's configuration that matter here.
#[derive(Debug, Deserialize)]
pub(crate) struct ImageConfig {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    variant: Option<String>,
    rootfs: Option<RootFs>,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Parses a manifest or an index.
///
/// The type is the document's own `mediaType`, else the answer's `Content-Type`, else what its
/// fields look like; a document with the fields of both kinds is refused (CVE-2021-41190).
pub(crate) fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Manifest, Fault> {
    let shape: Shape = serde_json::from_slice(bytes).map_err(|error| {
        Fault::Wrong(format!("the manifest is not JSON of a manifest: {error}"))
    })?;
    if shape.schema_version == Some(1) || shape.fs_layers.is_some() {
        return Err(Fault::Unsupported(
            "it is an image of schema 1, which is obsolete: push it again with a current tool"
                .to_owned(),
        ));
    }
    if shape.schema_version != Some(2) {
        return Err(Fault::Wrong(
            "the manifest's schemaVersion is not 2".to_owned(),
        ));
    }
    let looks_like_image = shape.layers.is_some() || shape.config.is_some();
    let looks_like_index = shape.manifests.is_some();
    let header_type = content_type.map(|it| it.split(';').next().unwrap_or(it).trim());
    let media_type = shape.media_type.as_deref().filter(|it| !it.is_empty());
    let is_index = match media_type.or(header_type) {
        Some(IMAGE_MANIFEST_MEDIA_TYPE | OCI_IMAGE_MEDIA_TYPE) => false,
        Some(IMAGE_MANIFEST_LIST_MEDIA_TYPE | OCI_IMAGE_INDEX_MEDIA_TYPE) => true,
        Some(other) if media_type.is_some() => {
            return Err(Fault::Unsupported(format!(
                "it has the manifest type {:?}, which is no image's",
                shorten(other)
            )));
        }
        // A server that says text/plain or nothing: the fields decide.
        Some(_) | None => looks_like_index,
    };
    if (looks_like_image, looks_like_index) != (!is_index, is_index) {
        return Err(Fault::Wrong(
            "the manifest is not what its media type says, or two kinds at once".to_owned(),
        ));
    }
    let wrong =
        |error: serde_json::Error| Fault::Wrong(format!("the manifest is malformed: {error}"));
    if is_index {
        return Ok(Manifest::Index(
            serde_json::from_slice(bytes).map_err(wrong)?,
        ));
    }
    Ok(Manifest::Image(Box::new(
        serde_json::from_slice(bytes).map_err(wrong)?,
    )))
}

/// Chooses the manifest for a platform.
///
/// An exact variant is preferred, then a left-out one; within these the first wins. Attestations
/// are no images. An entry without a platform is taken if no other fits: its configuration tells.
pub(crate) fn choose(index: &OciImageIndex, wanted: &Platform) -> Result<Choice, Fault> {
    let mut best: Option<(Fit, ManifestDigest)> = None;
    let mut anonymous = None;
    let mut nested = Vec::new();
    let mut available = BTreeSet::new();
    for entry in &index.manifests {
        let is_index = match entry.media_type.as_str() {
            "" | IMAGE_MANIFEST_MEDIA_TYPE | OCI_IMAGE_MEDIA_TYPE => false,
            IMAGE_MANIFEST_LIST_MEDIA_TYPE | OCI_IMAGE_INDEX_MEDIA_TYPE => true,
            _ => continue,
        };
        let digest = || manifest_digest(&entry.digest);
        let platform = entry.platform.as_ref().map(|it| {
            let (os, architecture) = (it.os.to_string(), it.architecture.to_string());
            Platform::new(&os, &architecture, it.variant.as_deref())
        });
        match platform {
            Some(platform) if platform.is_unknown() => {}
            Some(platform) => {
                let fit = wanted.fit(&platform);
                available.insert(platform.to_string());
                if let Some(fit) = fit
                    && best.is_none_or(|(so_far, _)| fit < so_far)
                {
                    best = Some((fit, digest()?));
                }
            }
            None if is_index => nested.push(digest()?),
            None if anonymous.is_none() => anonymous = Some(digest()?),
            None => {}
        }
    }
    Ok(
        match (best.map(|(_, digest)| digest).or(anonymous), nested) {
            (Some(digest), _) => Choice::Manifest(digest),
            (None, nested) if nested.is_empty() => Choice::None(available.into_iter().collect()),
            (None, nested) => Choice::Nested(nested),
        },
    )
}

/// Returns where an image's configuration is; refuses what is not an image.
pub(crate) fn config_desc(manifest: &OciImageManifest) -> Result<ConfigDesc, Fault> {
    let media_type = manifest.config.media_type.as_str();
    if media_type != IMAGE_CONFIG_MEDIA_TYPE && media_type != IMAGE_DOCKER_CONFIG_MEDIA_TYPE {
        let kind = manifest.artifact_type.as_deref().unwrap_or(media_type);
        return Err(Fault::Unsupported(format!(
            "it is an artifact of type {:?}, not a container image",
            shorten(kind)
        )));
    }
    Ok(ConfigDesc {
        digest: blob_digest(&manifest.config)?,
        size_bytes: size_of(&manifest.config)?,
    })
}

/// Parses an image's configuration.
pub(crate) fn parse_config(bytes: &[u8]) -> Result<ImageConfig, Fault> {
    serde_json::from_slice(bytes)
        .map_err(|error| Fault::Wrong(format!("the image's configuration is malformed: {error}")))
}

impl ImageConfig {
    /// The platform, if it is named.
    pub(crate) fn platform(&self) -> Option<Platform> {
        if self.os.is_empty() || self.architecture.is_empty() {
            return None;
        }
        let variant = self.variant.as_deref();
        Some(Platform::new(&self.os, &self.architecture, variant))
    }
}

/// Joins a manifest's layers with the DiffIds of its configuration.
pub(crate) fn layers(
    manifest: &OciImageManifest,
    config: &ImageConfig,
    max_layers: usize,
) -> Result<Vec<LayerDesc>, Fault> {
    if max_layers < manifest.layers.len() {
        return Err(Fault::Unsupported(format!(
            "it has {} layers, more than max_layers = {max_layers}: raise the limit if the image is trusted",
            manifest.layers.len()
        )));
    }
    let diff_ids: &[String] = match &config.rootfs {
        Some(rootfs) => &rootfs.diff_ids,
        None => &[],
    };
    if diff_ids.len() != manifest.layers.len() {
        return Err(Fault::Wrong(format!(
            "the manifest has {} layers, but its configuration has {} diff_ids",
            manifest.layers.len(),
            diff_ids.len()
        )));
    }
    manifest
        .layers
        .iter()
        .zip(diff_ids)
        .map(|(layer, diff_id)| {
            check_layer_type(&layer.media_type)?;
            Ok(LayerDesc {
                diff_id: diff_id
                    .parse::<DiffId>()
                    .map_err(|error| Fault::Wrong(format!("diff_ids: {error}")))?,
                blob: blob_digest(layer)?,
                blob_bytes: size_of(layer)?,
                toc: toc::of(layer),
            })
        })
        .collect()
}

fn check_layer_type(media_type: &str) -> Result<(), Fault> {
    match media_type {
        IMAGE_LAYER_MEDIA_TYPE
        | IMAGE_LAYER_GZIP_MEDIA_TYPE
        | "application/vnd.oci.image.layer.v1.tar+zstd"
        | IMAGE_DOCKER_LAYER_TAR_MEDIA_TYPE
        | IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE
        | "application/vnd.docker.image.rootfs.diff.tar.zstd" => Ok(()),
        other if other.ends_with("+encrypted") => Err(Fault::Unsupported(
            "a layer of it is encrypted, and this driver has no keys: push it decrypted".to_owned(),
        )),
        other if other.contains(".nondistributable.") || other.contains(".foreign.") => {
            Err(Fault::Unsupported(
                "a layer of it is not in the registry (foreign, as Windows base layers are): push it with all layers"
                    .to_owned(),
            ))
        }
        other => Err(Fault::Unsupported(format!(
            "a layer of it has the type {:?}; tar, tar+gzip and tar+zstd can be mounted",
            shorten(other)
        ))),
    }
}

fn manifest_digest(text: &str) -> Result<ManifestDigest, Fault> {
    text.parse()
        .map_err(|error| Fault::Wrong(format!("the index: {error}")))
}

fn blob_digest(descriptor: &OciDescriptor) -> Result<BlobDigest, Fault> {
    descriptor
        .digest
        .parse()
        .map_err(|error| Fault::Wrong(format!("the manifest: {error}")))
}

fn size_of(descriptor: &OciDescriptor) -> Result<u64, Fault> {
    u64::try_from(descriptor.size)
        .ok()
        .filter(|it| *it <= MAX_BLOB_BYTES)
        .ok_or_else(|| {
            Fault::Wrong(format!(
                "the manifest gives a blob the size {}",
                descriptor.size
            ))
        })
}

fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

#[cfg(test)]
mod tests;
