//! Knows which images the workloads of each namespace name, and picks those that an ImagePrewarm means. Pure.

use std::collections::{BTreeMap, BTreeSet};

use kube::core::{Selector, SelectorExt};

use crate::{
    api::{ImagePrewarmSpec, Workloads},
    cluster::Seen,
    prewarm::{
        table::Table,
        workloads::{Kind, Object, Workload},
    },
};

/// Images that one ImagePrewarm has at most, those of its spec included.
pub(super) const MAX_IMAGES: usize = 32;

/// Platforms of one image that workloads name, at most; as many as a spec may have.
const MAX_PLATFORMS: usize = 4;

/// Secrets that are tried for one image, at most; as many as a spec may have.
const MAX_SECRETS: usize = 8;

/// An image that workloads name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FoundImage {
    /// Whether a volume names no platform: then those of the spec are meant.
    pub is_for_default: bool,
    /// Platforms that volumes name.
    pub platforms: BTreeSet<String>,
    /// Secrets of the namespace with which volumes pull it.
    pub secrets: BTreeSet<String>,
}

/// What workloads name for one ImagePrewarm.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// By the image's name.
    pub images: BTreeMap<String, FoundImage>,
    /// Images for which there was no room.
    pub n_left_out: usize,
}

impl Found {
    /// Whether nothing that is known of `image` has changed since `before`.
    pub(super) fn is_as_in(&self, before: &Self, image: &str) -> bool {
        self.images.get(image) == before.images.get(image)
    }
}

/// What is known of a workload of one kind; `None`: that it names no image of the driver.
#[derive(Debug)]
pub(super) struct Sighting {
    /// `namespace/name`.
    key: String,
    facts: Option<Workload>,
}

/// Takes of a workload what counts.
pub(super) fn of_object(object: &Object, driver: &str) -> Sighting {
    Sighting {
        key: format!("{}/{}", object.namespace(), object.name()),
        facts: object.workload(driver),
    }
}

/// The workloads of all namespaces that use the driver.
#[derive(Debug)]
pub(super) struct Discovery {
    /// One for each kind, by `namespace/name`.
    kinds: [Table<Workload>; Kind::ALL.len()],
}

impl Discovery {
    pub(super) fn new() -> Self {
        Self {
            kinds: Kind::ALL.map(|_| Table::new()),
        }
    }

    /// Whether all kinds were listed: before, what is not found may be there.
    pub(super) fn is_complete(&self) -> bool {
        self.kinds.iter().all(Table::is_complete)
    }

    /// Takes in what a watch has told of; returns the namespaces in which something is different.
    pub(super) fn apply(&mut self, kind: Kind, seen: Seen<Sighting>) -> Vec<String> {
        let Some(table) = Kind::ALL
            .iter()
            .position(|it| *it == kind)
            .and_then(|at| self.kinds.get_mut(at))
        else {
            return Vec::new();
        };
        let changed = match seen {
            Seen::Listing => {
                table.begin();
                return Vec::new();
            }
            Seen::Listed => table.end(),
            Seen::Gone(it) => table.remove(&it.key).map(|_| it.key).into_iter().collect(),
            Seen::Is(it) => {
                let Sighting { key, facts } = *it;
                let is_same = match facts {
                    None => table.remove(&key).is_none(),
                    Some(facts) => {
                        let before = table.set(key.clone(), facts);
                        before.as_ref() == table.get(&key)
                    }
                };
                (!is_same).then_some(key).into_iter().collect()
            }
        };
        let mut namespaces: Vec<_> = changed
            .iter()
            .map(|key| namespace(key).to_owned())
            .collect();
        namespaces.dedup();
        namespaces
    }

