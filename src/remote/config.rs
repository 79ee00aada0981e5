//! Reads the configuration of the remote content cache and opens what it names.

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Deserializer};
use tracing::warn;

use crate::{
    clock::Clock, integrity::IntegrityKey, metrics::Metrics, secret::Secret, tier::LayerCache,
};

use super::{
    AccessKey, BackOff, ContentCache, ContentOptions, DirCache, RedisCache, RedisOptions, S3Cache,
    S3Config, S3Options, UploadOptions,
};

/// Bytes of a key or password file at most; a longer one is some other file by mistake.
const MAX_SECRET_BYTES: u64 = 4096;

/// How long a layer's lease lives that is not renewed.
///
/// What a node that died costs those that wait for it; renewed every third of it, it outlives a
/// remote that is skipped for some seconds.
const LEASE_TTL: Duration = Duration::from_secs(15);

/// Which engine keeps the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RemoteKind {
    /// No remote content cache.
    #[default]
    None,
    /// A directory, local or shared: [`DirCache`].
    Dir,
    /// Redis or Valkey: [`RedisCache`].
    Redis,
    /// Amazon S3 or what speaks its protocol: [`S3Cache`].
    S3,
}

/// The configuration of the remote content cache; by default there is none.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RemoteConfig {
    /// Which engine.
    pub kind: RemoteKind,
    /// The directory, for `dir`.
    pub path: Option<PathBuf>,
    /// The server, for `redis`: `redis://[user[:password]@]host[:port][/db]`; or some of a cluster's:
    /// `redis-cluster://[user[:password]@]host[:port][,host[:port]]…`.
    #[serde(deserialize_with = "secret")]
    pub url: Option<Secret<String>>,
    /// A file with the password, for `redis`, instead of one in the URL.
    pub password_file: Option<PathBuf>,
    /// The bucket, for `s3`.
    pub s3: S3Config,
    /// A file with the key that all nodes share, at least 32 random bytes in any encoding.
    pub hmac_key_file: Option<PathBuf>,
    /// Seconds after which chunks expire, for `redis`; 0 for never.
    pub chunk_ttl_seconds: u64,
    /// Milliseconds to connect, and to log in to `redis`.
    pub connect_timeout_ms: u64,
    /// Milliseconds for a request of a chunk; larger values get more in proportion.
    pub request_timeout_ms: u64,
    /// Bytes of a layer's index at most, decompressed.
    pub max_index_bytes: u64,
    /// Layers that may wait for their upload.
    pub upload_queue_layers: usize,
    /// Attempts in a row without progress after which a layer's upload is given up.
    pub upload_attempts: u32,
    /// Seconds that a node waits for a layer that another one makes; 0: nodes do not wait.
    pub lease_wait_seconds: u64,
}

impl Default for RemoteConfig {
    fn default() -> Self {
        let upload = UploadOptions::default();
        Self {
            kind: RemoteKind::None,
            path: None,
            url: None,
            password_file: None,
            s3: S3Config::default(),
            hmac_key_file: None,
            // One week: what a nightly or weekly job uses is still there for the next one.
            chunk_ttl_seconds: 7 * 24 * 3600,
            // Inside one data centre a connection takes a millisecond and a chunk ten: these are
            // what a reader waits when the remote has died, not what is usual.
            connect_timeout_ms: 500,
            request_timeout_ms: 1000,
            max_index_bytes: 512 << 20,
            upload_queue_layers: upload.queue_layers,
            upload_attempts: upload.attempts,
            // Four times what a holder that died costs. Who waits for a layer that takes longer
            // makes it, too, in the end.
            lease_wait_seconds: 60,
        }
    }
}

impl RemoteConfig {
    /// The part that concerns uploads.
    pub fn upload_options(&self) -> UploadOptions {
        UploadOptions {
            queue_layers: self.upload_queue_layers,
            attempts: self.upload_attempts,
        }
    }

    /// Reads the installation's key, if one is configured: also where there is no remote, because
    /// indexes in the registry are authenticated by it as well.
    ///
    /// # Errors
    /// If the file cannot be used.
    pub fn integrity_key(&self) -> Result<Option<IntegrityKey>, RemoteConfigError> {
        self.hmac_key_file.as_deref().map(integrity_key).transpose()
    }
}

fn secret<'de, D: Deserializer<'de>>(input: D) -> Result<Option<Secret<String>>, D::Error> {
    Ok(Option::<String>::deserialize(input)?.map(Secret::new))
}

/// Says why the remote content cache cannot be used as configured, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum RemoteConfigError {
    /// The engine needs a setting that is not there.
    #[error("remote.kind = {kind:?} needs remote.{setting}: set it")]
    Missing {
        /// The engine, as configured.
        kind: &'static str,
        /// The setting.
        setting: &'static str,
    },
    /// A setting has a value that cannot work.
    #[error("remote.{setting} must not be 0")]
    Zero {
        /// The setting.
        setting: &'static str,
    },
    /// The URL cannot be used. It is not quoted, because it may hold a password.
    #[error(
        "remote.url is malformed: it must be redis://[user[:password]@]host[:port][/db], \
         redis-cluster://[user[:password]@]host[:port][,host[:port]]... or unix:///path (TLS, rediss://, is not supported)"
    )]
    Url,
    /// A setting of S3 cannot work.
    #[error("remote.s3: {reason}")]
    S3 {
        /// Which one, and what to do.
        reason: String,
    },
    /// A file with a secret cannot be read.
    #[error("reading remote.{setting} {path}: check that the secret is mounted there")]
    Secret {
        /// The setting that names the file.
        setting: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The key is too short to be safe.
    #[error(
        "remote.hmac_key_file {path} has {len} bytes: it must have at least {min}; make one with \
         `openssl rand -hex 32`, the same for all nodes"
    )]
    ShortKey {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: usize,
        /// The least length.
        min: usize,
    },
}

