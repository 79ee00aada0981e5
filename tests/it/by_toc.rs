//! Layers that are read by their blobs' tables of contents: what is mounted, what it costs, and what happens
//! to those that lie.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clip_csi::{
    chunk::CHUNK_BYTES,
    digest::{BlobDigest, DiffId, ManifestDigest},
    index::image::{FileType, Ino},
    indexer::OpenImage,
    layer::{CacheConfig, catalog, store::Layer},
    metrics::Metrics,
    registry::ResolvedImage,
    tier::{BlobSource, PresentError},
};

use crate::{
    layer_fixture::{FakeSource, decompressions, present},
    toc_fixture::{FORMATS, Format, PIECE_BYTES, TocFixture, Writer, content},
    toc_node::{Node, Seen},
};

/// Generous: the machine may be busy, and no test waits for it to pass.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn is_by_toc(layer: &Layer, fixture: &TocFixture) -> bool {
    layer.file().diff_id() == fixture.by_toc().diff_id
}

pub(crate) async fn eventually(what: impl Fn() -> bool) {
    let comes = async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(PATIENCE, comes)
        .await
        .expect("it should come to that");
}

/// What a reader of the same blob sees that was streamed whole.
async fn streamed(fixture: &TocFixture) -> BTreeMap<String, Seen> {
    let node = Node::new();
    let image = node
        .mount(&[fixture.desc.without_toc()], &fixture.source())
        .await;
    assert!(image.layers[0].file().is_complete());
    node.tree(&image).await
}

#[tokio::test]
async fn a_layer_is_the_same_as_when_it_is_streamed() {
    for format in FORMATS {
        let (node, fixture) = (Node::new(), TocFixture::new(format));
        let image = node
            .mount(std::slice::from_ref(&fixture.desc), &fixture.source())
            .await;
        assert!(is_by_toc(&image.layers[0], &fixture), "{format:?}");
        let mut expected = streamed(&fixture).await;
        if format == Format::Estargz {
            for own in ["/stargz.index.json", "/.no.prefetch.landmark"] {
                assert!(expected.remove(own).is_some(), "{own}");
            }
        }
        let seen = node.tree(&image).await;
        assert!(
            seen.keys().eq(expected.keys()),
            "{format:?}: {:?}",
            seen.keys()
        );
        for (path, file) in &seen {
            assert!(*file == expected[path], "{format:?}: {path} differs");
        }
        assert_eq!(seen["/model"].content.len(), 5 * 1_044_480 + 99);
        assert_eq!(node.lookups("hit"), 1);
        assert_eq!(decompressions(&node.metrics), 0, "nothing was streamed");
    }
}

#[tokio::test]
async fn a_mount_costs_two_requests_and_a_small_file_one() {
    for format in FORMATS {
        let (node, fixture) = (Node::new(), TocFixture::new(format));
        let source = fixture.source();
        let image = node
            .mount(std::slice::from_ref(&fixture.desc), &source)
            .await;
        let opened = source.opened.lock().unwrap().clone();
        let expected = match format {
            Format::Estargz => 2,
            Format::ZstdChunked => 1,
        };
        assert_eq!(opened.len(), expected, "{opened:?}");
        let table = fixture.table as u64;
        assert!(opened.iter().all(|it| table <= it.start), "{opened:?}");
        assert_eq!(image.layers[0].file().present_bytes(), 0);
        source.opened.lock().unwrap().clear();
        assert!(node.file(&image, "data/last").await.unwrap() == content(31, 5000));
        let opened = source.opened.lock().unwrap().clone();
        assert_eq!(opened.len(), 1, "{opened:?}");
        assert!(opened[0].end <= table && opened[0].end - opened[0].start < 8 << 10);
        // What is known is asked of nobody, also after a restart.
        drop(image);
        let node = node.restarted();
        source.opened.lock().unwrap().clear();
        let image = node
            .mount(std::slice::from_ref(&fixture.desc), &source)
            .await;
        assert!(node.file(&image, "data/last").await.unwrap() == content(31, 5000));
        assert_eq!(source.n_opened(), 0);
    }
}

