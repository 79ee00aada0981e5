//! Counts the volumes of a former process whose mounts are dead: their pods see nothing but errors.

use std::{collections::HashSet, sync::Mutex};

use prometheus::IntGauge;

use super::{lock, target::PublicationId};

/// Publications that a former process served, until they are published anew or taken back.
#[derive(Debug)]
pub(super) struct DeadVolumes {
    /// std Mutex: held for a set lookup, taken alone.
    ids: Mutex<HashSet<PublicationId>>,
    gauge: IntGauge,
}

impl DeadVolumes {
    pub(super) fn new(ids: impl IntoIterator<Item = PublicationId>, gauge: IntGauge) -> Self {
        let dead = Self {
            ids: Mutex::new(ids.into_iter().collect()),
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

    fn show(&self, ids: &HashSet<PublicationId>) {
        self.gauge.set(i64::try_from(ids.len()).unwrap_or(i64::MAX));
    }
}
