//! Writes Events, as `kubectl describe` shows them.
//!
//! An event that cannot be written is in the log, and is not tried again: status and metrics say the same.

use k8s_openapi::{
    api::core::v1::{Event, EventSource, ObjectReference},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tracing::{info, warn};

use crate::telemetry::error_chain;

/// Longest message that Kubernetes takes (`pkg/apis/core/validation/events.go`).
const MAX_MESSAGE_BYTES: usize = 1024;

/// Whether somebody should do something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// Things go their way.
    Normal,
    /// Something is wrong.
    Warning,
}

/// Writes events in the name of a component.
#[derive(Clone)]
pub struct Events {
    client: Client,
    source: EventSource,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl Events {
    /// Writes in the name of `component`, which runs on `host` if that matters.
    pub fn new(client: Client, component: &str, host: Option<&str>) -> Self {
        Self {
            client,
            source: EventSource {
                component: Some(component.to_owned()),
                host: host.map(str::to_owned),
            },
        }
    }

    /// Writes an event about an object, in `namespace`.
    pub async fn write(
        &self,
        namespace: &str,
        about: ObjectReference,
        kind: EventKind,
        reason: &str,
        message: &str,
    ) {
        let now = Time(Timestamp::now());
        let object = about.kind.clone().unwrap_or_default();
        let event = Event {
            metadata: ObjectMeta {
                generate_name: about.name.as_ref().map(|it| format!("{it}.")),
                namespace: Some(namespace.to_owned()),
                ..ObjectMeta::default()
            },
            involved_object: about,
            reason: Some(reason.to_owned()),
            message: Some(bounded(message).to_owned()),
            type_: Some(
                match kind {
                    EventKind::Normal => "Normal",
                    EventKind::Warning => "Warning",
                }
                .to_owned(),
            ),
            source: Some(self.source.clone()),
            first_timestamp: Some(now.clone()),
            last_timestamp: Some(now),
            count: Some(1),
            ..Event::default()
        };
        let events: Api<Event> = Api::namespaced(self.client.clone(), namespace);
        match events.create(&PostParams::default(), &event).await {
            Ok(_) => info!(kind = object, reason, "told Kubernetes in an event"),
            Err(err) => warn!(
                kind = object,
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
