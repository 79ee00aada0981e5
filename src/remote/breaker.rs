//! Decides whether a remote that failed is asked again: pure logic, the time is an argument.
//!
//! ```text
//!          failed                      time is up
//!   Up ───────────────► Down(until) ───────────────► Probing
//!    ▲                    ▲   ▲                       │ │ │
//!    └── probe succeeded ─┼───┼───────────────────────┘ │ │
//!                         └───┼── probe failed, longer ─┘ │
//!                             └── probe abandoned ────────┘
//! ```
//! One failure is enough: each further one would cost a reader another timeout. While one caller
//! probes, all others are told to wait.

use std::time::Duration;

/// How long a failed remote is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackOff {
    /// After the first failure, at most; half of it at least.
    pub first: Duration,
    /// After many failures, at most.
    pub longest: Duration,
}

impl Default for BackOff {
    /// One second, doubled up to one minute: a restarted Redis is noticed soon, and a dead one
    /// costs one reader per minute one timeout.
    fn default() -> Self {
        Self {
            first: Duration::from_secs(1),
            longest: Duration::from_secs(60),
        }
    }
}

impl BackOff {
    /// Returns the wait after `failures` failures in a row, jittered by `random` to between half
    /// and all of the step, so that nodes that lost one remote together do not return together.
    fn wait(&self, failures: u32, random: u64) -> Duration {
        let doubled = 2u32.saturating_pow(failures.saturating_sub(1).min(31));
        let step = self.first.saturating_mul(doubled).min(self.longest);
        let permille = u32::try_from(500 + random % 501).unwrap_or(1000);
        step / 1000 * permille
    }
}

/// Says whether a request may go to the remote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Admission {
    /// The remote is up.
    Pass,
    /// The remote was down; this request finds out whether it still is.
    Probe,
    /// Do not ask; try again after this time.
    Wait(Duration),
}

/// What a reported result changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing that anybody need know.
    None,
    /// The remote is skipped from now on.
    WentDown,
    /// The remote is asked again.
    CameUp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Up,
    Down { until: Duration },
    Probing,
}

/// The state of one remote, or of one way of using it.
#[derive(Debug)]
pub(super) struct Breaker {
    back_off: BackOff,
    state: State,
    /// Failures in a row: the first opens the breaker, the others are probes.
    failures: u32,
}

impl Breaker {
    /// Starts with the remote presumed up, so that constructing does no I/O.
    pub(super) fn new(back_off: BackOff) -> Self {
        Self {
            back_off,
            state: State::Up,
            failures: 0,
        }
    }

    /// Whether the remote is asked without a doubt.
    pub(super) fn is_up(&self) -> bool {
        self.state == State::Up
    }

    /// Decides about one request. Whoever gets [`Admission::Probe`] must report how it ended.
    pub(super) fn admit(&mut self, now: Duration) -> Admission {
        match self.state {
            State::Up => Admission::Pass,
            State::Down { until } if now < until => Admission::Wait(until - now),
            State::Down { .. } => {
                self.state = State::Probing;
                Admission::Probe
            }
            State::Probing => Admission::Wait(self.back_off.first),
        }
    }

    /// Reports that the remote answered.
    ///
    /// Only a probe closes the breaker: an old request that ends well says nothing about now.
    pub(super) fn succeeded(&mut self, admission: Admission) -> Change {
        match (admission, self.state) {
            (Admission::Probe, State::Probing) => {
                self.state = State::Up;
                self.failures = 0;
                Change::CameUp
            }
            _ => Change::None,
        }
    }

    /// Reports that the remote failed.
    ///
    /// Of many requests that were in flight when it went down, the first one counts.
    pub(super) fn failed(&mut self, admission: Admission, now: Duration, random: u64) -> Change {
        let change = match (admission, self.state) {
            (Admission::Pass, State::Up) => Change::WentDown,
            (Admission::Probe, State::Probing) => Change::None,
            _ => return Change::None,
        };
        self.failures = self.failures.saturating_add(1);
        let until = now + self.back_off.wait(self.failures, random);
        self.state = State::Down { until };
        change
    }

    /// Reports that a request was given up without a result; the next one may probe at once.
    pub(super) fn abandoned(&mut self, admission: Admission, now: Duration) {
        if admission == Admission::Probe && self.state == State::Probing {
            self.state = State::Down { until: now };
        }
    }

