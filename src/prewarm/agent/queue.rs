//! What a node has to do with ImagePrewarms, in which order, and how far it is. Pure: no client, no task.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    time::{Duration, Instant},
};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use tracing::warn;

use super::order::Order;
use crate::{
    api::{ImageRollout, ImageRolloutSpec, MAX_WARMUPS, Warmup, WarmupPhase},
    cluster::{Seen, bounded},
    prewarm::rollout::admits,
};

/// First wait after a failure that may go by itself; each further one is twice as long.
const FIRST_WAIT: Duration = Duration::from_secs(30);

/// First wait after one for which somebody has to do something.
const FIRST_LONG_WAIT: Duration = Duration::from_secs(300);

/// Longest wait between two attempts.
const MAX_WAIT: Duration = Duration::from_secs(1800);

/// How long after the node was told of first it does nothing yet.
///
/// Where no node has anything to do, all are admitted; many that join at once would all begin before the controller knows of
/// the first of them. It sees a NodeImageCache within a moment, and tells of a smaller share within a second or two, or four
/// where it has just told a thousand nodes of twenty objects. An agent that restarts waits as well: its node may have been
/// away, and not counted.
const UNCOUNTED: Duration = Duration::from_secs(5);

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Do {
    /// Read an object.
    Read {
        uid: String,
        namespace: String,
        name: String,
    },
    /// Begin to fill.
    Start(Order),
}

/// How a task has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// All is on the disk: so many bytes.
    Ready { bytes: u64 },
    /// Something is not.
    Failed {
        reason: &'static str,
        message: String,
        is_transient: bool,
    },
}

/// An ImagePrewarm, as far as this node has to do with it.
#[derive(Debug)]
struct Item {
    rollout: ImageRolloutSpec,
    /// Whether the last listing named it.
    is_listed: bool,
    read: Option<Read>,
    /// Not before then is it read or begun.
    not_before: Option<Instant>,
    attempts: u32,
    /// Generation and revision for which a task is under way.
    running: Option<(i64, String)>,
    /// What the node says of it.
    told: Option<Warmup>,
}

/// What an object said when it was read.
#[derive(Debug)]
struct Read {
    generation: i64,
    revision: String,
    order: Option<Order>,
    at: Instant,
}

/// All that a node has to do.
#[derive(Debug)]
pub(super) struct Queue {
    node: String,
    max_running: usize,
    items: BTreeMap<String, Item>,
    /// What was told before this process, of objects that the watch has yet to name.
    before: BTreeMap<String, Warmup>,
    is_listed: bool,
    /// What of that which the node says has changed.
    news: News,
    /// From when on the controller counts this node.
    counted_at: Option<Instant>,
}

/// Whether there is something to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum News {
    /// Nothing.
    None,
    /// Some bytes have come.
    Progress,
    /// Something has begun, and may have ended before it is told.
    Begun,
    /// Something has ended, or is not wanted any more.
    Step,
}

impl Queue {
    pub(super) fn new(node: &str, max_running: usize) -> Self {
        Self {
            node: node.to_owned(),
            max_running: max_running.max(1),
            items: BTreeMap::new(),
            before: BTreeMap::new(),
            is_listed: false,
            news: News::None,
            counted_at: None,
        }
    }

    /// Takes up what this node has told before the process began.
    pub(super) fn know(&mut self, told: Vec<Warmup>) {
        self.before = told.into_iter().map(|it| (it.uid.clone(), it)).collect();
    }

    /// Takes in what the watch has told of.
    pub(super) fn see(&mut self, seen: Seen<ImageRollout>) {
        match seen {
            Seen::Listing => self.items.values_mut().for_each(|it| it.is_listed = false),
            Seen::Listed => {
                let had = self.items.len();
                // What is not named has gone; who runs for it is found in `take_stopped`, which has no item for it.
                self.items.retain(|_, it| it.is_listed);
                let n_forgotten = had - self.items.len() + self.before.len();
                self.before.clear();
                self.is_listed = true;
                if 0 < n_forgotten {
                    self.news = News::Step;
                }
            }
            Seen::Gone(object) => self.remove(&object.metadata.name.unwrap_or_default()),
            Seen::Is(object) => self.see_rollout(*object),
        }
    }