/// Opens the remote content cache that `config` names, if it names one.
///
/// Reads the files with secrets, and nothing else: whether the remote is there is found out by the
/// first request, because the driver must start without it.
///
/// # Errors
/// Those of [`RemoteConfigError`].
///
/// # Blocking
/// Reads two small files.
pub fn open(
    config: &RemoteConfig,
    metrics: &Metrics,
    clock: &Arc<dyn Clock>,
) -> Result<Option<ContentCache>, RemoteConfigError> {
    let request_timeout = positive("request_timeout_ms", config.request_timeout_ms)?;
    let backend: Arc<dyn LayerCache> = match config.kind {
        RemoteKind::None => return Ok(None),
        RemoteKind::Dir => {
            let path = config.path.as_deref();
            let path = path.ok_or(RemoteConfigError::Missing {
                kind: "dir",
                setting: "path",
            })?;
            Arc::new(DirCache::new(path, request_timeout))
        }
        RemoteKind::Redis => {
            let url = config.url.as_ref().ok_or(RemoteConfigError::Missing {
                kind: "redis",
                setting: "url",
            })?;
            let password = config.password_file.as_deref();
            let password = password.map(|it| secret_text("password_file", it));
            let password = password.transpose()?;
            let ttl = config.chunk_ttl_seconds;
            let options = RedisOptions {
                connect_timeout: positive("connect_timeout_ms", config.connect_timeout_ms)?,
                request_timeout,
                chunk_ttl: (ttl != 0).then(|| Duration::from_secs(ttl)),
            };
            Arc::new(RedisCache::connect(url, password.as_ref(), options)?)
        }
        RemoteKind::S3 => {
            let options = S3Options {
                connect_timeout: positive("connect_timeout_ms", config.connect_timeout_ms)?,
                request_timeout,
            };
            Arc::new(S3Cache::new(&config.s3, access_key(&config.s3)?, options)?)
        }
    };
    let key = config.integrity_key()?;
    if key.is_none() {
        warn!(
            engine = backend.engine(),
            "remote cache has no key: whole layers are fetched and checked before their first \
             byte is served; set remote.hmac_key_file"
        );
    }
    let options = ContentOptions {
        key,
        max_index_bytes: config.max_index_bytes,
        back_off: BackOff::default(),
        lease_ttl: LEASE_TTL,
        lease_wait: Duration::from_secs(config.lease_wait_seconds),
    };
    Ok(Some(ContentCache::new(
        backend,
        options,
        metrics.clone(),
        Arc::clone(clock),
    )))
}

fn positive(setting: &'static str, milliseconds: u64) -> Result<Duration, RemoteConfigError> {
    match milliseconds {
        0 => Err(RemoteConfigError::Zero { setting }),
        _ => Ok(Duration::from_millis(milliseconds)),
    }
}

/// The access key of the two files; `None` if neither is named.
fn access_key(config: &S3Config) -> Result<Option<AccessKey>, RemoteConfigError> {
    let (id, secret) = match (&config.access_key_file, &config.secret_key_file) {
        (Some(id), Some(secret)) => (id, secret),
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(missing("s3.secret_key_file")),
        (None, Some(_)) => return Err(missing("s3.access_key_file")),
    };
    Ok(Some(AccessKey {
        id: secret_text("s3.access_key_file", id)?,
        secret: secret_text("s3.secret_key_file", secret)?,
    }))
}

fn missing(setting: &'static str) -> RemoteConfigError {
    RemoteConfigError::Missing {
        kind: "s3",
        setting,
    }
}

fn secret_text(setting: &'static str, path: &Path) -> Result<Secret<String>, RemoteConfigError> {
    match String::from_utf8(secret_file(setting, path)?) {
        Ok(text) => Ok(Secret::new(text)),
        Err(_) => Err(RemoteConfigError::Secret {
            setting,
            path: path.to_owned(),
            source: io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"),
        }),
    }
}

fn integrity_key(path: &Path) -> Result<IntegrityKey, RemoteConfigError> {
    let bytes = secret_file("hmac_key_file", path)?;
    IntegrityKey::new(&bytes).ok_or_else(|| RemoteConfigError::ShortKey {
        path: path.to_owned(),
        len: bytes.len(),
        min: IntegrityKey::MIN_BYTES,
    })
}

/// Reads a file with a secret, without the line end that editors add.
fn secret_file(setting: &'static str, path: &Path) -> Result<Vec<u8>, RemoteConfigError> {
    let failed = |source| RemoteConfigError::Secret {
        setting,
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    let read = file.take(MAX_SECRET_BYTES + 1).read_to_end(&mut bytes);
    if u64::try_from(read.map_err(failed)?).unwrap_or(u64::MAX) > MAX_SECRET_BYTES {
        let text = format!("it has more than {MAX_SECRET_BYTES} bytes");
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, text)));
    }
    while bytes.last().is_some_and(|it| matches!(it, b'\n' | b'\r')) {
        bytes.pop();
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;
