//! What controller and agents must agree about: who is admitted, and what there is to have.

use std::collections::BTreeMap;

use kube::Resource;

use crate::api::{Content, ImageRolloutSpec, ImageStatus};

/// All nodes are admitted.
pub const ALL: i32 = 1000;

/// Hexadecimal digits of a revision: objects have few, and a mistake costs a look at what is there.
const REVISION_DIGITS: usize = 12;

/// Returns the place of a node in the order in which it is admitted for an object, from 0 to 999.
///
/// Another one for each object, so that it is not always the same nodes that begin.
pub fn slot(node: &str, uid: &str) -> i32 {
    let mut hash = blake3::Hasher::new();
    hash.update(node.as_bytes())
        .update(b"\0")
        .update(uid.as_bytes());
    let bytes = hash.finalize();
    let [a, b, c, d, ..] = *bytes.as_bytes();
    let place = u32::from_le_bytes([a, b, c, d]) % ALL.unsigned_abs();
    i32::try_from(place).unwrap_or(0)
}

/// Names what nodes are to have of `images`, which is those with a digest: another name if it is something else.
///
/// `after` is the name of what was wanted before, where that counts as well: else it is empty.
pub fn revision(content: Content, images: &[ImageStatus], after: &str) -> String {
    let there: BTreeMap<_, _> = images
        .iter()
        .filter_map(|it| Some(((&it.image, &it.platform), it.manifest_digest.as_ref()?)))
        .collect();
    if there.is_empty() {
        return String::new();
    }
    let mut hash = blake3::Hasher::new();
    hash.update(&[content as u8]);
    for ((image, platform), digest) in there {
        for part in [image, platform, digest] {
            hash.update(part.as_bytes()).update(b"\0");
        }
    }
    hash.update(after.as_bytes());
    hash.finalize().to_hex()[..REVISION_DIGITS].to_owned()
}

/// Whether it is the turn of a node to have what the ImagePrewarm `uid` offers.
pub fn admits(rollout: &ImageRolloutSpec, node: &str, uid: &str) -> bool {
    slot(node, uid) < rollout.admitted_permille
}

/// Uid of an object; empty for one that was never in a cluster.
pub fn uid(object: &impl Resource) -> &str {
    object.meta().uid.as_deref().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::ImageState;

    #[test]
    fn slots_are_spread_evenly_and_differ_by_object() {
        let mut tens = [0; 10];
        let mut same = 0;
        for node in 0..1000 {
            let node = format!("node-{node}");
            let at = slot(&node, "uid-1");
            assert!((0..ALL).contains(&at));
            tens[usize::try_from(at / 100).unwrap()] += 1;
            same += usize::from(at == slot(&node, "uid-2"));
        }
        // Binomial: 100 ± 28 is three standard deviations.
        assert!(tens.iter().all(|it| (70..=130).contains(it)), "{tens:?}");
        assert!(same < 10, "{same} of 1000 are the same");
        // What agents of one version and a controller of another must agree about.
        assert_eq!(slot("n1", "7e1c"), 917);
    }

    #[test]
    fn a_revision_changes_with_a_digest_and_with_nothing_that_nodes_do_not_see() {
        let image = |name: &str, digest: &str| ImageStatus {
            image: name.to_owned(),
            manifest_digest: Some(digest.to_owned()),
            ..ImageStatus::default()
        };
        let (a, b) = (image("a", "1"), image("b", "2"));
        let all = revision(Content::All, &[a.clone(), b.clone()], "");
        assert_eq!(all.len(), REVISION_DIGITS);
        let other_state = ImageStatus {
            state: ImageState::Seeded,
            attempts: 3,
            ..a.clone()
        };
        assert_eq!(revision(Content::All, &[b.clone(), other_state], ""), all);
        for other in [
            revision(Content::Index, &[a.clone(), b.clone()], ""),
            revision(Content::All, &[a.clone(), b.clone()], "x"),
            revision(Content::All, &[a.clone(), image("b", "3")], ""),
            revision(Content::All, std::slice::from_ref(&a), ""),
            revision(Content::All, &[image("a", "2"), image("b", "1")], ""),
        ] {
            assert_ne!(other, all);
        }
        assert_eq!(revision(Content::All, &[ImageStatus::default()], ""), "");
    }
}
