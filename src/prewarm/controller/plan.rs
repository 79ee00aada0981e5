//! Decides what an ImagePrewarm's status is, and what is to be done for it. Pure: no client, no clock.
//!
//! A status is all that is remembered. What a controller that was killed had begun is begun again by the next one, and
//! what it had finished is found to be there.

use std::collections::BTreeMap;

use k8s_openapi::{
    apimachinery::pkg::{apis::meta::v1::Time, util::intstr::IntOrString},
    jiff::{SignedDuration, Timestamp},
};

use super::{conditions, discovery::Found, images, share};
use crate::{
    api::{
        FailedNode, ImagePrewarmSpec, ImagePrewarmStatus, ImageState, ImageStatus, NodeCounts,
        Phase, Target, WarmupPhase,
    },
    cluster::EventKind,
    prewarm::rollout,
};

/// Nodes that a status names, at most, of those on which it failed.
pub const MAX_FAILED_NODES: usize = 20;

/// Share of the nodes that warm at once if nobody says how many.
const PARALLELISM_PERCENT: u64 = 10;

/// Why it has failed if it was not ready in time.
pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";

/// Names an image for a platform.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageKey {
    /// The image, as the spec or a workload has it.
    pub image: String,
    /// The platform.
    pub platform: String,
}

/// What became of a task that seeds an image, or how far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Task {
    /// It is under way.
    Running {
        /// Bytes that it has to deal with; 0 as long as that is not known.
        blob_bytes: i64,
        /// Bytes of these that it has dealt with.
        blob_bytes_done: i64,
    },
    /// It has ended well.
    Done(Outcome),
    /// It has not.
    Failed(Problem),
}

/// What an image turned out to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Digest of its manifest.
    pub manifest_digest: String,
    /// Its layers.
    pub layers: i32,
    /// Bytes of its layers, compressed.
    pub blob_bytes: i64,
    /// Bytes of its layers, decompressed, if that is known.
    pub layer_bytes: Option<i64>,
    /// Bytes that the registry was asked for.
    pub bytes_from_registry: i64,
    /// Whether it is in the remote content cache; otherwise there is none.
    pub is_seeded: bool,
}

/// Why an image could not be seeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// A word, from a closed set.
    pub reason: &'static str,
    /// Why, and what to do.
    pub message: String,
    /// Whether it may go by itself: such a failure is never the last attempt.
    pub is_transient: bool,
}

/// A node that is to be warmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeView<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its place in the order in which nodes are admitted.
    pub slot: i32,
    /// How far it is with the present revision.
    pub phase: WarmupPhase,
    /// Why it failed.
    pub reason: &'a str,
    /// Why, and what to do.
    pub message: &'a str,
}

/// What a decision is made from.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// Generation of the spec.
    pub generation: i64,
    /// What is wanted.
    pub spec: &'a ImagePrewarmSpec,
    /// What the workloads that it means name; `None` without such, or if nobody looks at workloads.
    pub found: Option<&'a Found>,
    /// What was decided before.
    pub status: &'a ImagePrewarmStatus,
    /// Tasks of this generation.
    pub tasks: &'a BTreeMap<ImageKey, Task>,
    /// The nodes that could be warmed, by what they told of the present `revision`.
    pub nodes: &'a [NodeView<'a>],
    /// How long no node has told of anything new.
    pub quiet: SignedDuration,
    /// The platform that is meant where none is named.
    pub platform: &'a str,
    /// Whether there is a remote content cache.
    pub has_remote: bool,
    /// The time.
    pub now: Timestamp,
}

/// An event to write about the object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Whether somebody should do something.
    pub kind: EventKind,
    /// A word.
    pub reason: String,
    /// What happened, and what to do.
    pub message: String,
}

/// What was decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The status from now on.
    pub status: ImagePrewarmStatus,
    /// The images for which a task is to run or to wait for its turn; all other tasks are to stop.
    pub seed: Vec<ImageKey>,
    /// What to tell people.
    pub notices: Vec<Notice>,
    /// Whether the object is to be deleted.
    pub delete: bool,
    /// When to decide anew though nothing has changed.
    pub wake_at: Option<Timestamp>,
}

/// Why no work is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Halt {
    /// The spec says so.
    Suspended,
    /// It took too long.
    Deadline,
}

