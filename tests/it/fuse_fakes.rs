//! An image in memory, layers of which any chunk can be absent, slow or broken, and a mount of it.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use clip_csi::{
    chunk,
    digest::{BlobDigest, ChunkDigest, DiffId, ManifestDigest},
    fs::{ClipFs, LayerData, ServedBytes, Wait},
    fuse::{
        pool::{PoolConfig, ReadPool},
        session::{FuseError, FuseMount, MountOptions, mount},
    },
    index::{
        image::ImageIndex,
        layer_index::{LayerIndex, LayerIndexBuilder},
        merge::Merge,
    },
    metrics::Metrics,
    tar::{TarEntry, TarExtent, TarKind},
    tier::{Chunk, LendCallback, MakePresent, PresentCallback, PresentError, lent::LentChunk},
};

/// Longer than anything in these tests takes, on any machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Bytes without a visible order, none of them zero.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    (0..len)
        .map(|_| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            u8::try_from(state >> 56).unwrap() | 1
        })
        .collect()
}

/// A layer as it grows: tar entries, and the bytes that their extents point to.
#[derive(Debug, Default)]
pub(crate) struct LayerText {
    pub(crate) entries: Vec<TarEntry>,
    pub(crate) bytes: Vec<u8>,
}

impl LayerText {
    pub(crate) fn push(&mut self, path: &str, kind: TarKind) -> &mut TarEntry {
        let entry = TarEntry {
            path: path.as_bytes().to_vec(),
            kind,
            mode: 0o755,
            uid: 0,
            gid: 0,
            mtime_seconds: 1_700_000_000,
            mtime_nanoseconds: 123_456_789,
            xattrs: vec![],
        };
        self.entries.push(entry);
        self.entries.last_mut().unwrap()
    }

    /// Adds a file whose bytes begin at a multiple of 512, as in a tar.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) -> &mut TarEntry {
        self.sparse_file(path, content.len() as u64, &[(0, content)])
    }

    pub(crate) fn sparse_file(
        &mut self,
        path: &str,
        size: u64,
        parts: &[(u64, &[u8])],
    ) -> &mut TarEntry {
        let mut extents = Vec::new();
        for (file_offset, content) in parts {
            self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
            extents.push(TarExtent {
                file_offset: *file_offset,
                layer_offset: self.bytes.len() as u64,
                len: content.len() as u64,
            });
            self.bytes.extend(*content);
        }
        self.push(path, TarKind::File { size, extents })
    }
}

/// A layer with many names of many lengths in its directory `d`, and the sizes of what they name.
pub(crate) fn large_directory() -> (LayerText, BTreeMap<String, u64>) {
    let (mut layer, mut sizes) = (LayerText::default(), BTreeMap::new());
    for at in 0..5000 {
        let name = format!("name-{at}-{}", "x".repeat(at % 200));
        layer.file(&format!("d/{name}"), &noise(at % 7, 1));
        sizes.insert(name, (at % 7) as u64);
    }
    (layer, sizes)
}

/// How a layer behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Fills what is asked for.
    Fill,
    /// Does so after a while.
    Slow(Duration),
    /// Fills nothing until the mode changes.
    Hold,
    /// Says that the origin failed.
    Fail,
    /// Says that the disk is full, and lends what is asked for after a while.
    Full,
    /// Says that it has filled, but has not: as if it were evicted at once.
    Vanish,
    /// Panics when it is asked what is present.
    Panic,
}

/// A layer in memory.
#[derive(Debug)]
pub(crate) struct FakeLayer {
    diff_id: DiffId,
    bytes: Vec<u8>,
    present: Mutex<BTreeSet<u32>>,
    /// How often each chunk was filled.
    pub(crate) fills: Mutex<HashMap<u32, u32>>,
    /// How often chunks were asked for.
    pub(crate) n_requests: Mutex<u32>,
    mode: Mutex<Mode>,
    changed: Condvar,
    /// Whether a read always has to wait for the disk.
    pub(crate) on_disk: AtomicBool,
    /// Whether a read of what is present fails.
    pub(crate) is_broken: AtomicBool,
    /// Whether all is evicted, and filled again, in the middle of each read.
    pub(crate) evicts_in_reads: AtomicBool,
    n_evictions: AtomicU64,
    /// How often chunks were asked to be lent, how many are just now, and how many were at most.
    pub(crate) lendings: Mutex<Lendings>,
}

#[derive(Debug, Default)]
pub(crate) struct Lendings {
    pub(crate) n: u32,
    n_now: u32,
    pub(crate) n_at_once: u32,
}

