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

use tracing::warn;

use super::{
    access::{MapMaker, STRIDE_BYTES},
    feed::FeedReader,
};
use crate::{
    codec::{Compression, Decoder},
    digest::BlobDigest,
    tier::SourceError,
};

/// Bytes of a buffer that goes from one thread to the other.
///
/// Large enough that handing it over costs nothing, small enough that three of them, times the
/// number of layers at once, stay a small part of the process.
const BUFFER_BYTES: usize = 128 << 10;

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

/// What passed through a pipeline.
#[derive(Debug)]
pub(super) struct Passed {
    /// Size of what came in.
    pub(super) blob_bytes: u64,
    /// Digest of what came in, if it was hashed.
    pub(super) blob: Option<BlobDigest>,
    /// Where the blob can be entered, if that was to be noted and could be.
    pub(super) map: Option<(MapMaker, Compression)>,
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

/// Drives all bytes of `reader` through decompression into `sink`, and notes in `map` where the
/// blob can be entered.
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
    map: Option<MapMaker>,
) -> Result<Passed, PipelineError<S::Error>> {
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
        let read = decompress(&mut reader, encoding, map, &to_fill, filled);
        let wrote = writer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (reader.failure(), wrote, read) {
            (Some(err), _, _) => Err(PipelineError::Source(err)),
            (None, Err(err), _) => Err(PipelineError::Sink(err)),
            (None, Ok(()), Err(err)) => Err(PipelineError::Corrupt(err.to_string())),
            (None, Ok(()), Ok(map)) => match reader.finish() {
                Ok((blob_bytes, blob)) => Ok(Passed {
                    blob_bytes,
                    blob,
                    map,
                }),
                Err(err) => Err(PipelineError::Corrupt(err.to_string())),
            },
        }
    })
}

/// Fills buffers until the end of the decompressed bytes, or until the writer has gone.
fn decompress(
    reader: &mut FeedReader,
    encoding: Encoding,
    map: Option<MapMaker>,
    to_fill: &mpsc::Receiver<Vec<u8>>,
    filled: mpsc::SyncSender<Vec<u8>>,
) -> io::Result<Option<(MapMaker, Compression)>> {
    // A plain tar without entries and without end blocks, as umoci writes it.
    if reader.fill_buf()?.is_empty() {
        return Ok(None);
    }
    match (encoding, map) {
        (Encoding::Decompressed, _) => pump(reader, to_fill, &filled).map(|()| None),
        (Encoding::Blob, None) => pump(&mut Decoder::new(reader)?, to_fill, &filled).map(|()| None),
        (Encoding::Blob, Some(map)) => {
            let mut noting = Noting {
                decoder: Decoder::with_checkpoints(reader, STRIDE_BYTES)?,
                map: Some(map),
            };
            pump(&mut noting, to_fill, &filled)?;
            let compression = noting.decoder.compression();
            Ok(noting.map.map(|it| (it, compression)))
        }
    }
}

/// A decoder whose checkpoints are written down.
struct Noting<R> {
    decoder: Decoder<R>,
    map: Option<MapMaker>,
}

impl<R: BufRead> Read for Noting<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.decoder.read(buf)?;
        for checkpoint in self.decoder.take_checkpoints() {
            let noted = self.map.as_mut().map(|it| it.note(&checkpoint));
            if let Some(Err(err)) = noted {
                // A layer without a map is read as a stream.
                warn!(error = %err, "writing the access map of a layer");
                self.map = None;
            }
        }
        Ok(len)
    }
}

fn pump(
    from: &mut dyn Read,
    to_fill: &mpsc::Receiver<Vec<u8>>,
    filled: &mpsc::SyncSender<Vec<u8>>,
) -> io::Result<()> {
    while let Ok(mut buffer) = to_fill.recv() {
        buffer.resize(BUFFER_BYTES, 0);
        let mut len = 0;
        while len < BUFFER_BYTES {
            match from.read(&mut buffer[len..]) {
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
