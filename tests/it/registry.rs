//! The registry client against a scripted server that misbehaves, and against docker-registry.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml exempts only functions marked #[test]"
)]

#[path = "registry/credentials.rs"]
mod credentials;
#[path = "registry/distribution.rs"]
mod distribution;
#[path = "registry/faults.rs"]
mod faults;
#[path = "registry/hosts_dir.rs"]
mod hosts_dir;
#[path = "registry/kept.rs"]
mod kept;
#[path = "registry/long_texts.rs"]
mod long_texts;
#[path = "registry/memory.rs"]
mod memory;
#[path = "registry/mirrors.rs"]
mod mirrors;
#[path = "registry/pushed.rs"]
mod pushed;
#[path = "registry/tokens.rs"]
mod tokens;

use std::collections::BTreeMap;

use clip_csi::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    metrics::Metrics,
    registry::{
        Credentials, HostConfig, ImageRef, Platform, RegistryClient, RegistryConfig, ResolvedImage,
    },
    secret::Secret,
    tier::{BlobSource, LayerDesc, SourceError},
};
use futures_util::StreamExt as _;
use serde_json::{Value, json};

use crate::http_server::{self, Reply, Request};

/// Longer than any buffer between client and server, so that cuts happen in the middle.
const LAYER_BYTES: usize = 600_000;

/// An image of one layer.
#[derive(Debug, Clone)]
struct Image {
    layer: Vec<u8>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

impl Image {
    fn new() -> Self {
        Self::of_platform(
            "amd64",
            &json!({"mediaType": "application/vnd.oci.image.manifest.v1+json"}),
        )
    }

    /// Makes an image whose manifest has `extra` fields.
    fn of_platform(architecture: &str, extra: &Value) -> Self {
        let layer: Vec<u8> = (0..LAYER_BYTES)
            .map(|it| (it.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
            .collect();
        let config = json!({
            "os": "linux", "architecture": architecture,
            "rootfs": {"type": "layers", "diff_ids": [DiffId::of(b"tar").to_string()]},
        })
        .to_string()
        .into_bytes();
        let mut manifest = json!({
            "schemaVersion": 2,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": BlobDigest::of(&config).to_string(), "size": config.len(),
            },
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": BlobDigest::of(&layer).to_string(), "size": layer.len(),
            }],
        });
        for (name, value) in extra.as_object().unwrap() {
            manifest[name] = value.clone();
        }
        Self {
            layer,
            config,
            manifest: manifest.to_string().into_bytes(),
        }
    }

    fn digest(&self) -> ManifestDigest {
        ManifestDigest::of(&self.manifest)
    }

    fn blob(&self) -> BlobDigest {
        BlobDigest::of(&self.layer)
    }

    fn resolved(&self) -> ResolvedImage {
        ResolvedImage {
            manifest: self.digest(),
            layers: vec![LayerDesc {
                diff_id: DiffId::of(b"tar"),
                blob: self.blob(),
                blob_bytes: LAYER_BYTES as u64,
                toc: None,
            }],
        }
    }

    /// Answers as a registry without faults does.
    fn reply(&self, request: &Request) -> Reply {
        // A mirror is told which registry is meant.
        let path = request.path.split('?').next().unwrap();
        if path.ends_with(&format!("blobs/{}", self.blob())) {
            return self.layer_reply(request);
        }
        if path.ends_with(&format!("blobs/{}", BlobDigest::of(&self.config))) {
            return Reply::new(200, self.config.clone());
        }
        if path.ends_with("manifests/latest")
            || path.ends_with(&format!("manifests/{}", self.digest()))
        {
            return Reply::new(200, self.manifest.clone());
        }
        Reply::new(404, "{}")
    }

    fn layer_reply(&self, request: &Request) -> Reply {
        match request.range_start() {
            None => Reply::new(200, self.layer.clone()),
            Some(start) => {
                let range = format!("bytes {start}-{}/{LAYER_BYTES}", LAYER_BYTES - 1);
                Reply::new(206, &self.layer[start..]).with("content-range", range)
            }
        }
    }
}

/// A configuration that fails fast and speaks plain http to `hosts`.
fn config(hosts: &[String]) -> RegistryConfig {
    let plain = HostConfig {
        plain_http: true,
        ..HostConfig::default()
    };
    RegistryConfig {
        hosts: hosts
            .iter()
            .map(|it| (it.clone(), plain.clone()))
            .collect::<BTreeMap<_, _>>(),
        connect_timeout_seconds: 1,
        read_timeout_seconds: 1,
        retries: 3,
        max_backoff_seconds: 0,
        ..RegistryConfig::default()
    }
}

fn client(hosts: &[String]) -> RegistryClient {
    RegistryClient::new(config(hosts), Metrics::new()).unwrap()
}

fn image_at(host: &str) -> ImageRef {
    format!("{host}/team/app").parse().unwrap()
}

fn amd64() -> Platform {
    "linux/amd64".parse().unwrap()
}

fn user(password: &str) -> Credentials {
    Credentials::Basic {
        username: "user".to_owned(),
        password: Secret::new(password.to_owned()),
    }
}

async fn resolve(
    client: &RegistryClient,
    host: &str,
    credentials: &Credentials,
) -> Result<ResolvedImage, SourceError> {
    client.resolve(&image_at(host), &amd64(), credentials).await
}

/// Reads a layer from `offset` on; what came before an error is lost.
async fn read_from(
    source: &dyn BlobSource,
    image: &Image,
    offset: usize,
) -> Result<Vec<u8>, SourceError> {
    let mut stream = source
        .open(
            &image.blob(),
            LAYER_BYTES as u64,
            offset as u64..LAYER_BYTES as u64,
        )
        .await?;
    let mut read = Vec::new();
    while let Some(bytes) = stream.next().await {
        read.extend_from_slice(&bytes?);
    }
    Ok(read)
}

async fn read(client: &RegistryClient, host: &str, image: &Image) -> Result<Vec<u8>, SourceError> {
    let source = client.blobs(&image_at(host), &Credentials::Anonymous);
    read_from(&*source, image, 0).await
}
