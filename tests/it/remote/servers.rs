//! Real servers on free loopback ports, and engines that use them.

use std::{
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::Duration,
};

use clip_csi::{
    remote::{AccessKey, RedisCache, RedisOptions, S3Cache, S3Config, S3Options},
    secret::Secret,
};

use super::fixture::PATIENCE;

/// A `redis-server` on a free loopback port, killed at the end.
pub(super) struct RedisServer {
    child: Child,
    pub(super) port: u16,
    arguments: Vec<String>,
    dir: tempfile::TempDir,
}

impl RedisServer {
    /// Starts a server, or says why the test `name` is skipped.
    pub(super) async fn start(name: &str, arguments: &[&str]) -> Option<Self> {
        if let Err(error) = Command::new("redis-server")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
        {
            eprintln!("SKIP {name}: redis-server cannot be run: {error}");
            return None;
        }
        let arguments: Vec<_> = arguments.iter().map(ToString::to_string).collect();
        let dir = tempfile::tempdir().unwrap();
        // Another process may take the port before the server does: then it exits, and another
        // port is tried.
        for _ in 0..5 {
            let port = free_port();
            let mut child = spawn(port, &arguments, dir.path());
            if answers(&mut child, port).await {
                return Some(Self {
                    child,
                    port,
                    arguments,
                    dir,
                });
            }
        }
        panic!("redis-server did not start");
    }

