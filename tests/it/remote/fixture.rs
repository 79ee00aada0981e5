//! What the tests of the remote content cache need: faults, a clock, a layer.

use std::{
    collections::HashMap,
    fmt, io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use clip_csi::{
    chunk,
    clock::Clock,
    digest::{BlobDigest, ChunkDigest, DiffId},
    fair::Claimant,
    integrity::IntegrityKey,
    metrics::Metrics,
    remote::{
        BackOff, ContentCache, ContentOptions, DirCache, RemoteManifest, UploadOutcome,
        UploadSource,
    },
    tier::{BoxFuture, BoxStream, CacheKey, LayerCache, LeaseHolder, Put, TierError},
};
use tokio::sync::Semaphore;

/// Generous: the machine may be busy, and no test waits for it to pass.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn dir_cache() -> (DirCache, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    (DirCache::new(dir.path(), PATIENCE), dir)
}

/// What goes wrong with a call.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    /// It fails before it reaches the engine.
    Fail(TierError),
    /// It takes longer.
    Delay(Duration),
    /// It never ends.
    Hang,
    /// It waits until it is let go on, in the order in which calls came.
    Hold(Arc<Semaphore>),
    /// A value is cut in half on its way back.
    Truncate,
    /// A bit of a value is flipped on its way back.
    Corrupt,
}

/// One call that reached the decorator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Get(CacheKey),
    Put(CacheKey),
    Delete(CacheKey),
    Lease(CacheKey),
    Release(CacheKey),
}

/// Adds faults to an engine, and notes its calls.
#[derive(Debug)]
pub(super) struct Flaky<T> {
    inner: T,
    calls: Mutex<Vec<Call>>,
    faults: Mutex<HashMap<usize, Fault>>,
    otherwise: Mutex<Option<Fault>>,
}

impl<T: LayerCache> Flaky<T> {
    pub(super) fn new(inner: T) -> Self {
        Self {
            inner,
            calls: Mutex::default(),
            faults: Mutex::default(),
            otherwise: Mutex::default(),
        }
    }

    /// Lets the `nth` call, counted from 0, go wrong.
    pub(super) fn on(self, nth: usize, fault: Fault) -> Self {
        self.fault(nth, fault);
        self
    }

    /// Lets the `nth` call go wrong, of an engine in use.
    pub(super) fn fault(&self, nth: usize, fault: Fault) {
        self.faults.lock().unwrap().insert(nth, fault);
    }

    /// Lets all other calls go wrong, or right again.
    pub(super) fn always(&self, fault: Option<Fault>) {
        *self.otherwise.lock().unwrap() = fault;
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        self.calls.lock().unwrap().clone()
    }

    pub(super) fn n_calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    pub(super) fn puts(&self) -> Vec<CacheKey> {
        let calls = self.calls.lock().unwrap();
        let puts = calls.iter().filter_map(|it| match it {
            Call::Put(key) => Some(*key),
            _ => None,
        });
        puts.collect()
    }

    /// Leases that were asked for or renewed.
    pub(super) fn n_leases(&self) -> usize {
        let calls = self.calls.lock().unwrap();
        calls
            .iter()
            .filter(|it| matches!(it, Call::Lease(_)))
            .count()
    }

    async fn strike(&self, call: Call) -> Result<Option<Fault>, TierError> {
        let nth = {
            let mut calls = self.calls.lock().unwrap();
            calls.push(call);
            calls.len() - 1
        };
        let fault = self.faults.lock().unwrap().remove(&nth);
        let fault = fault.or_else(|| self.otherwise.lock().unwrap().clone());
        match &fault {
            Some(Fault::Fail(error)) => return Err(error.clone()),
            Some(Fault::Delay(time)) => tokio::time::sleep(*time).await,
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Hold(go_on)) => go_on.acquire().await.unwrap().forget(),
            Some(Fault::Truncate | Fault::Corrupt) | None => {}
        }
        Ok(fault)
    }
}

impl<T: LayerCache> LayerCache for Flaky<T> {
    fn engine(&self) -> &'static str {
        self.inner.engine()
    }

    fn get(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> BoxFuture<'_, Result<Option<Bytes>, TierError>> {
        Box::pin(async move {
            let fault = self.strike(Call::Get(key)).await?;
            let value = self.inner.get(key, max_bytes).await?;
            Ok(value.map(|value| match fault {
                Some(Fault::Truncate) => value.slice(..value.len() / 2),
                Some(Fault::Corrupt) => {
                    let mut value = value.to_vec();
                    let middle = value.len() / 2;
                    value[middle] ^= 0x10;
                    value.into()
                }
                _ => value,
            }))
        })
    }

    fn get_again(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> Option<BoxFuture<'_, Result<Option<Bytes>, TierError>>> {
        Some(self.get(key, max_bytes))
    }

    fn put(&self, key: CacheKey, value: Bytes, put: Put) -> BoxFuture<'_, Result<(), TierError>> {
        Box::pin(async move {
            self.strike(Call::Put(key)).await?;
            self.inner.put(key, value, put).await
        })
    }

    fn delete(&self, key: CacheKey) -> BoxFuture<'_, Result<(), TierError>> {
        Box::pin(async move {
            self.strike(Call::Delete(key)).await?;
            self.inner.delete(key).await
        })
    }

    fn lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<bool, TierError>> {
        Box::pin(async move {
            self.strike(Call::Lease(key)).await?;
            self.inner.lease(key, holder, ttl).await
        })
    }

    fn release(&self, key: CacheKey, holder: LeaseHolder) -> BoxFuture<'_, Result<(), TierError>> {
        Box::pin(async move {
            self.strike(Call::Release(key)).await?;
            self.inner.release(key, holder).await
        })
    }
}

