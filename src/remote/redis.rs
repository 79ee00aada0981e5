//! Keeps values in Redis or Valkey, one server or a cluster: one multiplexed connection to each, made when first needed.
//!
//! Chunks expire; manifests and indices do not, so that `maxmemory-policy volatile-lfu` evicts
//! chunks only. Values go over connections of their own (`lines`), except in a cluster, where redis-rs alone knows whom
//! to ask. Commands used: `GETRANGE`, `STRLEN`, `EXISTS`, `SET`, `DEL`, for leases `EVAL` with
//! `GET`, `SET`, `PTTL` and `DEL`, and what opens a connection (`HELLO`, `AUTH`, `SELECT`).
//!
//! # Cancellation
//! redis-rs matches replies to requests by order inside its own task: a request that is given up
//! has its reply thrown away there. After a timeout the connection is replaced, so that a server
//! that hangs does not pile up requests.

mod lines;
mod servers;
mod values;

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use ::redis::{Cmd, ErrorKind, FromRedisValue, RedisError};
use bytes::Bytes;
use futures_util::{Stream, stream};
use tokio::time::{Instant, timeout};

use crate::{
    secret::Secret,
    tier::{self, BoxFuture, BoxStream, CacheKey, LayerCache, LeaseHolder, Put, TierError},
};

use super::{config::RemoteConfigError, gate::time_for};
use lines::{Lines, Way};
use servers::{Handle, Servers};
use values::Refused;

/// A value that may be longer than this is measured before it is fetched: to give it the time that
/// it needs, and no more time than that to one that is short.
const MEASURED_BYTES: usize = 4 << 20;

/// How often a value is asked for that is another one with each request; then it counts as empty.
const ATTEMPTS: usize = 3;

/// Takes or renews a lease: `KEYS[1]`, for the holder `ARGV[1]`, for `ARGV[2]` milliseconds.
///
/// One that never expires was left by no holder: it is taken over.
const LEASE: &str = "\
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] and redis.call('PTTL', KEYS[1]) >= 0 then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1";

/// Ends the lease `KEYS[1]`, if `ARGV[1]` holds it.
const RELEASE: &str = "\
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0";

/// What a [`RedisCache`] can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RedisOptions {
    /// Time to connect and log in.
    pub connect_timeout: Duration,
    /// Time for a request for a chunk; one for a larger value gets more in proportion.
    pub request_timeout: Duration,
    /// Time after which chunks expire; `None` for never.
    pub chunk_ttl: Option<Duration>,
}

