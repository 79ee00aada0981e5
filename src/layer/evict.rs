//! Decides what leaves the local disk cache, and when: pure bookkeeping, no file system.
//!
//! The bounds are the cache's own (`cache.max_bytes`, with a high watermark at which eviction begins
//! and a low one at which it ends), and the disk's (`cache.min_free_bytes`, `cache.min_free_inodes`). What was used least
//! recently goes first: first layers as a whole that nobody uses, then extents of those in use. Who is in
//! use is not known here: the caller tries, and says what came of it.
//!
//! Extents that were used lately stay where the watermarks alone would have them go, so that a node
//! that has room for what it reads does not fetch it again and again. They go, too, where the bound itself
//! would be broken.

use std::time::{Duration, SystemTime};

use super::{CacheConfig, disk::Present};
use crate::digest::{DiffId, ManifestDigest};

/// Image indexes that are kept at most.
///
/// Far more images than a node runs; an index is made anew in milliseconds from its layers' ones,
/// so that the bound only keeps files from piling up where every build is an image of its own.
pub(super) const MAX_IMAGES: usize = 1000;

/// The part of `cache.max_bytes` that is left to readers below the high watermark: two percent.
const SPARE_MARGIN: u64 = 50;

/// How long an extent of a layer in use stays that was used, unless a bound would be broken.
///
/// Several times as long as the server takes to tell what was read (`roles::agent_link`).
pub(super) const RECENT: Duration = Duration::from_secs(30);

/// How much the cache may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    /// 0: the disk alone is the bound.
    pub(super) max_bytes: u64,
    high_bytes: u64,
    low_bytes: u64,
    min_free_bytes: u64,
    min_free_inodes: u64,
}

/// How much it takes, and how much the disk has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level {
    pub(super) used_bytes: u64,
    pub(super) free_bytes: u64,
}

impl Level {
    /// How it is when so many bytes have gone. Some file systems free space some time after a file is
    /// removed; it is on its way.
    pub(super) fn without(self, freed_bytes: u64) -> Self {
        Self {
            used_bytes: self.used_bytes.saturating_sub(freed_bytes),
            free_bytes: self.free_bytes.saturating_add(freed_bytes),
        }
    }
}

/// One of the bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bound {
    /// `cache.max_bytes`.
    Capacity,
    /// `cache.min_free_bytes`.
    Disk,
    /// `cache.min_free_inodes`.
    Inodes,
}

impl Bound {
    /// The value of the label `reason`.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Capacity => "capacity",
            Self::Disk => "disk",
            Self::Inodes => "inodes",
        }
    }
}

/// Bytes that have to go, by the bound that demands it. The larger number is enough for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Need {
    pub(super) capacity_bytes: u64,
    pub(super) disk_bytes: u64,
}

impl Need {
    /// Bytes that have to go in all.
    pub(super) fn bytes(self) -> u64 {
        self.capacity_bytes.max(self.disk_bytes)
    }

    /// What has to go still when so many bytes have gone.
    pub(super) fn without(self, freed_bytes: u64) -> Self {
        Self {
            capacity_bytes: self.capacity_bytes.saturating_sub(freed_bytes),
            disk_bytes: self.disk_bytes.saturating_sub(freed_bytes),
        }
    }

    /// The bound that demands what goes next.
    pub(super) fn reason(self) -> Bound {
        match 0 < self.capacity_bytes {
            true => Bound::Capacity,
            false => Bound::Disk,
        }
    }
}

