//! Removes the startup taint from the node once kubelet has registered the driver.
//!
//! A new node takes pods before the driver is there, and their volumes fail at first. So the node
//! may be made with a taint, which the driver's own pod tolerates, and which is removed when the
//! node's `CSINode` object lists the driver: from then on kubelet can mount.
//!
//! The patch tests that the taints are what was read, so that nobody's change is lost. The work is
//! tried again, with back-off, until it is done once; then nothing of it is left in memory.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::{
    kubernetes::{Api, ApiError, InCluster},
    sys,
    telemetry::error_chain,
};

/// First wait; each further one is twice as long.
///
/// Kubelet registers a driver within a second or two of seeing its socket.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// Longest wait for kubelet: what a node loses at most whose images took long to arrive.
const MAX_WAIT_FOR_KUBELET: Duration = Duration::from_secs(10);

/// Longest wait after a failure: a cluster of nodes must not crowd an API server that comes back.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Conflicts in a row that are usual: some controllers write a new node's taints at the same time.
const USUAL_CONFLICTS: u32 = 5;

/// A taint's key, as `kubectl taint` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaintKey(String);

/// Says why a text is not a taint's key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "taint key {text:?} is malformed: give the key alone, without value and effect, such as \
     csi.clip-csi.dev/agent-not-ready"
)]
pub struct TaintKeyError {
    /// The text as it came.
    pub text: String,
}

impl std::str::FromStr for TaintKey {
    type Err = TaintKeyError;

    /// Parses a qualified name: `[prefix/]name`, of letters, digits, `-`, `_` and `.`.
    fn from_str(text: &str) -> Result<Self, TaintKeyError> {
        let is_part = |part: &str| {
            let ends = [part.chars().next(), part.chars().last()];
            !part.is_empty()
                && ends.iter().flatten().all(char::is_ascii_alphanumeric)
                && part
                    .chars()
                    .all(|it| it.is_ascii_alphanumeric() || "-_.".contains(it))
        };
        let good = match text.split_once('/') {
            Some((prefix, name)) => is_part(prefix) && is_part(name),
            None => is_part(text),
        };
        if good && text.len() <= 317 {
            return Ok(Self(text.to_owned()));
        }
        Err(TaintKeyError {
            text: text.to_owned(),
        })
    }
}

/// What to remove, and from which node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartupTaint {
    /// The node's name.
    pub node: String,
    /// The driver that must be registered first.
    pub driver: String,
    /// The taints' key.
    pub key: TaintKey,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Kubelet has not registered the driver yet.
    NotRegistered,
    /// So many taints were removed, and none is left.
    Done { n_removed: usize },
}

#[derive(Deserialize)]
struct CsiNode {
    spec: CsiNodeSpec,
}

#[derive(Deserialize)]
struct CsiNodeSpec {
    /// `null` in a node without any driver.
    drivers: Option<Vec<CsiNodeDriver>>,
}

#[derive(Deserialize)]
struct CsiNodeDriver {
    name: String,
}

#[derive(Deserialize)]
struct Node {
    spec: NodeSpec,
}

#[derive(Deserialize)]
struct NodeSpec {
    /// Whole, with fields that this release does not know: they are written back.
    #[serde(default)]
    taints: Vec<Value>,
}

/// Returns the JSON patch that removes the taints with `key`, `None` if there is none.
///
/// The list is replaced as a whole: a taint cannot be named in a patch but by its place, and the
/// `test` makes the patch fail if the list is another one by then.
fn plan(taints: &[Value], key: &TaintKey) -> Option<Value> {
    let has_key = |taint: &&Value| taint["key"] == key.0.as_str();
    let left: Vec<_> = taints.iter().filter(|it| !has_key(it)).collect();
    if left.len() == taints.len() {
        return None;
    }
    Some(json!([
        {"op": "test", "path": "/spec/taints", "value": taints},
        {"op": "replace", "path": "/spec/taints", "value": left},
    ]))
}

