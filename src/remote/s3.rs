//! Keeps values as objects of a bucket: Amazon S3, or a server that speaks its protocol.
//!
//! ```text
//! <prefix>/<first 2 hex digits of the key's BLAKE3>/<key>
//! ```
//! The digits come first because a store spreads its load by the beginning of names. One object per
//! value: a chunk is fetched with one request and without knowing any other. Nothing expires here: give
//! the bucket a lifecycle rule.
//!
//! Requests used: `GetObject`, `HeadObject`, `PutObject`, with `If-None-Match` and `If-Match` where
//! the server honours them, and `DeleteObject`. Without the right to list the bucket, S3 answers
//! "forbidden" to who asks for what is not there.
//!
//! # Cancellation
//! Each request has a connection to itself: one that is given up is closed with it.

mod http;
mod lease;

use std::{
    fmt,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use object_store::{
    BackoffConfig, Error, GetOptions, GetResult, ObjectStore as _, ObjectStoreExt as _, PutMode,
    PutResult, RetryConfig, UpdateVersion,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey},
    path::Path,
};
use serde::Deserialize;
use tokio::{sync::OnceCell, task::JoinHandle, time::timeout};

use crate::{
    secret::Secret,
    tier::{BoxFuture, BoxStream, CacheKey, GETS_AHEAD, LayerCache, LeaseHolder, Put, TierError},
    tls::{self, SystemAuthorities},
};

use super::{config::RemoteConfigError, gate::time_for};
use http::{Connector, Fault};

/// Where the bucket is, and who may use it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3Config {
    /// The server, `https://host[:port]`; Amazon's for the region if absent.
    pub endpoint: Option<String>,
    /// The bucket.
    pub bucket: Option<String>,
    /// The region; `us-east-1` if absent, which servers other than Amazon's mostly take.
    pub region: Option<String>,
    /// What the names of all objects begin with.
    pub prefix: String,
    /// Whether the endpoint may be `http://`.
    pub allow_http: bool,
    /// Certificate authorities to trust beside the machine's, PEM.
    pub ca_file: Option<PathBuf>,
    /// A file with the access key id. Without it and its secret, credentials come from where AWS'
    /// tools take them: the environment, a web identity, the container's or the instance's role.
    pub access_key_file: Option<PathBuf>,
    /// A file with the secret access key.
    pub secret_key_file: Option<PathBuf>,
}

impl Default for S3Config {
    fn default() -> Self {
        Self {
            endpoint: None,
            bucket: None,
            region: None,
            prefix: "clip-csi".to_owned(),
            allow_http: false,
            ca_file: None,
            access_key_file: None,
            secret_key_file: None,
        }
    }
}

/// An access key, as its two files have it.
#[derive(Debug)]
pub struct AccessKey {
    /// The access key id.
    pub id: Secret<String>,
    /// The secret access key.
    pub secret: Secret<String>,
}

/// What an [`S3Cache`] can be told beside its configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct S3Options {
    /// Time to connect.
    pub connect_timeout: Duration,
    /// Time for a request for a chunk; one for a larger value gets more in proportion.
    pub request_timeout: Duration,
}

/// A remote content cache in a bucket.
pub struct S3Cache {
    store: AmazonS3,
    bucket: String,
    prefix: String,
    options: S3Options,
    /// Whether the server puts on a condition; empty until it was asked.
    honours_conditions: OnceCell<bool>,
}