/// Decides what is to be done.
pub fn plan(facts: &Facts<'_>) -> Plan {
    let before = facts.status;
    let is_new = before.observed_generation != facts.generation;
    let mut status = before.clone();
    if is_new {
        status.observed_generation = facts.generation;
        status.started_at = Some(Time(facts.now));
        status.finished_at = None;
    }
    let halt = halt(facts, &status, is_new);
    let (images, seed) = images::next(facts, is_new, halt);
    status.images = images;
    status.revision = revision(facts, &status.images, is_new);
    let n_seeded = status.images.iter().filter(|it| is_there(it.state)).count();
    status.images_seeded = format!("{n_seeded}/{}", status.images.len());

    // What nodes have told is about another revision, if it has just become another one.
    let is_current = status.revision == before.revision;
    let limit = parallelism(facts.spec, facts.nodes.len());
    status.nodes = count(facts.nodes, is_current);
    status.nodes_ready = match facts.spec.target {
        Target::Remote => String::new(),
        Target::Nodes => format!("{}/{}", status.nodes.ready, status.nodes.desired),
    };
    status.failed_nodes = failed(facts.nodes, is_current);
    status.node_bytes_per_second = bytes_per_second(facts.spec, limit);
    // What nodes are at goes on while an image that a workload has brought is seeded.
    let goes_on = !is_new && is_current && 0 < before.admitted_permille;
    let is_offered = halt.is_none()
        && facts.spec.target == Target::Nodes
        && !status.revision.is_empty()
        && !status.images.is_empty()
        && (goes_on || status.images.iter().all(images::is_settled));
    status.admitted_permille = match (is_offered, is_current) {
        (false, _) => 0,
        // The nodes' answers to it are yet to come: the next decision has them.
        (true, false) => share::permille(facts.nodes, limit, |_| true),
        (true, true) => {
            let limit = share::widened(limit, facts.quiet);
            let before = before.admitted_permille;
            share::next(before, facts.nodes, limit, |it| share::is_open(it.phase))
        }
    };

    status.phase = phase(&status, facts, halt);
    let is_at_end = matches!(status.phase, Phase::Ready | Phase::Degraded | Phase::Failed)
        && status.images.iter().all(|it| it.retry_at.is_none());
    if is_at_end && status.finished_at.is_none() {
        status.finished_at = Some(Time(facts.now));
    }
    // What follows workloads begins again with each that comes.
    if !is_at_end && facts.spec.workloads.is_some() {
        status.finished_at = None;
    }
    conditions::set(&mut status, facts, halt);
    let notices = conditions::notices(before, &status, is_new);
    let expires_at = expiry(facts.spec, &status);
    Plan {
        delete: expires_at.is_some_and(|it| it <= facts.now),
        wake_at: wake_at(facts, &status, expires_at),
        seed,
        notices,
        status,
    }
}

/// Whether an image in this state is where it is wanted.
pub(super) fn is_there(state: ImageState) -> bool {
    matches!(state, ImageState::Seeded | ImageState::Resolved)
}

/// Names what nodes are to have.
///
/// An image that no workload names any more makes no other name: nodes have more than is wanted, and need not be asked
/// again. So that a name never means two things, one that is made later depends on it.
fn revision(facts: &Facts<'_>, images: &[ImageStatus], is_new: bool) -> String {
    let (content, before) = (facts.spec.content, facts.status);
    if facts.spec.workloads.is_none() {
        return rollout::revision(content, images, "");
    }
    if !is_new && !before.revision.is_empty() && images::is_part_of(images, &before.images) {
        return before.revision.clone();
    }
    rollout::revision(content, images, &before.revision)
}

fn halt(facts: &Facts<'_>, status: &ImagePrewarmStatus, is_new: bool) -> Option<Halt> {
    if facts.spec.suspend {
        return Some(Halt::Suspended);
    }
    let was_late = conditions::reason(status, conditions::READY) == Some(DEADLINE_EXCEEDED);
    if was_late && !is_new {
        return Some(Halt::Deadline);
    }
    let deadline = deadline(facts.spec, status)?;
    (deadline <= facts.now).then_some(Halt::Deadline)
}

/// When it must have come to its end; never, once it has.
fn deadline(spec: &ImagePrewarmSpec, status: &ImagePrewarmStatus) -> Option<Timestamp> {
    if status.finished_at.is_some() {
        return None;
    }
    after(status.started_at.as_ref(), spec.active_deadline_seconds?)
}

/// When the object is to be deleted.
fn expiry(spec: &ImagePrewarmSpec, status: &ImagePrewarmStatus) -> Option<Timestamp> {
    after(
        status.finished_at.as_ref(),
        spec.ttl_seconds_after_finished?,
    )
}

/// `seconds` after `time`.
pub(super) fn after(time: Option<&Time>, seconds: i64) -> Option<Timestamp> {
    let span = SignedDuration::from_secs(seconds);
    // Beyond the end of time is never.
    time?.0.checked_add(span).ok()
}

/// What keeps the images of workloads from being all that are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lack {
    /// Nobody looks at workloads.
    DiscoveryOff,
    /// They name so many more than there is room for.
    TooMany(usize),
}

