//! Keeps the local disk cache within its bounds: measures it, and removes what `evict` chooses.
//!
//! The account of what the cache takes is exact after each look at the directory; in between it is
//! what that look found and what this process has written since. A look happens at start, after
//! each layer that was made, when a bound seems broken, and when a layer is closed while one is.
//! Other processes may use and evict from the same directory: each removal is decided by locks
//! (`catalog::remove`), and what another one has removed counts as gone.
//!
//! Where layers that nobody uses are not enough, extents of layers in use go (`trim`): of those that this
//! process has open and could have again (`reach`).

mod trim;

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::{runtime::Handle, task::JoinHandle};
use tracing::{debug, info, warn};

use super::{
    CacheConfig,
    catalog::{self, Removed},
    disk::CachePaths,
    evict::{self, Bound, Bounds, Item, ItemId, Level, MAX_IMAGES, Need, Removal},
    store::Inner,
};
use crate::{disk, metrics::Metrics};

/// How long nothing is evicted for readers after an eviction that could not free enough.
///
/// All is in use then, or was lately, and a reader's next chunk is no reason to look through the cache
/// again, unless it breaks a bound that held.
const IN_VAIN_PAUSE: Duration = Duration::from_secs(1);

/// The room that the cache has.
#[derive(Debug)]
pub(super) struct Room {
    paths: CachePaths,
    bounds: Bounds,
    metrics: Metrics,
    runtime: Handle,
    used_bytes: AtomicU64,
    /// What was warned of last, so that it is once.
    ///
    /// std Mutex: held for a whole eviction, on blocking threads only: one at a time.
    warned: Mutex<Option<Bound>>,
    /// When an eviction could not free enough, and whether a bound was broken even so.
    ///
    /// std Mutex: held to copy it.
    in_vain: Mutex<Option<(Instant, bool)>>,
    /// Whose layers are in use.
    store: OnceLock<Weak<Inner>>,
    trimming: trim::Trimming,
    /// std Mutex: held to look and to start.
    sweeper: Mutex<Sweeper>,
}

/// The task that evicts beside all else.
#[derive(Debug, Default)]
struct Sweeper {
    is_running: bool,
    /// Whether it is to go round once more.
    is_wanted: bool,
    task: Option<JoinHandle<()>>,
}

/// Who wants to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// A publish, that many bytes: it is refused if it would break a bound.
    Publish { coming_bytes: u64 },
    /// A reader, who goes on beyond `cache.max_bytes`.
    Read,
}

impl Claim {
    fn coming_bytes(self) -> u64 {
        match self {
            Self::Publish { coming_bytes } => coming_bytes,
            Self::Read => 0,
        }
    }
}

