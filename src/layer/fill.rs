//! The two ways a stream fills a layer: the first time, when nothing is known of it, and again,
//! when its index is known and chunks are missing.
//!
//! Both run on a blocking thread. The first fill writes to a staging directory and publishes it
//! when the whole stream has matched its digests; nobody reads it before. A refill writes in place,
//! chunk by chunk, each verified against the index, and readers are served behind it.

use std::{fs::File, io, ops::ControlFlow, os::unix::fs::FileExt, sync::Arc};

use sha2::{Digest, Sha256};
use tracing::warn;

use super::{
    CacheConfig,
    access::MapMaker,
    disk::{ACCESS, CachePaths, DATA, INDEX, LayerFile, STATE, Staging, usize_of},
    evict::Bound,
    feed::FeedReader,
    pipeline::{self, Encoding, PipelineError, Sink},
    room::{Claim, Room},
    scratch::{NewFile, ScratchFile},
    state::{self, Initial, State},
};
use crate::{
    chunk::CHUNK_BYTES,
    digest::{BlobDigest, ChunkDigest, DiffId},
    index::{IndexError, layer_index::LayerIndexBuilder},
    tar::{self, TarEntry},
    tier::{LayerDesc, PresentError},
};

/// Bytes written between two looks at the free space of the disk.
const SPACE_CHECK_BYTES: u64 = 16 << 20;

/// Why a sink refused bytes.
#[derive(Debug)]
enum SinkError {
    Disk(io::Error),
    NoSpace,
    NoRoom(Bound),
    Refused(String),
    Limit(&'static str, u64),
    /// Nobody has the layer open any more.
    Unwanted,
}

impl From<io::Error> for SinkError {
    fn from(err: io::Error) -> Self {
        match err.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            _ => Self::Disk(err),
        }
    }
}

impl From<Bound> for SinkError {
    fn from(bound: Bound) -> Self {
        Self::NoRoom(bound)
    }
}

impl From<IndexError> for SinkError {
    fn from(err: IndexError) -> Self {
        match err {
            IndexError::Scratch { kind, reason } => Self::from(io::Error::new(kind, reason)),
            err => Self::Refused(err.to_string()),
        }
    }
}

/// Tells readers what went wrong with a layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blame<'a> {
    pub(super) layer: DiffId,
    pub(super) paths: &'a CachePaths,
    /// The configured bound of the cache.
    pub(super) max_bytes: u64,
}

impl Blame<'_> {
    /// What an error of the local disk means.
    pub(super) fn disk(&self, err: io::Error) -> PresentError {
        self.sink(SinkError::from(err))
    }

    /// What it means that nothing more could be evicted.
    pub(super) fn no_room(&self, bound: Bound) -> PresentError {
        let path = self.paths.root().to_owned();
        match bound {
            Bound::Disk | Bound::Inodes => PresentError::NoSpace { path },
            Bound::Capacity => PresentError::CacheFull {
                layer: self.layer,
                path,
                max_bytes: self.max_bytes,
            },
        }
    }

    fn sink(&self, err: SinkError) -> PresentError {
        let layer = self.layer;
        match err {
            SinkError::NoSpace => self.no_room(Bound::Disk),
            SinkError::NoRoom(bound) => self.no_room(bound),
            SinkError::Disk(err) => {
                let path = self.paths.root().display();
                PresentError::Disk {
                    reason: format!("layer {layer} below {path}: {err}"),
                }
            }
            SinkError::Refused(reason) => PresentError::Refused { layer, reason },
            SinkError::Unwanted => PresentError::Unknown { layer },
            SinkError::Limit(limit, max) => PresentError::Limit {
                layer,
                limit: limit.into(),
                max,
            },
        }
    }

    fn pipeline(&self, err: PipelineError<SinkError>) -> PresentError {
        let layer = self.layer;
        match err {
            PipelineError::Source(source) => PresentError::Origin { layer, source },
            PipelineError::Corrupt(reason) => {
                let reason = format!("it cannot be decompressed: {reason}; push the image again");
                PresentError::Refused { layer, reason }
            }
            PipelineError::Sink(err) => self.sink(err),
        }
    }
}

