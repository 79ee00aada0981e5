//! Decides when a read that takes long is asked for a second time (a hedge): pure logic.
//!
//! A connection may stall for long where another one does not: a packet was lost, or the server that it
//! leads to is busy. What a reader waits for twice as long as all but one in twenty such reads took is asked
//! for on another connection as well, and whichever answer comes first is taken. One in twenty is also what
//! it may cost: a store that is slow altogether gets hardly more to do. So it is twice as long: else what is
//! merely one of the slower ones would cost just that, and nothing would be left when connections stall.

use std::time::Duration;

/// Reads whose times are remembered: some seconds of a busy node.
const REMEMBERED: usize = 256;

/// Reads that must have been seen before anything is known of what is usual.
const LEAST_SEEN: usize = 32;

/// Share of reads that take as long as is usual, or less, in percent.
const PERCENTILE: usize = 95;

/// What is waited for at least: below, another request costs both sides more than it saves the reader.
const LEAST_WAIT: Duration = Duration::from_millis(10);

/// Reads that earn one hedge.
const READS_PER_HEDGE: u32 = 20;

/// Hedges that are saved up, at most: for so many readers of one connection that stalls.
const MOST_SAVED: u32 = 5;

/// How long reads took lately, and how many may be asked for again.
#[derive(Debug)]
pub(super) struct Hedging {
    /// The latest times, in no order.
    times: Vec<Duration>,
    oldest: usize,
    /// Reads that no hedge was taken for yet.
    saved: u32,
}

impl Hedging {
    pub(super) fn new() -> Self {
        Self {
            times: Vec::with_capacity(REMEMBERED),
            oldest: 0,
            saved: 0,
        }
    }

    /// Hears how long a read took.
    pub(super) fn note(&mut self, took: Duration) {
        self.saved = (self.saved + 1).min(MOST_SAVED * READS_PER_HEDGE);
        if self.times.len() < REMEMBERED {
            self.times.push(took);
        } else {
            self.times[self.oldest] = took;
            self.oldest = (self.oldest + 1) % REMEMBERED;
        }
    }

    /// How long a read is waited for before it is asked for again; `None` if too little is known.
    pub(super) fn wait(&self) -> Option<Duration> {
        if self.times.len() < LEAST_SEEN {
            return None;
        }
        let mut times = self.times.clone();
        let at = times.len() * PERCENTILE / 100;
        let (_, usual, _) = times.select_nth_unstable(at);
        Some((2 * *usual).max(LEAST_WAIT))
    }

    /// Takes the right to ask for one read again.
    pub(super) fn spend(&mut self) -> bool {
        match self.saved.checked_sub(READS_PER_HEDGE) {
            Some(left) => {
                self.saved = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn twice_what_all_but_one_in_twenty_take_is_waited_for() {
        let mut hedging = Hedging::new();
        for n in 0..31 {
            hedging.note(ms(n));
            assert_eq!(hedging.wait(), None, "after {n}");
        }
        hedging.note(ms(31));
        assert_eq!(hedging.wait(), Some(ms(60)));
        // In any order, and by the latest alone.
        for n in (0..1000).map(|it| it * 7 % 100) {
            hedging.note(ms(n));
        }
        let wait = hedging.wait().unwrap();
        assert!(ms(186) <= wait && wait <= ms(192), "{wait:?}");
        for _ in 0..REMEMBERED {
            hedging.note(ms(1));
        }
        assert_eq!(hedging.wait(), Some(LEAST_WAIT), "it is never less");
        assert_eq!(hedging.times.len(), REMEMBERED);
    }

    #[test]
    fn one_read_in_twenty_may_be_asked_for_again() {
        let mut hedging = Hedging::new();
        assert!(!hedging.spend());
        let n_hedges = (0..1000).filter(|_| {
            hedging.note(ms(1));
            hedging.spend()
        });
        assert_eq!(n_hedges.count(), 50);
        (0..1000).for_each(|_| hedging.note(ms(1)));
        let n_saved = std::iter::from_fn(|| hedging.spend().then_some(())).count();
        assert_eq!(n_saved, 5);
    }
}
