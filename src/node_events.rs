//! Tells Kubernetes what an operator should see: Events of this node.
//!
//! Written as `kubectl describe node` shows them. An event that cannot be written is in the log, and
//! is not tried again: the metrics say the same.

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

/// Writes the events of one node.
#[derive(Clone)]
pub struct NodeEvents {
    api: Api<Event>,
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
    pub fn new(cluster: Config, node: &str, driver: &str) -> kube::Result<Self> {
        let client = Client::try_from(cluster)?;
        Ok(Self {
            api: Api::namespaced(client, NAMESPACE),
            node: node.to_owned(),
            driver: driver.to_owned(),
        })
    }

    /// Writes a warning.
    pub async fn warn(&self, reason: &str, message: &str) {
        let now = Time(Timestamp::now());
        let event = Event {
            metadata: ObjectMeta {
                generate_name: Some(format!("{}.", self.node)),
                namespace: Some(NAMESPACE.to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(self.node.clone()),
                // What `kubectl describe node` looks for.
                uid: Some(self.node.clone()),
                ..ObjectReference::default()
            },
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
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
        match self.api.create(&PostParams::default(), &event).await {
            Ok(_) => info!(reason, "told Kubernetes in an event of the node"),
            Err(err) => warn!(
                reason,
                error = error_chain(&err),
                "cannot write an event of the node"
            ),
        }
    }
}
