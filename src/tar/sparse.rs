//! Reads the maps of sparse files: GNU's old headers and PAX sparse 0.0, 0.1 and 1.0.
//!
//! A map lists the file's data segments in order; their bytes follow each other in the payload. A
//! map that is unsorted, overlaps, exceeds the file or does not use up the payload is refused, so
//! that extents can be trusted.
//!
//! # References
//! GNU tar manual, "Storing Sparse Files".

use std::mem;

use super::{
    Fault, TarEntry, TarExtent, TarKind,
    header::{self, BLOCK_LEN, Block},
    parser::State,
    pax,
};

/// Segments in a header, from byte 386, and in a continuation block, from byte 0.
const SEGMENTS_IN_HEADER: usize = 4;
const SEGMENTS_IN_CONTINUATION: usize = 21;

/// Bytes of one segment there: offset and length, twelve bytes each.
const SEGMENT_BYTES: usize = 24;

/// What the PAX records say about a sparse file.
#[derive(Debug, Clone, Default)]
pub(super) struct SparseRecords {
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) real_size: Option<u64>,
    pub(super) n_blocks: Option<u64>,
    pub(super) map: Option<SparseMap>,
}

/// Where a file's sparse map is.
#[derive(Debug)]
pub(super) enum SparseForm {
    /// The file is not sparse.
    None,
    /// In the records.
    Map { size: u64, map: SparseMap },
    /// In front of the data.
    InData { size: u64 },
}

impl SparseRecords {
    /// Returns whether no record is about sparse files.
    pub(super) fn is_empty(&self) -> bool {
        self.major.is_none()
            && self.minor.is_none()
            && self.name.is_none()
            && self.size.is_none()
            && self.real_size.is_none()
            && self.n_blocks.is_none()
            && self.map.is_none()
    }

    /// Tells the versions apart.
    pub(super) fn into_form(self, max_segments: usize) -> Result<SparseForm, Fault> {
        if self.is_empty() {
            return Ok(SparseForm::None);
        }
        let size = match (self.size, self.real_size) {
            (Some(size), Some(real)) if size != real => {
                return Err(Fault::Ambiguous("two sizes of a sparse file"));
            }
            (size, real) => size
                .or(real)
                .ok_or(Fault::Malformed("a sparse file without its size"))?,
        };
        match (self.major, self.minor, self.map) {
            (Some(1), Some(0), None) => Ok(SparseForm::InData { size }),
            (Some(0), Some(0 | 1), map) | (None, None, map) => {
                let n_blocks = self.n_blocks;
                let map = match (map, n_blocks) {
                    (Some(map), _) => map,
                    // Version 0.0 of a file without data has nothing to list.
                    (None, Some(0)) => SparseMap::new(max_segments),
                    (None, _) => return Err(Fault::Malformed("a sparse file without its map")),
                };
                if n_blocks != Some(map.n_pushed) {
                    return Err(Fault::Malformed(
                        "a sparse map of another length than it says",
                    ));
                }
                Ok(SparseForm::Map { size, map })
            }
            (Some(1), Some(0), Some(_)) => Err(Fault::Ambiguous("two maps of a sparse file")),
            _ => Err(Fault::Unsupported("an unknown version of PAX sparse files")),
        }
    }
}

/// The data segments of a sparse file, checked as they come.
#[derive(Debug, Clone)]
pub(super) struct SparseMap {
    max_segments: usize,
    /// Offset and length, with adjacent ones joined and empty ones left out.
    segments: Vec<(u64, u64)>,
    n_pushed: u64,
    /// Where the last segment ended.
    end: u64,
    data_len: u64,
}

impl SparseMap {
    pub(super) fn new(max_segments: usize) -> Self {
        Self {
            max_segments,
            segments: Vec::new(),
            n_pushed: 0,
            end: 0,
            data_len: 0,
        }
    }

    /// Adds the next segment.
    pub(super) fn push(&mut self, offset: u64, len: u64) -> Result<(), Fault> {
        if offset < self.end {
            return Err(Fault::Malformed(
                "a sparse map that is unsorted or overlaps",
            ));
        }
        let beyond = Fault::Malformed("a sparse map that exceeds its file");
        let end = offset.checked_add(len).ok_or(beyond)?;
        self.n_pushed += 1;
        self.end = end;
        // Cannot overflow: segments do not overlap, so this is at most `end`.
        self.data_len += len;
        let n_segments = self.segments.len();
        match self.segments.last_mut() {
            _ if len == 0 => {}
            Some((last, last_len)) if *last + *last_len == offset => *last_len += len,
            _ if n_segments == self.max_segments => {
                return Err(Fault::limit("segments of a sparse file", self.max_segments));
            }
            _ => self.segments.push((offset, len)),
        }
        Ok(())
    }

