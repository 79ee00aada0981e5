//! Where a layer's blob can be entered: its access map, or the map of its pieces (`pieces`), kept beside
//! the layer, and what part of the blob some chunks need.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Read},
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, PoisonError},
};

use tracing::warn;

use super::{
    disk::{ACCESS, CachePaths, LayerFile},
    origins::Origin,
    pieces,
    store::{Inner, Layer},
};
use crate::{
    chunk::{self, CHUNK_BYTES},
    codec::{
        Compression, Subject,
        access_map::{AccessMap, AccessMapWriter},
        checkpoint::Checkpoint,
        piece_map::PieceMap,
    },
    digest::{BlobDigest, DiffId},
    disk,
    index::IndexError,
    sys::MappedFile,
    tier::LayerDesc,
};

/// How many chunks lie between two checkpoints, at most one of which is read in vain.
pub(super) const STRIDE_CHUNKS: u32 = 2;

/// Bytes of a layer between two checkpoints.
pub(super) const STRIDE_BYTES: u64 = STRIDE_CHUNKS as u64 * CHUNK_BYTES;

/// Decompressed bytes that are thrown away, at most, before what is wanted comes.
///
/// With a checkpoint for every stride there are few; a zstd layer of one frame has no other
/// checkpoint than its start, and is better streamed.
const MAX_SKIPPED_BYTES: u64 = 2 * STRIDE_BYTES;

/// Bytes of the blob that are fetched at once, at most: a map that names more is not followed.
const MAX_BLOB_BYTES: u64 = 8 * STRIDE_BYTES;

/// Bytes of the blob from a checkpoint on that hold the end of a block which began before it.
///
/// A block of zlib has at most 64 KiB, stored; compressors that make longer ones cost a second
/// request.
const BLOCK_SLACK_BYTES: u64 = 96 << 10;

/// What is known of where a layer's blob can be entered.
#[derive(Debug, Clone, Default)]
pub(super) enum AccessState {
    /// Nobody has asked.
    #[default]
    Unknown,
    /// Nobody knows, or it led astray.
    Nowhere,
    /// A map of the remote content cache led astray: the blob's table of contents is asked instead.
    Astray,
    Known(Arc<Access>),
}

/// Where a layer's blob can be entered.
#[derive(Debug)]
pub(super) enum Access {
    /// Of a layer that is the blob, decompressed.
    Checkpoints(Checkpoints),
    /// Of one that was laid out by its blob's table of contents; or of any, as somebody says who can write to
    /// the remote content cache.
    Pieces(PieceMap<MappedFile>),
}

/// Where a compressed stream can be entered.
#[derive(Debug)]
pub(super) struct Checkpoints {
    map: AccessMap<MappedFile>,
    /// Whether all of the layer can be had in spans; known when it was asked once.
    covers_all: OnceLock<bool>,
}

/// Writes the access map of a blob that streams by, to a file that is not in its place yet; it is
/// removed when it does not come there.
#[derive(Debug)]
pub(super) struct MapMaker {
    writer: AccessMapWriter<BufWriter<File>>,
    place: Unfinished,
}

/// The path of a file, which is removed when this is dropped.
#[derive(Debug)]
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // It is not there any more if it came into its place; what fails is removed at start.
        let _ = fs::remove_file(&self.0);
    }
}

impl MapMaker {
    /// Starts a map in a directory whose content is one layer's.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        Self::create_beside(&dir.join(ACCESS))
    }

    /// Starts the map of `layer` among what is not complete yet, where its name says whose it is.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn create_apart(paths: &CachePaths, layer: DiffId) -> io::Result<Self> {
        let name = format!("{}.{ACCESS}", layer.hex());
        Self::create_beside(&paths.temporary().join(name))
    }

    fn create_beside(path: &Path) -> io::Result<Self> {
        let path = disk::temporary_beside(path);
        let place = Unfinished(path);
        let file = BufWriter::new(File::create_new(&place.0)?);
        let writer = AccessMapWriter::new(file)?;
        Ok(Self { writer, place })
    }

    /// Adds the next checkpoint.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn note(&mut self, checkpoint: &Checkpoint) -> io::Result<()> {
        self.writer.push(checkpoint)
    }

    /// Puts the map into its place in `dir`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn finish(
        self,
        dir: &Path,
        desc: &LayerDesc,
        compression: Compression,
        layer_bytes: u64,
    ) -> io::Result<()> {
        let subject = Subject {
            compression,
            blob: desc.blob,
            blob_bytes: desc.blob_bytes,
            diff_id: desc.diff_id,
            layer_bytes,
        };
        self.writer.finish(&subject)?.into_inner()?;
        fs::rename(&self.place.0, dir.join(ACCESS))
    }
}

