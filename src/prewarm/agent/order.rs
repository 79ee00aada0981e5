//! Reads out of an ImagePrewarm what is to be done for it on one node. Pure.

use std::collections::HashSet;

use crate::{
    api::{Content, ImagePrewarm, ImagePrewarmSpec, ImagePrewarmStatus, ImageStatus},
    prewarm::{nodes::NodeFacts, rollout::uid as uid_of},
    registry::Platform,
};

/// What is to be done for an ImagePrewarm on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) uid: String,
    pub(super) generation: i64,
    /// What there is to have (`status.revision`).
    pub(super) revision: String,
    pub(super) priority: i32,
    pub(super) content: Content,
    pub(super) images: Vec<ImageToFill>,
    /// Bytes a second for it.
    pub(super) bytes_per_second: Option<u64>,
    /// Bytes that it may add to the disk.
    pub(super) max_bytes: Option<u64>,
}

/// An image of the node's platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImageToFill {
    /// As the spec has it.
    pub(super) image: String,
    pub(super) platform: String,
    /// Of the manifest.
    pub(super) digest: String,
}

/// What is to be done for `object` on a node of these `facts`, whose turn it is; `None` if nothing is.
pub(super) fn of(
    object: &ImagePrewarm,
    uid: &str,
    platform: &str,
    facts: &NodeFacts,
) -> Option<Order> {
    let (spec, status) = (&object.spec, object.status.as_ref()?);
    let generation = object.metadata.generation?;
    // The same name may be another object by now.
    if uid_of(object) != uid || object.metadata.deletion_timestamp.is_some() {
        return None;
    }
    if spec.suspend || status.revision.is_empty() || !facts.is_wanted(spec) {
        return None;
    }
    let platform: Platform = platform.parse().ok()?;
    let mut seen = HashSet::new();
    let images = status.images.iter().filter(|it| {
        let fits = platform_of(it).is_some_and(|it| platform.fit(&it).is_some());
        // A platform may be written in several ways.
        fits && seen.insert((&it.image, &it.manifest_digest))
    });
    let images = images.filter_map(to_fill).collect();
    Some(order(spec, status, uid, generation, images))
}

/// What is to be done for a pod that wants `image` for `platform` here; `None` if `object` does not offer that.
///
/// Whether it is the node's turn, and whether the object means nodes at all, does not count: a pod will read it here.
pub(super) fn for_pod(
    object: &ImagePrewarm,
    uid: &str,
    image: &str,
    platform: &str,
) -> Option<Order> {
    let (spec, status) = (&object.spec, object.status.as_ref()?);
    let generation = object.metadata.generation?;
    if uid_of(object) != uid || object.metadata.deletion_timestamp.is_some() || spec.suspend {
        return None;
    }
    let platform: Platform = platform.parse().ok()?;
    let images = status.images.iter().filter(|it| it.image == image);
    let images = images.filter_map(|it| Some((platform.fit(&platform_of(it)?)?, it)));
    let (_, best) = images.min_by_key(|(fit, _)| *fit)?;
    Some(order(spec, status, uid, generation, vec![to_fill(best)?]))
}

/// What it is for; `None` where the text is no platform, which its condition says.
fn platform_of(image: &ImageStatus) -> Option<Platform> {
    image.platform.parse().ok()
}

fn to_fill(image: &ImageStatus) -> Option<ImageToFill> {
    Some(ImageToFill {
        image: image.image.clone(),
        platform: image.platform.clone(),
        digest: image.manifest_digest.clone()?,
    })
}

