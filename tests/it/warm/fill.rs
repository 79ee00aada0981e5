//! An image comes out of the remote onto a node's disk, beside all that is there.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use clip_csi::{
    chunk::CHUNK_BYTES,
    disk,
    index::profile::{self, Profile, Touch},
    layer::{CacheConfig, UploadEnd, store::LayerStore},
    metrics::Metrics,
    remote::Repair,
    warm::{FillLimits, FillRequest, Pace, WarmError, WarmProgress, WarmWhat},
};
use tokio::runtime::Handle;

use super::world::{HasRemote, World, all, fixtures, layer_bytes, limits, reason};
use crate::layer_fixture::{Fixture, config, present};

#[tokio::test]
async fn what_is_wanted_comes_and_no_more() {
    let world = World::seeded().await;
    let node = world.node("index");
    let filled = node.fill(WarmWhat::Index).await.unwrap();
    assert_eq!(filled.bytes_wanted, 0);
    assert_eq!(node.chunks().await, [Some(vec![]), Some(vec![])]);
    assert!(node.store.paths().image(node.manifest).exists());
    // Nobody has recorded anything yet: then that is as much.
    node.fill(WarmWhat::Recorded).await.unwrap();
    assert_eq!(node.chunks().await, [Some(vec![]), Some(vec![])]);
    let touches = [(0, 4), (1, 2), (0, 1)].map(|(layer, chunk)| Touch { layer, chunk });
    let profile = Profile {
        touches: touches.into(),
        is_whole: true,
    };
    let profile = profile::encode(node.manifest, &profile).unwrap();
    let remote = node.store.remote().unwrap();
    assert!(remote.put_profile(&node.manifest, &profile).await);
    // One that has no room for it counts nothing as wanted, or others would have to leave room for it.
    let small = world.node("small");
    let request = FillRequest {
        limits: FillLimits {
            max_new_bytes: Some(2 * CHUNK_BYTES),
            ..limits()
        },
        ..small.fill_request(WarmWhat::Recorded)
    };
    let progress = Arc::default();
    let refused = small.warmer().fill(&request, &progress).await;
    assert_eq!(reason(refused).0, "NoSpace");
    assert_eq!(progress.snapshot().bytes_total, 0);
    for name in ["index", "recorded"] {
        let node = world.node(name);
        let filled = node.fill(WarmWhat::Recorded).await.unwrap();
        assert_eq!(filled.bytes_wanted, 3 * CHUNK_BYTES);
        assert_eq!(filled.bytes_from_remote, 3 * CHUNK_BYTES);
        assert_eq!(node.chunks().await, [Some(vec![1, 4]), Some(vec![2])]);
        // For the mount, which replays it without asking.
        assert!(node.store.paths().profile(node.manifest).exists());
        let filled = node.fill(WarmWhat::All).await.unwrap();
        assert_eq!(filled.bytes_present, 3 * CHUNK_BYTES);
        assert_eq!(node.chunks().await, [all(), all()]);
    }
    assert_eq!(world.blob_gets(), [1, 1]);
}

#[tokio::test]
async fn without_a_key_layers_come_whole_and_are_checked() {
    let world = World::new().await;
    let seeder = world.node_with("seeder", HasRemote::WithoutKey, |it| it);
    seeder.seed(WarmWhat::All).await.unwrap();
    let node = world.node_with("node", HasRemote::WithoutKey, |it| it);
    node.fill(WarmWhat::Index).await.unwrap();
    assert_eq!(node.chunks().await, [all(), all()]);
    // Where there is a key, nobody takes what has none.
    let strict = world.node("strict");
    let (reason, text) = reason(strict.fill(WarmWhat::Index).await);
    assert_eq!(reason, "NotSeeded", "{text}");
    assert!(text.contains("key"), "{text}");
    assert_eq!(world.blob_gets(), [1, 1]);
}

#[tokio::test]
async fn what_is_not_seeded_is_said_and_asked_of_nobody() {
    let world = World::new().await;
    let (reason_of_none, text) = reason(world.node("node").fill(WarmWhat::All).await);
    assert_eq!(reason_of_none, "NotSeeded");
    assert!(text.contains("the manifest"), "{text}");
    let without = world.node_with("without", HasRemote::No, |it| it);
    assert_eq!(reason(without.fill(WarmWhat::All).await).0, "NoRemote");
    let (no_remote, text) = reason(without.seed(WarmWhat::All).await);
    assert_eq!(no_remote, "NoRemote");
    assert!(text.contains("remote.kind"), "{text}");
    assert_eq!(world.registry.requests("/").len(), 0);
}

