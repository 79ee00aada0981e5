//! Images that share a layer make good what one of them cannot give: its credentials have ended, its
//! registry is away, or its blob is not the layer.

use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use clip_csi::{
    chunk::{self, CHUNK_BYTES},
    digest::{BlobDigest, ManifestDigest},
    fair::Claimant,
    layer::{
        CacheConfig,
        store::{Layer, LayerStore},
    },
    metrics::Metrics,
    tier::{
        BlobSource, BlobStream, BoxFuture, Chunk, LayerDesc, Prefetch, PresentError, SourceError,
        SourceIdentity,
    },
};
use tokio::runtime::Handle;

use crate::{
    by_toc::eventually,
    layer_fixture::{FakeSource, Fixture, config, present},
    toc_fixture::{FORMATS, TocFixture, content},
    toc_node::Node,
};

const N_CHUNKS: u32 = 5;

/// The chunk that is read: in the middle of the blob.
const READ: u32 = 2;

/// One image's way to its registry.
#[derive(Debug)]
struct Registry {
    host: &'static str,
    blob: Arc<FakeSource>,
    refusal: Mutex<Option<SourceError>>,
    n_asked: AtomicUsize,
}

impl Registry {
    fn new(host: &'static str, blob: &[u8]) -> Arc<Self> {
        Arc::new(Self {
            host,
            blob: FakeSource::new(blob.to_vec()),
            refusal: Mutex::default(),
            n_asked: AtomicUsize::new(0),
        })
    }

    fn refuse(&self, refusal: Option<SourceError>) {
        *self.refusal.lock().unwrap() = refusal;
    }

    /// How often it was asked since this was.
    fn n_asked(&self) -> usize {
        self.n_asked.swap(0, Ordering::SeqCst)
    }
}

impl BlobSource for Registry {
    fn open<'a>(
        &'a self,
        blob: &'a BlobDigest,
        blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        self.n_asked.fetch_add(1, Ordering::SeqCst);
        match self.refusal.lock().unwrap().clone() {
            Some(refusal) => Box::pin(std::future::ready(Err(refusal))),
            None => self.blob.open(blob, blob_bytes, range),
        }
    }

    fn identity(&self) -> Option<SourceIdentity> {
        Some(SourceIdentity {
            repository: self.host.to_owned(),
            requester: 0,
        })
    }
}

fn unauthorized(registry: &str) -> SourceError {
    SourceError::Unauthorized {
        what: "blob".to_owned(),
        registry: registry.to_owned(),
        hint: "its token has ended".to_owned(),
    }
}

/// What registries say that give nothing.
fn refusals() -> [SourceError; 5] {
    let (what, registry) = ("blob".to_owned(), "other".to_owned());
    [
        unauthorized("other"),
        SourceError::Forbidden {
            what: what.clone(),
            registry: registry.clone(),
        },
        SourceError::NotFound {
            what,
            registry: registry.clone(),
        },
        SourceError::RateLimited {
            registry: registry.clone(),
            retry_after: None,
        },
        SourceError::Unavailable {
            registry,
            reason: "it is down".to_owned(),
        },
    ]
}

/// Whether it is known where the layer's blob can be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Map {
    Known,
    Unknown,
}

/// A node that has a layer's index and no byte of it, and has not opened it yet.
struct Emptied {
    _dir: tempfile::TempDir,
    metrics: Metrics,
    fixture: Fixture,
    store: LayerStore,
}

impl Emptied {
    async fn new(seed: u64, map: Map) -> Self {
        let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
        let fixture = Fixture::sized(seed, N_CHUNKS as usize * CHUNK_BYTES as usize - 5000);
        let config = CacheConfig {
            complete_layers: false,
            ..config(dir.path())
        };
        let open =
            |metrics| LayerStore::open(config.clone(), None, metrics, Handle::current()).unwrap();
        let store = open(Metrics::new());
        let layer = store.layer(&fixture.desc, fixture.source()).await.unwrap();
        empty(&layer);
        if map == Map::Unknown {
            std::fs::remove_file(layer.file().dir().join("access")).unwrap();
        }
        store.shutdown(Duration::from_secs(20)).await;
        drop((layer, store));
        Self {
            _dir: dir,
            store: open(metrics.clone()),
            metrics,
            fixture,
        }
    }

