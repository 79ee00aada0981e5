//! Warms this node: follows ImagePrewarms, fills the cache when it is the node's turn, and says how far it is.
//!
//! ```text
//! watch of ImageRollouts ──► queue (pure) ──► read an object ──► order (pure) ──► task: fill
//!                               ▲   └────────────────────────────────────────────────┘
//!                               └──► report: NodeImageCache
//! watch of this node's pods ──► bound (pure) ──► read ──► order (pure) ──► task: fill one image
//! ```
//!
//! Invariants: an object is read only when it is the node's turn, and once for each generation and revision; what was
//! warmed is not warmed again because it was evicted, or the agent restarted; deletion, suspension and a new revision
//! stop work at once; the node has one queue, so that what it reads in a second is bounded whatever is asked of it.

mod bound;
mod order;
mod queue;
mod report;
mod tasks;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{debug, info, warn};

use self::{
    bound::{Bound, BoundPod, Want, of_pod},
    order::Order,
    queue::{Do, Queue},
    report::Report,
    tasks::Tasks,
};
use super::{
    config::PrewarmConfig,
    nodes::NodeFacts,
    workloads::{Kind, Object},
};
use crate::{
    api::{ImagePrewarm, ImageRollout},
    cluster::{Seen, Selector, watch},
    metrics::Metrics,
    telemetry::error_chain,
    warm::Fills,
};

/// How often it is looked what is to be done.
const ROUND: Duration = Duration::from_secs(1);

/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How soon the Node object is read again after it was read first, or has changed: a node that comes up has taints that
/// soon go, the driver's own among them.
const FIRST_LOOK: Duration = Duration::from_secs(10);

/// How long it is known what the Node object says of this node, once it says the same for a while.
const NODE_KNOWN: Duration = Duration::from_secs(300);

/// How long a failed read is not tried again.
const RETRY_AFTER: Duration = Duration::from_secs(10);

/// Changes that may wait to be taken in: then the watch waits.
const CHANGES: usize = 64;

/// Objects that are read in one round, at most.
const READS: usize = 8;

/// Objects that are read for the new pods of one namespace, at most: a pod's volumes wait for nobody.
const READS_FOR_PODS: usize = 8;

/// Settings of an agent's part.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of the node.
    pub node: String,
    /// Its platform, such as `linux/amd64`.
    pub platform: String,
    /// Whether there is a remote content cache.
    pub has_remote: bool,
    /// The operator's bounds.
    pub config: PrewarmConfig,
    /// Name of the driver, if pods of this node are looked at, for which the agent needs the right to list all of them.
    pub pods_of: Option<String>,
}

/// Warms one node.
pub struct NodeWarming {
    client: Client,
    settings: Settings,
    queue: Queue,
    tasks: Tasks,
    report: Report,
    bound: Bound,
    pod_tasks: Tasks,
    /// What counts of the Node object, and its uid.
    node: Option<(NodeFacts, String)>,
    /// When it is read again, and how long that was put off.
    look_at: Instant,
    look_wait: Duration,
}

impl std::fmt::Debug for NodeWarming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeWarming")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

impl NodeWarming {
    /// Makes one that does nothing yet.
    pub fn new(
        client: Client,
        parts: Arc<dyn Fills>,
        settings: Settings,
        metrics: Metrics,
    ) -> Self {
        let parallel = settings.config.parallel_images;
        let tasks = Tasks::new(parts, &settings, metrics.clone());
        Self {
            queue: Queue::new(&settings.node, parallel),
            bound: Bound::new(&settings.platform, parallel),
            pod_tasks: tasks.for_pods(),
            tasks,
            report: Report::new(client.clone(), &settings.node, metrics),
            client,
            settings,
            node: None,
            look_at: Instant::now(),
            look_wait: Duration::ZERO,
        }
    }

