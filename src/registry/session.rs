//! Asks one repository, at its mirrors and its registry, and turns refusals into errors.

use std::sync::Arc;

use bytes::Bytes;
use reqwest::{StatusCode, Url, header::CONTENT_TYPE};

use super::{
    auth::{Access, Authorizer, Verdict, status_failure},
    challenge::parse_challenge,
    credentials::Credentials,
    endpoint::EndpointSettings,
    keyring::{Chain, Keyring},
    mirrors::within_deadline,
    reference::ImageRef,
    requester::Requester,
    retry::{Failure, Retry},
    transport::{Answer, Ask, Op, Transport, Verb, unavailable},
};
use crate::tier::SourceError;

/// Attempts at one request with other credentials or fresh ones; more than a keyring has.
const MAX_ATTEMPTS: usize = 40;

/// One repository at its mirrors and its registry, seen with one image's credentials.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) transport: Arc<Transport>,
    /// The image's registry.
    pub(crate) registry: String,
    repository: String,
    mirrors: Vec<Endpoint>,
    origin: Endpoint,
    always_asks_origin: bool,
}

/// A host that has the repository, or may have it.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) host: String,
    pub(crate) role: Role,
    at: Arc<EndpointSettings>,
    authorizer: Authorizer,
}

/// What a host is to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Mirror,
    /// The registry that the image names.
    Origin,
}

/// Who may answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// The first that has it.
    MirrorsFirst,
    /// The image's registry alone.
    OriginOnly,
}

/// What leads to an object: some mirrors are not to be asked what a tag means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    Digest,
    Tag,
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
    /// Who gave it.
    pub(crate) host: String,
    pub(crate) content_type: Option<String>,
    /// What the registry says its digest is.
    pub(crate) digest_header: Option<String>,
}

/// How a document is to be asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Form {
    pub(crate) accept: Option<&'static str>,
    pub(crate) max_len: usize,
}

impl Session {
    /// Opens a repository. A mirror is shown what the node has for its own host.
    pub(crate) fn new(
        transport: Arc<Transport>,
        image: &ImageRef,
        keyring: &Arc<Keyring>,
        requester: Requester,
    ) -> Self {
        let endpoints = transport.endpoints(image.registry());
        let endpoint = |at, role, requester| {
            let keyring = Arc::clone(keyring);
            Endpoint::new(at, role, image, keyring, requester, Access::Pull)
        };
        let mirrors = endpoints.mirrors.into_iter();
        Self {
            registry: image.registry().to_owned(),
            repository: image.repository().to_owned(),
            mirrors: mirrors
                .map(|it| endpoint(it, Role::Mirror, Requester::Node))
                .collect(),
            origin: endpoint(endpoints.origin, Role::Origin, requester),
            always_asks_origin: endpoints.always_ask_origin,
            transport,
        }
    }

    /// Opens a repository to write to it: at its registry alone.
    pub(crate) fn to_push(
        transport: Arc<Transport>,
        image: &ImageRef,
        keyring: &Arc<Keyring>,
        requester: Requester,
    ) -> Self {
        let at = transport.endpoints(image.registry()).origin;
        let keyring = Arc::clone(keyring);
        Self {
            registry: image.registry().to_owned(),
            repository: image.repository().to_owned(),
            mirrors: Vec::new(),
            origin: Endpoint::new(at, Role::Origin, image, keyring, requester, Access::Push),
            always_asks_origin: true,
            transport,
        }
    }

    pub(crate) fn is_for(&self, image: &ImageRef, requester: &Requester) -> bool {
        let origin = &self.origin.authorizer;
        origin.is_for(image.registry(), image.repository(), requester)
    }

    /// The credentials that the registry is shown first, if there are any.
    ///
    /// # Errors
    /// If that cannot be found out now.
    pub(crate) async fn credentials(&self) -> Result<Option<Credentials>, SourceError> {
        self.origin.authorizer.credentials().await
    }

    pub(crate) fn has_mirrors(&self) -> bool {
        !self.mirrors.is_empty()
    }

    /// The nth host to ask; from the last mirror on it is the origin.
    pub(crate) fn endpoint(&self, nth: usize) -> &Endpoint {
        self.mirrors.get(nth).unwrap_or(&self.origin)
    }

