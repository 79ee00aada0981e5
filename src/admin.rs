//! Serves `/metrics`, `/healthz` and `/readyz` over HTTP/1.1.
//!
//! | path | answers |
//! |---|---|
//! | `/metrics` | the metrics in Prometheus' text format |
//! | `/healthz` | 200 as long as the process answers |
//! | `/readyz` | 200 when the driver is ready, else 503 and why it is not |
//!
//! Anything else is 404. Nothing here does I/O beyond the answer, or depends on a registry or a
//! remote store. A connection carries one request, has ten seconds, and is one of sixteen: whoever
//! holds connections open delays the next scrape, not the driver.

use std::{
    borrow::Cow,
    convert::Infallible,
    future::Future,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Bytes, header::CONTENT_TYPE, server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::{metrics::Metrics, tier::BoxFuture};

/// What `/metrics` shows.
pub trait Page: Send + Sync + 'static {
    /// The metrics in Prometheus' text format.
    fn page(&self) -> BoxFuture<'_, prometheus::Result<String>>;
}

impl Page for Metrics {
    fn page(&self) -> BoxFuture<'_, prometheus::Result<String>> {
        Box::pin(std::future::ready(self.encode()))
    }
}

/// Connections at once: Prometheus, kubelet's two probes, a person, and room.
const MAX_CONNECTIONS: usize = 16;

/// How long a client may take to send its request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may last; a scrape takes milliseconds.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait when no connection can be accepted: usually all file descriptors are in use.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Whether the driver is ready: a latch with a reason.
#[derive(Debug)]
pub struct Ready {
    /// What is missing; `None` when ready. std Mutex: held for the copy of a sentence.
    missing: Mutex<Option<Cow<'static, str>>>,
}

impl Ready {
    /// Makes a latch that is not set, because of `reason`.
    pub fn not_yet(reason: impl Into<Cow<'static, str>>) -> Self {
        Self {
            missing: Mutex::new(Some(reason.into())),
        }
    }

    /// Says that the driver is ready.
    pub fn set(&self) {
        self.replace(None);
    }

    /// Says that the driver is not ready any more, or not yet, and why.
    pub fn unset(&self, reason: impl Into<Cow<'static, str>>) {
        self.replace(Some(reason.into()));
    }

    fn replace(&self, missing: Option<Cow<'static, str>>) {
        *self.missing.lock().unwrap_or_else(PoisonError::into_inner) = missing;
    }

    /// What is missing; `None` when the driver is ready.
    pub fn missing(&self) -> Option<Cow<'static, str>> {
        self.missing
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Serves until `shutdown` is ready. Connections are cut off then: nobody's work depends on them.
pub async fn serve(
    listener: TcpListener,
    metrics: impl Page,
    ready: Arc<Ready>,
    shutdown: impl Future<Output = ()>,
) {
    let accepting = accept(listener, Arc::new(metrics), ready);
    tokio::select! {
        () = accepting => {}
        () = shutdown => {}
    }
}

/// Accepts connections for ever; owns their tasks, and ends them when it is dropped.
async fn accept(listener: TcpListener, metrics: Arc<dyn Page>, ready: Arc<Ready>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let slot = Arc::clone(&slots)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        while connections.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(err) => {
                warn!(error = %err, "accepting a connection failed");
                sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let (metrics, ready) = (Arc::clone(&metrics), Arc::clone(&ready));
        connections.spawn(async move {
            let _slot = slot;
            match timeout(CONNECTION_TIMEOUT, answer_one(stream, &*metrics, &ready)).await {
                Ok(Ok(())) => {}
                Ok(Err(err)) => debug!(error = %err, "admin connection failed"),
                Err(_) => debug!("admin connection took too long"),
            }
        });
    }
}

async fn answer_one(stream: TcpStream, metrics: &dyn Page, ready: &Ready) -> hyper::Result<()> {
    let service = service_fn(|request: Request<_>| async move {
        let response = respond(request.method(), request.uri().path(), metrics, ready).await;
        Ok::<_, Infallible>(response)
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn respond(
    method: &Method,
    path: &str,
    metrics: &dyn Page,
    ready: &Ready,
) -> Response<Full<Bytes>> {
    let (status, text) = match (method, path) {
        (&Method::GET, "/metrics") => match metrics.page().await {
            Ok(text) => (StatusCode::OK, text),
            Err(err) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{err}\n")),
        },
        (&Method::GET, "/healthz") => (StatusCode::OK, "ok\n".to_owned()),
        (&Method::GET, "/readyz") => match ready.missing() {
            None => (StatusCode::OK, "ok\n".to_owned()),
            Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
        },
        (_, _) => (
            StatusCode::NOT_FOUND,
            "not found: GET /metrics, /healthz or /readyz\n".to_owned(),
        ),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    // What Prometheus 3 demands (exposition format 0.0.4), and what suits a person as well.
    let content_type = "text/plain; version=0.0.4; charset=utf-8";
    response.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static(content_type),
    );
    response
}
