//! Reads out of pods, and of what makes pods, which images their inline volumes of this driver name.
//!
//! One type is read for all kinds, and it has only the fields that count: what a page of whole Pods takes in memory is
//! mostly what nobody here asks for.
//!
//! A pod that something here makes is left out: its template says the same, and there is one of that for any number of
//! pods. So volumes that a webhook adds to such pods alone are not seen.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde::Deserialize;

/// Images that are read of one object, at most: volumes have no bound but the size of an object.
const MAX_USES: usize = 64;

/// Longest image reference that a volume of the driver may have; a longer one is refused when it is mounted.
const MAX_IMAGE_BYTES: usize = 1024;

/// Longest platform, likewise.
const MAX_PLATFORM_BYTES: usize = 128;

/// Label by which a Deployment tells its ReplicaSets' pods apart; pods of a ReplicaSet that stands alone have none.
const OF_DEPLOYMENT: &str = "pod-template-hash";

/// A kind of workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Pods that nothing of the other kinds makes.
    Pod,
    /// Deployments.
    Deployment,
    /// StatefulSets.
    StatefulSet,
    /// DaemonSets.
    DaemonSet,
    /// Jobs that have not ended and that no CronJob makes.
    Job,
    /// CronJobs.
    CronJob,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::Pod,
        Self::Deployment,
        Self::StatefulSet,
        Self::DaemonSet,
        Self::Job,
        Self::CronJob,
    ];

    /// Group, kind and plural, as the API has them.
    const fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Pod => ("", "Pod", "pods"),
            Self::Deployment => ("apps", "Deployment", "deployments"),
            Self::StatefulSet => ("apps", "StatefulSet", "statefulsets"),
            Self::DaemonSet => ("apps", "DaemonSet", "daemonsets"),
            Self::Job => ("batch", "Job", "jobs"),
            Self::CronJob => ("batch", "CronJob", "cronjobs"),
        }
    }
}

/// An image that a volume names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageUse {
    /// The image, as the volume has it.
    pub image: String,
    /// The platform, if the volume names one.
    pub platform: Option<String>,
    /// Secret of the workload's namespace with which it is pulled.
    pub secret: Option<String>,
}

/// What counts of a workload. All that is kept of the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Its own labels, not those of its pods.
    pub labels: BTreeMap<String, String>,
    /// The images that its volumes name, in order, each once.
    pub uses: Vec<ImageUse>,
}

