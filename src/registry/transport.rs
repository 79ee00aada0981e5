//! Sends one request, follows its redirects, and counts it: no retry, no credentials of its own.
//!
//! Redirects are followed here and not by reqwest, because three things must hold at each hop:
//! the `Authorization` header is dropped for good when the origin changes (OCI distribution-spec
//! v1.1, "Pulling blobs"), plain http is spoken only to hosts that the configuration names, and no
//! URL reaches an error or a log, since the query of a presigned URL is a credential. What writes is
//! not redirected: its answer is the caller's.

use std::{
    collections::BTreeMap,
    error::Error as _,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use reqwest::{
    Method, Response, StatusCode, Url,
    header::{
        ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue,
        LOCATION, RANGE, RETRY_AFTER,
    },
};

use super::{
    config::{HostConfig, RegistryConfig, RegistryConfigError},
    endpoint::{EndpointSettings, RegistryEndpoints},
    hosts_dir::{HostsDir, SkipVerify},
    mirrors::Bench,
    referrers::WithoutReferrers,
    retry::{Failure, parse_retry_after},
    tls::{Files, Loaded, Trust, build_client, send_error},
};
use crate::{metrics::Metrics, tier::SourceError};

/// Redirects of one request; Docker Hub and the clouds need one or two.
const MAX_REDIRECTS: usize = 5;

/// Answers to throw away up to this length are read instead, so that the connection lives on.
const MAX_DRAINED_BYTES: u64 = 16 << 10;

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Manifest,
    Config,
    Blob,
    Token,
    /// Looking for what refers to an image.
    Referrers,
    /// Reading an index that was pushed.
    Index,
    /// Pushing one.
    Push,
}

impl Op {
    const ALL: [Self; 7] = [
        Self::Manifest,
        Self::Config,
        Self::Blob,
        Self::Token,
        Self::Referrers,
        Self::Index,
        Self::Push,
    ];

    /// The value of the label `op`.
    const fn label(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Config => "config",
            Self::Blob => "blob",
            Self::Token => "token",
            Self::Referrers => "referrers",
            Self::Index => "index",
            Self::Push => "push",
        }
    }
}

/// The values of the label `code`.
const CODES: [&str; 6] = ["2xx", "3xx", "4xx", "429", "5xx", "error"];

/// Returns the value of the label `code`.
fn code_label(status: StatusCode) -> &'static str {
    match status.as_u16() {
        200..=299 => "2xx",
        300..=399 => "3xx",
        429 => "429",
        400..=499 => "4xx",
        500..=599 => "5xx",
        _ => "error",
    }
}

/// Bytes of a body for which a second more is given: a slower way up is no use.
const SENT_BYTES_PER_SECOND: u64 = 64 << 10;

/// What is to be done with a URL.
#[derive(Debug, Clone)]
pub(crate) enum Verb {
    Get,
    Head,
    Post,
    Put {
        content_type: &'static str,
        body: Bytes,
    },
}

impl Verb {
    fn method(&self) -> Method {
        match self {
            Self::Get => Method::GET,
            Self::Head => Method::HEAD,
            Self::Post => Method::POST,
            Self::Put { .. } => Method::PUT,
        }
    }

    const fn is_redirected(&self) -> bool {
        matches!(self, Self::Get | Self::Head)
    }

    /// How long sending it may take, beside what any request may.
    fn patience(&self) -> Duration {
        match self {
            Self::Get | Self::Head | Self::Post => Duration::ZERO,
            Self::Put { body, .. } => {
                let len = u64::try_from(body.len()).unwrap_or(u64::MAX);
                Duration::from_secs(len / SENT_BYTES_PER_SECOND)
            }
        }
    }
}

