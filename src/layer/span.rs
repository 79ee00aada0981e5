//! Decompresses a part of a layer from a checkpoint on, for its chunks to be verified and marked present.

use std::{
    io::{self, BufRead, Read},
    ops::ControlFlow,
};

use super::{
    access::{Checkpoints, Span},
    disk::{LayerFile, usize_of},
    room::Room,
};
use crate::{
    chunk,
    codec::{CodecError, Decoder},
    tier::{PresentError, SourceError},
};

/// Why a span did not become present.
#[derive(Debug)]
pub(super) enum SpanError {
    /// The source failed.
    Source(SourceError),
    /// The work could not be begun, or ended early.
    Failed(PresentError),
    /// The bytes ended too early.
    Short,
    /// This chunk's bytes are not those of the index.
    Wrong(u32),
    /// The disk failed.
    Disk(io::Error),
    /// The bytes cannot be decompressed, or the map is damaged.
    Corrupt(io::Error),
}

impl SpanError {
    /// What an error of a decoder means, whose input is in memory.
    pub(super) fn of_decoder(err: io::Error) -> Self {
        match CodecError::of(&err) {
            Some(CodecError::Truncated { .. }) => Self::Short,
            _ if err.kind() == io::ErrorKind::UnexpectedEof => Self::Short,
            _ => Self::Corrupt(err),
        }
    }
}

/// Takes a chunk that was decompressed: verifies it and puts it somewhere.
pub(super) type TakeChunk = dyn Fn(u32, &[u8]) -> Result<(), SpanError> + Send + Sync;

/// The same, and says whether to go on.
pub(super) type TakeOrEnd<'a> = dyn FnMut(u32, &[u8]) -> Result<ControlFlow<()>, SpanError> + 'a;

/// Decompresses `span` of `file` out of `input`, which starts where the span's part of the blob does,
/// and gives its chunks to `take`, which verifies them and says whether to go on.
///
/// `buffer` is for a chunk. Who has many spans brings the same one: to get one from the kernel costs a tenth
/// of decompressing into it.
///
/// # Errors
/// [`SpanError`]; an error of `input` itself comes as one of the decoder. What came before stays.
pub(super) fn decompress(
    file: &LayerFile,
    access: &Checkpoints,
    span: &Span,
    input: &mut dyn BufRead,
    buffer: &mut Vec<u8>,
    take: &mut TakeOrEnd<'_>,
) -> Result<ControlFlow<()>, SpanError> {
    let checkpoint = access.checkpoint(span).map_err(SpanError::Corrupt)?;
    let start = chunk::byte_range(span.chunks.start, file.layer_bytes()).start;
    let mut decoder = Decoder::resume(input, access.compression(), &checkpoint)
        .map_err(|err| SpanError::of_decoder(err.into()))?;
    let skipped = start - checkpoint.layer_offset;
    let copied = io::copy(&mut decoder.by_ref().take(skipped), &mut io::sink());
    if copied.map_err(SpanError::of_decoder)? < skipped {
        return Err(SpanError::Short);
    }
    for chunk in span.chunks.clone() {
        buffer.resize(usize_of(file.chunk_bytes(chunk)), 0);
        decoder.read_exact(buffer).map_err(SpanError::of_decoder)?;
        if take(chunk, buffer)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

/// Verifies `bytes` and makes them present as `chunk`; returns how many became so.
///
/// # Errors
/// [`SpanError::Wrong`] and [`SpanError::Disk`].
pub(super) fn write(
    file: &LayerFile,
    room: &Room,
    chunk: u32,
    bytes: &[u8],
) -> Result<u64, SpanError> {
    room.with_room(|| file.write_chunk(chunk, bytes))
        .map_err(SpanError::Disk)?
        .ok_or(SpanError::Wrong(chunk))
}
