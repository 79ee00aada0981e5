//! An image is put into the remote once, and whoever does so says what went wrong.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use clip_csi::{
    chunk::CHUNK_BYTES,
    disk,
    warm::{Filled, LocalCopy, Phase, SeedRequest, WarmProgress, WarmWhat},
};

use super::world::{DEADLINE, HasRemote, World, all, fixtures, layer_bytes, reason};

#[tokio::test]
async fn the_registry_is_asked_once_and_no_reader_asks_anybody() {
    let world = World::new().await;
    let seeder = world.node("seeder");
    let progress = Arc::new(WarmProgress::default());
    let request = seeder.seed_request(WarmWhat::Recorded);
    let seeded = seeder.warmer().seed(&request, &progress).await.unwrap();
    let blob_bytes: u64 = fixtures().iter().map(|it| it.desc.blob_bytes).sum();
    assert_eq!(seeded.manifest, world.image.digest());
    assert_eq!((seeded.n_layers, seeded.n_layers_present), (2, 0));
    assert_eq!(seeded.blob_bytes, blob_bytes);
    assert_eq!(seeded.layer_bytes, layer_bytes());
    assert_eq!(seeded.bytes_from_registry, blob_bytes);
    assert!(layer_bytes() / 2 < seeded.bytes_to_remote);
    let told = progress.snapshot();
    assert_eq!(told.phase, Phase::Done);
    assert_eq!((told.layers_done, told.layers_total), (2, 2));
    assert_eq!(
        (told.bytes_done, told.bytes_total),
        (blob_bytes, blob_bytes)
    );
    assert_eq!(world.blob_gets(), [1, 1]);
    // Who only seeds keeps nothing.
    assert_eq!(seeder.chunks().await, [None, None]);
    let other = world.node("other seeder");
    let again = tokio::spawn(async move { other.seed(WarmWhat::All).await });
    let again = again.await.unwrap().unwrap();
    assert_eq!((again.n_layers, again.n_layers_present), (2, 2));
    assert_eq!((again.bytes_from_registry, again.bytes_to_remote), (0, 0));
    assert_eq!(world.blob_gets(), [1, 1]);
    let asked = world.registry.requests("/").len();
    for name in ["one", "two", "three"] {
        let node = Arc::new(world.node(name));
        let progress = Arc::new(WarmProgress::default());
        let request = node.fill_request(WarmWhat::All);
        // As the agent does.
        let filled = tokio::spawn({
            let (node, progress) = (Arc::clone(&node), Arc::clone(&progress));
            async move { node.warmer().fill(&request, &progress).await }
        });
        let filled = filled.await.unwrap().unwrap();
        let expected = Filled {
            n_layers: 3,
            bytes_wanted: layer_bytes(),
            bytes_present: 0,
            bytes_from_remote: layer_bytes(),
            bytes_from_registry: 0,
        };
        assert_eq!(filled, expected);
        let told = progress.snapshot();
        assert_eq!((told.layers_done, told.layers_total), (3, 3));
        assert_eq!(
            (told.bytes_done, told.bytes_total),
            (layer_bytes(), layer_bytes())
        );
        assert_eq!(node.chunks().await, [all(), all()]);
        let before = node.remote_gets();
        let again = node.fill(WarmWhat::All).await.unwrap();
        assert_eq!(again.bytes_present, layer_bytes());
        // A reader finds all of it.
        for fixture in fixtures() {
            let source = fixture.source();
            let layer = node.store.layer(&fixture.desc, source.clone()).await;
            let layer = layer.unwrap();
            let image = node
                .store
                .use_image(node.manifest, &[Arc::clone(&layer)], None);
            fixture.expect_all(&node.store, &layer).await;
            drop(image);
            assert_eq!(source.n_opened(), 0);
        }
        node.store.shutdown(DEADLINE).await;
        assert_eq!(node.remote_gets(), before, "the remote was asked");
    }
    assert_eq!(
        world.registry.requests("/").len(),
        asked,
        "nodes have no rights there"
    );
}

#[tokio::test]
async fn a_damaged_document_is_not_believed_and_is_put_again() {
    let world = World::seeded().await;
    for name in ["image-manifest", "image-config"] {
        let stored = world.stored(name);
        let mut content = std::fs::read(&stored[0]).unwrap();
        content[100] ^= 1;
        disk::publish(&stored[0], &content).unwrap();
        let node = world.node(&format!("{name} damaged"));
        let (reason, text) = reason(node.fill(WarmWhat::Index).await);
        assert_eq!(reason, "NotSeeded", "{text}");
        let failures = &node.metrics.verify_failures;
        assert_eq!(failures.with_label_values(&["content_cache"]).get(), 1);
        assert_eq!(world.stored(name), [] as [PathBuf; 0], "it was deleted");
        world.node("seeder").seed(WarmWhat::Index).await.unwrap();
        world.node(name).fill(WarmWhat::Index).await.unwrap();
    }
    assert_eq!(world.blob_gets(), [1, 1]);
}