impl Room {
    /// Measures the cache. Nothing is evicted yet.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn new(
        paths: CachePaths,
        config: &CacheConfig,
        metrics: Metrics,
        runtime: Handle,
    ) -> io::Result<Self> {
        metrics
            .layer_cache_capacity_bytes
            .set(gauge(config.max_bytes));
        metrics.watch_cache_disk(paths.root());
        let room = Self {
            paths,
            bounds: Bounds::new(config),
            metrics,
            runtime,
            used_bytes: AtomicU64::new(0),
            warned: Mutex::default(),
            in_vain: Mutex::default(),
            store: OnceLock::new(),
            trimming: trim::Trimming::default(),
            sweeper: Mutex::default(),
        };
        room.look()?;
        Ok(room)
    }

    /// Has extents of the layers that `store` has open evicted as well, where need be.
    pub(super) fn serve(&self, store: Weak<Inner>) {
        // There is one store for a room.
        let _ = self.store.set(store);
    }

    /// Bytes that the cache takes.
    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// The configured bound.
    pub(super) fn max_bytes(&self) -> u64 {
        self.bounds.max_bytes
    }

    /// Counts bytes that were written for a reader, and evicts beside it if they are too many.
    pub(super) fn grew(self: &Arc<Self>, bytes: u64) {
        self.count(bytes);
        if self.is_short() && !self.was_in_vain() {
            self.sweep_soon();
        }
    }

    /// Counts bytes that a first fill has written, and makes room for them.
    ///
    /// # Errors
    /// As for [`make`](Self::make).
    ///
    /// # Blocking
    /// While layers are removed.
    pub(super) fn claim(&self, written_bytes: u64) -> Result<(), Bound> {
        self.count(written_bytes);
        self.make(Claim::Publish { coming_bytes: 0 })
    }

    /// Makes room by evicting what is not in use, or extents of what is, if there is need.
    ///
    /// # Errors
    /// The bound that `claim` would break even so.
    ///
    /// # Blocking
    /// While layers are removed.
    pub(super) fn make(&self, claim: Claim) -> Result<(), Bound> {
        let coming_bytes = claim.coming_bytes();
        let verdict = |level| match (self.bounds.broken_by(level, coming_bytes), claim) {
            (None, _) | (Some(Bound::Capacity), Claim::Read) => Ok(()),
            (Some(bound), _) => Err(bound),
        };
        let level = self.level();
        let has_need = 0 < self.bounds.need(level, coming_bytes).bytes() || 0 < self.inode_need();
        if verdict(level).is_ok() && (!has_need || self.was_in_vain()) {
            return Ok(());
        }
        // A refusal rests on a fresh look, not on the account.
        verdict(self.evict(coming_bytes))
    }

    /// Whether so many bytes may come without a bound broken or anything evicted.
    pub(super) fn has_spare(&self, coming_bytes: u64) -> bool {
        let level = self.level();
        self.bounds.need(level, coming_bytes).bytes() == 0
            && self.bounds.broken_by(level, coming_bytes).is_none()
    }

    /// Bytes that may come for nobody yet.
    pub(super) fn spare_bytes(&self) -> u64 {
        self.bounds.spare_bytes(self.level())
    }

    /// Whether what is there may stay, however long.
    pub(super) fn is_below_low(&self) -> bool {
        self.bounds.is_below_low(self.level())
    }

    /// Makes `wanted_bytes` of room for nobody yet out of what was not used for `unused_for`, if that
    /// is enough and there is need; returns how much room there is then.
    ///
    /// # Blocking
    /// While layers are removed.
    pub(super) fn make_spare(&self, wanted_bytes: u64, unused_for: Option<Duration>) -> u64 {
        let spare_bytes = self.spare_bytes();
        let (true, Some(unused_for)) = (spare_bytes < wanted_bytes, unused_for) else {
            return spare_bytes;
        };
        let _one_at_a_time = lock(&self.warned);
        let Ok(mut items) = self.look() else {
            return spare_bytes;
        };
        let since = SystemTime::now().checked_sub(unused_for);
        let since = since.unwrap_or(SystemTime::UNIX_EPOCH);
        items.retain(|it| it.last_use <= since);
        let old_bytes: u64 = items.iter().map(|it| it.bytes).sum();
        let spare_bytes = self.spare_bytes();
        let need_bytes = wanted_bytes.saturating_sub(spare_bytes);
        // Where all of it would not be enough, it would only do harm.
        if need_bytes <= old_bytes {
            let need = Need {
                capacity_bytes: need_bytes,
                disk_bytes: 0,
            };
            let freed_bytes = evict::reclaim(items, need, |it, reason| self.remove(it, reason));
            self.used_bytes.fetch_sub(freed_bytes, Ordering::Relaxed);
            self.publish_account();
            if let Err(err) = catalog::remove_orphaned_images(&self.paths) {
                debug!(error = %err, "image indexes without layers stay");
            }
        }
        self.spare_bytes()
    }

    /// Writes; if the disk is full all of a sudden, makes room and tries once more.
    ///
    /// # Errors
    /// Those of `write`.
    ///
    /// # Blocking
    /// While layers are removed.
    pub(super) fn with_room<T>(&self, mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        match write() {
            Err(err) if is_full(&err) => {
                if let Err(bound) = self.make(Claim::Read) {
                    debug!(reason = bound.label(), "no room on the disk");
                }
                write()
            }
            written => written,
        }
    }

    /// Hears that a layer was closed: it can be evicted now, if nobody else has it open.
    pub(super) fn released(self: &Arc<Self>) {
        *lock(&self.in_vain) = None;
        if self.is_short() {
            self.sweep_soon();
        }
    }

    /// Looks at the cache and evicts what is too much, beside all else.
    pub(super) fn sweep_soon(self: &Arc<Self>) {
        let mut sweeper = lock(&self.sweeper);
        if sweeper.is_running {
            sweeper.is_wanted = true;
            return;
        }
        sweeper.is_running = true;
        let room = Arc::clone(self);
        sweeper.task = Some(self.runtime.spawn(room.sweep()));
    }

    /// Waits for a sweep under way.
    pub(super) async fn settle(&self) {
        let task = lock(&self.sweeper).task.take();
        if let Some(task) = task {
            // One that crashed has ended as well.
            let _ = task.await;
        }
    }

    async fn sweep(self: Arc<Self>) {
        loop {
            self.evict_beside().await;
            if self.is_short()
                && let Some(store) = self.store()
                && store.find_out().await
            {
                self.evict_beside().await;
            }
            let mut sweeper = lock(&self.sweeper);
            if !std::mem::take(&mut sweeper.is_wanted) {
                sweeper.is_running = false;
                return;
            }
        }
    }

    async fn evict_beside(self: &Arc<Self>) {
        let room = Arc::clone(self);
        let evicting = self.runtime.spawn_blocking(move || {
            room.evict(0);
        });
        // One that crashed has ended as well.
        let _ = evicting.await;
    }

    fn store(&self) -> Option<Arc<Inner>> {
        self.store.get().and_then(Weak::upgrade)
    }

    /// Looks at the cache and evicts until `coming_bytes` more fit; returns how it is then.
    fn evict(&self, coming_bytes: u64) -> Level {
        let mut warned = lock(&self.warned);
        let mut items = match self.look() {
            Ok(items) => items,
            Err(err) => {
                warn!(path = %self.paths.root().display(), error = %err, "cache cannot be measured, nothing is evicted");
                return self.level();
            }
        };
        for image in evict::split_surplus_images(&mut items, MAX_IMAGES) {
            if self.remove(&image, Bound::Capacity) == Removal::Gone {
                self.used_bytes.fetch_sub(image.bytes, Ordering::Relaxed);
            }
        }
        let inode_need = self.inode_need();
        let all = match inode_need {
            0 => Vec::new(),
            _ => items.clone(),
        };
        let before = self.level();
        let need = self.bounds.need(before, coming_bytes);
        let freed_bytes = evict::reclaim(items, need, |item, reason| self.remove(item, reason));
        if 0 < freed_bytes {
            self.used_bytes.fetch_sub(freed_bytes, Ordering::Relaxed);
            self.publish_account();
            if let Err(err) = catalog::remove_orphaned_images(&self.paths) {
                debug!(error = %err, "image indexes without layers stay");
            }
        }
        let inode_need = self.reclaim_inodes(all, inode_need);
        let (after, need) = self.trim(
            before.without(freed_bytes),
            need.without(freed_bytes),
            coming_bytes,
        );
        let broken = self.bounds.broken_by(after, 0);
        let was_in_vain = 0 < need.bytes() || 0 < inode_need;
        *lock(&self.in_vain) = was_in_vain.then(|| (Instant::now(), broken.is_some()));
        if broken != *warned {
            self.warn(broken, after);
            *warned = broken;
        }
        after
    }

    fn warn(&self, broken: Option<Bound>, level: Level) {
        let path = self.paths.root().display();
        let Level {
            used_bytes,
            free_bytes,
        } = level;
        match broken {
            Some(Bound::Capacity) => {
                let max_bytes = self.bounds.max_bytes;
                warn!(%path, used_bytes, max_bytes, "cache exceeds cache.max_bytes: what is left in it is in use, and cannot be had again by parts");
            }
            Some(Bound::Disk) => {
                warn!(%path, used_bytes, free_bytes, "cache disk has less than cache.min_free_bytes left: what is left in the cache is in use and cannot be had again by parts, or too little");
            }
            // Nothing is refused for want of inodes: the disk says when there are none.
            Some(Bound::Inodes) => {}
            None => info!(%path, used_bytes, free_bytes, "cache is within its bounds again"),
        }
    }

    /// Removes an item unless it is in use.
    fn remove(&self, item: &Item, reason: Bound) -> Removal {
        let removed = match item.id {
            ItemId::Layer(layer) => catalog::remove(&self.paths, layer),
            ItemId::Image(image) => catalog::remove_image(&self.paths, image),
        };
        match (removed, item.id) {
            (Ok(Removed::Yes), ItemId::Layer(layer)) => {
                info!(layer.diff_id = %layer, bytes = item.bytes, reason = reason.label(), "evicted layer");
                let evictions = &self.metrics.layer_cache_evictions;
                evictions.with_label_values(&[reason.label()]).inc();
                self.metrics.layer_cache_evicted_bytes.inc_by(item.bytes);
                self.metrics.layer_cache_layers.dec();
                Removal::Gone
            }
            (Ok(Removed::Yes | Removed::Absent), _) => Removal::Gone,
            (Ok(Removed::Filling | Removed::InUse), _) => Removal::Stays,
            (Err(err), _) => {
                warn!(item = ?item.id, error = %err, "removing from the cache failed");
                Removal::Stays
            }
        }
    }

    /// Brings the account in line with what is there.
    fn look(&self) -> io::Result<Vec<Item>> {
        let contents = catalog::measure(&self.paths)?;
        self.used_bytes
            .store(contents.used_bytes, Ordering::Relaxed);
        self.publish_account();
        self.metrics
            .layer_cache_layers
            .set(gauge(contents.n_layers));
        Ok(contents.items)
    }

    fn count(&self, bytes: u64) {
        self.used_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.publish_account();
    }

    fn publish_account(&self) {
        self.metrics.layer_cache_bytes.set(gauge(self.used_bytes()));
    }

    fn level(&self) -> Level {
        // What cannot be asked is no reason to evict; the write itself will tell.
        let space = disk::space(self.paths.root());
        Level {
            used_bytes: self.used_bytes(),
            free_bytes: space.map_or(u64::MAX, |it| it.free_bytes),
        }
    }

    fn is_short(&self) -> bool {
        0 < self.bounds.need(self.level(), 0).bytes() || 0 < self.inode_need()
    }

    /// Inodes that have to go. What cannot be asked is no reason to evict.
    fn inode_need(&self) -> u64 {
        let space = disk::space(self.paths.root());
        space.map_or(0, |it| self.bounds.inode_need(it.free_inodes))
    }

    /// Removes so many inodes' worth of `items`, those included that are gone already; returns how many are
    /// to go still.
    fn reclaim_inodes(&self, items: Vec<Item>, n_inodes: u64) -> u64 {
        if n_inodes == 0 {
            return 0;
        }
        let n_freed = evict::reclaim_inodes(items, n_inodes, |it, reason| self.remove(it, reason));
        if 0 < n_freed
            && let Err(err) = self.look()
        {
            debug!(error = %err, "cache cannot be measured");
        }
        n_inodes.saturating_sub(n_freed)
    }

    fn was_in_vain(&self) -> bool {
        let last = *lock(&self.in_vain);
        last.is_some_and(|(at, was_broken)| {
            let is_as_before = was_broken || self.bounds.broken_by(self.level(), 0).is_none();
            is_as_before && at.elapsed() < IN_VAIN_PAUSE
        })
    }
}

/// Whether a write failed for want of room: the disk's, or that of whoever writes.
fn is_full(err: &io::Error) -> bool {
    matches!(
        err.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Nothing that is locked here panics half-way.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gauges are signed; no disk comes near their end.
fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
