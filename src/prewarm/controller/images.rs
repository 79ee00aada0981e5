//! Decides how far each image of an ImagePrewarm is, and which are to be seeded now.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};

use super::plan::{
    DEADLINE_EXCEEDED, Facts, Halt, ImageKey, Outcome, Problem, Task, after, is_there,
};
use crate::api::{ImagePrewarmSpec, ImageState, ImageStatus, WarmupPhase};

/// Seconds until the second attempt; each further one waits twice as long. As for a Job.
const FIRST_WAIT_SECONDS: i64 = 10;

/// Longest wait between two attempts, in seconds.
const MAX_WAIT_SECONDS: i64 = 600;

/// Seconds after a look at an image in which it is not seeded anew because nodes miss parts of it.
///
/// A remote content cache that is too small for what is wanted would have it seeded round and round.
const RESEED_SECONDS: i64 = 300;

/// Why nodes fail for which the image is to be seeded anew: [`WarmError`](crate::warm::WarmError)'s word for it.
const NOT_SEEDED: &str = "NotSeeded";

/// Whether nodes need not wait for the image any more: it is there, or has failed once.
pub(super) fn is_settled(image: &ImageStatus) -> bool {
    is_there(image.state) || image.state == ImageState::Failed || 0 < image.attempts
}

/// The images as they are from now on, and for which of them tasks are to run.
pub(super) fn next(
    facts: &Facts<'_>,
    is_new: bool,
    halt: Option<Halt>,
) -> (Vec<ImageStatus>, Vec<ImageKey>) {
    let before: BTreeMap<_, _> = facts
        .status
        .images
        .iter()
        .map(|it| ((&it.image, &it.platform), it))
        .collect();
    let mut images = Vec::new();
    let mut seed = Vec::new();
    for key in wanted(facts) {
        let known = before.get(&(&key.image, &key.platform));
        let mut next = known.map_or_else(|| new(&key), |it| (*it).clone());
        if is_new {
            begin_anew(&mut next);
        }
        let task = facts.tasks.get(&key);
        advance(&mut next, task, facts);
        match halt {
            None if is_due(facts, &next, task) => seed.push(key),
            None => {}
            Some(Halt::Suspended) => stop(&mut next),
            Some(Halt::Deadline) => give_up(&mut next, facts),
        }
        images.push(next);
    }
    (images, seed)
}

/// The images that are wanted, each once for each platform: those of the spec first, then what workloads name.
fn wanted(facts: &Facts<'_>) -> Vec<ImageKey> {
    let default = [facts.platform.to_owned()];
    let platforms = match facts.spec.platforms.as_slice() {
        [] => &default,
        named => named,
    };
    let own = facts.spec.images.iter().map(|it| &it.image);
    let own = own.flat_map(|image| platforms.iter().map(move |it| (image, it)));
    let found = facts.found.into_iter().flat_map(|it| &it.images);
    let found = found.flat_map(|(image, it)| {
        let of_default = platforms.iter().filter(|_| it.is_for_default);
        of_default.chain(&it.platforms).map(move |it| (image, it))
    });
    let mut seen = BTreeSet::new();
    let each_once = own.chain(found).filter(|it| seen.insert(*it));
    each_once
        .map(|(image, platform)| ImageKey {
            image: image.clone(),
            platform: platform.clone(),
        })
        .collect()
}

/// Has what could not be seeded tried again at once, because it may be pulled with something else now.
pub(super) fn try_anew(image: &mut ImageStatus) {
    if image.state == ImageState::Failed {
        begin_anew(image);
    }
    image.retry_at = None;
}

/// Whether nodes that have what was wanted `before` have all that is wanted now.
pub(super) fn is_part_of(now: &[ImageStatus], before: &[ImageStatus]) -> bool {
    fn all(images: &[ImageStatus]) -> impl Iterator<Item = (&String, &String, &String)> {
        let all = images.iter();
        all.filter_map(|it| Some((&it.image, &it.platform, it.manifest_digest.as_ref()?)))
    }
    let before: BTreeSet<_> = all(before).collect();
    all(now).all(|it| before.contains(&it))
}

fn new(key: &ImageKey) -> ImageStatus {
    ImageStatus {
        image: key.image.clone(),
        platform: key.platform.clone(),
        ..ImageStatus::default()
    }
}

/// The spec has changed: everything is looked at anew. What nodes have stays what it is until then.
fn begin_anew(image: &mut ImageStatus) {
    image.state = ImageState::Pending;
    image.attempts = 0;
    image.blob_bytes_done = 0;
    image.retry_at = None;
    image.reason = None;
    image.message = None;
}