    fn registry(&self, host: &'static str) -> Arc<Registry> {
        Registry::new(host, &self.fixture.blob)
    }

    /// One whose blob has the right name and a wrong bit in the chunk that is read.
    fn flipped(&self, host: &'static str) -> Arc<Registry> {
        let mut blob = self.fixture.blob.clone();
        let at = blob.len() * 42 / 100;
        blob[at] ^= 1;
        Registry::new(host, &blob)
    }

    async fn open(&self, source: &Arc<Registry>) -> Arc<Layer> {
        self.open_as(&self.fixture.desc, source).await
    }

    async fn open_as(&self, desc: &LayerDesc, source: &Arc<Registry>) -> Arc<Layer> {
        let source: Arc<dyn BlobSource> = Arc::clone(source) as _;
        self.store.layer(desc, source).await.unwrap()
    }

    /// Reads the chunk, of which nothing is there before.
    async fn read(&self, layer: &Arc<Layer>) -> Result<(), PresentError> {
        empty(layer);
        let n_ended = self.n_ended();
        present(&self.store, self.fixture.desc.diff_id, READ..READ + 1).await?;
        self.fixture.expect_chunk(layer, READ);
        // What else comes with it has come, so that it is known who gave it.
        eventually(|| n_ended < self.n_ended()).await;
        Ok(())
    }

    /// Parts and streams that came to an end.
    fn n_ended(&self) -> u64 {
        let ended = [
            &self.metrics.layer_random_reads,
            &self.metrics.layer_decompressions,
        ];
        ended
            .map(|it| it.with_label_values(&["ok"]).get())
            .iter()
            .sum()
    }

    async fn lend(&self) -> Result<(), PresentError> {
        let range = chunk::byte_range(READ, self.fixture.tar.len() as u64);
        let wanted = Chunk {
            layer: self.fixture.desc.diff_id,
            number: READ,
            bytes: range.end - range.start,
        };
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let done = Box::new(|outcome| drop(sender.send(outcome)));
        self.store.lend_to(Claimant::Mount(0), wanted, done);
        let lent = receiver.await.unwrap()?;
        let mut read = vec![0; usize::try_from(wanted.bytes).unwrap()];
        lent.read_at(&mut read, 0).unwrap();
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        assert!(read == self.fixture.tar[range]);
        Ok(())
    }
}

fn empty(layer: &Layer) {
    (0..N_CHUNKS).for_each(|it| layer.file().drop_chunk(it));
}

/// The ways to a chunk out of the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    Lent,
    /// All of the image, for nobody yet.
    Completed,
}

#[tokio::test]
async fn what_one_cannot_give_another_does_on_every_way() {
    let ways = [Way::Read, Way::Lent, Way::Completed];
    let maps = [Map::Known, Map::Unknown];
    for (way, map) in ways.into_iter().flat_map(|way| maps.map(|map| (way, map))) {
        let refusals = refusals().into_iter().map(Some);
        for refusal in refusals.chain([None]) {
            let it = Emptied::new(71, map).await;
            let own = it.registry("own");
            let other = match &refusal {
                Some(_) => it.registry("other"),
                None => it.flipped("other"),
            };
            other.refuse(refusal.clone());
            let layer = it.open(&own).await;
            it.open(&other).await;
            let _used = match way {
                Way::Read => {
                    it.read(&layer).await.unwrap();
                    None
                }
                Way::Lent => {
                    it.lend().await.unwrap();
                    None
                }
                Way::Completed => {
                    let image = ManifestDigest::of(b"image");
                    let layers = std::slice::from_ref(&layer);
                    let used = it.store.use_image(image, layers, Some(Prefetch::All));
                    eventually(|| layer.file().is_complete()).await;
                    Some(used)
                }
            };
            let asked = (0 < other.n_asked(), 0 < own.n_asked());
            assert_eq!(asked, (true, true), "{way:?}, map {map:?}, {refusal:?}");
        }
    }
}