#[tokio::test]
async fn a_flipped_byte_of_a_piece_reaches_no_reader() {
    for format in FORMATS {
        let fixture = TocFixture::new(format);
        let expected = streamed(&fixture).await;
        for (start, len) in &fixture.pieces {
            let mut blob = fixture.blob.clone();
            blob[start + len / 2] ^= 1;
            let (node, source) = (Node::new(), FakeSource::new(blob));
            let image = node
                .mount(std::slice::from_ref(&fixture.desc), &source)
                .await;
            let mut n_refused = 0;
            for (path, file) in &expected {
                let is_own = path == "/stargz.index.json" || path == "/.no.prefetch.landmark";
                if file.file_type != FileType::Regular || is_own {
                    continue;
                }
                match node.file(&image, &path[1..]).await {
                    Ok(content) => assert!(content == file.content, "{path}"),
                    Err(PresentError::Refused { .. }) => n_refused += 1,
                    Err(err) => panic!("{path}: {err}"),
                }
            }
            // The landmark has a piece that is in no layer.
            let is_shown = format == Format::ZstdChunked || *start != fixture.pieces[0].0;
            assert_eq!(0 < n_refused, is_shown, "{format:?}: piece at {start}");
            let failures = node
                .metrics
                .verify_failures
                .with_label_values(&["registry"]);
            assert_eq!(0 < failures.get(), is_shown);
            assert!(catalog::verify(image.layers[0].file()).unwrap().wrong == 0);
        }
    }
}

#[tokio::test]
async fn a_wrong_piece_keeps_no_other_away() {
    for format in FORMATS {
        let fixture = TocFixture::new(format);
        // The first of the large file's.
        let (start, len) = fixture.pieces[fixture.pieces.len() - 4];
        let mut blob = fixture.blob.clone();
        blob[start + len / 2] ^= 1;
        let node = Node::with(None, true, |it| it);
        let image = node
            .mount(std::slice::from_ref(&fixture.desc), &FakeSource::new(blob))
            .await;
        node.file(&image, "data/0").await.unwrap();
        let file = image.layers[0].file();
        let n_chunks = PIECE_BYTES.div_ceil(CHUNK_BYTES as usize) as u64;
        eventually(|| file.absent_bytes() == n_chunks * CHUNK_BYTES).await;
        assert!(node.file(&image, "data/last").await.unwrap() == content(31, 5000));
        assert!(node.file(&image, "model").await.is_err());
    }
}

#[tokio::test]
async fn a_table_that_cannot_be_used_has_the_layer_streamed() {
    for format in FORMATS {
        let fixture = TocFixture::new(format);
        let expected = streamed(&fixture).await;
        let with_digest = |digest| {
            let mut desc = fixture.desc.clone();
            desc.toc.as_mut().unwrap().digest = digest;
            desc
        };
        let wrong_digest = with_digest(BlobDigest::of(b"another table"));
        for (what, desc, refuses_parts) in [
            ("wrong digest", wrong_digest, false),
            ("no ranges", fixture.desc.clone(), true),
        ] {
            let (node, source) = (Node::new(), fixture.source());
            source.refuses_parts.store(refuses_parts, Ordering::SeqCst);
            let image = node.mount(std::slice::from_ref(&desc), &source).await;
            let file = image.layers[0].file();
            assert_eq!(file.diff_id(), fixture.desc.diff_id, "{format:?}: {what}");
            assert!(node.tree(&image).await == expected, "{format:?}: {what}");
            assert_eq!(node.lookups("unusable"), 1, "{what}");
            assert!(
                !node
                    .store
                    .paths()
                    .layer(desc.by_toc().unwrap().diff_id)
                    .exists()
            );
        }
    }
}

#[tokio::test]
async fn a_piece_that_is_too_large_has_the_layer_streamed() {
    for format in FORMATS {
        let large = content(1, (16 << 20) + 1);
        let mut writer = Writer::new(format, large.len());
        writer.file("large", &large);
        let (node, fixture) = (Node::new(), writer.finish());
        let image = node
            .mount(std::slice::from_ref(&fixture.desc), &fixture.source())
            .await;
        assert_eq!(image.layers[0].file().diff_id(), fixture.desc.diff_id);
        assert!(node.file(&image, "large").await.unwrap() == large);
        assert_eq!(node.lookups("unusable"), 1);
    }
}

