//! Decides what is warmed where, and when, and has images seeded.
//!
//! ```text
//! watches ──► world ──► plan (pure) ──► writer: status, ImageRollout, events, deletion
//!                         ▲    └──────► seeding: a bounded number of tasks
//!                         └─────────────────┘ what they have come to
//! ```
//!
//! One of the replicas leads, by a Lease; the others wait. All that is remembered is in the objects' status, so that a
//! new leader goes on where the last one was: layers that were seeded are in the remote content cache, and found there.
//! For a moment two may lead: then both write the same, and the remote's lease has each layer made by one of them.
//!
//! Invariants: no object of the cluster is kept whole; no Secret is read but by its name, in the namespace of the object
//! that names it; a decision is made only when objects, nodes and caches were all listed.

mod conditions;
mod discovery;
mod images;
pub mod plan;
mod seeding;
mod share;
mod world;
mod writer;

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use k8s_openapi::{api::core::v1::Node, jiff::Timestamp};
use kube::{Api, Client};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tracing::info;

use self::{
    discovery::{Discovery, of_object},
    plan::{ImageKey, Task},
    seeding::{Order, Seeding, TaskId, Wanted},
    world::{Change, Premises, World, of_cache, of_node, of_rollout},
    writer::{Left, Writer},
};
use crate::{
    api::{ImagePrewarm, ImageRollout, NodeImageCache, Phase},
    cluster::{Elector, Events, LeaseName, Selector, watch},
    metrics::Metrics,
    prewarm::workloads::{Kind, Object},
    warm::Warms,
};

pub(in crate::prewarm) use seeding::what;

/// How often is decided, at most: what has happened in between is decided together.
const ROUND: Duration = Duration::from_secs(1);

/// How often it is looked how far the seeding of images is.
const PROGRESS: Duration = Duration::from_secs(5);

/// Changes that may wait to be taken in: then the watches wait.
const CHANGES: usize = 256;

/// What a node may have come to, as metrics name it.
const WARMUPS: [&str; 4] = ["pending", "warming", "ready", "failed"];

/// Settings of the controller.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The lease by which one replica leads.
    pub lease: LeaseName,
    /// Names this replica, such as its pod's name.
    pub identity: String,
    /// Name of the driver, in whose name events are.
    pub driver_name: String,
    /// The platform that is meant where none is named.
    pub platform: String,
    /// Whether there is a remote content cache.
    pub has_remote: bool,
    /// Whether it looks at workloads, for which it needs the right to list all of them.
    pub discover: bool,
    /// Images that are seeded at once.
    pub parallel_images: usize,
    /// Bytes a second that are read from registries, 0: any number.
    pub bytes_per_second: u64,
}

