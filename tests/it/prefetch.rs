//! What is read first of an image is recorded, shared, and fetched ahead the next time.

use std::{
    path::Path,
    sync::{Arc, LazyLock},
    time::Duration,
};

use clip_csi::{
    chunk::CHUNK_BYTES,
    digest::ManifestDigest,
    index::profile::{self, MAX_PROFILE_BYTES, Profile, Touch},
    layer::{
        CacheConfig,
        images::ImageUse,
        store::{Layer, LayerStore, Remote},
    },
    metrics::Metrics,
    tier::Prefetch,
};
use tokio::runtime::Handle;

use crate::layer_fixture::{FakeSource, Fixture, config, key_file, names, present, remote_in};

const N_CHUNKS: u32 = 12;

/// Longer than anything here takes, on any machine.
const DEADLINE: Duration = Duration::from_secs(20);

fn manifest() -> ManifestDigest {
    ManifestDigest::of(b"image")
}

fn touches(of: &[(u32, u32)]) -> Vec<Touch> {
    let touches = of.iter().map(|(layer, chunk)| Touch {
        layer: *layer,
        chunk: *chunk,
    });
    touches.collect()
}

fn profile(of: &[(u32, u32)]) -> Profile {
    Profile {
        touches: touches(of),
        is_whole: true,
    }
}

/// The layers of the image.
fn fixtures() -> &'static [Fixture; 2] {
    // To compress them takes longer than most tests.
    static FIXTURES: LazyLock<[Fixture; 2]> = LazyLock::new(|| {
        let bytes = N_CHUNKS as usize * CHUNK_BYTES as usize - 5000;
        [Fixture::sized(71, bytes), Fixture::sized(72, bytes)]
    });
    &FIXTURES
}

/// A remote content cache that has all of the image, because a first node has made it.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let world = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let first = world.node("first", |it| it).await;
        // Which waits for the upload.
        first.store.shutdown(DEADLINE).await;
        world
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    fn remote(&self, metrics: &Metrics) -> Remote {
        let key = key_file(self.dir.path());
        remote_in(&self.path("remote"), Some(&key), metrics).unwrap()
    }

    /// Has a node with the remote open the layers.
    async fn node(&self, name: &str, with: impl FnOnce(CacheConfig) -> CacheConfig) -> Node {
        let metrics = Metrics::new();
        let remote = self.remote(&metrics);
        Node::open(&self.path(name), fixtures(), Some(remote), metrics, with).await
    }

    /// Has a node record that these chunks are wanted, and keep that.
    async fn record(&self, name: &str, wanted: &[(usize, u32)]) {
        let node = self.node(name, |it| it).await;
        let image = node.mount(None);
        node.want(wanted).await;
        drop(image);
        node.store.shutdown(DEADLINE).await;
    }

    /// Puts a profile into the remote content cache.
    async fn share(&self, content: &[u8]) {
        let remote = self.remote(&Metrics::new());
        assert!(remote.cache.put_profile(&manifest(), content).await);
    }

    async fn shared(&self) -> Option<Profile> {
        let remote = self.remote(&Metrics::new());
        let content = remote.cache.profile(&manifest(), MAX_PROFILE_BYTES).await?;
        Some(profile::decode(&content, manifest(), &[N_CHUNKS, N_CHUNKS]).unwrap())
    }
}

/// A node that has the image's layers open.
struct Node {
    metrics: Metrics,
    store: LayerStore,
    layers: Vec<Arc<Layer>>,
    sources: Vec<Arc<FakeSource>>,
}

impl Node {
    async fn open(
        dir: &Path,
        fixtures: &[Fixture],
        remote: Option<Remote>,
        metrics: Metrics,
        with: impl FnOnce(CacheConfig) -> CacheConfig,
    ) -> Self {
        let config = with(config(dir));
        let store = LayerStore::open(config, remote, metrics.clone(), Handle::current()).unwrap();
        let (mut layers, mut sources) = (Vec::new(), Vec::new());
        for fixture in fixtures {
            let source = fixture.source();
            layers.push(store.layer(&fixture.desc, source.clone()).await.unwrap());
            sources.push(source);
        }
        Self {
            metrics,
            store,
            layers,
            sources,
        }
    }