#[tokio::test]
async fn a_layer_without_content_is_streamed_as_a_matter_of_course() {
    for format in FORMATS {
        let mut writer = Writer::new(format, 1000);
        writer.directory("bare");
        writer.file("bare/empty", b"");
        writer.link("bare/link", "symlink", "empty");
        let (node, fixture) = (Node::new(), writer.finish());
        let image = node
            .mount(std::slice::from_ref(&fixture.desc), &fixture.source())
            .await;
        assert_eq!(image.layers[0].file().diff_id(), fixture.desc.diff_id);
        assert!(node.tree(&image).await == streamed(&fixture).await);
        assert_eq!(node.lookups("empty"), 1);
        assert_eq!(node.lookups("unusable"), 0);
    }
}

#[tokio::test]
async fn a_registry_that_is_down_is_the_error_of_the_table_as_well() {
    let (node, fixture) = (Node::new(), TocFixture::new(Format::Estargz));
    let source = fixture.source();
    source.is_down.store(true, Ordering::SeqCst);
    let down = node.store.layer(&fixture.desc, source.clone()).await;
    assert!(matches!(down, Err(PresentError::Origin { .. })), "{down:?}");
    assert_eq!((node.lookups("error"), source.n_opened()), (1, 1));
    source.is_down.store(false, Ordering::SeqCst);
    let layer = node.store.layer(&fixture.desc, source).await.unwrap();
    assert!(is_by_toc(&layer, &fixture));
}

/// A blob whose table says of a file what it does not have.
fn lying(format: Format, said: &[u8]) -> TocFixture {
    let mut writer = Writer::new(format, PIECE_BYTES);
    writer.file_that_says("secret", &content(1, said.len()), said);
    writer.finish()
}

#[tokio::test]
async fn a_lie_reaches_no_reader_of_the_honest_image() {
    for format in FORMATS {
        let honest = lying(format, &content(1, 5000));
        // The same layer by its DiffId, as its configuration says; and the very same tar.
        let mut evil = {
            let mut writer = Writer::new(format, PIECE_BYTES);
            writer.file("secret", &content(2, 5000));
            writer.finish()
        };
        evil.desc.diff_id = honest.desc.diff_id;
        let node = Node::new();
        let fooled = node
            .mount(std::slice::from_ref(&evil.desc), &evil.source())
            .await;
        assert!(node.file(&fooled, "secret").await.unwrap() == content(2, 5000));
        // By the blob's stream, by a table of its own, and by no table.
        for desc in [honest.desc.clone(), honest.desc.without_toc()] {
            let image = ResolvedImage {
                manifest: ManifestDigest::of(b"an honest image"),
                layers: vec![desc],
            };
            let source: Arc<dyn BlobSource> = honest.source();
            let image = node.indexer.open(&image, &source).await.unwrap();
            assert!(node.file(&image, "secret").await.unwrap() == content(1, 5000));
            let ids = [&fooled, &image].map(|it| it.layers[0].file().diff_id());
            assert_ne!(ids[0], ids[1]);
        }
        // One whose table does not describe its own blob gives nothing.
        let liar = lying(format, &content(3, 5000));
        let layer = node.store.layer(&liar.desc, liar.source()).await.unwrap();
        let refused = present(&node.store, layer.file().diff_id(), 0..1).await;
        assert!(
            matches!(refused, Err(PresentError::Refused { .. })),
            "{refused:?}"
        );
        assert_eq!(layer.file().present_bytes(), 0);
    }
}