/// A request to be made.
#[derive(Debug, Clone)]
pub(crate) struct Ask {
    pub(crate) op: Op,
    pub(crate) verb: Verb,
    pub(crate) url: Url,
    pub(crate) accept: Option<&'static str>,
    /// First and last byte wanted.
    pub(crate) range: Option<(u64, u64)>,
    pub(crate) authorization: Option<HeaderValue>,
    /// The host that is asked, whose settings hold for as long as nobody redirects elsewhere.
    pub(crate) at: Arc<EndpointSettings>,
}

/// What came back, its body not read yet.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: Response,
    /// The host that answered, which may be another one than was asked.
    pub(crate) host: String,
    /// Whether the host that was asked answered, and not one that it redirected to.
    pub(crate) is_from_origin: bool,
}

/// The HTTP clients of the process.
#[derive(Debug)]
pub(crate) struct Transport {
    pub(crate) config: RegistryConfig,
    pub(crate) metrics: Metrics,
    pub(crate) bench: Bench,
    pub(crate) without_referrers: WithoutReferrers,
    hosts_dir: HostsDir,
    /// What is in the files of hosts, read at start, so that what is wrong with one is known then.
    files: BTreeMap<Files, Loaded>,
    /// Made when first needed: the machine's authorities cost memory, and plain http needs none.
    ///
    /// std Mutex: held for a map lookup, never across an await.
    clients: Mutex<BTreeMap<Trust, reqwest::Client>>,
}

impl Transport {
    pub(crate) fn new(
        config: RegistryConfig,
        metrics: Metrics,
    ) -> Result<Self, RegistryConfigError> {
        let config = config.checked()?;
        let hosts_dir = match &config.hosts_dir {
            None => HostsDir::default(),
            Some(dir) => {
                let skip_verify = if config.allow_skip_verify {
                    SkipVerify::Allowed
                } else {
                    SkipVerify::Refused
                };
                let read = HostsDir::read(dir, skip_verify);
                read.map_err(|(path, reason)| RegistryConfigError::HostsFile { path, reason })?
            }
        };
        let configured: Vec<_> = config.hosts.values().map(HostConfig::trust).collect();
        let of_config = configured.iter().filter_map(|it| match it {
            Trust::Files(files) => Some(files),
            Trust::None | Trust::System => None,
        });
        let mut files = BTreeMap::new();
        for it in of_config.chain(hosts_dir.files()) {
            files.insert(it.clone(), Loaded::read(it)?);
        }
        for op in Op::ALL {
            for code in CODES {
                metrics
                    .registry_requests
                    .with_label_values(&[op.label(), code]);
            }
        }
        Ok(Self {
            config,
            metrics,
            bench: Bench::default(),
            without_referrers: WithoutReferrers::default(),
            hosts_dir,
            files,
            clients: Mutex::default(),
        })
    }

    /// Where a registry's content is to be had: as `[registry.hosts]` says, or else the directory of
    /// `hosts.toml` files.
    pub(crate) fn endpoints(&self, registry: &str) -> RegistryEndpoints {
        let of_dir = if self.config.has_host(registry) {
            None
        } else {
            self.hosts_dir.endpoints(registry)
        };
        of_dir.unwrap_or_else(|| RegistryEndpoints::configured(&self.config, registry))
    }

    /// Refuses URLs that are neither https nor plain http to a host that is configured so.
    fn check_url(&self, url: &Url, at: &EndpointSettings) -> Result<(), SourceError> {
        let (host, asked) = (host_of(url), at.url("", "").map(|it| host_of(&it))?);
        match url.scheme() {
            "https" => Ok(()),
            "http" if at.is_at(url) || self.settings_for(url).plain_http => Ok(()),
            "http" => Err(protocol(
                &asked,
                format!(
                    "it leads to plain http at {host}: set plain_http for that host if this is meant"
                ),
            )),
            _ => Err(protocol(
                &asked,
                "it leads to a URL that is not http".to_owned(),
            )),
        }
    }

