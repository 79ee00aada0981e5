//! Decompresses a layer in one pass, with bounded memory, on two threads.
//!
//! The first thread inflates; the second hashes the tar, cuts it into chunks, parses it and writes.
//! Inflating costs about as much as all the rest together, so that a layer takes little longer than
//! inflating it alone. A fixed set of buffers goes round between the two.

use std::{
    io::{self, BufRead, Read},
    sync::mpsc,
    thread,
};

use super::feed::FeedReader;
use crate::{codec::Decoder, digest::BlobDigest, tier::SourceError};

/// Bytes of a buffer that goes from one thread to the other.
///
/// Large enough that handing it over costs nothing, small enough that three of them, times the
/// number of layers at once, stay a small part of the process.
const BUFFER_BYTES: usize = 256 << 10;

/// Buffers that go round: one being filled, one being written, one in between.
const N_BUFFERS: usize = 3;

/// How the incoming bytes are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As a registry stores them: gzip, zstd or plain, told apart by the first bytes.
    Blob,
    /// The decompressed layer itself.
    Decompressed,
}

/// Takes the decompressed bytes in order.
pub(super) trait Sink: Send {
    /// What can go wrong with it.
    type Error: Send;

    /// Takes the next bytes.
    fn take(&mut self, bytes: &[u8]) -> Result<(), Self::Error>;
}

/// Says why a pipeline ended early.
#[derive(Debug)]
pub(super) enum PipelineError<E> {
    /// The source failed.
    Source(SourceError),
    /// The bytes cannot be decompressed.
    Corrupt(String),
    /// The sink refused them.
    Sink(E),
}

/// Drives all bytes of `reader` through decompression into `sink`; returns the size and digest of
/// the compressed bytes.
///
/// # Errors
/// The cause that came first.
///
/// # Blocking
/// For as long as the source delivers.
pub(super) fn run<S: Sink>(
    mut reader: FeedReader,
    encoding: Encoding,
    sink: &mut S,
) -> Result<(u64, BlobDigest), PipelineError<S::Error>> {
    let (filled, to_write) = mpsc::sync_channel::<Vec<u8>>(N_BUFFERS);
    let (written, to_fill) = mpsc::channel::<Vec<u8>>();
    for _ in 0..N_BUFFERS {
        // The receiver is alive: it is in this function.
        let _ = written.send(vec![0; BUFFER_BYTES]);
    }
    thread::scope(|scope| {
        let writer = scope.spawn(move || {
            for buffer in to_write {
                sink.take(&buffer)?;
                // The reader has gone if its source failed; then nobody needs the buffer.
                let _ = written.send(buffer);
            }
            Ok(())
        });
        let read = decompress(&mut reader, encoding, &to_fill, filled);
        let wrote = writer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (reader.failure(), wrote, read) {
            (Some(err), _, _) => Err(PipelineError::Source(err)),
            (None, Err(err), _) => Err(PipelineError::Sink(err)),
            (None, Ok(()), Err(err)) => Err(PipelineError::Corrupt(err.to_string())),
            (None, Ok(()), Ok(())) => reader
                .finish()
                .map_err(|err| PipelineError::Corrupt(err.to_string())),
        }
    })
}

/// Fills buffers until the end of the decompressed bytes, or until the writer has gone.
fn decompress(
    reader: &mut FeedReader,
    encoding: Encoding,
    to_fill: &mpsc::Receiver<Vec<u8>>,
    filled: mpsc::SyncSender<Vec<u8>>,
) -> io::Result<()> {
    // A plain tar without entries and without end blocks, as umoci writes it.
    if reader.fill_buf()?.is_empty() {
        return Ok(());
    }
    let mut decoder: Box<dyn Read + '_> = match encoding {
        Encoding::Blob => Box::new(Decoder::new(reader)?),
        Encoding::Decompressed => Box::new(reader),
    };
    while let Ok(mut buffer) = to_fill.recv() {
        buffer.resize(BUFFER_BYTES, 0);
        let mut len = 0;
        while len < BUFFER_BYTES {
            match decoder.read(&mut buffer[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(err),
            }
        }
        buffer.truncate(len);
        let is_last = len < BUFFER_BYTES;
        if (0 < len && filled.send(buffer).is_err()) || is_last {
            break;
        }
    }
    Ok(())
}