/// Fills a layer of which nothing is known, and publishes it with its index.
///
/// Returns the size of the decompressed layer.
///
/// # Errors
/// [`PresentError`]; then nothing is left behind.
///
/// # Blocking
/// For as long as the source delivers.
pub(super) fn first_fill(
    paths: &CachePaths,
    config: &CacheConfig,
    room: &Arc<Room>,
    desc: &LayerDesc,
    reader: FeedReader,
    encoding: Encoding,
) -> Result<u64, PresentError> {
    let layer = desc.diff_id;
    let blame = Blame {
        layer,
        paths,
        max_bytes: room.max_bytes(),
    };
    let refused = |reason: String| PresentError::Refused { layer, reason };
    let staging = Staging::new(paths, layer).map_err(|err| blame.disk(err))?;
    let data = File::create_new(staging.dir().join(DATA)).map_err(|err| blame.disk(err))?;
    let entries = ScratchFile::new(staging.dir(), Arc::clone(room));
    let mut sink = FirstFill::new(data, entries, config, room);
    let map = match encoding {
        Encoding::Blob => Some(MapMaker::create(staging.dir()).map_err(|err| blame.disk(err))?),
        Encoding::Decompressed => None,
    };
    let passed =
        pipeline::run(reader, encoding, &mut sink, map).map_err(|err| blame.pipeline(err))?;
    if encoding == Encoding::Blob {
        check_blob(desc, passed.blob_bytes, passed.blob)?;
    }
    sink.claim_room().map_err(|err| blame.sink(err))?;
    let index = staging.create(INDEX).map_err(|err| blame.disk(err))?;
    let built = sink.finish(&index).map_err(|err| blame.sink(err))?;
    if built.diff_id != layer {
        return Err(refused(format!(
            "its content has DiffID {}, but the image's config names another; \
             push the image again",
            built.diff_id
        )));
    }
    let state = State::initial(built.layer_bytes, Initial::Present, state::boot());
    if let Some((map, compression)) = passed.map {
        let finished = map.finish(staging.dir(), desc, compression, built.layer_bytes);
        finished.map_err(|err| blame.disk(err))?;
    }
    let published = staging
        .write(STATE, &state)
        .and_then(|()| staging.publish(paths, layer));
    published.map_err(|err| blame.disk(err))?;
    Ok(built.layer_bytes)
}

/// Checks that what passed was the blob; what was not hashed was not.
pub(super) fn check_blob(
    desc: &LayerDesc,
    blob_bytes: u64,
    blob: Option<BlobDigest>,
) -> Result<(), PresentError> {
    check_blob_bytes(desc, blob_bytes)?;
    if blob == Some(desc.blob) {
        return Ok(());
    }
    let delivered = blob.map_or_else(|| "no digest".to_owned(), |it| format!("digest {it}"));
    Err(not_the_blob(desc, &delivered))
}

/// Checks that as much passed as the blob has: enough where each chunk that came out was checked.
pub(super) fn check_blob_bytes(desc: &LayerDesc, blob_bytes: u64) -> Result<(), PresentError> {
    if blob_bytes == desc.blob_bytes {
        return Ok(());
    }
    Err(not_the_blob(desc, &format!("{blob_bytes} bytes")))
}

fn not_the_blob(desc: &LayerDesc, delivered: &str) -> PresentError {
    let reason = format!(
        "the registry delivered {delivered} for blob {} of {} bytes; push the image again",
        desc.blob, desc.blob_bytes
    );
    PresentError::Refused {
        layer: desc.diff_id,
        reason,
    }
}

/// Hashes, parses and writes a layer that is seen for the first time.
#[derive(Debug)]
struct FirstFill<'a> {
    data: File,
    config: &'a CacheConfig,
    room: &'a Room,
    hasher: Sha256,
    chunk_hasher: blake3::Hasher,
    parser: tar::Parser,
    index: LayerIndexBuilder<ScratchFile>,
    n_entries: u64,
    layer_bytes: u64,
    /// How many of them the cache's account has.
    claimed_bytes: u64,
    claim_at: u64,
}