    /// Returns the extents, for data of `data_len` bytes at `layer_offset`.
    fn into_extents(
        self,
        size: u64,
        layer_offset: u64,
        data_len: u64,
    ) -> Result<Vec<TarExtent>, Fault> {
        if size < self.end {
            return Err(Fault::Malformed("a sparse map that exceeds its file"));
        }
        if data_len != self.data_len {
            return Err(Fault::Malformed("a sparse map that does not fit its data"));
        }
        let mut layer_offset = layer_offset;
        let mut extents = Vec::with_capacity(self.segments.len());
        for (file_offset, len) in self.segments {
            extents.push(TarExtent {
                file_offset,
                layer_offset,
                len,
            });
            // Cannot overflow: the data as a whole fit into the stream, see `Parser::read_data`.
            layer_offset += len;
        }
        Ok(extents)
    }
}

/// A sparse file whose map has not ended yet.
#[derive(Debug)]
pub(super) struct SparseEntry {
    pub(super) header_offset: u64,
    pub(super) map: SparseMap,
    /// The entry as it will be, but for the extents.
    pub(super) entry: TarEntry,
    pub(super) size: u64,
    /// What is left of the payload.
    pub(super) data_len: u64,
    /// The bytes that fill its last block.
    pub(super) padding: u64,
    /// For [`SparseEntry::read_pax_block`].
    pub(super) numbers: PaxMapNumbers,
}

/// The numbers of a PAX sparse 1.0 map so far: a count, then offsets and lengths, a line each.
#[derive(Debug, Default)]
pub(super) struct PaxMapNumbers {
    /// The start of a number; at most as many digits as an `i64` has.
    digits: Vec<u8>,
    n_segments: Option<u64>,
    offset: Option<u64>,
}

/// Digits of `i64::MAX`, with room for leading zeros.
const MAX_DIGITS: usize = 32;

impl SparseEntry {
    /// Reads the next block of a PAX sparse 1.0 map, and returns whether another one follows.
    pub(super) fn read_pax_block(&mut self, block: &Block) -> Result<bool, Fault> {
        let bad = Fault::Malformed("a bad sparse map in front of the data");
        self.data_len = self.data_len.checked_sub(BLOCK_LEN).ok_or(bad)?;
        for byte in block {
            if self.numbers.n_segments == Some(self.map.n_pushed) {
                // The rest of the block is padding.
                return Ok(false);
            }
            if *byte != b'\n' {
                if self.numbers.digits.len() == MAX_DIGITS {
                    return Err(bad);
                }
                self.numbers.digits.push(*byte);
                continue;
            }
            let number = pax::decimal(&mem::take(&mut self.numbers.digits)).ok_or(bad)?;
            match (self.numbers.n_segments, self.numbers.offset.take()) {
                (None, _) => self.numbers.n_segments = Some(number),
                (_, None) => self.numbers.offset = Some(number),
                (_, Some(offset)) => self.map.push(offset, number)?,
            }
        }
        Ok(self.numbers.n_segments != Some(self.map.n_pushed))
    }

    /// Returns the entry, now that its map is complete, and what follows it in the stream.
    pub(super) fn finish(mut self, layer_offset: u64) -> Result<(TarEntry, State), Fault> {
        let extents = self
            .map
            .into_extents(self.size, layer_offset, self.data_len)?;
        self.entry.kind = TarKind::File {
            size: self.size,
            extents,
        };
        let state = State::Skip {
            data: self.data_len,
            padding: self.padding,
        };
        Ok((self.entry, state))
    }
}

/// Reads the map in an old GNU header: the file's size and whether a continuation follows.
pub(super) fn read_old_header(block: &Block, map: &mut SparseMap) -> Result<(u64, bool), Fault> {
    let size = header::unsigned(&block[483..495])
        .ok_or(Fault::Malformed("a sparse file with a bad size"))?;
    let segments = &block[386..386 + SEGMENTS_IN_HEADER * SEGMENT_BYTES];
    Ok((size, read_segments(segments, block[482], map)?))
}

/// Reads a continuation block, and returns whether another one follows.
pub(super) fn read_continuation(block: &Block, map: &mut SparseMap) -> Result<bool, Fault> {
    let (segments, rest) = block.split_at(SEGMENTS_IN_CONTINUATION * SEGMENT_BYTES);
    read_segments(segments, rest[0], map)
}

fn read_segments(segments: &[u8], continued: u8, map: &mut SparseMap) -> Result<bool, Fault> {
    let bad = Fault::Malformed("a bad old GNU sparse map");
    for segment in segments.chunks(SEGMENT_BYTES) {
        let (offset, len) = segment.split_at(SEGMENT_BYTES / 2);
        // Go ends at a segment without offset, GNU tar at one without length.
        match (offset[0], len[0]) {
            (0, 0) if continued == 0 => return Ok(false),
            (0, _) | (_, 0) => {
                return Err(Fault::Ambiguous("an old GNU sparse map with a gap"));
            }
            _ => {
                let offset = header::unsigned(offset).ok_or(bad)?;
                map.push(offset, header::unsigned(len).ok_or(bad)?)?;
            }
        }
    }
    Ok(continued != 0)
}
