//! Hands layers to the uploader of the remote content cache, and remembers across restarts which
//! ones it still lacks.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use tokio::sync::oneshot;
use tracing::{debug, warn};

use super::{
    disk::{ACCESS, CompletedIndex, INDEX, Kept, LayerFile, UPLOAD_PENDING},
    store::{Inner, Layer},
};
use crate::{
    codec::{access_map::AccessMap, piece_map::PieceMap},
    digest::{self, BlobDigest, ChunkDigest, DiffId},
    disk,
    remote::{Enqueued, LeaseGuard, Repair, UploadOutcome, UploadSource},
    sys::MappedFile,
    tier::LayerDesc,
};

/// How long a new layer stays in the page cache before it is flushed.
///
/// The publish that wanted the layer writes its own record with fsync, which would stand in line
/// behind the layer: 10 ms for 30 MB on the bench machine. A process that ends before has not
/// flushed; then chunks are verified again after a reboot.
const FLUSH_DELAY: Duration = Duration::from_secs(1);

/// How an upload that somebody waits for has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UploadEnd {
    /// What was to be put is in the store.
    There {
        /// Bytes that were sent.
        sent_bytes: u64,
    },
    /// It was given up.
    Failed {
        /// Why.
        reason: String,
    },
    /// The store of layers was shut down first.
    Stopped,
    /// Another request for the same layer took its place, and goes on.
    Merged,
}

/// A complete layer on its way to the remote content cache.
#[derive(Debug)]
struct LayerUpload {
    // First, so that the layer is let go of before anybody is told.
    file: Arc<LayerFile>,
    /// All of it is read; without this, what is evicted meanwhile is found wrong, and the upload fails.
    _kept: Option<Kept>,
    blob: BlobDigest,
    blob_bytes: u64,
    /// The index with the digests that were learned, if they were.
    completed: OnceLock<Option<CompletedIndex>>,
    told: Told,
}

/// Tells how an upload has ended, when all of it is over.
#[derive(Debug, Default)]
struct Told {
    /// std Mutex: held to replace it.
    end: Mutex<Option<UploadEnd>>,
    to: Option<oneshot::Sender<UploadEnd>>,
}

impl Told {
    fn note(&self, end: UploadEnd) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let end = self.end.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(to) = self.to.take() {
            // Who waited may have given up.
            let _ = to.send(end.take().unwrap_or(UploadEnd::Stopped));
        }
    }
}

impl LayerUpload {
    fn completed(&self) -> Option<&CompletedIndex> {
        self.completed
            .get_or_init(|| self.file.completed_index())
            .as_ref()
    }
}

impl UploadSource for LayerUpload {
    fn diff_id(&self) -> DiffId {
        self.file.diff_id()
    }

    fn blob(&self) -> BlobDigest {
        self.blob
    }

    fn blob_bytes(&self) -> u64 {
        self.blob_bytes
    }

    fn layer_bytes(&self) -> u64 {
        self.file.layer_bytes()
    }

    fn chunk_digests(&self) -> Vec<ChunkDigest> {
        (0..self.file.n_chunks())
            .filter_map(|it| self.file.chunk_digest(it))
            .collect()
    }

    fn index(&self) -> io::Result<(u64, ChunkDigest)> {
        let index = self.file.index();
        let digest = match self.completed() {
            Some(completed) => completed.digest(),
            None => index.digest(),
        };
        Ok((index.as_bytes().len() as u64, digest))
    }

    fn read_index(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let file = File::open(self.file.dir().join(INDEX))?;
        match self.completed() {
            Some(completed) => completed.read_at(&file, into, offset),
            None => file.read_exact_at(into, offset),
        }
    }

    fn access_map(&self) -> io::Result<Option<(BlobDigest, u64)>> {
        let file = match File::open(self.file.dir().join(ACCESS)) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(err) => return Err(err),
        };
        // An empty file cannot be mapped.
        let map = MappedFile::new(&file)?;
        let map_bytes = map.len() as u64;
        let blob = match PieceMap::<MappedFile>::is_one(&map) {
            true => PieceMap::decode(map).map(|it| it.subject().blob),
            false => AccessMap::decode(map).map(|it| it.blob()),
        };
        let blob = blob.map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))?;
        Ok(Some((blob, map_bytes)))
    }

    fn read_access_map(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        File::open(self.file.dir().join(ACCESS))?.read_exact_at(into, offset)
    }

    fn read_chunk(&self, n: u32, into: &mut Vec<u8>) -> io::Result<()> {
        // The uploader verifies what it sends, and says so when it is wrong.
        self.file.verify_chunk(n, into).map(|_is_right| ())
    }

    fn failed(&self, reason: &str) {
        self.told.note(UploadEnd::Failed {
            reason: reason.to_owned(),
        });
    }

    fn done(&self, outcome: UploadOutcome) {
        match outcome {
            UploadOutcome::Uploaded { sent_bytes } => {
                self.told.note(UploadEnd::There { sent_bytes });
            }
            UploadOutcome::AlreadyThere => self.told.note(UploadEnd::There { sent_bytes: 0 }),
            UploadOutcome::Merged => self.told.note(UploadEnd::Merged),
            // The reason was given before.
            UploadOutcome::Failed | UploadOutcome::Stopped => {}
        }
        match outcome {
            UploadOutcome::Uploaded { .. } | UploadOutcome::AlreadyThere => {
                let marker = self.file.dir().join(UPLOAD_PENDING);
                if let Err(err) = fs::remove_file(&marker) {
                    debug!(path = %marker.display(), error = %err, "removing the upload mark");
                }
            }
            // The mark stays, and the next start tries again.
            UploadOutcome::Failed | UploadOutcome::Stopped | UploadOutcome::Merged => {}
        }
    }
}