    fn mount(&self, wants: Option<Prefetch>) -> ImageUse {
        self.store.use_image(manifest(), &self.layers, wants)
    }

    async fn want(&self, wanted: &[(usize, u32)]) {
        for (layer, chunk) in wanted {
            let diff_id = self.layers[*layer].file().diff_id();
            present(&self.store, diff_id, *chunk..*chunk + 1)
                .await
                .unwrap();
        }
    }

    fn present(&self) -> Vec<(u32, u32)> {
        let layers = (0..).zip(&self.layers);
        let chunks = layers.flat_map(|(at, layer)| {
            let there = |it: &u32| layer.file().has(*it..*it + 1);
            (0..N_CHUNKS).filter(there).map(move |it| (at, it))
        });
        chunks.collect()
    }

    fn count(&self, outcome: &str) -> u64 {
        let counter = self.metrics.prefetch_chunks.with_label_values(&[outcome]);
        counter.get()
    }

    fn n_opened(&self) -> usize {
        self.sources.iter().map(|it| it.n_opened()).sum()
    }

    fn profile_on_disk(&self) -> Option<Profile> {
        let content = std::fs::read(self.store.paths().profile(manifest())).ok()?;
        Some(profile::decode(&content, manifest(), &[N_CHUNKS, N_CHUNKS]).unwrap())
    }

    /// Empties the layers, as eviction and a new fill from the index would.
    fn empty(&self) {
        for layer in &self.layers {
            (0..N_CHUNKS).for_each(|it| layer.file().drop_chunk(it));
            let data = layer.file().dir().join("data");
            let data = std::fs::File::options().write(true).open(data).unwrap();
            data.set_len(0).unwrap();
            data.set_len(layer.file().layer_bytes()).unwrap();
        }
        for source in &self.sources {
            source.opened.lock().unwrap().clear();
        }
    }

