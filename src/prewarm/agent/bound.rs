//! Which images are filled because a pod that uses them was bound to this node. Pure: no client, no task.
//!
//! Between the moment in which a pod is bound and the one in which kubelet asks for its volumes is up to a second, more if
//! its containers' images are pulled first. What is asked for here does not wait for the node's turn, and is told of
//! nowhere: it is a part of what an ImagePrewarm is for, and what the node tells of that is about all of it.
//!
//! A pod is looked at once, when it is new here: what is seeded later comes too late for it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use super::order::Order;
use crate::{
    cluster::Seen,
    prewarm::{
        table::Table,
        workloads::{ImageUse, Object},
    },
};

/// Pods of one node that are kept in mind, at most. Kubelet runs 110 if it is not told otherwise, but anybody may bind a
/// pod by its name.
const MAX_PODS: usize = 1024;

/// Fills that wait for their turn, at most; what is beyond is left to the pod's own mount.
const MAX_WAITING: usize = 64;

/// An image that a pod wants.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Want {
    pub(super) namespace: String,
    pub(super) image: String,
    pub(super) platform: String,
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            namespace,
            image,
            platform,
        } = self;
        write!(f, "{image} ({platform}) in {namespace}")
    }
}

/// A pod that is bound to this node.
#[derive(Debug)]
pub(super) struct BoundPod {
    uid: String,
    namespace: String,
    /// Whether its containers are yet to start.
    is_starting: bool,
    uses: Vec<ImageUse>,
}

/// Takes of a pod what counts; one that has ended uses nothing.
pub(super) fn of_pod(pod: &Object, driver: &str) -> BoundPod {
    BoundPod {
        uid: pod.uid().to_owned(),
        namespace: pod.namespace().to_owned(),
        is_starting: pod.is_starting(),
        uses: match pod.has_ended() {
            true => Vec::new(),
            false => pod.uses(driver),
        },
    }
}

/// A fill that waits or is under way.
#[derive(Debug)]
struct Fill {
    /// Of the ImagePrewarm that offers the image.
    uid: String,
    generation: i64,
    /// What is to be begun; taken when it is.
    order: Option<Order>,
}

/// The pods of this node, and what is filled for them.
#[derive(Debug)]
pub(super) struct Bound {
    platform: String,
    max_running: usize,
    /// By uid.
    pods: Table<Vec<Want>>,
    /// What new pods want, for which no ImagePrewarm was looked for yet.
    asked: BTreeSet<Want>,
    fills: BTreeMap<Want, Fill>,
}

impl Bound {
    pub(super) fn new(platform: &str, max_running: usize) -> Self {
        Self {
            platform: platform.to_owned(),
            max_running: max_running.max(1),
            pods: Table::new(),
            asked: BTreeSet::new(),
            fills: BTreeMap::new(),
        }
    }

    /// Takes in what the watch has told of.
    pub(super) fn see(&mut self, seen: Seen<BoundPod>) {
        match seen {
            Seen::Listing => self.pods.begin(),
            Seen::Listed => drop(self.pods.end()),
            Seen::Gone(pod) => drop(self.pods.remove(&pod.uid)),
            Seen::Is(pod) => self.see_pod(*pod),
        }
    }

    fn see_pod(&mut self, pod: BoundPod) {
        if pod.uses.is_empty() {
            self.pods.remove(&pod.uid);
            return;
        }
        // A pod's volumes do not change.
        if self.pods.see(&pod.uid).is_some() || MAX_PODS <= self.pods.len() {
            return;
        }
        let wants = pod.uses.into_iter().map(|it| Want {
            namespace: pod.namespace.clone(),
            image: it.image,
            platform: it.platform.unwrap_or_else(|| self.platform.clone()),
        });
        let wants: Vec<_> = wants.collect();
        if pod.is_starting {
            self.asked.extend(wants.iter().cloned());
        }
        self.pods.set(pod.uid, wants);
    }

    /// Takes what new pods want, by namespace.
    pub(super) fn take_asked(&mut self) -> BTreeMap<String, Vec<Want>> {
        let mut asked: BTreeMap<String, Vec<Want>> = BTreeMap::new();
        for want in std::mem::take(&mut self.asked) {
            if !self.fills.contains_key(&want) {
                asked.entry(want.namespace.clone()).or_default().push(want);
            }
        }
        asked
    }

    /// Notes that an ImagePrewarm offers what is wanted.
    pub(super) fn offer(&mut self, want: Want, order: Order) {
        if self.fills.len() < MAX_WAITING + self.max_running {
            let fill = Fill {
                uid: order.uid.clone(),
                generation: order.generation,
                order: Some(order),
            };
            self.fills.insert(want, fill);
        }
    }

    /// The fills that are to begin now.
    pub(super) fn next(&mut self) -> Vec<(Want, Order)> {
        let running = self.fills.values().filter(|it| it.order.is_none());
        let room = self.max_running.saturating_sub(running.count());
        let waiting = self.fills.iter_mut().filter(|(_, it)| it.order.is_some());
        let begin = waiting.take(room);
        begin
            .filter_map(|(want, it)| Some((want.clone(), it.order.take()?)))
            .collect()
    }