#[tokio::test]
async fn after_an_unclean_stop_what_was_learned_is_verified_not_fetched() {
    for format in FORMATS {
        let (node, fixture) = (Node::new(), TocFixture::new(format));
        let source = fixture.source();
        let layers = std::slice::from_ref(&fixture.desc);
        let image = node.mount(layers, &source).await;
        for path in ["model", "data/last"] {
            node.file(&image, path).await.unwrap();
        }
        let place = image.layers[0].file().dir().to_owned();
        let model = image
            .index
            .lookup(&image.index.node(Ino::ROOT).unwrap(), b"model");
        let model = image.index.node(model.unwrap()).unwrap();
        let torn = image.index.extents(&model, 0, 1).next().unwrap();
        drop(image);
        // As if the bitmap had not reached the disk, and one chunk of the data neither.
        std::fs::remove_file(place.join("state")).unwrap();
        let data = std::fs::OpenOptions::new()
            .write(true)
            .open(place.join("data"))
            .unwrap();
        std::os::unix::fs::FileExt::write_all_at(&data, b"torn", torn.layer_offset).unwrap();
        let node = node.restarted();
        source.opened.lock().unwrap().clear();
        let image = node.mount(layers, &source).await;
        assert_eq!(image.layers[0].file().present_bytes(), 0);
        assert!(node.file(&image, "data/last").await.unwrap() == content(31, 5000));
        assert_eq!(source.n_opened(), 0, "the chunk on disk was right");
        let model = node.file(&image, "model").await.unwrap();
        assert!(model == content(30, model.len()));
        let opened = source.opened.lock().unwrap().clone();
        assert_eq!(
            opened.len(),
            1,
            "the torn piece was not: {opened:?} of {:?}",
            fixture.pieces
        );
        // A layer whose learned digests are gone is made anew.
        drop(image);
        std::fs::remove_file(place.join("digests")).unwrap();
        let node = node.restarted();
        let image = node.mount(layers, &source).await;
        assert_eq!(node.lookups("hit"), 1);
        assert!(node.file(&image, "data/last").await.unwrap() == content(31, 5000));
    }
}

#[tokio::test]
async fn what_was_evicted_comes_again() {
    let mut writer = Writer::new(Format::Estargz, PIECE_BYTES);
    let files: Vec<_> = (0..12u64).map(|it| content(it, PIECE_BYTES)).collect();
    for (n, file) in files.iter().enumerate() {
        writer.file(&format!("{n}"), file);
    }
    let fixture = writer.finish();
    let node = Node::with(None, false, |it| CacheConfig {
        max_bytes: 20_000_000,
        ..it
    });
    let source = fixture.source();
    let image = node
        .mount(std::slice::from_ref(&fixture.desc), &source)
        .await;
    let evicted = || {
        let counter = &node.metrics.layer_cache_extent_evictions;
        counter.with_label_values(&["capacity"]).get()
    };
    for _ in 0..2 {
        for (n, file) in files.iter().enumerate() {
            assert!(node.file(&image, &n.to_string()).await.unwrap() == *file);
            node.store.sweep_soon();
            node.store.settle().await;
        }
    }
    assert!(0 < evicted(), "the layer is larger than the cache");
    assert!(files.len() < source.n_opened());
}

#[tokio::test]
async fn a_map_that_was_lost_is_made_again_of_the_table() {
    for format in FORMATS {
        let (node, fixture) = (Node::new(), TocFixture::new(format));
        let source = fixture.source();
        let layers = std::slice::from_ref(&fixture.desc);
        let image = node.mount(layers, &source).await;
        let path = image.layers[0].file().dir().join("access");
        let map = std::fs::read(&path).unwrap();
        for damage in [None, Some(&map[..map.len() / 2])] {
            std::fs::remove_file(&path).unwrap();
            if let Some(damage) = damage {
                clip_csi::disk::publish(&path, damage).unwrap();
            }
            let again = Node::start(
                tempfile::tempdir().unwrap(),
                Metrics::new(),
                None,
                false,
                |it| CacheConfig {
                    dir: node.dir.path().to_owned(),
                    ..it
                },
            );
            source.is_down.store(true, Ordering::SeqCst);
            let image = again.mount(layers, &source).await;
            assert!(again.file(&image, "data/last").await.is_err());
            // Once it can be had, it is.
            source.is_down.store(false, Ordering::SeqCst);
            let read = again.file(&image, "data/last").await.unwrap();
            assert!(read == content(31, 5000));
            assert!(std::fs::read(&path).unwrap() == map, "{format:?}");
            image.layers[0].file().drop_chunk(0);
            (0..image.layers[0].file().n_chunks())
                .for_each(|it| image.layers[0].file().drop_chunk(it));
        }
    }
}

