//! Puts into words how far an ImagePrewarm is: its conditions, and events where something has changed.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use super::{
    discovery::MAX_IMAGES,
    plan::{DEADLINE_EXCEEDED, Facts, Halt, Lack, Notice, is_there, lack},
};
use crate::{
    api::{ImagePrewarmStatus, ImageState, ImageStatus, Phase, Target},
    cluster::{EventKind, bounded},
};

/// Whether the images are in the remote content cache.
const SEEDED: &str = "Seeded";

/// Whether they are on the nodes.
const DISTRIBUTED: &str = "Distributed";

/// Whether all is where it was wanted.
pub(super) const READY: &str = "Ready";

/// What is said about one thing.
#[derive(Debug)]
struct Said {
    is_so: bool,
    reason: String,
    message: String,
}

fn said(is_so: bool, reason: &str, message: String) -> Said {
    Said {
        is_so,
        reason: reason.to_owned(),
        message,
    }
}

/// The reason of a condition, if there is that condition.
pub(super) fn reason<'a>(status: &'a ImagePrewarmStatus, of: &str) -> Option<&'a str> {
    let mut conditions = status.conditions.iter();
    conditions
        .find(|it| it.type_ == of)
        .map(|it| it.reason.as_str())
}

/// Writes the conditions of `status`, whose other fields are as they are to be.
pub(super) fn set(status: &mut ImagePrewarmStatus, facts: &Facts<'_>, halt: Option<Halt>) {
    let mut all = vec![(SEEDED, seeded(status, facts, halt))];
    if facts.spec.target == Target::Nodes {
        all.push((DISTRIBUTED, distributed(status, facts, halt)));
    }
    let ready = ready(status, facts, halt);
    all.push((READY, ready));
    let conditions = all.into_iter().map(|(name, said)| {
        let value = if said.is_so { "True" } else { "False" };
        let before = status.conditions.iter().find(|it| it.type_ == name);
        let since = before.filter(|it| it.status == value);
        Condition {
            type_: name.to_owned(),
            status: value.to_owned(),
            reason: said.reason,
            message: bounded(&said.message).to_owned(),
            observed_generation: Some(facts.generation),
            last_transition_time: since
                .map_or(Time(facts.now), |it| it.last_transition_time.clone()),
        }
    });
    status.conditions = conditions.collect();
}

/// The first image that has something to complain of: one that has failed for good before one that is tried again.
fn complaint(status: &ImagePrewarmStatus) -> Option<(&ImageStatus, &str, String)> {
    let complains = |it: &&ImageStatus| it.reason.is_some();
    let mut images = status.images.iter().filter(complains);
    let failed = images.clone().find(|it| it.state == ImageState::Failed);
    let image = failed.or_else(|| images.next())?;
    let message = image.message.as_deref().unwrap_or_default();
    let next = match (&image.retry_at, image.state) {
        (Some(_), _) => format!("attempt {} follows", image.attempts.saturating_add(1)),
        (None, ImageState::Failed) if image.attempts == 0 => "given up".to_owned(),
        (None, ImageState::Failed) => format!(
            "given up after attempt {}: change the spec to have it tried again",
            image.attempts
        ),
        (None, _) => "what is there stays".to_owned(),
    };
    let text = format!("{} ({}): {message}; {next}", image.image, image.platform);
    Some((image, image.reason.as_deref().unwrap_or_default(), text))
}

/// What to do about workloads whose images are not all there.
fn of_lack(lack: Lack) -> Said {
    match lack {
        Lack::DiscoveryOff => said(
            false,
            "DiscoveryOff",
            "spec.workloads is not followed: its operator sets prewarm.discovery.enabled; or name the images in spec.images"
                .to_owned(),
        ),
        Lack::TooMany(n_left_out) => {
            let message = format!(
                "{n_left_out} images that workloads name are left out, because one ImagePrewarm has {MAX_IMAGES} at most, the first by name: choose fewer workloads with spec.workloads.selector, and make a further ImagePrewarm for the others"
            );
            said(false, "TooManyImages", message)
        }
    }
}

/// No workload names an image.
fn no_workloads() -> Said {
    said(
        true,
        "NoWorkloads",
        "no workload that spec.workloads means has an inline volume of the driver: what comes later is warmed"
            .to_owned(),
    )
}

fn suspended() -> Said {
    said(false, "Suspended", "spec.suspend is true".to_owned())
}

fn seeded(status: &ImagePrewarmStatus, facts: &Facts<'_>, halt: Option<Halt>) -> Said {
    let n_images = status.images.len();
    let n_there = status.images.iter().filter(|it| is_there(it.state)).count();
    if n_there == n_images {
        match lack(facts) {
            Some(lack) => return of_lack(lack),
            None if n_images == 0 => return no_workloads(),
            None => {}
        }
        if !facts.has_remote {
            return said(
                false,
                "NoRemote",
                "no remote content cache is configured: nodes take the images from the registry, with their own credentials; set remote.kind to have it asked once"
                    .to_owned(),
            );
        }
        let blob_bytes = status.images.iter().filter_map(|it| it.blob_bytes);
        let bytes: i64 = blob_bytes.sum();
        return said(
            true,
            "AllSeeded",
            format!("{n_images} images, {bytes} bytes compressed"),
        );
    }
    if halt == Some(Halt::Suspended) {
        return suspended();
    }
    match complaint(status) {
        Some((_, reason, text)) => said(false, reason, text),
        None => said(
            false,
            "InProgress",
            format!("{n_there} of {n_images} images"),
        ),
    }
}

