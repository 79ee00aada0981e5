//! Carries the requests of `object_store` over the HTTP client that the driver has anyway.
//!
//! Answers that `object_store` has no use for become a [`Fault`] here, where the status is known:
//! `object_store` keeps it to itself. Their bodies are read as far as is needed to name the fault, so
//! that no server can make a node hold a long one.

use std::{future::Future, pin::Pin, time::Duration};

use futures_util::StreamExt;
use http_body_util::BodyExt;
use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
        HttpResponseBody, HttpService,
    },
};
use reqwest::StatusCode;
use rustls::pki_types::CertificateDer;

use crate::{
    tier::GETS_AHEAD,
    tls::{self, SystemAuthorities},
};

/// Bytes of an error's body that are looked at: its code is among the first hundred.
const MAX_ERROR_BYTES: usize = 4096;

/// Idle connections: as many as there are requests for values at a time.
const MAX_IDLE_CONNECTIONS: usize = GETS_AHEAD;

/// How long an idle connection is kept; each costs its buffers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

/// What went wrong with a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// There was no answer, or it broke off.
    #[error("{reason}")]
    NoAnswer {
        /// The innermost cause, which names no URL.
        reason: String,
    },
    /// The server refused.
    #[error("HTTP {status} {code}")]
    Refused {
        status: u16,
        /// S3's word for it, such as `SlowDown`; empty if the answer has none.
        code: String,
    },
}

impl Fault {
    /// Finds the fault that made `error`.
    pub(super) fn of(error: &object_store::Error) -> Option<&Self> {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(it) = cause {
            if let Some(fault) = it.downcast_ref() {
                return Some(fault);
            }
            cause = it.source();
        }
        None
    }

    fn no_answer(error: &reqwest::Error) -> Self {
        let mut innermost: &dyn std::error::Error = error;
        while let Some(cause) = innermost.source() {
            innermost = cause;
        }
        let reason = innermost.to_string();
        Self::NoAnswer { reason }
    }
}

/// The driver's HTTP client, as `object_store` uses it.
#[derive(Debug, Clone)]
pub(super) struct Connector(reqwest::Client);

impl Connector {
    /// Makes a client that trusts the machine's authorities and `extra`.
    pub(super) fn new(
        system: SystemAuthorities,
        extra: Vec<CertificateDer<'static>>,
        connect_timeout: Duration,
    ) -> Result<Self, String> {
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls::client_config(system, extra)?)
            // A signature is for one host.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            .connect_timeout(connect_timeout)
            .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
            .pool_idle_timeout(IDLE_TIMEOUT)
            .user_agent(concat!("clip-csi/", env!("CARGO_PKG_VERSION")))
            .build();
        client.map(Self).map_err(|error| error.to_string())
    }

    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string().parse();
        let url = url.map_err(|error| HttpError::new(HttpErrorKind::Unknown, BadUrl(error)))?;
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        // One piece, which is not copied.
        let body = body.collect().await?.to_bytes();
        *request.body_mut() = Some(body.into());
        let answer = self.0.execute(request).await.map_err(http_error)?;
        let status = answer.status();
        let headers = answer.headers().clone();
        let body = match concerns_object_store(status) {
            true => HttpResponseBody::new(reqwest::Body::from(answer).map_err(http_error)),
            false => {
                let code = error_code(answer).await;
                // A bucket that is not there must not look like a value that is not.
                if status != StatusCode::NOT_FOUND || code == "NoSuchBucket" {
                    let status = status.as_u16();
                    let fault = Fault::Refused { status, code };
                    return Err(HttpError::new(HttpErrorKind::Unknown, fault));
                }
                Vec::new().into()
            }
        };
        let mut response = HttpResponse::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Ok(response)
    }
}

/// Whether `object_store` decides something by this status. Of "not found" it does, too, but not
/// without a look at what was not found.
fn concerns_object_store(status: StatusCode) -> bool {
    status.is_success()
        || matches!(
            status,
            StatusCode::NOT_MODIFIED | StatusCode::CONFLICT | StatusCode::PRECONDITION_FAILED
        )
}

/// The content of `<Code>` in the answer, if it is short and plain.
async fn error_code(answer: reqwest::Response) -> String {
    let mut body = Vec::new();
    let mut pieces = answer.bytes_stream();
    while let Some(Ok(piece)) = pieces.next().await {
        body.extend(piece.iter().take(MAX_ERROR_BYTES - body.len()));
        if body.len() == MAX_ERROR_BYTES {
            break;
        }
    }
    let text = String::from_utf8_lossy(&body);
    let code = text
        .split_once("<Code>")
        .and_then(|(_, rest)| rest.split_once("</Code>"));
    match code {
        Some((code, _))
            if code.len() <= 64 && code.bytes().all(|it| it.is_ascii_alphanumeric()) =>
        {
            code.to_owned()
        }
        _ => String::new(),
    }
}

/// A URL that cannot be sent to; it is not quoted.
#[derive(Debug, thiserror::Error)]
#[error("the endpoint makes no URL: {0}")]
struct BadUrl(<reqwest::Url as std::str::FromStr>::Err);

fn http_error(error: reqwest::Error) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, Fault::no_answer(&error))
}

impl HttpService for Connector {
    // What `#[async_trait]` makes of `async fn call`; the macro itself would be one more dependency.
    fn call<'life0, 'async_trait>(
        &'life0 self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        Box::pin(self.send(request))
    }
}

impl HttpConnector for Connector {
    /// One client for all: what the options say is decided when the engine is made.
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}
