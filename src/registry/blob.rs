//! Streams a blob, and goes on where a broken stream ended, at the next host if a mirror broke it.
//!
//! oci-client's blob pulls are not used: they neither resume nor retry, hide `Retry-After` and
//! `Content-Range`, and answer a 401 in the middle with an error.
//!
//! Invariant: [`BlobReader::position`] is the offset of the next byte to hand out, whatever the
//! connection does; every request asks for the bytes from there to the end of what is wanted.

use std::{
    collections::BTreeSet,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use reqwest::{Response, StatusCode, header::CONTENT_RANGE};
use tokio::time::Instant;

use super::{
    mirrors::{MIRROR_DEADLINE, within_deadline},
    pushed::ImageIndexes,
    retry::{Failure, Retry},
    session::{Endpoint, Object, Role, Session},
    transport::{Op, protocol, root_cause, unavailable},
};
use crate::{
    digest::{BlobDigest, DiffId},
    tier::{BlobSource, BlobStream, BoxFuture, KeepPushed, SourceError, SourceIdentity},
};

/// Bytes that count as progress against the stall timeout.
///
/// One packet or two: a server that drips single bytes is as good as one that stalls.
const PROGRESS_BYTES: u64 = 4 << 10;

/// Bytes before a part of a blob that are read and thrown away, if the server ignores Range.
///
/// Who wants a part has another way, a stream of all, and would wait for all of these bytes.
const MAX_SKIP_BYTES: u64 = 1 << 20;

/// The blobs of one repository.
#[derive(Debug)]
pub(crate) struct RepositoryBlobs {
    session: Arc<Session>,
    identity: SourceIdentity,
    /// Blobs that came wrong: their registry alone is asked for them.
    ///
    /// std Mutex: held for a set lookup, never across an await.
    distrusted: Mutex<BTreeSet<BlobDigest>>,
    /// The index that may have been pushed beside the image, if one is to be looked for.
    indexes: Option<ImageIndexes>,
}

impl RepositoryBlobs {
    pub(crate) fn new(
        session: Arc<Session>,
        identity: SourceIdentity,
        indexes: Option<ImageIndexes>,
    ) -> Self {
        Self {
            session,
            identity,
            distrusted: Mutex::default(),
            indexes,
        }
    }

    fn first_endpoint(&self, blob: &BlobDigest) -> usize {
        let distrusted = self.distrusted.lock();
        if distrusted
            .unwrap_or_else(PoisonError::into_inner)
            .contains(blob)
        {
            return usize::MAX;
        }
        self.session.next_endpoint(0)
    }
}

impl BlobSource for RepositoryBlobs {
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        Box::pin(async move {
            let session = Arc::clone(&self.session);
            let object = Object {
                op: Op::Blob,
                path: format!("blobs/{blob}"),
                what: format!("layer blob {blob}"),
            };
            let nth = self.first_endpoint(blob);
            let mut reader = BlobReader::new(session, object, blob_bytes, range, nth)?;
            reader.connect().await?;
            let stream = stream::try_unfold(reader, |mut reader| async move {
                let next = reader.next().await?;
                Ok(next.map(|bytes| (bytes, reader)))
            });
            Ok(Box::pin(stream) as BlobStream)
        })
    }

    fn identity(&self) -> Option<SourceIdentity> {
        Some(self.identity.clone())
    }

    fn distrust(&self, blob: &BlobDigest) -> bool {
        let distrusted = self.distrusted.lock();
        self.session.has_mirrors()
            && distrusted
                .unwrap_or_else(PoisonError::into_inner)
                .insert(*blob)
    }

    fn pins_index(&self) -> bool {
        self.indexes.as_ref().is_some_and(ImageIndexes::is_pinned)
    }

    fn layer_index<'a>(
        &'a self,
        layer: &'a DiffId,
        keep: &'a mut dyn KeepPushed,
    ) -> BoxFuture<'a, Result<bool, SourceError>> {
        Box::pin(async move {
            match &self.indexes {
                Some(indexes) => indexes.layer_index(&self.session, layer, keep).await,
                None => Ok(false),
            }
        })
    }
}

/// A blob being read.
pub(super) struct BlobReader {
    session: Arc<Session>,
    object: Object,
    blob_bytes: u64,
    position: u64,
    /// Where what is wanted ends.
    end: u64,
    /// Which host is asked: the mirrors in order, then the registry.
    nth: usize,
    body: Option<Body>,
    retry: Retry,
}

/// An answer being read.
struct Body {
    response: Response,
    host: String,
    /// Bytes before the position that the server sends although they were not asked for.
    skip_bytes: u64,
    /// Bytes of the answer still to come, if it says how many.
    left_bytes: Option<u64>,
    /// How long nothing may come.
    patience: Duration,
    stall: Stall,
}

/// Measures how long nothing came, without the time the consumer takes.
#[derive(Debug, Default)]
struct Stall {
    waited: Duration,
    received_bytes: u64,
}

impl Stall {
    fn received(&mut self, waited: Duration, len: u64) {
        self.waited += waited;
        self.received_bytes += len;
        if PROGRESS_BYTES <= self.received_bytes {
            *self = Self::default();
        }
    }
}

