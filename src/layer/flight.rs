//! Lets one at a time work on a thing, the others wait and then look again.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::OwnedMutexGuard;

/// One lock per key, there only while somebody holds or awaits it.
///
/// Whoever gets the lock must look again whether the work is still to do: the one before may have
/// done it. If the one before was cancelled, the next one simply does the work.
#[derive(Debug)]
pub(super) struct Flights<K> {
    /// std Mutex: held for a map operation, never across an await.
    locks: Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>,
}

impl<K> Default for Flights<K> {
    fn default() -> Self {
        Self {
            locks: Mutex::default(),
        }
    }
}

/// Holds the lock of one key.
#[derive(Debug)]
pub(super) struct Flight<'a, K: Eq + Hash> {
    flights: &'a Flights<K>,
    key: K,
    guard: Option<OwnedMutexGuard<()>>,
    /// Whether somebody else was at work before.
    pub(super) followed: bool,
}

impl<K: Eq + Hash + Clone> Flights<K> {
    /// Waits for the lock of `key`.
    pub(super) async fn join(&self, key: K) -> Flight<'_, K> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(locks.entry(key.clone()).or_default())
        };
        let (guard, followed) = match Arc::clone(&lock).try_lock_owned() {
            Ok(guard) => (guard, false),
            Err(_) => (lock.lock_owned().await, true),
        };
        Flight {
            flights: self,
            key,
            guard: Some(guard),
            followed,
        }
    }
}

impl<K: Eq + Hash + Clone> Flights<K> {
    /// Takes the lock of `key`, unless somebody has it.
    pub(super) fn try_join(&self, key: K) -> Option<Flight<'_, K>> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(locks.entry(key.clone()).or_default())
        };
        // Whoever has it, or had it just now, removes the entry.
        let guard = lock.try_lock_owned().ok()?;
        Some(Flight {
            flights: self,
            key,
            guard: Some(guard),
            followed: false,
        })
    }
}

impl<K: Eq + Hash> Drop for Flight<'_, K> {
    fn drop(&mut self) {
        let mut locks = self
            .flights
            .locks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.guard = None;
        // One reference in the map: nobody holds or awaits the lock, and nobody can begin to
        // while the map is locked.
        if locks
            .get(&self.key)
            .is_some_and(|it| Arc::strong_count(it) == 1)
        {
            locks.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn one_works_the_others_follow_and_nothing_stays() {
        let flights = Flights::<u32>::default();
        let (done, worked) = (AtomicU32::new(0), AtomicU32::new(0));
        let one = || async {
            let flight = flights.join(1).await;
            tokio::task::yield_now().await;
            if done.swap(1, Ordering::SeqCst) == 0 {
                worked.fetch_add(1, Ordering::SeqCst);
            }
            flight.followed
        };
        let (a, b, c) = tokio::join!(one(), one(), one());
        assert_eq!((a, b, c), (false, true, true));
        assert_eq!(worked.load(Ordering::SeqCst), 1);
        assert!(flights.locks.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_cancelled_leader_hands_over() {
        let flights = Flights::<u32>::default();
        let leader = flights.join(1).await;
        let follower = flights.join(1);
        drop(leader);
        assert!(!follower.await.followed);
        assert!(flights.locks.lock().unwrap().is_empty());
    }
}