impl Bounds {
    /// The bounds that are configured.
    pub(super) fn new(config: &CacheConfig) -> Self {
        let share = |percent: u32| {
            let bytes = u128::from(config.max_bytes) * u128::from(percent) / 100;
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        Self {
            max_bytes: config.max_bytes,
            high_bytes: share(config.high_watermark_percent),
            low_bytes: share(config.low_watermark_percent),
            min_free_bytes: config.min_free_bytes,
            min_free_inodes: config.min_free_inodes,
        }
    }

    /// What has to go before `coming_bytes` more may come.
    ///
    /// Nothing where evicting everything would not be enough: then it would only do harm.
    pub(super) fn need(&self, level: Level, coming_bytes: u64) -> Need {
        let Level {
            used_bytes,
            free_bytes,
        } = level;
        let wanted_bytes = used_bytes.saturating_add(coming_bytes);
        let is_over =
            self.max_bytes != 0 && coming_bytes <= self.max_bytes && self.high_bytes < wanted_bytes;
        let wanted_free_bytes = self.min_free_bytes.saturating_add(coming_bytes);
        let is_low = free_bytes < wanted_free_bytes
            && wanted_free_bytes <= free_bytes.saturating_add(used_bytes);
        // Twice the minimum, so that the next fill does not begin with an eviction again.
        let enough_free_bytes = wanted_free_bytes.saturating_add(self.min_free_bytes);
        Need {
            capacity_bytes: if is_over {
                wanted_bytes.saturating_sub(self.low_bytes)
            } else {
                0
            },
            disk_bytes: if is_low {
                enough_free_bytes - free_bytes
            } else {
                0
            },
        }
    }

    /// Whether so much is left that what is there may stay for as long as it likes.
    pub(super) fn is_below_low(&self, level: Level) -> bool {
        let fits = self.max_bytes == 0 || level.used_bytes <= self.low_bytes;
        fits && self.min_free_bytes.saturating_mul(2) <= level.free_bytes
    }

    /// Inodes that have to go: as many as leave twice the minimum.
    pub(super) fn inode_need(&self, free_inodes: Option<u64>) -> u64 {
        match free_inodes {
            Some(free) if free < self.min_free_inodes => {
                self.min_free_inodes.saturating_mul(2) - free
            }
            Some(_) | None => 0,
        }
    }

    /// What has to go of layers in use, however lately it was used, before `coming_bytes` more may come:
    /// nothing unless a bound would be broken.
    ///
    /// As far as the high watermark, so that what comes next does not break the bound again at once.
    pub(super) fn deficit(&self, level: Level, coming_bytes: u64) -> Need {
        let wanted_bytes = level.used_bytes.saturating_add(coming_bytes);
        let wanted_free_bytes = self.min_free_bytes.saturating_add(coming_bytes);
        let is_over =
            self.max_bytes != 0 && coming_bytes <= self.max_bytes && self.max_bytes < wanted_bytes;
        let attainable_bytes = level.free_bytes.saturating_add(level.used_bytes);
        Need {
            capacity_bytes: match is_over {
                true => wanted_bytes - self.high_bytes,
                false => 0,
            },
            disk_bytes: match wanted_free_bytes <= attainable_bytes {
                true => wanted_free_bytes.saturating_sub(level.free_bytes),
                false => 0,
            },
        }
    }

    /// Bytes that may come for nobody yet: as far as the high watermark, and as the disk allows, each
    /// with a margin, so that the next reader does not begin with an eviction.
    pub(super) fn spare_bytes(&self, level: Level) -> u64 {
        let margin_bytes = self.max_bytes / SPARE_MARGIN;
        let wanted_bytes = level.used_bytes.saturating_add(margin_bytes);
        let capacity_bytes = match self.max_bytes {
            0 => u64::MAX,
            _ => self.high_bytes.saturating_sub(wanted_bytes),
        };
        let disk_bytes = level.free_bytes.saturating_sub(2 * self.min_free_bytes);
        capacity_bytes.min(disk_bytes)
    }

    /// The bound that `coming_bytes` more would break; the disk's is the harder one.
    pub(super) fn broken_by(&self, level: Level, coming_bytes: u64) -> Option<Bound> {
        if level.free_bytes < self.min_free_bytes.saturating_add(coming_bytes) {
            Some(Bound::Disk)
        } else if self.max_bytes != 0
            && self.max_bytes < level.used_bytes.saturating_add(coming_bytes)
        {
            Some(Bound::Capacity)
        } else {
            None
        }
    }
}

/// Names what can be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ItemId {
    /// A layer.
    Layer(DiffId),
    /// An image's index.
    Image(ManifestDigest),
}