/// What a first fill found out.
#[derive(Debug)]
struct Built {
    diff_id: DiffId,
    layer_bytes: u64,
}

impl<'a> FirstFill<'a> {
    fn new(data: File, entries: ScratchFile, config: &'a CacheConfig, room: &'a Room) -> Self {
        Self {
            data,
            config,
            room,
            hasher: Sha256::new(),
            chunk_hasher: blake3::Hasher::new(),
            parser: tar::Parser::new(tar::TarLimits::default()),
            index: LayerIndexBuilder::new(entries),
            n_entries: 0,
            layer_bytes: 0,
            claimed_bytes: 0,
            claim_at: 0,
        }
    }

    /// Ends the chunk under way.
    fn end_chunk(&mut self) {
        let digest = ChunkDigest::from_bytes(self.chunk_hasher.finalize().into());
        self.index.push_chunk(&digest);
        self.chunk_hasher.reset();
    }

    /// Ends the layer, and writes its index to `index`.
    fn finish(mut self, index: &File) -> Result<Built, SinkError> {
        self.parser
            .finish()
            .map_err(|err| SinkError::Refused(err.to_string()))?;
        if !self.layer_bytes.is_multiple_of(CHUNK_BYTES) {
            let digest = ChunkDigest::from_bytes(self.chunk_hasher.finalize().into());
            self.index.push_chunk(&digest);
        }
        let diff_id = DiffId::from_bytes(self.hasher.finalize().into());
        let mut index = NewFile::new(index, self.room);
        self.index
            .finish_in(&mut index, diff_id, self.layer_bytes)?;
        Ok(Built {
            diff_id,
            layer_bytes: self.layer_bytes,
        })
    }

    fn check_limits(&mut self) -> Result<(), SinkError> {
        let config = self.config;
        if config.max_layer_bytes < self.layer_bytes {
            return Err(SinkError::Limit(
                "cache.max_layer_bytes",
                config.max_layer_bytes,
            ));
        }
        if config.max_layer_entries < self.n_entries {
            return Err(SinkError::Limit(
                "cache.max_layer_entries",
                config.max_layer_entries,
            ));
        }
        if config.max_layer_index_bytes < self.index.index_bytes() {
            let max = config.max_layer_index_bytes;
            return Err(SinkError::Limit("cache.max_layer_index_bytes", max));
        }
        if self.claim_at <= self.layer_bytes {
            self.claim_at = self.layer_bytes + SPACE_CHECK_BYTES;
            self.claim_room()?;
        }
        Ok(())
    }

    /// Makes room for what was written since the last time.
    fn claim_room(&mut self) -> Result<(), SinkError> {
        let written_bytes = self.layer_bytes - self.claimed_bytes;
        self.claimed_bytes = self.layer_bytes;
        Ok(self.room.claim(written_bytes)?)
    }
}

impl Sink for FirstFill<'_> {
    type Error = SinkError;

    fn take(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        self.check_limits()?;
        self.hasher.update(bytes);
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = usize_of(CHUNK_BYTES - self.layer_bytes % CHUNK_BYTES).min(rest.len());
            let (head, tail) = rest.split_at(room);
            self.chunk_hasher.update(head);
            self.layer_bytes += head.len() as u64;
            if self.layer_bytes.is_multiple_of(CHUNK_BYTES) {
                self.end_chunk();
            }
            rest = tail;
        }
        let (index, n_entries) = (&mut self.index, &mut self.n_entries);
        let mut pushed = Ok(());
        let mut push = |entry: TarEntry| {
            *n_entries += 1;
            if pushed.is_ok() {
                pushed = index.push_entry(&entry);
            }
        };
        self.parser
            .push(bytes, &mut push)
            .map_err(|err| SinkError::Refused(err.to_string()))?;
        pushed?;
        let at = self.layer_bytes - bytes.len() as u64;
        self.room.with_room(|| self.data.write_all_at(bytes, at))?;
        Ok(())
    }
}