#[tokio::test]
async fn chunks_that_the_remote_has_lost_are_put_again_if_they_are_wanted() {
    let world = World::seeded().await;
    let lost = world.stored("o-3");
    assert_eq!(lost.len(), 2);
    lost.iter().for_each(|it| std::fs::remove_file(it).unwrap());
    let (not_seeded, text) = reason(world.node("node").fill(WarmWhat::All).await);
    assert_eq!(not_seeded, "NotSeeded");
    assert!(text.contains("chunk 3 of layer sha256:"), "{text}");
    let seeder = world.node("seeder");
    let seeded = seeder.seed(WarmWhat::Index).await.unwrap();
    assert_eq!((seeded.n_layers_present, seeded.bytes_to_remote), (2, 0));
    let seeded = seeder.seed(WarmWhat::All).await.unwrap();
    assert_eq!(seeded.n_layers_present, 0);
    assert!(
        (1..3 * CHUNK_BYTES).contains(&seeded.bytes_to_remote),
        "{seeded:?}"
    );
    assert_eq!(world.stored("o-3").len(), 2);
    // Whatever had come before the first one that was missing: the order is another one each time.
    world.node("node").fill(WarmWhat::All).await.unwrap();
    assert_eq!(world.node("node").chunks().await, [all(), all()]);
}

#[tokio::test]
async fn a_seeder_goes_on_where_the_last_one_was() {
    let world = World::new().await;
    let request = SeedRequest {
        local: LocalCopy::Keep,
        ..world.node("seeder").seed_request(WarmWhat::All)
    };
    let seeder = world.node("seeder");
    let progress = Arc::default();
    seeder.warmer().seed(&request, &progress).await.unwrap();
    seeder.store.shutdown(DEADLINE).await;
    drop(seeder);
    // As if it had died while it put the last chunk, before index and manifest.
    for name in ["manifest", "index-0", "o-5", "image-manifest"] {
        world
            .stored(name)
            .iter()
            .for_each(|it| std::fs::remove_file(it).unwrap());
    }
    let next = world.node("seeder");
    let seeded = next.warmer().seed(&request, &progress).await.unwrap();
    assert_eq!(seeded.bytes_from_registry, 0);
    assert!(seeded.bytes_to_remote < 3 * CHUNK_BYTES, "{seeded:?}");
    assert_eq!(world.blob_gets(), [1, 1]);
    world.node("node").fill(WarmWhat::All).await.unwrap();
}

#[tokio::test]
async fn what_a_registry_refuses_is_named() {
    let world = World::new().await;
    for (status, expected) in [
        (401, "Unauthorized"),
        (403, "Forbidden"),
        (404, "NotFound"),
        (429, "RateLimited"),
        (500, "RegistryDown"),
    ] {
        world.refusal.store(status, Ordering::SeqCst);
        let (reason, text) = reason(world.node("seeder").seed(WarmWhat::All).await);
        assert_eq!(reason, expected, "{status}: {text}");
    }
    world.refusal.store(0, Ordering::SeqCst);
    let node = world.node("seeder");
    let request = SeedRequest {
        platform: "linux/arm64".parse().unwrap(),
        ..node.seed_request(WarmWhat::All)
    };
    let seeded = node.warmer().seed(&request, &Arc::default()).await;
    assert_eq!(reason(seeded).0, "WrongPlatform");
}

#[tokio::test]
async fn a_remote_that_is_down_is_told_apart_from_an_empty_one() {
    let world = World::seeded().await;
    let aside = world.path("aside");
    std::fs::rename(world.remote_dir(), &aside).unwrap();
    block(&world.remote_dir());
    let node = world.node("node");
    let outcomes = [
        reason(node.fill(WarmWhat::All).await),
        reason(world.node("seeder").seed(WarmWhat::All).await),
    ];
    for (reason, text) in outcomes {
        assert_eq!(reason, "RemoteDown", "{text}");
        assert!(text.contains("(dir)"), "{text}");
    }
    assert_eq!(
        world.blob_gets(),
        [1, 1],
        "no registry is asked in its place"
    );
    std::fs::remove_file(world.remote_dir()).unwrap();
    std::fs::rename(aside, world.remote_dir()).unwrap();
    // It is skipped for some seconds by the process that saw it fail.
    world.node("node").fill(WarmWhat::All).await.unwrap();
}

/// The uploader goes on trying for minutes; who waits for it is told before.
#[tokio::test]
async fn a_remote_that_goes_away_is_missed_soon() {
    let world = World::new().await;
    let (remote, aside) = (world.remote_dir(), world.path("aside"));
    *world.at_layer.lock().unwrap() = Some(Box::new(move || {
        std::fs::rename(&remote, aside).unwrap();
        block(&remote);
    }));
    let seeder = world.node_with("seeder", HasRemote::ThatIsTriedForLong, |it| it);
    let seeded = tokio::time::timeout(DEADLINE, seeder.seed(WarmWhat::All));
    let (reason, text) = reason(seeded.await.expect("it is told"));
    assert_eq!(reason, "RemoteDown", "{text}");
}

/// What is below a file cannot be read.
fn block(remote: &Path) {
    disk::publish(remote, b"").unwrap();
}