    /// Watches and warms, for ever.
    ///
    /// # Cancellation
    /// Safe: what is under way stops.
    pub async fn run(mut self) {
        let (sender, changes) = mpsc::channel(CHANGES);
        let api: Api<ImageRollout> = Api::all(self.client.clone());
        let watching = watch(api, Selector::default(), async |seen| {
            // A receiver that has gone is being dropped with this very future.
            drop(sender.send(seen).await);
        });
        let (sender, pods) = mpsc::channel(CHANGES);
        let watching_pods = self.watch_pods(sender);
        let working = async {
            self.queue.know(self.report.read().await);
            self.work(changes, pods).await;
        };
        tokio::join!(watching, watching_pods, working);
    }

    /// Watches the pods of this node, if that is wanted; otherwise nothing ever comes.
    ///
    /// Without a remote content cache there is nothing to gain: a pod's own mount would read the same from the registry.
    fn watch_pods(&self, sender: mpsc::Sender<Seen<BoundPod>>) -> impl Future<Output = ()> + use<> {
        let Settings {
            node,
            has_remote,
            pods_of,
            ..
        } = &self.settings;
        let driver = pods_of.clone().filter(|_| *has_remote);
        let api = Api::<Object>::all_with(self.client.clone(), &Kind::Pod);
        let here = Selector {
            fields: Some(format!("spec.nodeName={node}")),
            ..Selector::default()
        };
        async move {
            if let Some(driver) = driver {
                watch(api, here, async |seen| {
                    let seen = seen.map(|it| of_pod(&it, &driver));
                    drop(sender.send(seen).await);
                })
                .await;
            }
            sender.closed().await;
        }
    }

