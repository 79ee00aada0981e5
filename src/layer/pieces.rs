//! Fetches chunks of a layer that was laid out by its blob's table of contents: by the pieces that are in
//! them, each compared with its SHA-256 before a byte of its chunks goes anywhere.
//!
//! A chunk is gathered in memory. A piece that is larger than a chunk is not: it is written to a file without
//! a name, and read back once it is known to be right; or, where one of its chunks alone is wanted, only that
//! is kept.

use std::{
    io::{self, BufRead, Read},
    mem,
    ops::{ControlFlow, Range},
};

use sha2::{Digest, Sha256};

use super::{
    access::Span,
    disk::{LayerFile, usize_of},
    scratch::ScratchFile,
    span::{SpanError, TakeOrEnd},
};
use crate::{
    chunk::CHUNK_BYTES,
    codec::{
        Decoder,
        checkpoint::Checkpoint,
        piece_map::{Piece, PieceMap},
    },
    digest::{BlobDigest, ChunkDigest},
    index::scratch::{Scratch as _, WriteAt as _},
    sys::MappedFile,
};

/// Bytes of the blob that are fetched at once, at most, if more than one group of chunks is wanted.
const MAX_BLOB_BYTES: u64 = 16 << 20;

/// Bytes of a large piece that are handled at once.
const BUFFER_BYTES: usize = 64 << 10;

/// The part of the blob that `chunks` need; `None` if that is much, and they are to be fetched in parts.
pub(super) fn span(map: &PieceMap<MappedFile>, chunks: Range<u32>) -> Option<Span> {
    let pieces = map.pieces_in(&chunks);
    if pieces.is_empty() {
        return None;
    }
    let blob = map.blob(&pieces);
    let alone = map.whole(chunks.start..chunks.start + 1);
    let is_alone = chunks.end <= alone.end;
    (is_alone || blob.end - blob.start <= MAX_BLOB_BYTES).then_some(Span {
        chunks,
        blob,
        is_guess: false,
    })
}

/// How many bytes are decompressed for `span`.
pub(super) fn inflated_bytes(map: &PieceMap<MappedFile>, span: &Span) -> u64 {
    let pieces = map.pieces_in(&span.chunks);
    let Some(last) = pieces.clone().next_back() else {
        return 0;
    };
    let start = map.piece(pieces.start).layer_offset;
    map.piece(last).layer_end().saturating_sub(start)
}

/// Decompresses the pieces of `span` out of `input`, which starts where the span's part of the blob does,
/// and gives the span's chunks to `take`, once all pieces that are in them were verified.
///
/// # Errors
/// [`SpanError`]; an error of `input` itself comes as one of the decoder. What came before stays.
pub(super) fn decompress(
    file: &LayerFile,
    map: &PieceMap<MappedFile>,
    span: &Span,
    mut input: &mut dyn BufRead,
    spool: ScratchFile,
    take: &mut TakeOrEnd<'_>,
) -> Result<ControlFlow<()>, SpanError> {
    let mut pieces = map
        .pieces_in(&span.chunks)
        .map(|it| map.piece(it))
        .peekable();
    let mut filler = Filler {
        file,
        wanted: span.chunks.clone(),
        take,
        spool,
        chunk: None,
        gathered: Vec::new(),
    };
    let mut at = span.blob.start;
    while let Some(first) = pieces.peek() {
        let start = first.blob.start;
        let gap = start.checked_sub(at).ok_or_else(out_of_order)?;
        skip(&mut input, gap)?;
        let checkpoint = Checkpoint {
            blob_offset: start,
            ..Checkpoint::START
        };
        let mut decoder = Decoder::resume(&mut input, map.compression(), &checkpoint)
            .map_err(|err| SpanError::of_decoder(err.into()))?;
        let mut inflated = 0;
        // Small files may share a gzip member.
        while let Some(piece) = pieces.next_if(|it| it.blob.start == start) {
            let gap = piece.skipped.checked_sub(inflated);
            skip(&mut decoder, gap.ok_or_else(out_of_order)?)?;
            if filler.take_piece(&piece, &mut decoder)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            inflated = piece.skipped + piece.len;
        }
        at = decoder.compressed_offset();
    }
    filler.end_chunk()
}

fn out_of_order() -> SpanError {
    let reason = "its pieces lie over one another in the blob";
    SpanError::Corrupt(io::Error::new(io::ErrorKind::InvalidData, reason))
}

