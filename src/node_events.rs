//! Tells Kubernetes what people should see: Events of this node, and of the pods on it.
//!
//! Written as `kubectl describe` shows them. An event that cannot be written is in the log, and
//! is not tried again: the metrics say the same.

use std::time::Duration;

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{Api, Client, Config, api::PostParams};
use tracing::{info, warn};

use crate::telemetry::error_chain;

/// Events of objects without a namespace live there (kubernetes, `client-go/tools/record`).
const NAMESPACE: &str = "default";

/// How long a connection or an answer may take: other events wait.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest message that Kubernetes takes (`pkg/apis/core/validation/events.go`).
const MAX_MESSAGE_BYTES: usize = 1024;

/// Writes the events of one node.
#[derive(Clone)]
pub struct NodeEvents {
    client: Client,
    node: String,
    driver: String,
}

impl std::fmt::Debug for NodeEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeEvents")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
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
        Ok(Self {
            client: Client::try_from(cluster)?,
            node: node.to_owned(),
            driver: driver.to_owned(),
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
        let now = Time(Timestamp::now());
        let kind = about.kind.clone().unwrap_or_default();
        let event = Event {
            metadata: ObjectMeta {
                generate_name: about.name.as_ref().map(|it| format!("{it}.")),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: about,
            reason: Some(reason.to_owned()),
            message: Some(bounded(message).to_owned()),
            type_: Some("Warning".to_owned()),
            source: Some(EventSource {
                component: Some(self.driver.clone()),
                host: Some(self.node.clone()),
            }),
            first_timestamp: Some(now.clone()),
            last_timestamp: Some(now),
            count: Some(1),
            ..Event::default()
        };
        let events: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        match events.create(&PostParams::default(), &event).await {
            Ok(_) => info!(kind, reason, "told Kubernetes in an event"),
            Err(err) => warn!(
                kind,
                reason,
                error = error_chain(&err),
                "cannot write an event"
            ),
        }
    }
}

/// As much of a message as an event may have.
fn bounded(message: &str) -> &str {
    let mut end = message.len().min(MAX_MESSAGE_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_ends_where_a_character_does() {
        assert_eq!(bounded("short"), "short");
        let long = format!("x{}", "…".repeat(1000));
        assert_eq!(bounded(&long).len(), 1024);
        assert_eq!(bounded(&"…".repeat(1000)).len(), 1023);
    }
}
