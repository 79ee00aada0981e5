//! Counts the volumes whose mounts are dead: their pods see nothing but errors.

use std::{
    collections::HashSet,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use prometheus::IntGauge;

use super::{lock, target::PublicationId};

/// Publications that a former process served, until they are published anew or taken back.
#[derive(Debug)]
pub(super) struct DeadVolumes {
    /// std Mutex: held for a set lookup, taken alone.
    ids: Mutex<HashSet<PublicationId>>,
    /// Those of this process whose sources died.
    n_own: AtomicUsize,
    gauge: IntGauge,
}

impl DeadVolumes {
    pub(super) fn new(ids: impl IntoIterator<Item = PublicationId>, gauge: IntGauge) -> Self {
        let dead = Self {
            ids: Mutex::new(ids.into_iter().collect()),
            n_own: AtomicUsize::new(0),
            gauge,
        };
        dead.show(&lock(&dead.ids));
        dead
    }

    /// Says that the mount of a publication is gone, or another one.
    pub(super) fn remove(&self, id: PublicationId) {
        let mut ids = lock(&self.ids);
        ids.remove(&id);
        self.show(&ids);
    }

    /// Says how many volumes of this process have dead sources.
    pub(super) fn set_own(&self, n_own: usize) {
        self.n_own.store(n_own, Ordering::Relaxed);
        self.show(&lock(&self.ids));
    }

    fn show(&self, ids: &HashSet<PublicationId>) {
        let n_dead = ids.len() + self.n_own.load(Ordering::Relaxed);
        self.gauge.set(i64::try_from(n_dead).unwrap_or(i64::MAX));
    }
}
