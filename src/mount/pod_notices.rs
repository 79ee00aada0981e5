//! What pods should be told about their volumes, kept until somebody passes it on.
//!
//! Kubelet makes an event of each error of a call. What it does not tell is that a call takes long, or
//! that a volume dies later. Nothing waits for a notice to be passed on, and few are kept: what is
//! repeated is told once in a while.

use std::{
    collections::HashMap,
    path::Path,
    sync::Mutex,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{PodInfo, lock};
use crate::digest::ManifestDigest;

/// Notices that wait, at most; of more, the latest are of no use. A node holds 110 pods by default.
const MAX_WAITING: usize = 128;

/// How long the same is not told to a pod again.
const TOLD: Duration = Duration::from_secs(600);

/// What is remembered of it, at most: then it may be told again.
const MAX_TOLD: usize = 1024;

/// Names a pod, for an event about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name in there.
    pub name: String,
    /// What no other pod has.
    pub uid: String,
}

/// Something that whoever looks at a pod should see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNotice {
    /// The pod.
    pub pod: PodRef,
    /// What kind of thing it is, in CamelCase, as Kubernetes' events have it.
    pub reason: &'static str,
    /// What happened, and what to do.
    pub message: String,
}

/// The notices that nobody has taken yet.
#[derive(Debug, Default)]
pub(super) struct PodNotices(Mutex<State>);

/// std Mutex around it: held to look and push.
#[derive(Debug, Default)]
struct State {
    waiting: Vec<PodNotice>,
    told: HashMap<(String, &'static str), Instant>,
}

impl PodNotices {
    /// Adds one, unless the pod was told the like a short while ago.
    pub(super) fn add(&self, pod: &PodRef, reason: &'static str, message: String) {
        let mut state = lock(&self.0);
        let now = Instant::now();
        state
            .told
            .retain(|_, at| now.saturating_duration_since(*at) < TOLD);
        if MAX_TOLD <= state.told.len() {
            state.told.clear();
        }
        let key = (pod.uid.clone(), reason);
        if MAX_WAITING <= state.waiting.len() || state.told.contains_key(&key) {
            return;
        }
        state.told.insert(key, now);
        state.waiting.push(PodNotice {
            pod: pod.clone(),
            reason,
            message,
        });
    }

    /// Adds that the mount of an image is dead.
    pub(super) fn add_dead(&self, pod: &PodRef, manifest: ManifestDigest, target: &Path) {
        let message = format!(
            "the mount of image {manifest} at {} is dead, and every access to it fails: delete the pod, so that it is made anew",
            target.display()
        );
        self.add(pod, "VolumeDead", message);
    }

    /// Takes all.
    pub(super) fn take(&self) -> Vec<PodNotice> {
        std::mem::take(&mut lock(&self.0).waiting)
    }
}

impl From<&PodInfo> for PodRef {
    fn from(pod: &PodInfo) -> Self {
        Self {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str) -> PodRef {
        PodRef {
            namespace: "n".to_owned(),
            name: "p".to_owned(),
            uid: uid.to_owned(),
        }
    }

    #[test]
    fn a_pod_is_told_the_same_once_in_a_while_and_few_wait() {
        let notices = PodNotices::default();
        for (uid, reason) in [("1", "A"), ("1", "A"), ("1", "B"), ("2", "A")] {
            notices.add(&pod(uid), reason, "m".to_owned());
        }
        let told: Vec<_> = notices
            .take()
            .into_iter()
            .map(|it| (it.pod.uid, it.reason))
            .collect();
        let expected = [("1", "A"), ("1", "B"), ("2", "A")];
        assert_eq!(told, expected.map(|(uid, it)| (uid.to_owned(), it)));
        notices.add(&pod("1"), "A", "m".to_owned());
        assert!(notices.take().is_empty());
        for uid in 0..2000 {
            notices.add(&pod(&uid.to_string()), "C", "m".to_owned());
        }
        assert_eq!(notices.take().len(), MAX_WAITING);
    }
}
