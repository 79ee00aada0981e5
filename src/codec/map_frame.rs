//! What both kinds of maps of a layer's blob have around their records: magic and version before them;
//! behind them how many there are, what the map is about, and a checksum over all of it.
//!
//! The format is in `docs/INDEX_FORMAT.md`.

use std::io;

use super::Compression;
use crate::{
    digest::{BlobDigest, DiffId},
    index::{
        IndexError,
        source::{self, IndexBytes},
        wire::{Reader, Write as _},
    },
};

/// Magic, version, reserved.
pub(super) const HEADER_BYTES: usize = 8 + 4 + 4;

/// Compression, number of records, blob, layer.
pub(super) const FOOTER_BYTES: usize = 4 + 4 + (32 + 8) + (32 + 8);

/// Bytes of the BLAKE3 at the end, over all that precedes it.
pub(super) const CHECKSUM_BYTES: usize = 32;

/// What a map is about: a blob, and the layer that it decompresses to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    /// How the blob is compressed.
    pub compression: Compression,
    /// Names the blob.
    pub blob: BlobDigest,
    /// Size of the blob.
    pub blob_bytes: u64,
    /// Names the layer.
    pub diff_id: DiffId,
    /// Size of the layer.
    pub layer_bytes: u64,
}

/// A kind of map.
#[derive(Debug, Clone, Copy)]
pub(super) struct Format {
    pub(super) magic: &'static [u8; 8],
    pub(super) version: u32,
    /// What errors call it.
    pub(super) what: &'static str,
}

/// What was found around the records.
pub(super) struct Frame {
    pub(super) subject: Subject,
    pub(super) n_records: u32,
    /// Where the records end.
    pub(super) footer_at: usize,
}

impl Format {
    /// The error of a length or an offset that cannot be.
    pub(super) const fn damaged(&self) -> IndexError {
        IndexError::Truncated { what: self.what }
    }

    /// Reads what is around the records, and checks version and checksum.
    pub(super) fn decode(&self, bytes: &impl IndexBytes) -> Result<Frame, IndexError> {
        let what = self.what;
        let body_bytes = bytes.len().checked_sub(CHECKSUM_BYTES);
        let body_bytes = body_bytes.ok_or(self.damaged())?;
        let (body, checksum) = bytes.split_at(body_bytes);
        let mut header = Reader::new(body, what);
        if header.array::<8>()? != *self.magic {
            return Err(IndexError::Magic { what });
        }
        let version = header.u32()?;
        if version != self.version {
            return Err(IndexError::Version {
                what,
                found: version,
                max: self.version,
            });
        }
        if source::hash(bytes, 0..body_bytes).as_bytes() != checksum {
            return Err(IndexError::Checksum { what });
        }
        let footer_at = body_bytes.checked_sub(FOOTER_BYTES);
        let footer_at = footer_at.ok_or(self.damaged())?;
        let mut footer = Reader::new(&body[footer_at..], what);
        let compression = match footer.u32()? {
            0 => Compression::None,
            1 => Compression::Gzip,
            2 => Compression::Zstd,
            _ => return Err(self.damaged()),
        };
        let n_records = footer.u32()?;
        let subject = Subject {
            compression,
            blob: BlobDigest::from_bytes(footer.array()?),
            blob_bytes: footer.u64()?,
            diff_id: DiffId::from_bytes(footer.array()?),
            layer_bytes: footer.u64()?,
        };
        Ok(Frame {
            subject,
            n_records,
            footer_at,
        })
    }
}

/// Writes a map, and hashes what it writes.
#[derive(Debug)]
pub(super) struct FrameWriter<W> {
    out: W,
    hasher: blake3::Hasher,
    position: u64,
}

impl<W: io::Write> FrameWriter<W> {
    /// Begins a map.
    pub(super) fn new(out: W, format: Format) -> io::Result<Self> {
        let mut writer = Self {
            out,
            hasher: blake3::Hasher::new(),
            position: 0,
        };
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.put(format.magic);
        header.put_u32(format.version);
        header.put_u32(0);
        writer.write(&header)?;
        Ok(writer)
    }

    /// How much was written.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.position += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// Closes the map, behind the last of its records, and returns what it was written to.
    pub(super) fn finish(mut self, subject: &Subject, n_records: u32) -> io::Result<W> {
        let mut footer = Vec::with_capacity(FOOTER_BYTES);
        footer.put_u32(match subject.compression {
            Compression::None => 0,
            Compression::Gzip => 1,
            Compression::Zstd => 2,
        });
        footer.put_u32(n_records);
        footer.put(subject.blob.as_bytes());
        footer.put_u64(subject.blob_bytes);
        footer.put(subject.diff_id.as_bytes());
        footer.put_u64(subject.layer_bytes);
        self.write(&footer)?;
        self.out.write_all(self.hasher.finalize().as_bytes())?;
        Ok(self.out)
    }
}

/// Puts the right checksum below a map that a test has changed.
#[cfg(test)]
pub(super) fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let at = bytes.len() - CHECKSUM_BYTES;
    let checksum = blake3::hash(&bytes[..at]);
    bytes[at..].copy_from_slice(checksum.as_bytes());
    bytes
}