impl BlobReader {
    /// Reads a range of the blob `object`, which has `blob_bytes`, from the `nth` host on.
    pub(super) fn new(
        session: Arc<Session>,
        object: Object,
        blob_bytes: u64,
        range: Range<u64>,
        nth: usize,
    ) -> Result<Self, SourceError> {
        if blob_bytes < range.end || range.end < range.start {
            let what = &object.what;
            let reason = format!("{what} has {blob_bytes} bytes, not those at {range:?}");
            return Err(protocol(&session.registry, reason));
        }
        Ok(Self {
            object,
            retry: Retry::new(&session.transport.config),
            session,
            blob_bytes,
            position: range.start,
            end: range.end,
            nth,
            body: None,
        })
    }

    /// Connects to the first host that has the blob, to the registry with retries, unless there is
    /// nothing left to read.
    async fn connect(&mut self) -> Result<(), SourceError> {
        while self.body.is_none() && self.position < self.end {
            let endpoint = self.session.endpoint(self.nth);
            let connected = match endpoint.role {
                Role::Mirror => {
                    let attempt = || self.connect_once(endpoint);
                    let connected = within_deadline(&endpoint.host, attempt).await;
                    connected.map_err(Failure::from)
                }
                Role::Origin => self.connect_once(endpoint).await,
            };
            match connected {
                Ok(body) => self.body = Some(body),
                Err(failure) => self.failed(failure).await?,
            }
        }
        Ok(())
    }

    /// Goes on after a failure: at the next host if a mirror failed, else after a wait.
    ///
    /// # Errors
    /// The failure's, if there is to be no other attempt.
    async fn failed(&mut self, failure: Failure) -> Result<(), SourceError> {
        self.body = None;
        let endpoint = self.session.endpoint(self.nth);
        match endpoint.role {
            Role::Mirror => {
                let bench = &self.session.transport.bench;
                bench.note(&endpoint.host, &failure.error);
                self.nth = self.session.next_endpoint(self.nth + 1);
                Ok(())
            }
            Role::Origin => self.retry.wait(failure).await,
        }
    }

    /// Returns the next bytes, `None` after the last.
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            self.connect().await?;
            let Some(body) = &mut self.body else {
                return Ok(None);
            };
            let is_done = self.position == self.end;
            if is_done && body.left_bytes == Some(0) {
                return Ok(None);
            }
            match read_once(body, &self.session).await {
                Ok(Some(bytes)) => match self.take(bytes) {
                    Ok(Some(bytes)) => return Ok(Some(bytes)),
                    Ok(None) => {}
                    Err(error) => self.failed(error.into()).await?,
                },
                // All bytes are here: how the answer ends does not matter any more.
                Ok(None) | Err(_) if is_done => {
                    self.body = None;
                    return Ok(None);
                }
                Ok(None) => {
                    let reason = format!(
                        "{} ended after {} of {} bytes",
                        self.object.what, self.position, self.end
                    );
                    let failure = unavailable(&body.host, reason).into();
                    self.failed(failure).await?;
                }
                Err(failure) => self.failed(failure).await?,
            }
        }
    }

    /// Takes bytes as they came and returns those that are new.
    fn take(&mut self, mut bytes: Bytes) -> Result<Option<Bytes>, SourceError> {
        let body = self.body.as_mut().expect("bytes come from a body");
        let len = len_of(&bytes);
        body.left_bytes = body.left_bytes.map(|it| it.saturating_sub(len));
        let skipped = body.skip_bytes.min(len);
        body.skip_bytes -= skipped;
        // At most the length of `bytes`, so that it fits.
        let _ = bytes.split_to(usize::try_from(skipped).unwrap_or(bytes.len()));
        if bytes.is_empty() {
            return Ok(None);
        }
        if self.end - self.position < len_of(&bytes) {
            // A server that ignores Range goes on beyond what was asked for.
            if self.end < self.blob_bytes {
                bytes.truncate(usize::try_from(self.end - self.position).unwrap_or(bytes.len()));
                body.left_bytes = Some(0);
                self.position = self.end;
                return Ok(Some(bytes));
            }
            let reason = format!(
                "{} is longer than the {} bytes of its manifest: push the image again",
                self.object.what, self.blob_bytes
            );
            return Err(protocol(&body.host, reason));
        }
        self.position += len_of(&bytes);
        self.retry.progressed();
        Ok(Some(bytes))
    }

    /// Makes one attempt to get the bytes from the position on.
    async fn connect_once(&self, endpoint: &Endpoint) -> Result<Body, Failure> {
        let is_part = 0 < self.position || self.end < self.blob_bytes;
        let range = is_part.then_some((self.position, self.end - 1));
        let answer = self
            .session
            .get_once(endpoint, &self.object, None, range)
            .await?;
        let host = answer.host;
        let left_bytes = answer.response.content_length();
        let wanted_bytes = self.end - self.position;
        let (skip_bytes, max_bytes) = match (answer.response.status(), range) {
            (StatusCode::OK, _) if MAX_SKIP_BYTES < self.position && self.end < self.blob_bytes => {
                let reason = format!(
                    "it ignores the range {}-{} of {}",
                    self.position,
                    self.end - 1,
                    self.object.what
                );
                return Err(protocol(&host, reason).into());
            }
            // A server may ignore Range (RFC 9110, 14.2); pull-through caches do at first.
            (StatusCode::OK, _) => (self.position, self.blob_bytes),
            (StatusCode::PARTIAL_CONTENT, Some(_)) => {
                let value = answer.response.headers().get(CONTENT_RANGE);
                let text = value.and_then(|it| it.to_str().ok()).unwrap_or("none");
                let is_wanted = parse_content_range(text)
                    .is_some_and(|it| it.serves(self.position..self.end, self.blob_bytes));
                if !is_wanted {
                    let reason = format!(
                        "Content-Range {:?} for bytes {}-{} of {}",
                        shorten(text),
                        self.position,
                        self.end - 1,
                        self.object.what
                    );
                    return Err(protocol(&host, reason).into());
                }
                (0, wanted_bytes)
            }
            (status, _) => {
                let reason = format!("HTTP {status} for {}", self.object.what);
                return Err(protocol(&host, reason).into());
            }
        };
        // Of the registry, what is missing is asked for; a mirror's blob is another one then.
        if endpoint.role == Role::Mirror && left_bytes.is_some_and(|it| it < max_bytes) {
            let reason = format!("{} is shorter than its manifest says", self.object.what);
            return Err(protocol(&host, reason).into());
        }
        if left_bytes.is_some_and(|it| max_bytes < it) {
            let reason = format!(
                "{} is longer than the {} bytes of its manifest: push the image again",
                self.object.what, self.blob_bytes
            );
            return Err(protocol(&host, reason).into());
        }
        Ok(Body {
            response: answer.response,
            host,
            skip_bytes,
            left_bytes,
            patience: match endpoint.role {
                Role::Mirror => self
                    .session
                    .transport
                    .config
                    .read_timeout()
                    .min(MIRROR_DEADLINE),
                Role::Origin => self.session.transport.config.read_timeout(),
            },
            stall: Stall::default(),
        })
    }
}

