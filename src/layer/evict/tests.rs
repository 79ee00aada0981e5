use std::{
    collections::BTreeSet,
    time::{Duration, UNIX_EPOCH},
};

use proptest::{collection::vec, prelude::*};

use super::*;

const NO_NEED: Need = Need {
    capacity_bytes: 0,
    disk_bytes: 0,
};

/// 1000 bytes, watermarks at 900 and 800; 100 bytes of the disk stay free.
fn bounds() -> Bounds {
    Bounds::new(&CacheConfig {
        max_bytes: 1000,
        high_watermark_percent: 90,
        low_watermark_percent: 80,
        min_free_bytes: 100,
        ..CacheConfig::default()
    })
}

fn level(used_bytes: u64, free_bytes: u64) -> Level {
    Level {
        used_bytes,
        free_bytes,
    }
}

fn layer(name: u8, bytes: u64, used_at: u64) -> Item {
    Item {
        id: ItemId::Layer(DiffId::of(&[name])),
        bytes,
        n_inodes: 6,
        last_use: UNIX_EPOCH + Duration::from_secs(used_at),
    }
}

fn image(name: u8, used_at: u64) -> Item {
    Item {
        id: ItemId::Image(ManifestDigest::of(&[name])),
        ..layer(name, 1, used_at)
    }
}

#[test]
fn eviction_begins_above_the_high_watermark_and_ends_at_the_low_one() {
    for (used, coming, capacity_bytes) in [
        (0, 0, 0),
        (900, 0, 0),
        (901, 0, 101),
        (1500, 0, 700),
        (500, 400, 0),
        (500, 401, 101),
        // More than all of the cache: evicting would do no good.
        (500, 1001, 0),
        (0, 1000, 200),
    ] {
        let need = bounds().need(level(used, 10_000), coming);
        let expected = Need {
            capacity_bytes,
            ..NO_NEED
        };
        assert_eq!(need, expected, "{used} used, {coming} coming");
    }
}

#[test]
fn a_disk_that_runs_full_evicts_until_twice_the_minimum_is_free() {
    let no_capacity = Bounds {
        max_bytes: 0,
        ..bounds()
    };
    for (used, free, coming, disk_bytes) in [
        (500, 100, 0, 0),
        (500, 99, 0, 101),
        (500, 0, 0, 200),
        (500, 400, 300, 0),
        (500, 399, 300, 101),
        // The disk is full of something else, or too small for what comes.
        (99, 0, 0, 0),
        (500, 100, 501, 0),
        (u64::MAX, 0, u64::MAX, u64::MAX),
    ] {
        let need = no_capacity.need(level(used, free), coming);
        let expected = Need {
            disk_bytes,
            ..NO_NEED
        };
        assert_eq!(need, expected, "{used} used, {free} free, {coming} coming");
    }
}

#[test]
fn what_was_used_lately_goes_only_for_a_bound_that_would_be_broken() {
    for (used, free, coming, capacity_bytes, disk_bytes) in [
        (1000, 1000, 0, 0, 0),
        // As far as the high watermark.
        (1001, 1000, 0, 101, 0),
        (900, 1000, 101, 101, 0),
        // Evicting all of it would not be enough.
        (900, 5000, 1001, 0, 0),
        (500, 99, 0, 0, 1),
        (500, 100, 7, 0, 7),
        (99, 0, 0, 0, 0),
        (1001, 0, 0, 101, 100),
    ] {
        let deficit = bounds().deficit(level(used, free), coming);
        let expected = Need {
            capacity_bytes,
            disk_bytes,
        };
        assert_eq!(deficit, expected, "{used} used, {free} free, {coming}");
    }
}

#[test]
fn what_stays_however_long_leaves_room_for_the_rest() {
    for (used, free, expected) in [
        (800, 1000, true),
        (801, 1000, false),
        (0, 200, true),
        (0, 199, false),
    ] {
        let found = bounds().is_below_low(level(used, free));
        assert_eq!(found, expected, "{used} used, {free} free");
    }
    let no_capacity = Bounds {
        max_bytes: 0,
        ..bounds()
    };
    assert!(no_capacity.is_below_low(level(u64::MAX, 200)));
}

#[test]
fn inodes_go_as_layers_do_unless_that_would_not_be_enough() {
    let bounds = Bounds {
        min_free_inodes: 10,
        ..bounds()
    };
    for (free, expected) in [(None, 0), (Some(10), 0), (Some(9), 11), (Some(0), 20)] {
        assert_eq!(bounds.inode_need(free), expected, "{free:?} free");
    }
    let items = vec![layer(1, 0, 3), layer(2, 0, 1), layer(3, 0, 2)];
    for (n_inodes, in_use, expected) in [
        (0, 9, vec![]),
        (6, 9, vec![2]),
        (7, 9, vec![2, 3]),
        (7, 2, vec![3, 1]),
        (18, 9, vec![2, 3, 1]),
        (19, 9, vec![]),
    ] {
        let mut gone = Vec::new();
        let n_freed = reclaim_inodes(items.clone(), n_inodes, |item, reason| {
            assert_eq!(reason.label(), "inodes");
            let name = (1..4).find(|it| item.id == layer(*it, 0, 0).id).unwrap();
            if name == in_use {
                return Removal::Stays;
            }
            gone.push(name);
            Removal::Gone
        });
        assert_eq!(
            (gone.len() as u64 * 6, &gone),
            (n_freed, &expected),
            "{n_inodes}"
        );
    }
}