/// A part of a layer, and the part of its blob that it is decompressed from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    /// What comes out.
    pub(super) chunks: Range<u32>,
    /// What goes in.
    pub(super) blob: Range<u64>,
    /// Whether more of the blob may be needed, if a compressor made long blocks.
    pub(super) is_guess: bool,
}

/// The strides of a layer of `layer_bytes`.
pub(super) fn strides(layer_bytes: u64) -> impl Iterator<Item = Range<u32>> {
    // A layer with an index has as many chunks as fit.
    let n_chunks = u32::try_from(chunk::n_chunks(layer_bytes)).unwrap_or(u32::MAX);
    let starts = (0..n_chunks).step_by(STRIDE_CHUNKS as usize);
    starts.map(move |it| it..it.saturating_add(STRIDE_CHUNKS).min(n_chunks))
}

impl Access {
    /// Opens the map beside `file`, if there is one, of whichever blob it is.
    ///
    /// # Errors
    /// `InvalidData` if it is damaged; else those of the file system, `NotFound` included.
    pub(super) fn open(file: &LayerFile) -> io::Result<Self> {
        let map_file = File::open(file.dir().join(ACCESS))?;
        let wrong = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
        if map_file.metadata()?.len() == 0 {
            return Err(wrong("it is empty"));
        }
        let mapped = MappedFile::new(&map_file)?;
        let damaged = |err: IndexError| wrong(&err.to_string());
        let access = match PieceMap::<MappedFile>::is_one(&mapped) {
            true => Self::Pieces(PieceMap::decode(mapped).map_err(damaged)?),
            false => Self::Checkpoints(Checkpoints {
                map: AccessMap::decode(mapped).map_err(damaged)?,
                covers_all: OnceLock::new(),
            }),
        };
        let subject = access.subject();
        if (subject.diff_id, subject.layer_bytes) != (file.diff_id(), file.layer_bytes()) {
            return Err(wrong("it is of another layer"));
        }
        // The checksum touched every page of the map; few of them are needed again soon.
        match &access {
            Self::Checkpoints(it) => it.map.source().drop_resident(),
            Self::Pieces(map) => map.source().drop_resident(),
        }
        Ok(access)
    }

    fn subject(&self) -> &Subject {
        match self {
            Self::Checkpoints(it) => it.map.subject(),
            Self::Pieces(map) => map.subject(),
        }
    }

    /// The blob that it is of, and its size.
    pub(super) fn blob(&self) -> (BlobDigest, u64) {
        (self.subject().blob, self.subject().blob_bytes)
    }

    /// Whether it is the map of the blob that `desc` names.
    pub(super) fn is_of(&self, desc: &LayerDesc) -> bool {
        self.blob() == (desc.blob, desc.blob_bytes)
    }

    /// Whether it knows the layer by pieces, not by checkpoints in its blob's stream.
    pub(super) fn is_by_pieces(&self) -> bool {
        matches!(self, Self::Pieces(_))
    }

    /// `chunks` with those that come with them in any case.
    pub(super) fn whole(&self, chunks: Range<u32>) -> Range<u32> {
        match self {
            Self::Checkpoints(_) => chunks,
            Self::Pieces(map) => map.whole(chunks),
        }
    }

    /// The part of the blob that `chunks` need, `None` if they are better waited for in a stream, or
    /// fetched in parts.
    pub(super) fn span(&self, chunks: Range<u32>) -> Option<Span> {
        match self {
            Self::Checkpoints(it) => it.span(chunks),
            Self::Pieces(map) => pieces::span(map, chunks),
        }
    }