    pub(super) fn kill(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Starts an empty server on the same port.
    pub(super) async fn restart(&mut self) {
        self.child = spawn(self.port, &self.arguments, self.dir.path());
        assert!(answers(&mut self.child, self.port).await, "did not restart");
    }

    pub(super) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    pub(super) fn cache(&self) -> RedisCache {
        redis_cache(&self.url())
    }

    /// A connection beside the driver's.
    pub(super) fn raw(&self) -> redis::Connection {
        let client = redis::Client::open(self.url()).unwrap();
        client.get_connection().unwrap()
    }
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spawn(port: u16, arguments: &[String], dir: &std::path::Path) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1"])
        .args(["--save", "", "--appendonly", "no", "--dir"])
        .arg(dir)
        .args(arguments)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

async fn answers(child: &mut Child, port: u16) -> bool {
    for _ in 0..1000 {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    false
}

pub(super) fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Three `redis-server`s that are a cluster, killed at the end.
pub(super) struct RedisCluster {
    pub(super) servers: Vec<RedisServer>,
}

/// The slots of a cluster (redis.io, "Redis cluster specification").
const N_SLOTS: usize = 16384;

impl RedisCluster {
    /// Starts a cluster, or says why the test `name` is skipped.
    pub(super) async fn start(name: &str) -> Option<Self> {
        let mut servers = Vec::new();
        for _ in 0..3 {
            let bus = free_port().to_string();
            let mut arguments = vec!["--cluster-enabled", "yes", "--cluster-port", &bus];
            // As the documentation advises: what is not lost is served.
            arguments.extend(["--cluster-require-full-coverage", "no"]);
            servers.push((RedisServer::start(name, &arguments).await?, bus));
        }
        let (first, bus) = &servers[0];
        for (at, (server, _)) in servers.iter().enumerate() {
            let slots = (at * N_SLOTS / 3, (at + 1) * N_SLOTS / 3 - 1);
            let mut own = redis::cmd("CLUSTER");
            own.arg("ADDSLOTSRANGE").arg(slots.0).arg(slots.1);
            own.exec(&mut server.raw()).unwrap();
            let mut meet = redis::cmd("CLUSTER");
            meet.arg("MEET").arg("127.0.0.1").arg(first.port).arg(bus);
            meet.exec(&mut server.raw()).unwrap();
        }
        let cluster = Self {
            servers: servers.into_iter().map(|(server, _)| server).collect(),
        };
        cluster.come_together().await;
        Some(cluster)
    }

    /// Waits until each server knows of each slot who serves it. Its state alone says less: without full coverage it is good as soon as
    /// the server's own slots are served.
    pub(super) async fn come_together(&self) {
        for server in &self.servers {
            let mut is_ok = false;
            for _ in 0..1000 {
                let mut asked = redis::cmd("CLUSTER");
                let info: String = asked.arg("INFO").query(&mut server.raw()).unwrap();
                let all_served = format!("cluster_slots_ok:{N_SLOTS}\r");
                is_ok = info.contains("cluster_state:ok") && info.contains(&all_served);
                if is_ok {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            assert!(is_ok, "the cluster does not come together");
        }
    }

    /// An engine that was told of one server.
    pub(super) fn cache(&self) -> RedisCache {
        redis_cache(&format!(
            "redis-cluster://127.0.0.1:{}",
            self.servers[1].port
        ))
    }

    /// How many keys each server has.
    pub(super) fn n_keys(&self) -> Vec<usize> {
        let asked = |it: &RedisServer| redis::cmd("DBSIZE").query(&mut it.raw()).unwrap();
        self.servers.iter().map(asked).collect()
    }
}

/// A versitygw with an empty bucket on a free loopback port, killed at the end.
pub(super) struct S3Server {
    child: Child,
    pub(super) port: u16,
    _dir: tempfile::TempDir,
}

/// The bucket of [`S3Server`].
const BUCKET: &str = "layers";

impl S3Server {
    /// Starts a server, or says why the test `name` is skipped.
    pub(super) async fn start(name: &str) -> Option<Self> {
        // Says where the program is, if it was built.
        let tools = concat!(env!("CARGO_MANIFEST_DIR"), "/e2e/tools.sh");
        let tools = Command::new(tools)
            .arg("s3")
            .env("GO_SKIP_BUILD", "1")
            .stderr(Stdio::null())
            .output();
        let tools = match tools {
            Ok(tools) if tools.status.success() => String::from_utf8(tools.stdout).unwrap(),
            _ => {
                eprintln!("SKIP {name}: there is no S3 server: run e2e/tools.sh s3");
                return None;
            }
        };
        let dir = tempfile::tempdir().unwrap();
        for sub in ["buckets", "metadata"] {
            std::fs::create_dir(dir.path().join(sub)).unwrap();
        }
        // To it, a directory is a bucket.
        std::fs::create_dir(dir.path().join("buckets").join(BUCKET)).unwrap();
        for _ in 0..5 {
            let port = free_port();
            let mut child = Command::new(format!("{}/versitygw", tools.trim()))
                .args(["--port", &format!("127.0.0.1:{port}"), "--quiet"])
                .args(["--access", "id", "--secret", "hunter2", "posix"])
                // Not in extended attributes, which not every file system has.
                .arg("--sidecar")
                .arg(dir.path().join("metadata"))
                .arg(dir.path().join("buckets"))
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            if answers(&mut child, port).await {
                return Some(Self {
                    child,
                    port,
                    _dir: dir,
                });
            }
        }
        panic!("versitygw did not start");
    }

    pub(super) fn cache(&self) -> S3Cache {
        s3_cache(self.port, "hunter2", PATIENCE)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

pub(super) fn s3_cache(port: u16, secret: &str, request_timeout: Duration) -> S3Cache {
    let config = S3Config {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        bucket: Some(BUCKET.to_owned()),
        allow_http: true,
        ..S3Config::default()
    };
    let key = AccessKey {
        id: Secret::new("id".to_owned()),
        secret: Secret::new(secret.to_owned()),
    };
    let options = S3Options {
        connect_timeout: PATIENCE,
        request_timeout,
    };
    S3Cache::new(&config, Some(key), options).unwrap()
}

pub(super) fn redis_options() -> RedisOptions {
    RedisOptions {
        connect_timeout: PATIENCE,
        request_timeout: PATIENCE,
        chunk_ttl: Some(Duration::from_secs(1000)),
    }
}

pub(super) fn redis_cache(url: &str) -> RedisCache {
    RedisCache::connect(&Secret::new(url.to_owned()), None, redis_options()).unwrap()
}