/// A handle to an engine that the test keeps, too.
#[derive(Debug)]
pub(super) struct Shared<T>(pub(super) Arc<T>);

impl<T: LayerCache> LayerCache for Shared<T> {
    fn engine(&self) -> &'static str {
        self.0.engine()
    }

    fn get(&self, key: CacheKey, max: usize) -> BoxFuture<'_, Result<Option<Bytes>, TierError>> {
        self.0.get(key, max)
    }

    fn get_each(
        &self,
        keys: Vec<CacheKey>,
        max: usize,
    ) -> BoxStream<'_, Result<Option<Bytes>, TierError>> {
        self.0.get_each(keys, max)
    }

    fn get_again(
        &self,
        key: CacheKey,
        max_bytes: usize,
    ) -> Option<BoxFuture<'_, Result<Option<Bytes>, TierError>>> {
        self.0.get_again(key, max_bytes)
    }

    fn put(&self, key: CacheKey, value: Bytes, put: Put) -> BoxFuture<'_, Result<(), TierError>> {
        self.0.put(key, value, put)
    }

    fn delete(&self, key: CacheKey) -> BoxFuture<'_, Result<(), TierError>> {
        self.0.delete(key)
    }

    fn lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> BoxFuture<'_, Result<bool, TierError>> {
        self.0.lease(key, holder, ttl)
    }

    fn release(&self, key: CacheKey, holder: LeaseHolder) -> BoxFuture<'_, Result<(), TierError>> {
        self.0.release(key, holder)
    }
}

/// A clock that stands until it is told to go.
#[derive(Debug, Default)]
pub(super) struct FakeClock(AtomicU64);

impl FakeClock {
    pub(super) fn advance(&self, time: Duration) {
        let millis = u64::try_from(time.as_millis()).unwrap();
        self.0.fetch_add(millis, Ordering::SeqCst);
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst))
    }
}

pub(super) fn key(byte: u8) -> IntegrityKey {
    IntegrityKey::new(&[byte; 32]).unwrap()
}

pub(super) fn content_options(key: Option<IntegrityKey>) -> ContentOptions {
    ContentOptions {
        key,
        max_index_bytes: 4 << 20,
        back_off: BackOff::default(),
        lease_ttl: Duration::from_secs(15),
        lease_wait: PATIENCE,
    }
}

/// Puts the layout on top of an engine.
pub(super) fn content<T: LayerCache + 'static>(
    engine: &Arc<T>,
    key: Option<IntegrityKey>,
    clock: Arc<dyn Clock>,
) -> (ContentCache, Metrics) {
    content_with(engine, content_options(key), clock)
}

pub(super) fn content_with<T: LayerCache + 'static>(
    engine: &Arc<T>,
    options: ContentOptions,
    clock: Arc<dyn Clock>,
) -> (ContentCache, Metrics) {
    let metrics = Metrics::new();
    let engine = Arc::clone(engine) as Arc<dyn LayerCache>;
    let cache = ContentCache::new(engine, options, metrics.clone(), clock);
    (cache, metrics)
}

pub(super) fn verify_failures(metrics: &Metrics) -> u64 {
    metrics
        .verify_failures
        .with_label_values(&["content_cache"])
        .get()
}

/// Called before chunk `n` is read.
type Hook = Box<dyn Fn(u32) + Send + Sync>;

/// A layer on a "local disk" in memory.
pub(super) struct Layer {
    pub(super) content: Vec<u8>,
    pub(super) index: Bytes,
    pub(super) access_map: Option<Bytes>,
    pub(super) hook: Option<Hook>,
    /// Whether the local copy is rotten, although its digests are right.
    pub(super) is_rotten: bool,
    pub(super) n_reads: AtomicUsize,
    outcomes: Mutex<Vec<UploadOutcome>>,
}

impl fmt::Debug for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layer").finish_non_exhaustive()
    }
}

