//! One layer on the local disk: its index, its data, and which of its chunks are there.

mod extents;
mod hole;
mod learned;
mod staging;

use std::{
    fs::{self, File, OpenOptions},
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use rustix::io::ReadWriteFlags;
use tracing::debug;

pub use self::extents::Kept;
use self::learned::Learned;
pub(super) use self::{
    extents::{Evicted, Present, now_ms},
    learned::CompletedIndex,
    staging::Staging,
};
use super::{
    lock,
    room::Room,
    state::{self, State},
};
use crate::{
    chunk,
    digest::{ChunkDigest, DiffId, ManifestDigest},
    disk,
    index::{IndexError, layer_index::LayerIndex},
    sys::MappedFile,
};

/// File names in a layer's directory.
pub(super) const INDEX: &str = "index";
pub(super) const DATA: &str = "data";
pub(super) const STATE: &str = "state";
pub(super) const ACCESS: &str = "access";
pub(super) const DIGESTS: &str = "digests";
pub(super) const UPLOAD_PENDING: &str = "upload";
pub(super) const MOUNTED: &str = "mounted";

/// Where things are below the cache directory.
#[derive(Debug, Clone)]
pub struct CachePaths {
    root: PathBuf,
}

impl CachePaths {
    /// Names the places below `root`; touches nothing.
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The cache directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Holds one directory per layer.
    pub fn layers(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// The directory of one layer.
    pub fn layer(&self, layer: DiffId) -> PathBuf {
        self.layers().join(layer.hex())
    }

    /// Where reading may begin in the middle of the layer's blob, if that is known.
    pub fn access_map(&self, layer: DiffId) -> PathBuf {
        self.layer(layer).join(ACCESS)
    }

    /// Holds one index file per image, and one profile.
    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The index of one image.
    pub fn image(&self, image: ManifestDigest) -> PathBuf {
        self.images().join(format!("{}{IMAGE_SUFFIX}", image.hex()))
    }

    /// Which chunks of an image were touched first, if that was recorded.
    pub fn profile(&self, image: ManifestDigest) -> PathBuf {
        let name = format!("{}{PROFILE_SUFFIX}", image.hex());
        self.images().join(name)
    }

    /// Keeps the image index in `file`, which is not published yet, from being removed for as long as the
    /// file is open.
    ///
    /// # Errors
    /// Those of flock(2).
    pub fn pin_new_image(file: &File) -> io::Result<()> {
        // Nobody else knows of it.
        lock::try_pin(file).map(|_| ())
    }

    /// Opens the index of an image and keeps it from being removed for as long as the file is open.
    ///
    /// # Errors
    /// Those of the file system; `NotFound` also if it is just being removed.
    pub fn pin_image(&self, image: ManifestDigest) -> io::Result<File> {
        let path = self.image(image);
        let file = File::open(&path)?;
        if lock::try_pin(&file)? && lock::is_at(&file, &path)? {
            return Ok(file);
        }
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the image's index is being removed",
        ))
    }

    /// Holds what is not complete yet.
    pub(super) fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Holds, for a moment each, the names of files that lose them at once. What a crash in this moment
    /// leaves is removed like an index that was not complete.
    pub(super) fn scratch(&self) -> PathBuf {
        self.images()
    }

    /// Holds the locks.
    pub(super) fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    /// The lock of whoever fills or removes the layer.
    pub(super) fn lock(&self, layer: DiffId) -> PathBuf {
        self.locks().join(layer.hex())
    }

    /// Moves a layer's directory out of everybody's sight; returns where to, to be removed there.
    ///
    /// The caller holds the layer's fill lock. Whoever reads the layer keeps its open files.
    ///
    /// # Errors
    /// Those of rename(2).
    pub(super) fn set_aside(&self, layer: DiffId) -> io::Result<PathBuf> {
        fs::create_dir_all(self.temporary())?;
        let name = format!("{}{ASIDE_SUFFIX}", layer.hex());
        let aside = disk::temporary_beside(&self.temporary().join(name));
        fs::rename(self.layer(layer), &aside)?;
        Ok(aside)
    }
}

/// Suffix of an image index's file name.
pub(super) const IMAGE_SUFFIX: &str = ".clip";

/// Suffix of the file name of an image's profile.
pub(super) const PROFILE_SUFFIX: &str = ".profile";

