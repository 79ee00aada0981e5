//! Asks which artifacts refer to an image: by the referrers API, or by the tag that stands in for it.
//!
//! OCI distribution-spec v1.1, "Listing Referrers". A registry that lacks the API is remembered for a
//! while, so that it costs one request once, and not one for each pod.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use oci_client::manifest::{OCI_IMAGE_INDEX_MEDIA_TYPE, OciImageIndex};
use reqwest::StatusCode;
use tokio::time::Instant;

use super::{
    artifact::{ARTIFACT_TYPE, candidates, fallback_tag},
    auth::status_failure,
    manifest::{self, Manifest},
    mirrors::within_deadline,
    retry::Failure,
    session::{Endpoint, Object, Role, Session},
    transport::{Answer, Ask, Op, Verb, protocol},
};
use crate::{digest::ManifestDigest, tier::SourceError};

/// How long a registry without the referrers API is not asked for it again: one that is upgraded is
/// used as it can be within the hour.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// The hosts that have no referrers API.
#[derive(Debug, Default)]
pub(crate) struct WithoutReferrers {
    /// std Mutex: held for a map lookup, never across an await.
    until: Mutex<BTreeMap<String, Instant>>,
}

impl WithoutReferrers {
    fn has(&self, host: &str, now: Instant) -> bool {
        let until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.get(host).is_some_and(|it| now < *it)
    }

    fn remember(&self, host: &str, now: Instant) {
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.insert(host.to_owned(), now + REMEMBERED);
    }
}

impl Session {
    /// Returns the artifacts that may be indexes of the image, the likeliest first.
    ///
    /// The first host that knows any is believed: what they are worth is told by other means. Nothing
    /// is tried twice, because an image can be read without.
    ///
    /// # Errors
    /// Those of the last host, if none has an answer.
    pub(crate) async fn index_candidates(
        &self,
        image: &ManifestDigest,
    ) -> Result<Vec<ManifestDigest>, SourceError> {
        let mut nth = self.next_endpoint(0);
        loop {
            let endpoint = self.endpoint(nth);
            let found = match endpoint.role {
                Role::Mirror => {
                    within_deadline(&endpoint.host, || self.candidates_at(endpoint, image)).await
                }
                Role::Origin => self
                    .candidates_at(endpoint, image)
                    .await
                    .map_err(|it| it.error),
            };
            match (endpoint.role, found) {
                (Role::Mirror, Ok(found)) if found.is_empty() => {}
                (Role::Mirror, Err(error)) => self.transport.bench.note(&endpoint.host, &error),
                (_, found) => return found,
            }
            nth = self.next_endpoint(nth + 1);
        }
    }

    async fn candidates_at(
        &self,
        endpoint: &Endpoint,
        image: &ManifestDigest,
    ) -> Result<Vec<ManifestDigest>, Failure> {
        let without = &self.transport.without_referrers;
        let mut listed = None;
        if !without.has(&endpoint.host, Instant::now()) {
            let path = format!("referrers/{image}?artifactType={ARTIFACT_TYPE}");
            listed = self.list(endpoint, image, path).await?;
            if listed.is_none() {
                tracing::debug!(host = endpoint.host, "registry has no referrers API");
                without.remember(&endpoint.host, Instant::now());
            }
        }
        if listed.is_none() {
            let path = format!("manifests/{}", fallback_tag(image));
            listed = self.list(endpoint, image, path).await?;
        }
        let max_bytes = self.transport.config.max_manifest_bytes;
        Ok(listed.map_or_else(Vec::new, |it| candidates(&it, max_bytes)))
    }

    /// Gets a list of referrers, `None` if there is none.
    async fn list(
        &self,
        endpoint: &Endpoint,
        image: &ManifestDigest,
        path: String,
    ) -> Result<Option<OciImageIndex>, Failure> {
        let object = Object {
            op: Op::Referrers,
            path,
            what: format!("the list of what refers to {image}"),
        };
        let ask = Ask {
            op: object.op,
            verb: Verb::Get,
            url: self.url(endpoint, &object)?,
            accept: Some(OCI_IMAGE_INDEX_MEDIA_TYPE),
            range: None,
            authorization: None,
            at: endpoint.at(),
        };
        let answer = self.ask_once(endpoint, &object, &ask).await?;
        match answer.response.status() {
            StatusCode::OK => self.read_list(answer, &object).await.map(Some),
            // How registries without the API were seen to say so.
            StatusCode::BAD_REQUEST
            | StatusCode::NOT_FOUND
            | StatusCode::METHOD_NOT_ALLOWED
            | StatusCode::NOT_ACCEPTABLE
            | StatusCode::NOT_IMPLEMENTED => {
                self.transport.drain(answer.response).await;
                Ok(None)
            }
            _ => Err(status_failure(&answer.host, &object.what, &answer.response)),
        }
    }

    async fn read_list(&self, answer: Answer, object: &Object) -> Result<OciImageIndex, Failure> {
        let host = answer.host.clone();
        let max_len = self.transport.config.max_manifest_len();
        let bytes = self.transport.read(answer, max_len).await?;
        match manifest::parse(&bytes, Some(OCI_IMAGE_INDEX_MEDIA_TYPE)) {
            Ok(Manifest::Index(index)) => Ok(index),
            Ok(Manifest::Image(_)) | Err(_) => {
                let reason = format!("{} is no index", object.what);
                Err(protocol(&host, reason).into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_without_the_api_is_asked_again_after_a_while() {
        let (without, now) = (WithoutReferrers::default(), Instant::now());
        assert!(!without.has("r.x", now));
        without.remember("r.x", now);
        assert!(without.has("r.x", now));
        assert!(!without.has("s.x", now));
        assert!(!without.has("r.x", now + REMEMBERED));
    }
}