fn part(layer: usize, extent: u32, last_use_ms: u64) -> Part {
    Part {
        layer,
        present: Present {
            extent,
            bytes: 10,
            last_use_ms,
        },
    }
}

#[test]
fn extents_go_least_recently_used_first_and_no_more_than_need_be() {
    let parts = vec![
        part(0, 0, 500),
        part(0, 1, 100),
        part(0, 2, 300),
        part(1, 7, 200),
        part(1, 3, 100),
    ];
    for (bytes, before_ms, expected) in [
        (0, u64::MAX, vec![]),
        (1, u64::MAX, vec![(0, vec![1])]),
        (11, u64::MAX, vec![(0, vec![1]), (1, vec![3])]),
        (30, u64::MAX, vec![(0, vec![1]), (1, vec![3, 7])]),
        (31, u64::MAX, vec![(0, vec![1, 2]), (1, vec![3, 7])]),
        (99, u64::MAX, vec![(0, vec![0, 1, 2]), (1, vec![3, 7])]),
        (99, 200, vec![(0, vec![1]), (1, vec![3, 7])]),
        (99, 99, vec![]),
    ] {
        let chosen = victims(parts.clone(), bytes, before_ms);
        assert_eq!(chosen, expected, "{bytes} bytes, before {before_ms}");
    }
}

#[test]
fn a_bound_is_broken_only_beyond_it() {
    for (used, free, coming, expected) in [
        (1000, 100, 0, None),
        (1001, 100, 0, Some(Bound::Capacity)),
        (900, 300, 101, Some(Bound::Capacity)),
        (1000, 99, 0, Some(Bound::Disk)),
        (2000, 99, 0, Some(Bound::Disk)),
        (0, 200, 101, Some(Bound::Disk)),
    ] {
        let broken = bounds().broken_by(level(used, free), coming);
        assert_eq!(broken, expected, "{used} used, {free} free, {coming}");
    }
}

#[test]
fn each_removal_names_the_bound_that_demands_it() {
    let need = Need {
        capacity_bytes: 15,
        disk_bytes: 25,
    };
    let items = vec![layer(1, 10, 1), layer(2, 10, 2), layer(3, 10, 3)];
    let mut reasons = Vec::new();
    let freed = reclaim(items, need, |_, reason| {
        reasons.push(reason.label());
        Removal::Gone
    });
    assert_eq!((freed, reasons), (30, vec!["capacity", "capacity", "disk"]));
}

#[test]
fn the_oldest_images_beyond_the_bound_are_surplus() {
    let mut items = vec![image(1, 5), layer(9, 1, 0), image(2, 7), image(3, 6)];
    let surplus = split_surplus_images(&mut items, 2);
    assert_eq!(surplus, [image(1, 5)]);
    assert_eq!(items, [layer(9, 1, 0), image(2, 7), image(3, 6)]);
    assert_eq!(split_surplus_images(&mut items, 2), []);
}

proptest! {
    /// The laws of eviction, for any cache and any set of layers in use.
    #[test]
    fn laws_of_eviction(
        // Times may collide.
        cache in vec((0u64..400, 0u64..20, any::<bool>()), 0..40),
        free in 0u64..300,
        coming in 0u64..1200,
    ) {
        let items: Vec<Item> = (0u8..).zip(&cache).map(|(n, it)| layer(n, it.0, it.1)).collect();
        let in_use: BTreeSet<ItemId> =
            items.iter().zip(&cache).filter(|(_, it)| it.2).map(|(item, _)| item.id).collect();
        let used: u64 = items.iter().map(|it| it.bytes).sum();
        let bounds = bounds();
        let need = bounds.need(level(used, free), coming);
        let mut tried = Vec::new();
        let freed = reclaim(items.clone(), need, |item, _| {
            tried.push(*item);
            if in_use.contains(&item.id) { Removal::Stays } else { Removal::Gone }
        });
        // The account is right, and nothing is tried twice.
        let gone: Vec<&Item> = tried.iter().filter(|it| !in_use.contains(&it.id)).collect();
        prop_assert_eq!(freed, gone.iter().map(|it| it.bytes).sum::<u64>());
        prop_assert_eq!(tried.iter().map(|it| it.id).collect::<BTreeSet<_>>().len(), tried.len());
        // Least recently used first: whatever stays untried was used no earlier.
        prop_assert!(tried.is_sorted_by_key(|it| it.last_use));
        let last_tried = tried.last().map(|it| it.last_use);
        for item in items.iter().filter(|it| !tried.contains(it)) {
            prop_assert!(last_tried.is_none_or(|it| it <= item.last_use));
        }
        // Enough goes, or all that is not in use; never more than the last one too many.
        let everything_tried = tried.len() == items.len();
        prop_assert!(need.bytes() <= freed || everything_tried);
        if let Some(last) = gone.last() {
            prop_assert!(freed - last.bytes < need.bytes());
        }
        // Then the bounds hold, unless what is in use or what comes is too much.
        let after = level(used - freed, free + freed);
        let n_used_bytes: u64 =
            items.iter().filter(|it| in_use.contains(&it.id)).map(|it| it.bytes).sum();
        if coming <= 1000 && n_used_bytes + coming <= 1000 {
            prop_assert_ne!(bounds.broken_by(after, coming), Some(Bound::Capacity));
        }
        if 100 + coming <= free + used - n_used_bytes {
            prop_assert_ne!(bounds.broken_by(after, coming), Some(Bound::Disk));
        }
        // What breaks no bound and no watermark costs nothing.
        if used + coming <= 900 && 100 + coming <= free {
            prop_assert_eq!(tried.len(), 0);
        }
    }
}
