//! Layers, registries in memory, and stores on directories, for the tests of the layer store.

use std::{
    io::Write as _,
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clip_csi::{
    chunk::CHUNK_BYTES,
    clock::SystemClock,
    digest::{BlobDigest, DiffId},
    fair::Claimant,
    layer::{
        CacheConfig,
        disk::DiskWait,
        store::{Layer, LayerStore, Remote},
    },
    metrics::Metrics,
    remote::{self, RemoteConfig, UploadOptions, Uploader},
    tier::{BlobSource, BlobStream, BoxFuture, LayerDesc, PresentError, SourceError},
};
use futures_util::{StreamExt, stream};
use tokio::{runtime::Handle, sync::Semaphore};

/// Whole chunks and a part of the image that most tests use.
const CONTENT_BYTES: usize = 3 * CHUNK_BYTES as usize + 12_345;

/// A layer with one file of bytes that compress a little.
pub(crate) struct Fixture {
    pub(crate) tar: Vec<u8>,
    pub(crate) blob: Vec<u8>,
    pub(crate) desc: LayerDesc,
}

impl Fixture {
    pub(crate) fn new(seed: u64) -> Self {
        // Which makes one block of all, that cannot be entered in its middle.
        Self::made(seed, CONTENT_BYTES, 1)
    }

    /// With a file of so many bytes, in one block.
    pub(crate) fn in_one_block(seed: u64, content_bytes: usize) -> Self {
        Self::made(seed, content_bytes, 1)
    }

    /// With a file of so many bytes, in as many blocks as most compressors make.
    pub(crate) fn sized(seed: u64, content_bytes: usize) -> Self {
        Self::made(seed, content_bytes, 6)
    }

    fn made(seed: u64, content_bytes: usize, level: u32) -> Self {
        let mut state = seed;
        let content: Vec<u8> = (0..content_bytes)
            .map(|_| {
                // xorshift64; the low bits of each byte are left out, so that it compresses.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                u8::try_from(state & 0x1f).unwrap()
            })
            .collect();
        let tar = tarball(&[("file", &content)]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
        gzip.write_all(&tar).unwrap();
        let blob = gzip.finish().unwrap();
        let desc = LayerDesc {
            diff_id: DiffId::of(&tar),
            blob: BlobDigest::of(&blob),
            blob_bytes: blob.len() as u64,
            toc: None,
        };
        Self { tar, blob, desc }
    }

    pub(crate) fn source(&self) -> Arc<FakeSource> {
        FakeSource::new(self.blob.clone())
    }

    /// Reads a chunk that is present and compares it.
    pub(crate) fn expect_chunk(&self, layer: &Layer, chunk: u32) {
        let range = clip_csi::chunk::byte_range(chunk, self.tar.len() as u64);
        let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        let mut read = vec![0; range.len()];
        assert!(layer.file().has(chunk..chunk + 1));
        let offset = range.start as u64;
        assert!(
            layer
                .file()
                .read_at(&mut read, offset, DiskWait::Allowed)
                .unwrap()
        );
        assert!(read == self.tar[range], "chunk {chunk} has wrong bytes");
    }

    /// Reads the whole layer through the store and compares it.
    pub(crate) async fn expect_all(&self, store: &LayerStore, layer: &Arc<Layer>) {
        let n_chunks = layer.file().n_chunks();
        present(store, self.desc.diff_id, 0..n_chunks)
            .await
            .unwrap();
        let mut read = vec![0; self.tar.len()];
        assert!(layer.file().has(0..n_chunks));
        assert!(
            layer
                .file()
                .read_at(&mut read, 0, DiskWait::Allowed)
                .unwrap()
        );
        assert!(read == self.tar, "the layer has wrong bytes");
    }
}

/// Writes a ustar archive of regular files.
fn tarball(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in files {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..107].copy_from_slice(b"0000644");
        header[108..115].copy_from_slice(b"0000000");
        header[116..123].copy_from_slice(b"0000000");
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[136..147].copy_from_slice(b"00000000000");
        header[148..156].copy_from_slice(b"        ");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|it| u32::from(*it)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(content);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

/// A registry in memory that counts, and that can be held up or made to lie.
#[derive(Debug)]
pub(crate) struct FakeSource {
    pub(crate) blob: Vec<u8>,
    /// The ranges that were asked for, in order.
    pub(crate) opened: Mutex<Vec<Range<u64>>>,
    /// Pieces of 64 KiB that may still be delivered.
    pub(crate) pieces: Semaphore,
    pub(crate) failure: Option<SourceError>,
    /// Whether one bit of each part is another one, as opposed to those of the whole.
    pub(crate) parts_are_wrong: AtomicBool,
    /// Whether parts are not to be had, as from a server that knows no ranges.
    pub(crate) refuses_parts: AtomicBool,
    /// Whether each piece of the whole takes its time.
    pub(crate) is_slow: AtomicBool,
    /// Whether nobody answers.
    pub(crate) is_down: AtomicBool,
    /// What is opened waits here, if anywhere, in the order in which it was.
    pub(crate) hold: Mutex<Option<Arc<Semaphore>>>,
}

impl FakeSource {
    pub(crate) fn new(blob: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            blob,
            opened: Mutex::default(),
            pieces: Semaphore::new(Semaphore::MAX_PERMITS),
            failure: None,
            parts_are_wrong: AtomicBool::new(false),
            refuses_parts: AtomicBool::new(false),
            is_slow: AtomicBool::new(false),
            is_down: AtomicBool::new(false),
            hold: Mutex::default(),
        })
    }

    pub(crate) fn n_opened(&self) -> usize {
        self.opened.lock().unwrap().len()
    }
}

impl BlobSource for FakeSource {
    fn open<'a>(
        &'a self,
        _blob: &'a BlobDigest,
        _blob_bytes: u64,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
        self.opened.lock().unwrap().push(range.clone());
        if self.is_down.load(Ordering::SeqCst) {
            let down = SourceError::Unavailable {
                registry: "registry.example".to_owned(),
                reason: "it is down".to_owned(),
            };
            return Box::pin(async { Err(down) });
        }
        let index = |it| usize::try_from(it).unwrap();
        // A fake may hold less than its blob should have.
        let end = index(range.end).min(self.blob.len());
        let rest = &self.blob[index(range.start).min(end)..end];
        let mut pieces: Vec<Bytes> = rest.chunks(64 << 10).map(Bytes::copy_from_slice).collect();
        let is_whole = rest.len() == self.blob.len();
        if !is_whole && self.parts_are_wrong.load(Ordering::SeqCst) {
            let mut piece = pieces[1].to_vec();
            piece[1000] ^= 1;
            pieces[1] = piece.into();
        }
        if !is_whole && self.refuses_parts.load(Ordering::SeqCst) {
            let refusal = SourceError::Protocol {
                registry: "registry.example".to_owned(),
                reason: "it ignores the range".to_owned(),
            };
            return Box::pin(async { Err(refusal) });
        }
        let is_slow = is_whole && self.is_slow.load(Ordering::SeqCst);
        let failure = self.failure.clone();
        // The stream takes its permits from a semaphore of its own, filled as ours allows.
        let allowed = self.pieces.available_permits();
        let hold = self.hold.lock().unwrap().clone();
        Box::pin(async move {
            if let Some(hold) = hold {
                hold.acquire().await.unwrap().forget();
            }
            let items = pieces.into_iter().map(Ok).chain(failure.map(Err));
            let stream = stream::iter(items).take(allowed.min(1 << 30));
            let stream = stream.then(move |item| async move {
                if is_slow {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                item
            });
            Ok(if allowed < 1 << 30 {
                Box::pin(stream.chain(stream::pending())) as BlobStream
            } else {
                Box::pin(stream) as BlobStream
            })
        })
    }
}

pub(crate) fn config(dir: &Path) -> CacheConfig {
    CacheConfig {
        dir: dir.to_owned(),
        min_free_bytes: 0,
        ..CacheConfig::default()
    }
}

pub(crate) fn open(dir: &Path, remote: Option<Remote>, metrics: &Metrics) -> LayerStore {
    LayerStore::open(config(dir), remote, metrics.clone(), Handle::current()).unwrap()
}

/// A remote content cache in a directory, with or without a key.
pub(crate) fn remote_in(dir: &Path, key: Option<&Path>, metrics: &Metrics) -> Option<Remote> {
    let key = key.map(|it| format!("hmac_key_file = {:?}", it.to_str().unwrap()));
    let text = format!(
        // Patient: what a busy machine answers late is no remote that is away.
        "kind = \"dir\"\npath = {dir:?}\nrequest_timeout_ms = 20000\n{}",
        key.unwrap_or_default()
    );
    let config: RemoteConfig = toml::from_str(&text).unwrap();
    let clock: Arc<dyn clip_csi::clock::Clock> = Arc::new(SystemClock::new());
    let cache = remote::open(&config, metrics, &clock).unwrap().unwrap();
    let uploader = Arc::new(Uploader::start(cache.clone(), UploadOptions::default()));
    Some(Remote { cache, uploader })
}

/// All files below a directory.
pub(crate) fn files_below(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files
}

pub(crate) fn key_file(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("key");
    clip_csi::disk::publish(&path, &[7; 32]).unwrap();
    path
}

pub(crate) async fn present(
    store: &LayerStore,
    layer: DiffId,
    chunks: std::ops::Range<u32>,
) -> Result<(), PresentError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    store.make_present_for(
        Claimant::Mount(0),
        layer,
        chunks,
        Box::new(|outcome| drop(sender.send(outcome))),
    );
    receiver.await.unwrap()
}

/// Lets the tasks that were started go on, and what they have on blocking threads, until they wait for
/// something else.
pub(crate) async fn let_go_on() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
        tokio::task::spawn_blocking(|| {}).await.unwrap();
    }
}

pub(crate) fn decompressions(metrics: &Metrics) -> u64 {
    metrics
        .layer_decompressions
        .with_label_values(&["ok"])
        .get()
}

/// The names in a directory of the cache.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|it| it.unwrap().file_name().into_string().unwrap())
        .collect()
}
