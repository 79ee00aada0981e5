//! Follows the stream from block to block: headers, extended headers, payload, end.

use std::mem;

use super::{
    Fault, TarEntry, TarError, TarLimits,
    header::{self, BLOCK_BYTES, Block, Header},
    pax::PaxRecords,
    sparse::{self, SparseEntry},
};

/// Reads one archive, front to back.
#[derive(Debug)]
pub struct Parser {
    pub(super) limits: TarLimits,
    pub(super) state: State,
    /// Bytes of the stream seen so far.
    pub(super) position: u64,
    /// The start of a block whose end has not come yet.
    block: Block,
    block_filled: usize,
    /// Headers that belong to the entry to come.
    pub(super) pending: Pending,
    /// What the global PAX headers so far said.
    pub(super) globals: PaxRecords,
    pub(super) n_entries: u64,
}

/// What the next bytes of the stream are.
#[derive(Debug)]
pub(super) enum State {
    /// A header, or the first of the zero blocks at the end.
    Header,
    /// Data, then padding, that nobody here reads.
    Skip { data: u64, padding: u64 },
    /// The payload of an extended header or a long name.
    Metadata(Metadata),
    /// A block that continues the sparse map of an old GNU header.
    OldSparseMap(Box<SparseEntry>),
    /// A block of the sparse map in front of the data (PAX sparse 1.0).
    PaxSparseMap(Box<SparseEntry>),
    /// The second zero block.
    SecondZeroBlock,
    /// Whatever follows the archive.
    End,
    /// Nothing: the archive was refused.
    Failed(TarError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MetadataKind {
    Pax,
    GlobalPax,
    LongName,
    LongLink,
}

#[derive(Debug)]
pub(super) struct Metadata {
    kind: MetadataKind,
    header_offset: u64,
    remaining: u64,
    padding: u64,
    payload: Vec<u8>,
}

/// What stands in front of an entry's own header.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) pax: Option<PaxRecords>,
    pub(super) long_name: Option<Vec<u8>>,
    pub(super) long_link: Option<Vec<u8>>,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.long_name.is_none() && self.long_link.is_none()
    }
}

impl Parser {
    /// Returns a parser at the start of an archive.
    pub fn new(limits: TarLimits) -> Self {
        Self {
            limits,
            state: State::Header,
            position: 0,
            block: [0; BLOCK_BYTES],
            block_filled: 0,
            pending: Pending::default(),
            globals: PaxRecords::default(),
            n_entries: 0,
        }
    }

    /// Reads the next bytes of the stream and reports the entries whose headers end in them.
    ///
    /// How the stream is cut changes nothing. An entry is reported before its data have passed, so
    /// nothing may be trusted before [`Parser::finish`] has agreed.
    ///
    /// # Errors
    /// [`TarError`] when the archive is refused; every later call returns the same error.
    pub fn push(&mut self, bytes: &[u8], sink: &mut dyn FnMut(TarEntry)) -> Result<(), TarError> {
        if let State::Failed(error) = &self.state {
            return Err(error.clone());
        }
        let outcome = self.advance(bytes, sink);
        if let Err(error) = &outcome {
            self.state = State::Failed(error.clone());
        }
        outcome
    }

    /// Checks that the stream ended where an archive may end.
    ///
    /// # Errors
    /// [`TarError::Truncated`] inside a header or payload; the error of a `push` that failed.
    pub fn finish(self) -> Result<(), TarError> {
        let what = match self.state {
            State::Failed(error) => return Err(error),
            State::End => return Ok(()),
            State::Metadata(_) => "an extended header",
            State::OldSparseMap(_) | State::PaxSparseMap(_) => "a sparse map",
            State::Skip { data, .. } if data > 0 => "a file's data",
            _ if self.block_filled > 0 => "a header",
            _ if !self.pending.is_empty() => "an entry of which only the extended header is there",
            State::Header | State::Skip { .. } | State::SecondZeroBlock => return Ok(()),
        };
        Err(TarError::Truncated {
            offset: self.position,
            what,
        })
    }

    fn advance(
        &mut self,
        mut bytes: &[u8],
        sink: &mut dyn FnMut(TarEntry),
    ) -> Result<(), TarError> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::End => {
                    self.consume(&mut bytes, u64::MAX);
                }
                State::Skip {
                    data: 0,
                    padding: 0,
                } => self.state = State::Header,
                State::Skip { data: 0, padding } => {
                    let wanted = *padding;
                    let taken = length(self.consume(&mut bytes, wanted));
                    self.state = State::Skip {
                        data: 0,
                        padding: wanted - taken,
                    };
                }
                State::Skip { data, padding } => {
                    let (wanted, padding) = (*data, *padding);
                    let taken = length(self.consume(&mut bytes, wanted));
                    self.state = State::Skip {
                        data: wanted - taken,
                        padding,
                    };
                }
                State::Metadata(metadata) => {
                    let wanted = metadata.remaining;
                    let taken = self.consume(&mut bytes, wanted);
                    self.collect(taken)?;
                }
                _ => {
                    if let Some(block) = self.next_block(&mut bytes) {
                        self.read_block(&block, sink)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Cuts up to `wanted` bytes off the front of `bytes`.
    fn consume<'a>(&mut self, bytes: &mut &'a [u8], wanted: u64) -> &'a [u8] {
        let len = usize::try_from(wanted)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let (taken, rest) = bytes.split_at(len);
        *bytes = rest;
        self.position += length(taken);
        taken
    }