    /// Whether the registry itself says for everybody who may pull.
    pub(crate) fn always_asks_origin(&self) -> bool {
        self.always_asks_origin || self.mirrors.is_empty()
    }

    /// The first host from `nth` on that is worth asking for what a digest names.
    pub(crate) fn next_endpoint(&self, nth: usize) -> usize {
        self.next_able(nth, Names::Digest)
    }

    fn next_able(&self, nth: usize, names: Names) -> usize {
        let bench = &self.transport.bench;
        let able = |it: &Endpoint| match names {
            Names::Digest => it.at.abilities.pull,
            Names::Tag => it.at.abilities.resolve,
        };
        let rest = self.mirrors.iter().enumerate().skip(nth);
        let up = rest
            .filter(|(_, it)| able(it) && !bench.holds(&it.host))
            .map(|(n, _)| n);
        up.min().unwrap_or(self.mirrors.len())
    }

    /// Gets a whole document and has `check` make something of it.
    ///
    /// Mirrors are asked in order, each once; one whose answer `check` refuses has failed as well.
    /// The registry itself is asked with retries.
    ///
    /// # Errors
    /// Those of the registry, or of `check` on what it gave.
    pub(crate) async fn document<T>(
        &self,
        object: &Object,
        form: Form,
        route: Route,
        check: impl Fn(Document) -> Result<T, SourceError>,
    ) -> Result<T, SourceError> {
        let mut failed = None;
        let names = object.names();
        let mut nth = match route {
            Route::MirrorsFirst => self.next_able(0, names),
            Route::OriginOnly => self.mirrors.len(),
        };
        while let Some(mirror) = self.mirrors.get(nth) {
            let attempt = || self.document_once(mirror, object, form);
            let outcome = within_deadline(&mirror.host, attempt)
                .await
                .and_then(&check);
            match outcome {
                Ok(it) => return Ok(it),
                Err(error) => {
                    self.transport.bench.note(&mirror.host, &error);
                    failed = Some(error);
                }
            }
            nth = self.next_able(nth + 1, names);
        }
        let mut retry = Retry::new(&self.transport.config);
        loop {
            match self.document_once(&self.origin, object, form).await {
                Ok(document) => return check(document),
                Err(failure) => match retry.wait(failure).await {
                    Ok(()) => {}
                    Err(error) => return Err(after_mirror(error, failed)),
                },
            }
        }
    }