fn distributed(status: &ImagePrewarmStatus, facts: &Facts<'_>, halt: Option<Halt>) -> Said {
    let nodes = &status.nodes;
    if status.images.is_empty() {
        return lack(facts).map_or_else(no_workloads, of_lack);
    }
    if nodes.desired == 0 && status.admitted_permille != 0 {
        return said(
            true,
            "NoNodes",
            "no node that is ready, has the driver's agent and matches nodeSelector and tolerations: nodes that come later are warmed"
                .to_owned(),
        );
    }
    let of_nodes = format!("{} of {} nodes", nodes.ready, nodes.desired);
    if nodes.ready == nodes.desired && !status.revision.is_empty() {
        return said(true, "AllNodes", of_nodes);
    }
    if halt == Some(Halt::Suspended) {
        return suspended();
    }
    if halt == Some(Halt::Deadline) {
        return said(false, DEADLINE_EXCEEDED, of_nodes);
    }
    if status.admitted_permille == 0 {
        return said(false, "NotSeeded", "the images come first".to_owned());
    }
    match status.failed_nodes.first() {
        Some(failed) => {
            let message = format!(
                "{of_nodes}, {} failed and try again by themselves, such as {}: {}",
                nodes.failed, failed.node, failed.message
            );
            said(false, &failed.reason, message)
        }
        None => said(false, "InProgress", of_nodes),
    }
}

fn ready(status: &ImagePrewarmStatus, facts: &Facts<'_>, halt: Option<Halt>) -> Said {
    let (images, nodes) = (&status.images_seeded, &status.nodes_ready);
    let counts = match facts.spec.target {
        Target::Remote => format!("{images} images"),
        Target::Nodes => format!("{images} images, {nodes} nodes"),
    };
    match status.phase {
        Phase::Suspended => suspended(),
        Phase::Ready if status.images.is_empty() => no_workloads(),
        Phase::Ready => said(true, "Ready", counts),
        Phase::Failed if halt == Some(Halt::Deadline) => {
            let seconds = facts.spec.active_deadline_seconds.unwrap_or_default();
            let message = format!(
                "not ready within activeDeadlineSeconds = {seconds} ({counts}): raise it, or leave it out"
            );
            said(false, DEADLINE_EXCEEDED, message)
        }
        Phase::Failed | Phase::Degraded | Phase::Pending | Phase::Seeding | Phase::Distributing => {
            match (complaint(status), status.failed_nodes.first()) {
                (Some((_, reason, text)), _) => said(false, reason, text),
                (None, Some(node)) => {
                    let text = format!("{counts}; node {}: {}", node.node, node.message);
                    said(false, &node.reason, text)
                }
                (None, None) => match lack(facts) {
                    Some(lack) if matches!(status.phase, Phase::Failed | Phase::Degraded) => {
                        of_lack(lack)
                    }
                    _ => said(false, "InProgress", counts),
                },
            }
        }
    }
}

/// What people should be told of the step from one status to the next.
pub(super) fn notices(
    before: &ImagePrewarmStatus,
    after: &ImagePrewarmStatus,
    is_new: bool,
) -> Vec<Notice> {
    let mut notices = Vec::new();
    let mut tell = |kind, reason: &str, message: String| {
        notices.push(Notice {
            kind,
            reason: reason.to_owned(),
            message,
        });
    };
    for image in &after.images {
        let mut known = before.images.iter();
        let known = known.find(|it| it.image == image.image && it.platform == image.platform);
        let was = known.filter(|_| !is_new);
        let name = format!("{} ({})", image.image, image.platform);
        // Once for each cause, not for each attempt; and once more when it is given up.
        let is_given_up = image.state == ImageState::Failed;
        let was_given_up = was.is_some_and(|it| it.state == ImageState::Failed);
        let was_reason = was.and_then(|it| it.reason.as_ref());
        if let Some(reason) = &image.reason
            && (was_reason != Some(reason) || is_given_up != was_given_up)
        {
            let message = image.message.as_deref().unwrap_or_default();
            let end = if is_given_up { "; given up" } else { "" };
            tell(
                EventKind::Warning,
                reason,
                format!("{name}: {message}{end}"),
            );
        }
        let digest = image.manifest_digest.as_deref().unwrap_or_default();
        let old_digest = known.and_then(|it| it.manifest_digest.as_deref());
        let was_there = was.is_some_and(|it| is_there(it.state));
        if is_there(image.state) && !(was_there && old_digest == Some(digest)) {
            let reason = match image.state {
                ImageState::Resolved => "Resolved",
                _ => "Seeded",
            };
            let message = format!(
                "{name} is {digest}, {} bytes came from the registry",
                image.bytes_from_registry
            );
            tell(EventKind::Normal, reason, message);
        }
    }
    let (was, is) = (reason(before, READY), reason(after, READY));
    let of_ready = after.conditions.iter().find(|it| it.type_ == READY);
    let message = of_ready.map(|it| it.message.clone()).unwrap_or_default();
    if before.phase != after.phase || (is_new && after.phase == Phase::Ready) {
        match after.phase {
            Phase::Ready => tell(EventKind::Normal, "Ready", message),
            Phase::Degraded | Phase::Failed => {
                let reason = is.unwrap_or("Failed");
                tell(EventKind::Warning, reason, message);
            }
            Phase::Suspended => tell(EventKind::Normal, "Suspended", message),
            Phase::Pending | Phase::Seeding | Phase::Distributing => {}
        }
    } else if after.phase == Phase::Degraded && was != is {
        tell(EventKind::Warning, is.unwrap_or("Degraded"), message);
    }
    notices
}
