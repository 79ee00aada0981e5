//! The layer store on a disk that is full, or has lost what it had: every byte is read all the same.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use clip_csi::{
    chunk::{self, CHUNK_BYTES},
    digest::ManifestDigest,
    fair::Claimant,
    ipc::{Channel, Listener},
    layer::{
        CacheConfig,
        store::{Layer, LayerStore, Remote},
    },
    metrics::Metrics,
    mount::{ImageRequest, PrepareError, Progress},
    roles::{
        agent::{Agent, Held, Images},
        protocol::{AgentReply, AgentRequest, ReadyImage},
    },
    tier::{BoxFuture, Chunk, PresentError, lent::LentChunk},
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::runtime::Handle;

use crate::{
    layer_fixture::{FakeSource, Fixture, config, present, remote_in},
    mount_fixture::skip_without_mounts,
};

const N_CHUNKS: u32 = 13;

/// Longer than any pause, on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A tmpfs of 8 MB, which is unmounted in the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        mount(
            "none",
            dir.path(),
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=8m"),
        )
        .unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Takes what is left of it.
    fn fill(&self) -> PathBuf {
        let path = self.path().join("filler");
        let mut filler = std::fs::File::create(&path).unwrap();
        let copied = std::io::copy(&mut std::io::repeat(1), &mut filler);
        assert_eq!(copied.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        unmount(self.path(), UnmountFlags::DETACH).unwrap();
    }
}

/// A store on a small disk, with a layer that is larger and of which nothing is there.
struct Full {
    disk: SmallDisk,
    metrics: Metrics,
    fixture: Fixture,
    store: LayerStore,
    source: Arc<FakeSource>,
    layer: Arc<Layer>,
}

impl Full {
    /// `has_map`: whether it is known where the layer's blob can be entered.
    async fn new(seed: u64, has_map: HasMap, remote: Option<Remote>) -> Self {
        let (disk, metrics) = (SmallDisk::new(), Metrics::new());
        let fixture = Fixture::sized(seed, N_CHUNKS as usize * CHUNK_BYTES as usize - 5000);
        // Made where there is room, and emptied.
        let elsewhere = tempfile::tempdir().unwrap();
        let made = LayerStore::open(
            config(elsewhere.path()),
            remote.clone(),
            Metrics::new(),
            Handle::current(),
        )
        .unwrap();
        let layer = made.layer(&fixture.desc, fixture.source()).await.unwrap();
        if let Some(remote) = &remote {
            remote.uploader.drain(PATIENCE).await;
        }
        (0..N_CHUNKS).for_each(|it| layer.file().drop_chunk(it));
        let from = layer.file().dir();
        let to = disk.path().join("layers").join(from.file_name().unwrap());
        std::fs::create_dir_all(&to).unwrap();
        for name in ["index", "state", "access"] {
            if name != "access" || has_map == HasMap::Yes {
                std::fs::copy(from.join(name), to.join(name)).unwrap();
            }
        }
        std::fs::File::create(to.join("data")).unwrap();
        let config = CacheConfig {
            complete_layers: false,
            ..config(disk.path())
        };
        let store = LayerStore::open(config, remote, metrics.clone(), Handle::current()).unwrap();
        let source = fixture.source();
        let layer = store.layer(&fixture.desc, source.clone()).await.unwrap();
        assert_eq!(source.n_opened(), 0, "the layer is there");
        Self {
            disk,
            metrics,
            fixture,
            store,
            source,
            layer,
        }
    }

    fn wanted(&self, number: u32) -> Chunk {
        let range = chunk::byte_range(number, self.fixture.tar.len() as u64);
        Chunk {
            layer: self.fixture.desc.diff_id,
            number,
            bytes: range.end - range.start,
        }
    }

