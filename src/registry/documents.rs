//! Reads what an image is made of out of its own documents, wherever they were kept: no registry is
//! asked.

use std::fmt;

use bytes::Bytes;
use oci_client::manifest::OciImageManifest;

use super::{
    client::ResolvedImage,
    manifest::{self, Fault, Manifest},
};
use crate::{
    digest::{BlobDigest, ManifestDigest},
    tier::{BoxFuture, shorten},
};

/// What an image is made of, byte for byte as its registry gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageDocuments {
    /// The manifest of its platform.
    pub manifest: Bytes,
    /// The configuration that the manifest names.
    pub config: Bytes,
}

/// Has configurations of images where they are nearer than at their registry.
///
/// They give nobody a right to an image: the manifest, which leads to its configuration, is asked of the registry always.
pub trait KeptConfigs: fmt::Debug + Send + Sync {
    /// Returns a configuration, or what is said to be it: whoever asks compares the digest; `None` if there is none of
    /// `max_bytes` at most, or nobody answers.
    ///
    /// # Cancellation
    /// Safe.
    fn config<'a>(
        &'a self,
        digest: &'a BlobDigest,
        max_bytes: usize,
    ) -> BoxFuture<'a, Option<Bytes>>;
}

/// Bounds for documents that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DocumentLimits {
    /// Bytes of a document, at most.
    pub max_bytes: usize,
    /// Layers of an image, at most.
    pub max_layers: usize,
}

/// Says why documents are not an image's: one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DocumentError(String);

impl ImageDocuments {
    /// Which configuration a manifest names, which has at most as many bytes as the limits allow.
    ///
    /// # Errors
    /// If it is not an image's manifest.
    pub fn config_of(manifest: &[u8], limits: DocumentLimits) -> Result<BlobDigest, DocumentError> {
        let manifest = image_manifest(manifest)?;
        let named = manifest::config_desc(&manifest)?;
        let max_bytes = limits.max_bytes;
        if u64::try_from(max_bytes).is_ok_and(|it| it < named.size_bytes) {
            let size_bytes = named.size_bytes;
            return Err(DocumentError(format!(
                "its configuration has {size_bytes} bytes, more than max_manifest_bytes = {max_bytes}"
            )));
        }
        Ok(named.digest)
    }

    /// The image, as if its registry had been asked for the manifest by its digest.
    ///
    /// # Errors
    /// If these are not an image's documents, or not of the same image.
    pub fn resolved(&self, limits: DocumentLimits) -> Result<ResolvedImage, DocumentError> {
        let image = image_manifest(&self.manifest)?;
        if manifest::config_desc(&image)?.digest != BlobDigest::of(&self.config) {
            let reason = "the configuration is not the one that the manifest names";
            return Err(DocumentError(reason.to_owned()));
        }
        let config = manifest::parse_config(&self.config)?;
        Ok(ResolvedImage {
            manifest: ManifestDigest::of(&self.manifest),
            layers: manifest::layers(&image, &config, limits.max_layers)?,
        })
    }
}

fn image_manifest(bytes: &[u8]) -> Result<Box<OciImageManifest>, DocumentError> {
    match manifest::parse(bytes, None)? {
        Manifest::Image(manifest) => Ok(manifest),
        Manifest::Index(_) => Err(DocumentError(
            "it is an index of several platforms, not an image's manifest".to_owned(),
        )),
    }
}

impl From<Fault> for DocumentError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Unsupported(mut reason) | Fault::Wrong(mut reason) => {
                shorten(&mut reason);
                Self(reason)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DiffId;

    const LIMITS: DocumentLimits = DocumentLimits {
        max_bytes: 1000,
        max_layers: 2,
    };

    fn documents(n_layers: usize) -> ImageDocuments {
        let diff_id = DiffId::of(b"layer");
        let diff_ids = vec![format!("\"{diff_id}\""); n_layers].join(",");
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[{diff_ids}]}}}}"#
        );
        let layer = format!(
            r#"{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{}","size":7}}"#,
            BlobDigest::of(b"blob")
        );
        let layers = vec![layer; n_layers].join(",");
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"layers":[{layers}]}}"#,
            BlobDigest::of(config.as_bytes()),
            config.len()
        );
        ImageDocuments {
            manifest: manifest.into(),
            config: config.into(),
        }
    }

    #[test]
    fn documents_lead_to_the_layers() {
        let documents = documents(2);
        let config = ImageDocuments::config_of(&documents.manifest, LIMITS);
        assert_eq!(config, Ok(BlobDigest::of(&documents.config)));
        let resolved = documents.resolved(LIMITS).unwrap();
        assert_eq!(resolved.manifest, ManifestDigest::of(&documents.manifest));
        let layers = resolved.layers.iter();
        let found: Vec<_> = layers
            .map(|it| (it.diff_id, it.blob, it.blob_bytes))
            .collect();
        let expected = (DiffId::of(b"layer"), BlobDigest::of(b"blob"), 7);
        assert_eq!(found, [expected; 2]);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let good = documents(1);
        let other = ImageDocuments {
            config: documents(2).config,
            ..good.clone()
        };
        let said = |it: Result<ResolvedImage, DocumentError>| it.unwrap_err().to_string();
        assert!(said(other.resolved(LIMITS)).contains("not the one that the manifest names"));
        assert!(said(documents(3).resolved(LIMITS)).contains("max_layers = 2"));
        let index = Bytes::from_static(br#"{"schemaVersion":2,"manifests":[]}"#);
        let index = ImageDocuments {
            manifest: index,
            ..good.clone()
        };
        assert!(said(index.resolved(LIMITS)).contains("several platforms"));
        let small = DocumentLimits {
            max_bytes: 10,
            ..LIMITS
        };
        let refused = ImageDocuments::config_of(&good.manifest, small).unwrap_err();
        assert!(refused.to_string().contains("max_manifest_bytes = 10"));
        for garbage in [&b""[..], b"{}", b"\xff", b"[1]"] {
            assert!(ImageDocuments::config_of(garbage, LIMITS).is_err());
        }
    }
}