    async fn eventually(&self, what: impl Fn(&Self) -> bool) {
        let comes = async {
            while !what(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(DEADLINE, comes)
            .await
            .expect("it should come to that");
    }

    /// Waits until so many chunks have been looked at.
    async fn fetched_ahead(&self, n_chunks: u64) {
        let outcomes = ["fetched", "present", "skipped"];
        let n_done = |it: &Self| {
            outcomes
                .iter()
                .map(|outcome| it.count(outcome))
                .sum::<u64>()
        };
        self.eventually(|it| n_chunks <= n_done(it)).await;
    }

    /// Ends all that is done, so that what is there is all that comes.
    async fn stop(&self) {
        self.store.shutdown(DEADLINE).await;
    }
}

const WANTED: &[(usize, u32)] = &[(1, 7), (0, 3), (1, 7), (1, 8), (0, 0)];
const RECORDED: &[(u32, u32)] = &[(1, 7), (0, 3), (1, 8), (0, 0)];
const SORTED: &[(u32, u32)] = &[(0, 0), (0, 3), (1, 7), (1, 8)];

#[tokio::test]
async fn what_is_wanted_first_is_kept_and_fetched_ahead_on_another_node() {
    let world = World::new().await;
    world.record("second", WANTED).await;
    let recorded = Profile {
        touches: touches(RECORDED),
        // It was mounted for less than a minute.
        is_whole: false,
    };
    assert_eq!(world.shared().await, Some(recorded.clone()));

    let third = world.node("third", |it| it).await;
    assert_eq!(third.present(), []);
    let image = third.mount(None);
    third.fetched_ahead(4).await;
    drop(image);
    third.stop().await;
    assert_eq!(third.present(), SORTED);
    assert_eq!(third.count("fetched"), 4);
    for (layer, chunk) in SORTED {
        let layer = *layer as usize;
        fixtures()[layer].expect_chunk(&third.layers[layer], *chunk);
    }
    assert_eq!(third.n_opened(), 0, "the registry was asked");
    // Nobody wanted anything new: what is known stays as it is.
    assert_eq!(third.profile_on_disk(), Some(recorded.clone()));
    assert_eq!(world.shared().await, Some(recorded));
}

#[tokio::test]
async fn what_was_recorded_in_a_short_life_is_added_to_and_a_whole_profile_is_not() {
    let world = World::new().await;
    world.record("second", &[(0, 5)]).await;
    world.record("third", &[(1, 2), (0, 5), (0, 6)]).await;
    let shared = world.shared().await.unwrap();
    // In which order they come depends on whether the fetching ahead was first.
    assert_eq!(shared.touches, touches(&[(0, 5), (1, 2), (0, 6)]));
    assert!(!shared.is_whole);

    let whole = profile(&[(0, 1)]);
    world
        .share(&profile::encode(manifest(), &whole).unwrap())
        .await;
    world.record("fourth", &[(1, 9)]).await;
    assert_eq!(world.shared().await, Some(whole));
}

#[tokio::test]
async fn an_image_that_lost_its_layers_is_fetched_from_the_registry_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::open(dir.path(), fixtures(), None, Metrics::new(), |it| it).await;
    node.empty();
    let content = profile::encode(manifest(), &profile(&[(1, 7), (1, 8), (0, 3), (0, 0)])).unwrap();
    clip_csi::disk::publish(&node.store.paths().profile(manifest()), &content).unwrap();
    let image = node.mount(Some(Prefetch::Recorded));
    node.fetched_ahead(4).await;
    drop(image);
    node.stop().await;
    // No neighbour came, and no stream beside, although `complete_layers` is on: nobody has read.
    assert_eq!(node.present(), SORTED);
    assert_eq!(node.count("fetched"), 4);
    for (source, fixture) in node.sources.iter().zip(fixtures()) {
        for range in source.opened.lock().unwrap().iter() {
            assert!(range.end - range.start < fixture.desc.blob_bytes / 2);
        }
    }
    assert_eq!(node.n_opened(), 3, "chunks in a row come with one request");
}

#[tokio::test]
async fn without_a_way_but_a_stream_nothing_is_fetched_ahead() {
    let dir = tempfile::tempdir().unwrap();
    // One block, which cannot be entered in its middle.
    let fixtures = [Fixture::new(77)];
    let node = Node::open(dir.path(), &fixtures, None, Metrics::new(), |it| it).await;
    let file = node.layers[0].file();
    (0..file.n_chunks()).for_each(|it| file.drop_chunk(it));
    node.sources[0].opened.lock().unwrap().clear();
    std::fs::remove_file(node.store.paths().access_map(file.diff_id())).unwrap();
    let content = profile::encode(manifest(), &profile(&[(0, 2)])).unwrap();
    clip_csi::disk::publish(&node.store.paths().profile(manifest()), &content).unwrap();
    let _image = node.mount(None);
    node.fetched_ahead(1).await;
    assert_eq!((node.count("skipped"), node.n_opened()), (1, 0));
}

#[tokio::test]
async fn all_brings_all_from_the_remote_or_by_a_stream_each() {
    let world = World::new().await;
    let from_remote = world.node("second", |it| it).await;
    let _image = from_remote.mount(Some(Prefetch::All));
    from_remote
        .eventually(|it| it.layers.iter().all(|it| it.file().is_complete()))
        .await;
    assert_eq!(from_remote.n_opened(), 0);
    from_remote.stop().await;

    let dir = tempfile::tempdir().unwrap();
    let alone = Node::open(dir.path(), fixtures(), None, Metrics::new(), |it| {
        CacheConfig {
            complete_layers: false,
            ..it
        }
    })
    .await;
    alone.empty();
    let _image = alone.mount(Some(Prefetch::All));
    alone
        .eventually(|it| it.layers.iter().all(|it| it.file().is_complete()))
        .await;
    alone.stop().await;
    for (fixture, layer) in fixtures().iter().zip(&alone.layers) {
        fixture.expect_all(&alone.store, layer).await;
    }
    for (source, fixture) in alone.sources.iter().zip(fixtures()) {
        let opened = source.opened.lock().unwrap().clone();
        assert_eq!(opened.len(), 1, "{opened:?}");
        assert_eq!(opened[0], 0..fixture.desc.blob_bytes);
    }
}

#[tokio::test]
async fn none_fetches_nothing_and_keeps_nothing_until_somebody_wants_more() {
    let world = World::new().await;
    world.record("second", WANTED).await;
    let third = world.node("third", |it| it).await;
    let image = third.mount(Some(Prefetch::None));
    third.want(&[(0, 9)]).await;
    assert_eq!(third.present(), [(0, 9)]);
    assert_eq!(third.profile_on_disk(), None);
    // Another volume of the same image.
    let other = third.mount(Some(Prefetch::Recorded));
    third.fetched_ahead(4).await;
    // It is the one that counts, while the image is mounted.
    drop(other);
    drop(image);
    third.stop().await;
    assert_eq!(third.present().len(), 5);
}

#[tokio::test]
async fn none_has_no_stream_follow_a_read() {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = &fixtures()[..1];
    for (wants, is_streamed) in [(Prefetch::None, false), (Prefetch::Recorded, true)] {
        let dir = dir.path().join(wants.label());
        let node = Node::open(&dir, fixtures, None, Metrics::new(), |it| it).await;
        node.empty();
        let _image = node.mount(Some(wants));
        // Of which the first would have a stream begin, and the others give it time.
        node.want(&[(0, 9), (0, 5), (0, 2), (0, 0)]).await;
        if is_streamed {
            node.eventually(|it| it.layers[0].file().is_complete())
                .await;
        }
        let whole = 0..fixtures[0].desc.blob_bytes;
        let opened = node.sources[0].opened.lock().unwrap().clone();
        assert_eq!(opened.contains(&whole), is_streamed, "{wants:?}");
        node.stop().await;
    }
}

#[tokio::test]
async fn it_ends_when_the_image_is_unmounted() {
    let world = World::new().await;
    // Backwards, so that no two come with one request.
    let layers = [0, 1].into_iter();
    let backwards: Vec<_> = layers
        .flat_map(|layer| (2..N_CHUNKS).rev().map(move |chunk| (layer, chunk)))
        .collect();
    let content = profile::encode(manifest(), &profile(&backwards)).unwrap();
    world.share(&content).await;
    let node = world.node("second", |it| it).await;
    let image = node.mount(None);
    node.fetched_ahead(1).await;
    drop(image);
    let n_fetched = node.count("fetched");
    // Its layers are still open, and others read: there is time for all of it.
    node.want(&[(0, 0), (0, 1), (1, 0), (1, 1)]).await;
    let n_late = node.count("fetched") - n_fetched;
    assert!(n_late <= 2, "{n_late} chunks came later");
}

#[tokio::test]
async fn a_registry_that_hangs_holds_up_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let fixtures = &fixtures()[..1];
    let node = Node::open(dir.path(), fixtures, None, Metrics::new(), |it| it).await;
    node.empty();
    // The registry stops in the middle of the first part.
    let pieces = &node.sources[0].pieces;
    pieces.forget_permits(pieces.available_permits() - 1);
    let wanted: Vec<_> = (0..N_CHUNKS).step_by(2).map(|it| (0, it)).collect();
    let content = profile::encode(manifest(), &profile(&wanted)).unwrap();
    clip_csi::disk::publish(&node.store.paths().profile(manifest()), &content).unwrap();
    let image = node.mount(None);
    node.eventually(|it| it.n_opened() == 1).await;
    drop(image);
    // Though the part that was begun hangs.
    let stopping = node.store.shutdown(DEADLINE);
    tokio::time::timeout(DEADLINE / 2, stopping).await.unwrap();
    assert_eq!(node.n_opened(), 1, "more was asked for");
    assert_eq!(node.present(), []);
}

