//! One server, or a cluster of them: which is asked, and how a connection to it is made.
//!
//! Every command of this engine is about one key. In a cluster it goes to the server that has the key's
//! slot (redis.io, "Redis cluster specification"), which redis-rs knows and learns anew when slots move.

use ::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionInfo, IntoConnectionInfo, Pipeline, RedisFuture,
    RedisResult, Value,
    aio::{ConnectionLike, MultiplexedConnection},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
};

use crate::{remote::RemoteConfigError, secret::Secret};

/// What the URL of a cluster begins with.
const CLUSTER: &str = "redis-cluster://";

/// How often redis-rs follows a slot that has moved, or tries a server again, before it gives up.
const RETRIES: u32 = 3;

/// Milliseconds that it waits at least and at most before it tries again: a reader waits as well, and waiting for a
/// server that is away is what the breaker is for.
const RETRY_WAIT_MS: (u64, u64) = (10, 100);

/// Who keeps the values.
pub(super) enum Servers {
    /// One server.
    One(Client),
    /// The servers of a cluster, as far as they were named.
    Cluster {
        /// Finds the others.
        client: Box<ClusterClient>,
        /// `host:port,…`: what was named.
        named: String,
    },
}

/// A connection to them: a handle, copied for each request.
#[derive(Clone)]
pub(super) enum Handle {
    /// To the one server.
    One(MultiplexedConnection),
    /// To all servers of the cluster.
    Cluster(ClusterConnection),
}

impl Servers {
    /// Parses the URL; `password` replaces the one in it.
    ///
    /// # Errors
    /// [`RemoteConfigError::Url`], without its cause, which may quote the URL with its password.
    pub(super) fn parse(
        url: &Secret<String>,
        password: Option<&Secret<String>>,
    ) -> Result<Self, RemoteConfigError> {
        let url = url.expose().as_str();
        let bad = || RemoteConfigError::Url;
        let Some(cluster) = url.strip_prefix(CLUSTER) else {
            let info = server(url, password).ok_or_else(bad)?;
            return Ok(Self::One(Client::open(info).map_err(|_| bad())?));
        };
        // A password may have an @, a host may not.
        let (user, hosts) = match cluster.rsplit_once('@') {
            Some((user, hosts)) => (format!("{user}@"), hosts),
            None => (String::new(), cluster),
        };
        // A cluster has one database.
        if hosts.contains('/') {
            return Err(bad());
        }
        let servers = hosts
            .split(',')
            .map(|host| server(&format!("redis://{user}{host}"), password));
        let servers: Vec<_> = servers.collect::<Option<_>>().ok_or_else(bad)?;
        let named: Vec<_> = servers.iter().map(|it| it.addr().to_string()).collect();
        let client = ClusterClient::builder(servers)
            .retries(RETRIES)
            .min_retry_wait(RETRY_WAIT_MS.0)
            .max_retry_wait(RETRY_WAIT_MS.1)
            .build();
        Ok(Self::Cluster {
            client: Box::new(client.map_err(|_| bad())?),
            named: named.join(","),
        })
    }

    /// The addresses, for people.
    pub(super) fn address(&self) -> String {
        match self {
            Self::One(client) => client.get_connection_info().addr().to_string(),
            Self::Cluster { named, .. } => named.clone(),
        }
    }

    /// Connects and logs in. Whoever calls bounds the time: that of redis-rs covers no login.
    pub(super) async fn connect(&self) -> RedisResult<Handle> {
        match self {
            Self::One(client) => {
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(None)
                    .set_response_timeout(None);
                let made = client.get_multiplexed_async_connection_with_config(&config);
                Ok(Handle::One(made.await?))
            }
            Self::Cluster { client, .. } => {
                Ok(Handle::Cluster(client.get_async_connection().await?))
            }
        }
    }
}

/// Parses the URL of one server.
fn server(url: &str, password: Option<&Secret<String>>) -> Option<ConnectionInfo> {
    let info = url.into_connection_info().ok()?;
    Some(match password {
        Some(password) => {
            let settings = info.redis_settings().clone();
            info.set_redis_settings(settings.set_password(password.expose()))
        }
        None => info,
    })
}

impl ConnectionLike for Handle {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::One(it) => it.req_packed_command(cmd),
            Self::Cluster(it) => it.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::One(it) => it.req_packed_commands(pipeline, offset, count),
            Self::Cluster(it) => it.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::One(it) => it.get_db(),
            Self::Cluster(it) => it.get_db(),
        }
    }
}
