//! The layer store: gives open layers, and makes their chunks present from the first tier that
//! has them.

use std::{
    collections::HashMap,
    fs::{DirBuilder, File},
    io,
    ops::Range,
    os::unix::fs::DirBuilderExt,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tracing::{info, warn};

use super::{
    CacheConfig,
    access::AccessState,
    ahead::{RUNS, Sequences},
    catalog,
    disk::{CachePaths, LayerFile},
    fill::Blame,
    flight::Flights,
    images::{Images, Users},
    lock::{self, FillLock},
    origins::{Origin, Origins},
    random::{Demand, RandomReads},
    riders::Riders,
    room::{Claim, Room},
    scratch::{NewFile, ScratchFile},
    through::Through,
    upload,
    warm::Warming,
};
use crate::{
    digest::DiffId,
    fair::Turns,
    metrics::{Metrics, Tier},
    remote::{ContentCache, Uploader},
    tier::{BlobSource, LayerDesc, PresentError},
};

/// How often a process looks whether another one has come further with a layer.
///
/// A stream passes a chunk in about 2 ms, and flock has no way to be told.
pub(super) const OTHER_PROCESS_POLL: Duration = Duration::from_millis(5);

/// How many chunks a stream that is under way is waited for, instead of reading there at random.
///
/// A chunk takes a stream two milliseconds and a random access ten, most of them to decompress.
const RIDE_CHUNKS: u32 = 8;

/// Where a refill is whose stream is not open yet: it waits for another process, for its turn, or for the
/// registry, for minutes maybe. No layer has such a chunk.
pub(super) const NOT_BEGUN: u32 = u32::MAX;

/// How many parts of layers are fetched at once: each holds a chunk and a window in memory.
const RANDOM_READS: usize = 2;

/// How many tables of contents are read at once: each takes a connection, and some hundred KiB.
const TABLES: usize = 2;

/// Gives layers and fills them. Clones share one store.
#[derive(Debug, Clone)]
pub struct LayerStore(Arc<Inner>);

/// What all clones share. `make` and `present` implement the two things it does.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) paths: CachePaths,
    pub(super) config: CacheConfig,
    pub(super) room: Arc<Room>,
    pub(super) remote: Option<Remote>,
    pub(super) metrics: Metrics,
    pub(super) runtime: Handle,
    /// std Mutex: held for a map operation, never across an await.
    pub(super) layers: Mutex<HashMap<DiffId, Weak<Layer>>>,
    pub(super) layer_flights: Flights<DiffId>,
    pub(super) chunk_flights: Flights<(DiffId, u32)>,
    pub(super) access_flights: Flights<DiffId>,
    pub(super) decompressions: Turns,
    /// Tables of contents that are read.
    pub(super) tables: Semaphore,
    pub(super) random_reads: Turns,
    pub(super) pool: Pool,
    /// Chunks that are fetched together from the remote content cache.
    pub(super) runs: Turns,
    pub(super) demand: Demand,
    pub(super) warming: Warming,
    pub(super) through: Through,
    pub(super) images: Images,
    /// std Mutex: held to add or reap a task, never across an await.
    pub(super) tasks: Mutex<JoinSet<()>>,
}

/// What of the blocking threads, which are few, is for work that may take minutes: one for each kind, so that
/// readers of what is not on disk always find others.
#[derive(Debug)]
pub(super) struct Pool {
    /// Layers that are flushed.
    pub(super) flushes: Arc<Semaphore>,
    /// Layers that are read through after an unclean stop.
    pub(super) adoptions: Arc<Semaphore>,
    /// Publishes that have layers evicted, or wait for who does.
    evictions: Arc<Semaphore>,
}

impl Default for Pool {
    fn default() -> Self {
        let one = || Arc::new(Semaphore::new(1));
        Self {
            flushes: one(),
            adoptions: one(),
            evictions: one(),
        }
    }
}

/// The remote content cache and what fills it.
#[derive(Debug, Clone)]
pub struct Remote {
    /// Where chunks are asked for.
    pub cache: ContentCache,
    /// What stores them there.
    pub uploader: Arc<Uploader>,
}