/// What keeps the images of workloads from being all that are meant, if something does.
pub(super) fn lack(facts: &Facts<'_>) -> Option<Lack> {
    facts.spec.workloads.as_ref()?;
    match facts.found {
        None => Some(Lack::DiscoveryOff),
        Some(found) if 0 < found.n_left_out => Some(Lack::TooMany(found.n_left_out)),
        Some(_) => None,
    }
}

fn wake_at(
    facts: &Facts<'_>,
    status: &ImagePrewarmStatus,
    expires_at: Option<Timestamp>,
) -> Option<Timestamp> {
    let images = status.images.iter().filter(|_| !facts.spec.suspend);
    let of_images = images.filter_map(|it| images::due(facts, it));
    let stall = facts
        .now
        .checked_add(SignedDuration::from_secs(share::QUIET_SECONDS));
    let is_under_way =
        0 < status.admitted_permille && 0 < status.nodes.pending + status.nodes.warming;
    of_images
        .chain(deadline(facts.spec, status))
        .chain(expires_at)
        .chain(stall.ok().filter(|_| is_under_way))
        .filter(|it| facts.now < *it)
        .min()
}

/// How many of `n_nodes` may warm at once.
fn parallelism(spec: &ImagePrewarmSpec, n_nodes: usize) -> usize {
    let n_nodes = u64::try_from(n_nodes).unwrap_or(u64::MAX);
    let percent = |percent: u64| n_nodes.saturating_mul(percent).div_ceil(100);
    let wanted = match &spec.parallelism {
        None => percent(PARALLELISM_PERCENT),
        Some(IntOrString::Int(number)) => u64::try_from(*number).unwrap_or(1),
        Some(IntOrString::String(text)) => {
            // The definition lets nothing else through.
            let parsed = text.strip_suffix('%').and_then(|it| it.parse().ok());
            percent(parsed.unwrap_or(PARALLELISM_PERCENT))
        }
    };
    usize::try_from(wanted).unwrap_or(usize::MAX).max(1)
}

/// What one node may read in a second, when `limit` of them do.
fn bytes_per_second(spec: &ImagePrewarmSpec, limit: usize) -> Option<i64> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX).max(1);
    let of_total = spec.total_bytes_per_second.map(|it| (it / limit).max(1));
    match (spec.bytes_per_second_per_node, of_total) {
        (Some(own), Some(share)) => Some(own.min(share)),
        (own, share) => own.or(share),
    }
}

fn count(nodes: &[NodeView<'_>], is_current: bool) -> NodeCounts {
    let mut counts = NodeCounts::default();
    for node in nodes {
        counts.desired += 1;
        *match node.phase {
            _ if !is_current => &mut counts.pending,
            WarmupPhase::Pending => &mut counts.pending,
            WarmupPhase::Warming => &mut counts.warming,
            WarmupPhase::Ready => &mut counts.ready,
            WarmupPhase::Failed => &mut counts.failed,
        } += 1;
    }
    counts
}

fn failed(nodes: &[NodeView<'_>], is_current: bool) -> Vec<FailedNode> {
    let failed = nodes
        .iter()
        .filter(|it| is_current && it.phase == WarmupPhase::Failed);
    let failed = failed.take(MAX_FAILED_NODES);
    failed
        .map(|it| FailedNode {
            node: it.name.to_owned(),
            reason: it.reason.to_owned(),
            message: it.message.to_owned(),
        })
        .collect()
}

fn phase(status: &ImagePrewarmStatus, facts: &Facts<'_>, halt: Option<Halt>) -> Phase {
    match halt {
        Some(Halt::Suspended) => return Phase::Suspended,
        Some(Halt::Deadline) => return Phase::Failed,
        None => {}
    }
    let images = &status.images;
    let lack = lack(facts);
    if images.is_empty() {
        return match lack {
            Some(_) => Phase::Failed,
            None => Phase::Ready,
        };
    }
    let n_failed = images
        .iter()
        .filter(|it| it.state == ImageState::Failed)
        .count();
    let n_there = images.iter().filter(|it| is_there(it.state)).count();
    let is_seeding = n_failed + n_there < images.len();
    let has_begun = images
        .iter()
        .any(|it| it.state != ImageState::Pending || 0 < it.attempts);
    let nodes = &status.nodes;
    let has_nodes = facts.spec.target == Target::Nodes;
    if n_failed == images.len() {
        return Phase::Failed;
    }
    if is_seeding && !has_begun {
        return Phase::Pending;
    }
    if has_nodes && 0 < status.admitted_permille && 0 < nodes.pending + nodes.warming {
        return Phase::Distributing;
    }
    if is_seeding {
        return Phase::Seeding;
    }
    match (nodes.failed, n_failed) {
        (0, 0) if lack.is_none() => Phase::Ready,
        (_, _) if has_nodes && 0 < nodes.failed && nodes.ready == 0 => Phase::Failed,
        (_, _) => Phase::Degraded,
    }
}

#[cfg(test)]
mod tests;