    /// Notes that the fill for what is printed like this has ended.
    pub(super) fn ended(&mut self, want: &str) {
        self.fills.retain(|it, _| it.to_string() != want);
    }

    /// The fills that are to stop: no pod wants them any more, or `offers` does not hold for the uid and generation of
    /// the ImagePrewarm.
    pub(super) fn take_stopped(&mut self, offers: impl Fn(&str, i64) -> bool) -> Vec<Want> {
        let wanted: BTreeSet<_> = self.pods.iter().flat_map(|(_, wants)| wants).collect();
        let stopped = self.fills.extract_if(.., |want, it| {
            !wanted.contains(want) || !offers(&it.uid, it.generation)
        });
        stopped.map(|(want, _)| want).collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::Content;

    const PLATFORM: &str = "linux/amd64";

    fn pod(uid: &str, phase: &str, image: &str) -> Seen<BoundPod> {
        let pod = json!({
            "metadata": {"uid": uid, "name": uid, "namespace": "n"},
            "spec": {"volumes": [{"csi": {"driver": "d", "volumeAttributes": {"image": image}}}]},
            "status": {"phase": phase},
        });
        let pod = serde_json::from_value(pod).unwrap();
        Seen::Is(Box::new(of_pod(&pod, "d")))
    }

    fn want(image: &str) -> Want {
        Want {
            namespace: "n".to_owned(),
            image: image.to_owned(),
            platform: PLATFORM.to_owned(),
        }
    }

    fn order(uid: &str) -> Order {
        Order {
            uid: uid.to_owned(),
            generation: 1,
            revision: "r".to_owned(),
            priority: 0,
            content: Content::All,
            images: Vec::new(),
            bytes_per_second: None,
            max_bytes: None,
        }
    }

    fn asked(bound: &mut Bound) -> Vec<Want> {
        bound.take_asked().into_values().flatten().collect()
    }

    #[test]
    fn a_pod_asks_once_when_it_is_new_and_its_containers_are_yet_to_start() {
        let mut bound = Bound::new(PLATFORM, 2);
        bound.see(Seen::Listing);
        bound.see(pod("a", "Pending", "r/1"));
        bound.see(pod("b", "Running", "r/2"));
        bound.see(Seen::Listed);
        assert_eq!(asked(&mut bound), [want("r/1")]);
        bound.see(pod("a", "Pending", "r/1"));
        bound.see(pod("b", "Pending", "r/2"));
        assert_eq!(asked(&mut bound), []);
        // Another pod of the same name is another one.
        bound.see(pod("a2", "Pending", "r/1"));
        assert_eq!(asked(&mut bound), [want("r/1")]);
        // What is under way already is not asked for.
        bound.offer(want("r/1"), order("p"));
        bound.see(pod("c", "Pending", "r/1"));
        assert_eq!(asked(&mut bound), []);
    }

    #[test]
    fn so_many_run_at_once_and_the_others_wait() {
        let mut bound = Bound::new(PLATFORM, 2);
        for image in ["r/1", "r/2", "r/3"] {
            bound.see(pod(image, "Pending", image));
            bound.offer(want(image), order("p"));
        }
        let begun = |bound: &mut Bound| bound.next().into_iter().map(|it| it.0).collect::<Vec<_>>();
        assert_eq!(begun(&mut bound), [want("r/1"), want("r/2")]);
        assert_eq!(begun(&mut bound), []);
        bound.ended(&want("r/2").to_string());
        assert_eq!(begun(&mut bound), [want("r/3")]);
    }

    #[test]
    fn a_fill_stops_when_no_pod_wants_it_or_its_object_is_another_one() {
        let mut bound = Bound::new(PLATFORM, 2);
        for (uid, image) in [("a", "r/1"), ("b", "r/1"), ("c", "r/2")] {
            bound.see(pod(uid, "Pending", image));
        }
        for (image, uid) in [("r/1", "p"), ("r/2", "q")] {
            bound.offer(want(image), order(uid));
        }
        bound.next();
        let stopped =
            |bound: &mut Bound| bound.take_stopped(|uid, generation| (uid, generation) != ("q", 2));
        bound.see(pod("a", "Succeeded", "r/1"));
        bound.see(pod("b", "Running", "r/1"));
        assert_eq!(stopped(&mut bound), []);
        let Seen::Is(b) = pod("b", "Running", "r/1") else {
            panic!("it is there")
        };
        bound.see(Seen::Gone(b));
        assert_eq!(stopped(&mut bound), [want("r/1")]);
        assert_eq!(stopped(&mut bound), []);
        assert_eq!(bound.take_stopped(|uid, _| uid != "q"), [want("r/2")]);
    }

    #[test]
    fn no_number_of_pods_takes_more_than_so_much() {
        let mut bound = Bound::new(PLATFORM, 2);
        for at in 0..2000 {
            let image = format!("r/{at}");
            bound.see(pod(&image, "Pending", &image));
        }
        let asked = asked(&mut bound);
        assert_eq!((bound.pods.len(), asked.len()), (MAX_PODS, MAX_PODS));
        for want in asked {
            bound.offer(want, order("p"));
        }
        assert_eq!(bound.fills.len(), MAX_WAITING + 2);
    }
}
