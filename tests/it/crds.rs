//! The types of the Kubernetes API and the definitions that the cluster has of them say the same.
//!
//! Of each kind an object is written here with every field set. Its fields must be those of the schema, no more and
//! no fewer, and of its types; a field that is added to a type does not compile here until it is set.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{collections::BTreeSet, fs};

use clip_csi::api::{
    CacheUsage, Content, FailedNode, ImagePrewarm, ImagePrewarmSpec, ImagePrewarmStatus,
    ImageRollout, ImageRolloutSpec, ImageState, ImageStatus, ImageToWarm, MAX_WARMUPS, NodeCounts,
    NodeImageCache, NodeImageCacheStatus, Phase, PullSecretRef, Target, Toleration,
    TolerationOperator, Warmup, WarmupPhase, Workloads,
};
use k8s_openapi::{
    apimachinery::pkg::{
        apis::meta::v1::{Condition, LabelSelector, LabelSelectorRequirement, ObjectMeta, Time},
        util::intstr::IntOrString,
    },
    jiff::Timestamp,
};
use kube::Resource;
use serde::Serialize;
use serde_json::{Value, json};

/// A definition, as it is installed.
fn definition(plural: &str) -> Value {
    let dir = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/deploy/helm/clip-csi/files/crds"
    );
    let text = fs::read_to_string(format!("{dir}/{plural}.yaml")).unwrap();
    serde_saphyr::from_str(&text).unwrap()
}

fn schema(definition: &Value) -> &Value {
    &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
}

fn now() -> Time {
    Time(Timestamp::UNIX_EPOCH)
}

fn image_prewarm() -> ImagePrewarm {
    ImagePrewarm {
        metadata: ObjectMeta::default(),
        spec: ImagePrewarmSpec {
            images: vec![ImageToWarm {
                image: "r/i:t".to_owned(),
            }],
            workloads: Some(Workloads {
                selector: Some(LabelSelector {
                    match_labels: Some([("app".to_owned(), "web".to_owned())].into()),
                    match_expressions: Some(vec![LabelSelectorRequirement {
                        key: "app".to_owned(),
                        operator: "In".to_owned(),
                        values: Some(vec!["web".to_owned()]),
                    }]),
                }),
            }),
            platforms: vec!["linux/amd64".to_owned()],
            image_pull_secrets: vec![PullSecretRef {
                name: "s".to_owned(),
            }],
            target: Target::Nodes,
            content: Content::All,
            node_selector: [("gpu".to_owned(), "yes".to_owned())].into(),
            tolerations: vec![Toleration {
                key: Some("gpu".to_owned()),
                operator: TolerationOperator::Equal,
                value: Some("yes".to_owned()),
                effect: Some("NoSchedule".to_owned()),
            }],
            parallelism: Some(IntOrString::Int(1)),
            bytes_per_second_per_node: Some(1),
            total_bytes_per_second: Some(1),
            max_bytes_per_node: Some(1),
            priority: 1,
            refresh_interval_seconds: Some(60),
            ttl_seconds_after_finished: Some(1),
            active_deadline_seconds: Some(1),
            backoff_limit: 6,
            suspend: false,
        },
        status: Some(ImagePrewarmStatus {
            observed_generation: 1,
            phase: Phase::Pending,
            conditions: vec![Condition {
                last_transition_time: now(),
                message: "m".to_owned(),
                observed_generation: Some(1),
                reason: "R".to_owned(),
                status: "True".to_owned(),
                type_: "Ready".to_owned(),
            }],
            images: vec![ImageStatus {
                image: "r/i:t".to_owned(),
                platform: "linux/amd64".to_owned(),
                state: ImageState::Pending,
                manifest_digest: Some("sha256:0".to_owned()),
                layers: Some(1),
                blob_bytes: Some(1),
                blob_bytes_done: 1,
                layer_bytes: Some(1),
                bytes_from_registry: 1,
                attempts: 1,
                retry_at: Some(now()),
                checked_at: Some(now()),
                reason: Some("R".to_owned()),
                message: Some("m".to_owned()),
            }],
            images_seeded: "1/1".to_owned(),
            nodes_ready: "1/1".to_owned(),
            nodes: NodeCounts {
                desired: 1,
                pending: 1,
                warming: 1,
                ready: 1,
                failed: 1,
            },
            failed_nodes: vec![FailedNode {
                node: "n".to_owned(),
                reason: "R".to_owned(),
                message: "m".to_owned(),
            }],
            revision: "r".to_owned(),
            admitted_permille: 1,
            node_bytes_per_second: Some(1),
            started_at: Some(now()),
            finished_at: Some(now()),
        }),
    }
}