#[tokio::test]
async fn nothing_is_evicted_for_it_and_a_full_cache_ends_it() {
    let world = World::new().await;
    world
        .record("second", &[(0, 1), (0, 5), (1, 2), (1, 6)])
        .await;
    let max_bytes = 3 * CHUNK_BYTES;
    let third = world
        .node("third", |it| CacheConfig {
            max_bytes,
            high_watermark_percent: 100,
            low_watermark_percent: 50,
            ..it
        })
        .await;
    let image = third.mount(None);
    third.eventually(|it| it.count("no_room") == 1).await;
    drop(image);
    third.stop().await;
    let n_present = third.present().len() as u64;
    assert!((1..=2).contains(&n_present), "{n_present} chunks came");
    let evictions = &third.metrics.layer_cache_evictions;
    assert_eq!(evictions.with_label_values(&["capacity"]).get(), 0);
    // Who reads is served all the same.
    third.want(&[(1, 11)]).await;
}

#[tokio::test]
async fn hostile_profiles_are_refused_and_replaced() {
    let world = World::new().await;
    let good = profile::encode(manifest(), &profile(RECORDED)).unwrap();
    let elsewhere = profile::encode(ManifestDigest::of(b"other"), &profile(RECORDED)).unwrap();
    let beyond = profile::encode(manifest(), &profile(&[(0, N_CHUNKS)])).unwrap();
    let no_layer = profile::encode(manifest(), &profile(&[(2, 0)])).unwrap();
    let torn = good[..good.len() - 1].to_vec();
    let mut flipped = good.clone();
    flipped[70] ^= 1;
    for (at, content) in [elsewhere, beyond, no_layer, torn, flipped, Vec::new()]
        .into_iter()
        .enumerate()
    {
        // Of the installation's own key, so that its form alone is at fault.
        world.share(&content).await;
        let node = world.node(&format!("n{at}"), |it| it).await;
        let path = node.store.paths().profile(manifest());
        clip_csi::disk::publish(&path, &content).unwrap();
        let image = node.mount(None);
        let failures =
            |it: &Node, tier| it.metrics.verify_failures.with_label_values(&[tier]).get();
        node.eventually(|it| (failures(it, "disk"), failures(it, "content_cache")) == (1, 1))
            .await;
        node.want(&[(1, 3)]).await;
        drop(image);
        node.stop().await;
        assert_eq!(node.present(), [(1, 3)], "{at}");
        let recorded = Profile {
            touches: touches(&[(1, 3)]),
            is_whole: false,
        };
        assert_eq!(node.profile_on_disk(), Some(recorded.clone()), "{at}");
        assert_eq!(world.shared().await, Some(recorded), "{at}");
    }
    // Somebody else's word, though its form is right.
    let metrics = Metrics::new();
    let stranger = remote_in(&world.path("remote"), None, &metrics).unwrap();
    assert!(stranger.cache.put_profile(&manifest(), &good).await);
    let node = world.node("last", |it| it).await;
    let image = node.mount(None);
    let failures = &node.metrics.verify_failures;
    node.eventually(|_| failures.with_label_values(&["content_cache"]).get() == 1)
        .await;
    drop(image);
    node.stop().await;
    assert_eq!(node.present(), []);
}