impl fmt::Debug for S3Cache {
    /// Shows no credentials.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Cache")
            .field("bucket", &self.bucket)
            .field("prefix", &self.prefix)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl S3Cache {
    /// Wraps the bucket that `config` names. Does no I/O beside reading `ca_file`: a server that is
    /// down is found out by the first request.
    ///
    /// # Errors
    /// [`RemoteConfigError`] says which setting is missing or wrong.
    pub fn new(
        config: &S3Config,
        key: Option<AccessKey>,
        options: S3Options,
    ) -> Result<Self, RemoteConfigError> {
        let wrong = |reason: String| RemoteConfigError::S3 { reason };
        let bucket = config.bucket.clone().ok_or(RemoteConfigError::Missing {
            kind: "s3",
            setting: "s3.bucket",
        })?;
        let has_key = key.is_some();
        let mut builder = match key {
            Some(key) => AmazonS3Builder::new()
                .with_access_key_id(key.id.expose())
                .with_secret_access_key(key.secret.expose()),
            None => AmazonS3Builder::from_env(),
        };
        if let Some(endpoint) = &config.endpoint {
            // The one that no variable of the environment overrides.
            builder = builder.with_config(AmazonS3ConfigKey::S3Endpoint, endpoint);
        }
        if let Some(region) = &config.region {
            builder = builder.with_region(region);
        }
        let endpoint = [AmazonS3ConfigKey::S3Endpoint, AmazonS3ConfigKey::Endpoint]
            .iter()
            .find_map(|it| builder.get_config_value(it));
        // Nothing is asked over TLS then, not even for credentials.
        let system = match is_clear(endpoint.as_deref(), config.allow_http)? && has_key {
            true => SystemAuthorities::Ignored,
            false => SystemAuthorities::Trusted,
        };
        let extra = match &config.ca_file {
            None => Vec::new(),
            Some(path) => tls::read_authorities(path)
                .map_err(|reason| wrong(format!("ca_file {}: {reason}", path.display())))?,
        };
        let connector = Connector::new(system, extra, options.connect_timeout).map_err(wrong)?;
        let store = builder
            .with_bucket_name(&bucket)
            .with_http_connector(connector)
            // A reader goes on to the registry; the uploader tries again by itself.
            .with_retry(RetryConfig {
                backoff: BackoffConfig::default(),
                max_retries: 0,
                retry_timeout: Duration::ZERO,
            })
            // The request for many needs what some servers lack.
            .with_disable_bulk_delete(true)
            .build()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(Self {
            store,
            bucket,
            prefix: config.prefix.trim_matches('/').to_owned(),
            options,
            honours_conditions: OnceCell::new(),
        })
    }

    fn bucket(&self) -> &str {
        &self.bucket
    }

    fn path(&self, key: CacheKey) -> Path {
        let name = key.to_string();
        let spread = blake3::hash(name.as_bytes()).to_hex();
        Path::from(format!("{}/{}/{name}", self.prefix, &spread[..2]))
    }

    /// A name that no other node uses.
    fn probe_path(&self) -> Path {
        Path::from(format!("{}/probe/{}", self.prefix, LeaseHolder::random()))
    }

    /// Waits for a transfer of about `bytes`, for a bounded time.
    async fn timed<T>(
        &self,
        bytes: usize,
        request: impl Future<Output = T>,
    ) -> Result<T, TierError> {
        let after = time_for(self.options.request_timeout, bytes);
        let answer = timeout(after, request).await;
        answer.map_err(|_| TierError::Timeout { after })
    }

    async fn put_opts(
        &self,
        path: &Path,
        value: Bytes,
        mode: PutMode,
    ) -> object_store::Result<PutResult> {
        self.store.put_opts(path, value.into(), mode.into()).await
    }

    /// Fetches a value and its version.
    async fn fetch(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> Result<Option<(Bytes, UpdateVersion)>, TierError> {
        let found = self.open(key, max_bytes).await;
        self.read(key, max_bytes, found).await
    }

    /// Sends the request for a value, and waits until its answer begins. Needs nobody who waits: it may be
    /// a task of its own.
    fn open(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> impl Future<Output = Result<object_store::Result<GetResult>, TierError>> + Send + 'static
    {
        let (store, path) = (self.store.clone(), self.path(key));
        let options = GetOptions {
            // Who wants no byte asks whether there is a value.
            head: max_bytes == 0,
            ..GetOptions::default()
        };
        let after = time_for(self.options.request_timeout, 0);
        async move {
            let found = timeout(after, store.get_opts(&path, options)).await;
            found.map_err(|_| TierError::Timeout { after })
        }
    }

    /// Reads the value of an answer that has begun.
    async fn read(
        &self,
        key: CacheKey,
        max_bytes: usize,
        found: Result<object_store::Result<GetResult>, TierError>,
    ) -> Result<Option<(Bytes, UpdateVersion)>, TierError> {
        let found = match found? {
            Ok(found) => found,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(self.tier_error(&error)),
        };
        let len = usize::try_from(found.meta.size).unwrap_or(usize::MAX);
        // Its body is not even read.
        if max_bytes < len {
            let reason = format!("it has {len} bytes, at most {max_bytes} are expected");
            return Err(TierError::Corrupt { key, reason });
        }
        let version = UpdateVersion {
            e_tag: found.meta.e_tag.clone(),
            version: None,
        };
        if max_bytes == 0 {
            return Ok(Some((Bytes::new(), version)));
        }
        let mut value = Vec::with_capacity(len);
        let mut pieces = found.into_stream();
        let read = async {
            while let Some(piece) = pieces.next().await {
                let piece = piece.map_err(|error| self.tier_error(&error))?;
                if len < value.len() + piece.len() {
                    let reason = format!("it has more than the {len} bytes it was said to have");
                    return Err(TierError::Corrupt { key, reason });
                }
                value.extend_from_slice(&piece);
            }
            Ok(())
        };
        self.timed(len, read).await??;
        Ok(Some((value.into(), version)))
    }

    /// Gives the values of `keys`, whose requests are sent before their turn; their bodies are read in
    /// their turn, and wait in the kernel's buffers until then.
    fn opened_ahead(
        &self,
        keys: Vec<CacheKey>,
        max_bytes: usize,
    ) -> impl Stream<Item = Result<Option<Bytes>, TierError>> + Send + '_ {
        let opened = stream::iter(keys).map(move |key| {
            // A task, because nobody looks at it while the ones before are read, and its time is bounded.
            let opening = Opening(tokio::spawn(self.open(key, max_bytes)));
            async move { (key, opening.await) }
        });
        opened
            .buffered(GETS_AHEAD)
            .then(move |(key, found)| async move {
                let value = self.read(key, max_bytes, found).await?;
                Ok(value.map(|(value, _)| value))
            })
    }

    async fn put_value(&self, key: CacheKey, value: Bytes, put: Put) -> Result<(), TierError> {
        let path = self.path(key);
        let len = value.len();
        let mode = match put {
            Put::Replace => PutMode::Overwrite,
            Put::IfAbsent if self.honours_conditions().await? => PutMode::Create,
            Put::IfAbsent => match self.fetch(key, 0).await {
                // Two that do this at once put the same.
                Ok(None) => PutMode::Overwrite,
                Ok(Some(_)) | Err(TierError::Corrupt { .. }) => return Ok(()),
                Err(error) => return Err(error),
            },
        };
        match self.timed(len, self.put_opts(&path, value, mode)).await? {
            Ok(_) | Err(Error::AlreadyExists { .. }) => Ok(()),
            Err(error) => Err(self.tier_error(&error)),
        }
    }

    async fn delete_value(&self, key: CacheKey) -> Result<(), TierError> {
        let path = self.path(key);
        match self.timed(0, self.store.delete(&path)).await? {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(self.tier_error(&error)),
        }
    }

    /// Says what an error means for who uses the engine. Only the fault is quoted: the rest of
    /// `object_store`'s text repeats the request.
    fn tier_error(&self, error: &Error) -> TierError {
        let bucket = &self.bucket;
        match Fault::of(error) {
            Some(Fault::NoAnswer { reason }) => TierError::Unavailable {
                reason: format!("bucket {bucket}: {reason}"),
            },
            Some(Fault::Refused { status, code }) => refusal(bucket, *status, code),
            None => TierError::Io {
                reason: format!("bucket {bucket}: {error}"),
            },
        }
    }
}

/// Says what it means that the server refused.
fn refusal(bucket: &str, status: u16, code: &str) -> TierError {
    let hint = match (status, code) {
        (_, "NoSuchBucket") => " (create it, or correct remote.s3.bucket)",
        (301 | 307 | 400, _) => " (check remote.s3.region and endpoint)",
        (401 | 403, _) => {
            " (check the access key; it must be allowed to get, put and delete objects, and to list \
             the bucket)"
        }
        _ => "",
    };
    let reason = format!("bucket {bucket}: HTTP {status} {code}{hint}");
    match (status, code) {
        (507, _) | (_, "QuotaExceeded" | "XMinioStorageFull") => TierError::Full { reason },
        (408 | 429 | 502..=504, _) => TierError::Unavailable { reason },
        _ => TierError::Io { reason },
    }
}

/// Whether the endpoint is spoken to in the clear, which must be allowed.
fn is_clear(endpoint: Option<&str>, allow_http: bool) -> Result<bool, RemoteConfigError> {
    match endpoint {
        None => Ok(false),
        Some(it) if it.starts_with("https://") => Ok(false),
        Some(it) if it.starts_with("http://") && allow_http => Ok(true),
        Some(_) => Err(RemoteConfigError::S3 {
            reason:
                "endpoint must be https://host[:port], or http://host[:port] with allow_http = \
                     true"
                    .to_owned(),
        }),
    }
}

/// A request that was sent, and is given up with whoever wants its answer.
struct Opening(JoinHandle<Result<object_store::Result<GetResult>, TierError>>);

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Future for Opening {
    type Output = Result<object_store::Result<GetResult>, TierError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ended = ready!(Pin::new(&mut self.0).poll(cx));
        Poll::Ready(ended.unwrap_or_else(|error| {
            let reason = format!("a request was cut off: {error}");
            Err(TierError::Io { reason })
        }))
    }
}

impl LayerCache for S3Cache {
    fn engine(&self) -> &'static str {
        "s3"
    }

    fn get(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> BoxFuture<'_, Result<Option<Bytes>, TierError>> {
        Box::pin(async move { Ok(self.fetch(key, max_bytes).await?.map(|(value, _)| value)) })
    }

    fn get_each(
        &self,
        keys: Vec<CacheKey>,
        max_bytes: usize,
    ) -> BoxStream<'_, Result<Option<Bytes>, TierError>> {
        Box::pin(self.opened_ahead(keys, max_bytes))
    }

    fn get_again(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> Option<BoxFuture<'_, Result<Option<Bytes>, TierError>>> {
        Some(self.get(key, max_bytes))
    }

    fn put(&self, key: CacheKey, value: Bytes, put: Put) -> BoxFuture<'_, Result<(), TierError>> {
        Box::pin(self.put_value(key, value, put))
    }

    fn delete(&self, key: CacheKey) -> BoxFuture<'_, Result<(), TierError>> {
        Box::pin(self.delete_value(key))
    }

    fn lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<bool, TierError>> {
        Box::pin(self.take_lease(key, holder, ttl))
    }

    fn release(&self, key: CacheKey, holder: LeaseHolder) -> BoxFuture<'_, Result<(), TierError>> {
        Box::pin(self.release_lease(key, holder))
    }
}