/// What can be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) id: ItemId,
    /// What it takes on disk.
    pub(super) bytes: u64,
    /// How many files and directories it has.
    pub(super) n_inodes: u64,
    /// When it was opened or closed last.
    pub(super) last_use: SystemTime,
}

/// What came of an attempt to remove an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Removal {
    /// It takes no space any more.
    Gone,
    /// It is in use, or cannot be removed.
    Stays,
}

/// Has items removed, least recently used first, until what has to go is gone or no item is left;
/// returns the bytes that went.
pub(super) fn reclaim(
    mut items: Vec<Item>,
    need: Need,
    mut remove: impl FnMut(&Item, Bound) -> Removal,
) -> u64 {
    items.sort_unstable_by_key(|it| (it.last_use, it.id));
    let mut freed_bytes = 0;
    for item in &items {
        if need.bytes() <= freed_bytes {
            break;
        }
        if remove(item, need.without(freed_bytes).reason()) == Removal::Gone {
            freed_bytes += item.bytes;
        }
    }
    freed_bytes
}

/// As [`reclaim`], until `n_inodes` are gone; returns how many are. Nothing goes where all would not be
/// enough.
pub(super) fn reclaim_inodes(
    mut items: Vec<Item>,
    n_inodes: u64,
    mut remove: impl FnMut(&Item, Bound) -> Removal,
) -> u64 {
    let mut n_freed = 0;
    if items.iter().map(|it| it.n_inodes).sum::<u64>() < n_inodes {
        return n_freed;
    }
    items.sort_unstable_by_key(|it| (it.last_use, it.id));
    for item in &items {
        if n_inodes <= n_freed {
            break;
        }
        if remove(item, Bound::Inodes) == Removal::Gone {
            n_freed += item.n_inodes;
        }
    }
    n_freed
}

/// Names an extent of a layer in use; `layer` is whatever the caller counts by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) layer: usize,
    pub(super) present: Present,
}

/// Chooses extents of layers in use, least recently used first, until there are `bytes` or no more; none
/// that was used after `before_ms`. Those of one layer are given together, in no order.
pub(super) fn victims(mut parts: Vec<Part>, bytes: u64, before_ms: u64) -> Vec<(usize, Vec<u32>)> {
    // Of those that were used at the same time the first ones go: who reads in order is past them.
    parts.sort_unstable_by_key(|it| (it.present.last_use_ms, it.layer, it.present.extent));
    let mut chosen_bytes = 0;
    let mut chosen: Vec<(usize, u32)> = Vec::new();
    for Part { layer, present } in parts {
        if bytes <= chosen_bytes || before_ms < present.last_use_ms {
            break;
        }
        chosen_bytes += present.bytes;
        chosen.push((layer, present.extent));
    }
    chosen.sort_unstable();
    let of_layers = chosen.chunk_by(|one, next| one.0 == next.0);
    of_layers
        .map(|it| (it[0].0, it.iter().map(|it| it.1).collect()))
        .collect()
}

/// Splits off the image indexes beyond the newest `max_images`.
pub(super) fn split_surplus_images(items: &mut Vec<Item>, max_images: usize) -> Vec<Item> {
    let is_image = |it: &Item| matches!(it.id, ItemId::Image(_));
    let (mut images, rest): (Vec<Item>, Vec<Item>) = items.drain(..).partition(is_image);
    images.sort_unstable_by_key(|it| std::cmp::Reverse((it.last_use, it.id)));
    let surplus = images.split_off(max_images.min(images.len()));
    *items = rest;
    items.extend(images);
    surplus
}

#[cfg(test)]
mod tests;