fn image_rollout() -> ImageRollout {
    ImageRollout {
        metadata: ObjectMeta::default(),
        spec: ImageRolloutSpec {
            namespace: "n".to_owned(),
            name: "n".to_owned(),
            generation: 1,
            revision: "r".to_owned(),
            admitted_permille: 1,
            nodes: 1,
        },
    }
}

fn node_image_cache() -> NodeImageCache {
    NodeImageCache {
        metadata: ObjectMeta::default(),
        status: Some(NodeImageCacheStatus {
            updated_at: Some(now()),
            cache: CacheUsage {
                capacity_bytes: 1,
                used_bytes: 1,
                layers: 1,
            },
            warmups: vec![Warmup {
                uid: "u".to_owned(),
                namespace: "n".to_owned(),
                name: "n".to_owned(),
                revision: "r".to_owned(),
                phase: WarmupPhase::Pending,
                bytes_done: 1,
                bytes_total: 1,
                since: Some(now()),
                reason: Some("R".to_owned()),
                message: Some("m".to_owned()),
            }],
            warmups_ready: "1/1".to_owned(),
        }),
    }
}

/// Finds where `value` and `schema` differ, and says so in `faults`.
fn compare(path: &str, value: &Value, schema: &Value, faults: &mut Vec<String>) {
    if schema["x-kubernetes-int-or-string"] == true {
        return;
    }
    let kind = schema["type"].as_str().unwrap_or("none");
    let fits = match value {
        Value::Object(_) => kind == "object",
        Value::Array(_) => kind == "array",
        Value::String(_) => kind == "string",
        Value::Number(_) => kind == "integer",
        Value::Bool(_) => kind == "boolean",
        Value::Null => false,
    };
    if !fits {
        faults.push(format!("{path}: {value} is no {kind}"));
    }
    match value {
        Value::Array(items) => {
            assert!(!items.is_empty(), "{path}: the test sets it");
            for item in items {
                compare(&format!("{path}[]"), item, &schema["items"], faults);
            }
        }
        Value::Object(fields) => {
            let Some(properties) = schema["properties"].as_object() else {
                if schema["additionalProperties"].is_null() && path != ".metadata" {
                    faults.push(format!("{path}: has no properties"));
                }
                return;
            };
            let (in_type, in_schema): (BTreeSet<_>, BTreeSet<_>) =
                (fields.keys().collect(), properties.keys().collect());
            for field in in_type.symmetric_difference(&in_schema) {
                // Written by kube, not by the type.
                if path.is_empty() && ["apiVersion", "kind"].contains(&field.as_str()) {
                    continue;
                }
                faults.push(format!("{path}.{field}: in one of them only"));
            }
            for field in in_type.intersection(&in_schema) {
                let (value, schema) = (&fields[*field], &properties[*field]);
                compare(&format!("{path}.{field}"), value, schema, faults);
            }
        }
        _ => {}
    }
}

fn faults(object: &impl Serialize, definition: &Value) -> Vec<String> {
    let mut faults = Vec::new();
    let object = serde_json::to_value(object).unwrap();
    compare("", &object, schema(definition), &mut faults);
    faults
}

#[test]
fn types_have_the_fields_of_the_definitions() {
    assert_eq!(
        faults(&image_prewarm(), &definition("imageprewarms")),
        [""; 0]
    );
    assert_eq!(
        faults(&image_rollout(), &definition("imagerollouts")),
        [""; 0]
    );
    assert_eq!(
        faults(&node_image_cache(), &definition("nodeimagecaches")),
        [""; 0]
    );
}

