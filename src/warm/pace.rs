//! Bounds how many bytes per second are warmed, over all that goes on at once.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep_until};

/// A bound on bytes per second, shared by all that is warmed in a process.
///
/// Each request for bytes gets the next free time, however many wait; an idle time saves nothing up.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    /// When the bytes that were given leave so far will have come.
    ///
    /// std Mutex: held to read and set it, never across an await.
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    /// Lets so many bytes pass in a second; 0: any number.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            free_at: Mutex::default(),
        }
    }

    /// Waits until `bytes` more may come.
    ///
    /// # Cancellation
    /// Safe; the time that was given is lost.
    pub async fn take(&self, bytes: u64) {
        let Some(takes) = self.time_of(bytes) else {
            return;
        };
        let begin = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let begin = free_at.map_or(now, |it| it.max(now));
            *free_at = begin.checked_add(takes);
            begin
        };
        sleep_until(begin).await;
    }

    /// How long so many bytes take; `None` if that is not bounded.
    fn time_of(&self, bytes: u64) -> Option<Duration> {
        let nanos = u128::from(bytes) * 1_000_000_000;
        let nanos = nanos.checked_div(u128::from(self.bytes_per_second))?;
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn bytes_come_at_their_pace_however_many_ask() {
        let pace = Pace::new(10_000_000);
        let started = Instant::now();
        join_all((0..50).map(|_| pace.take(1_000_000))).await;
        // The last one begins when the others have come.
        assert_eq!(started.elapsed(), Duration::from_millis(4900));
        // What is not used is not saved up.
        tokio::time::sleep(Duration::from_secs(60)).await;
        let started = Instant::now();
        for _ in 0..3 {
            pace.take(1_000_000).await;
        }
        assert_eq!(started.elapsed(), Duration::from_millis(200));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_bound_nobody_waits() {
        let pace = Pace::new(0);
        let started = Instant::now();
        for _ in 0..1000 {
            pace.take(u64::MAX).await;
        }
        assert_eq!(started.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_was_given_up_leaves_the_bound_as_it_is() {
        let pace = Pace::new(1_000);
        pace.take(10_000).await;
        let given_up = tokio::time::timeout(Duration::from_secs(1), pace.take(5_000));
        assert!(given_up.await.is_err());
        let started = Instant::now();
        pace.take(1).await;
        assert_eq!(started.elapsed(), Duration::from_secs(14));
    }
}
