//! A registry in memory that takes pushes, with the referrers API or without.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use serde_json::{Value, json};

use super::{
    Image,
    http_server::{HttpServer, Reply, Request},
};
use clip_csi::digest::{BlobDigest, ManifestDigest};

/// Where an image is in it.
const REPOSITORY: &str = "/v2/team/app/";

/// What the registry has.
#[derive(Debug, Default)]
pub(super) struct Content {
    pub(super) blobs: BTreeMap<String, Vec<u8>>,
    /// By tag and by digest.
    pub(super) manifests: BTreeMap<String, Vec<u8>>,
}

impl Content {
    /// Puts a manifest under its digest, and returns that.
    pub(super) fn add_manifest(&mut self, manifest: &[u8]) -> ManifestDigest {
        let digest = ManifestDigest::of(manifest);
        self.manifests.insert(digest.to_string(), manifest.to_vec());
        digest
    }

    /// The referrers of a manifest, as the API lists them.
    fn referrers(&self, subject: &str) -> Value {
        let listed = self.manifests.iter().filter_map(|(name, bytes)| {
            let manifest: Value = serde_json::from_slice(bytes).ok()?;
            let refers = name.contains(':') && manifest["subject"]["digest"] == subject;
            refers.then(|| {
                let mut descriptor = json!({
                    "mediaType": manifest["mediaType"], "artifactType": manifest["artifactType"],
                    "digest": name, "size": bytes.len(),
                });
                if let Some(annotations) = manifest.get("annotations") {
                    descriptor["annotations"] = annotations.clone();
                }
                descriptor
            })
        });
        json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": listed.collect::<Vec<_>>(),
        })
    }
}

/// A running registry.
pub(super) struct MemoryRegistry {
    pub(super) server: HttpServer,
    pub(super) content: Arc<Mutex<Content>>,
}

/// Whether a registry has the referrers API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Api {
    Present,
    Absent,
}

impl MemoryRegistry {
    /// Starts a registry that has `image`.
    pub(super) async fn start(image: &Image, api: Api) -> Self {
        Self::scripted(image, api, |_, _| None).await
    }

    /// Starts one that answers as `script` says, where that says something.
    pub(super) async fn scripted(
        image: &Image,
        api: Api,
        script: impl Fn(&Request, &mut Content) -> Option<Reply> + Send + Sync + 'static,
    ) -> Self {
        let mut content = Content::default();
        for blob in [&image.layer, &image.config] {
            let digest = BlobDigest::of(blob).to_string();
            content.blobs.insert(digest, blob.clone());
        }
        content.add_manifest(&image.manifest);
        let latest = ("latest".to_owned(), image.manifest.clone());
        content.manifests.extend([latest]);
        let content = Arc::new(Mutex::new(content));
        let served = Arc::clone(&content);
        let server = HttpServer::start(move |request| {
            let mut content = served.lock().unwrap();
            script(request, &mut content).unwrap_or_else(|| reply(request, api, &mut content))
        })
        .await;
        Self { server, content }
    }

    pub(super) fn host(&self) -> String {
        self.server.host()
    }
}

/// Answers as the distribution-spec says.
fn reply(request: &Request, api: Api, content: &mut Content) -> Reply {
    let Some(path) = request.path.strip_prefix(REPOSITORY) else {
        return Reply::new(404, "{}");
    };
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let (kind, name) = path.split_once('/').unwrap();
    let found = |bytes: Option<&Vec<u8>>| match (bytes, request.method.as_str()) {
        (None, _) => Reply::new(404, "{}"),
        (Some(_), "HEAD") => Reply::new(200, ""),
        (Some(bytes), _) => Reply::new(200, bytes.clone()),
    };
    match (request.method.as_str(), kind) {
        ("POST", "blobs") => {
            Reply::new(202, "").with("location", format!("{REPOSITORY}blobs/uploads/7?state=x"))
        }
        ("PUT", "blobs") => {
            let digest = BlobDigest::of(&request.body).to_string();
            assert_eq!(
                query,
                format!("state=x&digest={}", digest.replace(':', "%3A"))
            );
            content.blobs.insert(digest, request.body.clone());
            Reply::new(201, "")
        }
        (_, "blobs") => found(content.blobs.get(name)),
        ("PUT", "manifests") => {
            content
                .manifests
                .insert(name.to_owned(), request.body.clone());
            content.add_manifest(&request.body);
            let manifest: Value = serde_json::from_slice(&request.body).unwrap();
            match (api, manifest["subject"]["digest"].as_str()) {
                (Api::Present, Some(subject)) => Reply::new(201, "").with("oci-subject", subject),
                _ => Reply::new(201, ""),
            }
        }
        (_, "manifests") => found(content.manifests.get(name)),
        (_, "referrers") if api == Api::Present => {
            Reply::new(200, content.referrers(name).to_string())
        }
        _ => Reply::new(404, "404 page not found"),
    }
}
