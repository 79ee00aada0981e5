//! A semaphore whose permits go round among claimants, before those that nobody waits for.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

use super::{Claimant, RoundRobin};

/// Of so many turns in a row that others want, one is for the background, if it waits.
///
/// Else it could wait for ever: a reader who came for a chunk that it is about to bring, with it; and
/// other nodes, for a layer that this one uploads.
const BACKGROUND_EVERY: u32 = 8;

/// A number of permits. Clones share them.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// std Mutex: held to count or to move an entry, never across an await.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// More than none only while nobody waits.
    n_free: usize,
    waiting: Waiting<oneshot::Sender<Turn>>,
}

/// One of the permits; dropped, it is the next one's.
#[derive(Debug)]
pub struct Turn {
    /// `None` if the turn has gone to somebody else.
    of: Option<Turns>,
}

/// Who waits, and how often the background was passed by since it had a turn.
#[derive(Debug)]
struct Waiting<T> {
    wanted: RoundRobin<Claimant, T>,
    background: VecDeque<T>,
    n_passed: u32,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self {
            wanted: RoundRobin::default(),
            background: VecDeque::new(),
            n_passed: 0,
        }
    }
}

impl<T> Waiting<T> {
    fn push(&mut self, who: Claimant, item: T) {
        match who {
            Claimant::Background => self.background.push_back(item),
            Claimant::Mount(_) | Claimant::Publish | Claimant::Image(_) => {
                self.wanted.push(who, item);
            }
        }
    }

    fn pop(&mut self) -> Option<T> {
        let is_due = self.wanted.is_empty() || BACKGROUND_EVERY <= self.n_passed + 1;
        if is_due && let Some(item) = self.background.pop_front() {
            self.n_passed = 0;
            return Some(item);
        }
        if !self.background.is_empty() {
            self.n_passed += 1;
        }
        self.wanted.pop()
    }
}

impl Turns {
    /// Makes so many permits, one at least.
    pub fn new(n: usize) -> Self {
        Self(Arc::new(Shared {
            state: Mutex::new(State {
                n_free: n.max(1),
                waiting: Waiting::default(),
            }),
        }))
    }

    /// Waits for a permit.
    ///
    /// # Cancellation
    /// Safe: a permit for who has gone is the next one's.
    pub async fn take(&self, who: Claimant) -> Turn {
        let granted = {
            let mut state = self.state();
            if 0 < state.n_free {
                state.n_free -= 1;
                return self.turn();
            }
            let (grant, granted) = oneshot::channel();
            state.waiting.push(who, grant);
            granted
        };
        granted
            .await
            .expect("who waits is in the queue until it has its turn")
    }

    /// Takes a permit that nobody waits for, if there is one.
    pub fn try_take(&self) -> Option<Turn> {
        let mut state = self.state();
        state.n_free = state.n_free.checked_sub(1)?;
        Some(self.turn())
    }

    fn turn(&self) -> Turn {
        Turn {
            of: Some(self.clone()),
        }
    }

    fn give_back(&self) {
        loop {
            let next = {
                let mut state = self.state();
                let next = state.waiting.pop();
                if next.is_none() {
                    state.n_free += 1;
                }
                next
            };
            match next.map(|it| it.send(self.turn())) {
                None | Some(Ok(())) => return,
                // Whoever waited has gone.
                Some(Err(mut turn)) => turn.of = None,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held; counts and queue would be right even so.
        let state = self.0.state.lock();
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(turns) = self.of.take() {
            turns.give_back();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::Pin};

    use futures_util::FutureExt;

    use super::*;

    const ONE: Claimant = Claimant::Mount(1);
    const OTHER: Claimant = Claimant::Mount(2);

    type Waiter<'a> = Pin<Box<dyn Future<Output = Turn> + 'a>>;

    /// Somebody who stands in the queue.
    fn waiter(turns: &Turns, who: Claimant) -> Waiter<'_> {
        let mut waiter = Box::pin(turns.take(who));
        assert!(waiter.as_mut().now_or_never().is_none(), "it has to wait");
        waiter
    }

    fn has(waiter: &mut Waiter<'_>) -> Option<Turn> {
        waiter.as_mut().now_or_never()
    }

    #[test]
    fn there_are_no_more_than_there_are() {
        let turns = Turns::new(2);
        let one = turns.try_take().unwrap();
        let _other = turns.take(ONE).now_or_never().unwrap();
        assert!(turns.try_take().is_none());
        let mut third = waiter(&turns, ONE);
        drop(one);
        assert!(turns.try_take().is_none(), "it is the third one's");
        let third = has(&mut third).unwrap();
        drop(third);
        assert!(turns.try_take().is_some());
    }

    #[test]
    fn sixty_four_of_one_mount_keep_another_waiting_for_one() {
        let turns = Turns::new(1);
        let held = turns.try_take().unwrap();
        let mut many: Vec<_> = (0..64).map(|_| waiter(&turns, ONE)).collect();
        let mut few = waiter(&turns, OTHER);
        drop(held);
        let first = has(&mut many[0]).unwrap();
        assert!(has(&mut few).is_none());
        drop(first);
        let _turn = has(&mut few).expect("it is the next one");
        assert!(has(&mut many[1]).is_none());
    }

    #[test]
    fn who_has_gone_is_passed_over_and_a_turn_on_its_way_is_not_lost() {
        let turns = Turns::new(1);
        let held = turns.try_take().unwrap();
        let [gone, granted] = [ONE, OTHER].map(|who| waiter(&turns, who));
        let mut last = waiter(&turns, ONE);
        drop(gone);
        // The other mount's has it, but never looks.
        drop(held);
        assert!(has(&mut last).is_none());
        drop(granted);
        assert!(has(&mut last).is_some());
    }

    #[test]
    fn the_background_goes_last_but_now_and_then_it_goes() {
        let mut waiting = Waiting::default();
        for n in 0..2 {
            waiting.push(Claimant::Background, ("background", n));
        }
        for n in 0..20 {
            waiting.push(ONE, ("wanted", n));
        }
        let order: Vec<_> = std::iter::from_fn(|| waiting.pop()).collect();
        let at = |who| order.iter().position(|it| *it == who);
        assert_eq!(at(("background", 0)), Some(7));
        assert_eq!(at(("background", 1)), Some(15));
        assert_eq!(order.len(), 22);
        // Nothing is owed for the time when it did not wait.
        waiting.push(Claimant::Background, ("background", 2));
        waiting.push(Claimant::Publish, ("wanted", 20));
        assert_eq!(waiting.pop(), Some(("wanted", 20)));
        assert_eq!(waiting.pop(), Some(("background", 2)));
    }
}
