//! Keeps the rate of publishes down: a token bucket.
//!
//! Kubelet starts all pods of a node at once after a reboot, which is within the burst; what goes beyond is a
//! loop somewhere, and each round of it asks a registry.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How many publishes may come at once: four for each of the 110 pods that kubelet runs by default
/// (`maxPods`), and some.
const BURST: u32 = 512;

/// A bucket of tokens: a publish takes one, and time brings new ones.
#[derive(Debug)]
pub(super) struct Rate {
    per_second: u32,
    /// std Mutex: held for a sum, never across an await.
    bucket: Mutex<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    /// How long the bucket takes to be full.
    missing: Duration,
    since: Instant,
}

impl Rate {
    /// Makes a full bucket; 0 stands for no limit.
    pub(super) fn new(per_second: u32, now: Instant) -> Self {
        Self {
            per_second,
            bucket: Mutex::new(Bucket {
                missing: Duration::ZERO,
                since: now,
            }),
        }
    }

    /// Takes a token, if there is one; the limit otherwise.
    pub(super) fn take(&self, now: Instant) -> Result<(), u32> {
        if self.per_second == 0 {
            return Ok(());
        }
        let token = Duration::from_secs(1) / self.per_second;
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(bucket.since);
        bucket.missing = bucket.missing.saturating_sub(passed);
        bucket.since = now;
        if token * (BURST - 1) < bucket.missing {
            return Err(self.per_second);
        }
        bucket.missing += token;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_then_as_many_as_the_rate_says() {
        let start = Instant::now();
        let rate = Rate::new(10, start);
        for _ in 0..BURST {
            assert_eq!(rate.take(start), Ok(()));
        }
        assert_eq!(rate.take(start), Err(10));
        let later = start + Duration::from_millis(200);
        assert_eq!(rate.take(later), Ok(()));
        assert_eq!(rate.take(later), Ok(()));
        assert_eq!(rate.take(later), Err(10));
        // A long pause fills it, and no further.
        let much_later = start + Duration::from_secs(1000);
        for _ in 0..BURST {
            assert_eq!(rate.take(much_later), Ok(()));
        }
        assert_eq!(rate.take(much_later), Err(10));
    }

    #[test]
    fn zero_is_no_limit() {
        let start = Instant::now();
        let rate = Rate::new(0, start);
        for _ in 0..10 * BURST {
            assert_eq!(rate.take(start), Ok(()));
        }
    }
}
