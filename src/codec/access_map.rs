//! The checkpoints of a layer's blob, in a file: which bytes of the blob a read needs.
//!
//! Written as a stream while the layer is decompressed, because all windows together are more than
//! the process may hold: windows first, each compressed by itself, then what finds them. Read in
//! place, by binary search. The format is in `docs/INDEX_FORMAT.md`.
//!
//! Nothing here can tell whether a checkpoint is true to the blob. A wrong one gives wrong bytes,
//! which the chunk digests of the layer index catch.

use std::io;

use super::{
    Compression, Subject,
    checkpoint::Checkpoint,
    map_frame::{CHECKSUM_BYTES, FOOTER_BYTES, Format, Frame, FrameWriter, HEADER_BYTES},
};
use crate::{
    digest::{BlobDigest, DiffId},
    index::{
        IndexError,
        source::IndexBytes,
        wire::{Reader, Write as _},
    },
    sys::inflate::WINDOW_BYTES,
};

/// Version of the format: raise it with every change of the bytes.
pub const ACCESS_MAP_VERSION: u32 = 1;

const FORMAT: Format = Format {
    magic: b"CLIPAMAP",
    version: ACCESS_MAP_VERSION,
    what: "access map",
};

/// A length or an offset that cannot be.
const DAMAGED: IndexError = FORMAT.damaged();

/// Bytes of one checkpoint's record.
const RECORD_BYTES: usize = 3 * 8 + 4 + 4;

/// zstd's default level: a window of 32 KiB takes about 0.1 ms.
const WINDOW_LEVEL: i32 = 3;

/// Writes an access map while the checkpoints are found.
#[derive(Debug)]
pub struct AccessMapWriter<W> {
    frame: FrameWriter<W>,
    records: Vec<u8>,
    /// Offsets in layer and blob of the last checkpoint.
    last: Option<(u64, u64)>,
}

impl<W: io::Write> AccessMapWriter<W> {
    /// Begins a map.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(out: W) -> io::Result<Self> {
        Ok(Self {
            frame: FrameWriter::new(out, FORMAT)?,
            records: Vec::new(),
            last: None,
        })
    }

    /// Writes the next checkpoint's window, and keeps the few bytes that find it.
    ///
    /// # Errors
    /// Those of `out`; `InvalidInput` for what no decoder notes: the first is the start of the blob,
    /// and each lies behind the one before it in blob and layer.
    pub fn push(&mut self, checkpoint: &Checkpoint) -> io::Result<()> {
        let follows = match self.last {
            None => *checkpoint == Checkpoint::START,
            Some((layer_offset, blob_offset)) => {
                layer_offset < checkpoint.layer_offset && blob_offset < checkpoint.blob_offset
            }
        };
        if !follows || 8 <= checkpoint.bit_offset || WINDOW_BYTES < checkpoint.window.len() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{checkpoint:?} after {:?}", self.last),
            ));
        }
        self.last = Some((checkpoint.layer_offset, checkpoint.blob_offset));
        let window = match checkpoint.window.len() {
            0 => Vec::new(),
            _ => zstd::bulk::compress(&checkpoint.window, WINDOW_LEVEL)?,
        };
        self.records.put_u64(checkpoint.layer_offset);
        self.records.put_u64(checkpoint.blob_offset);
        self.records.put_u64(self.frame.position());
        self.records
            .put_u32(u32::try_from(window.len()).map_err(io::Error::other)?);
        self.records.put_u32(checkpoint.bit_offset.into());
        self.frame.write(&window)
    }

    /// Closes the map, and returns what it was written to.
    ///
    /// # Errors
    /// Those of `out`; `InvalidInput` if there was no checkpoint, or one that `subject` does not
    /// reach.
    pub fn finish(mut self, subject: &Subject) -> io::Result<W> {
        let reaches = match self.last {
            None => false,
            Some((0, 0)) => true,
            Some((layer_offset, blob_offset)) => {
                layer_offset < subject.layer_bytes && blob_offset < subject.blob_bytes
            }
        };
        if !reaches {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("last checkpoint {:?} of {subject:?}", self.last),
            ));
        }
        let n_records = self.records.len() / RECORD_BYTES;
        self.frame.write(&self.records)?;
        let n_records = u32::try_from(n_records).map_err(io::Error::other)?;
        self.frame.finish(subject, n_records)
    }
}

