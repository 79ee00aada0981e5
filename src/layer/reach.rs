//! Knows which layers in use could be had again, so that extents of others are not evicted: bytes that are
//! on the disk are served however long registry and remote are away, and are not to be lost for room.
//!
//! A layer can be had again if one of its origins has answered lately, and there is a way to parts of it: the
//! remote content cache, or an access map. Where only a stream leads to them, each read of an evicted
//! chunk would fetch the whole layer.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, stream};
use tracing::debug;

use super::{
    access::AccessState,
    origins::Origin,
    store::{Inner, Layer},
};

/// How long an answer of an origin counts.
const ANSWER_COUNTS: Duration = Duration::from_secs(600);

/// How long an origin is let alone that did not answer.
const FAILURE_COUNTS: Duration = Duration::from_secs(30);

/// How long an origin may take to answer the question whether it does.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(3);

/// How long all questions together may take: a publish may wait for it.
const QUESTIONS_TIMEOUT: Duration = Duration::from_secs(6);

/// How many origins are asked at once.
const QUESTIONS_AT_ONCE: usize = 4;

/// When an origin was asked last, and whether it answered.
#[derive(Debug, Default)]
pub(super) struct Reach(
    /// std Mutex: held to copy or replace it.
    Mutex<Option<(Instant, Answered)>>,
);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answered {
    Yes,
    No,
}

impl Reach {
    pub(super) fn note(&self, answer: Answered, now: Instant) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, answer));
    }

    /// The last answer, as long as it counts.
    fn known(&self, now: Instant) -> Option<Answered> {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, answer) = last?;
        let counts = match answer {
            Answered::Yes => ANSWER_COUNTS,
            Answered::No => FAILURE_COUNTS,
        };
        (now.saturating_duration_since(at) < counts).then_some(answer)
    }
}

impl Inner {
    /// The layers in use that could be had again, as far as that is known.
    pub(super) fn recoverable(&self) -> Vec<Arc<Layer>> {
        let now = Instant::now();
        let mut layers = self.in_use();
        layers.retain(|it| it.answers(now) == Some(Answered::Yes) && self.has_way_to_parts(it));
        layers
    }

    /// Finds out about those of which it is not known; says whether there are more of them now.
    pub(super) async fn find_out(self: &Arc<Self>) -> bool {
        let n_before = self.recoverable().len();
        let now = Instant::now();
        let mut unknown = self.in_use();
        unknown.retain(|it| it.answers(now).is_none() || it.has_unknown_access());
        let asked =
            stream::iter(unknown).for_each_concurrent(QUESTIONS_AT_ONCE, |layer| async move {
                self.ask(&layer).await
            });
        // Whom there was no time to ask is asked the next time.
        let _ = tokio::time::timeout(QUESTIONS_TIMEOUT, asked).await;
        n_before < self.recoverable().len()
    }

    fn has_way_to_parts(&self, layer: &Layer) -> bool {
        self.remote.is_some() || layer.can_be_entered()
    }

    async fn ask(self: &Arc<Self>, layer: &Arc<Layer>) {
        // Known from then on.
        let _ = self.access(layer).await;
        if !self.has_way_to_parts(layer) {
            return;
        }
        for origin in layer.origins.trusted() {
            if layer.answers(Instant::now()) == Some(Answered::Yes) {
                return;
            }
            if origin.reach.known(Instant::now()).is_none() {
                origin.ask().await;
            }
        }
    }
}

impl Origin {
    async fn ask(&self) {
        // Its answer, which `open` notes, is all that is wanted of it.
        let question = self.open(0..self.desc.blob_bytes.min(1));
        match tokio::time::timeout(QUESTION_TIMEOUT, question).await {
            Ok(Ok(_)) => {}
            Ok(Err(err)) => {
                debug!(layer.diff_id = %self.desc.diff_id, error = %err, "layer cannot be had again, and stays on the disk");
            }
            Err(_) => self.reach.note(Answered::No, Instant::now()),
        }
    }
}

impl Layer {
    /// Whether any of its origins answers, `None` if that is not known of all.
    fn answers(&self, now: Instant) -> Option<Answered> {
        let origins = self.origins.trusted();
        let answers: Vec<_> = origins.iter().map(|it| it.reach.known(now)).collect();
        match answers.contains(&Some(Answered::Yes)) {
            true => Some(Answered::Yes),
            false => answers
                .into_iter()
                .find(Option::is_none)
                .unwrap_or(Some(Answered::No)),
        }
    }

    fn can_be_entered(&self) -> bool {
        match &*self.access.lock().unwrap_or_else(PoisonError::into_inner) {
            AccessState::Known(access) => self.origins.have(access) && access.covers_all(),
            AccessState::Unknown | AccessState::Nowhere | AccessState::Astray => false,
        }
    }

    fn has_unknown_access(&self) -> bool {
        let access = self.access.lock();
        matches!(
            &*access.unwrap_or_else(PoisonError::into_inner),
            AccessState::Unknown | AccessState::Astray
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_failures_count_for_a_while() {
        let (reach, start) = (Reach::default(), Instant::now());
        let known = |after: u64| reach.known(start + Duration::from_secs(after));
        assert_eq!(known(0), None);
        reach.note(Answered::Yes, start);
        assert_eq!((known(599), known(600)), (Some(Answered::Yes), None));
        reach.note(Answered::No, start);
        assert_eq!((known(29), known(30)), (Some(Answered::No), None));
    }
}