/// A remote content cache in Redis or Valkey.
pub struct RedisCache {
    servers: Servers,
    options: RedisOptions,
    /// std Mutex: held to copy or replace a handle, never across an await.
    slot: Mutex<Slot>,
    /// tokio Mutex, held across the await: of many that need a connection, one makes it.
    /// Taken before `slot`.
    connecting: tokio::sync::Mutex<()>,
    /// For values; a cluster has none, because redis-rs alone knows whom to ask.
    lines: Option<Lines>,
    /// tokio Mutex, held across the await: of values, one at a time is put.
    putting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Slot {
    current: Option<Connection>,
    n_made: u64,
    /// When the last attempt to connect failed, and how.
    failure: Option<(Instant, TierError)>,
}

#[derive(Clone)]
struct Connection {
    number: u64,
    handle: Handle,
}

impl std::fmt::Debug for RedisCache {
    /// Shows the address only: the rest of the URL may hold a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisCache")
            .field("address", &self.address())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl RedisCache {
    /// Wraps the server at `url`: `redis://[user[:password]@]host[:port][/db]`, or `unix:///path`; or the cluster that
    /// `redis-cluster://[user[:password]@]host[:port][,host[:port]]…` names some servers of.
    ///
    /// `password` replaces the one in the URL. Does no I/O: a server that is down is found out by
    /// the first request.
    ///
    /// # Errors
    /// [`RemoteConfigError::Url`] if the URL is not of that kind. The error does not contain it.
    pub fn connect(
        url: &Secret<String>,
        password: Option<&Secret<String>>,
        options: RedisOptions,
    ) -> Result<Self, RemoteConfigError> {
        let servers = Servers::parse(url, password)?;
        let lines = match &servers {
            Servers::One(client) => Some(Lines::new(client.clone(), options)),
            Servers::Cluster { .. } => None,
        };
        Ok(Self {
            servers,
            options,
            lines,
            slot: Mutex::default(),
            connecting: tokio::sync::Mutex::new(()),
            putting: tokio::sync::Mutex::new(()),
        })
    }

    fn address(&self) -> String {
        self.servers.address()
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        // Nothing panics with the lock held.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unavailable(&self, error: &RedisError) -> TierError {
        let address = self.address();
        let hint = match error.kind() {
            ErrorKind::AuthenticationFailed => " (check the user and the password file)",
            _ => "",
        };
        TierError::Unavailable {
            reason: format!("{address}: {error}{hint}"),
        }
    }

    /// Returns the connection, made anew if there is none; and whether it is new.
    async fn connection(&self) -> Result<(Connection, bool), TierError> {
        let asked = Instant::now();
        if let Some(current) = self.slot().current.clone() {
            return Ok((current, false));
        }
        let _connecting = self.connecting.lock().await;
        {
            let slot = self.slot();
            if let Some(current) = slot.current.clone() {
                return Ok((current, false));
            }
            // Whoever waited for an attempt that failed does not make another one.
            match &slot.failure {
                Some((at, error)) if asked < *at => return Err(error.clone()),
                _ => {}
            }
        }
        let after = self.options.connect_timeout;
        let made = match timeout(after, self.servers.connect()).await {
            Ok(made) => made.map_err(|error| self.unavailable(&error)),
            Err(_) => Err(TierError::Timeout { after }),
        };
        let mut slot = self.slot();
        match made {
            Ok(handle) => {
                slot.n_made += 1;
                let number = slot.n_made;
                let connection = Connection { number, handle };
                slot.current = Some(connection.clone());
                slot.failure = None;
                Ok((connection, true))
            }
            Err(error) => {
                slot.failure = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    /// Forgets a connection that is broken, unless another one has replaced it already.
    fn discard(&self, number: u64) {
        let mut slot = self.slot();
        if slot.current.as_ref().is_some_and(|it| it.number == number) {
            slot.current = None;
        }
    }

    /// Sends one command that transfers about `bytes`.
    ///
    /// A connection that turns out to be broken is replaced once, because the server may have
    /// closed it long ago (idle timeout, restart): that is no failure of this request. All
    /// commands of this engine may be repeated.
    async fn request<T: FromRedisValue>(
        &self,
        key: CacheKey,
        command: &Cmd,
        bytes: usize,
    ) -> Result<T, TierError> {
        let after = time_for(self.options.request_timeout, bytes);
        let (mut connection, mut fresh) = self.connection().await?;
        loop {
            let answer = timeout(after, command.query_async(&mut connection.handle)).await;
            let error = match answer {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) => error,
                Err(_) => {
                    self.discard(connection.number);
                    return Err(TierError::Timeout { after });
                }
            };
            if !error.is_unrecoverable_error() && !error.is_io_error() {
                return Err(self.answered(key, &error));
            }
            self.discard(connection.number);
            if fresh {
                return Err(self.unavailable(&error));
            }
            (connection, _) = self.connection().await?;
            fresh = true;
        }
    }

    /// Converts an error that the server itself answered with.
    fn answered(&self, key: CacheKey, error: &RedisError) -> TierError {
        match error.code() {
            Some("WRONGTYPE") => not_a_string(key),
            Some("OOM") => self.full(&error.to_string()),
            _ => TierError::Io {
                reason: format!("{} answered: {error}", self.address()),
            },
        }
    }

    /// Puts a value, one at a time: in a cluster it is held three times meanwhile.
    async fn put_value(
        &self,
        key: CacheKey,
        words: &[&[u8]],
        bytes: usize,
    ) -> Result<(), TierError> {
        let _putting = self.putting.lock().await;
        let Some(lines) = &self.lines else {
            let mut command = Cmd::with_capacity(words.len(), bytes);
            for word in words {
                command.arg(*word);
            }
            return self.request(key, &command, bytes).await;
        };
        let answer = lines.put(words, bytes).await?;
        answer.map_err(|refused| self.refused(key, &refused))
    }

    /// Fetches the first `max_bytes` of a value; nothing if there is none.
    async fn start_of(
        &self,
        key: CacheKey,
        max_bytes: usize,
        way: Way,
    ) -> Result<Vec<u8>, TierError> {
        let name = key.to_string();
        let Some(lines) = &self.lines else {
            // The end is inclusive. No longer value ever crosses the network, whatever the server holds.
            let last = max_bytes.saturating_sub(1);
            let mut command = ::redis::cmd("GETRANGE");
            command.arg(&name).arg(0).arg(last);
            return self.request(key, &command, max_bytes).await;
        };
        let got = lines.values(vec![name], max_bytes, way).next().await;
        let got = got.ok_or_else(|| self.unasked())??;
        got.map_err(|refused| self.refused(key, &refused))
    }

    /// One name has one value.
    fn unasked(&self) -> TierError {
        TierError::Io {
            reason: format!("{}: nothing was asked for", self.address()),
        }
    }

    /// Converts what the server answers when it refuses, as [`answered`](Self::answered) does.
    fn refused(&self, key: CacheKey, Refused(reason): &Refused) -> TierError {
        match reason.split(' ').next() {
            Some("WRONGTYPE") => not_a_string(key),
            Some("OOM") => self.full(reason),
            _ => TierError::Io {
                reason: format!("{} answered: {reason}", self.address()),
            },
        }
    }

    fn full(&self, reason: &str) -> TierError {
        TierError::Full {
            reason: format!(
                "{}: {reason} (raise maxmemory or set an eviction policy)",
                self.address()
            ),
        }
    }

    /// Gives the values of `keys`, which are asked for on one connection before their turn.
    fn pipelined<'a>(
        &'a self,
        lines: &'a Lines,
        keys: Vec<CacheKey>,
        max_bytes: usize,
    ) -> impl Stream<Item = Result<Option<Bytes>, TierError>> + 'a {
        let names = keys.iter().map(ToString::to_string).collect();
        // As for one value.
        let values = lines.values(names, max_bytes + 1, Way::Any);
        stream::unfold(
            (values, keys.into_iter()),
            move |(mut values, mut keys)| async move {
                let (key, got) = (keys.next()?, values.next().await?);
                let value = match got.map(|it| it.map_err(|refused| self.refused(key, &refused))) {
                    Ok(Ok(value)) if (1..=max_bytes).contains(&value.len()) => {
                        Ok(Some(value.into()))
                    }
                    // What is not there, and what is empty or too long, is looked at more closely.
                    Ok(Ok(_)) => self.get_value(key, max_bytes, Way::Any).await,
                    Ok(Err(error)) | Err(error) => Err(error),
                };
                Some((value, (values, keys)))
            },
        )
    }

    async fn get_value(
        &self,
        key: CacheKey,
        max_bytes: usize,
        way: Way,
    ) -> Result<Option<Bytes>, TierError> {
        let name = key.to_string();
        let too_long = || TierError::Corrupt {
            key,
            reason: format!("it has more than the {max_bytes} bytes that are expected"),
        };
        for _ in 0..ATTEMPTS {
            let mut expected = max_bytes;
            if max_bytes > MEASURED_BYTES {
                expected = self
                    .request(key, ::redis::cmd("STRLEN").arg(&name), 0)
                    .await?;
                if expected > max_bytes {
                    return Err(too_long());
                }
            }
            // One byte more than expected, to see whether there is one.
            let value = self.start_of(key, expected.saturating_add(1), way).await?;
            match value.len() {
                // Redis does not tell an absent value from an empty one, but an empty one is a wrong
                // one, which must be deleted before it can be put again.
                0 => {
                    let exists = ::redis::cmd("EXISTS").arg(&name).clone();
                    if !self.request::<bool>(key, &exists, 0).await? {
                        return Ok(None);
                    }
                }
                len if len > max_bytes => return Err(too_long()),
                len if len <= expected => return Ok(Some(value.into())),
                _ => {}
            }
            // Between two requests it was put, or replaced by a longer one; or it is empty indeed.
        }
        Ok(Some(Bytes::new()))
    }
}

impl LayerCache for RedisCache {
    fn engine(&self) -> &'static str {
        "redis"
    }

