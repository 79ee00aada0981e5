//! Decides whether and when a failed request is made again: the only place that does.
//!
//! A failure is tried again if [`SourceError::is_transient`] says so. Failures in a row and the
//! time waited for them are bounded; a new byte resets both, but the sum over one document or blob
//! stays bounded too, so that a server which sends one byte per connection comes to an end.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    time::{Duration, SystemTime},
};

use super::config::RegistryConfig;
use crate::tier::SourceError;

/// First wait; each further one is twice as long, up to the configured longest.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);

/// Longest `Retry-After` that is waited for; the caller hears about longer ones at once.
///
/// Half of what kubelet gives a volume to be mounted.
pub(crate) const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Failures of one document or blob in all, progress or not.
///
/// A layer of 5 GB over a link that breaks every 100 MB still arrives.
const MAX_FAILURES: u32 = 64;

/// A failed attempt.
#[derive(Debug)]
pub(crate) struct Failure {
    /// What happened.
    pub(crate) error: SourceError,
    /// How long the registry asked to wait.
    pub(crate) retry_after: Option<Duration>,
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Self {
        Self {
            error,
            retry_after: None,
        }
    }
}

/// The failures of one document or blob so far.
#[derive(Debug)]
pub(crate) struct Retry {
    retries: u32,
    max_backoff: Duration,
    max_wait: Duration,
    failures_in_a_row: u32,
    failures: u32,
    waited: Duration,
}

impl Retry {
    pub(crate) fn new(config: &RegistryConfig) -> Self {
        Self {
            retries: config.retries,
            max_backoff: Duration::from_secs(config.max_backoff_seconds),
            max_wait: Duration::from_secs(config.max_wait_seconds),
            failures_in_a_row: 0,
            failures: 0,
            waited: Duration::ZERO,
        }
    }

    /// Takes note that new bytes came.
    pub(crate) fn progressed(&mut self) {
        self.failures_in_a_row = 0;
        self.waited = Duration::ZERO;
    }

    /// Waits until the next attempt, or returns the failure's error if there is to be none.
    pub(crate) async fn wait(&mut self, failure: Failure) -> Result<(), SourceError> {
        let entropy = RandomState::new().build_hasher().finish();
        match self.next(&failure, entropy) {
            Some(wait) => {
                tracing::debug!(error = %failure.error, ?wait, "registry request failed, trying again");
                tokio::time::sleep(wait).await;
                Ok(())
            }
            None => Err(failure.error),
        }
    }

    /// Returns how long to wait before the next attempt, `None` if there is to be none.
    fn next(&mut self, failure: &Failure, entropy: u64) -> Option<Duration> {
        self.failures += 1;
        self.failures_in_a_row += 1;
        if !failure.error.is_transient()
            || self.retries < self.failures_in_a_row
            || MAX_FAILURES < self.failures
        {
            return None;
        }
        let wait = match failure.retry_after {
            Some(asked) if MAX_RETRY_AFTER < asked => return None,
            Some(asked) => asked,
            None => self.backoff(entropy),
        };
        self.waited += wait;
        (self.waited <= self.max_wait).then_some(wait)
    }

    /// Doubles with each failure; the upper half of it is random, so that nodes which failed
    /// together do not come back together.
    fn backoff(&self, entropy: u64) -> Duration {
        let doublings = (self.failures_in_a_row - 1).min(16);
        let longest = (FIRST_BACKOFF * (1 << doublings)).min(self.max_backoff);
        let half_micros = u64::try_from(longest.as_micros() / 2).unwrap_or(u64::MAX / 2);
        longest / 2 + Duration::from_micros(entropy % (half_micros + 1))
    }
}

/// Reads `Retry-After`: seconds or a date (RFC 9110, 10.2.3).
pub(crate) fn parse_retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(text).ok()?;
    Some(at.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unavailable() -> Failure {
        SourceError::Unavailable {
            registry: "h.x".to_owned(),
            reason: "down".to_owned(),
        }
        .into()
    }

    fn asks_to_wait(seconds: u64) -> Failure {
        Failure {
            retry_after: Some(Duration::from_secs(seconds)),
            ..unavailable()
        }
    }

    #[test]
    fn waits_double_up_to_the_cap_and_end() {
        let mut retry = Retry::new(&RegistryConfig {
            retries: 4,
            max_backoff_seconds: 1,
            ..RegistryConfig::default()
        });
        let waits: Vec<_> = (0..5)
            .map(|_| retry.next(&unavailable(), 0).map(|it| it.as_millis()))
            .collect();
        assert_eq!(waits, [Some(100), Some(200), Some(400), Some(500), None]);
    }

    #[test]
    fn jitter_stays_in_the_upper_half() {
        for entropy in [0, 1, 99_999, 100_000, 100_001, u64::MAX] {
            let wait = Retry::new(&RegistryConfig::default())
                .next(&unavailable(), entropy)
                .unwrap();
            assert!((100_000..=200_000).contains(&wait.as_micros()), "{wait:?}");
        }
    }

    #[test]
    fn progress_resets_the_row_but_not_the_sum() {
        let mut retry = Retry::new(&RegistryConfig {
            retries: 1,
            ..RegistryConfig::default()
        });
        let mut n_attempts = 0;
        while retry.next(&unavailable(), 0).is_some() {
            retry.progressed();
            n_attempts += 1;
        }
        assert_eq!(n_attempts, MAX_FAILURES);
    }

    #[test]
    fn retry_after_is_honoured_within_bounds() {
        let fresh = || Retry::new(&RegistryConfig::default());
        assert_eq!(fresh().next(&asks_to_wait(60), 0), Some(MAX_RETRY_AFTER));
        assert_eq!(fresh().next(&asks_to_wait(61), 0), None);
        let mut retry = fresh();
        let waits: Vec<_> = (0..3).map(|_| retry.next(&asks_to_wait(50), 0)).collect();
        assert_eq!(
            waits,
            [
                Some(Duration::from_secs(50)),
                Some(Duration::from_secs(50)),
                None
            ]
        );
    }

    #[test]
    fn final_errors_are_not_tried_again() {
        let failure = SourceError::NotFound {
            what: "image".to_owned(),
            registry: "h.x".to_owned(),
        };
        assert_eq!(
            Retry::new(&RegistryConfig::default()).next(&failure.into(), 0),
            None
        );
    }

    #[test]
    fn retry_after_is_read_as_seconds_or_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
        for (text, expected) in [
            ("7", Some(7)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0)),
            ("soon", None),
            ("-1", None),
        ] {
            let expected = expected.map(Duration::from_secs);
            assert_eq!(parse_retry_after(text, now), expected, "{text}");
        }
    }
}
