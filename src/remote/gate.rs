//! Stands before the engine: admits, bounds, measures, and skips a remote that is down.
//!
//! Every request of readers and of the uploader goes through one [`Gate`]. It holds two breakers:
//! *reach*, whether the remote answers at all, and *write*, whether it takes values (a full or
//! read-only store still serves its readers).
//!
//! A request costs: the wait for one of [`PAYLOADS_IN_FLIGHT`] turns, which go round among mounts, then at
//! most the engine's timeout. Who waited for a turn while the remote went down is turned away without a
//! timeout.

mod again;
mod run;

pub(super) use run::Run;

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use tracing::{debug, info, warn};

use crate::{
    clock::Clock,
    fair::{Claimant, Turn, Turns},
    metrics::{Metrics, Outcome},
    tier::{CacheKey, LayerCache, LeaseHolder, Put, TierError},
};

use super::{
    breaker::{Admission, BackOff, Breaker, Change},
    format::FormatError,
    hedge::Hedging,
};

/// Requests that may hold a value in memory at the same time.
///
/// Each is held once, and once more while it is decompressed; in a cluster three times, because redis-rs copies whole replies.
/// Measured with redis-rs and 1 MiB values: 8.5 MiB resident with one in flight, 14.7 MiB with four, at the same throughput.
const PAYLOADS_IN_FLIGHT: usize = 2;

/// How long nothing is written to a store that said it is full.
///
/// A store without eviction stays full until somebody acts; one that evicts has room by then.
const FULL_HOLD: Duration = Duration::from_secs(60);

/// Bytes for which an engine's timeout is meant; larger values get more time, in proportion.
const BYTES_PER_TIMEOUT: usize = 4 << 20;

/// Returns the time that a transfer of `bytes` may take, if a chunk may take `timeout`.
pub(super) fn time_for(timeout: Duration, bytes: usize) -> Duration {
    let times = u32::try_from(bytes / BYTES_PER_TIMEOUT).unwrap_or(u32::MAX - 1);
    timeout.saturating_mul(1 + times)
}

/// Says why a request brought nothing.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The remote is skipped; ask again after this time.
    Skipped(Duration),
    /// The engine failed.
    Failed(TierError),
    /// What the store has is wrong.
    Wrong(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Op {
    Get,
    Put,
    Delete,
    Lease,
    Release,
}

impl Op {
    const fn label(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::Delete => "delete",
            Self::Lease => "lease",
            Self::Release => "release",
        }
    }
}

#[derive(Debug)]
struct Health {
    reach: Breaker,
    write: Breaker,
    down_since: Duration,
}

/// The one way to the engine.
#[derive(Debug)]
pub(super) struct Gate {
    backend: Arc<dyn LayerCache>,
    metrics: Metrics,
    clock: Arc<dyn Clock>,
    /// std Mutex: held for a decision, never across an await.
    health: Mutex<Health>,
    payloads: Turns,
    /// The right to ask again for a value that does not come: one at a time, because that may be one value
    /// more in memory.
    again: Turns,
    /// std Mutex: held for a decision, never across an await.
    hedging: Mutex<Hedging>,
}

/// What comes of a request for a value.
type Got = Result<Option<Bytes>, TierError>;

/// One admitted request; reports to the breakers how it ended, also when it is cancelled.
struct Ticket<'a> {
    gate: &'a Gate,
    op: Op,
    reach: Admission,
    write: Admission,
    started: Duration,
    reported: bool,
}

impl Gate {
    pub(super) fn new(
        backend: Arc<dyn LayerCache>,
        back_off: BackOff,
        metrics: Metrics,
        clock: Arc<dyn Clock>,
    ) -> Self {
        metrics.remote_up.set(1);
        Self {
            backend,
            metrics,
            clock,
            health: Mutex::new(Health {
                reach: Breaker::new(back_off),
                write: Breaker::new(back_off),
                down_since: Duration::ZERO,
            }),
            payloads: Turns::new(PAYLOADS_IN_FLIGHT),
            again: Turns::new(1),
            hedging: Mutex::new(Hedging::new()),
        }
    }