    /// Returns the images that the workloads of `namespace` name which `spec` means.
    pub(super) fn find(&self, namespace: &str, spec: &ImagePrewarmSpec) -> Found {
        let mut images: BTreeMap<String, FoundImage> = BTreeMap::new();
        let selector = spec.workloads.as_ref().and_then(selector);
        let prefix = format!("{namespace}/");
        let workloads = self.kinds.iter().flat_map(|it| it.of_prefix(&prefix));
        let is_meant = |it: &&Workload| selector.as_ref().is_some_and(|of| of.matches(&it.labels));
        for used in workloads.filter(is_meant).flat_map(|it| &it.uses) {
            let image = images.entry(used.image.clone()).or_default();
            match &used.platform {
                Some(platform) => insert(&mut image.platforms, platform, MAX_PLATFORMS),
                None => image.is_for_default = true,
            }
            if let Some(secret) = &used.secret {
                insert(&mut image.secrets, secret, MAX_SECRETS);
            }
        }
        let own: BTreeSet<_> = spec.images.iter().map(|it| &it.image).collect();
        let room = MAX_IMAGES.saturating_sub(own.len());
        // In the order of their names: the same ones each time.
        let others = images.keys().filter(|it| !own.contains(it));
        let left_out: Vec<_> = others.skip(room).cloned().collect();
        for image in &left_out {
            images.remove(image);
        }
        Found {
            images,
            n_left_out: left_out.len(),
        }
    }
}

/// The first ones by name stay, whatever the order in which they come.
fn insert(set: &mut BTreeSet<String>, name: &str, max: usize) {
    set.insert(name.to_owned());
    if max < set.len() {
        set.pop_last();
    }
}

/// `None` if it cannot be understood, which the definition does not let through.
fn selector(workloads: &Workloads) -> Option<Selector> {
    let selector = workloads.selector.clone().unwrap_or_default();
    Selector::try_from(selector).ok()
}