impl FakeLayer {
    pub(crate) fn set_mode(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
        self.changed.notify_all();
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn n_chunks(&self) -> u32 {
        u32::try_from(chunk::n_chunks(self.bytes.len() as u64)).unwrap()
    }

    /// Makes all chunks present.
    pub(crate) fn fill_all(&self) {
        self.present.lock().unwrap().extend(0..self.n_chunks());
    }

    /// Makes one chunk present.
    pub(crate) fn fill(&self, chunk: u32) {
        self.present.lock().unwrap().insert(chunk);
    }

    /// How many chunks are present.
    pub(crate) fn n_present(&self) -> usize {
        self.present.lock().unwrap().len()
    }

    /// Does what the mode says, on the thread of this layer.
    fn make_present(&self, chunks: Range<u32>) -> Result<(), PresentError> {
        let mut mode = self.mode.lock().unwrap();
        while *mode == Mode::Hold {
            let (woken, timeout) = self.changed.wait_timeout(mode, DEADLINE).unwrap();
            assert!(!timeout.timed_out(), "a test forgot a layer that holds");
            mode = woken;
        }
        let mode = *mode;
        match mode {
            Mode::Fail => {
                return Err(PresentError::Timeout {
                    layer: self.diff_id,
                    waited: Duration::from_secs(1),
                });
            }
            Mode::Full => {
                let path = "/cache".into();
                return Err(PresentError::NoSpace { path });
            }
            Mode::Vanish => return Ok(()),
            Mode::Slow(delay) => thread::sleep(delay),
            Mode::Fill | Mode::Hold | Mode::Panic => {}
        }
        for chunk in chunks {
            if self.present.lock().unwrap().insert(chunk) {
                *self.fills.lock().unwrap().entry(chunk).or_default() += 1;
            }
        }
        Ok(())
    }

    /// Lends a chunk, which takes a while; one that is present and cannot be read is forgotten.
    fn lend(&self, wanted: Chunk) -> Result<LentChunk, PresentError> {
        {
            let mut lendings = self.lendings.lock().unwrap();
            lendings.n += 1;
            lendings.n_now += 1;
            lendings.n_at_once = lendings.n_at_once.max(lendings.n_now);
        }
        thread::sleep(Duration::from_millis(20));
        self.lendings.lock().unwrap().n_now -= 1;
        if *self.mode.lock().unwrap() == Mode::Fail {
            return Err(PresentError::Unknown {
                layer: self.diff_id,
            });
        }
        self.present.lock().unwrap().remove(&wanted.number);
        let range = chunk::byte_range(wanted.number, self.bytes.len() as u64);
        let bytes = &self.bytes[range.start as usize..range.end as usize];
        assert_eq!(wanted.bytes, bytes.len() as u64);
        Ok(LentChunk::seal(self.diff_id, wanted.number, bytes).unwrap())
    }
}

impl LayerData for FakeLayer {
    fn diff_id(&self) -> DiffId {
        self.diff_id
    }

    fn layer_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn has(&self, mut chunks: Range<u32>) -> bool {
        let panics = *self.mode.lock().unwrap() == Mode::Panic;
        assert!(!panics, "a layer of the test panics, as it should");
        let present = self.present.lock().unwrap();
        chunks.all(|it| present.contains(&it))
    }

    fn n_evictions(&self, _chunks: Range<u32>) -> u64 {
        // A number that never stays as it was: evicted and filled in the middle of each read.
        let evicts = self.evicts_in_reads.load(Ordering::Relaxed);
        self.n_evictions
            .fetch_add(u64::from(evicts), Ordering::Relaxed)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<bool> {
        if wait == Wait::Never && self.on_disk.load(Ordering::Relaxed) {
            return Ok(false);
        }
        if self.is_broken.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let start = usize::try_from(offset).unwrap();
        let found = self.bytes.get(start..start + buf.len());
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(true)
    }
}

/// What a layer's thread is to do.
type Order = (Range<u32>, PresentCallback);

/// Fills each layer on a thread of its own, one order after the other.
#[derive(Debug)]
pub(crate) struct FakeProvider {
    layers: HashMap<DiffId, (Arc<FakeLayer>, mpsc::Sender<Order>)>,
}

impl FakeProvider {
    pub(crate) fn new(layers: &[Arc<FakeLayer>]) -> Arc<Self> {
        let start = |layer: &Arc<FakeLayer>| {
            let (sender, receiver) = mpsc::channel::<Order>();
            let worker = layer.clone();
            // Ends when the provider is dropped.
            thread::spawn(move || {
                while let Ok((chunks, done)) = receiver.recv() {
                    done(worker.make_present(chunks));
                }
            });
            (layer.diff_id, (layer.clone(), sender))
        };
        Arc::new(Self {
            layers: layers.iter().map(start).collect(),
        })
    }
}

impl MakePresent for FakeProvider {
    fn make_present(&self, layer: DiffId, chunks: Range<u32>, done: PresentCallback) {
        let Some((fake, orders)) = self.layers.get(&layer) else {
            return done(Err(PresentError::Unknown { layer }));
        };
        assert!(!chunks.is_empty());
        *fake.n_requests.lock().unwrap() += 1;
        orders.send((chunks, done)).unwrap();
    }