#[tokio::test]
async fn a_damaged_chunk_ends_in_not_seeded() {
    let world = World::seeded().await;
    let damaged = &world.stored("o-2")[0];
    disk::publish(damaged, b"\0garbage").unwrap();
    let node = world.node("node");
    let (reason, text) = reason(node.fill(WarmWhat::All).await);
    assert_eq!(reason, "NotSeeded", "{text}");
    assert!(!damaged.exists());
}

#[tokio::test]
async fn without_a_remote_a_node_may_ask_the_registry() {
    let world = World::new().await;
    let node = world.node_with("node", HasRemote::No, |it| it);
    let request = FillRequest {
        origin: node.origin_with_registry(),
        ..node.fill_request(WarmWhat::All)
    };
    let filled = node.fill_as(request.clone()).await.unwrap();
    let blob_bytes: u64 = fixtures().iter().map(|it| it.desc.blob_bytes).sum();
    assert_eq!(filled.bytes_from_registry, blob_bytes);
    assert_eq!(filled.bytes_from_remote, 0);
    assert_eq!(node.chunks().await, [all(), all()]);
    assert_eq!(world.blob_gets(), [1, 1]);
    // And where the remote has lost some.
    let world = World::seeded().await;
    std::fs::remove_file(&world.stored("o-1")[0]).unwrap();
    let node = world.node("node");
    let request = FillRequest {
        origin: node.origin_with_registry(),
        ..request
    };
    let filled = node.fill_as(request).await.unwrap();
    assert!(0 < filled.bytes_from_registry, "{filled:?}");
    assert!(layer_bytes() / 2 < filled.bytes_from_remote, "{filled:?}");
    assert_eq!(node.chunks().await, [all(), all()]);
}

#[tokio::test]
async fn warming_leaves_a_reader_its_own_way_to_the_registry() {
    let world = World::seeded().await;
    let node = world.node("node");
    let [fixture, _] = fixtures();
    let source = fixture.source();
    let layer = node.store.layer(&fixture.desc, source.clone()).await;
    let layer = layer.unwrap();
    let lost = world.stored("o-0");
    lost.iter().for_each(|it| std::fs::remove_file(it).unwrap());
    assert_eq!(reason(node.fill(WarmWhat::All).await).0, "NotSeeded");
    present(&node.store, fixture.desc.diff_id, 0..1)
        .await
        .unwrap();
    fixture.expect_chunk(&layer, 0);
    assert!(0 < source.n_opened());
}

#[tokio::test]
async fn warming_stops_below_the_high_watermark_and_evicts_nothing() {
    let world = World::seeded().await;
    let bounded = |max_bytes| move |it| CacheConfig { max_bytes, ..it };
    let other = Fixture::new(300);
    let used_bytes = other.tar.len() as u64;
    // 90 % of it, less 2 %, is not enough for both.
    let max_bytes = (used_bytes + layer_bytes()) * 10 / 9;
    let node = world.node_with("node", HasRemote::WithKey, bounded(max_bytes));
    let layer = node.store.layer(&other.desc, other.source()).await;
    let layer = layer.unwrap();
    let repair = Repair::default();
    let uploaded = node.store.upload(&layer, &other.desc, &repair);
    assert!(matches!(uploaded.await, UploadEnd::There { .. }));
    drop(layer);
    node.store.settle().await;
    let outcome = node.fill(WarmWhat::All).await;
    let Err(WarmError::NoSpace {
        needs_bytes,
        free_bytes,
        ..
    }) = outcome
    else {
        panic!("{outcome:?}");
    };
    assert!((layer_bytes()..layer_bytes() + 100_000).contains(&needs_bytes));
    assert!(free_bytes < needs_bytes && layer_bytes() * 9 / 10 < free_bytes);
    assert_eq!(node.chunks().await, [None, None], "it was known before");
    assert!(node.store.paths().layer(other.desc.diff_id).exists());
    // Less of it fits.
    node.fill(WarmWhat::Index).await.unwrap();
    // What is in use stays even if it is old, and what is old goes.
    let request = FillRequest {
        limits: FillLimits {
            evict_unused_for: Some(Duration::ZERO),
            ..limits()
        },
        ..node.fill_request(WarmWhat::All)
    };
    let in_use = node.store.layer(&other.desc, other.source()).await.unwrap();
    assert_eq!(reason(node.fill_as(request.clone()).await).0, "NoSpace");
    assert!(node.store.paths().layer(other.desc.diff_id).exists());
    drop(in_use);
    let recent = FillRequest {
        limits: FillLimits {
            evict_unused_for: Some(Duration::from_secs(3600)),
            ..limits()
        },
        ..request.clone()
    };
    assert_eq!(reason(node.fill_as(recent).await).0, "NoSpace");
    node.fill_as(request).await.unwrap();
    assert!(!node.store.paths().layer(other.desc.diff_id).exists());
    assert_eq!(node.chunks().await, [all(), all()]);
    // Its own parts were not evicted to make room for others of them.
    let evictions = &node.metrics.layer_cache_evictions;
    assert_eq!(evictions.with_label_values(&["capacity"]).get(), 1);
}