fn order(
    spec: &ImagePrewarmSpec,
    status: &ImagePrewarmStatus,
    uid: &str,
    generation: i64,
    images: Vec<ImageToFill>,
) -> Order {
    let positive = |bytes: Option<i64>| bytes.and_then(|it| u64::try_from(it).ok());
    Order {
        uid: uid.to_owned(),
        generation,
        revision: status.revision.clone(),
        priority: spec.priority,
        content: spec.content,
        images,
        bytes_per_second: positive(status.node_bytes_per_second),
        max_bytes: positive(spec.max_bytes_per_node),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const PLATFORM: &str = "linux/amd64";

    fn object(change: impl FnOnce(&mut Value)) -> ImagePrewarm {
        let mut object = json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u", "generation": 3},
            "spec": {"images": [{"image": "r/a:1"}], "priority": 7, "maxBytesPerNode": 100},
            "status": {
                "revision": "ab", "admittedPermille": 1000, "nodeBytesPerSecond": 10,
                "images": [
                    {"image": "r/a:1", "platform": PLATFORM, "manifestDigest": "sha256:1"},
                    {"image": "r/a:1", "platform": "linux/arm64", "manifestDigest": "sha256:2"},
                    {"image": "r/b:1", "platform": PLATFORM},
                ],
            },
        });
        change(&mut object);
        serde_json::from_value(object).unwrap()
    }

    fn of_object(change: impl FnOnce(&mut Value)) -> Option<Order> {
        of(&object(change), "u", PLATFORM, &NodeFacts::default())
    }

    #[test]
    fn images_of_the_nodes_platform_are_filled_as_soon_as_they_have_a_digest() {
        let expected = Order {
            uid: "u".to_owned(),
            generation: 3,
            revision: "ab".to_owned(),
            priority: 7,
            content: Content::All,
            images: vec![ImageToFill {
                image: "r/a:1".to_owned(),
                platform: PLATFORM.to_owned(),
                digest: "sha256:1".to_owned(),
            }],
            bytes_per_second: Some(10),
            max_bytes: Some(100),
        };
        assert_eq!(of_object(|_| {}), Some(expected));
    }

    #[test]
    fn a_platform_may_be_written_in_any_way_that_names_the_nodes() {
        let entry = |platform: &str, digest: &str| json!({"image": "r/a:1", "platform": platform, "manifestDigest": digest});
        for (node, offered, filled) in [
            ("linux/arm64", vec!["linux/arm64/v8"], vec!["0"]),
            (
                "linux/arm64",
                vec!["linux/amd64", "linux/aarch64"],
                vec!["1"],
            ),
            ("linux/amd64", vec!["linux/x86_64"], vec!["0"]),
            ("linux/arm", vec!["linux/arm/v7"], vec!["0"]),
            ("linux/arm64", vec!["linux/arm/v7", "none"], vec![]),
            (
                "linux/amd64",
                vec!["linux/amd64", "linux/amd64/v3"],
                vec!["0", "1"],
            ),
        ] {
            let entries = offered.iter().enumerate();
            let entries: Vec<_> = entries.map(|(at, it)| entry(it, &at.to_string())).collect();
            let object = object(|it| it["status"]["images"] = json!(entries));
            let order = of(&object, "u", node, &NodeFacts::default()).unwrap();
            let digests: Vec<_> = order.images.iter().map(|it| &it.digest).collect();
            assert_eq!(digests, filled, "{node} {offered:?}");
            // A pod's own is the best of them.
            let of_pod = for_pod(&object, "u", "r/a:1", node).map(|it| it.images[0].digest.clone());
            assert_eq!(
                of_pod.as_deref(),
                filled.first().copied(),
                "{node} {offered:?}"
            );
        }
        // The same under two names is filled once.
        let twice = [entry("linux/amd64", "0"), entry("linux/x86_64", "0")];
        let order = of_object(|it| it["status"]["images"] = json!(twice)).unwrap();
        assert_eq!(order.images.len(), 1);
    }

    #[test]
    fn a_pod_gets_the_image_that_it_names_whoever_s_turn_it_is() {
        let order_of = |image: &str, platform: &str, pointer: &str, value: Value| {
            let object = object(|it| {
                it["spec"]["target"] = json!("Remote");
                it["status"]["admittedPermille"] = json!(0);
                if let Some((parent, field)) = pointer.rsplit_once('/') {
                    it.pointer_mut(parent).unwrap()[field] = value;
                }
            });
            for_pod(&object, "u", image, platform)
        };
        let order = order_of("r/a:1", "linux/arm64", "", json!(null)).unwrap();
        assert_eq!(order.images.len(), 1);
        assert_eq!(order.images[0].digest, "sha256:2");
        assert_eq!((order.generation, order.max_bytes), (3, Some(100)));
        for (image, platform, pointer, value) in [
            // It has no digest yet, or is not named.
            ("r/b:1", PLATFORM, "", json!(null)),
            ("r/c:1", PLATFORM, "", json!(null)),
            ("r/a:1", "linux/s390x", "", json!(null)),
            ("r/a:1", PLATFORM, "/spec/suspend", json!(true)),
            ("r/a:1", PLATFORM, "/metadata/uid", json!("another")),
            (
                "r/a:1",
                PLATFORM,
                "/metadata/deletionTimestamp",
                json!("2026-01-01T00:00:00Z"),
            ),
            ("r/a:1", PLATFORM, "/status", json!(null)),
        ] {
            assert_eq!(
                order_of(image, platform, pointer, value),
                None,
                "{image} {platform} {pointer}"
            );
        }
    }

    #[test]
    fn nothing_is_done_for_other_nodes_or_for_what_is_suspended_or_another_object() {
        for (pointer, value) in [
            ("/spec/suspend", json!(true)),
            ("/spec/target", json!("Remote")),
            ("/spec/nodeSelector", json!({"gpu": "yes"})),
            ("/status/revision", json!("")),
            ("/status", json!(null)),
            ("/metadata/uid", json!("another")),
            ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z")),
        ] {
            let order = of_object(|object| {
                let (parent, field) = pointer.rsplit_once('/').unwrap();
                let parent = object.pointer_mut(parent).unwrap().as_object_mut().unwrap();
                parent.insert(field.to_owned(), value);
            });
            assert_eq!(order, None, "{pointer}");
        }
    }
}