    fn lend(&self, wanted: Chunk, done: LendCallback) {
        let (fake, _) = &self.layers[&wanted.layer];
        let fake = fake.clone();
        // One each, so that nothing here bounds how many there are.
        thread::spawn(move || done(fake.lend(wanted)));
    }
}

/// Builds the index of an image, and its layers, of which nothing is present.
pub(crate) fn build(layers: Vec<LayerText>) -> (Vec<u8>, Vec<Arc<FakeLayer>>) {
    let mut merge = Merge::new(1_000_000);
    let mut fakes = Vec::new();
    for text in layers {
        let diff_id = DiffId::of(&text.bytes);
        let mut builder = LayerIndexBuilder::default();
        for entry in &text.entries {
            builder.push_entry(entry).unwrap();
        }
        let layer_bytes = text.bytes.len() as u64;
        for _ in 0..chunk::n_chunks(layer_bytes) {
            builder.push_chunk(&ChunkDigest::of(b"not looked at here"));
        }
        let index = LayerIndex::decode(builder.finish(diff_id, layer_bytes)).unwrap();
        merge.add_layer(&index, BlobDigest::of(b""), 1).unwrap();
        fakes.push(Arc::new(FakeLayer {
            diff_id,
            bytes: text.bytes,
            present: Mutex::default(),
            fills: Mutex::default(),
            n_requests: Mutex::default(),
            mode: Mutex::new(Mode::Fill),
            changed: Condvar::new(),
            on_disk: AtomicBool::new(false),
            is_broken: AtomicBool::new(false),
            evicts_in_reads: AtomicBool::new(false),
            n_evictions: AtomicU64::new(0),
            lendings: Mutex::default(),
        }));
    }
    (merge.finish(ManifestDigest::of(b"")).unwrap(), fakes)
}

/// A mounted image. Dropped in this order: the mount, then its directory.
#[derive(Debug)]
pub(crate) struct Mounted {
    pub(crate) mount: FuseMount,
    pub(crate) layers: Vec<Arc<FakeLayer>>,
    pub(crate) metrics: Metrics,
    pub(crate) dir: tempfile::TempDir,
}

/// Mounts an image; `None`, with a word of why, where this process may not mount.
pub(crate) fn mount_image(test: &str, layers: Vec<LayerText>) -> Option<Mounted> {
    let (index, layers) = build(layers);
    let pool = ReadPool::new(PoolConfig::default()).unwrap();
    let index = ImageIndex::open(index).unwrap();
    let (metrics, dir) = (Metrics::new(), tempfile::tempdir().unwrap());
    let mount = mount_index(test, index, &layers, &metrics, pool, dir.path())?;
    Some(Mounted {
        mount,
        layers,
        metrics,
        dir,
    })
}

/// Mounts an index with its layers on `dir`.
pub(crate) fn mount_index<I: ServedBytes>(
    test: &str,
    index: ImageIndex<I>,
    layers: &[Arc<FakeLayer>],
    metrics: &Metrics,
    pool: Arc<ReadPool>,
    dir: &std::path::Path,
) -> Option<FuseMount> {
    let data = layers.iter().map(|it| it.clone() as Arc<dyn LayerData>);
    let fs = Arc::new(ClipFs::new(index, data.collect(), metrics.clone()).unwrap());
    let options = MountOptions::new("registry.example:5000/a,b:latest");
    match mount(fs, FakeProvider::new(layers), pool, dir, &options) {
        Ok(mount) => Some(mount),
        Err(FuseError::Device { source }) => {
            eprintln!("SKIP {test}: /dev/fuse: {source}");
            None
        }
        Err(FuseError::Mount { source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied =>
        {
            eprintln!("SKIP {test}: mount(2): {source}");
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

impl Mounted {
    pub(crate) fn path(&self, path: &str) -> std::path::PathBuf {
        self.mount.dir().join(path)
    }

    pub(crate) fn n_requests(&self, op: &str, outcome: &str) -> u64 {
        let counter = &self.metrics.fuse_requests;
        counter.with_label_values(&[op, outcome]).get()
    }

    pub(crate) fn n_disk_reads(&self, outcome: &str) -> u64 {
        let counter = &self.metrics.tier_reads;
        counter.with_label_values(&["disk", outcome]).get()
    }
}

/// Runs what may hang, if the code is wrong, on a thread of its own.
pub(crate) fn within_deadline<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> mpsc::Receiver<T> {
    let (sender, receiver) = mpsc::channel();
    // The test may have failed by then, and nobody listens.
    thread::spawn(move || drop(sender.send(work())));
    receiver
}