    fn get(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> BoxFuture<'_, Result<Option<Bytes>, TierError>> {
        Box::pin(self.get_value(key, max_bytes, Way::Any))
    }

    fn get_each(
        &self,
        keys: Vec<CacheKey>,
        max_bytes: usize,
    ) -> BoxStream<'_, Result<Option<Bytes>, TierError>> {
        match &self.lines {
            Some(lines) if max_bytes <= MEASURED_BYTES => {
                Box::pin(self.pipelined(lines, keys, max_bytes))
            }
            Some(_) | None => tier::one_by_one(self, keys, max_bytes),
        }
    }

    fn get_again(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> Option<BoxFuture<'_, Result<Option<Bytes>, TierError>>> {
        // To a server of a cluster, redis-rs has one connection.
        self.lines.as_ref()?;
        Some(Box::pin(self.get_value(key, max_bytes, Way::New)))
    }

    fn put(&self, key: CacheKey, value: Bytes, put: Put) -> BoxFuture<'_, Result<(), TierError>> {
        let expires = match (key, self.options.chunk_ttl) {
            // An image's profile lives as long as what it is for.
            (CacheKey::Chunk(..) | CacheKey::Profile(_), Some(ttl)) => Some(ttl.as_secs().max(1)),
            (CacheKey::Chunk(..) | CacheKey::Profile(_), None)
            | (
                CacheKey::Manifest(_)
                | CacheKey::Index(..)
                | CacheKey::AccessMap(..)
                | CacheKey::ImageManifest(_)
                | CacheKey::ImageConfig(_)
                | CacheKey::Lease(_),
                _,
            ) => None,
        };
        Box::pin(async move {
            let (name, expires) = (key.to_string(), expires.map(|it| it.to_string()));
            let mut words = vec![&b"SET"[..], name.as_bytes(), &value];
            // Nil, if NX finds a value, is what was asked for, too.
            if put == Put::IfAbsent {
                words.push(b"NX");
            }
            if let Some(seconds) = &expires {
                words.extend([&b"EX"[..], seconds.as_bytes()]);
            }
            self.put_value(key, &words, value.len()).await
        })
    }

    fn delete(&self, key: CacheKey) -> BoxFuture<'_, Result<(), TierError>> {
        Box::pin(async move {
            let mut command = ::redis::cmd("DEL");
            command.arg(key.to_string());
            let _: u64 = self.request(key, &command, 0).await?;
            Ok(())
        })
    }

    fn lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<bool, TierError>> {
        let mut command = script(LEASE, key, holder);
        command.arg(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1));
        Box::pin(async move { self.request(key, &command, 0).await })
    }

    fn release(&self, key: CacheKey, holder: LeaseHolder) -> BoxFuture<'_, Result<(), TierError>> {
        let command = script(RELEASE, key, holder);
        Box::pin(async move {
            let _: u64 = self.request(key, &command, 0).await?;
            Ok(())
        })
    }
}