/// Part of the names of directories that were set aside, as opposed to fills under way.
pub(super) const ASIDE_SUFFIX: &str = ".aside";

/// Whether a read may wait for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskWait {
    /// Only what is in the page cache is read.
    Never,
    /// The disk is waited for.
    Allowed,
}

/// An open layer. As long as it is open, no process removes it.
#[derive(Debug)]
pub struct LayerFile {
    dir: PathBuf,
    index: LayerIndex<MappedFile>,
    /// Carries the pin.
    data: File,
    state: Arc<State>,
    /// The digests of chunks, if the index has none.
    learned: Option<Learned>,
    wanted: extents::Wanted,
    /// Whether this process has evicted extents of it.
    is_cut: AtomicBool,
    /// The last field, because fields are dropped in order: `data` is closed before it hears.
    _listener: Option<Listener>,
}

/// Hears that a layer is closed.
#[derive(Debug)]
struct Listener(Arc<Room>);

impl Drop for Listener {
    fn drop(&mut self) {
        self.0.released();
    }
}

impl LayerFile {
    /// Opens the layer in `dir`, or returns `None` if there is none, or none any more.
    ///
    /// # Errors
    /// `InvalidData` if its index is damaged or of another layer: the layer is to be made anew;
    /// else those of the file system.
    pub fn open(dir: &Path, layer: DiffId) -> io::Result<Option<Self>> {
        match Self::open_pinned(dir, layer) {
            // The directory may go until the pin is held.
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            opened => opened,
        }
    }

    fn open_pinned(dir: &Path, layer: DiffId) -> io::Result<Option<Self>> {
        let data_path = dir.join(DATA);
        let data = OpenOptions::new().read(true).write(true).open(&data_path)?;
        if !lock::try_pin(&data)? {
            return Ok(None);
        }
        let file = File::open(dir.join(INDEX))?;
        let damaged = |err: IndexError| io::Error::new(io::ErrorKind::InvalidData, err);
        if file.metadata()?.len() == 0 {
            return Err(damaged(IndexError::Truncated {
                what: "layer index",
            }));
        }
        let index = LayerIndex::decode(MappedFile::new(&file)?).map_err(damaged)?;
        if index.diff_id() != layer {
            return Err(damaged(IndexError::Magic {
                what: "index of this layer",
            }));
        }
        // The checksum touched every page of the index; few of them are needed again soon.
        index.source().drop_resident();
        if data.metadata()?.len() != index.layer_bytes() {
            data.set_len(index.layer_bytes())?;
        }
        let state = State::open(&dir.join(STATE), index.layer_bytes(), state::boot())?;
        let learned = match index.chunk_digest(0) {
            Some(learned::UNKNOWN) => Some(Learned::open(&dir.join(DIGESTS), index.n_chunks())?),
            Some(_) | None => None,
        };
        // What of it was read last is not known where nobody noted it: all of it counts as used now.
        state.note_first_use(now_ms());
        // Else the directory was replaced before the pin was held, and the files are of two.
        Ok(lock::is_at(&data, &data_path)?.then(|| Self {
            dir: dir.to_owned(),
            index,
            data,
            state: Arc::new(state),
            learned,
            wanted: extents::Wanted::default(),
            is_cut: AtomicBool::new(false),
            _listener: None,
        }))
    }

    /// Has `room` hear when the layer is closed.
    pub(super) fn in_room(mut self, room: &Arc<Room>) -> Self {
        self._listener = Some(Listener(Arc::clone(room)));
        self
    }

    /// Notes that the layer is in use now.
    pub(super) fn touch(&self) {
        if let Err(err) = disk::touch(&self.data) {
            // Then it is evicted too early, if at all.
            debug!(layer.diff_id = %self.diff_id(), error = %err, "noting the use of a layer");
        }
    }