#[tokio::test]
async fn an_image_may_be_bounded_by_itself() {
    let world = World::seeded().await;
    let node = world.node("node");
    let request = |max_new_bytes| FillRequest {
        limits: FillLimits {
            max_new_bytes: Some(max_new_bytes),
            ..limits()
        },
        ..node.fill_request(WarmWhat::All)
    };
    let (no_space, text) = reason(node.fill_as(request(layer_bytes() - 1)).await);
    assert_eq!(no_space, "NoSpace");
    assert!(text.contains("budget"), "{text}");
    assert_eq!(node.chunks().await, [None, None]);
    let index_bytes = 10_000;
    node.fill_as(request(layer_bytes() + index_bytes))
        .await
        .unwrap();
}

#[tokio::test]
async fn two_that_begin_at_once_do_not_share_one_room() {
    let dir = tempfile::tempdir().unwrap();
    let config = CacheConfig {
        max_bytes: 1_000_000,
        ..config(dir.path())
    };
    let store = LayerStore::open(config, None, Metrics::new(), Handle::current()).unwrap();
    let one = store.reserve(500_000, None).await.unwrap();
    let free_bytes = store.reserve(500_000, None).await.unwrap_err();
    assert!((300_000..400_000).contains(&free_bytes), "{free_bytes}");
    one.spent(300_000);
    assert_eq!(one.left_bytes(), 200_000);
    let other = store.reserve(500_000, None).await.unwrap();
    drop(one);
    drop(other);
    store.reserve(850_000, None).await.unwrap();
}

#[tokio::test]
async fn a_warming_keeps_its_pace_and_ends_when_it_is_dropped() {
    let world = World::seeded().await;
    let node = world.node("node");
    let request = FillRequest {
        limits: FillLimits {
            pace: Arc::new(Pace::new(10 * CHUNK_BYTES)),
            ..limits()
        },
        ..node.fill_request(WarmWhat::All)
    };
    let progress = Arc::new(WarmProgress::default());
    let started = Instant::now();
    let warmer = node.warmer();
    let begun = async {
        while progress.snapshot().bytes_done == 0 || started.elapsed() < Duration::from_millis(400)
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = warmer.fill(&request, &progress) => panic!("it takes more than a second"),
        () = begun => {}
    }
    let bytes = progress.snapshot().bytes_done;
    let most = started.elapsed().as_secs_f64() * 10.0 + 2.0;
    let n_chunks = bytes.div_ceil(CHUNK_BYTES);
    assert!(
        0 < n_chunks && n_chunks as f64 <= most,
        "{n_chunks} of {most}"
    );
    let there = |chunks: [Option<Vec<u32>>; 2]| chunks.iter().flatten().flatten().count();
    let at_end = there(node.chunks().await);
    tokio::time::sleep(Duration::from_millis(400)).await;
    let more = there(node.chunks().await) - at_end;
    assert!(
        more <= 2,
        "{more} more came: what was being written may, the next four may not"
    );
    // Nothing is kept for it any more, and the next one goes on.
    let filled = node.fill(WarmWhat::All).await.unwrap();
    assert_eq!(
        filled.bytes_present + filled.bytes_from_remote,
        layer_bytes()
    );
}

#[tokio::test]
async fn a_filling_goes_on_after_an_unclean_end() {
    let world = World::seeded().await;
    let node = world.node("node");
    let request = FillRequest {
        limits: FillLimits {
            pace: Arc::new(Pace::new(10 * CHUNK_BYTES)),
            ..limits()
        },
        ..node.fill_request(WarmWhat::All)
    };
    let progress = Arc::<WarmProgress>::default();
    let warmer = node.warmer();
    let begun = async {
        while progress.snapshot().bytes_done < 3 * CHUNK_BYTES {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = warmer.fill(&request, &progress) => panic!("it takes a second"),
        () = begun => {}
    }
    copy(&world.path("node"), &world.path("after"));
    let after = world.node("after");
    let filled = after.fill(WarmWhat::All).await.unwrap();
    assert_eq!(filled.bytes_wanted, layer_bytes());
    assert_eq!(after.chunks().await, [all(), all()]);
    for fixture in fixtures() {
        let layer = after.store.layer(&fixture.desc, fixture.source()).await;
        fixture.expect_all(&after.store, &layer.unwrap()).await;
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &to),
            false => drop(std::fs::copy(entry.path(), to).unwrap()),
        }
    }
}