/// Fills the missing chunks of `layer` from its blob, and makes its access map if it has none.
///
/// `passed` hears of each chunk that passed, and of how many bytes became present by it; it says
/// whether to go on.
///
/// # Errors
/// [`PresentError`]; the chunks that were verified before stay.
///
/// # Blocking
/// For as long as the source delivers.
pub(super) fn refill(
    paths: &CachePaths,
    room: &Room,
    layer: &LayerFile,
    desc: &LayerDesc,
    reader: FeedReader,
    passed: &mut (dyn FnMut(u32, u64) -> ControlFlow<()> + Send),
) -> Result<(), PresentError> {
    let blame = Blame {
        layer: layer.diff_id(),
        paths,
        max_bytes: room.max_bytes(),
    };
    let mut sink = Refill {
        layer,
        room,
        chunk: 0,
        gathered: 0,
        is_there: layer.has(0..1),
        buffer: Vec::new(),
        passed,
    };
    let has_map = layer.dir().join(ACCESS).exists();
    let map = (!has_map).then(|| MapMaker::create_apart(paths, layer.diff_id()));
    let map = map.transpose().map_err(|err| blame.disk(err))?;
    let passed =
        pipeline::run(reader, Encoding::Blob, &mut sink, map).map_err(|err| blame.pipeline(err))?;
    check_blob(desc, passed.blob_bytes, passed.blob)?;
    if 0 < sink.gathered || sink.chunk < layer.n_chunks() {
        let reason = "its blob is shorter than its index says; push the image again".to_owned();
        return Err(PresentError::Refused {
            layer: layer.diff_id(),
            reason,
        });
    }
    if let Some((map, compression)) = passed.map
        && let Err(err) = map.finish(layer.dir(), desc, compression, layer.layer_bytes())
    {
        warn!(layer.diff_id = %layer.diff_id(), error = %err, "keeping the access map of a layer");
    }
    Ok(())
}

/// Verifies and writes the chunks of a layer whose index is known.
///
/// A chunk is gathered in memory, because a reader may already read the file: bytes that turn out
/// wrong must not reach it.
struct Refill<'a> {
    layer: &'a LayerFile,
    room: &'a Room,
    chunk: u32,
    /// Bytes of the chunk that have come.
    gathered: usize,
    /// Whether the chunk was present when its first byte came: then it is only counted.
    is_there: bool,
    buffer: Vec<u8>,
    passed: &'a mut (dyn FnMut(u32, u64) -> ControlFlow<()> + Send),
}

impl Sink for Refill<'_> {
    type Error = SinkError;

    fn take(&mut self, bytes: &[u8]) -> Result<(), SinkError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            if self.layer.n_chunks() <= self.chunk {
                let reason = "its blob is longer than its index says; push the image again";
                return Err(SinkError::Refused(reason.to_owned()));
            }
            let chunk_bytes = usize_of(self.layer.chunk_bytes(self.chunk));
            let room = (chunk_bytes - self.gathered).min(rest.len());
            let (head, tail) = rest.split_at(room);
            if !self.is_there {
                self.buffer.reserve_exact(chunk_bytes - self.gathered);
                self.buffer.extend_from_slice(head);
            }
            self.gathered += room;
            rest = tail;
            if self.gathered == chunk_bytes {
                self.end_chunk()?;
            }
        }
        Ok(())
    }
}

impl Refill<'_> {
    fn end_chunk(&mut self) -> Result<(), SinkError> {
        let chunk = self.chunk;
        let mut new_bytes = 0;
        if !self.is_there {
            if chunk.is_multiple_of(16) {
                self.room.make(Claim::Read)?;
            }
            let write = || self.layer.write_chunk(chunk, &self.buffer);
            let Some(written) = self.room.with_room(write)? else {
                let reason = format!("chunk {chunk} does not match its digest in the index");
                return Err(SinkError::Refused(reason));
            };
            new_bytes = written;
        }
        self.buffer.clear();
        self.gathered = 0;
        self.chunk += 1;
        self.is_there = self.layer.has(self.chunk..self.chunk + 1);
        match (self.passed)(chunk, new_bytes) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(SinkError::Unwanted),
        }
    }
}
