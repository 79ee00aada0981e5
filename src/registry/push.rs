//! Pushes the index of an image beside it: its blobs, its manifest, and where the registry needs it the
//! tag that lists it.
//!
//! OCI distribution-spec v1.1, "Pushing blobs" (POST, then PUT), "Pushing manifests with subject". The
//! registry itself is asked, never a mirror.

use std::time::Duration;

use bytes::Bytes;
use oci_client::manifest::{OCI_IMAGE_INDEX_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE};
use reqwest::{StatusCode, Url, header::LOCATION};
use zstd::zstd_safe::CParameter;

use super::{
    artifact::{self, EMPTY_CONFIG, Part, PartKind, Subject, fallback_tag},
    auth::status_failure,
    manifest::{self, Fault, Manifest},
    retry::{Failure, Retry},
    session::{Document, Endpoint, Form, Object, Route, Session},
    transport::{Answer, Ask, Op, Verb, protocol, unsupported},
};
use crate::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    integrity::IntegrityKey,
    tier::SourceError,
};

/// How hard an index is compressed: it is pushed once and read by every node.
const COMPRESSION_LEVEL: i32 = 12;

/// log2 of the window: what each node holds while it reads an index, 1 MiB.
pub(super) const PUSHED_WINDOW_LOG: u32 = 20;

/// How often the tag is written again because somebody else wrote it at the same time.
const TAG_ATTEMPTS: u32 = 5;

/// How long the tag is left alone between two of them, times the number of the attempt.
const TAG_PAUSE: Duration = Duration::from_millis(200);

/// What is pushed about one layer.
#[derive(Debug, Clone)]
pub struct LayerPush {
    /// The layer.
    pub diff_id: DiffId,
    /// Its blob in the registry.
    pub blob: BlobDigest,
    /// Its index.
    pub index: Bytes,
    /// Where reading may begin in the middle of the blob.
    pub access_map: Option<Bytes>,
}

/// What was pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pushed {
    /// The artifact: what a volume pins.
    pub artifact: ManifestDigest,
    /// Bytes of its blobs.
    pub blob_bytes: u64,
}

/// Says why nothing was pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The credentials do not give the right to.
    #[error(
        "{registry} does not take {what} with these credentials: give some with the right to push to the repository (--docker-config)"
    )]
    Denied {
        /// The registry's host.
        registry: String,
        /// What was to be pushed.
        what: String,
    },
    /// The registry failed, or answered wrongly.
    #[error(transparent)]
    Registry(#[from] SourceError),
    /// An index cannot be compressed.
    #[error("compressing the index of layer {layer}: {reason}")]
    Compress {
        /// The layer.
        layer: DiffId,
        /// Why not.
        reason: String,
    },
    /// Others keep on writing the tag.
    #[error("tag {tag} at {registry} is being written by somebody else: push again")]
    Contended {
        /// The tag.
        tag: String,
        /// The registry's host.
        registry: String,
    },
}

/// Pushes what is known of an image's layers.
pub(crate) async fn push_index(
    session: &Session,
    image: ManifestDigest,
    layers: &[LayerPush],
    key: Option<&IntegrityKey>,
) -> Result<Pushed, PushError> {
    let push = Push { session };
    let subject = push.subject(image).await?;
    let mut parts: Vec<Part> = Vec::new();
    for layer in layers {
        // An image may have a layer twice.
        if parts.iter().any(|it| it.layer == layer.diff_id) {
            continue;
        }
        let packed = compress(layer).await?;
        parts.push(push.part(PartKind::LayerIndex, layer, packed).await?);
        if let Some(map) = &layer.access_map {
            let map = map.clone();
            parts.push(push.part(PartKind::AccessMap, layer, map).await?);
        }
    }
    push.blob(
        &Bytes::from_static(EMPTY_CONFIG),
        "the index's configuration",
    )
    .await?;
    let manifest = Bytes::from(artifact::encode(&subject, &parts, key));
    let digest = ManifestDigest::of(&manifest);
    let what = format!("index {digest}");
    let answer = push
        .manifest(&digest.to_string(), OCI_IMAGE_MEDIA_TYPE, &manifest, &what)
        .await?;
    // A registry that knows referrers says so ("Pushing Manifests with Subject").
    if !answer.response.headers().contains_key("oci-subject") {
        push.list_in_tag(&image, &manifest).await?;
    }
    Ok(Pushed {
        artifact: digest,
        blob_bytes: parts.iter().map(|it| it.size_bytes).sum(),
    })
}

