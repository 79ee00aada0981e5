//! Layers that are read by their tables of contents, and the remote content cache: what is shared, who is
//! believed, and which of a layer's names is taken.

use std::{ops::Range, path::Path, sync::Arc};

use clip_csi::{
    digest::BlobDigest,
    metrics::Metrics,
    tier::{BlobSource, BlobStream, BoxFuture, SourceError},
};

use crate::{
    by_toc::{PATIENCE, eventually, is_by_toc},
    layer_fixture::{FakeSource, files_below, remote_in},
    toc_fixture::{FORMATS, Format, TocFixture, content},
    toc_node::{Node, remote_of},
};

#[tokio::test]
async fn the_rest_comes_beside_and_goes_to_the_remote() {
    for format in FORMATS {
        let shared = tempfile::tempdir().unwrap();
        let fixture = TocFixture::new(format);
        let layers = std::slice::from_ref(&fixture.desc);
        let node = Node::with(Some(shared.path()), true, |it| it);
        let source = fixture.source();
        let image = node.mount(layers, &source).await;
        let expected = node.file(&image, "data/last").await.unwrap();
        let file = Arc::clone(image.layers[0].file());
        eventually(|| file.is_complete()).await;
        let place = file.dir().to_owned();
        eventually(|| place.join("upload").exists()).await;
        let whole = node.tree(&image).await;
        drop((file, image));
        node.store.shutdown(PATIENCE).await;
        assert!(!place.join("upload").exists(), "it is uploaded");

        // Another node asks its registry for nothing.
        let other = Node::with(Some(shared.path()), true, |it| it);
        let source = fixture.source();
        let image = other.mount(layers, &source).await;
        assert!(is_by_toc(&image.layers[0], &fixture));
        assert!(other.file(&image, "data/last").await.unwrap() == expected);
        assert!(other.tree(&image).await == whole);
        assert_eq!(source.n_opened(), 0, "{format:?}");
        // What the remote loses comes from the registry, by pieces, as the remote's map names them.
        for path in files_below(&shared.path().join("remote")) {
            let name = path.file_name().unwrap().to_str().unwrap();
            if name.starts_with("o-") {
                std::fs::remove_file(path).unwrap();
            }
        }
        let third = Node::with(Some(shared.path()), false, |it| it);
        let image = third.mount(layers, &source).await;
        assert!(third.file(&image, "data/last").await.unwrap() == expected);
        let opened = source.opened.lock().unwrap().clone();
        assert_eq!(opened.len(), 1, "{format:?}: {opened:?}");
        assert!(opened[0].end <= fixture.table as u64);
    }
}

#[tokio::test]
async fn what_nobody_can_vouch_for_is_not_shared() {
    let shared = tempfile::tempdir().unwrap();
    let fixture = TocFixture::new(Format::Estargz);
    let metrics = Metrics::new();
    let remote = remote_in(&shared.path().join("remote"), None, &metrics);
    let node = Node::start(tempfile::tempdir().unwrap(), metrics, remote, true, |it| it);
    let image = node
        .mount(std::slice::from_ref(&fixture.desc), &fixture.source())
        .await;
    assert!(is_by_toc(&image.layers[0], &fixture));
    node.tree(&image).await;
    let file = Arc::clone(image.layers[0].file());
    eventually(|| file.is_complete()).await;
    drop((file, image));
    node.store.shutdown(PATIENCE).await;
    let stored = shared.path().join("remote");
    assert!(!stored.exists() || files_below(&stored).is_empty());
}

#[tokio::test]
async fn what_the_remote_has_by_its_diff_id_is_taken() {
    let shared = tempfile::tempdir().unwrap();
    let fixture = TocFixture::new(Format::Estargz);
    let node = Node::with(Some(shared.path()), false, |it| it);
    let plain = [fixture.desc.without_toc()];
    let expected = {
        let image = node.mount(&plain, &fixture.source()).await;
        node.tree(&image).await
    };
    node.store.shutdown(PATIENCE).await;
    let other = Node::with(Some(shared.path()), false, |it| it);
    let source = fixture.source();
    let image = other
        .mount(std::slice::from_ref(&fixture.desc), &source)
        .await;
    assert_eq!(image.layers[0].file().diff_id(), fixture.desc.diff_id);
    assert!(other.tree(&image).await == expected);
    assert_eq!((source.n_opened(), other.lookups("hit")), (0, 0));
}