/// A layer that somebody has open.
#[derive(Debug)]
pub struct Layer {
    pub(super) file: Arc<LayerFile>,
    /// Who can be asked for its blob.
    pub(super) origins: Origins,
    /// std Mutex: held to look and to start, never across an await.
    pub(super) refill: Mutex<Option<watch::Receiver<RefillState>>>,
    /// Who waits for the refill.
    pub(super) riders: Riders,
    /// Chunks that the remote content cache was asked for and did not have, to be put there again.
    ///
    /// std Mutex: held to push or take, never across an await.
    pub(super) missed: Mutex<Vec<u32>>,
    /// Where its readers go, as far as the remote content cache is asked.
    ///
    /// std Mutex: held to decide, never across an await.
    pub(super) ahead: Mutex<Sequences>,
    /// The chunk that the refill's stream comes to next; [`NOT_BEGUN`] until there is one.
    pub(super) refill_at: AtomicU32,
    /// std Mutex: held to look and to start, never across an await.
    pub(super) random: Mutex<RandomReads>,
    /// std Mutex: held to copy or replace it, never across an await.
    pub(super) access: Mutex<AccessState>,
    /// The images in use that have it.
    pub(super) users: Users,
}

/// How far a refill has come.
#[derive(Debug, Clone)]
pub(super) enum RefillState {
    /// It runs; a new value wakes the waiters.
    Running,
    Done,
    Failed(PresentError),
}

impl Layer {
    /// The layer's data and index.
    pub fn file(&self) -> &Arc<LayerFile> {
        &self.file
    }

    /// Whether a stream is passing the layer's chunks, or is about to begin.
    pub(super) fn is_refilling(&self) -> bool {
        self.refill
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Whether a stream of all of the layer has begun, and not ended.
    pub(super) fn is_streaming(&self) -> bool {
        self.is_refilling() && self.refill_at.load(Ordering::Relaxed) != NOT_BEGUN
    }

    /// Whether a stream is about to pass `chunk`, so that there is no faster way to it.
    pub(super) fn is_passing(&self, chunk: u32) -> bool {
        let at = self.refill_at.load(Ordering::Relaxed);
        self.is_refilling() && at <= chunk && chunk - at < RIDE_CHUNKS
    }

    /// Notes for the images in use which of `chunks` are not there and wanted.
    pub(super) fn note_wanted(&self, chunks: Range<u32>) {
        let missing = chunks.start..chunks.end.min(self.file.n_chunks());
        missing
            .filter(|it| !self.file.has(*it..*it + 1))
            .for_each(|it| self.users.touched(it));
    }

    /// Notes that the remote content cache lacks a chunk.
    pub(super) fn note_missed(&self, chunk: u32) {
        let mut missed = self.missed.lock().unwrap_or_else(PoisonError::into_inner);
        // A chunk that the disk cannot take is missed again and again.
        if !missed.contains(&chunk) {
            missed.push(chunk);
        }
    }

    /// Has the layer's blob asked for at `origin` as well, by whom it was opened last.
    pub(super) fn renew_origin(&self, origin: &Origin) {
        if self.origins.renew(origin) {
            self.reconsider_access();
        }
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.file.touch();
    }
}

impl LayerStore {
    /// Opens the store in the configured directory and removes what a crash left behind.
    ///
    /// `runtime` runs the fills; it must outlive the store's users.
    ///
    /// # Errors
    /// Those of the file system, with the directory in the text.
    pub fn open(
        config: CacheConfig,
        remote: Option<Remote>,
        metrics: Metrics,
        runtime: Handle,
    ) -> io::Result<Self> {
        let paths = CachePaths::new(&config.dir);
        let in_dir = |err: io::Error| {
            let dir = config.dir.display();
            io::Error::new(err.kind(), format!("cache directory {dir}: {err}"))
        };
        // Other users of the machine have no right to what pods need credentials for.
        let mut private = DirBuilder::new();
        private
            .recursive(true)
            .mode(0o700)
            .create(&config.dir)
            .map_err(in_dir)?;
        for dir in [paths.layers(), paths.images(), paths.temporary()] {
            std::fs::create_dir_all(dir).map_err(in_dir)?;
        }
        catalog::remove_leftovers(&paths).map_err(in_dir)?;
        let room = Room::new(paths.clone(), &config, metrics.clone(), runtime.clone());
        let room = Arc::new(room.map_err(in_dir)?);
        info!(path = %config.dir.display(), bytes = room.used_bytes(), max_bytes = config.max_bytes,
            layers = metrics.layer_cache_layers.get(), "initialized OCI storage with disk cache");
        let store = Self(Arc::new(Inner {
            paths,
            room,
            decompressions: Turns::new(config.max_decompressions),
            tables: Semaphore::new(TABLES),
            random_reads: Turns::new(RANDOM_READS),
            pool: Pool::default(),
            runs: Turns::new(RUNS),
            demand: Demand::default(),
            warming: Warming::default(),
            through: Through::default(),
            images: Images::default(),
            config,
            remote,
            metrics,
            runtime,
            layers: Mutex::default(),
            layer_flights: Flights::default(),
            chunk_flights: Flights::default(),
            access_flights: Flights::default(),
            tasks: Mutex::default(),
        }));
        store.0.room.serve(Arc::downgrade(&store.0));
        // What is to be uploaded is in use before anything is evicted.
        upload::resume(&store.0);
        store.sweep_soon();
        Ok(store)
    }