    /// Returns the next block if `bytes` complete it, and keeps its start if they do not.
    fn next_block(&mut self, bytes: &mut &[u8]) -> Option<Block> {
        let missing = BLOCK_BYTES - self.block_filled;
        let taken = self.consume(bytes, u64::try_from(missing).unwrap_or(u64::MAX));
        let filled = self.block_filled + taken.len();
        self.block[self.block_filled..filled].copy_from_slice(taken);
        self.block_filled = filled % BLOCK_BYTES;
        (filled == BLOCK_BYTES).then_some(self.block)
    }

    fn read_block(
        &mut self,
        block: &Block,
        sink: &mut dyn FnMut(TarEntry),
    ) -> Result<(), TarError> {
        let block_offset = self.position - header::BLOCK_LEN;
        match mem::replace(&mut self.state, State::Header) {
            State::OldSparseMap(mut entry) => {
                let offset = entry.header_offset;
                let more = sparse::read_continuation(block, &mut entry.map)
                    .map_err(|fault| fault.at(offset))?;
                if more {
                    self.state = State::OldSparseMap(entry);
                    return Ok(());
                }
                self.report_sparse(*entry, sink)
                    .map_err(|fault| fault.at(offset))
            }
            State::PaxSparseMap(mut entry) => {
                let offset = entry.header_offset;
                let more = entry
                    .read_pax_block(block)
                    .map_err(|fault| fault.at(offset))?;
                if more {
                    self.state = State::PaxSparseMap(entry);
                    return Ok(());
                }
                self.report_sparse(*entry, sink)
                    .map_err(|fault| fault.at(offset))
            }
            State::SecondZeroBlock if header::is_zero(block) => {
                self.state = State::End;
                Ok(())
            }
            State::SecondZeroBlock => {
                Err(Fault::Ambiguous("it follows a lone zero block").at(block_offset))
            }
            _ if header::is_zero(block) && !self.pending.is_empty() => {
                Err(Fault::Malformed("the extended header before it has no entry").at(block_offset))
            }
            _ if header::is_zero(block) => {
                self.state = State::SecondZeroBlock;
                Ok(())
            }
            _ => self
                .read_header(block, block_offset, sink)
                .map_err(|fault| fault.at(block_offset)),
        }
    }

    fn read_header(
        &mut self,
        block: &Block,
        offset: u64,
        sink: &mut dyn FnMut(TarEntry),
    ) -> Result<(), Fault> {
        let header = Header::parse(block)?;
        let kind = match header.typeflag() {
            b'x' => MetadataKind::Pax,
            b'g' => MetadataKind::GlobalPax,
            b'L' => MetadataKind::LongName,
            b'K' => MetadataKind::LongLink,
            _ => return self.read_entry(&header, offset, sink),
        };
        match kind {
            MetadataKind::Pax if self.pending.pax.is_some() => {
                return Err(Fault::Ambiguous("a second extended header for one entry"));
            }
            MetadataKind::GlobalPax if !self.pending.is_empty() => {
                return Err(Fault::Ambiguous(
                    "a global header between an extended header and its entry",
                ));
            }
            _ => {}
        }
        let len = header.size()?;
        if self.limits.max_metadata_bytes < len {
            return Err(Fault::Limit {
                what: "bytes of an extended header",
                max: self.limits.max_metadata_bytes,
            });
        }
        if len == 0 {
            return self.read_metadata(kind, Vec::new());
        }
        self.state = State::Metadata(Metadata {
            kind,
            header_offset: offset,
            remaining: len,
            padding: header::padding(len),
            payload: Vec::new(),
        });
        Ok(())
    }

    /// Adds to the payload of an extended header, and reads it when it is complete.
    fn collect(&mut self, bytes: &[u8]) -> Result<(), TarError> {
        let State::Metadata(metadata) = &mut self.state else {
            return Ok(());
        };
        metadata.payload.extend_from_slice(bytes);
        metadata.remaining -= length(bytes);
        if metadata.remaining > 0 {
            return Ok(());
        }
        let offset = metadata.header_offset;
        let payload = mem::take(&mut metadata.payload);
        let kind = metadata.kind;
        self.state = State::Skip {
            data: 0,
            padding: metadata.padding,
        };
        self.read_metadata(kind, payload)
            .map_err(|fault| fault.at(offset))
    }

    fn read_metadata(&mut self, kind: MetadataKind, mut payload: Vec<u8>) -> Result<(), Fault> {
        match kind {
            MetadataKind::Pax => {
                let mut records = self.globals.clone();
                records.read(&payload, self.limits.max_sparse_segments)?;
                self.pending.pax = Some(records);
            }
            MetadataKind::GlobalPax => {
                self.globals
                    .read(&payload, self.limits.max_sparse_segments)?;
                self.globals.check_global()?;
            }
            MetadataKind::LongName | MetadataKind::LongLink => {
                let len = payload.iter().position(|byte| *byte == 0);
                payload.truncate(len.unwrap_or(payload.len()));
                payload.shrink_to_fit();
                match kind {
                    MetadataKind::LongName => self.pending.long_name = Some(payload),
                    _ => self.pending.long_link = Some(payload),
                }
            }
        }
        Ok(())
    }
}

/// Returns a slice's length in the unit of offsets.
fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).expect("a slice is not longer than 2^64 bytes")
}
