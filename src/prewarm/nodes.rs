//! Which nodes an ImagePrewarm is for: those on which a pod with its selector and tolerations could be placed.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Taint};

use crate::api::{ImagePrewarmSpec, Target, Toleration, TolerationOperator};

/// What counts of a node. All that is kept of the object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its taints that keep pods away, as key, value, effect.
    pub taints: Vec<(String, String, String)>,
    /// Whether kubelet says that it is ready.
    pub is_ready: bool,
}

/// Effects that keep a pod away.
const KEEPS_AWAY: [&str; 2] = ["NoSchedule", "NoExecute"];

impl NodeFacts {
    /// Takes what counts out of the object.
    pub fn of(node: &Node) -> Self {
        let taints = node.spec.iter().flat_map(|it| it.taints.iter().flatten());
        let taints = taints.filter(|it| KEEPS_AWAY.contains(&it.effect.as_str()));
        let of_taint = |it: &Taint| {
            let value = it.value.clone().unwrap_or_default();
            (it.key.clone(), value, it.effect.clone())
        };
        let mut conditions = node
            .status
            .iter()
            .flat_map(|it| it.conditions.iter().flatten());
        Self {
            labels: node.metadata.labels.clone().unwrap_or_default(),
            taints: taints.map(of_taint).collect(),
            is_ready: conditions.any(|it| it.type_ == "Ready" && it.status == "True"),
        }
    }

    /// Whether what is wanted is for this node, ready or not.
    pub fn is_wanted(&self, spec: &ImagePrewarmSpec) -> bool {
        let has_label = |(key, value)| self.labels.get(key) == Some(value);
        let tolerated = |taint| spec.tolerations.iter().any(|it| tolerates(it, taint));
        spec.target == Target::Nodes
            && spec.node_selector.iter().all(has_label)
            && self.taints.iter().all(tolerated)
    }
}

/// As the scheduler decides (kubernetes, `core/v1/toleration.go`, `ToleratesTaint`).
fn tolerates(toleration: &Toleration, (key, value, effect): &(String, String, String)) -> bool {
    let is_same = |wanted: &Option<String>, there: &str| {
        wanted
            .as_deref()
            .is_none_or(|it| it.is_empty() || it == there)
    };
    is_same(&toleration.effect, effect)
        && is_same(&toleration.key, key)
        && match toleration.operator {
            TolerationOperator::Exists => true,
            TolerationOperator::Equal => toleration.value.as_deref().unwrap_or_default() == value,
        }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node(labels: serde_json::Value, taints: serde_json::Value, ready: &str) -> NodeFacts {
        let node = json!({
            "metadata": {"name": "n", "labels": labels},
            "spec": {"taints": taints},
            "status": {"conditions": [{"type": "DiskPressure", "status": "True"}, {"type": "Ready", "status": ready}]},
        });
        NodeFacts::of(&serde_json::from_value(node).unwrap())
    }

    fn spec(fields: serde_json::Value) -> ImagePrewarmSpec {
        let mut spec = json!({"images": [{"image": "i"}]});
        spec.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn a_node_is_ready_if_kubelet_says_so() {
        for (status, expected) in [("True", true), ("False", false), ("Unknown", false)] {
            assert_eq!(node(json!({}), json!([]), status).is_ready, expected);
        }
    }

    #[test]
    fn a_node_is_wanted_if_a_pod_could_be_placed_there() {
        let gpu = json!([{"key": "gpu", "value": "a100", "effect": "NoSchedule"}]);
        let plain = node(json!({"pool": "a"}), json!([]), "True");
        let tainted = node(json!({"pool": "a"}), gpu, "True");
        let soft = node(
            json!({}),
            json!([{"key": "x", "effect": "PreferNoSchedule"}]),
            "True",
        );
        let away = node(
            json!({}),
            json!([{"key": "x", "effect": "NoExecute"}]),
            "True",
        );
        for (node, fields, expected) in [
            (&plain, json!({}), true),
            (&plain, json!({"target": "Remote"}), false),
            (&plain, json!({"nodeSelector": {"pool": "a"}}), true),
            (&plain, json!({"nodeSelector": {"pool": "b"}}), false),
            (
                &plain,
                json!({"nodeSelector": {"pool": "a", "zone": "1"}}),
                false,
            ),
            (&soft, json!({}), true),
            (&away, json!({}), false),
            (
                &away,
                json!({"tolerations": [{"operator": "Exists"}]}),
                true,
            ),
            (&tainted, json!({}), false),
            (
                &tainted,
                json!({"tolerations": [{"key": "gpu", "operator": "Exists"}]}),
                true,
            ),
            (
                &tainted,
                json!({"tolerations": [{"key": "gpu", "value": "a100"}]}),
                true,
            ),
            (
                &tainted,
                json!({"tolerations": [{"key": "gpu", "value": "h100"}]}),
                false,
            ),
            (&tainted, json!({"tolerations": [{"key": "gpu"}]}), false),
            (
                &tainted,
                json!({"tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute"}]}),
                false,
            ),
        ] {
            assert_eq!(node.is_wanted(&spec(fields.clone())), expected, "{fields}");
        }
    }
}