fn namespace(key: &str) -> &str {
    key.split_once('/').map_or(key, |(namespace, _)| namespace)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const DRIVER: &str = "d";

    fn sighting(namespace: &str, name: &str, labels: Value, images: &[Value]) -> Sighting {
        let volumes: Vec<_> = images
            .iter()
            .map(|it| {
                let mut csi = json!({"driver": DRIVER, "volumeAttributes": it});
                if let Some(secret) = it.get("secret") {
                    csi["nodePublishSecretRef"] = json!({"name": secret});
                }
                json!({"csi": csi})
            })
            .collect();
        let object = json!({
            "metadata": {"namespace": namespace, "name": name, "labels": labels},
            "spec": {"template": {"spec": {"volumes": volumes}}},
        });
        of_object(&serde_json::from_value(object).unwrap(), DRIVER)
    }

    fn is(it: Sighting) -> Seen<Sighting> {
        Seen::Is(Box::new(it))
    }

    fn of(images: &[&str]) -> Vec<Value> {
        images.iter().map(|it| json!({"image": it})).collect()
    }

    fn spec(fields: Value) -> ImagePrewarmSpec {
        serde_json::from_value(fields).unwrap()
    }

    fn names(found: &Found) -> Vec<&str> {
        found.images.keys().map(String::as_str).collect()
    }

    #[test]
    fn only_what_the_driver_is_used_by_is_kept_and_only_changes_are_told_of() {
        let mut discovery = Discovery::new();
        let mut apply = |kind, seen| discovery.apply(kind, seen);
        let web = |images: &[&str]| is(sighting("a", "web", json!({}), &of(images)));
        assert_eq!(apply(Kind::Deployment, Seen::Listing), [""; 0]);
        assert_eq!(apply(Kind::Deployment, web(&["r/1"])), ["a"]);
        assert_eq!(apply(Kind::Deployment, web(&["r/1"])), [""; 0]);
        // Of another kind, the same name is another workload.
        assert_eq!(apply(Kind::StatefulSet, web(&["r/2"])), ["a"]);
        assert_eq!(
            apply(Kind::Deployment, is(sighting("b", "none", json!({}), &[]))),
            [""; 0]
        );
        assert_eq!(apply(Kind::Deployment, Seen::Listed), [""; 0]);
        assert_eq!(apply(Kind::Deployment, web(&["r/3"])), ["a"]);
        assert_eq!(apply(Kind::Deployment, web(&[])), ["a"]);
        assert_eq!(apply(Kind::Deployment, web(&[])), [""; 0]);
        let gone = Seen::Gone(Box::new(sighting("a", "web", json!({}), &of(&["r/2"]))));
        assert_eq!(apply(Kind::StatefulSet, gone), ["a"]);
        // What a new listing does not name has gone.
        assert_eq!(apply(Kind::Deployment, web(&["r/1"])), ["a"]);
        assert_eq!(apply(Kind::Deployment, Seen::Listing), [""; 0]);
        assert_eq!(apply(Kind::Deployment, Seen::Listed), ["a"]);
        assert!(discovery.kinds.iter().all(|it| it.len() == 0));
        assert!(!discovery.is_complete());
        for kind in Kind::ALL {
            discovery.apply(kind, Seen::Listed);
        }
        assert!(discovery.is_complete());
    }

    #[test]
    fn a_selector_picks_workloads_of_the_own_namespace_by_their_labels() {
        let mut discovery = Discovery::new();
        for (namespace, name, labels, image) in [
            ("a", "web", json!({"app": "web", "tier": "x"}), "r/web"),
            ("a", "db", json!({"app": "db"}), "r/db"),
            ("a", "bare", json!({}), "r/bare"),
            ("a-b", "web", json!({"app": "web"}), "r/other"),
        ] {
            let seen = is(sighting(namespace, name, labels, &of(&[image])));
            discovery.apply(Kind::Deployment, seen);
        }
        let expression = |operator: &str, values: Value| json!({"selector": {"matchExpressions": [{"key": "app", "operator": operator, "values": values}]}});
        for (workloads, expected) in [
            (json!({}), &["r/bare", "r/db", "r/web"][..]),
            (json!({"selector": {}}), &["r/bare", "r/db", "r/web"]),
            (
                json!({"selector": {"matchLabels": {"app": "web"}}}),
                &["r/web"],
            ),
            (
                json!({"selector": {"matchLabels": {"app": "web", "tier": "y"}}}),
                &[],
            ),
            (expression("In", json!(["db", "x"])), &["r/db"]),
            (expression("NotIn", json!(["db"])), &["r/bare", "r/web"]),
            (expression("Exists", json!(null)), &["r/db", "r/web"]),
            (expression("DoesNotExist", json!(null)), &["r/bare"]),
            (expression("Like", json!(["w"])), &[]),
        ] {
            let found = discovery.find("a", &spec(json!({"workloads": workloads})));
            assert_eq!(names(&found), expected, "{workloads}");
        }
        assert_eq!(
            discovery.find("c", &spec(json!({"workloads": {}}))),
            Found::default()
        );
        assert_eq!(
            discovery.find("a", &spec(json!({"images": [{"image": "r/web"}]}))),
            Found::default()
        );
    }

    #[test]
    fn an_image_is_found_once_with_all_platforms_and_secrets_of_its_volumes() {
        let mut discovery = Discovery::new();
        let uses = [
            json!({"image": "r/a", "secret": "s2"}),
            json!({"image": "r/a", "platform": "linux/arm64", "secret": "s1"}),
            json!({"image": "r/b", "platform": "linux/arm64"}),
        ];
        discovery.apply(Kind::Job, is(sighting("n", "one", json!({}), &uses)));
        discovery.apply(
            Kind::CronJob,
            is(sighting("n", "two", json!({}), &uses[..1])),
        );
        let found = discovery.find("n", &spec(json!({"workloads": {}})));
        let set = |names: &[&str]| names.iter().map(|it| (*it).to_owned()).collect();
        let expected = [
            (
                "r/a".to_owned(),
                FoundImage {
                    is_for_default: true,
                    platforms: set(&["linux/arm64"]),
                    secrets: set(&["s1", "s2"]),
                },
            ),
            (
                "r/b".to_owned(),
                FoundImage {
                    is_for_default: false,
                    platforms: set(&["linux/arm64"]),
                    secrets: set(&[]),
                },
            ),
        ];
        assert_eq!(found.images, expected.into());
    }

    #[test]
    fn the_first_by_name_have_room_and_the_others_are_counted() {
        let mut discovery = Discovery::new();
        for at in (0..40).rev() {
            let image = format!("r/{at:02}");
            let seen = is(sighting("n", &image, json!({}), &of(&[&image])));
            discovery.apply(Kind::Pod, seen);
        }
        let found = discovery.find("n", &spec(json!({"workloads": {}})));
        let expected: Vec<_> = (0..32).map(|at| format!("r/{at:02}")).collect();
        assert_eq!(
            (names(&found), found.n_left_out),
            (expected.iter().map(String::as_str).collect(), 8)
        );
        // What the spec names has its place, and is no other one if a workload names it as well.
        let own = json!([{"image": "r/39"}, {"image": "r/x"}]);
        let found = discovery.find("n", &spec(json!({"workloads": {}, "images": own})));
        assert_eq!((found.images.len(), found.n_left_out), (31, 9));
        assert!(found.images.contains_key("r/39") && found.images.contains_key("r/29"));
    }
}