    fn remove(&mut self, uid: &str) {
        if self.items.remove(uid).is_some_and(|it| it.told.is_some()) {
            self.news = News::Step;
        }
    }

    fn see_rollout(&mut self, object: ImageRollout) {
        // It has the name of what it is about.
        let uid = object.metadata.name.unwrap_or_default();
        let rollout = object.spec;
        let before = &mut self.before;
        let item = self.items.entry(uid.clone()).or_insert_with(|| Item {
            rollout: rollout.clone(),
            is_listed: true,
            read: None,
            not_before: None,
            attempts: 0,
            running: None,
            // What was under way ended with the process.
            told: before.remove(&uid).map(|mut it| {
                if it.phase == WarmupPhase::Warming {
                    it.phase = WarmupPhase::Pending;
                }
                it
            }),
        });
        let key = |it: &ImageRolloutSpec| (it.generation, it.revision.clone());
        if key(&item.rollout) != key(&rollout) {
            item.attempts = 0;
            item.not_before = None;
        }
        item.is_listed = true;
        item.rollout = rollout;
    }

    /// Has all objects read again, because the node is another one.
    pub(super) fn read_anew(&mut self) {
        for item in self.items.values_mut() {
            item.read = None;
        }
    }

    /// The tasks that are to stop: of objects that have gone, were suspended, or want something else.
    ///
    /// A task that is told of here stops; its place is free.
    pub(super) fn take_stopped(&mut self) -> Vec<String> {
        let mut stop = Vec::new();
        for (uid, item) in &mut self.items {
            let Some((_, revision)) = &item.running else {
                continue;
            };
            let rollout = &item.rollout;
            // Out of turn is no reason to stop: the share may shrink while more nodes come.
            let is_offered = 0 < rollout.admitted_permille && rollout.revision == *revision;
            let is_ordered = item.read.as_ref().is_some_and(|it| it.order.is_some());
            if !is_offered || !is_ordered {
                item.running = None;
                item.told = None;
                self.news = News::Step;
                stop.push(uid.clone());
            }
        }
        stop
    }

    /// Whether a task for this object may go on.
    pub(super) fn has(&self, uid: &str) -> bool {
        self.items.get(uid).is_some_and(|it| it.running.is_some())
    }

    /// The objects of a namespace, `max` at most, that have something to have and that this node has not got yet: uid and
    /// name.
    pub(super) fn offers_in(&self, namespace: &str, max: usize) -> Vec<(String, String)> {
        let offers = self.items.iter().filter(|(_, it)| {
            let revision = &it.rollout.revision;
            let has_it = it
                .told
                .as_ref()
                .is_some_and(|it| it.phase == WarmupPhase::Ready && it.revision == *revision);
            it.rollout.namespace == namespace && !revision.is_empty() && !has_it
        });
        let offers = offers.take(max);
        offers
            .map(|(uid, it)| (uid.clone(), it.rollout.name.clone()))
            .collect()
    }

    /// Whether there is this object still, and its spec is this one.
    pub(super) fn is_current(&self, uid: &str, generation: i64) -> bool {
        let item = self.items.get(uid);
        item.is_some_and(|it| it.rollout.generation == generation)
    }

