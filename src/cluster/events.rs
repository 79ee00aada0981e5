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

use super::bounded;
use crate::telemetry::error_chain;

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