    async fn document_once(
        &self,
        endpoint: &Endpoint,
        object: &Object,
        form: Form,
    ) -> Result<Document, Failure> {
        let answer = self.get_once(endpoint, object, form.accept, None).await?;
        let header = |name: &str| {
            let value = answer.response.headers().get(name)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let content_type = header(CONTENT_TYPE.as_str());
        let digest_header = header("docker-content-digest");
        Ok(Document {
            content_type,
            digest_header,
            host: answer.host.clone(),
            bytes: self.transport.read(answer, form.max_len).await?,
        })
    }

    /// Makes one attempt to get an object; a refusal is answered with one fresh token.
    ///
    /// # Errors
    /// If the answer is not a success.
    pub(crate) async fn get_once(
        &self,
        endpoint: &Endpoint,
        object: &Object,
        accept: Option<&'static str>,
        range: Option<(u64, u64)>,
    ) -> Result<Answer, Failure> {
        let ask = Ask {
            op: object.op,
            verb: Verb::Get,
            url: self.url(endpoint, object)?,
            accept,
            range,
            authorization: None,
            at: endpoint.at(),
        };
        let answer = self.ask_once(endpoint, object, &ask).await?;
        if answer.response.status().is_success() {
            return Ok(answer);
        }
        Err(status_failure(&answer.host, &object.what, &answer.response))
    }

    /// Where an object is at a host.
    ///
    /// # Errors
    /// If the host's name makes no URL.
    pub(crate) fn url(&self, endpoint: &Endpoint, object: &Object) -> Result<Url, SourceError> {
        let mut url = endpoint.at.url(&self.repository, &object.path)?;
        if endpoint.role == Role::Mirror {
            // As containerd does: a mirror of many registries is told which one is meant.
            url.query_pairs_mut().append_pair("ns", &self.registry);
        }
        Ok(url)
    }

    /// Makes one attempt at a request; a refusal is answered with one fresh token.
    ///
    /// # Errors
    /// If no answer came, or one that refuses access; any other status is an answer.
    pub(crate) async fn ask_once(
        &self,
        endpoint: &Endpoint,
        object: &Object,
        ask: &Ask,
    ) -> Result<Answer, Failure> {
        let authorizer = &endpoint.authorizer;
        authorizer.renew_if_due(&self.transport, &object.what).await;
        let mut is_fresh = false;
        for _ in 0..MAX_ATTEMPTS {
            let (authorization, generation) = authorizer.current();
            let was_authorized = authorization.is_some();
            let answer = self
                .transport
                .send(Ask {
                    authorization,
                    ..ask.clone()
                })
                .await?;
            let status = answer.response.status();
            let hides = status == StatusCode::NOT_FOUND && object.op == Op::Manifest;
            if hides && was_authorized && endpoint.role == Role::Origin {
                // Some registries say so to who lacks the right.
                let others = authorizer
                    .show_others(&self.transport, generation, &object.what)
                    .await?;
                if !others {
                    return Ok(answer);
                }
                self.transport.drain(answer.response).await;
                is_fresh = true;
                continue;
            }
            if !matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
                authorizer.taken(generation);
                return Ok(answer);
            }
            if !answer.is_from_origin {
                // A presigned URL that expired: the registry gives a new one.
                let reason = format!("HTTP {status} for {} after a redirect", object.what);
                return Err(unavailable(&answer.host, reason).into());
            }
            if status == StatusCode::FORBIDDEN && !was_authorized {
                return Err(endpoint.refusal(status, object).into());
            }
            // Some registries say 403 to a token that expired, so an older one gets a second try.
            let verdict = if is_fresh {
                Verdict::Refused
            } else {
                Verdict::Stale
            };
            let challenge = parse_challenge(answer.response.headers());
            self.transport.drain(answer.response).await;
            let renewed = authorizer
                .renew(
                    &self.transport,
                    challenge,
                    generation,
                    verdict,
                    &object.what,
                )
                .await;
            match renewed {
                Ok(()) => is_fresh = true,
                Err(failure) if matches!(failure.error, SourceError::Unauthorized { .. }) => {
                    return Err(endpoint.refusal(status, object).into());
                }
                Err(failure) => return Err(failure),
            }
        }
        let reason = format!("its rights changed {MAX_ATTEMPTS} times within one request");
        Err(unavailable(&endpoint.host, reason).into())
    }
}

impl Object {
    fn names(&self) -> Names {
        match self.path.strip_prefix("manifests/") {
            Some(selector) if !selector.contains(':') => Names::Tag,
            Some(_) | None => Names::Digest,
        }
    }
}

impl Endpoint {
    fn new(
        at: EndpointSettings,
        role: Role,
        image: &ImageRef,
        keyring: Arc<Keyring>,
        requester: Requester,
        access: Access,
    ) -> Self {
        let at = Arc::new(at);
        let chain = Chain {
            keyring,
            host: at.host.clone(),
            repository: image.repository().to_owned(),
            requester,
        };
        Self {
            host: at.host.clone(),
            role,
            authorizer: Authorizer::new(chain, Arc::clone(&at), access),
            at,
        }
    }

    /// How it is spoken to.
    pub(crate) fn at(&self) -> Arc<EndpointSettings> {
        Arc::clone(&self.at)
    }

    fn refusal(&self, status: StatusCode, object: &Object) -> SourceError {
        if status == StatusCode::FORBIDDEN {
            return SourceError::Forbidden {
                what: object.what.clone(),
                registry: self.host.clone(),
            };
        }
        self.authorizer.unauthorized(&object.what)
    }
}

/// Adds what the last mirror said to the error of a registry that cannot be reached: where there is
/// no way to it, the mirror's word is what a person needs.
fn after_mirror(error: SourceError, mirror: Option<SourceError>) -> SourceError {
    match (error, mirror) {
        (SourceError::Unavailable { registry, reason }, Some(mirror)) => unavailable(
            &registry,
            format!("{reason} (and from its mirror: {mirror})"),
        ),
        (error, _) => error,
    }
}
