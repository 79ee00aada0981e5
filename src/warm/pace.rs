//! Bounds how many bytes per second are warmed, over all that goes on at once.

use std::{
    sync::{Arc, Mutex, PoisonError},
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
    /// Another bound, which holds as well.
    above: Option<Arc<Self>>,
}

impl Pace {
    /// Lets so many bytes pass in a second; 0: any number.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            free_at: Mutex::default(),
            above: None,
        }
    }

    /// Lets so many bytes pass in a second, 0: any number, and no more than `above` does.
    pub fn within(above: &Arc<Self>, bytes_per_second: u64) -> Self {
        Self {
            above: Some(Arc::clone(above)),
            ..Self::new(bytes_per_second)
        }
    }

    /// Waits until `bytes` more may come.
    ///
    /// # Cancellation
    /// Safe; the time that was given is lost.
    pub async fn take(&self, bytes: u64) {
        if let Some(begin) = self.claim(bytes, Instant::now()) {
            sleep_until(begin).await;
        }
    }

    /// When `bytes` more may begin to come; `None`: whenever they like.
    fn claim(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let above = self.above.as_ref().and_then(|it| it.claim(bytes, now));
        let own = self.claim_own(bytes, now);
        own.into_iter().chain(above).max()
    }

    fn claim_own(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let nanos = u128::from(bytes) * 1_000_000_000;
        let nanos = nanos.checked_div(u128::from(self.bytes_per_second))?;
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = free_at.map_or(now, |it| it.max(now));
        *free_at = begin.checked_add(takes);
        Some(begin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_at_their_pace_however_many_ask() {
        let pace = Pace::new(10_000_000);
        let now = Instant::now();
        let millis = Duration::from_millis;
        for number in 0..50 {
            // The last one begins when the others have come.
            let begin = pace.claim(1_000_000, now).unwrap();
            assert_eq!(begin - now, millis(100 * number));
        }
        // What is not used is not saved up.
        let later = now + Duration::from_secs(60);
        for number in 0..3 {
            let begin = pace.claim(1_000_000, later).unwrap();
            assert_eq!(begin - later, millis(100 * number));
        }
    }

    #[tokio::test]
    async fn without_a_bound_nobody_waits() {
        let pace = Pace::new(0);
        for _ in 0..1000 {
            assert_eq!(pace.claim(u64::MAX, Instant::now()), None);
        }
        pace.take(u64::MAX).await;
        // What would take for ever is no overflow.
        let slow = Pace::new(1);
        slow.take(u64::MAX).await;
        assert!(slow.claim(u64::MAX, Instant::now()).is_some());
    }

    #[test]
    fn of_two_bounds_both_hold() {
        let above = Arc::new(Pace::new(10_000_000));
        let slow = Pace::within(&above, 1_000_000);
        let any = Pace::within(&above, 0);
        let now = Instant::now();
        let millis = |begin: Option<Instant>| begin.map(|it| (it - now).as_millis());
        assert_eq!(millis(slow.claim(1_000_000, now)), Some(0));
        assert_eq!(millis(slow.claim(1_000_000, now)), Some(1000));
        // What the slow one takes counts for all.
        assert_eq!(millis(any.claim(1_000_000, now)), Some(200));
        assert_eq!(millis(slow.claim(1_000_000, now)), Some(2000));
    }
}
