//! What the controller knows of the cluster: of each object what counts, and no object whole.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::core::v1::Node,
    jiff::{SignedDuration, Timestamp},
};

use super::{
    discovery::{Discovery, Found, Sighting},
    images,
    plan::{Facts, ImageKey, NodeView, Plan, Task, plan},
    writer::digest,
};
use crate::{
    api::{
        ImagePrewarm, ImagePrewarmSpec, ImagePrewarmStatus, ImageRollout, ImageRolloutSpec,
        NodeImageCache, WarmupPhase,
    },
    cluster::Seen,
    prewarm::{
        nodes::NodeFacts,
        rollout::{slot, uid},
        table::Table,
        workloads::Kind,
    },
};

/// Something that a watch has told of.
#[derive(Debug)]
pub(super) enum Change {
    Prewarm(Seen<ImagePrewarm>),
    Rollout(Seen<Named<ImageRolloutSpec>>),
    Node(Seen<Named<NodeFacts>>),
    Cache(Seen<Named<Vec<Told>>>),
    Workload(Kind, Seen<Sighting>),
}

/// Facts of an object that is known by its name.
#[derive(Debug)]
pub(super) struct Named<T> {
    pub(super) name: String,
    pub(super) facts: T,
}

/// What a node has told of one ImagePrewarm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    uid: String,
    revision: String,
    phase: WarmupPhase,
    bytes_done: i64,
    /// Reason and message.
    failure: Option<Box<(String, String)>>,
}

/// What is known of an ImagePrewarm.
#[derive(Debug)]
pub(super) struct Known {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) generation: i64,
    pub(super) created: Timestamp,
    pub(super) spec: Arc<ImagePrewarmSpec>,
    /// What the workloads that it means named when it was decided last.
    pub(super) found: Option<Found>,
    /// As it was decided last, written or not.
    pub(super) status: ImagePrewarmStatus,
    /// The status that was there when the object was seen first.
    pub(super) read: Option<blake3::Hash>,
    /// Tasks of this generation.
    pub(super) tasks: BTreeMap<ImageKey, Task>,
    /// What is to be seeded, as it was decided last.
    pub(super) seed: Vec<ImageKey>,
    pub(super) wake_at: Option<Timestamp>,
    /// What nodes had told of when something was new last, and when that was.
    heard: (Vec<(WarmupPhase, i64)>, Instant),
}

/// All of it.
#[derive(Debug)]
pub(super) struct World {
    /// By uid.
    pub(super) prewarms: Table<Known>,
    /// What nodes are told, by the uid of what it is about.
    pub(super) rollouts: Table<ImageRolloutSpec>,
    /// By name.
    nodes: Table<NodeFacts>,
    /// By the node's name; what a node has told, by uid.
    caches: Table<Vec<Told>>,
    /// `None` if nobody looks at workloads.
    discovery: Option<Discovery>,
    /// Those about which something is new.
    pub(super) dirty: BTreeSet<String>,
}

/// What is the same for all decisions.
#[derive(Debug, Clone)]
pub(super) struct Premises {
    pub(super) platform: String,
    pub(super) has_remote: bool,
}

/// Takes of an ImageRollout what counts.
pub(super) fn of_rollout(rollout: ImageRollout) -> Named<ImageRolloutSpec> {
    Named {
        name: rollout.metadata.name.unwrap_or_default(),
        facts: rollout.spec,
    }
}

/// Takes of a Node what counts.
pub(super) fn of_node(node: &Node) -> Named<NodeFacts> {
    Named {
        name: node.metadata.name.clone().unwrap_or_default(),
        facts: NodeFacts::of(node),
    }
}

/// Takes of a NodeImageCache what counts.
pub(super) fn of_cache(cache: NodeImageCache) -> Named<Vec<Told>> {
    let warmups = cache.status.unwrap_or_default().warmups;
    let mut facts: Vec<_> = warmups
        .into_iter()
        .map(|it| Told {
            failure: (it.phase == WarmupPhase::Failed).then(|| {
                let (reason, message) = (it.reason, it.message);
                Box::new((reason.unwrap_or_default(), message.unwrap_or_default()))
            }),
            uid: it.uid,
            revision: it.revision,
            phase: it.phase,
            bytes_done: it.bytes_done,
        })
        .collect();
    facts.sort_by(|a, b| a.uid.cmp(&b.uid));
    Named {
        name: cache.metadata.name.unwrap_or_default(),
        facts,
    }
}

impl World {
    /// Makes one that knows nothing; `discovery` if workloads are looked at.
    pub(super) fn new(discovery: Option<Discovery>) -> Self {
        Self {
            prewarms: Table::new(),
            rollouts: Table::new(),
            nodes: Table::new(),
            caches: Table::new(),
            discovery,
            dirty: BTreeSet::new(),
        }
    }

