//! Removes the startup taint from the node once kubelet has registered the driver.
//!
//! A new node takes pods before the driver is there, and their volumes fail at first. So the node
//! may be made with a taint, which the driver's own pod tolerates, and which is removed when the
//! node's `CSINode` object lists the driver: from then on kubelet can mount.
//!
//! The patch tests that the taints are what was read, so that nobody's change is lost. The work is
//! tried again, with back-off, until it is done once; then nothing of it is left in memory.

use std::time::Duration;

use k8s_openapi::api::{core::v1::Node, storage::v1::CSINode};
use kube::{
    Api, Client, Config,
    api::{ApiResource, DynamicObject, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::time::sleep;
use tracing::{debug, info, warn};

use crate::{sys, telemetry::error_chain};

/// How long a connection or an answer may take; the API server itself gives up after a minute.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// First wait; each further one is twice as long.
///
/// Kubelet registers a driver within a second or two of seeing its socket.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// Longest wait for kubelet: what a node loses at most whose images took long to arrive.
const MAX_WAIT_FOR_KUBELET: Duration = Duration::from_secs(10);

/// Longest wait after a failure: a cluster of nodes must not crowd an API server that comes back.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// Conflicts that are worth a word: some are usual, because controllers write a new node's taints at
/// the same time.
const UNUSUAL_CONFLICTS: u32 = 6;

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

/// Says why the API server cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("not in a pod of a cluster: set automountServiceAccountToken for this pod")]
pub struct NotInCluster(#[source] kube::config::InClusterError);

/// Finds the API server as a pod does.
///
/// # Errors
/// [`NotInCluster`] says what is missing.
pub fn cluster_of_this_pod() -> Result<Config, NotInCluster> {
    Config::incluster().map_err(NotInCluster)
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Kubelet has not registered the driver yet.
    NotRegistered,
    /// So many taints were removed, and none is left.
    Done { n_removed: usize },
    /// The node was changed since it was read.
    Conflict,
}

/// Returns the JSON patch (RFC 6902) that removes the taints with `key`, and how many those are;
/// `None` if there is none.
///
/// The list is replaced as a whole: a taint cannot be named in a patch but by its place, and the
/// `test` makes the patch fail if the list is another one by then.
fn plan(taints: &[Value], key: &TaintKey) -> Option<(Value, usize)> {
    let has_key = |taint: &&Value| taint["key"] == key.0.as_str();
    let left: Vec<_> = taints.iter().filter(|it| !has_key(it)).collect();
    let n_removed = taints.len() - left.len();
    if n_removed == 0 {
        return None;
    }
    let patch = json!([
        {"op": "test", "path": "/spec/taints", "value": taints},
        {"op": "replace", "path": "/spec/taints", "value": left},
    ]);
    Some((patch, n_removed))
}

/// Removes the taint, however long it takes.
///
/// # Cancellation
/// Safe: a patch is applied or not.
pub async fn remove(mut cluster: Config, taint: StartupTaint) {
    cluster.connect_timeout = Some(REQUEST_TIMEOUT);
    cluster.read_timeout = Some(REQUEST_TIMEOUT);
    cluster.write_timeout = Some(REQUEST_TIMEOUT);
    let mut wait = FIRST_WAIT;
    let mut last_error = String::new();
    let mut n_conflicts = 0;
    loop {
        // A client for each attempt: it reads the token that is valid by now, and nothing stays of
        // it in memory.
        let step = match Client::try_from(cluster.clone()) {
            Ok(client) => attempt(client, &taint).await,
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
            Ok(Step::Conflict) => {
                // The next attempt sees what somebody else did.
                n_conflicts += 1;
                if n_conflicts == UNUSUAL_CONFLICTS {
                    warn!(
                        node.name = taint.node,
                        taint = taint.key.0,
                        "startup taint stays for now: the node's taints change all the time"
                    );
                }
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

async fn attempt(client: Client, taint: &StartupTaint) -> kube::Result<Step> {
    let csi_nodes: Api<CSINode> = Api::all(client.clone());
    // Kubelet makes the object when the first driver registers.
    let Some(csi_node) = csi_nodes.get_opt(&taint.node).await? else {
        return Ok(Step::NotRegistered);
    };
    let drivers = csi_node.spec.drivers;
    if !drivers.iter().any(|it| it.name == taint.driver) {
        return Ok(Step::NotRegistered);
    }
    // As it came: a taint may have fields that this release's types do not know.
    let kind = ApiResource::erase::<Node>(&());
    let nodes: Api<DynamicObject> = Api::all_with(client, &kind);
    let node = nodes.get(&taint.node).await?;
    let taints = node.data["spec"]["taints"].as_array();
    let taints = taints.map(Vec::as_slice).unwrap_or_default();
    let Some((patch, n_removed)) = plan(taints, &taint.key) else {
        return Ok(Step::Done { n_removed: 0 });
    };
    let patch: json_patch::Patch =
        serde_json::from_value(patch).map_err(kube::Error::SerdeError)?;
    let patched = nodes
        .patch(
            &taint.node,
            &PatchParams::default(),
            &Patch::Json::<()>(patch),
        )
        .await;
    match patched {
        Ok(_) => Ok(Step::Done { n_removed }),
        // 422 is what a failed `test` of a patch answers (apiserver, handlers/patch.go).
        Err(kube::Error::Api(status)) if matches!(status.code, 409 | 422) => Ok(Step::Conflict),
        Err(err) => Err(err),
    }
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
            (vec![&ours], Some((vec![], 1))),
            (vec![&other, &ours, &near], Some((vec![&other, &near], 1))),
            (vec![&ours, &other, &ours_too], Some((vec![&other], 2))),
        ] {
            let taints: Vec<Value> = taints.into_iter().cloned().collect();
            let expected = left.map(|(left, n_removed)| {
                let patch = json!([
                    {"op": "test", "path": "/spec/taints", "value": taints},
                    {"op": "replace", "path": "/spec/taints", "value": left},
                ]);
                (patch, n_removed)
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
