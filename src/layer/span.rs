//! Decompresses a part of a layer from a checkpoint on, verifies its chunks and marks them present.

use std::{
    io::{self, BufRead, Read},
    ops::ControlFlow,
};

use super::{
    access::{Access, Span},
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
    fn of_decoder(err: io::Error) -> Self {
        match CodecError::of(&err) {
            Some(CodecError::Truncated { .. }) => Self::Short,
            _ if err.kind() == io::ErrorKind::UnexpectedEof => Self::Short,
            _ => Self::Corrupt(err),
        }
    }
}

/// Decompresses `span` out of `input`, which starts where the span's part of the blob does.
///
/// `passed` hears of each chunk and of how many bytes became present by it; it says whether to go
/// on.
///
/// # Errors
/// [`SpanError`]; an error of `input` itself comes as one of the decoder. What came before stays.
pub(super) fn decompress(
    (file, room): (&LayerFile, &Room),
    access: &Access,
    span: &Span,
    input: &mut dyn BufRead,
    passed: &mut dyn FnMut(u32, u64) -> ControlFlow<()>,
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
    let mut buffer = Vec::new();
    for chunk in span.chunks.clone() {
        buffer.resize(usize_of(file.chunk_bytes(chunk)), 0);
        decoder
            .read_exact(&mut buffer)
            .map_err(SpanError::of_decoder)?;
        let write = || file.write_chunk(chunk, &buffer);
        let Some(new_bytes) = room.with_room(write).map_err(SpanError::Disk)? else {
            return Err(SpanError::Wrong(chunk));
        };
        if passed(chunk, new_bytes).is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}
