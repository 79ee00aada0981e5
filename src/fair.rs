//! Who comes next to what is scarce: everybody who claims it in turn, however much each one wants.
//!
//! [`RoundRobin`] is the order among claimants that are equal. [`Turns`] is a semaphore for tasks that
//! keeps it, and lets those pass that nobody waits for.

mod turns;

pub use turns::{Turn, Turns};

use std::collections::VecDeque;

/// On whose behalf something is fetched or decompressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Claimant {
    /// The readers of one mount, which all together are one claimant; the number is its own.
    Mount(u64),
    /// Those who make images ready to be mounted, all together: where the remote content cache is asked.
    Publish,
    /// Who makes one image ready, and whoever waits for a stream of its layers: where layers are decompressed. The
    /// number is its own.
    Image(u64),
    /// Nobody yet: what is fetched ahead, warmed, uploaded.
    Background,
}

/// A queue that serves those who stand in it in turn, and what each one wants in its order.
///
/// Whoever comes waits for at most one item of each of the others, and for its own before it.
#[derive(Debug)]
pub struct RoundRobin<K, T> {
    /// Who waits, the next one first; nobody's items are none.
    ring: VecDeque<(K, VecDeque<T>)>,
}

impl<K, T> Default for RoundRobin<K, T> {
    fn default() -> Self {
        Self {
            ring: VecDeque::new(),
        }
    }
}

impl<K: PartialEq, T> RoundRobin<K, T> {
    /// Adds what `who` wants, behind what it wants already.
    pub fn push(&mut self, who: K, item: T) {
        match self.ring.iter_mut().find(|it| it.0 == who) {
            Some((_, items)) => items.push_back(item),
            None => self.ring.push_back((who, VecDeque::from([item]))),
        }
    }

    /// What comes next.
    pub fn peek(&self) -> Option<&T> {
        self.ring.front()?.1.front()
    }

    /// Takes what comes next; whose it was goes to the end.
    pub fn pop(&mut self) -> Option<T> {
        let (who, mut items) = self.ring.pop_front()?;
        let item = items.pop_front();
        if !items.is_empty() {
            self.ring.push_back((who, items));
        }
        item
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.ring.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_item_of_each_and_then_the_next() {
        let mut queue = RoundRobin::default();
        assert_eq!(
            (queue.pop(), queue.peek(), queue.is_empty()),
            (None, None, true)
        );
        for item in ["a1", "a2", "a3"] {
            queue.push('a', item);
        }
        queue.push('b', "b1");
        assert_eq!(queue.pop(), Some("a1"));
        // Behind b, and then behind a.
        queue.push('c', "c1");
        queue.push('b', "b2");
        assert_eq!((queue.peek(), queue.is_empty()), (Some(&"b1"), false));
        let rest: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(rest, ["b1", "a2", "c1", "b2", "a3"]);
        assert!(queue.is_empty());
    }

    #[test]
    fn who_wants_one_waits_for_one_of_each_other() {
        let mut queue = RoundRobin::default();
        for mount in 0..10 {
            for n in 0..64 {
                queue.push(mount, (mount, n));
            }
        }
        queue.push(10, (10, 0));
        let before = std::iter::from_fn(|| queue.pop()).take_while(|it| it.0 != 10);
        assert_eq!(before.count(), 10);
    }
}
