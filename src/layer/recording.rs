//! Notes which chunks of an image are wanted first, and in which order: for a while, and up to a bound.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::index::profile::{MAX_TOUCHES, Profile, Touch};

/// How long is recorded, from the first touch on: a program has started by then, and what it does later
/// depends on what it is asked to do.
const WINDOW: Duration = Duration::from_secs(60);

/// What is wanted of one image, until it is over.
#[derive(Debug, Default)]
pub(super) struct Recording {
    /// std Mutex: held for a few operations on its parts, never across an await.
    state: Mutex<State>,
    /// Told when it has begun, and when it is over.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    is_over: bool,
    /// Known from the first touch on.
    ends: Option<Instant>,
    order: Vec<Touch>,
    seen: HashSet<Touch>,
}

impl Recording {
    /// Notes that a chunk was wanted at `now`, if it was not before.
    pub(super) fn touch(&self, touch: Touch, now: Instant) {
        let mut state = self.state();
        if state.is_over {
            return;
        }
        let is_first = state.ends.is_none();
        let ends = *state.ends.get_or_insert(now + WINDOW);
        if ends <= now {
            state.is_over = true;
        } else if state.seen.insert(touch) {
            state.order.push(touch);
            state.is_over = MAX_TOUCHES <= state.order.len();
        }
        if is_first || state.is_over {
            self.changed.notify_one();
        }
    }

    /// Waits until it is over. For one caller.
    ///
    /// # Cancellation
    /// Safe.
    pub(super) async fn over(&self) {
        loop {
            let ends = {
                let mut state = self.state();
                state.is_over |= state.ends.is_some_and(|it| it <= Instant::now());
                if state.is_over {
                    return;
                }
                state.ends
            };
            match ends {
                None => self.changed.notified().await,
                Some(ends) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep_until(ends) => {}
                },
            }
        }
    }

    /// Ends it, and gives what was noted, which is all there is if it was over already.
    pub(super) fn end(&self) -> Profile {
        let mut state = self.state();
        let is_whole = std::mem::replace(&mut state.is_over, true);
        state.seen = HashSet::new();
        Profile {
            touches: std::mem::take(&mut state.order),
            is_whole,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn touch(chunk: u32) -> Touch {
        Touch { layer: 0, chunk }
    }

    #[tokio::test]
    async fn what_is_wanted_is_noted_once_and_in_order_until_the_window_closes() {
        let recording = Recording::default();
        let now = Instant::now();
        for chunk in [7, 2, 7, 3, 2] {
            recording.touch(touch(chunk), now);
        }
        let just_in_time = now + WINDOW - Duration::from_millis(1);
        recording.touch(touch(9), just_in_time);
        recording.touch(touch(10), now + WINDOW);
        // Once closed, it stays so.
        recording.touch(touch(11), now);
        recording.over().await;
        let noted = Profile {
            touches: [7, 2, 3, 9].map(touch).to_vec(),
            is_whole: true,
        };
        assert_eq!(recording.end(), noted);
        assert_eq!(recording.end().touches, []);
    }

    #[tokio::test]
    async fn what_ends_early_is_not_all() {
        let recording = Recording::default();
        recording.touch(touch(1), Instant::now());
        let noted = Profile {
            touches: vec![touch(1)],
            is_whole: false,
        };
        assert_eq!(recording.end(), noted);
        recording.touch(touch(2), Instant::now());
        assert_eq!(recording.end().touches, []);
    }

    #[tokio::test]
    async fn it_waits_for_the_first_touch_and_then_for_its_time() {
        let recording = Recording::default();
        assert_eq!(recording.over().now_or_never(), None, "nothing was wanted");
        // As if it had been wanted some time ago.
        let left = Duration::from_millis(20);
        let began = Instant::now();
        let first = began.checked_sub(WINDOW - left).unwrap();
        recording.touch(touch(0), first);
        assert_eq!(
            recording.over().now_or_never(),
            None,
            "it has some time left"
        );
        recording.over().await;
        assert!(left <= began.elapsed());
        assert!(recording.end().is_whole);
    }

    #[tokio::test]
    async fn it_is_over_when_it_is_full() {
        let recording = Recording::default();
        let began = Instant::now();
        let most = u32::try_from(MAX_TOUCHES).unwrap();
        for chunk in 0..most + 10 {
            recording.touch(touch(chunk), began);
        }
        assert_eq!(recording.over().now_or_never(), Some(()));
        let order = recording.end().touches;
        assert_eq!(order.len(), MAX_TOUCHES);
        assert_eq!(order.last(), Some(&touch(most - 1)));
    }
}