    /// Names the layer.
    pub fn diff_id(&self) -> DiffId {
        self.index.diff_id()
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What it contains.
    pub fn index(&self) -> &LayerIndex<MappedFile> {
        &self.index
    }

    /// The digest of a chunk; `None` if the layer has no such chunk, or it is to be learned yet.
    pub fn chunk_digest(&self, chunk: u32) -> Option<ChunkDigest> {
        match &self.learned {
            Some(learned) => learned.get(chunk),
            None => self.index.chunk_digest(chunk),
        }
    }

    /// Whether the digests of its chunks are learned when they come.
    pub(super) fn learns(&self) -> bool {
        self.learned.is_some()
    }

    /// Notes the digest of a chunk whose bytes were verified in another way, if it is to be learned.
    pub(super) fn learn(&self, chunk: u32, digest: &ChunkDigest) {
        if let Some(learned) = &self.learned {
            learned.learn(chunk, digest);
        }
    }

    /// The index with the digests that were learned; `None` if it has its own, or one is missing.
    pub(super) fn completed_index(&self) -> Option<CompletedIndex> {
        let learned = self.learned.as_ref()?;
        let digests = (0..self.n_chunks()).map(|it| learned.get(it));
        let digests: Option<Vec<_>> = digests.collect();
        let digests = digests?.iter().flat_map(|it| *it.as_bytes()).collect();
        Some(CompletedIndex::new(&self.index, digests))
    }

    /// Size of the decompressed layer.
    pub fn layer_bytes(&self) -> u64 {
        self.index.layer_bytes()
    }

    /// How many chunks it has.
    pub fn n_chunks(&self) -> u32 {
        self.state.n_chunks()
    }

    /// Whether all `chunks` are present and verified.
    pub fn has(&self, chunks: Range<u32>) -> bool {
        self.state.has_all(chunks)
    }

    /// Whether the whole layer is present.
    pub fn is_complete(&self) -> bool {
        self.state.n_present() == self.n_chunks()
    }

    /// Bytes of the chunks that are present.
    pub fn present_bytes(&self) -> u64 {
        if self.is_complete() {
            return self.layer_bytes();
        }
        (0..self.n_chunks())
            .filter(|it| self.state.has(*it))
            .map(|it| self.chunk_bytes(it))
            .sum()
    }

    /// Bytes of the chunks that are not.
    pub fn absent_bytes(&self) -> u64 {
        self.layer_bytes().saturating_sub(self.present_bytes())
    }

    /// Fills `buf` from `offset`; `Ok(false)` if that would have to wait for the disk and must not.
    ///
    /// Reads what the file has: that the chunks are present is the caller's check, before the read
    /// and, because a chunk may be dropped meanwhile, after it, with [`n_evictions`](Self::n_evictions)
    /// compared as well.
    ///
    /// # Errors
    /// Those of preadv2(2); `UnexpectedEof` beyond the layer's end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64, wait: DiskWait) -> io::Result<bool> {
        let read = read_at(&self.data, buf, offset, wait)?;
        if read {
            self.note_read(offset, buf.len());
        }
        Ok(read)
    }