    pub(super) fn engine(&self) -> &'static str {
        self.backend.engine()
    }

    /// Fetches a value and returns what `verify` makes of it, on the blocking pool.
    pub(super) async fn get<T: Send + 'static>(
        &self,
        who: Claimant,
        key: CacheKey,
        max_bytes: usize,
        verify: impl FnOnce(Bytes) -> Result<T, FormatError> + Send + 'static,
    ) -> Result<Option<T>, Refusal> {
        let turn = self.payloads.take(who).await;
        let ticket = self.admit(Op::Get)?;
        let started = ticket.started;
        let asked = self.backend.get(key, max_bytes);
        let got = match self.hedges(who, &ticket) {
            None => asked.await,
            Some(wait) => {
                let got = self.hedged(asked, wait, who, key, max_bytes).await.0;
                self.note(started, &got);
                got
            }
        };
        self.received(ticket, started, got, turn, verify).await
    }

    /// Takes what came of a request for a value.
    async fn received<T: Send + 'static>(
        &self,
        ticket: Ticket<'_>,
        started: Duration,
        got: Got,
        turn: Turn,
        verify: impl FnOnce(Bytes) -> Result<T, FormatError> + Send + 'static,
    ) -> Result<Option<T>, Refusal> {
        ticket.report(got.as_ref().err());
        let result = match got {
            Ok(None) => Ok(None),
            Ok(Some(value)) => verified(value, turn, verify).await.map(Some),
            Err(error @ TierError::Corrupt { .. }) => Err(Refusal::Wrong(error.to_string())),
            Err(error) => Err(Refusal::Failed(error)),
        };
        let outcome = match &result {
            Ok(Some(_)) => Outcome::Hit,
            Ok(None) => Outcome::Miss,
            Err(_) => Outcome::Error,
        };
        self.count(Op::Get, started, outcome);
        result
    }

    /// Whether there is a value, without fetching it.
    ///
    /// A request for no more than 0 bytes is refused by the engine if there is a value.
    pub(super) async fn has(&self, key: CacheKey) -> Result<bool, Refusal> {
        let ticket = self.admit(Op::Get)?;
        let started = ticket.started;
        let got = self.backend.get(key, 0).await;
        ticket.report(got.as_ref().err());
        let result = match got {
            Ok(None) => Ok(false),
            Ok(Some(_)) | Err(TierError::Corrupt { .. }) => Ok(true),
            Err(error) => Err(Refusal::Failed(error)),
        };
        let outcome = match result {
            Ok(true) => Outcome::Hit,
            Ok(false) => Outcome::Miss,
            Err(_) => Outcome::Error,
        };
        self.count(Op::Get, started, outcome);
        result
    }

    pub(super) async fn put(&self, key: CacheKey, value: Bytes, put: Put) -> Result<(), Refusal> {
        // Whoever puts something has it already: nobody waits for it here.
        let _turn = self.payloads.take(Claimant::Background).await;
        let ticket = self.admit(Op::Put)?;
        let started = ticket.started;
        let done = self.backend.put(key, value, put).await;
        self.end(ticket, started, done)
    }

    pub(super) async fn delete(&self, key: CacheKey) -> Result<(), Refusal> {
        let ticket = self.admit(Op::Delete)?;
        let started = ticket.started;
        let done = self.backend.delete(key).await;
        self.end(ticket, started, done)
    }

    /// Takes or renews a lease: a hit if `holder` has it now, a miss if somebody else has.
    pub(super) async fn lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> Result<bool, Refusal> {
        let ticket = self.admit(Op::Lease)?;
        let started = ticket.started;
        let got = self.backend.lease(key, holder, ttl).await;
        ticket.report(got.as_ref().err());
        let outcome = match got {
            Ok(true) => Outcome::Hit,
            Ok(false) => Outcome::Miss,
            Err(_) => Outcome::Error,
        };
        self.count(Op::Lease, started, outcome);
        got.map_err(Refusal::Failed)
    }

    pub(super) async fn release(&self, key: CacheKey, holder: LeaseHolder) -> Result<(), Refusal> {
        let ticket = self.admit(Op::Release)?;
        let started = ticket.started;
        let done = self.backend.release(key, holder).await;
        self.end(ticket, started, done)
    }

    fn end(
        &self,
        ticket: Ticket<'_>,
        started: Duration,
        done: Result<(), TierError>,
    ) -> Result<(), Refusal> {
        let op = ticket.op;
        ticket.report(done.as_ref().err());
        let outcome = match done {
            Ok(()) => Outcome::Hit,
            Err(_) => Outcome::Error,
        };
        self.count(op, started, outcome);
        done.map_err(Refusal::Failed)
    }

    fn count(&self, op: Op, started: Duration, outcome: Outcome) {
        self.metrics
            .remote_requests
            .with_label_values(&[op.label(), outcome.label()])
            .inc();
        self.metrics
            .remote_request_duration
            .with_label_values(&[op.label()])
            .observe(self.clock.now().saturating_sub(started).as_secs_f64());
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        // Nothing panics with the lock held; if it did, the states would still be valid ones.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit(&self, op: Op) -> Result<Ticket<'_>, Refusal> {
        let now = self.clock.now();
        let mut health = self.health();
        let write = match op {
            Op::Put => health.write.admit(now),
            Op::Get | Op::Delete | Op::Lease | Op::Release => Admission::Pass,
        };
        if let Admission::Wait(wait) = write {
            return Err(Refusal::Skipped(wait));
        }
        let reach = health.reach.admit(now);
        if let Admission::Wait(wait) = reach {
            health.write.abandoned(write, now);
            return Err(Refusal::Skipped(wait));
        }
        Ok(Ticket {
            gate: self,
            op,
            reach,
            write,
            started: now,
            reported: false,
        })
    }
}

