//! The pieces of a layer that was laid out by its blob's table of contents: where each is in the blob and
//! in the layer, and its SHA-256.
//!
//! Such a layer is no tar: it has the content of its files and nothing else, in pieces as the table has
//! them. No piece but one that is larger than a chunk lies in two chunks, and such a one has its chunks for
//! itself: so a chunk can be fetched and verified with no other pieces than its own. Between pieces are zeros.
//!
//! Written while the table is read, and read in place, by binary search. The format is in
//! `docs/INDEX_FORMAT.md`.

use std::{io, ops::Range};

use super::{
    Compression, Subject,
    map_frame::{CHECKSUM_BYTES, FOOTER_BYTES, Format, Frame, FrameWriter, HEADER_BYTES},
};
use crate::{
    chunk::{self, CHUNK_BYTES},
    digest::BlobDigest,
    index::{IndexError, source::IndexBytes, wire::Write as _},
};

/// Version of the format: raise it with every change of the bytes.
pub const PIECE_MAP_VERSION: u32 = 1;

const FORMAT: Format = Format {
    magic: b"CLIPPIEC",
    version: PIECE_MAP_VERSION,
    what: "piece map",
};

/// A length or an offset that cannot be.
const DAMAGED: IndexError = FORMAT.damaged();

/// Bytes of one piece's record.
const RECORD_BYTES: usize = 2 * 8 + 4 * 4 + 32;

/// Bytes of a piece at most, and of what is decompressed before one: eStargz has 4 MiB by default,
/// zstd:chunked 64 KiB on average. Who reads a byte of a piece waits for all of it.
pub const MAX_PIECE_BYTES: u64 = 16 << 20;

/// What pieces begin at multiples of, as the content of files in a tar does, and the layer ends at one.
pub const BLOCK_BYTES: u64 = 512;

/// Bytes of the blob that the pieces of a chunk may be strewn over.
pub const MAX_GROUP_BLOB_BYTES: u64 = 4 << 20;

/// Pieces that are looked at before the pages of a mapped map are given back: 256 KiB of them.
const RESIDENT_PIECES: u32 = 4096;

/// A piece of a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where it is in the layer.
    pub layer_offset: u64,
    /// How long it is, never 0.
    pub len: u64,
    /// The part of the blob that it is decompressed from: a gzip member or a zstd frame begins there. More
    /// than is needed, if not much.
    pub blob: Range<u64>,
    /// What is decompressed before it.
    pub skipped: u64,
    /// Its SHA-256.
    pub digest: BlobDigest,
}

impl Piece {
    /// Where it ends in the layer.
    pub fn layer_end(&self) -> u64 {
        self.layer_offset.saturating_add(self.len)
    }

    /// Whether it may be the last of a layer of so many bytes, which ends with a block.
    fn ends_layer(&self, layer_bytes: u64) -> bool {
        let rest_bytes = layer_bytes.checked_sub(self.layer_end());
        rest_bytes.is_some_and(|it| it < BLOCK_BYTES)
    }

    /// Whether it has its chunks for itself.
    pub fn is_large(&self) -> bool {
        CHUNK_BYTES < self.len
    }

    /// The chunks that it lies in.
    pub fn chunks(&self) -> Range<u32> {
        // A map is checked to fit its layer, which has no more chunks.
        chunk::covering(self.layer_offset, self.len).unwrap_or(0..0)
    }

    /// Whether it may follow `last`, or be the first.
    fn follows(&self, last: Option<&Self>) -> bool {
        let in_chunk = self.layer_offset % CHUNK_BYTES;
        let fits = match self.is_large() {
            true => in_chunk == 0 && self.len <= MAX_PIECE_BYTES,
            false => self.len <= CHUNK_BYTES - in_chunk,
        };
        let is_behind = last.is_none_or(|last| {
            let end = match last.is_large() {
                true => last.layer_end().next_multiple_of(CHUNK_BYTES),
                false => last.layer_end(),
            };
            end <= self.layer_offset && last.blob.start <= self.blob.start
        });
        let Range { start, end } = self.blob;
        let is_near = start < end && end - start <= max_blob_bytes(self.skipped, self.len);
        0 < self.len && fits && is_behind && is_near && self.skipped <= MAX_PIECE_BYTES
    }
}

