//! Where a layer's blob can be entered: its access map, kept beside the layer, and what part of
//! the blob some chunks need.

use std::{
    fs::{self, File},
    io::{self, BufWriter},
    ops::Range,
    path::{Path, PathBuf},
};

use super::disk::{ACCESS, LayerFile};
use crate::{
    chunk::{self, CHUNK_BYTES},
    codec::{AccessMap, AccessMapWriter, Checkpoint, Compression, MappedBlob},
    disk,
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

/// Where a layer's blob can be entered.
#[derive(Debug)]
pub(super) struct Access {
    map: AccessMap<MappedFile>,
}

/// Writes the access map of a blob that streams by, to a file that is not in its place yet.
#[derive(Debug)]
pub(super) struct MapMaker {
    path: PathBuf,
    writer: AccessMapWriter<BufWriter<File>>,
}

impl MapMaker {
    /// Starts a map in `dir`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        let path = disk::temporary_beside(&dir.join(ACCESS));
        let file = BufWriter::new(File::create_new(&path)?);
        Ok(Self {
            path,
            writer: AccessMapWriter::new(file)?,
        })
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
        let of = MappedBlob {
            compression,
            blob: desc.blob,
            blob_bytes: desc.blob_bytes,
            diff_id: desc.diff_id,
            layer_bytes,
        };
        self.writer.finish(&of)?.into_inner()?;
        fs::rename(&self.path, dir.join(ACCESS))
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

impl Access {
    /// Opens the map beside `file`, if there is one and it is of the blob that `desc` names.
    ///
    /// # Errors
    /// `InvalidData` if it is damaged; else those of the file system, `NotFound` included.
    pub(super) fn open(file: &LayerFile, desc: &LayerDesc) -> io::Result<Self> {
        let map_file = File::open(file.dir().join(ACCESS))?;
        let wrong = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
        if map_file.metadata()?.len() == 0 {
            return Err(wrong("it is empty"));
        }
        let map = AccessMap::decode(MappedFile::new(&map_file)?)
            .map_err(|err| wrong(&err.to_string()))?;
        if (map.diff_id(), map.layer_bytes()) != (file.diff_id(), file.layer_bytes()) {
            return Err(wrong("it is of another layer"));
        }
        let access = Self { map };
        if !access.is_of(desc) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "the map is of another blob of this layer",
            ));
        }
        access.map.source().drop_resident();
        Ok(access)
    }

    /// Keeps `map` beside `file`.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn keep(file: &LayerFile, map: &[u8]) -> io::Result<()> {
        disk::publish_unsynced(&file.dir().join(ACCESS), map)
    }

    /// Whether it is the map of the blob that `desc` names.
    pub(super) fn is_of(&self, desc: &LayerDesc) -> bool {
        (self.map.blob(), self.map.blob_bytes()) == (desc.blob, desc.blob_bytes)
    }

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
            .checkpoint_before(start)
            .map_err(|err| io::Error::new(io::ErrorKind::InvalidData, err))
    }

    /// The part of the blob that `chunks` need, `None` if they are better waited for in a stream.
    pub(super) fn span(&self, chunks: Range<u32>) -> Option<Span> {
        let layer_bytes = self.map.layer_bytes();
        let start = chunk::byte_range(chunks.start, layer_bytes).start;
        let end = chunk::byte_range(chunks.end.checked_sub(1)?, layer_bytes).end;
        if self.compression() == Compression::None {
            return Some(Span {
                chunks,
                blob: start..end,
                is_guess: false,
            });
        }
        let first = self.map.place_before(start);
        if MAX_SKIPPED_BYTES < start - first.layer_offset {
            return None;
        }
        let after = self.map.blob_end(end);
        let last = self.map.place_before(end);
        let guess = last.blob_offset + BLOCK_SLACK_BYTES;
        let is_guess = last.layer_offset + STRIDE_BYTES / 4 > end && guess < after;
        let blob = first.blob_offset..if is_guess { guess } else { after };
        (blob.end - blob.start <= MAX_BLOB_BYTES).then_some(Span {
            chunks,
            blob,
            is_guess,
        })
    }

    /// How many bytes are decompressed for `span`.
    pub(super) fn inflated_bytes(&self, span: &Span) -> u64 {
        let layer_bytes = self.map.layer_bytes();
        let start = chunk::byte_range(span.chunks.start, layer_bytes).start;
        let end = chunk::byte_range(span.chunks.end - 1, layer_bytes).end;
        end - self.map.place_before(start).layer_offset
    }

    /// `span` with all of the blob that it can need.
    pub(super) fn without_guess(&self, span: Span) -> Span {
        let end = chunk::byte_range(span.chunks.end - 1, self.map.layer_bytes()).end;
        Span {
            blob: span.blob.start..self.map.blob_end(end),
            is_guess: false,
            ..span
        }
    }
}