#[tokio::test]
async fn a_layer_keeps_the_name_that_its_image_knows() {
    let (node, fixture) = (Node::new(), TocFixture::new(Format::ZstdChunked));
    let source = fixture.source();
    let id = |image: &OpenImage| image.layers[0].file().diff_id();
    // Warmed by its DiffId first, then mounted, and the other way round.
    let plain = [fixture.desc.without_toc()];
    let by_toc = std::slice::from_ref(&fixture.desc);
    let image = node.mount(&plain, &source).await;
    assert_eq!(id(&node.mount(by_toc, &source).await), fixture.desc.diff_id);
    drop(image);
    let node = Node::new();
    let image = node.mount(by_toc, &source).await;
    let name = fixture.by_toc().diff_id;
    assert_eq!(id(&node.mount(&plain, &source).await), name);
    assert_eq!(
        node.indexer
            .known_layers(ManifestDigest::of(b"an image"))
            .await
            .unwrap()[0]
            .diff_id,
        name
    );
    drop(image);
    // Switched off, what is there stays, and nothing new is read so.
    let Node { dir, .. } = node;
    let off = |it: CacheConfig| CacheConfig {
        layers_by_toc: false,
        ..it
    };
    let node = Node::start(dir, Metrics::new(), None, false, off);
    assert_eq!(id(&node.mount(by_toc, &source).await), name);
    let node = Node::with(None, false, off);
    assert_eq!(id(&node.mount(by_toc, &source).await), fixture.desc.diff_id);
    // Who vouches for layers has them by their DiffIds.
    let mut node = Node::new();
    node.indexer.use_no_toc();
    assert_eq!(id(&node.mount(by_toc, &source).await), fixture.desc.diff_id);
}

#[tokio::test]
async fn a_disk_that_is_full_is_served_past() {
    use clip_csi::{fair::Claimant, tier::Chunk};
    for format in FORMATS {
        let (node, fixture) = (Node::new(), TocFixture::new(format));
        let image = node
            .mount(std::slice::from_ref(&fixture.desc), &fixture.source())
            .await;
        let file = image.layers[0].file();
        let model = image
            .index
            .lookup(&image.index.node(Ino::ROOT).unwrap(), b"model");
        let node_of = image.index.node(model.unwrap()).unwrap();
        let whole = content(30, node_of.size as usize);
        for extent in image.index.extents(&node_of, 0, node_of.size) {
            for number in clip_csi::chunk::covering(extent.layer_offset, extent.len).unwrap() {
                let (sender, receiver) = tokio::sync::oneshot::channel();
                let wanted = Chunk {
                    layer: file.diff_id(),
                    number,
                    bytes: file.chunk_bytes(number),
                };
                let done = Box::new(|lent| drop(sender.send(lent)));
                node.store.lend_to(Claimant::Mount(0), wanted, done);
                let lent = receiver.await.unwrap().unwrap();
                let start = u64::from(number) * CHUNK_BYTES;
                let from = (extent.file_offset + start - extent.layer_offset) as usize;
                let len = (extent.layer_offset + extent.len - start).min(wanted.bytes) as usize;
                let mut bytes = vec![0; len];
                lent.read_at(&mut bytes, 0).unwrap();
                assert!(
                    bytes == whole[from..from + len],
                    "{format:?}: chunk {number}"
                );
            }
        }
        assert_eq!(file.present_bytes(), 0, "nothing was written");
    }
}

#[test]
fn names_of_layers_differ() {
    let [a, b] = FORMATS.map(TocFixture::new);
    let ids: [DiffId; 4] = [
        a.desc.diff_id,
        b.desc.diff_id,
        a.by_toc().diff_id,
        b.by_toc().diff_id,
    ];
    let distinct: std::collections::BTreeSet<_> = ids.iter().collect();
    assert_eq!(distinct.len(), 4);
}
