//! Asks one repository with one image's credentials, and turns refusals into errors.

use std::sync::Arc;

use bytes::Bytes;
use reqwest::{StatusCode, header::CONTENT_TYPE};

use super::{
    auth::{Authorizer, parse_challenge, status_failure},
    credentials::Credentials,
    reference::ImageRef,
    retry::{Failure, Retry},
    transport::{Answer, Ask, Op, Transport, unavailable},
};
use crate::tier::SourceError;

/// One repository, seen with one image's credentials.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) transport: Arc<Transport>,
    pub(crate) registry: String,
    repository: String,
    authorizer: Authorizer,
}

/// What to get from a repository.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    pub(crate) op: Op,
    /// Below the repository: `manifests/latest`.
    pub(crate) path: String,
    /// What it is called in errors.
    pub(crate) what: String,
}

/// A manifest or configuration as it came.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) bytes: Bytes,
    pub(crate) content_type: Option<String>,
    /// What the registry says its digest is.
    pub(crate) digest_header: Option<String>,
}

impl Session {
    pub(crate) fn new(
        transport: Arc<Transport>,
        image: &ImageRef,
        credentials: Credentials,
    ) -> Self {
        Self {
            transport,
            registry: image.registry().to_owned(),
            repository: image.repository().to_owned(),
            authorizer: Authorizer::new(image.registry(), image.repository(), credentials),
        }
    }

    pub(crate) fn is_for(&self, image: &ImageRef, credentials: &Credentials) -> bool {
        self.authorizer
            .is_for(image.registry(), image.repository(), credentials)
    }

    /// Gets a whole document of at most `max_len` bytes, with retries.
    pub(crate) async fn document(
        &self,
        object: &Object,
        accept: Option<&'static str>,
        max_len: usize,
    ) -> Result<Document, SourceError> {
        let mut retry = Retry::new(&self.transport.config);
        loop {
            match self.document_once(object, accept, max_len).await {
                Ok(document) => return Ok(document),
                Err(failure) => retry.wait(failure).await?,
            }
        }
    }

    async fn document_once(
        &self,
        object: &Object,
        accept: Option<&'static str>,
        max_len: usize,
    ) -> Result<Document, Failure> {
        let answer = self.get_once(object, accept, None).await?;
        let header = |name: &str| {
            let value = answer.response.headers().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let content_type = header(CONTENT_TYPE.as_str());
        let digest_header = header("docker-content-digest");
        Ok(Document {
            content_type,
            digest_header,
            bytes: self.transport.read(answer, max_len).await?,
        })
    }

    /// Makes one attempt to get an object; a refusal is answered with one fresh token.
    ///
    /// # Errors
    /// If the answer is not a success.
    pub(crate) async fn get_once(
        &self,
        object: &Object,
        accept: Option<&'static str>,
        range: Option<(u64, u64)>,
    ) -> Result<Answer, Failure> {
        let path = format!("/v2/{}/{}", self.repository, object.path);
        let url = self.transport.registry_url(&self.registry, &path)?;
        let mut is_fresh = false;
        loop {
            let (authorization, generation) = self.authorizer.current();
            let was_authorized = authorization.is_some();
            let answer = self
                .transport
                .get(Ask {
                    op: object.op,
                    url: url.clone(),
                    accept,
                    range,
                    authorization,
                })
                .await?;
            let status = answer.response.status();
            if status.is_success() {
                return Ok(answer);
            }
            let is_refused = matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            if is_refused && !answer.is_from_origin {
                // A presigned URL that expired: the registry gives a new one.
                let reason = format!("HTTP {status} for {} after a redirect", object.what);
                return Err(unavailable(&answer.host, reason).into());
            }
            if !is_refused {
                return Err(status_failure(&answer.host, &object.what, &answer.response));
            }
            // Some registries say 403 to a token that expired, so an older one gets a second try.
            let may_renew = !is_fresh && (status == StatusCode::UNAUTHORIZED || was_authorized);
            if !may_renew {
                return Err(self.refusal(status, object).into());
            }
            let challenge = parse_challenge(answer.response.headers());
            self.transport.drain(answer.response).await;
            let renewed = self
                .authorizer
                .renew(&self.transport, challenge, generation, &object.what)
                .await;
            match renewed {
                Ok(()) => is_fresh = true,
                Err(failure) if matches!(failure.error, SourceError::Unauthorized { .. }) => {
                    return Err(self.refusal(status, object).into());
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    fn refusal(&self, status: StatusCode, object: &Object) -> SourceError {
        if status == StatusCode::FORBIDDEN {
            return SourceError::Forbidden {
                what: object.what.clone(),
                registry: self.registry.clone(),
            };
        }
        self.authorizer.unauthorized(&object.what)
    }
}