#[tokio::test]
async fn one_that_works_stays_first_and_one_that_failed_is_behind() {
    let it = Emptied::new(72, Map::Known).await;
    let (own, other) = (it.registry("own"), it.registry("other"));
    let layer = it.open(&own).await;
    it.read(&layer).await.unwrap();
    it.open(&other).await;
    let read = async |expected: (usize, usize), why: &str| {
        own.n_asked();
        other.n_asked();
        it.read(&layer).await.unwrap();
        assert_eq!((own.n_asked(), other.n_asked()), expected, "{why}");
    };
    read(
        (1, 0),
        "nobody knows what the other's credentials are worth",
    )
    .await;
    own.refuse(Some(unauthorized("own")));
    read((1, 1), "the token has ended").await;
    read((0, 1), "that is known").await;
    other.refuse(Some(unauthorized("other")));
    own.refuse(None);
    read((1, 1), "the other one has").await;
    read((1, 0), "the first one is first again").await;
    // Its volume comes again, with credentials that are good.
    own.refuse(Some(unauthorized("own")));
    other.refuse(None);
    let (third, again) = (it.registry("third"), it.registry("other"));
    it.open(&third).await;
    it.open(&again).await;
    it.read(&layer).await.unwrap();
    let asked = [&third, &again, &other].map(|it| it.n_asked());
    assert_eq!(asked, [0, 1, 0], "the newest, in place of its former one");
}

#[tokio::test]
async fn who_gave_the_layer_when_it_was_made_is_one_that_works() {
    let it = Emptied::new(79, Map::Known).await;
    let on_disk = it.store.paths().layer(it.fixture.desc.diff_id);
    std::fs::remove_dir_all(on_disk).unwrap();
    let (own, other) = (it.registry("own"), it.registry("other"));
    let layer = it.open(&own).await;
    it.open(&other).await;
    it.read(&layer).await.unwrap();
    assert_eq!((own.n_asked(), other.n_asked()), (2, 0));
}

#[tokio::test]
async fn an_error_is_that_of_who_was_asked_first() {
    let it = Emptied::new(73, Map::Known).await;
    let (own, other) = (it.registry("own"), it.registry("other"));
    let layer = it.open(&other).await;
    it.open(&own).await;
    own.refuse(Some(unauthorized("own")));
    other.refuse(Some(unauthorized("other")));
    for _ in 0..2 {
        let err = it.read(&layer).await.unwrap_err();
        let PresentError::Origin { source, .. } = &err else {
            panic!("{err}");
        };
        assert_eq!(source.to_string(), unauthorized("own").to_string());
    }
    own.refuse(None);
    it.read(&layer).await.unwrap();
}

#[tokio::test]
async fn a_blob_that_is_not_known_to_be_the_layer_is_in_nobodys_place() {
    let junk = vec![7; 2_000_000];
    let named = |desc: &LayerDesc| LayerDesc {
        blob: BlobDigest::of(&junk),
        blob_bytes: junk.len() as u64,
        ..desc.clone()
    };
    // Who opens the layer first, and whether its access map is known by then.
    for (is_first, was_read) in [(false, true), (false, false), (true, false)] {
        let it = Emptied::new(74, Map::Known).await;
        let (own, hostile) = (it.registry("own"), Registry::new("hostile", &junk));
        let desc = named(&it.fixture.desc);
        if is_first {
            it.open_as(&desc, &hostile).await;
        }
        let layer = it.open(&own).await;
        if was_read {
            it.read(&layer).await.unwrap();
        }
        it.open_as(&desc, &hostile).await;
        it.read(&layer).await.unwrap();
        assert_eq!(
            (own.n_asked(), hostile.n_asked()),
            (1 + usize::from(was_read), 0)
        );
        it.lend().await.unwrap();
        own.refuse(Some(unauthorized("own")));
        let err = it.read(&layer).await.unwrap_err();
        assert!(matches!(err, PresentError::Origin { .. }), "{err}");
        assert_eq!(hostile.n_asked(), 1, "there is no other, and no map of it");
        own.refuse(None);
        it.read(&layer).await.unwrap();
        it.fixture.expect_all(&it.store, &layer).await;
    }
}