fn not_a_string(key: CacheKey) -> TierError {
    TierError::Corrupt {
        key,
        reason: "not a string".to_owned(),
    }
}

/// A call of `text`, which the server runs as one command.
///
/// Sent whole each time: two hundred bytes, while by its digest a server that forgot it would cost a
/// round trip.
fn script(text: &str, key: CacheKey, holder: LeaseHolder) -> Cmd {
    let mut command = ::redis::cmd("EVAL");
    command.arg(text).arg(1).arg(key.to_string());
    command.arg(holder.to_string());
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> RedisOptions {
        RedisOptions {
            connect_timeout: Duration::from_millis(500),
            request_timeout: Duration::from_secs(1),
            chunk_ttl: None,
        }
    }

    #[test]
    fn no_password_is_printed() {
        let other = Secret::new("swordfish".to_owned());
        for url in [
            "redis://user:hunter2@127.0.0.1:1/3",
            "redis-cluster://user:hunter2@127.0.0.1:1,127.0.0.2:2",
        ] {
            for password in [None, Some(&other)] {
                let url = Secret::new(url.to_owned());
                let cache = RedisCache::connect(&url, password, options()).unwrap();
                let shown = format!("{cache:?}");
                assert!(shown.contains("127.0.0.1:1"), "{shown}");
                assert!(!shown.contains("hunter2"), "{shown}");
                assert!(!shown.contains("swordfish"), "{shown}");
            }
        }
    }

    #[test]
    fn malformed_urls_are_refused_without_quoting_them() {
        for url in [
            "",
            "127.0.0.1:6379",
            "http://127.0.0.1/hunter2",
            "redis://user:hunter2@/notadb",
            "rediss://user:hunter2@127.0.0.1:6379",
            "redis-cluster://",
            "redis-cluster://user:hunter2@127.0.0.1:1,",
            "redis-cluster://user:hunter2@127.0.0.1:1/1",
        ] {
            let refused = RedisCache::connect(&Secret::new(url.to_owned()), None, options());
            let error = refused.unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
            assert!(error.contains("redis://"), "says what is expected: {error}");
        }
    }
}