    /// What is to be done now: at most `max_reads` objects to read, and as many tasks as there is room for. Nothing before
    /// the controller counts this node.
    pub(super) fn next(&mut self, now: Instant, max_reads: usize) -> Vec<Do> {
        if self.counted_at.is_none_or(|at| now < at) {
            return Vec::new();
        }
        let node = &self.node;
        let mut reads = Vec::new();
        let mut ready: Vec<(Reverse<i32>, Instant, &String)> = Vec::new();
        for (uid, item) in &self.items {
            let rollout = &item.rollout;
            let is_early = item.not_before.is_some_and(|it| now < it);
            let has_it = item.told.as_ref().is_some_and(|it| {
                it.phase == WarmupPhase::Ready && it.revision == rollout.revision
            });
            if is_early || has_it || rollout.revision.is_empty() || !admits(rollout, node, uid) {
                continue;
            }
            let is_current =
                |it: &&Read| it.generation == rollout.generation && it.revision == rollout.revision;
            match item.read.as_ref().filter(is_current) {
                None => reads.push(Do::Read {
                    uid: uid.clone(),
                    namespace: rollout.namespace.clone(),
                    name: rollout.name.clone(),
                }),
                Some(read) => {
                    if let Some(order) = &read.order
                        && item.running.is_none()
                    {
                        ready.push((Reverse(order.priority), read.at, uid));
                    }
                }
            }
        }
        ready.sort();
        let n_running = self
            .items
            .values()
            .filter(|it| it.running.is_some())
            .count();
        let room = self.max_running.saturating_sub(n_running);
        let start: Vec<_> = ready
            .into_iter()
            .take(room)
            .map(|it| it.2.clone())
            .collect();
        reads.truncate(max_reads);
        let mut todo = reads;
        for uid in start {
            todo.extend(self.begin(&uid).map(Do::Start));
        }
        todo
    }

    fn begin(&mut self, uid: &str) -> Option<Order> {
        let item = self.items.get_mut(uid)?;
        let order = item.read.as_ref()?.order.clone()?;
        item.running = Some((order.generation, order.revision.clone()));
        let news = item.tell(&order, WarmupPhase::Warming);
        self.news = self.news.max(news);
        Some(order)
    }

    /// Notes what an object said, or that it could not be read and is to be read again at `retry_at`.
    pub(super) fn read(
        &mut self,
        uid: &str,
        read: Result<Option<Order>, String>,
        retry_at: Instant,
    ) {
        let Some(item) = self.items.get_mut(uid) else {
            return;
        };
        let order = match read {
            Ok(order) => order,
            Err(error) => {
                let ImageRolloutSpec {
                    namespace, name, ..
                } = &item.rollout;
                warn!(
                    namespace,
                    name, error, "cannot read an ImagePrewarm, trying again"
                );
                item.not_before = Some(retry_at);
                return;
            }
        };
        let asked = (item.rollout.generation, item.rollout.revision.clone());
        if let Some(order) = &order
            && (order.generation, &order.revision) != (asked.0, &asked.1)
        {
            // The rollout of what was read is on its way: then it is read once more, if it is still not that.
            item.not_before = Some(retry_at);
            return;
        }
        let news = match &order {
            // A task that runs for the same goes on.
            Some(_) if item.running.is_some() => News::None,
            Some(order) => item.tell(order, WarmupPhase::Pending),
            None => {
                item.told = None;
                News::Step
            }
        };
        self.news = self.news.max(news);
        item.read = Some(Read {
            generation: asked.0,
            revision: asked.1,
            order,
            at: Instant::now(),
        });
    }

    /// Notes how far a task is.
    pub(super) fn progress(&mut self, uid: &str, done: u64, total: u64) {
        let clamped = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
        let Some(told) = self.items.get_mut(uid).and_then(|it| it.told.as_mut()) else {
            return;
        };
        let now = (clamped(done), clamped(total));
        if (told.bytes_done, told.bytes_total) != now {
            (told.bytes_done, told.bytes_total) = now;
            self.news = self.news.max(News::Progress);
        }
    }