/// What a map says of one checkpoint, its window apart.
#[derive(Debug, Clone, Copy)]
struct Record {
    layer_offset: u64,
    blob_offset: u64,
    window_position: u64,
    window_bytes: u32,
    bit_offset: u32,
}

/// An access map, checked as a whole; windows are decompressed as they are asked for.
#[derive(Debug, Clone)]
pub struct AccessMap<B> {
    bytes: B,
    subject: Subject,
    n_checkpoints: u32,
}

impl<B: IndexBytes> AccessMap<B> {
    /// Reads a map and checks its version, its checksum, and that every checkpoint is a possible one.
    ///
    /// # Errors
    /// [`IndexError`] says what is wrong.
    pub fn decode(bytes: B) -> Result<Self, IndexError> {
        let Frame {
            subject, n_records, ..
        } = FORMAT.decode(&bytes)?;
        let map = Self {
            bytes,
            subject,
            n_checkpoints: n_records,
        };
        map.check()?;
        Ok(map)
    }

    /// Checks what the accessors rely on.
    fn check(&self) -> Result<(), IndexError> {
        let Subject {
            compression,
            blob_bytes,
            layer_bytes,
            ..
        } = self.subject;
        if compression == Compression::None && (blob_bytes != layer_bytes || 1 < self.n_checkpoints)
        {
            return Err(DAMAGED);
        }
        let windows_end = self.records_at().ok_or(DAMAGED)? as u64;
        let mut last: Option<Record> = None;
        for index in 0..self.n_checkpoints {
            let record = self.record(index);
            let follows = match last {
                None => (record.layer_offset, record.blob_offset) == (0, 0),
                Some(last) => {
                    last.layer_offset < record.layer_offset
                        && record.layer_offset < layer_bytes
                        && last.blob_offset < record.blob_offset
                        && record.blob_offset < blob_bytes
                }
            };
            let window_end = record
                .window_position
                .checked_add(record.window_bytes.into());
            let is_inside = HEADER_BYTES as u64 <= record.window_position
                && window_end.is_some_and(|end| end <= windows_end);
            let is_fresh = record.window_bytes == 0 && record.bit_offset == 0;
            let may_enter = compression == Compression::Gzip && 0 < index;
            if !follows || !is_inside || 8 <= record.bit_offset || !(may_enter || is_fresh) {
                return Err(DAMAGED);
            }
            last = Some(record);
        }
        // The start is always there.
        last.map(|_| ()).ok_or(DAMAGED)
    }

    /// What the map is about.
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// How the blob is compressed.
    pub fn compression(&self) -> Compression {
        self.subject.compression
    }

    /// Names the blob.
    pub fn blob(&self) -> BlobDigest {
        self.subject.blob
    }

    /// Size of the blob.
    pub fn blob_bytes(&self) -> u64 {
        self.subject.blob_bytes
    }

    /// Names the layer.
    pub fn diff_id(&self) -> DiffId {
        self.subject.diff_id
    }

    /// Size of the layer.
    pub fn layer_bytes(&self) -> u64 {
        self.subject.layer_bytes
    }

    /// How many checkpoints there are: at least the start.
    pub fn n_checkpoints(&self) -> u32 {
        self.n_checkpoints
    }

    /// Where the map is kept.
    pub fn source(&self) -> &B {
        &self.bytes
    }

