//! The startup taint against an API server that is late, down, or refuses, and against others who
//! write the node's taints.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use clip_csi::node_taint::{self, StartupTaint};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::http_server::{HttpServer, Reply, Request};

const KEY: &str = "csi.clip-csi.dev/agent-not-ready";

/// What the API server knows, and how it behaves.
#[derive(Debug, Default)]
struct Cluster {
    drivers: Value,
    taints: Vec<Value>,
    /// Answered instead of anything else, first to last.
    faults: Vec<Reply>,
    /// Added by somebody else just before the next patch.
    rival: Option<Value>,
}

/// How an API server says that it does not do what was asked.
fn status(code: u16, message: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure",
        "code": code, "message": message, "reason": "",
    })
    .to_string()
}

impl Cluster {
    fn node(&self) -> Value {
        let mut spec = json!({"podCIDR": "10.0.0.0/24"});
        if !self.taints.is_empty() {
            spec["taints"] = json!(self.taints);
        }
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "spec": spec})
    }

    fn answer(&mut self, request: &Request) -> Reply {
        if !self.faults.is_empty() {
            return self.faults.remove(0);
        }
        let path = request.path.trim_end_matches(['?', '&']);
        match (request.method.as_str(), path) {
            ("GET", "/apis/storage.k8s.io/v1/csinodes/n1") if self.drivers == "absent" => {
                Reply::new(404, status(404, "csinodes n1 not found"))
            }
            ("GET", "/apis/storage.k8s.io/v1/csinodes/n1") => {
                let object = json!({
                    "apiVersion": "storage.k8s.io/v1", "kind": "CSINode",
                    "metadata": {"name": "n1"}, "spec": {"drivers": self.drivers},
                });
                Reply::new(200, object.to_string())
            }
            ("GET", "/api/v1/nodes/n1") => Reply::new(200, self.node().to_string()),
            ("PATCH", "/api/v1/nodes/n1") => {
                self.taints.extend(self.rival.take());
                let patch: Value = serde_json::from_slice(&request.body).unwrap();
                let places: Vec<_> = patch
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|it| &it["path"])
                    .collect();
                assert_eq!(places, ["/spec/taints", "/spec/taints"]);
                assert_eq!(
                    (&patch[0]["op"], &patch[1]["op"]),
                    (&json!("test"), &json!("replace"))
                );
                if patch[0]["value"] != json!(self.taints) {
                    return Reply::new(422, status(422, "test failed"));
                }
                self.taints = patch[1]["value"].as_array().unwrap().clone();
                Reply::new(200, self.node().to_string())
            }
            (method, path) => panic!("{method} {path}"),
        }
    }
}

/// A cluster and its API server.
struct World {
    cluster: Arc<Mutex<Cluster>>,
    server: HttpServer,
    dir: tempfile::TempDir,
}

impl World {
    async fn new(cluster: Cluster) -> Self {
        let cluster = Arc::new(Mutex::new(cluster));
        let shared = Arc::clone(&cluster);
        let server = HttpServer::start(move |request| shared.lock().unwrap().answer(request)).await;
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join("token"), "t1");
        Self {
            cluster,
            server,
            dir,
        }
    }

    /// Runs until the taint is removed, which must not take long.
    async fn remove(&self) {
        let url = format!("http://{}", self.server.host());
        let mut config = kube::Config::new(url.parse().unwrap());
        config.auth_info.token_file = Some(self.dir.path().join("token").display().to_string());
        let taint = StartupTaint {
            node: "n1".to_owned(),
            driver: "csi.clip-csi.dev".to_owned(),
            key: KEY.parse().unwrap(),
        };
        timeout(Duration::from_secs(20), node_taint::remove(config, taint))
            .await
            .unwrap();
    }

    fn taints(&self) -> Vec<Value> {
        self.cluster.lock().unwrap().taints.clone()
    }

    /// How often the node was patched.
    fn n_patches(&self) -> usize {
        let requests = self.server.requests("/api/v1/nodes/n1");
        requests.iter().filter(|it| it.method == "PATCH").count()
    }
}

fn write(path: &Path, text: &str) {
    File::create(path)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
}

fn registered() -> Value {
    json!([{"name": "other.csi.dev", "nodeID": "n1"}, {"name": "csi.clip-csi.dev", "nodeID": "n1"}])
}

fn ours() -> Value {
    json!({"key": KEY, "effect": "NoExecute"})
}

fn other(key: &str) -> Value {
    json!({"key": key, "effect": "NoSchedule", "value": "x", "timeAdded": "2026-01-01T00:00:00Z"})
}

#[tokio::test]
async fn only_the_taint_goes_and_a_node_without_it_is_left_alone() {
    let world = World::new(Cluster {
        drivers: registered(),
        taints: vec![other("a"), ours(), other("b")],
        ..Cluster::default()
    })
    .await;
    world.remove().await;
    assert_eq!(world.taints(), [other("a"), other("b")]);
    let patches = world.server.requests("/api/v1/nodes/n1");
    let patch = patches.iter().find(|it| it.method == "PATCH").unwrap();
    assert_eq!(
        patch.header("content-type"),
        Some("application/json-patch+json")
    );
    assert_eq!(patch.header("authorization"), Some("Bearer t1"));
    world.remove().await;
    assert_eq!(world.n_patches(), 1);
}

#[tokio::test]
async fn it_stays_until_kubelet_has_registered_the_driver() {
    let world = World::new(Cluster {
        drivers: json!("absent"),
        taints: vec![ours()],
        ..Cluster::default()
    })
    .await;
    let kubelet = async {
        // No CSINode yet, one without drivers, one without ours.
        for drivers in [
            Value::Null,
            json!([{"name": "other.csi.dev"}]),
            registered(),
        ] {
            let n_before = world.server.requests("csinodes").len();
            while world.server.requests("csinodes").len() == n_before {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(world.taints(), [ours()]);
            world.cluster.lock().unwrap().drivers = drivers;
        }
    };
    tokio::join!(world.remove(), kubelet);
    assert_eq!(world.taints(), [Value::Null; 0]);
    assert_eq!(world.server.requests("csinodes").len(), 4);
}

#[tokio::test]
async fn a_taint_that_somebody_adds_meanwhile_is_not_lost() {
    let world = World::new(Cluster {
        drivers: registered(),
        taints: vec![ours()],
        rival: Some(other("node.kubernetes.io/unschedulable")),
        ..Cluster::default()
    })
    .await;
    world.remove().await;
    assert_eq!(world.taints(), [other("node.kubernetes.io/unschedulable")]);
    assert_eq!(world.n_patches(), 2);
}

#[tokio::test]
async fn an_api_server_that_fails_is_asked_again_with_the_token_of_the_hour() {
    let world = World::new(Cluster {
        drivers: registered(),
        taints: vec![ours()],
        faults: vec![
            Reply::new(503, "etcd is down"),
            Reply::new(401, status(401, "Unauthorized")),
            Reply::new(200, "{").cut(0),
        ],
        ..Cluster::default()
    })
    .await;
    let kubelet = async {
        while world.server.requests("csinodes").len() < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        write(&world.dir.path().join("token"), "t2");
    };
    tokio::join!(world.remove(), kubelet);
    assert_eq!(world.taints(), [Value::Null; 0]);
    let shown: Vec<_> = world.server.requests("csinodes");
    let shown: Vec<_> = shown
        .iter()
        .map(|it| it.header("authorization").unwrap())
        .collect();
    assert_eq!(shown, ["Bearer t1", "Bearer t1", "Bearer t2", "Bearer t2"]);
}