    async fn lend(&self, wanted: Chunk) -> Result<LentChunk, PresentError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let done = Box::new(|outcome| drop(sender.send(outcome)));
        self.store.lend_to(Claimant::Mount(0), wanted, done);
        receiver.await.unwrap()
    }

    /// Has the chunk lent and compares it.
    async fn expect_lent(&self, number: u32) {
        let lent = self.lend(self.wanted(number)).await.unwrap();
        self.compare(number, &lent);
    }

    fn compare(&self, number: u32, lent: &LentChunk) {
        let range = chunk::byte_range(number, self.fixture.tar.len() as u64);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        lent.read_at(&mut bytes, 0).unwrap();
        let expected = &self.fixture.tar[range.start as usize..range.end as usize];
        assert!(bytes == expected, "chunk {number} has wrong bytes");
    }

    /// Reads a chunk as a reader does; says whether it was cached.
    async fn read(&self, number: u32) -> bool {
        match self.present(number).await {
            Ok(()) => {
                self.fixture.expect_chunk(&self.layer, number);
                true
            }
            Err(err) => {
                assert!(err.is_of_disk(), "{err}");
                self.expect_lent(number).await;
                false
            }
        }
    }

    async fn present(&self, number: u32) -> Result<(), PresentError> {
        present(&self.store, self.fixture.desc.diff_id, number..number + 1).await
    }

    fn n_through(&self, reason: &str) -> u64 {
        let counter = &self.metrics.chunks_served_through;
        counter.with_label_values(&[reason]).get()
    }

    /// Reads the layer again and again, until all that fits is cached.
    async fn recovers(&self, filler: &Path) {
        std::fs::remove_file(filler).unwrap();
        let cached = async {
            while !self.read(0).await {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(PATIENCE, cached)
            .await
            .expect("it is cached once there is room");
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HasMap {
    Yes,
    No,
}

#[tokio::test]
async fn a_layer_larger_than_the_disk_is_read_whole() {
    skip_without_mounts!("a_layer_larger_than_the_disk_is_read_whole");
    let it = Full::new(71, HasMap::Yes, None).await;
    let mut n_cached = 0;
    for _ in 0..2 {
        n_cached = 0;
        for number in 0..N_CHUNKS {
            n_cached += u32::from(it.read(number).await);
        }
    }
    assert!((5..=8).contains(&n_cached), "{n_cached} of {N_CHUNKS} fit");
    assert_eq!(it.n_through("io_error"), 0);
    assert!(u64::from(N_CHUNKS - n_cached) <= it.n_through("no_space"));
}

#[tokio::test]
async fn a_full_disk_is_let_alone_and_used_again_when_there_is_room() {
    skip_without_mounts!("a_full_disk_is_let_alone_and_used_again_when_there_is_room");
    let it = Full::new(72, HasMap::Yes, None).await;
    let filler = it.disk.fill();
    assert!(!it.read(5).await);
    // A part for nothing, which told that the disk is full, and one for the reader.
    assert_eq!(it.source.n_opened(), 2);
    for number in [5, 8, 2, 5] {
        assert!(!it.read(number).await);
    }
    assert_eq!(it.source.n_opened(), 4, "nothing was tried, and 5 was kept");
    let all: Vec<_> = it.source.opened.lock().unwrap().clone();
    let blob_bytes = it.fixture.desc.blob_bytes;
    assert!(
        all.iter().all(|it| it.end - it.start < blob_bytes / 2),
        "{all:?}"
    );
    it.recovers(&filler).await;
    assert!(it.read(8).await, "the pause is over for all");
}

#[tokio::test]
async fn without_a_map_or_a_remote_the_stream_is_read_to_the_chunk() {
    skip_without_mounts!("without_a_map_or_a_remote_the_stream_is_read_to_the_chunk");
    let it = Full::new(73, HasMap::No, None).await;
    let filler = it.disk.fill();
    for number in [12, 0, 6] {
        assert!(!it.read(number).await);
    }
    it.recovers(&filler).await;
}

#[tokio::test]
async fn the_remote_content_cache_serves_a_full_disk() {
    skip_without_mounts!("the_remote_content_cache_serves_a_full_disk");
    let dir = tempfile::tempdir().unwrap();
    let remote = remote_in(dir.path(), None, &Metrics::new());
    let it = Full::new(74, HasMap::No, remote).await;
    let filler = it.disk.fill();
    for number in 0..N_CHUNKS {
        assert!(!it.read(number).await);
    }
    assert_eq!(it.source.n_opened(), 0, "the registry was asked");
    assert_eq!(it.n_through("no_space"), u64::from(N_CHUNKS));
    it.recovers(&filler).await;
}

#[tokio::test]
async fn wrong_bytes_are_refused_while_serving_through() {
    skip_without_mounts!("wrong_bytes_are_refused_while_serving_through");
    let it = Full::new(75, HasMap::Yes, None).await;
    let filler = it.disk.fill();
    it.source.parts_are_wrong.store(true, Ordering::SeqCst);
    // The stream is right, and has the last word. The part of an even chunk begins with it.
    it.expect_lent(4).await;
    let failures = it.metrics.verify_failures.with_label_values(&["registry"]);
    assert_eq!(failures.get(), 1);
    // Another layer's blob, under this one's name.
    let other = Fixture::sized(76, N_CHUNKS as usize * CHUNK_BYTES as usize - 5000);
    let wrong = FakeSource::new(other.blob);
    it.store
        .layer(&it.fixture.desc, wrong.clone())
        .await
        .unwrap();
    it.expect_lent(7).await;
    assert_eq!((failures.get(), wrong.n_opened()), (1, 0), "one has worked");
    it.source.is_down.store(true, Ordering::SeqCst);
    let err = it.lend(it.wanted(9)).await.unwrap_err();
    assert!(matches!(err, PresentError::Origin { .. }), "{err}");
    assert_eq!(failures.get(), 2);
    assert!(0 < wrong.n_opened());
    it.source.is_down.store(false, Ordering::SeqCst);
    // Nor is a chunk lent that the layer does not have.
    for wanted in [
        Chunk {
            number: N_CHUNKS,
            ..it.wanted(3)
        },
        Chunk {
            bytes: 7,
            ..it.wanted(3)
        },
    ] {
        let refused = it.lend(wanted).await.unwrap_err();
        assert!(matches!(refused, PresentError::Refused { .. }), "{refused}");
    }
    it.recovers(&filler).await;
}

#[tokio::test]
async fn readers_of_one_chunk_share_it() {
    skip_without_mounts!("readers_of_one_chunk_share_it");
    let it = Full::new(77, HasMap::Yes, None).await;
    it.disk.fill();
    let reads = (0..8).map(|_| it.expect_lent(4));
    futures_util::future::join_all(reads).await;
    assert_eq!(it.source.n_opened(), 1);
    // Many at once, of which few are fetched at a time, all come in the end.
    let reads = (0..4 * N_CHUNKS).map(|n| it.expect_lent(n % N_CHUNKS));
    let all = futures_util::future::join_all(reads);
    tokio::time::timeout(PATIENCE, all).await.unwrap();
}

#[tokio::test]
async fn what_the_disk_lost_is_dropped_lent_and_cached_anew() {
    skip_without_mounts!("what_the_disk_lost_is_dropped_lent_and_cached_anew");
    let it = Full::new(78, HasMap::Yes, None).await;
    for number in [1, 3] {
        assert!(it.read(number).await);
    }
    // What is present and can be read is lent out of the disk.
    let n_opened = it.source.n_opened();
    it.expect_lent(3).await;
    assert_eq!(it.source.n_opened(), n_opened);
    // A file system that lost the rest of the file: reading it fails.
    let path = it.layer.file().dir().join("data");
    let data = std::fs::File::options().write(true).open(path).unwrap();
    data.set_len(CHUNK_BYTES).unwrap();
    assert!(it.layer.file().has(1..2));
    it.expect_lent(1).await;
    assert!(!it.layer.file().has(1..2), "it counts as present still");
    assert_eq!(it.n_through("io_error"), 2);
    assert!(it.read(1).await, "it is not cached again");
}

/// Nobody asks it for images.
#[derive(Debug)]
struct NoImages;

impl Images for NoImages {
    fn prepare<'a>(
        &'a self,
        _: &'a ImageRequest,
        _: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<(ReadyImage, Held), PrepareError>> {
        Box::pin(std::future::pending())
    }

    fn adopt<'a>(
        &'a self,
        _: ManifestDigest,
        _: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<Held, PrepareError>> {
        Box::pin(std::future::pending())
    }
}

#[tokio::test]
async fn the_agent_sends_what_it_lends() {
    skip_without_mounts!("the_agent_sends_what_it_lends");
    let it = Full::new(79, HasMap::Yes, None).await;
    it.disk.fill();
    let run_dir = tempfile::tempdir().unwrap();
    let path = run_dir.path().join("agent.sock");
    let listener = Listener::bind(&path).unwrap();
    let agent = Agent::new(Arc::new(NoImages), it.store.clone(), Handle::current());
    std::thread::spawn(move || agent.serve(&listener));
    let answer = |request: AgentRequest| {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            let channel = Channel::connect(&path).unwrap();
            channel.set_receive_timeout(Some(PATIENCE)).unwrap();
            channel.send(&request, None).unwrap();
            channel.receive::<AgentReply>().unwrap().unwrap()
        })
    };
    let layer = it.fixture.desc.diff_id;
    let (ticket, chunks) = (1, 2..3);
    let asked = AgentRequest::Present {
        ticket,
        layer,
        chunks,
        mount: None,
    };
    let (reply, fd) = answer(asked).await.unwrap();
    let AgentReply::Present { outcome, .. } = reply else {
        panic!("{reply:?}");
    };
    assert!(outcome.unwrap_err().is_of_disk() && fd.is_none());
    let wanted = it.wanted(2);
    let (reply, fd) = answer(AgentRequest::Lend {
        ticket,
        wanted,
        mount: None,
    })
    .await
    .unwrap();
    assert!(
        matches!(
            &reply,
            AgentReply::Lent {
                ticket: 1,
                outcome: Ok(())
            }
        ),
        "{reply:?}"
    );
    let lent = LentChunk::accept(layer, 2, wanted.bytes, fd.unwrap()).unwrap();
    it.compare(2, &lent);
    let wanted = Chunk { bytes: 7, ..wanted };
    let (reply, fd) = answer(AgentRequest::Lend {
        ticket,
        wanted,
        mount: None,
    })
    .await
    .unwrap();
    assert!(
        matches!(
            &reply,
            AgentReply::Lent {
                outcome: Err(PresentError::Refused { .. }),
                ..
            }
        ),
        "{reply:?}"
    );
    assert!(fd.is_none());
}