    /// Makes a request and follows its redirects, if it only reads.
    ///
    /// # Errors
    /// If no answer came; any status but a redirect is an answer.
    pub(crate) async fn send(&self, ask: Ask) -> Result<Answer, Failure> {
        let asked_host = host_of(&ask.url);
        let mut url = ask.url;
        let mut authorization = ask.authorization;
        let mut is_from_origin = true;
        for _ in 0..=MAX_REDIRECTS {
            self.check_url(&url, &ask.at)?;
            let host = host_of(&url);
            let mut request = self
                .client_for(&url, &ask.at)
                .await?
                .request(ask.verb.method(), url.clone())
                .header(ACCEPT_ENCODING, "identity");
            if ask.at.is_at(&url) {
                request = request.headers(ask.at.headers.clone());
            }
            match &ask.verb {
                Verb::Get | Verb::Head => {}
                // Registries refuse a request without a length that might have a body.
                Verb::Post => request = request.header(CONTENT_LENGTH, 0),
                Verb::Put { content_type, body } => {
                    request = request
                        .header(CONTENT_TYPE, *content_type)
                        .body(body.clone());
                }
            }
            if let Some(accept) = ask.accept {
                request = request.header(ACCEPT, accept);
            }
            if let Some((first, last)) = ask.range {
                request = request.header(RANGE, format!("bytes={first}-{last}"));
            }
            if let Some(authorization) = &authorization {
                request = request.header(AUTHORIZATION, authorization.clone());
            }
            let limit =
                self.config.connect_timeout() + self.config.read_timeout() + ask.verb.patience();
            let sent = tokio::time::timeout(limit, request.send()).await;
            let response = match sent {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => {
                    self.count(ask.op, "error");
                    return Err(send_error(&host, error).into());
                }
                Err(_) => {
                    self.count(ask.op, "error");
                    let reason = format!("no answer within {} s", limit.as_secs());
                    return Err(unavailable(&host, reason).into());
                }
            };
            self.count(ask.op, code_label(response.status()));
            let redirect = if ask.verb.is_redirected() {
                redirect_target(&response, &url)
            } else {
                Redirect::No
            };
            let next = match redirect {
                Redirect::No => {
                    return Ok(Answer {
                        response,
                        host,
                        is_from_origin,
                    });
                }
                Redirect::Broken => {
                    return Err(protocol(&host, "it redirects to nowhere".to_owned()).into());
                }
                Redirect::To(next) => next,
            };
            self.drain(response).await;
            if next.origin() != url.origin() {
                authorization = None;
                is_from_origin = false;
            }
            url = next;
        }
        let reason = format!("it redirects more than {MAX_REDIRECTS} times");
        Err(protocol(&asked_host, reason).into())
    }

    /// Reads an answer of at most `max_len` bytes to its end.
    pub(crate) async fn read(&self, mut answer: Answer, max_len: usize) -> Result<Bytes, Failure> {
        let host = answer.host;
        let too_long = || protocol(&host, format!("its answer is longer than {max_len} bytes"));
        let announced = answer.response.content_length().unwrap_or(0);
        if u64::try_from(max_len).is_ok_and(|max| max < announced) {
            return Err(too_long().into());
        }
        // One deadline for all of it: a document is small.
        let limit = self.config.read_timeout();
        let read = async {
            let mut body = Vec::new();
            while let Some(bytes) = answer.response.chunk().await.map_err(|error| {
                unavailable(
                    &host,
                    format!("the connection broke: {}", root_cause(&error)),
                )
            })? {
                if max_len < body.len() + bytes.len() {
                    return Err(too_long());
                }
                body.extend_from_slice(&bytes);
            }
            Ok(Bytes::from(body))
        };
        match tokio::time::timeout(limit, read).await {
            Ok(read) => Ok(read?),
            Err(_) => {
                let reason = format!("its answer did not end within {} s", limit.as_secs());
                Err(unavailable(&host, reason).into())
            }
        }
    }