#[tokio::test]
async fn where_nothing_is_known_of_the_blob_the_right_one_is_found() {
    let junk = vec![7; 2_000_000];
    let it = Emptied::new(75, Map::Unknown).await;
    let (own, hostile) = (it.registry("own"), Registry::new("hostile", &junk));
    let layer = it.open(&own).await;
    let desc = LayerDesc {
        blob: BlobDigest::of(&junk),
        blob_bytes: junk.len() as u64,
        ..it.fixture.desc.clone()
    };
    it.open_as(&desc, &hostile).await;
    it.read(&layer).await.unwrap();
    assert_eq!((own.n_asked(), hostile.n_asked()), (1, 1));
    // The stream has made a map.
    it.read(&layer).await.unwrap();
    assert_eq!((own.n_asked(), hostile.n_asked()), (1, 0));
}

#[tokio::test]
async fn a_map_that_nobody_could_use_is_used_by_whose_blob_it_is_of() {
    let it = Emptied::new(76, Map::Known).await;
    let (own, hostile) = (it.registry("own"), Registry::new("hostile", &[7; 1000]));
    let desc = LayerDesc {
        blob: BlobDigest::of(&[7; 1000]),
        blob_bytes: 1000,
        ..it.fixture.desc.clone()
    };
    let layer = it.open_as(&desc, &hostile).await;
    it.lend().await.unwrap_err();
    it.open(&own).await;
    it.read(&layer).await.unwrap();
    let parts = own.blob.opened.lock().unwrap().clone();
    let blob_bytes = it.fixture.desc.blob_bytes;
    assert!(parts.len() == 1 && parts[0].end < blob_bytes, "{parts:?}");
}

#[tokio::test]
async fn few_origins_are_kept_and_none_longer_than_the_layer() {
    let it = Emptied::new(77, Map::Known).await;
    let own = it.registry("own");
    let layer = it.open(&own).await;
    it.read(&layer).await.unwrap();
    let hosts = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "j"];
    let mut others = Vec::new();
    for host in hosts {
        let other = it.registry(host);
        it.open(&other).await;
        others.push(other);
    }
    let is_kept = |it: &Arc<Registry>| 1 < Arc::strong_count(it);
    let kept: Vec<_> = others.iter().map(is_kept).collect();
    let (f, t) = (false, true);
    // Equal ones once, the latest; and the one that worked.
    assert_eq!(kept, [f, f, f, t, t, t, t, t, t, f, t]);
    assert!(is_kept(&own));
    own.n_asked();
    it.read(&layer).await.unwrap();
    assert_eq!(own.n_asked(), 1);
    drop(layer);
    assert!(!others.iter().any(is_kept) && !is_kept(&own));
}

#[tokio::test]
async fn many_wrong_blobs_do_not_drive_out_the_right_one() {
    let it = Emptied::new(78, Map::Known).await;
    let own = it.registry("own");
    let layer = it.open(&own).await;
    for host in ["a", "b", "c", "d", "e", "f", "g", "h", "i"] {
        let hostile = Registry::new(host, b"junk");
        let desc = LayerDesc {
            blob: BlobDigest::of(b"junk"),
            blob_bytes: 4,
            ..it.fixture.desc.clone()
        };
        it.open_as(&desc, &hostile).await;
    }
    it.read(&layer).await.unwrap();
    assert_eq!(own.n_asked(), 1);
}

#[tokio::test]
async fn a_table_is_read_again_by_whose_credentials_are_good() {
    for format in FORMATS {
        let (node, fixture) = (Node::new(), TocFixture::new(format));
        let layers = std::slice::from_ref(&fixture.desc);
        let image = node.mount(layers, &fixture.source()).await;
        let path = image.layers[0].file().dir().join("access");
        drop(image);
        let node = node.restarted();
        std::fs::remove_file(&path).unwrap();
        let (own, other) = (fixture.source(), fixture.source());
        let image = node.mount(layers, &own).await;
        node.mount(layers, &other).await;
        other.is_down.store(true, Ordering::SeqCst);
        assert!(node.file(&image, "data/last").await.unwrap() == content(31, 5000));
        assert!(0 < other.n_opened() && path.exists(), "{format:?}");
    }
}