#[test]
fn a_field_that_only_one_of_them_has_is_found() {
    let mut definition = definition("imageprewarms");
    let spec =
        &mut definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"];
    let properties = spec["properties"].as_object_mut().unwrap();
    properties.remove("suspend");
    properties.insert("other".to_owned(), json!({"type": "string"}));
    properties["priority"]["type"] = json!("string");
    assert_eq!(
        faults(&image_prewarm(), &definition),
        [
            ".spec.other: in one of them only",
            ".spec.suspend: in one of them only",
            ".spec.priority: 1 is no string",
        ]
    );
}

fn names<T: Serialize>(all: &[T]) -> Value {
    serde_json::to_value(all).unwrap()
}

#[test]
fn enumerations_and_bounds_are_the_same() {
    let prewarm = definition("imageprewarms");
    let cache = definition("nodeimagecaches");
    let of_prewarm = |pointer: &str| schema(&prewarm).pointer(pointer).unwrap().clone();
    let spec = |field: &str| of_prewarm(&format!("/properties/spec/properties/{field}"));
    let status = |field: &str| of_prewarm(&format!("/properties/status/properties/{field}"));
    assert_eq!(spec("target/enum"), names(&[Target::Remote, Target::Nodes]));
    assert_eq!(
        spec("content/enum"),
        names(&[Content::Index, Content::Recorded, Content::All])
    );
    assert_eq!(
        spec("tolerations/items/properties/operator/enum"),
        names(&[TolerationOperator::Equal, TolerationOperator::Exists])
    );
    assert_eq!(status("phase/enum"), names(&Phase::ALL));
    assert_eq!(names(&Phase::ALL), names(&Phase::ALL.map(Phase::name)));
    assert_eq!(
        status("images/items/properties/state/enum"),
        names(&[
            ImageState::Pending,
            ImageState::Seeding,
            ImageState::Seeded,
            ImageState::Resolved,
            ImageState::Failed
        ])
    );
    let warmups = &schema(&cache)["properties"]["status"]["properties"]["warmups"];
    assert_eq!(warmups["maxItems"], MAX_WARMUPS);
    assert_eq!(
        warmups["items"]["properties"]["phase"]["enum"],
        names(&[
            WarmupPhase::Pending,
            WarmupPhase::Warming,
            WarmupPhase::Ready,
            WarmupPhase::Failed
        ])
    );
}

#[test]
fn an_absent_field_means_what_the_definition_says() {
    let given = json!({"metadata": {}, "spec": {"images": [{"image": "r/i:t"}]}});
    let parsed: ImagePrewarm = serde_json::from_value(given).unwrap();
    let written = serde_json::to_value(&parsed.spec).unwrap();
    let definition = definition("imageprewarms");
    let properties = &schema(&definition)["properties"]["spec"]["properties"];
    for (field, schema) in properties.as_object().unwrap() {
        if field != "images" {
            assert_eq!(written[field], schema["default"], "{field}");
        }
    }
}

#[test]
fn names_are_those_of_the_definitions() {
    fn check<K: Resource<DynamicType = ()>>(scope: &str) {
        let plural = K::plural(&());
        let definition = definition(&plural);
        assert_eq!(
            definition["metadata"]["name"],
            format!("{plural}.{}", K::group(&()))
        );
        let spec = &definition["spec"];
        assert_eq!(spec["group"], K::group(&()).as_ref());
        assert_eq!(spec["names"]["kind"], K::kind(&()).as_ref());
        assert_eq!(spec["names"]["plural"], plural.as_ref());
        assert_eq!(spec["versions"][0]["name"], K::version(&()).as_ref());
        assert_eq!(spec["scope"], scope);
    }
    check::<ImagePrewarm>("Namespaced");
    check::<ImageRollout>("Cluster");
    check::<NodeImageCache>("Cluster");
}