    /// Notes how a task has ended.
    pub(super) fn ended(&mut self, uid: &str, revision: &str, end: End, now: Instant) {
        let Some(item) = self.items.get_mut(uid) else {
            return;
        };
        if item.running.as_ref().is_none_or(|it| it.1 != revision) {
            return;
        }
        item.running = None;
        self.news = News::Step;
        let Some(told) = &mut item.told else {
            return;
        };
        told.since = Some(Time(Timestamp::now()));
        match end {
            End::Ready { bytes } => {
                told.phase = WarmupPhase::Ready;
                told.bytes_done = i64::try_from(bytes).unwrap_or(i64::MAX);
                told.bytes_total = told.bytes_done;
                told.reason = None;
                told.message = None;
                item.attempts = 0;
            }
            End::Failed {
                reason,
                message,
                is_transient,
            } => {
                told.phase = WarmupPhase::Failed;
                told.reason = Some(reason.to_owned());
                told.message = Some(bounded(&message).to_owned());
                let first = if is_transient {
                    FIRST_WAIT
                } else {
                    FIRST_LONG_WAIT
                };
                let wait = first * 2u32.saturating_pow(item.attempts.min(10));
                item.attempts = item.attempts.saturating_add(1);
                item.not_before = Some(now + wait.min(MAX_WAIT));
            }
        }
    }

    /// What the node says: at most as much as an object takes, what is not well first.
    pub(super) fn told(&self) -> Vec<Warmup> {
        // Of objects that are yet to be listed it is still true.
        let items = self.items.values().filter_map(|it| it.told.as_ref());
        let mut told: Vec<_> = items.chain(self.before.values()).cloned().collect();
        let rank = |it: &Warmup| match it.phase {
            WarmupPhase::Failed => 0,
            WarmupPhase::Warming => 1,
            WarmupPhase::Ready => 2,
            WarmupPhase::Pending => 3,
        };
        told.sort_by(|a, b| (rank(a), &a.uid).cmp(&(rank(b), &b.uid)));
        told.truncate(MAX_WARMUPS);
        told.sort_by(|a, b| a.uid.cmp(&b.uid));
        told
    }

    /// Whether the node's word can be trusted to be complete.
    pub(super) fn is_listed(&self) -> bool {
        self.is_listed
    }

    /// Takes what there is to tell.
    pub(super) fn news(&self) -> News {
        self.news
    }

    /// Notes that all was told, at `now`.
    pub(super) fn was_told(&mut self, now: Instant) {
        self.news = News::None;
        self.counted_at.get_or_insert(now + UNCOUNTED);
    }

    /// Nodes that the greatest rollout is for.
    pub(super) fn n_nodes(&self) -> u32 {
        let nodes = self.items.values().map(|it| it.rollout.nodes);
        u32::try_from(nodes.max().unwrap_or(0)).unwrap_or(0)
    }
}

impl Item {
    /// Says that it is in another phase, which it has just begun to be; returns what is new about that.
    fn tell(&mut self, order: &Order, phase: WarmupPhase) -> News {
        let before = self
            .told
            .as_ref()
            .filter(|it| it.revision == order.revision);
        // A failure is told of until it is made good, also while it is tried again: the object would otherwise be well and
        // ill in turn, with an Event each time and an alert that never lasts. So that attempt takes no place of
        // `parallelism`: the node had its turn, attempts are ever fewer, and a share that shrank and grew with each of
        // them would be a message to every node.
        if before.is_some_and(|it| it.phase == WarmupPhase::Failed) {
            return News::None;
        }
        self.told = Some(Warmup {
            uid: order.uid.clone(),
            namespace: self.rollout.namespace.clone(),
            name: self.rollout.name.clone(),
            revision: order.revision.clone(),
            phase,
            bytes_done: before.map_or(0, |it| it.bytes_done),
            bytes_total: before.map_or(0, |it| it.bytes_total),
            since: Some(Time(Timestamp::now())),
            reason: None,
            message: None,
        });
        News::Begun
    }
}

#[cfg(test)]
mod tests;