/// A pod, or something that makes pods, as far as it is read.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Object {
    metadata: ObjectMeta,
    spec: Option<Spec>,
    status: Option<Status>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    /// Of a pod.
    volumes: Option<Vec<Volume>>,
    /// Of what makes pods.
    template: Option<Template>,
    /// Of what makes jobs.
    job_template: Option<Template>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Template {
    spec: Option<Box<Spec>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Volume {
    csi: Option<Csi>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Csi {
    driver: String,
    volume_attributes: Option<Attributes>,
    node_publish_secret_ref: Option<SecretRef>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Attributes {
    image: Option<String>,
    platform: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SecretRef {
    name: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    /// Of a pod.
    phase: Option<String>,
    /// Of a job.
    conditions: Option<Vec<StatusCondition>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct StatusCondition {
    r#type: String,
    status: String,
}

impl kube::Resource for Object {
    type DynamicType = Kind;
    type Scope = NamespaceResourceScope;

    fn kind(kind: &Kind) -> Cow<'_, str> {
        kind.names().1.into()
    }

    fn group(kind: &Kind) -> Cow<'_, str> {
        kind.names().0.into()
    }

    fn version(_: &Kind) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural(kind: &Kind) -> Cow<'_, str> {
        kind.names().2.into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

impl Object {
    /// Returns its namespace.
    pub fn namespace(&self) -> &str {
        self.metadata.namespace.as_deref().unwrap_or_default()
    }

    /// Returns its name.
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// Returns its uid.
    pub fn uid(&self) -> &str {
        self.metadata.uid.as_deref().unwrap_or_default()
    }

    /// Whether it is a pod whose containers are yet to start.
    pub fn is_starting(&self) -> bool {
        let phase = self.status.as_ref().and_then(|it| it.phase.as_deref());
        phase.is_none_or(|it| it == "Pending")
    }

    /// Returns what counts of it; `None` if nothing does: no volume is of `driver`, or something else counts instead.
    pub fn workload(&self, driver: &str) -> Option<Workload> {
        if self.has_ended() || self.is_made_by_another() {
            return None;
        }
        let uses = self.uses(driver);
        (!uses.is_empty()).then(|| Workload {
            labels: self.metadata.labels.clone().unwrap_or_default(),
            uses,
        })
    }

    /// Whether it will mount nothing any more.
    pub fn has_ended(&self) -> bool {
        let Some(status) = &self.status else {
            return self.metadata.deletion_timestamp.is_some();
        };
        let is_over = |it: &StatusCondition| {
            it.status == "True" && ["Complete", "Failed"].contains(&it.r#type.as_str())
        };
        // A Deployment's conditions have other names.
        self.metadata.deletion_timestamp.is_some()
            || matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
            || status.conditions.iter().flatten().any(is_over)
    }

    /// Whether it comes out of a template that is read itself.
    fn is_made_by_another(&self) -> bool {
        let owners = self.metadata.owner_references.iter().flatten();
        let mut controllers = owners.filter(|it| it.controller == Some(true));
        controllers.any(|it| {
            let (group, _) = it.api_version.split_once('/').unwrap_or_default();
            match (group, it.kind.as_str()) {
                ("apps", "StatefulSet" | "DaemonSet") | ("batch", "Job" | "CronJob") => true,
                // A ReplicaSet is not read itself: it may stand alone, or be made by something that is not.
                ("apps", "ReplicaSet") => {
                    let mut labels = self.metadata.labels.iter();
                    labels.any(|it| it.contains_key(OF_DEPLOYMENT))
                }
                _ => false,
            }
        })
    }

    /// Returns the images that its volumes of `driver` name, in order, each once.
    pub fn uses(&self, driver: &str) -> Vec<ImageUse> {
        // A CronJob has a job's template, which has a pod's; a pod has none.
        let mut spec = self.spec.as_ref();
        while let Some(inner) =
            spec.and_then(|it| it.job_template.as_ref().or(it.template.as_ref()))
        {
            spec = inner.spec.as_deref();
        }
        let volumes = spec.and_then(|it| it.volumes.as_ref());
        let csi = volumes
            .into_iter()
            .flatten()
            .filter_map(|it| it.csi.as_ref());
        let mut uses: Vec<_> = csi
            .filter(|it| it.driver == driver)
            .take(MAX_USES)
            .filter_map(image_use)
            .collect();
        uses.sort();
        uses.dedup();
        uses
    }
}

/// What a volume names, unless it is one that no node would mount.
fn image_use(csi: &Csi) -> Option<ImageUse> {
    let attributes = csi.volume_attributes.as_ref()?;
    let image = attributes.image.as_ref()?;
    let platform = attributes.platform.as_ref();
    let is_possible = |text: &String, max: usize| !text.is_empty() && text.len() <= max;
    if !is_possible(image, MAX_IMAGE_BYTES)
        || !platform.is_none_or(|it| is_possible(it, MAX_PLATFORM_BYTES))
    {
        return None;
    }
    let secret = csi.node_publish_secret_ref.as_ref();
    Some(ImageUse {
        image: image.clone(),
        platform: platform.cloned(),
        secret: secret
            .and_then(|it| it.name.clone())
            .filter(|it| !it.is_empty()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const DRIVER: &str = "csi.clip-csi.dev";

    fn volumes() -> Value {
        json!({"containers": [{"name": "c", "image": "not-this"}], "volumes": [
            {"name": "a", "csi": {"driver": DRIVER, "volumeAttributes": {"image": "r/b:1", "path": "x"}, "nodePublishSecretRef": {"name": "s"}}},
            {"name": "b", "csi": {"driver": DRIVER, "volumeAttributes": {"image": "r/a:1", "platform": "linux/arm64"}}},
            {"name": "c", "csi": {"driver": DRIVER, "volumeAttributes": {"image": "r/a:1", "platform": "linux/arm64"}}},
            {"name": "d", "csi": {"driver": "other", "volumeAttributes": {"image": "r/c:1"}}},
            {"name": "e", "csi": {"driver": DRIVER}},
            {"name": "f", "csi": {"driver": DRIVER, "volumeAttributes": {"image": ""}}},
            {"name": "g", "csi": {"driver": DRIVER, "volumeAttributes": {"image": "x".repeat(1025)}}},
            {"name": "h", "emptyDir": {}},
        ]})
    }

    fn image(image: &str, platform: Option<&str>, secret: Option<&str>) -> ImageUse {
        ImageUse {
            image: image.to_owned(),
            platform: platform.map(str::to_owned),
            secret: secret.map(str::to_owned),
        }
    }

    fn workload(metadata: Value, spec: Value, status: Value) -> Option<Workload> {
        let object = json!({"metadata": metadata, "spec": spec, "status": status});
        let object: Object = serde_json::from_value(object).unwrap();
        object.workload(DRIVER)
    }

    #[test]
    fn images_of_the_drivers_volumes_are_read_wherever_a_kind_has_its_pods_spec() {
        let expected = Workload {
            labels: [("app".to_owned(), "web".to_owned())].into(),
            uses: vec![
                image("r/a:1", Some("linux/arm64"), None),
                image("r/b:1", None, Some("s")),
            ],
        };
        let template = json!({"metadata": {"labels": {"app": "pod"}}, "spec": volumes()});
        for spec in [
            volumes(),
            json!({"replicas": 0, "template": template}),
            json!({"schedule": "@daily", "jobTemplate": {"spec": {"template": template}}}),
        ] {
            let metadata = json!({"name": "w", "namespace": "n", "labels": {"app": "web"}});
            let found = workload(metadata, spec.clone(), json!({"phase": "Running"}));
            assert_eq!(found.as_ref(), Some(&expected), "{spec}");
        }
        for spec in [
            json!({}),
            json!({"volumes": null}),
            json!({"template": null}),
            json!({"volumes": [{"csi": null}]}),
        ] {
            assert_eq!(
                workload(json!({}), spec.clone(), json!(null)),
                None,
                "{spec}"
            );
        }
    }

    #[test]
    fn what_has_ended_or_comes_out_of_a_template_that_is_read_does_not_count() {
        let owner = |api: &str, kind: &str, controller: bool| json!({"ownerReferences": [{"apiVersion": api, "kind": kind, "name": "o", "uid": "u", "controller": controller}]});
        let of_deployment = |key: &str| {
            let mut metadata = owner("apps/v1", "ReplicaSet", true);
            metadata["labels"] = json!({key: "5d"});
            metadata
        };
        let condition =
            |kind: &str, status: &str| json!({"conditions": [{"type": kind, "status": status}]});
        for (metadata, status, counts) in [
            (json!({}), json!(null), true),
            (
                json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}),
                json!(null),
                false,
            ),
            (
                json!({"deletionTimestamp": "2026-01-01T00:00:00Z"}),
                json!({}),
                false,
            ),
            (json!({}), json!({"phase": "Pending"}), true),
            (json!({}), json!({"phase": "Succeeded"}), false),
            (json!({}), json!({"phase": "Failed"}), false),
            (json!({}), condition("Complete", "True"), false),
            (json!({}), condition("Failed", "True"), false),
            (json!({}), condition("Failed", "False"), true),
            (json!({}), condition("Suspended", "True"), true),
            (owner("apps/v1", "StatefulSet", true), json!(null), false),
            (owner("apps/v1", "StatefulSet", false), json!(null), true),
            (
                owner("apps.kruise.io/v1", "StatefulSet", true),
                json!(null),
                true,
            ),
            (owner("apps/v1", "DaemonSet", true), json!(null), false),
            (owner("batch/v1", "Job", true), json!(null), false),
            (owner("batch/v1", "CronJob", true), json!(null), false),
            (
                owner("v1", "ReplicationController", true),
                json!(null),
                true,
            ),
            (owner("apps/v1", "ReplicaSet", true), json!(null), true),
            (of_deployment("pod-template-hash"), json!(null), false),
            (
                of_deployment("rollouts-pod-template-hash"),
                json!(null),
                true,
            ),
        ] {
            let found = workload(metadata.clone(), volumes(), status.clone());
            assert_eq!(found.is_some(), counts, "{metadata} {status}");
        }
    }
}