impl Ticket<'_> {
    /// Tells the breakers how the request ended.
    fn report(mut self, error: Option<&TierError>) {
        self.reported = true;
        let gate = self.gate;
        let now = gate.clock.now();
        let random = random();
        let engine = gate.engine();
        let mut health = gate.health();
        let unreachable = match (self.op, error) {
            (_, Some(TierError::Timeout { .. } | TierError::Unavailable { .. })) => true,
            // An engine that answers anything but a get with an error may serve its readers well.
            (Op::Get, Some(TierError::Io { .. } | TierError::Full { .. })) => true,
            _ => false,
        };
        let reach = match unreachable {
            true => health.reach.failed(self.reach, now, random),
            false => health.reach.succeeded(self.reach),
        };
        let write = match (self.op, error) {
            (Op::Put, Some(TierError::Full { .. })) => health.write.hold(now + FULL_HOLD),
            (Op::Put, Some(_)) if !unreachable => health.write.failed(self.write, now, random),
            (Op::Put, Some(_)) => {
                health.write.abandoned(self.write, now);
                Change::None
            }
            (Op::Put, None) => health.write.succeeded(self.write),
            (Op::Get | Op::Delete | Op::Lease | Op::Release, _) => Change::None,
        };
        if reach == Change::WentDown {
            health.down_since = now;
        }
        let down_for = now.saturating_sub(health.down_since);
        drop(health);
        let error = error.map(tracing::field::display);
        match reach {
            Change::WentDown => {
                gate.metrics.remote_up.set(0);
                warn!(engine, error, "remote cache is down, skipping it");
            }
            Change::CameUp => {
                gate.metrics.remote_up.set(1);
                let down_seconds = down_for.as_secs();
                info!(engine, down_seconds, "remote cache is up again");
            }
            Change::None if error.is_some() => debug!(engine, error, "remote cache failed"),
            Change::None => {}
        }
        match write {
            Change::WentDown => warn!(engine, error, "remote cache takes no data, only reading"),
            Change::CameUp => info!(engine, "remote cache takes data again"),
            Change::None => {}
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if !self.reported {
            let now = self.gate.clock.now();
            let mut health = self.gate.health();
            health.reach.abandoned(self.reach, now);
            health.write.abandoned(self.write, now);
        }
    }
}

/// Runs `verify` on the blocking pool: to decompress and hash a chunk takes about 1 ms.
async fn verified<T: Send + 'static>(
    value: Bytes,
    turn: Turn,
    verify: impl FnOnce(Bytes) -> Result<T, FormatError> + Send + 'static,
) -> Result<T, Refusal> {
    let work = tokio::task::spawn_blocking(move || {
        let result = verify(value);
        drop(turn);
        result
    });
    match work.await {
        Ok(Ok(content)) => Ok(content),
        Ok(Err(error)) => Err(Refusal::Wrong(error.to_string())),
        Err(error) => Err(Refusal::Failed(TierError::Io {
            reason: format!("verification was cut off: {error}"),
        })),
    }
}

/// A number that differs between nodes and calls: std seeds each hasher from the system.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_values_get_more_time() {
        let second = Duration::from_secs(1);
        for (bytes, seconds) in [
            (0, 1),
            (1_044_481, 1),
            (BYTES_PER_TIMEOUT - 1, 1),
            (BYTES_PER_TIMEOUT, 2),
            (512 << 20, 129),
        ] {
            assert_eq!(time_for(second, bytes), seconds * second, "{bytes}");
        }
        assert_eq!(time_for(Duration::MAX, usize::MAX), Duration::MAX);
    }
}
