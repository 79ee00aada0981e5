//! Holds the layers that wait for their upload: bounded, in order, one entry per layer.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::{Enqueued, Repair, UploadOutcome, UploadSource};
use crate::{digest::DiffId, remote::LeaseGuard};

/// One layer to be uploaded; whatever happens to it, its source is told.
#[derive(Debug)]
pub(super) struct Job {
    source: Arc<dyn UploadSource>,
    repair: Repair,
    /// Held so that other nodes wait for this upload.
    lease: Option<LeaseGuard>,
    ended: bool,
}

impl Job {
    fn new(source: Arc<dyn UploadSource>, repair: Repair, lease: Option<LeaseGuard>) -> Self {
        Self {
            source,
            repair,
            lease,
            ended: false,
        }
    }

    pub(super) fn diff_id(&self) -> DiffId {
        self.source.diff_id()
    }

    pub(super) fn source(&self) -> &Arc<dyn UploadSource> {
        &self.source
    }

    pub(super) fn repair(&self) -> &Repair {
        &self.repair
    }

    pub(super) fn end(mut self, outcome: UploadOutcome) {
        self.ended = true;
        self.source.done(outcome);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if !self.ended {
            self.source.done(UploadOutcome::Stopped);
        }
    }
}

/// The layers that wait.
#[derive(Debug)]
pub(super) struct Queue {
    max_layers: usize,
    /// std Mutex: held for an insertion or removal, never across an await or a call of a source.
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    order: VecDeque<DiffId>,
    /// As many as `order`.
    jobs: HashMap<DiffId, Job>,
    closed: bool,
}

impl Queue {
    pub(super) fn new(max_layers: usize) -> Self {
        Self {
            max_layers,
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more layer would be taken.
    pub(super) fn has_room(&self) -> bool {
        let state = self.state();
        !state.closed && state.order.len() < self.max_layers
    }

    /// Adds a layer; a request that waits for the same layer is merged into this one.
    pub(super) fn push(
        &self,
        source: Arc<dyn UploadSource>,
        mut repair: Repair,
        mut lease: Option<LeaseGuard>,
    ) -> Enqueued {
        let diff_id = source.diff_id();
        let mut state = self.state();
        if state.closed {
            return Enqueued::Refused;
        }
        let mut merged = state.jobs.remove(&diff_id);
        match &mut merged {
            None if state.order.len() >= self.max_layers => return Enqueued::Refused,
            None => {}
            Some(earlier) => {
                repair.index |= earlier.repair.index;
                repair.chunks.extend(&earlier.repair.chunks);
                lease = lease.or(earlier.lease.take());
            }
        }
        // Many requests about one layer name few distinct chunks.
        repair.chunks.sort_unstable();
        repair.chunks.dedup();
        if merged.is_none() {
            state.order.push_back(diff_id);
        }
        state.jobs.insert(diff_id, Job::new(source, repair, lease));
        drop(state);
        if let Some(earlier) = merged {
            earlier.end(UploadOutcome::Merged);
        }
        self.changed.notify_one();
        Enqueued::Accepted
    }

    /// Takes the first layer, or waits for one; `None` once the queue is closed and empty.
    pub(super) async fn pop(&self) -> Option<Job> {
        loop {
            {
                let mut state = self.state();
                if let Some(diff_id) = state.order.pop_front() {
                    return state.jobs.remove(&diff_id);
                }
                if state.closed {
                    return None;
                }
            }
            // One waiter, and a permit is kept if it was not waiting yet: no wake-up is lost.
            self.changed.notified().await;
        }
    }

    /// Refuses all further layers.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_one();
    }

    /// Takes out all that wait, to be dropped without the lock.
    pub(super) fn clear(&self) -> Vec<Job> {
        let mut state = self.state();
        state.order.clear();
        state.jobs.drain().map(|(_, job)| job).collect()
    }
}