    /// Whether all is known: a decision without the nodes would be one for no nodes.
    pub(super) fn is_complete(&self) -> bool {
        self.prewarms.is_complete()
            && self.rollouts.is_complete()
            && self.nodes.is_complete()
            && self.caches.is_complete()
    }

    /// Takes in what a watch has told of.
    pub(super) fn apply(&mut self, change: Change) {
        match change {
            Change::Prewarm(Seen::Listing) => self.prewarms.begin(),
            Change::Prewarm(Seen::Listed) => drop(self.prewarms.end()),
            Change::Prewarm(Seen::Gone(object)) => {
                self.prewarms.remove(uid(&*object));
            }
            Change::Prewarm(Seen::Is(object)) => self.see_prewarm(*object),
            Change::Rollout(Seen::Listing) => self.rollouts.begin(),
            Change::Rollout(Seen::Listed) => {
                let gone = self.rollouts.end();
                self.dirty.extend(gone);
            }
            Change::Rollout(Seen::Gone(rollout)) => {
                self.rollouts.remove(&rollout.name);
                self.dirty.insert(rollout.name);
            }
            Change::Rollout(Seen::Is(rollout)) => {
                // What somebody else has written is put right.
                let Named { name, facts } = *rollout;
                if self.rollouts.get(&name) != Some(&facts) {
                    self.dirty.insert(name.clone());
                }
                self.rollouts.set(name, facts);
            }
            Change::Node(Seen::Listing) => self.nodes.begin(),
            Change::Node(Seen::Listed) => {
                if !self.nodes.end().is_empty() {
                    self.all_dirty();
                }
            }
            Change::Node(Seen::Gone(node)) => {
                self.nodes.remove(&node.name);
                self.all_dirty();
            }
            Change::Node(Seen::Is(node)) => {
                // Kubelet writes the object all the time.
                let before = self.nodes.set(node.name.clone(), node.facts);
                if before.as_ref() != self.nodes.get(&node.name) {
                    self.all_dirty();
                }
            }
            Change::Cache(Seen::Listing) => self.caches.begin(),
            Change::Cache(Seen::Listed) => {
                if !self.caches.end().is_empty() {
                    self.all_dirty();
                }
            }
            Change::Cache(Seen::Gone(cache)) => {
                self.caches.remove(&cache.name);
                self.all_dirty();
            }
            Change::Cache(Seen::Is(cache)) => self.see_cache(*cache),
            Change::Workload(kind, seen) => self.see_workload(kind, seen),
        }
    }

    fn see_workload(&mut self, kind: Kind, seen: Seen<Sighting>) {
        let Some(discovery) = &mut self.discovery else {
            return;
        };
        let was_complete = discovery.is_complete();
        let namespaces = discovery.apply(kind, seen);
        // Those that mean workloads wait until all are known.
        let is_new = discovery.is_complete() && !was_complete;
        // Pods change all the time, and mostly in what does not count.
        if namespaces.is_empty() && !is_new {
            return;
        }
        let concerned = self.prewarms.iter().filter(|(_, it)| {
            it.spec.workloads.is_some() && (is_new || namespaces.contains(&it.namespace))
        });
        self.dirty.extend(concerned.map(|(uid, _)| uid.clone()));
    }

    /// What the workloads name that an object means; `Err` as long as that is not known.
    fn find(&self, known: &Known) -> Result<Option<Found>, NotListed> {
        match (&self.discovery, &known.spec.workloads) {
            (None, _) | (_, None) => Ok(None),
            (Some(discovery), Some(_)) if discovery.is_complete() => {
                Ok(Some(discovery.find(&known.namespace, &known.spec)))
            }
            (Some(_), Some(_)) => Err(NotListed),
        }
    }

    fn all_dirty(&mut self) {
        let uids = self.prewarms.iter().map(|(uid, _)| uid.clone());
        self.dirty.extend(uids);
    }

    fn see_prewarm(&mut self, object: ImagePrewarm) {
        let uid = uid(&object).to_owned();
        // What is being deleted is done with, whoever else has still something to do for it.
        if object.metadata.deletion_timestamp.is_some() {
            self.prewarms.remove(&uid);
            return;
        }
        let generation = object.metadata.generation.unwrap_or_default();
        if let Some(known) = self.prewarms.see(&uid) {
            if known.generation == generation {
                return;
            }
            known.generation = generation;
            known.spec = Arc::new(object.spec);
            known.tasks.clear();
            self.dirty.insert(uid);
            return;
        }
        let meta = object.metadata;
        let created = meta.creation_timestamp.map_or(Timestamp::MIN, |it| it.0);
        let known = Known {
            namespace: meta.namespace.unwrap_or_default(),
            name: meta.name.unwrap_or_default(),
            generation,
            created,
            spec: Arc::new(object.spec),
            found: None,
            read: object.status.as_ref().map(digest),
            status: object.status.unwrap_or_default(),
            tasks: BTreeMap::new(),
            seed: Vec::new(),
            wake_at: None,
            heard: (Vec::new(), Instant::now()),
        };
        self.prewarms.set(uid.clone(), known);
        self.dirty.insert(uid);
    }