impl Layer {
    /// `n_chunks` chunks, the last one short; every other one can be compressed.
    pub(super) fn new(seed: u8, n_chunks: usize) -> Self {
        let len = usize::try_from(chunk::CHUNK_BYTES).unwrap();
        let mut content = Vec::new();
        for n in 0..n_chunks {
            let len = if n + 1 == n_chunks { 1234 } else { len };
            let mut chunk = vec![0; len];
            let name = format!("{seed} {n}");
            if n % 2 == 0 {
                let mut noise = blake3::Hasher::new();
                noise.update(name.as_bytes());
                noise.finalize_xof().fill(&mut chunk);
            } else {
                let text = name.as_bytes().iter().cycle();
                chunk
                    .iter_mut()
                    .zip(text)
                    .for_each(|(to, from)| *to = *from);
            }
            content.extend(chunk);
        }
        Self {
            content,
            index: Bytes::from(format!("index of {seed}, ").repeat(50)),
            access_map: None,
            hook: None,
            is_rotten: false,
            n_reads: AtomicUsize::new(0),
            outcomes: Mutex::default(),
        }
    }

    pub(super) fn n_chunks(&self) -> u32 {
        u32::try_from(chunk::n_chunks(self.layer_bytes())).unwrap()
    }

    pub(super) fn chunk(&self, n: u32) -> &[u8] {
        let range = chunk::byte_range(n, self.layer_bytes());
        &self.content[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
    }

    pub(super) fn digest(&self, n: u32) -> ChunkDigest {
        ChunkDigest::of(self.chunk(n))
    }

    pub(super) fn outcomes(&self) -> Vec<UploadOutcome> {
        self.outcomes.lock().unwrap().clone()
    }

    /// Fetches chunk `n` as a reader does, and checks it once more against the truth.
    pub(super) async fn fetch(&self, cache: &ContentCache, n: u32) -> bool {
        let truth = self.chunk(n);
        let expect = self.digest(n);
        let got = cache
            .chunk(Claimant::Mount(0), &self.diff_id(), n, truth.len(), &expect)
            .await;
        if let Some(got) = &got {
            assert!(*got == truth, "chunk {n} is wrong");
        }
        got.is_some()
    }
}

/// Fetches the index of a layer, if all of it can be had.
pub(super) async fn index_of(cache: &ContentCache, manifest: &RemoteManifest) -> Option<Bytes> {
    let mut index = Vec::new();
    let keep = |part: &[u8]| {
        index.extend(part);
        Ok(())
    };
    let is_whole = cache.index(manifest, keep).await.unwrap();
    is_whole.then(|| index.into())
}

/// Fetches the access map of a layer, if all of it can be had.
pub(super) async fn access_map_of(cache: &ContentCache, layer: &Layer) -> Option<Bytes> {
    let mut map = Vec::new();
    let keep = |part: &[u8]| {
        map.extend(part);
        Ok(())
    };
    let (id, blob) = (layer.diff_id(), layer.blob());
    let fetched = cache.access_map(&id, &blob, layer.layer_bytes(), keep);
    let is_whole = fetched.await.unwrap();
    is_whole.then(|| map.into())
}

impl UploadSource for Layer {
    fn diff_id(&self) -> DiffId {
        DiffId::of(&self.content)
    }

    fn blob(&self) -> BlobDigest {
        BlobDigest::of(b"some blob")
    }

    fn blob_bytes(&self) -> u64 {
        9
    }

    fn layer_bytes(&self) -> u64 {
        u64::try_from(self.content.len()).unwrap()
    }

    fn chunk_digests(&self) -> Vec<ChunkDigest> {
        (0..self.n_chunks()).map(|n| self.digest(n)).collect()
    }

    fn index(&self) -> io::Result<(u64, ChunkDigest)> {
        Ok((self.index.len() as u64, ChunkDigest::of(&self.index)))
    }

    fn read_index(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        into.copy_from_slice(&self.index[start..start + into.len()]);
        Ok(())
    }

    fn access_map(&self) -> io::Result<Option<(BlobDigest, u64)>> {
        let map = self.access_map.as_ref();
        Ok(map.map(|it| (self.blob(), it.len() as u64)))
    }

    fn read_access_map(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        let map = self.access_map.as_ref().unwrap();
        into.copy_from_slice(&map[start..start + into.len()]);
        Ok(())
    }

    fn read_chunk(&self, n: u32, into: &mut Vec<u8>) -> io::Result<()> {
        self.n_reads.fetch_add(1, Ordering::SeqCst);
        if let Some(hook) = &self.hook {
            hook(n);
        }
        into.extend(self.chunk(n));
        if self.is_rotten {
            into[0] ^= 1;
        }
        Ok(())
    }

    fn done(&self, outcome: UploadOutcome) {
        self.outcomes.lock().unwrap().push(outcome);
    }
}

/// Waits until something is so; fails the test if it never is.
pub(super) async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let waited = async {
        while !is_so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    if tokio::time::timeout(PATIENCE, waited).await.is_err() {
        panic!("waited in vain until {what}");
    }
}