    /// Where the store keeps what.
    pub fn paths(&self) -> &CachePaths {
        &self.0.paths
    }

    /// Gives the layer `desc`, its index known; or, if its blob has a table of contents, the one that this
    /// describes, which has another name.
    ///
    /// A layer that the disk does not have is looked for in the remote content cache, then built
    /// from the registry, which leaves it on disk. Whoever asks for the same layer meanwhile, in
    /// this process or another, waits for the same work.
    ///
    /// # Errors
    /// [`PresentError`] says why there is none.
    ///
    /// # Cancellation
    /// Safe; the work goes on if somebody else waits for it.
    pub async fn layer(
        &self,
        desc: &LayerDesc,
        source: Arc<dyn BlobSource>,
    ) -> Result<Arc<Layer>, PresentError> {
        if let Some(layer) = self.0.layer_by_toc(desc, &source).await? {
            return Ok(layer);
        }
        let origin = Origin::new(&desc.without_toc(), source);
        if let Some(layer) = self.0.open_layer(&origin)? {
            self.0.tell_blobs_apart(&layer).await;
            return Ok(layer);
        }
        let flight = self.0.layer_flights.join(desc.diff_id).await;
        if flight.followed {
            self.0.metrics.single_flight_followers.inc();
        }
        let lock = self.0.lock(desc.diff_id).await?;
        let layer = match self.0.open_layer(&origin)? {
            Some(layer) => layer,
            None => self.0.make_layer(&origin, lock).await?,
        };
        drop(flight);
        Ok(layer)
    }

    /// Notes that these extents of an open layer were read lately, by another process.
    pub fn note_extents(&self, layer: DiffId, extents: &[Range<u32>]) {
        if let Some(layer) = self.0.opened(layer) {
            extents.iter().for_each(|it| layer.file.note_extents(it));
        }
    }

    /// Where is kept what is too large for memory while an index is made.
    pub fn scratch(&self) -> ScratchFile {
        ScratchFile::new(&self.0.paths.scratch(), Arc::clone(&self.0.room))
    }

    /// Writes `file` of the cache, which is empty.
    pub fn writer<'a>(&'a self, file: &'a File) -> NewFile<'a> {
        NewFile::new(file, &self.0.room)
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    /// Has the cache looked at, and what is too much evicted, beside all else: something was added.
    pub fn sweep_soon(&self) {
        self.0.room.sweep_soon();
    }

    /// Waits for the evictions under way: what was asked for before this call is done after it.
    pub async fn settle(&self) {
        self.0.room.settle().await;
    }

    /// Ends what is done for images, waits for the uploads under way, at most until `deadline` each,
    /// then stops all work.
    pub async fn shutdown(&self, deadline: Duration) {
        self.0.images.stop(deadline).await;
        if let Some(remote) = &self.0.remote {
            remote.uploader.drain(deadline).await;
        }
        let mut tasks =
            std::mem::take(&mut *self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        self.0.room.settle().await;
    }
}

impl Inner {
    /// Starts a task that ends with the store.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.runtime);
    }

    pub(super) fn blame(&self, layer: DiffId) -> Blame<'_> {
        Blame {
            layer,
            paths: &self.paths,
            max_bytes: self.config.max_bytes,
        }
    }