    fn see_cache(&mut self, cache: Named<Vec<Told>>) {
        let Named { name, facts } = cache;
        let Some(before) = self.caches.see(&name) else {
            self.caches.set(name, facts);
            self.all_dirty();
            return;
        };
        let now = facts.iter().filter(|it| !before.contains(it));
        let was = before.iter().filter(|it| !facts.contains(it));
        let changed: Vec<_> = now.chain(was).map(|it| it.uid.clone()).collect();
        *before = facts;
        self.dirty.extend(changed);
    }

    /// What nodes are told of ImagePrewarms that are not there any more.
    pub(super) fn orphans(&self) -> Vec<String> {
        let uids = self.rollouts.iter().map(|(uid, _)| uid);
        uids.filter(|it| self.prewarms.get(it).is_none())
            .cloned()
            .collect()
    }

    /// Those about which there is something to decide: something is new, or it is time.
    pub(super) fn take_due(&mut self, now: Timestamp) -> Vec<String> {
        let mut due = std::mem::take(&mut self.dirty);
        let waking = self.prewarms.iter();
        let waking = waking.filter(|(_, it)| it.wake_at.is_some_and(|at| at <= now));
        due.extend(waking.map(|(uid, _)| uid.clone()));
        due.into_iter().collect()
    }

    /// Decides about one object, and notes what was decided.
    pub(super) fn decide(
        &mut self,
        uid: &str,
        premises: &Premises,
        now: Timestamp,
    ) -> Option<Plan> {
        let found = self.find(self.prewarms.get(uid)?).ok()?;
        self.prewarms.get_mut(uid)?.take_found(found);
        let known = self.prewarms.get(uid)?;
        let nodes: Vec<_> = self
            .nodes
            .iter()
            .filter(|(_, it)| it.is_ready && it.is_wanted(&known.spec))
            // One without the object has no agent that could warm it.
            .filter_map(|(name, _)| Some((name, self.caches.get(name)?)))
            .map(|(name, told)| {
                let found = told.binary_search_by(|it| it.uid.as_str().cmp(uid)).ok();
                let told = found.map(|at| &told[at]);
                (name, told.filter(|it| it.revision == known.status.revision))
            })
            .collect();
        let heard: Vec<_> = nodes
            .iter()
            .map(|(_, it)| it.map_or((WarmupPhase::Pending, 0), |it| (it.phase, it.bytes_done)))
            .collect();
        let heard_at = match known.heard.0 == heard {
            true => known.heard.1,
            false => Instant::now(),
        };
        let views: Vec<_> = nodes
            .iter()
            .map(|(name, told)| {
                let failure = told.and_then(|it| it.failure.as_deref());
                NodeView {
                    name,
                    slot: slot(name, uid),
                    phase: told.map_or(WarmupPhase::Pending, |it| it.phase),
                    reason: failure.map_or("", |it| &it.0),
                    message: failure.map_or("", |it| &it.1),
                }
            })
            .collect();
        let plan = plan(&Facts {
            generation: known.generation,
            spec: &known.spec,
            found: known.found.as_ref(),
            status: &known.status,
            tasks: &known.tasks,
            nodes: &views,
            quiet: signed(heard_at.elapsed()),
            platform: &premises.platform,
            has_remote: premises.has_remote,
            now,
        });
        let is_other = plan.status.revision != known.status.revision;
        let known = self.prewarms.get_mut(uid)?;
        known.heard = (heard, heard_at);
        known.status.clone_from(&plan.status);
        known.seed.clone_from(&plan.seed);
        known.wake_at = plan.wake_at;
        // What has ended is in the status now.
        known
            .tasks
            .retain(|_, it| matches!(it, Task::Running { .. }));
        if is_other {
            // What nodes have told is of another revision: it counts anew.
            self.dirty.insert(uid.to_owned());
        }
        Some(plan)
    }
}

/// Not all workloads were listed: what is not found may be there.
#[derive(Debug)]
struct NotListed;

impl Known {
    /// Notes what workloads name. What could not be pulled with other secrets is tried again.
    fn take_found(&mut self, found: Option<Found>) {
        if let (Some(before), Some(now)) = (&self.found, &found) {
            for image in &mut self.status.images {
                if !now.is_as_in(before, &image.image) {
                    images::try_anew(image);
                }
            }
        }
        self.found = found;
    }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests;