    /// Whether all of the layer can be had in spans of a stride.
    pub(super) fn covers_all(&self) -> bool {
        match self {
            Self::Checkpoints(it) => it.covers_all(),
            Self::Pieces(_) => true,
        }
    }

    /// How many bytes are decompressed for `span`.
    pub(super) fn inflated_bytes(&self, span: &Span) -> u64 {
        match self {
            Self::Checkpoints(it) => it.inflated_bytes(span),
            Self::Pieces(map) => pieces::inflated_bytes(map, span),
        }
    }

    /// `span` with all of the blob that it can need.
    pub(super) fn without_guess(&self, span: Span) -> Span {
        match self {
            Self::Checkpoints(it) => it.without_guess(span),
            Self::Pieces(_) => span,
        }
    }
}

impl Checkpoints {
    /// How the blob is compressed.
    pub(super) fn compression(&self) -> Compression {
        self.map.compression()
    }

    /// Where decompression of `span` starts.
    ///
    /// # Errors
    /// If the map is damaged there.
    pub(super) fn checkpoint(&self, span: &Span) -> io::Result<Checkpoint> {
        let start = chunk::byte_range(span.chunks.start, self.map.layer_bytes()).start;
        self.map
            .checkpoint_for(start)
            .map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
    }

    /// The part of the blob that `chunks` need, `None` if they are better waited for in a stream.
    pub(super) fn span(&self, chunks: Range<u32>) -> Option<Span> {
        let (start, end) = self.layer_range(&chunks);
        if MAX_SKIPPED_BYTES < start - self.entry(start) {
            return None;
        }
        let first = match self.compression() {
            Compression::None => start,
            Compression::Gzip | Compression::Zstd => {
                self.map.blob_offset(self.map.at_or_before(start))
            }
        };
        let blob = first..self.map.blob_end_for(end);
        // Of the stride that `end` lies in, its first block is enough if that is where it lies.
        let guess = match self.compression() {
            Compression::None => blob.end,
            Compression::Gzip | Compression::Zstd => {
                let last = self.map.at_or_before(end);
                // What lies between may not have been compressed at all.
                let between = end - self.map.layer_offset(last);
                let is_near = between <= STRIDE_BYTES / 4;
                let slack = if is_near {
                    between + BLOCK_SLACK_BYTES
                } else {
                    u64::MAX
                };
                self.map
                    .blob_offset(last)
                    .saturating_add(slack)
                    .min(blob.end)
            }
        };
        let span = Span {
            chunks,
            is_guess: guess < blob.end,
            blob: blob.start..guess,
        };
        (span.blob.end - span.blob.start <= MAX_BLOB_BYTES).then_some(span)
    }

    /// Whether all of the layer can be had in spans of a stride.
    fn covers_all(&self) -> bool {
        let look = || strides(self.map.layer_bytes()).all(|it| self.span(it).is_some());
        *self.covers_all.get_or_init(look)
    }

    /// Where decompression starts for the byte at `layer_offset`.
    fn entry(&self, layer_offset: u64) -> u64 {
        match self.compression() {
            Compression::None => layer_offset,
            Compression::Gzip | Compression::Zstd => {
                self.map.layer_offset(self.map.at_or_before(layer_offset))
            }
        }
    }

    /// The bytes of the layer that `chunks` have.
    fn layer_range(&self, chunks: &Range<u32>) -> (u64, u64) {
        let layer_bytes = self.map.layer_bytes();
        let start = chunk::byte_range(chunks.start, layer_bytes).start;
        let end = chunk::byte_range(chunks.end.saturating_sub(1), layer_bytes).end;
        (start, end)
    }

    /// How many bytes are decompressed for `span`.
    fn inflated_bytes(&self, span: &Span) -> u64 {
        let (start, end) = self.layer_range(&span.chunks);
        end - self.entry(start)
    }