#[tokio::test]
async fn two_images_that_share_a_layer_are_recorded_each() {
    let world = World::new().await;
    let node = world.node("second", |it| it).await;
    let other = ManifestDigest::of(b"other image");
    // The shared layer is the upper one of the first, and the only one of the other.
    let images = (
        node.mount(None),
        node.store.use_image(other, &node.layers[1..], None),
    );
    node.want(&[(0, 1), (1, 4)]).await;
    drop(images);
    node.stop().await;
    let recorded = node.profile_on_disk().unwrap();
    assert_eq!(recorded.touches, touches(&[(0, 1), (1, 4)]));
    let content = std::fs::read(node.store.paths().profile(other)).unwrap();
    let of_other = profile::decode(&content, other, &[N_CHUNKS]).unwrap();
    assert_eq!(of_other.touches, touches(&[(0, 4)]));
}

#[tokio::test]
async fn profiles_are_bounded_in_number() {
    let world = World::new().await;
    let node = world.node("second", |it| it).await;
    let images = node.store.paths().images();
    let long_ago = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    for n in 0..1010_u32 {
        let path = node
            .store
            .paths()
            .profile(ManifestDigest::of(&n.to_le_bytes()));
        clip_csi::disk::publish_unsynced(&path, b"old").unwrap();
        let file = std::fs::File::open(&path).unwrap();
        file.set_modified(long_ago + Duration::from_secs(n.into()))
            .unwrap();
    }
    let image = node.mount(None);
    node.want(&[(0, 0)]).await;
    drop(image);
    node.stop().await;
    assert_eq!(names(&images).len(), 1000);
    // The oldest are gone, the new one is there.
    let path = |n: u32| {
        let image = ManifestDigest::of(&n.to_le_bytes());
        node.store.paths().profile(image)
    };
    assert!(!path(10).exists() && path(11).exists());
    assert!(node.profile_on_disk().is_some());
}