    pub(super) fn opened(&self, layer: DiffId) -> Option<Arc<Layer>> {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.get(&layer).and_then(Weak::upgrade)
    }

    /// The layers that somebody has open.
    pub(super) fn in_use(&self) -> Vec<Arc<Layer>> {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.values().filter_map(Weak::upgrade).collect()
    }

    /// Gives the layer if it is open, or if the disk has it.
    pub(super) fn open_layer(&self, origin: &Origin) -> Result<Option<Arc<Layer>>, PresentError> {
        let diff_id = origin.desc.diff_id;
        if let Some(layer) = self.opened(diff_id) {
            layer.renew_origin(origin);
            return Ok(Some(layer));
        }
        let file = match LayerFile::open(&self.paths.layer(diff_id), diff_id) {
            Ok(Some(file)) => file,
            Ok(None) => return Ok(None),
            Err(err) if err.kind() == io::ErrorKind::InvalidData => {
                warn!(layer.diff_id = %diff_id, error = %err, "layer on disk is damaged, making it anew");
                self.metrics
                    .verify_failures
                    .with_label_values(&[Tier::Disk.label()])
                    .inc();
                return Ok(None);
            }
            Err(err) => return Err(self.blame(diff_id).disk(err)),
        };
        if file.is_complete() {
            info!(layer.diff_id = %diff_id, bytes = file.layer_bytes(), path = %file.dir().display(),
                "disk cache hit");
        }
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        // Somebody may have opened it meanwhile; all share one.
        if let Some(layer) = layers.get(&diff_id).and_then(Weak::upgrade) {
            layer.renew_origin(origin);
            return Ok(Some(layer));
        }
        file.touch();
        let layer = Arc::new(Layer {
            file: Arc::new(file.in_room(&self.room)),
            origins: Origins::new(origin),
            refill: Mutex::default(),
            riders: Riders::default(),
            missed: Mutex::default(),
            ahead: Mutex::default(),
            refill_at: AtomicU32::new(NOT_BEGUN),
            random: Mutex::default(),
            access: Mutex::default(),
            users: Users::default(),
        });
        layers.retain(|_, it| 0 < it.strong_count());
        layers.insert(diff_id, Arc::downgrade(&layer));
        Ok(Some(layer))
    }

    /// Makes room for a layer that is to be made, or refuses it.
    pub(super) async fn make_room(
        self: &Arc<Self>,
        layer: DiffId,
        coming_bytes: u64,
    ) -> Result<(), PresentError> {
        let mut turn = None;
        if !self.room.has_spare(coming_bytes) {
            self.find_out().await;
            turn = Arc::clone(&self.pool.evictions).acquire_owned().await.ok();
        }
        let room = Arc::clone(&self.room);
        let claim = Claim::Publish { coming_bytes };
        let made = self.runtime.spawn_blocking(move || {
            // It goes on if nobody waits for it any more.
            let _turn = turn;
            room.make(claim)
        });
        let made = made.await;
        made.map_err(|err| crashed(layer, &err))?
            .map_err(|bound| self.blame(layer).no_room(bound))
    }

    /// Takes the right to fill the layer, unless another process has it.
    pub(super) fn try_lock(&self, layer: DiffId) -> Result<Option<FillLock>, PresentError> {
        lock::try_lock(&self.paths.lock(layer)).map_err(|err| self.blame(layer).disk(err))
    }

    /// Waits until no other process fills the layer.
    pub(super) async fn lock(&self, layer: DiffId) -> Result<FillLock, PresentError> {
        loop {
            match self.try_lock(layer)? {
                Some(lock) => return Ok(lock),
                None => tokio::time::sleep(OTHER_PROCESS_POLL).await,
            }
        }
    }
}

/// What it means that a blocking task of ours panicked or was stopped.
pub(super) fn crashed(layer: DiffId, err: &tokio::task::JoinError) -> PresentError {
    PresentError::Disk {
        reason: format!("work on layer {layer} ended early: {err}"),
    }
}