    /// Reads a short answer that nobody wants, so that its connection can be used again.
    pub(crate) async fn drain(&self, mut response: Response) {
        if response
            .content_length()
            .is_some_and(|it| it <= MAX_DRAINED_BYTES)
        {
            let read = async { while let Ok(Some(_)) = response.chunk().await {} };
            // A second is plenty for one packet; if it does not come, the connection is dropped.
            let _ = tokio::time::timeout(Duration::from_secs(1), read).await;
        }
    }

    fn count(&self, op: Op, code: &str) {
        self.metrics
            .registry_requests
            .with_label_values(&[op.label(), code])
            .inc();
    }

    /// Returns the settings for a URL's host, with its port written out or not.
    fn settings_for(&self, url: &Url) -> HostConfig {
        let host = host_of(url);
        let with_port = match url.port_or_known_default() {
            Some(port) if !self.config.has_host(&host) => format!("{host}:{port}"),
            Some(_) | None => host,
        };
        self.config.host(&with_port)
    }

    /// Returns the client that trusts whom the URL's host is to be trusted by.
    async fn client_for(
        &self,
        url: &Url,
        at: &EndpointSettings,
    ) -> Result<reqwest::Client, SourceError> {
        let host = host_of(url);
        let trust = match url.scheme() {
            "https" if at.is_at(url) => at.trust.clone(),
            "https" => self.settings_for(url).trust(),
            _ => Trust::None,
        };
        let known = {
            let clients = self.clients.lock().expect("no panic while it is held");
            clients.get(&trust).cloned()
        };
        if let Some(client) = known {
            return Ok(client);
        }
        let loaded = match &trust {
            // Never without them: that would be another trust than was asked for.
            Trust::Files(files) => self.files.get(files).cloned().ok_or_else(|| {
                let reason = "its CA and certificate were not read at the start";
                unavailable(&host, reason.to_owned())
            })?,
            Trust::System | Trust::None => Loaded::default(),
        };
        let connect_timeout = self.config.connect_timeout();
        let kind = trust.clone();
        // Reads and parses some 150 certificates: milliseconds.
        let built =
            tokio::task::spawn_blocking(move || build_client(&kind, loaded, connect_timeout))
                .await
                .map_err(|error| unavailable(&host, format!("setting up TLS: {error}")))?;
        let client = built.map_err(|error| unavailable(&host, error.to_string()))?;
        let mut clients = self.clients.lock().expect("no panic while it is held");
        Ok(clients.entry(trust).or_insert(client).clone())
    }
}

/// The host and, unless it is the scheme's own, the port of a URL.
pub(crate) fn host_of(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => String::new(),
    }
}

enum Redirect {
    No,
    To(Url),
    Broken,
}

fn redirect_target(response: &Response, url: &Url) -> Redirect {
    if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Redirect::No;
    }
    response
        .headers()
        .get(LOCATION)
        .and_then(|it| it.to_str().ok())
        .and_then(|it| url.join(it).ok())
        .filter(Url::has_host)
        .map_or(Redirect::Broken, Redirect::To)
}

pub(crate) fn unavailable(registry: &str, reason: String) -> SourceError {
    SourceError::Unavailable {
        registry: registry.to_owned(),
        reason,
    }
    .shortened()
}

pub(crate) fn protocol(registry: &str, reason: String) -> SourceError {
    SourceError::Protocol {
        registry: registry.to_owned(),
        reason,
    }
    .shortened()
}

pub(crate) fn unsupported(what: String, reason: String) -> SourceError {
    SourceError::Unsupported { what, reason }.shortened()
}

/// Returns how long an answer asks to wait.
pub(crate) fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    parse_retry_after(text, SystemTime::now())
}

/// Returns the text of the innermost cause, which names no URL.
pub(crate) fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: Option<&dyn std::error::Error> = error.source();
    let mut text = None;
    while let Some(it) = cause {
        text = Some(it.to_string());
        cause = it.source();
    }
    text.unwrap_or_else(|| "request failed".to_owned())
}