/// Bytes of the blob that `len` bytes and what precedes them can need: compressors make nothing much larger
/// than it was.
pub fn max_blob_bytes(skipped: u64, len: u64) -> u64 {
    const SLACK_BYTES: u64 = 64 << 10;
    2 * (skipped.saturating_add(len)).min(u64::MAX / 4) + SLACK_BYTES
}

/// Writes a piece map while the pieces are found.
#[derive(Debug)]
pub struct PieceMapWriter<W> {
    frame: FrameWriter<W>,
    n_pieces: u32,
    last: Option<Piece>,
}

impl<W: io::Write> PieceMapWriter<W> {
    /// Begins a map.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(out: W) -> io::Result<Self> {
        Ok(Self {
            frame: FrameWriter::new(out, FORMAT)?,
            n_pieces: 0,
            last: None,
        })
    }

    /// Bytes that the map has so far.
    pub fn map_bytes(&self) -> u64 {
        self.frame.position() + (FOOTER_BYTES + CHECKSUM_BYTES) as u64
    }

    /// Writes the next piece.
    ///
    /// # Errors
    /// Those of `out`; `InvalidInput` for one that cannot come next.
    pub fn push(&mut self, piece: &Piece) -> io::Result<()> {
        if !piece.follows(self.last.as_ref()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{piece:?} after {:?}", self.last),
            ));
        }
        self.last = Some(piece.clone());
        self.n_pieces = self.n_pieces.checked_add(1).ok_or_else(too_many)?;
        let short = |it: u64| u32::try_from(it).map_err(io::Error::other);
        let mut record = Vec::with_capacity(RECORD_BYTES);
        record.put_u64(piece.layer_offset);
        record.put_u64(piece.blob.start);
        record.put_u32(short(piece.blob.end - piece.blob.start)?);
        record.put_u32(short(piece.len)?);
        record.put_u32(short(piece.skipped)?);
        record.put_u32(0);
        record.put(piece.digest.as_bytes());
        self.frame.write(&record)
    }

    /// Closes the map, and returns what it was written to.
    ///
    /// # Errors
    /// Those of `out`; `InvalidInput` if there was no piece, or one that `subject` does not reach.
    pub fn finish(self, subject: &Subject) -> io::Result<W> {
        let reaches = self.last.as_ref().is_some_and(|it| {
            it.ends_layer(subject.layer_bytes) && it.blob.end <= subject.blob_bytes
        });
        if !reaches {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("last piece {:?} of {subject:?}", self.last),
            ));
        }
        self.frame.finish(subject, self.n_pieces)
    }
}

fn too_many() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "more than 2^32 pieces")
}

/// A piece map, checked as a whole.
#[derive(Debug, Clone)]
pub struct PieceMap<B> {
    bytes: B,
    subject: Subject,
    n_pieces: u32,
}

impl<B: IndexBytes> PieceMap<B> {
    /// Whether `bytes` begin as a piece map does.
    pub fn is_one(bytes: &[u8]) -> bool {
        bytes.starts_with(FORMAT.magic)
    }

    /// Reads a map and checks its version, its checksum, and that every piece is a possible one.
    ///
    /// # Errors
    /// [`IndexError`] says what is wrong.
    pub fn decode(bytes: B) -> Result<Self, IndexError> {
        let Frame {
            subject,
            n_records,
            footer_at,
        } = FORMAT.decode(&bytes)?;
        let map = Self {
            bytes,
            subject,
            n_pieces: n_records,
        };
        map.check(footer_at)?;
        Ok(map)
    }