    /// The whole map, as it is stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The last checkpoint from which the byte at `layer_offset` can be reached.
    pub fn at_or_before(&self, layer_offset: u64) -> u32 {
        // The one sought is in `low..high`; the first lies at 0.
        let (mut low, mut high) = (0, self.n_checkpoints);
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            if self.layer_offset(middle) <= layer_offset {
                low = middle;
            } else {
                high = middle;
            }
        }
        low
    }

    /// Offset in the layer of checkpoint `index`.
    ///
    /// # Panics
    /// If there is no such checkpoint.
    pub fn layer_offset(&self, index: u32) -> u64 {
        self.record(index).layer_offset
    }

    /// Offset in the blob of checkpoint `index`.
    ///
    /// # Panics
    /// If there is no such checkpoint.
    pub fn blob_offset(&self, index: u32) -> u64 {
        self.record(index).blob_offset
    }

    /// Offset in the blob of the end of what is needed to decompress all before checkpoint
    /// `index + 1`.
    ///
    /// # Panics
    /// If there is no checkpoint `index`.
    pub fn blob_end(&self, index: u32) -> u64 {
        assert!(index < self.n_checkpoints, "checkpoint {index}");
        if index + 1 == self.n_checkpoints {
            return self.subject.blob_bytes;
        }
        let next = self.record(index + 1);
        next.blob_offset + u64::from(0 < next.bit_offset)
    }

    /// Checkpoint `index`, with its window.
    ///
    /// # Errors
    /// [`IndexError::Truncated`] if the window is none.
    ///
    /// # Panics
    /// If there is no such checkpoint.
    pub fn checkpoint(&self, index: u32) -> Result<Checkpoint, IndexError> {
        let record = self.record(index);
        let narrow = |value: u64| usize::try_from(value).map_err(|_| DAMAGED);
        let start = narrow(record.window_position)?;
        let end = start + narrow(record.window_bytes.into())?;
        let window = match &self.bytes[start..end] {
            [] => Vec::new(),
            compressed => zstd::bulk::decompress(compressed, WINDOW_BYTES).map_err(|_| DAMAGED)?,
        };
        Ok(Checkpoint {
            blob_offset: record.blob_offset,
            bit_offset: u8::try_from(record.bit_offset).map_err(|_| DAMAGED)?,
            layer_offset: record.layer_offset,
            window,
        })
    }

    /// Where to begin for the byte at `layer_offset`: right there in plain tar, else at the last
    /// checkpoint before it.
    ///
    /// # Errors
    /// As of [`Self::checkpoint`].
    pub fn checkpoint_for(&self, layer_offset: u64) -> Result<Checkpoint, IndexError> {
        match self.subject.compression {
            Compression::None => Ok(Checkpoint {
                blob_offset: layer_offset,
                layer_offset,
                ..Checkpoint::START
            }),
            Compression::Gzip | Compression::Zstd => {
                self.checkpoint(self.at_or_before(layer_offset))
            }
        }
    }

    /// Offset in the blob of the end of what is needed to decompress all before `layer_end`.
    pub fn blob_end_for(&self, layer_end: u64) -> u64 {
        match (self.subject.compression, layer_end.checked_sub(1)) {
            (_, None) => 0,
            (Compression::None, Some(_)) => layer_end.min(self.subject.blob_bytes),
            (Compression::Gzip | Compression::Zstd, Some(last)) => {
                self.blob_end(self.at_or_before(last))
            }
        }
    }

    /// Offset of the records in the map, if they fit.
    fn records_at(&self) -> Option<usize> {
        let records_bytes = usize::try_from(self.n_checkpoints)
            .ok()?
            .checked_mul(RECORD_BYTES)?;
        let at = (self.bytes.len() - CHECKSUM_BYTES - FOOTER_BYTES).checked_sub(records_bytes)?;
        (HEADER_BYTES <= at).then_some(at)
    }

    fn record(&self, index: u32) -> Record {
        assert!(index < self.n_checkpoints, "checkpoint {index}");
        let read = || {
            let at = self.records_at()? + usize::try_from(index).ok()? * RECORD_BYTES;
            let mut reader = Reader::new(self.bytes.get(at..at + RECORD_BYTES)?, FORMAT.what);
            Some(Record {
                layer_offset: reader.u64().ok()?,
                blob_offset: reader.u64().ok()?,
                window_position: reader.u64().ok()?,
                window_bytes: reader.u32().ok()?,
                bit_offset: reader.u32().ok()?,
            })
        };
        read().expect("the records were checked to be there")
    }
}

#[cfg(test)]
mod tests;