    /// `span` with all of the blob that it can need.
    fn without_guess(&self, span: Span) -> Span {
        let (_, end) = self.layer_range(&span.chunks);
        Span {
            blob: span.blob.start..self.map.blob_end_for(end),
            is_guess: false,
            ..span
        }
    }
}

impl Layer {
    /// Reads no part of the blob any more: what is known of it is wrong.
    pub(super) fn forget_access(&self) {
        self.set_access(AccessState::Nowhere);
    }

    /// Looks anew where the blob can be entered: a stream has found out.
    pub(super) fn renew_access(&self) {
        self.set_access(AccessState::Unknown);
    }

    /// Looks anew if nobody knew: of another blob it may be known.
    pub(super) fn reconsider_access(&self) {
        let mut state = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        if let AccessState::Nowhere = *state {
            *state = AccessState::Unknown;
        }
    }

    /// Whether there is no other way to the layer's chunks than `access`: its blob's stream is not the layer. Of
    /// one whose table is not known at the moment the stream has the last word: its chunks' digests are.
    pub(super) fn is_only_way(&self, access: &Access) -> bool {
        access.is_by_pieces() && (self.file.learns() || self.origins.first().desc.is_by_toc())
    }

    fn access_state(&self) -> AccessState {
        let state = self.access.lock();
        state.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_access(&self, state: AccessState) {
        *self.access.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Takes `access` off the disk, if it is still what is known; says whether it was.
    fn take_away(&self, access: &Arc<Access>) -> bool {
        let mut state = self.access.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            AccessState::Known(known) if Arc::ptr_eq(known, access) => {}
            _ => return false,
        }
        // Under the lock, because who looks for a map anew would find it.
        let _ = fs::remove_file(self.file.dir().join(ACCESS));
        *state = match self.is_only_way(access) {
            true => AccessState::Astray,
            false => AccessState::Nowhere,
        };
        true
    }
}

impl Inner {
    /// Where the blob of `layer` can be entered, if anybody knows of one that can be asked for.
    pub(super) async fn access(&self, layer: &Arc<Layer>) -> Option<Arc<Access>> {
        let known = || match layer.access_state() {
            AccessState::Known(access) => Some(layer.origins.have(&access).then_some(access)),
            AccessState::Nowhere => Some(None),
            AccessState::Unknown | AccessState::Astray => None,
        };
        if let Some(access) = known() {
            return access;
        }
        let _flight = self.access_flights.join(layer.file.diff_id()).await;
        if let Some(access) = known() {
            return access;
        }
        let access = self.find_access(layer).await.map(Arc::new);
        let is_by_toc = layer.origins.first().desc.is_by_toc();
        layer.set_access(match &access {
            Some(access) => AccessState::Known(Arc::clone(access)),
            // Without a way nobody could read it: each who wants to looks again.
            None if layer.file.learns() || is_by_toc => layer.access_state(),
            None => AccessState::Nowhere,
        });
        access
    }

    /// Finds out which of the blobs that are said to be the layer its access map is of, if they differ:
    /// too many wrong ones would else drive out the right one before anybody has asked for it.
    pub(super) async fn tell_blobs_apart(&self, layer: &Arc<Layer>) {
        if !layer.origins.differ() {
            return;
        }
        let file = Arc::clone(&layer.file);
        let opened = self.runtime.spawn_blocking(move || Access::open(&file));
        // Whoever reads by it hears what is wrong with it.
        if let Ok(Ok(access)) = opened.await {
            layer.origins.is_mapped(&access);
        }
    }

    /// Has a map that led astray neither used again, here or after a restart, nor given to other nodes. The next
    /// stream makes it anew, or the table of contents does.
    ///
    /// Where digests are learned the map is the node's own, of the table; and one of pieces may be all that there
    /// is to a layer whose table is not known at the moment: it is [refuted](Self::refute_pieces) by the stream.
    pub(super) async fn led_astray(&self, layer: &Arc<Layer>, access: &Arc<Access>) {
        if layer.file.learns() {
            return;
        }
        if access.is_by_pieces() && !layer.is_only_way(access) {
            layer.forget_access();
            return;
        }
        if layer.take_away(access) {
            let (blob, _) = access.blob();
            self.reject_access(layer, blob, "it leads astray").await;
        }
    }