    /// Checks what the accessors rely on.
    fn check(&self, footer_at: usize) -> Result<(), IndexError> {
        let expected = u64::from(self.n_pieces) * RECORD_BYTES as u64 + HEADER_BYTES as u64;
        let has_chunks = u32::try_from(chunk::n_chunks(self.subject.layer_bytes)).is_ok();
        if expected != footer_at as u64 || !has_chunks {
            return Err(DAMAGED);
        }
        let mut last: Option<Piece> = None;
        for at in 0..self.n_pieces {
            let piece = self.piece(at);
            let ends = piece.layer_offset.checked_add(piece.len);
            let is_inside = ends.is_some_and(|it| it <= self.subject.layer_bytes)
                && piece.blob.end <= self.subject.blob_bytes;
            if !is_inside || !piece.follows(last.as_ref()) {
                return Err(DAMAGED);
            }
            last = Some(piece);
            if at.is_multiple_of(RESIDENT_PIECES) {
                self.bytes.drop_resident();
            }
        }
        let reaches = last.is_some_and(|it| it.ends_layer(self.subject.layer_bytes));
        reaches.then_some(()).ok_or(DAMAGED)
    }

    /// What the map is about.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// How the blob is compressed.
    pub fn compression(&self) -> Compression {
        self.subject.compression
    }

    /// How many pieces there are: at least one.
    pub fn n_pieces(&self) -> u32 {
        self.n_pieces
    }

    /// Where the map is kept.
    pub fn source(&self) -> &B {
        &self.bytes
    }

    /// Piece `at`, in the order of the layer and of the blob.
    ///
    /// # Panics
    /// If there is no such piece.
    pub fn piece(&self, at: u32) -> Piece {
        assert!(at < self.n_pieces, "piece {at} of {}", self.n_pieces);
        let start = HEADER_BYTES + at as usize * RECORD_BYTES;
        let record = &self.bytes[start..start + RECORD_BYTES];
        let long = |at: usize| {
            let bytes = record[at..].first_chunk();
            u64::from_le_bytes(*bytes.expect("it is within the record"))
        };
        let short = |at: usize| {
            let bytes = record[at..].first_chunk();
            u64::from(u32::from_le_bytes(*bytes.expect("it is within the record")))
        };
        let blob_start = long(8);
        let digest = record[32..].first_chunk();
        Piece {
            layer_offset: long(0),
            len: short(20),
            blob: blob_start..blob_start.saturating_add(short(16)),
            skipped: short(24),
            digest: BlobDigest::from_bytes(*digest.expect("it is within the record")),
        }
    }

    /// The pieces that have bytes in `chunks`.
    pub fn pieces_in(&self, chunks: &Range<u32>) -> Range<u32> {
        let start = u64::from(chunks.start) * CHUNK_BYTES;
        let end = u64::from(chunks.end) * CHUNK_BYTES;
        let first = self.first(|it| start < it.layer_end());
        first..self.first(|it| end <= it.layer_offset).max(first)
    }

    /// `chunks` with all others that the pieces in them lie in.
    pub fn whole(&self, chunks: Range<u32>) -> Range<u32> {
        let pieces = self.pieces_in(&chunks);
        if pieces.is_empty() {
            return chunks;
        }
        let first = self.piece(pieces.start).chunks().start;
        let end = self.piece(pieces.end - 1).chunks().end;
        first.min(chunks.start)..end.max(chunks.end)
    }

    /// The part of the blob that `pieces` are decompressed from, which are some.
    pub fn blob(&self, pieces: &Range<u32>) -> Range<u64> {
        let end = pieces.clone().map(|it| self.piece(it).blob.end).max();
        let start = self.piece(pieces.start).blob.start;
        start..end.unwrap_or(start)
    }

    /// The first piece for which `holds`, which holds for all behind it as well.
    fn first(&self, holds: impl Fn(&Piece) -> bool) -> u32 {
        let (mut low, mut high) = (0, self.n_pieces);
        while low < high {
            let middle = low + (high - low) / 2;
            if holds(&self.piece(middle)) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        low
    }
}

#[cfg(test)]
mod tests;
