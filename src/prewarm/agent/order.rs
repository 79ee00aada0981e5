//! Reads out of an ImagePrewarm what is to be done for it on one node. Pure.

use crate::{
    api::{Content, ImagePrewarm, ImagePrewarmSpec, ImagePrewarmStatus},
    prewarm::{nodes::NodeFacts, rollout::uid as uid_of},
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
    let images = status.images.iter().filter(|it| it.platform == platform);
    let images = images.filter_map(|it| {
        Some(ImageToFill {
            image: it.image.clone(),
            platform: it.platform.clone(),
            digest: it.manifest_digest.clone()?,
        })
    });
    Some(order(spec, status, uid, generation, images.collect()))
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
    let mut images = status.images.iter();
    let found = images.find(|it| it.image == image && it.platform == platform)?;
    let filled = ImageToFill {
        image: found.image.clone(),
        platform: found.platform.clone(),
        digest: found.manifest_digest.clone()?,
    };
    Some(order(spec, status, uid, generation, vec![filled]))
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