    /// Opens the breaker for a fixed time, whatever its state.
    pub(super) fn hold(&mut self, until: Duration) -> Change {
        let was_up = self.state == State::Up;
        self.state = State::Down { until };
        match was_up {
            true => Change::WentDown,
            false => Change::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    /// The largest jitter: the whole step.
    const LATEST: u64 = 500;

    fn down_after(failures: u32) -> (Breaker, Duration) {
        let mut breaker = Breaker::new(BackOff::default());
        let mut now = S;
        breaker.admit(now);
        breaker.failed(Admission::Pass, now, LATEST);
        for _ in 1..failures {
            now += 61 * S;
            assert_eq!(breaker.admit(now), Admission::Probe);
            breaker.failed(Admission::Probe, now, LATEST);
        }
        (breaker, now)
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        for (failures, expected) in [
            (1, 1),
            (2, 2),
            (3, 4),
            (4, 8),
            (6, 32),
            (7, 60),
            (8, 60),
            (100, 60),
            (u32::MAX, 60),
        ] {
            let (back_off, expected) = (BackOff::default(), expected * S);
            assert_eq!(back_off.wait(failures, LATEST), expected, "{failures}");
            assert_eq!(back_off.wait(failures, 0), expected / 2, "{failures}");
            let wait = back_off.wait(failures, u64::MAX);
            assert!(expected / 2 <= wait && wait <= expected, "{failures}");
        }
    }

    #[test]
    fn one_failure_opens_and_the_time_is_counted_from_it() {
        let (mut breaker, now) = down_after(1);
        assert_eq!(breaker.admit(now), Admission::Wait(S));
        assert_eq!(breaker.admit(now + S / 4), Admission::Wait(3 * S / 4));
        assert_eq!(breaker.admit(now + S), Admission::Probe);
    }

    #[test]
    fn only_one_probes_at_a_time() {
        let (mut breaker, now) = down_after(1);
        assert_eq!(breaker.admit(now + S), Admission::Probe);
        assert_eq!(breaker.admit(now + S), Admission::Wait(S));
        assert_eq!(breaker.admit(now + 100 * S), Admission::Wait(S));
    }

    #[test]
    fn a_probe_closes_or_lengthens() {
        let (mut breaker, now) = down_after(3);
        let now = now + 4 * S;
        assert_eq!(breaker.admit(now), Admission::Probe);
        assert_eq!(
            breaker.failed(Admission::Probe, now, LATEST),
            Change::None,
            "it was down already"
        );
        assert_eq!(breaker.admit(now), Admission::Wait(8 * S));
        assert_eq!(breaker.admit(now + 8 * S), Admission::Probe);
        assert_eq!(breaker.succeeded(Admission::Probe), Change::CameUp);
        assert_eq!(breaker.admit(now + 8 * S), Admission::Pass);
        let now = now + 9 * S;
        let change = breaker.failed(Admission::Pass, now, LATEST);
        assert_eq!(change, Change::WentDown);
        assert_eq!(breaker.admit(now), Admission::Wait(S), "back-off restarts");
    }

    #[test]
    fn requests_that_were_in_flight_change_nothing() {
        let (mut breaker, now) = down_after(1);
        let late = breaker.failed(Admission::Pass, now, LATEST);
        assert_eq!(late, Change::None);
        assert_eq!(breaker.admit(now), Admission::Wait(S), "not doubled");
        assert_eq!(breaker.succeeded(Admission::Pass), Change::None);
        assert_eq!(breaker.admit(now), Admission::Wait(S), "not closed");
    }

    #[test]
    fn an_abandoned_probe_leaves_the_place_to_the_next() {
        let (mut breaker, now) = down_after(1);
        assert_eq!(breaker.admit(now + S), Admission::Probe);
        breaker.abandoned(Admission::Probe, now + S);
        assert_eq!(breaker.admit(now + S), Admission::Probe);
        let mut up = Breaker::new(BackOff::default());
        up.abandoned(Admission::Pass, now);
        assert_eq!(up.admit(now), Admission::Pass);
    }

    #[test]
    fn a_hold_lasts_as_long_as_it_says() {
        let mut breaker = Breaker::new(BackOff::default());
        assert_eq!(breaker.hold(60 * S), Change::WentDown);
        assert_eq!(breaker.hold(60 * S), Change::None);
        assert_eq!(breaker.admit(S), Admission::Wait(59 * S));
        assert_eq!(breaker.admit(60 * S), Admission::Probe);
    }
}