fn stop(image: &mut ImageStatus) {
    if image.state == ImageState::Seeding {
        image.state = ImageState::Pending;
    }
}

fn give_up(image: &mut ImageStatus, facts: &Facts<'_>) {
    image.retry_at = None;
    if is_there(image.state) || image.state == ImageState::Failed {
        return;
    }
    image.state = ImageState::Failed;
    image.manifest_digest = None;
    if image.reason.is_none() {
        let seconds = facts.spec.active_deadline_seconds.unwrap_or_default();
        image.reason = Some(DEADLINE_EXCEEDED.to_owned());
        image.message = Some(format!(
            "not seeded within activeDeadlineSeconds = {seconds}: raise it, or leave it out"
        ));
    }
}

/// Notes what the image's task has come to.
fn advance(image: &mut ImageStatus, task: Option<&Task>, facts: &Facts<'_>) {
    match task {
        None => stop(image),
        Some(Task::Running {
            blob_bytes,
            blob_bytes_done,
        }) => {
            // One that is only looked up anew is there all the while.
            if is_there(image.state) {
                return;
            }
            image.state = ImageState::Seeding;
            image.retry_at = None;
            if 0 < *blob_bytes {
                image.blob_bytes = Some(*blob_bytes);
            }
            image.blob_bytes_done = *blob_bytes_done;
        }
        Some(Task::Done(outcome)) => done(image, outcome, facts.now),
        Some(Task::Failed(problem)) => failed(image, problem, facts),
    }
}

fn done(image: &mut ImageStatus, outcome: &Outcome, now: Timestamp) {
    image.state = match outcome.is_seeded {
        true => ImageState::Seeded,
        false => ImageState::Resolved,
    };
    image.manifest_digest = Some(outcome.manifest_digest.clone());
    image.layers = Some(outcome.layers);
    image.blob_bytes = Some(outcome.blob_bytes);
    image.blob_bytes_done = match outcome.is_seeded {
        true => outcome.blob_bytes,
        false => 0,
    };
    image.layer_bytes = outcome.layer_bytes;
    image.bytes_from_registry = outcome.bytes_from_registry;
    image.attempts = 0;
    image.retry_at = None;
    image.checked_at = Some(Time(now));
    image.reason = None;
    image.message = None;
}

fn failed(image: &mut ImageStatus, problem: &Problem, facts: &Facts<'_>) {
    image.attempts = image.attempts.saturating_add(1);
    image.reason = Some(problem.reason.to_owned());
    image.message = Some(problem.message.clone());
    let was_there = is_there(image.state);
    if !was_there {
        image.state = ImageState::Pending;
        image.manifest_digest = None;
    }
    if problem.is_transient || image.attempts <= facts.spec.backoff_limit {
        let doublings = u32::try_from(image.attempts - 1).unwrap_or(0).min(16);
        let wait = (FIRST_WAIT_SECONDS << doublings).min(MAX_WAIT_SECONDS);
        image.retry_at = after(Some(&Time(facts.now)), wait).map(Time);
        return;
    }
    image.retry_at = None;
    // The next look at its tag is due from now on.
    image.checked_at = Some(Time(facts.now));
    if !was_there {
        image.state = ImageState::Failed;
    }
}

/// When the next task of the image is to begin, if one is.
pub(super) fn due(facts: &Facts<'_>, image: &ImageStatus) -> Option<Timestamp> {
    match image.state {
        ImageState::Pending | ImageState::Seeding => {
            let retry_at = image.retry_at.as_ref();
            Some(retry_at.map_or(Timestamp::MIN, |it| it.0))
        }
        ImageState::Seeded | ImageState::Resolved | ImageState::Failed => {
            let refresh = refresh_seconds(facts.spec);
            let refresh = refresh.and_then(|it| after(image.checked_at.as_ref(), it));
            let is_missed = image.state == ImageState::Seeded
                && facts
                    .nodes
                    .iter()
                    .any(|it| it.phase == WarmupPhase::Failed && it.reason == NOT_SEEDED);
            let reseed = after(image.checked_at.as_ref(), RESEED_SECONDS).filter(|_| is_missed);
            match &image.retry_at {
                Some(retry_at) => Some(retry_at.0),
                None => refresh.into_iter().chain(reseed).min(),
            }
        }
    }
}

fn is_due(facts: &Facts<'_>, image: &ImageStatus, task: Option<&Task>) -> bool {
    let is_running = matches!(task, Some(Task::Running { .. }));
    is_running || due(facts, image).is_some_and(|it| it <= facts.now)
}

fn refresh_seconds(spec: &ImagePrewarmSpec) -> Option<i64> {
    spec.refresh_interval_seconds.map(|it| it.max(1))
}
