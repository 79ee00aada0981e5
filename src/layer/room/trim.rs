//! Evicts extents of layers in use: acts on what `evict` chooses.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::{Room, lock};
use crate::layer::{
    disk::{Evicted, now_ms},
    evict::{self, Level, Need, Part, RECENT},
    store::Layer,
};

/// How long the log is silent about layers in use that lose extents, after it has said so.
const QUIET: Duration = Duration::from_secs(600);

/// What is known of evictions of extents.
#[derive(Debug, Default)]
pub(super) struct Trimming {
    /// Whether the file system cannot punch holes.
    is_unsupported: AtomicBool,
    /// std Mutex: held to look.
    warned: Mutex<Option<Instant>>,
}

impl Room {
    /// Evicts extents of layers in use: those that were not used lately, as there is `need`, and others,
    /// as far as a bound would be broken. Returns how it is then, and what has to go still.
    ///
    /// The caller is the only one in this process that evicts.
    pub(super) fn trim(&self, level: Level, need: Need, coming_bytes: u64) -> (Level, Need) {
        let lately_ms = now_ms().saturating_sub(as_ms(RECENT));
        let freed_bytes = self.trim_until(need, lately_ms);
        let (level, need) = (level.without(freed_bytes), need.without(freed_bytes));
        let deficit = self.bounds.deficit(level, coming_bytes);
        if deficit.bytes() == 0 || !self.could_take(level, coming_bytes) {
            return (level, need);
        }
        let freed_bytes = self.trim_until(deficit, u64::MAX);
        (level.without(freed_bytes), need.without(freed_bytes))
    }

    /// Whether what comes would fit if all went that can. Where it would not, evicting what is being read would
    /// only do harm; what has come already is another matter.
    fn could_take(&self, level: Level, coming_bytes: u64) -> bool {
        let layers = self.store().map(|it| it.recoverable());
        let layers = layers.unwrap_or_default();
        let extents = layers.iter().flat_map(|it| it.file.evictable());
        let left = level.without(extents.map(|it| it.bytes).sum());
        coming_bytes == 0 || self.bounds.broken_by(left, coming_bytes).is_none()
    }

    /// Evicts extents that were last used before that time until `need` is met or there are no more;
    /// returns the bytes that the disk has back.
    fn trim_until(&self, need: Need, before_ms: u64) -> u64 {
        if need.bytes() == 0 {
            return 0;
        }
        let Some(store) = self.store() else { return 0 };
        let layers = store.recoverable();
        let mut busy = BTreeSet::new();
        let mut freed_bytes = 0;
        // Again where a layer was busy: others give what it does not.
        loop {
            let left = need.without(freed_bytes);
            let parts = (0..).zip(&layers).filter(|it| !busy.contains(&it.0));
            let parts = parts.flat_map(|(at, layer)| {
                let present = layer.file.evictable().into_iter();
                present.map(move |present| Part { layer: at, present })
            });
            let victims = evict::victims(parts.collect(), left.bytes(), before_ms);
            let is_unsupported = self.trimming.is_unsupported.load(Ordering::Relaxed);
            if victims.is_empty() || is_unsupported {
                return freed_bytes;
            }
            for (at, extents) in victims {
                match self.trim_layer(&layers[at], &extents, need.without(freed_bytes)) {
                    Some(bytes) => freed_bytes += bytes,
                    None => drop(busy.insert(at)),
                }
            }
        }
    }

    /// `None` if the layer gives nothing now.
    fn trim_layer(&self, layer: &Arc<Layer>, extents: &[u32], need: Need) -> Option<u64> {
        let diff_id = layer.file.diff_id();
        let reason = need.reason().label();
        let (n_extents, freed_bytes) = match layer.file.evict(extents) {
            Ok(Evicted::Some { n_extents, bytes }) => (n_extents, bytes),
            Ok(Evicted::Busy) => return None,
            Ok(Evicted::Unsupported) => {
                let path = self.paths.root().display();
                warn!(%path, "file system of the cache cannot punch holes: layers in use stay whole");
                self.trimming.is_unsupported.store(true, Ordering::Relaxed);
                return None;
            }
            Err(err) => {
                warn!(layer.diff_id = %diff_id, error = %err, "evicting extents of a layer failed");
                return None;
            }
        };
        debug!(layer.diff_id = %diff_id, extents = n_extents, bytes = freed_bytes, reason, "evicted extents of a layer in use");
        let evictions = &self.metrics.layer_cache_extent_evictions;
        evictions.with_label_values(&[reason]).inc_by(n_extents);
        self.metrics.layer_cache_evicted_bytes.inc_by(freed_bytes);
        self.used_bytes
            .fetch_sub(freed_bytes.min(self.used_bytes()), Ordering::Relaxed);
        self.publish_account();
        let mut warned = lock(&self.trimming.warned);
        if warned.is_none_or(|it| QUIET <= it.elapsed()) {
            *warned = Some(Instant::now());
            let path = self.paths.root().display();
            warn!(%path, reason, "images in use do not fit into the cache: what was read of them longest ago is evicted, and fetched again when it is read");
        }
        Some(freed_bytes)
    }
}

fn as_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