    async fn work(
        &mut self,
        mut changes: mpsc::Receiver<Seen<ImageRollout>>,
        mut pods: mpsc::Receiver<Seen<BoundPod>>,
    ) {
        let mut rounds = interval(ROUND);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(seen) = changes.recv() => {
                    self.queue.see(seen);
                    // At once: what is deleted or suspended is not gone on with for another second.
                    self.stop();
                }
                (uid, revision, end) = self.tasks.next() => {
                    self.queue.ended(&uid, &revision, end, Instant::now());
                }
                Some(seen) = pods.recv() => {
                    self.bound.see(seen);
                    // Those that wait already, together: one pod seldom comes alone.
                    while let Ok(seen) = pods.try_recv() {
                        self.bound.see(seen);
                    }
                    self.stop();
                    self.fill_for_pods().await;
                }
                (want, _, end) = self.pod_tasks.next() => {
                    debug!(want, ?end, "filling for a pod has ended");
                    self.bound.ended(&want);
                    self.fill_for_pods().await;
                }
                _ = rounds.tick() => self.round().await,
            }
        }
    }

    /// Stops what is not wanted any more.
    fn stop(&mut self) {
        for uid in self.queue.take_stopped() {
            self.tasks.stop(&uid);
        }
        self.tasks.retain(|uid| self.queue.has(uid));
        let queue = &self.queue;
        for want in self.bound.take_stopped(|uid, at| queue.is_current(uid, at)) {
            self.pod_tasks.stop(&want.to_string());
        }
    }

    /// Looks for ImagePrewarms that offer what new pods want, and begins.
    async fn fill_for_pods(&mut self) {
        // What is offered is not known before.
        if self.queue.is_listed() {
            for (namespace, wants) in self.bound.take_asked() {
                self.look_for(&namespace, wants).await;
            }
        }
        for (want, order) in self.bound.next() {
            let uid = want.to_string();
            self.pod_tasks.start(Order { uid, ..order });
        }
    }

    async fn look_for(&mut self, namespace: &str, mut wants: Vec<Want>) {
        for (uid, name) in self.queue.offers_in(namespace, READS_FOR_PODS) {
            if wants.is_empty() {
                return;
            }
            let object = match self.get(namespace, &name).await {
                Ok(Some(object)) => object,
                Ok(None) => continue,
                Err(error) => {
                    warn!(
                        namespace,
                        name, error, "cannot read an ImagePrewarm for a pod"
                    );
                    return;
                }
            };
            wants.retain(|want| {
                let order = order::for_pod(&object, &uid, &want.image, &want.platform);
                let is_offered = order.is_some();
                if let Some(order) = order {
                    self.bound.offer(want.clone(), order);
                }
                !is_offered
            });
        }
    }

    async fn round(&mut self) {
        self.stop();
        // What pods wanted before the ImagePrewarms were listed.
        self.fill_for_pods().await;
        self.look_at_node().await;
        // Twice: what was read may begin at once, and is told of once.
        for _ in 0..2 {
            for action in self.queue.next(Instant::now(), READS) {
                match action {
                    Do::Read {
                        uid,
                        namespace,
                        name,
                    } => {
                        let read = self.read(&uid, &namespace, &name).await;
                        self.queue.read(&uid, read, Instant::now() + RETRY_AFTER);
                        self.stop();
                    }
                    Do::Start(order) => self.tasks.start(order),
                }
            }
        }
        for (uid, done, total) in self.tasks.progress() {
            self.queue.progress(&uid, done, total);
        }
        if let Some((_, node_uid)) = &self.node {
            self.report.write(node_uid, &mut self.queue).await;
        }
    }

    /// Reads the node's own object from time to time. What is known of it counts until then.
    async fn look_at_node(&mut self) {
        let now = Instant::now();
        if now < self.look_at {
            return;
        }
        let nodes: Api<Node> = Api::all(self.client.clone());
        let name = &self.settings.node;
        let error = match timeout(ANSWER_TIMEOUT, nodes.get(name)).await {
            Ok(Ok(node)) => {
                let facts = NodeFacts::of(&node);
                let before = self.node.as_ref();
                let has_changed = before.is_some_and(|(before, _)| *before != facts);
                if has_changed {
                    info!(
                        node.name = name,
                        "labels or taints of the node have changed"
                    );
                    self.queue.read_anew();
                }
                self.look_wait = next_look(self.look_wait, has_changed);
                self.look_at = now + self.look_wait;
                self.node = Some((facts, node.metadata.uid.unwrap_or_default()));
                return;
            }
            Ok(Err(err)) => error_chain(&err).to_string(),
            Err(_) => "the Kubernetes API does not answer".to_owned(),
        };
        warn!(
            node.name = name,
            error, "cannot read the Node, trying again"
        );
        self.look_at = now + RETRY_AFTER;
    }

    /// Reads an object, and finds what is to be done for it here: `Ok(None)` if nothing is.
    async fn read(&self, uid: &str, namespace: &str, name: &str) -> Result<Option<Order>, String> {
        let Some((facts, _)) = &self.node else {
            return Err("the Node is not known".to_owned());
        };
        let object = self.get(namespace, name).await?;
        let platform = &self.settings.platform;
        Ok(object.and_then(|it| order::of(&it, uid, platform, facts)))
    }

    async fn get(&self, namespace: &str, name: &str) -> Result<Option<ImagePrewarm>, String> {
        let api: Api<ImagePrewarm> = Api::namespaced(self.client.clone(), namespace);
        match timeout(ANSWER_TIMEOUT, api.get_opt(name)).await {
            Ok(Ok(object)) => {
                debug!(namespace, name, "read an ImagePrewarm");
                Ok(object)
            }
            Ok(Err(err)) => Err(error_chain(&err).to_string()),
            Err(_) => Err("the Kubernetes API does not answer".to_owned()),
        }
    }
}

/// How long the Node object need not be read again, after `before` was enough.
fn next_look(before: Duration, has_changed: bool) -> Duration {
    match before.is_zero() || has_changed {
        true => FIRST_LOOK,
        false => (before * 3).min(NODE_KNOWN),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_looked_at_often_while_it_is_new_or_changes() {
        let mut wait = Duration::ZERO;
        let waits = [false, false, false, false, false, true, false].map(|has_changed| {
            wait = next_look(wait, has_changed);
            wait.as_secs()
        });
        assert_eq!(waits, [10, 30, 90, 270, 300, 10, 30]);
    }
}
