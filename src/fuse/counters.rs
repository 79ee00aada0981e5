//! Counts requests, and says in the log what went wrong, not too often.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use prometheus::{Histogram, IntCounter};

use crate::{
    digest::DiffId,
    metrics::{Metrics, Outcome, Tier},
};

/// How long the log is silent about a subject after a warning.
const QUIET: Duration = Duration::from_secs(60);

/// Operations as the label `op` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Lookup,
    GetAttr,
    ReadLink,
    Open,
    OpenDir,
    Read,
    ReadDir,
    ReadDirPlus,
    GetXattr,
    ListXattr,
    StatFs,
    /// What is refused once and then never asked again: access, flush, fsync, lseek.
    Other,
}

impl Op {
    /// In the order of their discriminants.
    const ALL: [Self; 12] = [
        Self::Lookup,
        Self::GetAttr,
        Self::ReadLink,
        Self::Open,
        Self::OpenDir,
        Self::Read,
        Self::ReadDir,
        Self::ReadDirPlus,
        Self::GetXattr,
        Self::ListXattr,
        Self::StatFs,
        Self::Other,
    ];

    const fn label(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::GetAttr => "getattr",
            Self::ReadLink => "readlink",
            Self::Open => "open",
            Self::OpenDir => "opendir",
            Self::Read => "read",
            Self::ReadDir => "readdir",
            Self::ReadDirPlus => "readdirplus",
            Self::GetXattr => "getxattr",
            Self::ListXattr => "listxattr",
            Self::StatFs => "statfs",
            Self::Other => "other",
        }
    }
}

/// The counters that a request needs, looked up once.
#[derive(Debug)]
pub(super) struct Counters {
    ok: Vec<IntCounter>,
    error: Vec<IntCounter>,
    disk: [IntCounter; 3],
    disk_bytes: IntCounter,
    disk_duration: Histogram,
}

impl Counters {
    pub(super) fn new(metrics: &Metrics) -> Self {
        let requests = |outcome: &str| {
            let of = |op: Op| {
                metrics
                    .fuse_requests
                    .with_label_values(&[op.label(), outcome])
            };
            Op::ALL.map(of).to_vec()
        };
        let disk = Tier::Disk.label();
        Self {
            ok: requests("ok"),
            error: requests("error"),
            disk: Outcome::ALL.map(|it| metrics.tier_reads.with_label_values(&[disk, it.label()])),
            disk_bytes: metrics.tier_read_bytes.with_label_values(&[disk]),
            disk_duration: metrics.tier_read_duration.with_label_values(&[disk]),
        }
    }

    /// Counts an answer, which may be that there is no such file.
    pub(super) fn answered(&self, op: Op) {
        self.ok[op as usize].inc();
    }

    /// Counts a failure.
    pub(super) fn failed(&self, op: Op) {
        self.error[op as usize].inc();
    }

    /// Counts a read that the local disk had all bytes of.
    pub(super) fn disk_hit(&self, n_bytes: usize, duration: Duration) {
        self.disk_read(Outcome::Hit);
        self.disk_bytes.inc_by(n_bytes as u64);
        self.disk_duration.observe(duration.as_secs_f64());
    }

    /// Counts a read by how the local disk answered.
    pub(super) fn disk_read(&self, outcome: Outcome) {
        self.disk[outcome as usize].inc();
    }
}

/// What a warning is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    Layer(DiffId),
    Index,
}

/// Decides which of many like failures is logged: one a minute for each layer.
#[derive(Debug, Default)]
pub(super) struct FailureLog {
    /// std Mutex: held for a map lookup. Has one entry for each layer at most.
    last: Mutex<HashMap<Subject, (Instant, u64)>>,
}

impl FailureLog {
    /// Returns how many failures were not logged since the last one that was, or `None` if this
    /// one shall not be logged either.
    pub(super) fn admit(&self, subject: Subject, now: Instant) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match last.get_mut(&subject) {
            Some((logged, n_silent)) if now.duration_since(*logged) < QUIET => {
                *n_silent += 1;
                None
            }
            Some(entry) => Some(std::mem::replace(entry, (now, 0)).1),
            None => {
                last.insert(subject, (now, 0));
                Some(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_stand_where_their_operations_do() {
        for (at, op) in Op::ALL.into_iter().enumerate() {
            assert_eq!(op as usize, at);
        }
        for (at, outcome) in Outcome::ALL.into_iter().enumerate() {
            assert_eq!(outcome as usize, at);
        }
    }

    #[test]
    fn one_failure_a_minute_is_logged_for_each_layer() {
        let log = FailureLog::default();
        let start = Instant::now();
        let at = |subject, seconds| log.admit(subject, start + Duration::from_secs(seconds));
        let layer = Subject::Layer(DiffId::of(b""));
        assert_eq!(at(layer, 0), Some(0));
        assert_eq!(at(layer, 1), None);
        assert_eq!(at(Subject::Index, 1), Some(0));
        assert_eq!(at(layer, 59), None);
        assert_eq!(at(layer, 60), Some(2));
        assert_eq!(at(layer, 61), None);
    }
}