/// A map of other digests of the same pieces.
fn lie_about(map: &[u8]) -> Vec<u8> {
    let mut lie = map.to_vec();
    let body = lie.len() - 32;
    for record in lie[16..body - 88].chunks_exact_mut(64) {
        record[32] ^= 1;
    }
    let checksum = blake3::hash(&lie[..body]);
    lie[body..].copy_from_slice(checksum.as_bytes());
    lie
}

/// Puts an access map into the remote, as whoever can write to it may.
fn put_map(shared: &Path, fixture: &TocFixture, map: &[u8]) {
    let (name, blob) = (fixture.by_toc().diff_id.hex(), fixture.desc.blob.hex());
    let place = shared.join("remote").join(&name[..2]).join(&name);
    std::fs::create_dir_all(&place).unwrap();
    let value = [&(map.len() as u64).to_le_bytes()[..], map].concat();
    clip_csi::disk::publish(&place.join(format!("access-{blob}-0")), &value).unwrap();
}

#[tokio::test]
async fn where_a_map_of_the_remote_leads_astray_the_table_gives_another() {
    let shared = tempfile::tempdir().unwrap();
    let fixture = TocFixture::new(Format::Estargz);
    let layers = std::slice::from_ref(&fixture.desc);
    let node = Node::with(Some(shared.path()), true, |it| it);
    let source = fixture.source();
    let image = node.mount(layers, &source).await;
    node.tree(&image).await;
    let file = Arc::clone(image.layers[0].file());
    eventually(|| file.is_complete()).await;
    let place = file.dir().to_owned();
    eventually(|| place.join("upload").exists()).await;
    let map = std::fs::read(place.join("access")).unwrap();
    drop((file, image));
    node.store.shutdown(PATIENCE).await;
    for path in files_below(&shared.path().join("remote")) {
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("o-") {
            std::fs::remove_file(path).unwrap();
        }
    }
    // Another node knows the layer's digests from the remote, which are authenticated; its map is not.
    put_map(shared.path(), &fixture, &lie_about(&map));
    let node = Node::with(Some(shared.path()), false, |it| it);
    let image = node.mount(layers, &source).await;
    assert!(node.file(&image, "data/last").await.unwrap() == content(31, 5000));
    let path = image.layers[0].file().dir().join("access");
    assert!(std::fs::read(path).unwrap() == map);
    let mut stored = files_below(&shared.path().join("remote")).into_iter();
    assert!(stored.all(|it| {
        !it.file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("access-")
    }));
}

#[tokio::test]
async fn a_map_of_the_remote_says_nothing_about_what_is_to_be_learned() {
    let shared = tempfile::tempdir().unwrap();
    let fixture = TocFixture::new(Format::ZstdChunked);
    let layers = std::slice::from_ref(&fixture.desc);
    let node = Node::with(Some(shared.path()), false, |it| it);
    let source = fixture.source();
    let image = node.mount(layers, &source).await;
    let path = image.layers[0].file().dir().join("access");
    let map = std::fs::read(&path).unwrap();
    drop(image);
    // Somebody who can write to the remote has a map there that knows the layer's pieces by other digests:
    // those of what they would have read.
    put_map(shared.path(), &fixture, &lie_about(&map));
    std::fs::remove_file(&path).unwrap();
    let Node { dir, .. } = node;
    let metrics = Metrics::new();
    let remote = remote_of(shared.path(), &metrics);
    let node = Node::start(dir, metrics, remote, false, |it| it);
    let image = node.mount(layers, &source).await;
    assert!(node.file(&image, "data/last").await.unwrap() == content(31, 5000));
    assert!(std::fs::read(&path).unwrap() == map);
}

/// A registry of a volume that demands a certain index.
#[derive(Debug)]
struct Pinned(Arc<FakeSource>);

impl BlobSource for Pinned {
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        self.0.open(blob, blob_bytes, range)
    }

    fn pins_index(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn who_demands_an_index_is_given_no_other() {
    let (node, fixture) = (Node::new(), TocFixture::new(Format::Estargz));
    let source = Arc::new(Pinned(fixture.source()));
    let layer = node.store.layer(&fixture.desc, source).await.unwrap();
    assert!(!is_by_toc(&layer, &fixture));
}