/// One replica of the controller.
pub struct Controller {
    client: Client,
    parts: Arc<dyn Warms>,
    settings: Settings,
    metrics: Metrics,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl Controller {
    /// Makes one that does nothing yet.
    pub fn new(
        client: Client,
        parts: Arc<dyn Warms>,
        settings: Settings,
        metrics: Metrics,
    ) -> Self {
        Self {
            client,
            parts,
            settings,
            metrics,
        }
    }

    /// Leads whenever it is this replica's turn, until `stop`; then lets another one lead at once.
    pub async fn run(&self, stop: impl Future<Output = ()>) {
        let Settings {
            lease, identity, ..
        } = &self.settings;
        let mut elector = Elector::new(self.client.clone(), lease, identity);
        let lead = async {
            loop {
                elector.acquire().await;
                self.metrics.prewarm_leader.set(1);
                // What is lost ends at once: its tasks are dropped with it.
                tokio::select! {
                    () = elector.keep() => {}
                    () = self.lead() => {}
                }
                self.show_nothing();
            }
        };
        tokio::select! {
            () = stop => {}
            () = lead => {}
        }
        self.show_nothing();
        elector.release().await;
    }

    /// Who does not lead knows nothing.
    fn show_nothing(&self) {
        let metrics = &self.metrics;
        metrics.prewarm_leader.set(0);
        metrics.prewarm_lag.set(0);
        metrics.prewarm_seedings.set(0);
        for phase in Phase::ALL {
            let of_phase = metrics.prewarm_objects.with_label_values(&[phase.name()]);
            of_phase.set(0);
        }
        for warmup in WARMUPS {
            metrics.prewarm_nodes.with_label_values(&[warmup]).set(0);
        }
    }

    /// Watches and decides, for ever.
    async fn lead(&self) {
        let (sender, changes) = mpsc::channel(CHANGES);
        // A receiver that has gone is being dropped with this very future.
        let send = async |change| drop(sender.send(change).await);
        let client = || self.client.clone();
        let all = Selector::default;
        let prewarms = watch::<ImagePrewarm>(Api::all(client()), all(), async |seen| {
            send(Change::Prewarm(seen)).await;
        });
        let rollouts = watch::<ImageRollout>(Api::all(client()), all(), async |seen| {
            send(Change::Rollout(seen.map(of_rollout))).await;
        });
        let nodes = watch::<Node>(Api::all(client()), all(), async |seen| {
            send(Change::Node(seen.map(|it| of_node(&it)))).await;
        });
        let caches = watch::<NodeImageCache>(Api::all(client()), all(), async |seen| {
            send(Change::Cache(seen.map(of_cache))).await;
        });
        let driver = &self.settings.driver_name;
        let kinds = Kind::ALL.iter().filter(|_| self.settings.discover);
        let workloads = join_all(kinds.map(|kind| {
            watch::<Object>(Api::all_with(client(), kind), all(), async |seen| {
                let seen = seen.map(|it| of_object(&it, driver));
                send(Change::Workload(*kind, seen)).await;
            })
        }));
        let decisions = Decisions::new(self).run(changes);
        tokio::join!(prewarms, rollouts, nodes, caches, workloads, decisions);
    }
}

/// Decides again and again.
struct Decisions {
    world: World,
    seeding: Seeding,
    writer: Writer,
    premises: Premises,
    metrics: Metrics,
    /// When what could not be written, or was too early, is to be written.
    left: BTreeMap<String, Instant>,
    looked_at: Instant,
}

impl Decisions {
    fn new(controller: &Controller) -> Self {
        let Controller {
            client,
            parts,
            settings,
            metrics,
        } = controller;
        let events = Events::new(client.clone(), &settings.driver_name, None);
        Self {
            world: World::new(settings.discover.then(Discovery::new)),
            seeding: Seeding::new(client.clone(), Arc::clone(parts), settings, metrics.clone()),
            writer: Writer::new(client.clone(), events, metrics.clone()),
            premises: Premises {
                platform: settings.platform.clone(),
                has_remote: settings.has_remote,
            },
            metrics: metrics.clone(),
            left: BTreeMap::new(),
            looked_at: Instant::now(),
        }
    }