    /// As `verify_chunk` does, if the chunk is present, and stays so meanwhile; else `None`.
    ///
    /// # Errors
    /// Those of the file system.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub fn verify_present(&self, chunk: u32, buf: &mut Vec<u8>) -> io::Result<Option<bool>> {
        // Who cannot keep it from being evicted takes it for evicted.
        let Ok(_not_evicted) = lock::write(&self.dir.join(STATE)) else {
            return Ok(None);
        };
        match self.state.has(chunk) {
            true => self.verify_chunk(chunk, buf).map(Some),
            false => Ok(None),
        }
    }

    /// Reads a chunk as it is on disk and says whether it matches its digest.
    ///
    /// # Errors
    /// Those of the file system.
    ///
    /// # Blocking
    /// Waits for the disk.
    pub(super) fn verify_chunk(&self, chunk: u32, buf: &mut Vec<u8>) -> io::Result<bool> {
        let range = chunk::byte_range(chunk, self.layer_bytes());
        buf.resize(usize_of(range.end - range.start), 0);
        self.data.read_exact_at(buf, range.start)?;
        Ok(Some(ChunkDigest::of(buf)) == self.chunk_digest(chunk))
    }

    /// Verifies `bytes` against the digest of `chunk`, writes them and marks the chunk present.
    ///
    /// Returns how many bytes became present: 0 if the chunk was there already, `None` if the bytes
    /// are not this chunk's.
    ///
    /// # Errors
    /// Those of the file system; then the chunk is not marked.
    pub(super) fn write_chunk(&self, chunk: u32, bytes: &[u8]) -> io::Result<Option<u64>> {
        if self.chunk_digest(chunk) != Some(ChunkDigest::of(bytes)) {
            return Ok(None);
        }
        if self.state.has(chunk) {
            return Ok(Some(0));
        }
        let _not_evicted = lock::write(&self.dir.join(STATE))?;
        let start = chunk::byte_range(chunk, self.layer_bytes()).start;
        hole::write_all_at(&self.data, bytes, start)?;
        self.state.note_use(&(chunk..chunk + 1), now_ms());
        Ok(Some(if self.state.set(chunk) {
            bytes.len() as u64
        } else {
            0
        }))
    }

    /// Whether chunks may be on disk that are not marked: after an unclean stop.
    pub(super) fn is_suspect(&self) -> bool {
        self.state.is_suspect()
    }

    /// After an unclean stop: marks `chunk` present if what the disk has matches its digest; says
    /// whether it is present.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn adopt_chunk(&self, chunk: u32) -> io::Result<bool> {
        if !self.state.is_suspect() || self.state.has(chunk) {
            return Ok(self.state.has(chunk));
        }
        let _not_evicted = lock::write(&self.dir.join(STATE))?;
        let is_right = self.verify_chunk(chunk, &mut Vec::new())?;
        if is_right {
            // Who fetches it may have been quicker.
            self.state.set(chunk);
        }
        Ok(is_right)
    }

    /// Forgets a chunk whose bytes on disk are wrong; it will be fetched anew.
    pub fn drop_chunk(&self, chunk: u32) {
        self.state.clear(chunk);
    }

    /// Gives what flushes the layer. It is no user of the layer, which may be removed meanwhile.
    pub(super) fn flush(&self) -> Flush {
        Flush {
            dir: self.dir.clone(),
            state: Arc::clone(&self.state),
            learns: self.learns(),
        }
    }

    /// Bytes of chunk `chunk`.
    pub fn chunk_bytes(&self, chunk: u32) -> u64 {
        let range = chunk::byte_range(chunk, self.layer_bytes());
        range.end - range.start
    }
}

/// Fills `buf` from `offset` of `data`; `Ok(false)` if that would have to wait and must not.
///
/// # Errors
/// Those of preadv2(2); `UnexpectedEof` beyond the end.
pub(super) fn read_at(
    data: &File,
    buf: &mut [u8],
    offset: u64,
    wait: DiskWait,
) -> io::Result<bool> {
    if wait == DiskWait::Allowed {
        data.read_exact_at(buf, offset)?;
        return Ok(true);
    }
    let len = buf.len();
    let mut slices = [io::IoSliceMut::new(buf)];
    match rustix::io::preadv2(data, &mut slices, offset, ReadWriteFlags::NOWAIT) {
        Ok(read) => Ok(read == len),
        // A file system without RWF_NOWAIT always waits.
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::OPNOTSUPP) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

/// Flushes a complete layer to stable storage, after which its bits survive a reboot.
#[derive(Debug)]
pub(super) struct Flush {
    dir: PathBuf,
    state: Arc<State>,
    learns: bool,
}

impl Flush {
    /// Does it, unless the layer was removed, or is not complete any more. One that was made anew meanwhile is flushed, but not
    /// marked so, because the marks are those of the layer that this was made of.
    ///
    /// # Errors
    /// Those of fsync(2).
    ///
    /// # Blocking
    /// Waits for the disk, for long if much was written.
    pub(super) fn run(self) -> io::Result<()> {
        let sync = |name| File::open(self.dir.join(name))?.sync_all();
        let state_path = self.dir.join(STATE);
        let Some(n_evictions) = self.state.begin_flush() else {
            // Who completes it has it flushed.
            return Ok(());
        };
        let mark = || {
            let _not_evicted = lock::write(&state_path)?;
            self.state.mark_flushed(&state_path, n_evictions)
        };
        let flushed = sync(DATA)
            .and_then(|()| sync(INDEX))
            .and_then(|()| match self.learns {
                true => sync(DIGESTS),
                false => Ok(()),
            })
            .and_then(|()| mark())
            .and_then(|()| sync("."))
            .and_then(|()| disk::sync_parent(&self.dir));
        match flushed {
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
            flushed => flushed,
        }
    }
}

/// Lengths of buffers come from checked extents and chunks, both far below the address space.
pub(super) fn usize_of(len: u64) -> usize {
    usize::try_from(len).expect("a length of at most one chunk fits")
}