/// Marks the layer as one that the remote content cache lacks: `<blob digest> <blob bytes>`.
fn mark(dir: &Path, desc: &LayerDesc) -> io::Result<()> {
    let content = format!("{} {}\n", desc.blob, desc.blob_bytes);
    disk::publish_unsynced(&dir.join(UPLOAD_PENDING), content.as_bytes())
}

/// Enqueues again what an earlier process did not get to upload.
pub(super) fn resume(inner: &Arc<Inner>) {
    let Some(remote) = &inner.remote else { return };
    let Ok(layers) = fs::read_dir(inner.paths.layers()) else {
        return;
    };
    for dir in layers.flatten() {
        let Ok(content) = fs::read_to_string(dir.path().join(UPLOAD_PENDING)) else {
            continue;
        };
        let parsed = content
            .trim()
            .split_once(' ')
            .and_then(|(blob, bytes)| Some((blob.parse().ok()?, bytes.parse().ok()?)));
        let layer = dir.file_name().to_str().and_then(digest::from_hex);
        let (Some((blob, blob_bytes)), Some(layer)) = (parsed, layer) else {
            continue;
        };
        match LayerFile::open(&dir.path(), DiffId::from_bytes(layer)) {
            Ok(Some(file)) if file.is_complete() => {
                let upload = LayerUpload {
                    _kept: kept(&file),
                    file: Arc::new(file.in_room(&inner.room)),
                    blob,
                    blob_bytes,
                    completed: OnceLock::new(),
                    told: Told::default(),
                };
                remote.uploader.enqueue(Arc::new(upload));
            }
            Ok(_) | Err(_) => {}
        }
    }
}

fn kept(file: &LayerFile) -> Option<Kept> {
    let kept = file.keep_whole().inspect_err(|err| {
        debug!(layer.diff_id = %file.diff_id(), error = %err, "a layer on its way to the remote may be evicted");
    });
    kept.ok()
}

/// Marks the layer as one to be uploaded, and describes its upload.
fn marked(
    desc: &LayerDesc,
    file: &Arc<LayerFile>,
    to: Option<oneshot::Sender<UploadEnd>>,
) -> Arc<LayerUpload> {
    if let Err(err) = mark(file.dir(), desc) {
        warn!(layer.diff_id = %desc.diff_id, error = %err, "upload would not survive a restart");
    }
    Arc::new(LayerUpload {
        file: Arc::clone(file),
        _kept: kept(file),
        blob: desc.blob,
        blob_bytes: desc.blob_bytes,
        completed: OnceLock::new(),
        told: Told {
            end: Mutex::default(),
            to,
        },
    })
}

impl Inner {
    /// Has the layer uploaded by and by, or `repair`ed where the remote has it already.
    pub(super) fn upload_later(&self, desc: &LayerDesc, file: &Arc<LayerFile>, repair: Repair) {
        let Some(remote) = &self.remote else { return };
        let upload = marked(desc, file, None);
        // A refusal is counted and logged there; the mark stays for the next start.
        remote.uploader.enqueue_repair(upload, repair);
    }

    /// As [`upload_later`](Self::upload_later), and waits until that has ended.
    pub(super) async fn upload_now(
        &self,
        desc: &LayerDesc,
        file: &Arc<LayerFile>,
        repair: Repair,
    ) -> UploadEnd {
        let failed = |reason: &str| UploadEnd::Failed {
            reason: reason.to_owned(),
        };
        let Some(remote) = &self.remote else {
            return failed("there is no remote content cache");
        };
        let (to, ended) = oneshot::channel();
        let upload = marked(desc, file, Some(to));
        match remote.uploader.enqueue_repair(upload, repair) {
            Enqueued::Accepted => ended.await.unwrap_or(UploadEnd::Stopped),
            Enqueued::Refused => failed("too many layers wait for their upload"),
        }
    }

    /// Has a layer uploaded that is new; other nodes wait for it as long as there is a `lease`.
    pub(super) fn upload_new(
        &self,
        desc: &LayerDesc,
        file: &Arc<LayerFile>,
        lease: Option<LeaseGuard>,
    ) {
        let Some(remote) = &self.remote else { return };
        let upload = marked(desc, file, None);
        // As above; refused, the lease ends here.
        match lease {
            Some(lease) => remote.uploader.enqueue_leased(upload, lease),
            None => remote.uploader.enqueue(upload),
        };
    }

    /// Flushes a complete layer to stable storage, beside all else.
    pub(super) fn flush_later(self: &Arc<Self>, layer: &Arc<Layer>) {
        let diff_id = layer.file().diff_id();
        let flush = layer.file().flush();
        let (runtime, flushes) = (self.runtime.clone(), Arc::clone(&self.pool.flushes));
        self.spawn(async move {
            tokio::time::sleep(FLUSH_DELAY).await;
            let turn = flushes.acquire_owned().await;
            let flushed = runtime.spawn_blocking(move || {
                // It goes on if nobody waits for it any more.
                let _turn = turn;
                flush.run()
            });
            let flushed = flushed.await;
            // Unflushed chunks are verified again after a reboot: slower, never wrong.
            if let Ok(Err(err)) = flushed {
                warn!(layer.diff_id = %diff_id, error = %err, "flushing a layer to disk");
            }
        });
    }
}