    async fn run(mut self, mut changes: mpsc::Receiver<Change>) {
        let mut rounds = interval(ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_told = false;
        loop {
            tokio::select! {
                Some(change) = changes.recv() => self.world.apply(change),
                (task, generation, end) = self.seeding.next() => {
                    // What was found out for another spec is found out anew.
                    if let Some(known) = self.world.prewarms.get_mut(&task.0)
                        && known.generation == generation
                    {
                        known.tasks.insert(task.1, end);
                        self.world.dirty.insert(task.0);
                    }
                }
                _ = rounds.tick() => {
                    if self.world.is_complete() {
                        if !is_told {
                            info!(objects = self.world.prewarms.len(), "all is known, deciding");
                            is_told = true;
                        }
                        self.round().await;
                    }
                }
            }
        }
    }

    /// Decides about all about which there is something to decide, and sees to it.
    async fn round(&mut self) {
        self.look_at_tasks();
        let mut to_write: Vec<String> = Vec::new();
        let mut again = Vec::new();
        // A few times: what nodes have told counts anew for another revision.
        for _ in 0..3 {
            let now = Timestamp::now();
            for uid in self.world.take_due(now) {
                let Some(plan) = self.world.decide(&uid, &self.premises, now) else {
                    continue;
                };
                if let Some(known) = self.world.prewarms.get(&uid) {
                    self.writer.tell(&uid, known, &plan.notices).await;
                    if plan.delete && !self.writer.delete(&uid, known).await {
                        again.push(uid.clone());
                    }
                }
                to_write.push(uid);
            }
            if self.world.dirty.is_empty() {
                break;
            }
        }
        self.world.dirty.extend(again);
        self.seed();
        let now = Instant::now();
        let late = self.left.iter().filter(|(_, at)| **at <= now);
        to_write.extend(late.map(|(uid, _)| uid.clone()));
        to_write.sort();
        to_write.dedup();
        self.write(&to_write).await;
        self.withdraw().await;
        let prewarms = &self.world.prewarms;
        self.left.retain(|uid, _| prewarms.get(uid).is_some());
        self.writer.retain(|uid| prewarms.get(uid).is_some());
        self.show();
    }

    /// Notes how far tasks are, from time to time.
    fn look_at_tasks(&mut self) {
        if self.looked_at.elapsed() < PROGRESS {
            return;
        }
        self.looked_at = Instant::now();
        for (task, progress) in self.seeding.progress() {
            if let Some(known) = self.world.prewarms.get_mut(&task.0) {
                known.tasks.insert(task.1.clone(), progress);
                self.world.dirty.insert(task.0.clone());
            }
        }
    }

    /// Has seeded what was decided.
    fn seed(&mut self) {
        let prewarms = &self.world.prewarms;
        let wanted = prewarms.iter().flat_map(|(uid, known)| {
            known.seed.iter().map(|key| Wanted {
                priority: Reverse(known.spec.priority),
                created: known.created,
                task: (uid.clone(), key.clone()),
            })
        });
        let order = |(uid, key): &TaskId| {
            let known = prewarms.get(uid)?;
            let found = known.found.as_ref();
            let found = found.and_then(|it| it.images.get(&key.image));
            Some(Order {
                namespace: known.namespace.clone(),
                spec: Arc::clone(&known.spec),
                volume_secrets: found.map(|it| it.secrets.clone()).unwrap_or_default(),
                generation: known.generation,
            })
        };
        let before: Vec<_> = self
            .seeding
            .progress()
            .map(|(task, _)| task.clone())
            .collect();
        self.seeding.run(wanted.collect(), order);
        // One that was stopped is not under way.
        let seeding = &self.seeding;
        self.world.prewarms.for_each(|uid, known| {
            let is_under_way = |key: &ImageKey| seeding.has(uid, key);
            known
                .tasks
                .retain(|key, it| !matches!(it, Task::Running { .. }) || is_under_way(key));
        });
        // What has just begun is shown in the next round already.
        let begun = self.seeding.progress();
        let begun: Vec<_> = begun.filter(|(task, _)| !before.contains(task)).collect();
        let begun: Vec<_> = begun
            .into_iter()
            .map(|(task, it)| (task.clone(), it))
            .collect();
        for (task, progress) in begun {
            if let Some(known) = self.world.prewarms.get_mut(&task.0) {
                known.tasks.insert(task.1, progress);
                self.world.dirty.insert(task.0);
            }
        }
    }

    async fn write(&mut self, uids: &[String]) {
        let under_way = self.world.prewarms.iter();
        let under_way = under_way.filter(|(_, it)| it.status.finished_at.is_none());
        let n_objects = u32::try_from(under_way.count()).unwrap_or(u32::MAX);
        for uid in uids {
            self.left.remove(uid);
            let Some(known) = self.world.prewarms.get(uid) else {
                continue;
            };
            let mut told = self.world.rollouts.get(uid).cloned();
            let left = self.writer.write(uid, known, &mut told, n_objects).await;
            if let Some(told) = told {
                self.world.rollouts.set(uid.clone(), told);
            }
            match left {
                Left::Nothing => {}
                Left::At(at) => drop(self.left.insert(uid.clone(), at)),
            }
        }
    }

    /// Has nodes stop with what is not there any more.
    async fn withdraw(&mut self) {
        for uid in self.world.orphans() {
            if self.writer.withdraw(&uid).await {
                self.world.rollouts.remove(&uid);
            }
        }
    }

    fn show(&self) {
        let mut phases = Phase::ALL.map(|it| (it, 0i64));
        let mut nodes = [0i64; 4];
        let now = Timestamp::now();
        let mut lag_seconds = 0;
        for (_, known) in self.world.prewarms.iter() {
            let status = &known.status;
            for (phase, count) in &mut phases {
                *count += i64::from(*phase == status.phase);
            }
            let counts = status.nodes;
            let of_states = [counts.pending, counts.warming, counts.ready, counts.failed];
            for (sum, count) in nodes.iter_mut().zip(of_states) {
                *sum += i64::from(count);
            }
            let is_open = matches!(
                status.phase,
                Phase::Pending | Phase::Seeding | Phase::Distributing
            );
            // One that was ready, and has something new to have, is late from then on.
            let mut conditions = status.conditions.iter();
            let since = conditions.find(|it| it.type_ == conditions::READY);
            let since = since.map(|it| &it.last_transition_time);
            let since = since.max(status.started_at.as_ref()).filter(|_| is_open);
            let age = since.map_or(0, |it| now.as_second() - it.0.as_second());
            lag_seconds = lag_seconds.max(age);
        }
        for (phase, count) in phases {
            let of_phase = self
                .metrics
                .prewarm_objects
                .with_label_values(&[phase.name()]);
            of_phase.set(count);
        }
        for (state, count) in WARMUPS.iter().zip(nodes) {
            self.metrics
                .prewarm_nodes
                .with_label_values(&[state])
                .set(count);
        }
        self.metrics.prewarm_lag.set(lag_seconds);
    }
}