/// Compresses an index on a thread of its own: a large one takes seconds.
async fn compress(layer: &LayerPush) -> Result<Bytes, PushError> {
    let index = layer.index.clone();
    let pack = move || {
        let mut compressor = zstd::bulk::Compressor::new(COMPRESSION_LEVEL)?;
        compressor.set_parameter(CParameter::WindowLog(PUSHED_WINDOW_LOG))?;
        compressor.compress(&index)
    };
    let packed = tokio::task::spawn_blocking(pack).await;
    let failed = |reason: String| PushError::Compress {
        layer: layer.diff_id,
        reason,
    };
    let packed = packed.map_err(|err| failed(err.to_string()))?;
    Ok(packed.map_err(|err| failed(err.to_string()))?.into())
}

/// A repository that is written to.
struct Push<'a> {
    session: &'a Session,
}

impl Push<'_> {
    fn origin(&self) -> &Endpoint {
        // It has no mirrors.
        self.session.endpoint(0)
    }

    /// Looks how the image's manifest is to be referred to.
    async fn subject(&self, image: ManifestDigest) -> Result<Subject, PushError> {
        let object = Object {
            op: Op::Manifest,
            path: format!("manifests/{image}"),
            what: format!("image manifest {image}"),
        };
        let form = Form {
            accept: Some(manifest::ACCEPT),
            max_len: self.session.transport.config.max_manifest_len(),
        };
        let check = |document: Document| {
            let wrong =
                |reason: &str| protocol(&document.host, format!("{} {reason}", object.what));
            if ManifestDigest::of(&document.bytes) != image {
                return Err(wrong("has another digest"));
            }
            let content_type = document.content_type.as_deref();
            let media_type = match manifest::parse(&document.bytes, content_type) {
                Ok(Manifest::Image(it)) => it.media_type,
                Ok(Manifest::Index(_)) | Err(_) => return Err(wrong("is no image's")),
            };
            let media_type = media_type
                .or(document.content_type)
                .unwrap_or_else(|| OCI_IMAGE_MEDIA_TYPE.to_owned());
            Ok(Subject {
                media_type,
                digest: image,
                size_bytes: u64::try_from(document.bytes.len()).unwrap_or(u64::MAX),
            })
        };
        let route = Route::OriginOnly;
        let subject = self.session.document(&object, form, route, check).await;
        subject.map_err(|it| denied(it, &object.what))
    }

    /// Pushes a blob of the artifact.
    async fn part(
        &self,
        kind: PartKind,
        layer: &LayerPush,
        bytes: Bytes,
    ) -> Result<Part, PushError> {
        let what = format!("the index of layer {}", layer.diff_id);
        self.blob(&bytes, &what).await?;
        Ok(Part {
            kind,
            layer: layer.diff_id,
            layer_blob: layer.blob,
            digest: BlobDigest::of(&bytes),
            size_bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
        })
    }

    /// Pushes a blob, unless it is there already.
    async fn blob(&self, bytes: &Bytes, what: &str) -> Result<(), PushError> {
        let digest = BlobDigest::of(bytes);
        let mut retry = Retry::new(&self.session.transport.config);
        loop {
            let failure = match self.blob_once(bytes, &digest, what).await {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            };
            let waited = retry.wait(failure).await;
            waited.map_err(|it| denied(it, what))?;
        }
    }

    fn unauthorized(&self, verb: Verb, url: Url) -> Ask {
        Ask {
            op: Op::Push,
            verb,
            url,
            accept: None,
            range: None,
            authorization: None,
            at: self.origin().at(),
        }
    }

    async fn blob_once(
        &self,
        bytes: &Bytes,
        digest: &BlobDigest,
        what: &str,
    ) -> Result<(), Failure> {
        let there = object(format!("blobs/{digest}"), what);
        let url = self.session.url(self.origin(), &there)?;
        let answer = self.ask(&there, Verb::Head, url).await?;
        match answer.response.status() {
            StatusCode::OK => return Ok(()),
            StatusCode::NOT_FOUND => {}
            _ => return Err(status_failure(&answer.host, what, &answer.response)),
        }
        let uploads = object("blobs/uploads/".to_owned(), what);
        let start = self.session.url(self.origin(), &uploads)?;
        let answer = self.ask(&uploads, Verb::Post, start.clone()).await?;
        if answer.response.status() != StatusCode::ACCEPTED {
            return Err(status_failure(&answer.host, what, &answer.response));
        }
        let location = answer.response.headers().get(LOCATION);
        let mut url = location
            .and_then(|it| it.to_str().ok())
            .and_then(|it| start.join(it).ok())
            .filter(Url::has_host)
            .ok_or_else(|| protocol(&answer.host, format!("it takes {what} nowhere")))?;
        self.session.transport.drain(answer.response).await;
        url.query_pairs_mut()
            .append_pair("digest", &digest.to_string());
        let put = Verb::Put {
            content_type: "application/octet-stream",
            body: bytes.clone(),
        };
        let answer = if url.origin() == start.origin() {
            self.ask(&uploads, put, url).await?
        } else {
            // Its credentials are in the URL: those for the registry are nobody else's.
            self.session
                .transport
                .send(self.unauthorized(put, url))
                .await?
        };
        if !answer.response.status().is_success() {
            return Err(status_failure(&answer.host, what, &answer.response));
        }
        self.session.transport.drain(answer.response).await;
        Ok(())
    }

    /// Puts a manifest under a tag or its digest.
    async fn manifest(
        &self,
        selector: &str,
        content_type: &'static str,
        bytes: &Bytes,
        what: &str,
    ) -> Result<Answer, PushError> {
        let object = object(format!("manifests/{selector}"), what);
        let mut retry = Retry::new(&self.session.transport.config);
        loop {
            let put = Verb::Put {
                content_type,
                body: bytes.clone(),
            };
            let url = self.session.url(self.origin(), &object)?;
            let failure = match self.ask(&object, put, url).await {
                Ok(answer) if answer.response.status().is_success() => return Ok(answer),
                Ok(answer) => status_failure(&answer.host, what, &answer.response),
                Err(failure) => failure,
            };
            let waited = retry.wait(failure).await;
            waited.map_err(|it| denied(it, what))?;
        }
    }

    /// Adds the artifact to the tag that lists what refers to the image.
    ///
    /// Registries offer no write that is conditional on what was read, so it is looked whether the
    /// tag has it afterwards, and if somebody else's write took its place, it is added again.
    async fn list_in_tag(&self, image: &ManifestDigest, manifest: &[u8]) -> Result<(), PushError> {
        let tag = fallback_tag(image);
        let what = format!("tag {tag}");
        for nth in 1..=TAG_ATTEMPTS {
            let listed = self.tagged(&tag, &what).await?;
            let with_it = artifact::with_referrer(listed.as_deref(), manifest);
            let with_it = with_it.map_err(|fault| {
                let (Fault::Unsupported(reason) | Fault::Wrong(reason)) = fault;
                unsupported(what.clone(), reason)
            })?;
            let Some(index) = with_it else {
                return Ok(());
            };
            self.manifest(&tag, OCI_IMAGE_INDEX_MEDIA_TYPE, &index.into(), &what)
                .await?;
            // Whoever read before this write has written by then, most likely.
            tokio::time::sleep(TAG_PAUSE * nth).await;
        }
        match artifact::with_referrer(self.tagged(&tag, &what).await?.as_deref(), manifest) {
            Ok(None) => Ok(()),
            Ok(Some(_)) | Err(_) => Err(PushError::Contended {
                tag,
                registry: self.session.registry.clone(),
            }),
        }
    }

    /// What the tag lists, `None` if there is no such tag.
    async fn tagged(&self, tag: &str, what: &str) -> Result<Option<Bytes>, PushError> {
        let object = object(format!("manifests/{tag}"), what);
        let form = Form {
            accept: Some(OCI_IMAGE_INDEX_MEDIA_TYPE),
            max_len: self.session.transport.config.max_manifest_len(),
        };
        let check = |document: Document| Ok(document.bytes);
        let route = Route::OriginOnly;
        match self.session.document(&object, form, route, check).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(SourceError::NotFound { .. }) => Ok(None),
            Err(error) => Err(denied(error, what)),
        }
    }

    async fn ask(&self, object: &Object, verb: Verb, url: Url) -> Result<Answer, Failure> {
        let ask = self.unauthorized(verb, url);
        self.session.ask_once(self.origin(), object, &ask).await
    }
}

fn object(path: String, what: &str) -> Object {
    Object {
        op: Op::Push,
        path,
        what: what.to_owned(),
    }
}

/// Says of a refusal that it is the right to push that is missing.
fn denied(error: SourceError, what: &str) -> PushError {
    match error {
        SourceError::Unauthorized { registry, .. } | SourceError::Forbidden { registry, .. } => {
            PushError::Denied {
                registry,
                what: what.to_owned(),
            }
        }
        error => error.into(),
    }
}