    /// Does away with a map of pieces, once the blob's stream turned out to be the layer.
    pub(super) async fn refute_pieces(&self, layer: &Arc<Layer>) {
        let path = layer.file.dir().join(ACCESS);
        let is_by_pieces = || -> io::Result<bool> {
            let mut start = Vec::new();
            File::open(&path)?.take(64).read_to_end(&mut start)?;
            Ok(PieceMap::<MappedFile>::is_one(&start))
        };
        // Who cannot read it finds out when it is used.
        if is_by_pieces().unwrap_or(false) {
            let _ = fs::remove_file(&path);
            let blob = layer.origins.first().desc.blob;
            self.reject_access(layer, blob, "it is of pieces, and the layer is not")
                .await;
        }
    }

    async fn reject_access(&self, layer: &Layer, blob: BlobDigest, reason: &str) {
        let diff_id = layer.file.diff_id();
        warn!(layer.diff_id = %diff_id, reason, "access map of a layer is wrong");
        if let Some(remote) = &self.remote {
            let reject = (remote.cache).reject_access_map(&diff_id, &blob, reason.to_owned());
            reject.await;
        }
    }

    /// Opens the map on disk, or takes that of the remote content cache, or has the table of contents
    /// read again.
    ///
    /// The remote's is trusted by nobody: of a layer whose digests are learned, it would say what these
    /// are.
    async fn find_access(&self, layer: &Arc<Layer>) -> Option<Access> {
        let open = || {
            let file = Arc::clone(&layer.file);
            self.runtime.spawn_blocking(move || Access::open(&file))
        };
        match open().await {
            Ok(Ok(access)) => {
                layer.origins.is_mapped(&access);
                if layer.origins.have(&access) {
                    return Some(access);
                }
            }
            Ok(Err(err)) if err.kind() == io::ErrorKind::NotFound => {}
            Ok(Err(err)) => {
                warn!(layer.diff_id = %layer.file.diff_id(), error = %err, "access map of a layer is unusable");
                // The next stream makes it anew.
                let _ = fs::remove_file(layer.file.dir().join(ACCESS));
            }
            Err(_) => return None,
        }
        let is_astray = matches!(layer.access_state(), AccessState::Astray);
        if !layer.file.learns() && !is_astray {
            let mut asked = Vec::new();
            for Origin { desc, .. } in layer.origins.in_order() {
                if asked.contains(&desc.blob) {
                    continue;
                }
                if let Some(access) = self.remote_access(layer, &desc).await {
                    layer.origins.is_mapped(&access);
                    return Some(access);
                }
                asked.push(desc.blob);
            }
        }
        if self.renew_pieces(layer).await {
            return open().await.ok()?.ok();
        }
        None
    }

    /// Takes the map of the remote content cache.
    async fn remote_access(&self, layer: &Arc<Layer>, desc: &LayerDesc) -> Option<Access> {
        let cache = &self.remote.as_ref()?.cache;
        let new = disk::Unpublished::create(&layer.file.dir().join(ACCESS)).ok()?;
        let keep = |part: &[u8]| disk::write_to_map(new.file(), part);
        let layer_bytes = layer.file.layer_bytes();
        let fetched = cache.access_map(&desc.diff_id, &desc.blob, layer_bytes, keep);
        if !fetched.await.ok()? {
            return None;
        }
        new.publish().ok()?;
        let file = Arc::clone(&layer.file);
        let opened = self.runtime.spawn_blocking(move || Access::open(&file));
        let opened = opened.await.ok()?.map_err(|err| err.to_string());
        let of_blob = opened.and_then(|it| match it.is_of(desc) {
            true => Ok(it),
            false => Err("it is of another blob of this layer".to_owned()),
        });
        match of_blob {
            Ok(access) => Some(access),
            Err(reason) => {
                let reject = cache.reject_access_map(&desc.diff_id, &desc.blob, reason);
                reject.await;
                let _ = fs::remove_file(layer.file.dir().join(ACCESS));
                None
            }
        }
    }
}