/// Removes the taint, however long it takes.
///
/// # Cancellation
/// Safe: a patch is applied or not.
pub async fn remove(cluster: InCluster, taint: StartupTaint) {
    let mut wait = FIRST_WAIT;
    let mut last_error = String::new();
    let mut n_conflicts = 0;
    loop {
        // A client for each attempt: it costs nothing beside the wait, and nothing stays of it.
        let step = match Api::new(cluster.clone()) {
            Ok(api) => attempt(&api, &taint).await,
            Err(err) => Err(err),
        };
        match step {
            Ok(Step::Done { n_removed }) => {
                info!(
                    node.name = taint.node,
                    taint = taint.key.0,
                    n_removed,
                    "startup taint is removed"
                );
                sys::trim_allocator();
                return;
            }
            Ok(Step::NotRegistered) => {
                debug!(
                    node.name = taint.node,
                    "kubelet has not registered the driver yet"
                );
                wait = wait.min(MAX_WAIT_FOR_KUBELET);
            }
            // Somebody else was quicker; the next attempt sees what they did.
            Err(err @ ApiError::Conflict { .. }) if n_conflicts < USUAL_CONFLICTS => {
                debug!(error = %err, "trying again");
                n_conflicts += 1;
            }
            Err(err) => {
                let text = error_chain(&err);
                // Once for each cause: the API server may be down for hours.
                if text != last_error {
                    warn!(
                        error = text,
                        taint = taint.key.0,
                        "startup taint stays for now, trying again"
                    );
                    last_error = text;
                }
            }
        }
        sleep(wait).await;
        wait = (wait * 2).min(MAX_WAIT);
    }
}

async fn attempt(api: &Api, taint: &StartupTaint) -> Result<Step, ApiError> {
    let node = &taint.node;
    let what = format!("CSINode {node}");
    let path = format!("/apis/storage.k8s.io/v1/csinodes/{node}");
    let csi_node: CsiNode = match api.get(&path, &what).await {
        Ok(it) => it,
        // Kubelet makes it when the first driver registers.
        Err(ApiError::Refused { status: 404, .. }) => return Ok(Step::NotRegistered),
        Err(err) => return Err(err),
    };
    let drivers = csi_node.spec.drivers.unwrap_or_default();
    if !drivers.iter().any(|it| it.name == taint.driver) {
        return Ok(Step::NotRegistered);
    }
    let what = format!("Node {node}");
    let path = format!("/api/v1/nodes/{node}");
    let object: Node = api.get(&path, &what).await?;
    let taints = object.spec.taints;
    let Some(patch) = plan(&taints, &taint.key) else {
        return Ok(Step::Done { n_removed: 0 });
    };
    api.patch(&path, &what, &patch).await?;
    let n_left = patch[1]["value"].as_array().map_or(0, Vec::len);
    Ok(Step::Done {
        n_removed: taints.len() - n_left,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> TaintKey {
        text.parse().unwrap()
    }

    #[test]
    fn only_taints_with_the_key_go_and_the_others_are_written_as_they_were() {
        let ours = json!({"key": "a/b", "effect": "NoSchedule"});
        let ours_too = json!({"key": "a/b", "effect": "NoExecute", "value": "x"});
        let near = json!({"key": "a/bc", "effect": "NoSchedule"});
        let other = json!({"key": "c", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z", "new": {"x": 1}});
        for (taints, left) in [
            (vec![], None),
            (vec![&near, &other], None),
            (vec![&ours], Some(vec![])),
            (vec![&other, &ours, &near], Some(vec![&other, &near])),
            (vec![&ours, &other, &ours_too], Some(vec![&other])),
        ] {
            let taints: Vec<Value> = taints.into_iter().cloned().collect();
            let expected = left.map(|left| {
                json!([
                    {"op": "test", "path": "/spec/taints", "value": taints},
                    {"op": "replace", "path": "/spec/taints", "value": left},
                ])
            });
            assert_eq!(plan(&taints, &key("a/b")), expected, "{taints:?}");
        }
    }

    #[test]
    fn a_key_is_a_key_alone() {
        for good in ["a", "csi.clip-csi.dev/agent-not-ready", "node.k8s.io/x_y"] {
            assert_eq!(key(good).0, good);
        }
        for bad in [
            "",
            "/",
            "a/",
            "/b",
            "a/b/c",
            "a=b:NoSchedule",
            "a:NoSchedule",
            "a b",
            "-a",
            "ä",
        ] {
            assert!(bad.parse::<TaintKey>().is_err(), "{bad:?} was taken");
        }
    }
}