/// Reads what comes next of an answer, within the stall timeout.
async fn read_once(body: &mut Body, session: &Session) -> Result<Option<Bytes>, Failure> {
    let limit = body.patience;
    let since = Instant::now();
    let left = limit.saturating_sub(body.stall.waited);
    match tokio::time::timeout(left, body.response.chunk()).await {
        Ok(Ok(bytes)) => {
            let len = bytes.as_ref().map_or(0, len_of);
            body.stall.received(since.elapsed(), len);
            session.transport.metrics.registry_read_bytes.inc_by(len);
            Ok(bytes)
        }
        Ok(Err(error)) => {
            let reason = format!("the connection broke: {}", root_cause(&error));
            Err(unavailable(&body.host, reason).into())
        }
        Err(_) => {
            let reason = format!("no progress for {} s", limit.as_secs());
            Err(unavailable(&body.host, reason).into())
        }
    }
}

fn len_of(bytes: &Bytes) -> u64 {
    u64::try_from(bytes.len()).expect("a length in memory fits 64 bits")
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

/// The bytes that a 206 says it carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ContentRange {
    first: u64,
    last: u64,
    total: Option<u64>,
}

impl ContentRange {
    /// Whether it starts where `wanted` of a blob of `blob_bytes` does, and stays within.
    fn serves(self, wanted: Range<u64>, blob_bytes: u64) -> bool {
        self.first == wanted.start
            && self.first <= self.last
            && self.last < wanted.end
            && self.total.is_none_or(|it| it == blob_bytes)
    }
}

/// Reads `bytes 5-9/10` (RFC 9110, 14.4).
fn parse_content_range(text: &str) -> Option<ContentRange> {
    let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = match total {
        "*" => None,
        digits => Some(digits.parse().ok()?),
    };
    Some(ContentRange {
        first: first.parse().ok()?,
        last: last.parse().ok()?,
        total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_range_asked_for_is_taken() {
        for (text, serves) in [
            ("bytes 5-9/10", true),
            ("bytes 5-9/*", true),
            ("bytes 5-7/10", true),
            ("bytes 4-9/10", false),
            ("bytes 6-9/10", false),
            ("bytes 5-10/10", false),
            ("bytes 5-10/11", false),
            ("bytes 5-9/11", false),
            ("bytes 5-4/10", false),
            ("bytes */10", false),
            ("bytes 5-99999999999999999999/10", false),
            ("items 5-9/10", false),
            ("none", false),
            ("", false),
        ] {
            let answer = parse_content_range(text).is_some_and(|it| it.serves(5..10, 10));
            assert_eq!(answer, serves, "{text:?}");
        }
    }

    #[test]
    fn a_drip_is_no_progress() {
        let mut stall = Stall::default();
        for _ in 0..10 {
            stall.received(Duration::from_secs(1), 1);
        }
        assert_eq!(stall.waited, Duration::from_secs(10));
        stall.received(Duration::from_secs(1), PROGRESS_BYTES);
        assert_eq!(stall.waited, Duration::ZERO);
    }
}
