//! Bounds what a mirror may cost, and remembers which ones are down.
//!
//! A mirror is a guess that somebody nearer has the same content. So it is asked once, within a
//! deadline, and whatever goes wrong with it, the next host is asked: nothing that a mirror does
//! fails a volume. Only the registry itself is tried again and again (`retry`).

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout};

use super::{retry::Failure, transport::unavailable};
use crate::tier::SourceError;

/// How long one object may take to come from a mirror: the whole of a document, the start of a
/// blob, and each pause within it. A wait that the mirror asks for (429) is part of it.
///
/// A cache that has to ask its own upstream first answers within a second or two.
pub(crate) const MIRROR_DEADLINE: Duration = Duration::from_secs(10);

/// How long a mirror that was down is passed over: an image of many layers pays once.
const BENCH: Duration = Duration::from_secs(30);

/// Shortest wait for a mirror that says 429 and 0 seconds.
const MIN_WAIT: Duration = Duration::from_millis(200);

/// The mirrors that are passed over for a while.
#[derive(Debug, Default)]
pub(crate) struct Bench {
    /// std Mutex: held for a map lookup, never across an await.
    until: Mutex<BTreeMap<String, Instant>>,
}

impl Bench {
    /// Whether a mirror is to be passed over now.
    pub(crate) fn holds(&self, mirror: &str) -> bool {
        let until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        until.get(mirror).is_some_and(|it| Instant::now() < *it)
    }

    /// Takes note of what went wrong with a mirror; the next host is asked.
    pub(crate) fn note(&self, mirror: &str, error: &SourceError) {
        match error {
            // It is up, and does not have the image, or not for us.
            SourceError::NotFound { .. }
            | SourceError::Unauthorized { .. }
            | SourceError::Forbidden { .. } => {
                tracing::debug!(mirror, %error, "mirror does not give this, asking the next");
            }
            SourceError::RateLimited { .. } | SourceError::Unavailable { .. } => {
                let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
                until.insert(mirror.to_owned(), Instant::now() + BENCH);
                drop(until);
                tracing::warn!(mirror, %error, seconds = BENCH.as_secs(), "mirror failed, passing it over");
            }
            SourceError::Protocol { .. }
            | SourceError::Unsupported { .. }
            | SourceError::WrongPlatform { .. } => {
                tracing::warn!(mirror, %error, "mirror answered wrongly, asking the next");
            }
        }
    }
}

/// Has `attempt` get something from a mirror, within [`MIRROR_DEADLINE`].
///
/// # Errors
/// Those of the attempt; a 429 is waited for if its `Retry-After` is within the deadline.
pub(crate) async fn within_deadline<T, F>(
    mirror: &str,
    mut attempt: impl FnMut() -> F,
) -> Result<T, SourceError>
where
    F: Future<Output = Result<T, Failure>>,
{
    let attempts = async {
        loop {
            let failure = match attempt().await {
                Ok(it) => return Ok(it),
                Err(failure) => failure,
            };
            match (&failure.error, failure.retry_after) {
                (SourceError::RateLimited { .. }, Some(asked)) if asked <= MIRROR_DEADLINE => {
                    sleep(asked.max(MIN_WAIT)).await;
                }
                _ => return Err(failure.error),
            }
        }
    };
    match timeout(MIRROR_DEADLINE, attempts).await {
        Ok(outcome) => outcome,
        Err(_) => {
            let reason = format!("no answer within {} s", MIRROR_DEADLINE.as_secs());
            Err(unavailable(mirror, reason))
        }
    }
}
