//! Tells Kubernetes what people should see: Events of this node, and of the pods on it.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::{Client, Config};

use crate::cluster::{EventKind, Events};

/// Events of objects without a namespace live there (kubernetes, `client-go/tools/record`).
const NAMESPACE: &str = "default";

/// How long a connection or an answer may take: other events wait.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Writes the events of one node.
#[derive(Debug, Clone)]
pub struct NodeEvents {
    events: Events,
    node: String,
}

impl NodeEvents {
    /// Makes a writer of the events of `node`, in the name of `driver`.
    ///
    /// # Errors
    /// If no client can be made of the configuration.
    pub fn new(mut cluster: Config, node: &str, driver: &str) -> kube::Result<Self> {
        cluster.connect_timeout = Some(REQUEST_TIMEOUT);
        cluster.read_timeout = Some(REQUEST_TIMEOUT);
        cluster.write_timeout = Some(REQUEST_TIMEOUT);
        let client = Client::try_from(cluster)?;
        Ok(Self {
            events: Events::new(client, driver, Some(node)),
            node: node.to_owned(),
        })
    }

    /// Writes a warning about the node.
    pub async fn warn(&self, reason: &str, message: &str) {
        let about = ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(self.node.clone()),
            // What `kubectl describe node` looks for.
            uid: Some(self.node.clone()),
            ..ObjectReference::default()
        };
        self.write(NAMESPACE, about, reason, message).await;
    }

    /// Writes a warning about a pod.
    pub async fn warn_of_pod(
        &self,
        namespace: &str,
        name: &str,
        uid: &str,
        reason: &str,
        message: &str,
    ) {
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(name.to_owned()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        };
        self.write(namespace, about, reason, message).await;
    }

    async fn write(&self, namespace: &str, about: ObjectReference, reason: &str, message: &str) {
        let kind = EventKind::Warning;
        self.events
            .write(namespace, about, kind, reason, message)
            .await;
    }
}