fn skip(input: &mut impl Read, len: u64) -> Result<(), SpanError> {
    let skipped = io::copy(&mut input.by_ref().take(len), &mut io::sink());
    match skipped.map_err(SpanError::of_decoder)? {
        skipped if skipped < len => Err(SpanError::Short),
        _ => Ok(()),
    }
}

/// Puts pieces together to chunks.
struct Filler<'a, 'take> {
    file: &'a LayerFile,
    wanted: Range<u32>,
    take: &'a mut TakeOrEnd<'take>,
    spool: ScratchFile,
    /// The chunk that is being gathered.
    chunk: Option<u32>,
    gathered: Vec<u8>,
}

impl Filler<'_, '_> {
    fn take_piece(
        &mut self,
        piece: &Piece,
        input: &mut impl Read,
    ) -> Result<ControlFlow<()>, SpanError> {
        if piece.is_large() {
            if self.end_chunk()?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            return self.take_large(piece, input);
        }
        let chunk = piece.chunks().start;
        if self.chunk != Some(chunk) {
            if self.end_chunk()?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            self.chunk = Some(chunk);
            // What lies between the pieces is zeros.
            self.gathered.clear();
            let chunk_bytes = usize_of(self.file.chunk_bytes(chunk));
            self.gathered.resize(chunk_bytes, 0);
        }
        let start = usize_of(piece.layer_offset % CHUNK_BYTES);
        let into = &mut self.gathered[start..start + usize_of(piece.len)];
        input.read_exact(into).map_err(SpanError::of_decoder)?;
        if BlobDigest::of(into) != piece.digest {
            return Err(SpanError::Wrong(chunk));
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Hands the chunk over that was gathered, if there is one.
    fn end_chunk(&mut self) -> Result<ControlFlow<()>, SpanError> {
        let Some(chunk) = self.chunk.take() else {
            return Ok(ControlFlow::Continue(()));
        };
        self.file.learn(chunk, &ChunkDigest::of(&self.gathered));
        match self.wanted.contains(&chunk) {
            true => (self.take)(chunk, &self.gathered),
            false => Ok(ControlFlow::Continue(())),
        }
    }

    /// Takes a piece that has its chunks for itself.
    fn take_large(
        &mut self,
        piece: &Piece,
        input: &mut impl Read,
    ) -> Result<ControlFlow<()>, SpanError> {
        let chunks = piece.chunks();
        let wanted = chunks.start.max(self.wanted.start)..chunks.end.min(self.wanted.end);
        let is_one = wanted.len() == 1;
        let (mut hasher, mut digests) = (Sha256::new(), Vec::new());
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut kept = mem::take(&mut self.gathered);
        kept.clear();
        for chunk in chunks.clone() {
            let mut chunk_hasher = blake3::Hasher::new();
            let mut left_bytes = self.file.chunk_bytes(chunk);
            let start = u64::from(chunk - chunks.start) * CHUNK_BYTES;
            // Of the last chunk, zeros follow.
            let mut of_piece = (piece.len - start).min(CHUNK_BYTES);
            let chunk_bytes = left_bytes;
            while 0 < left_bytes {
                let len = left_bytes.min(buffer.len() as u64);
                let part = &mut buffer[..usize_of(len)];
                let from_piece = usize_of(len.min(of_piece));
                let (data, zeros) = part.split_at_mut(from_piece);
                input.read_exact(data).map_err(SpanError::of_decoder)?;
                hasher.update(&*data);
                zeros.fill(0);
                chunk_hasher.update(part);
                match (is_one, wanted.contains(&chunk)) {
                    (true, true) => kept.extend_from_slice(part),
                    (false, true) => self
                        .spool
                        .write_at(part, start + chunk_bytes - left_bytes)
                        .map_err(SpanError::Disk)?,
                    (_, false) => {}
                }
                of_piece -= from_piece as u64;
                left_bytes -= len;
            }
            digests.push(ChunkDigest::from_bytes(chunk_hasher.finalize().into()));
        }
        if BlobDigest::from_bytes(hasher.finalize().into()) != piece.digest {
            return Err(SpanError::Wrong(wanted.start));
        }
        for (chunk, digest) in chunks.clone().zip(&digests) {
            self.file.learn(chunk, digest);
        }
        for chunk in wanted {
            if !is_one {
                kept.resize(usize_of(self.file.chunk_bytes(chunk)), 0);
                let start = u64::from(chunk - chunks.start) * CHUNK_BYTES;
                let read = self.spool.read_at(&mut kept, start);
                read.map_err(SpanError::Disk)?;
            }
            if (self.take)(chunk, &kept)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        self.gathered = kept;
        Ok(ControlFlow::Continue(()))
    }
}
