//! Picks the places of a blob at which decompression can begin anew, while it is decompressed.

use std::{fmt, mem};

use super::trim::trim;
use crate::sys::inflate::WINDOW_BYTES;

/// Uncompressed bytes between two windows at least.
///
/// Behind so much output nothing refers to a window any more, so that one at a time is being trimmed.
/// And copying a window costs no more than copying the output.
const MIN_GAP_BYTES: u64 = WINDOW_BYTES as u64;

/// Compressed bytes that are kept to trim a window.
///
/// Data that grows by compression, as stored blocks do, stays within a quarter; what needs more still
/// keeps its window whole.
const MAX_TAIL_BYTES: usize = WINDOW_BYTES + WINDOW_BYTES / 4;

/// A place in a blob at which decompression can begin, and what it needs there.
#[derive(Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where in the blob.
    pub blob_offset: u64,
    /// How many low bits of the byte there belong to what precedes: 0 to 7.
    pub bit_offset: u8,
    /// Offset in the layer of the first byte that comes out.
    pub layer_offset: u64,
    /// The end of the output before it, up to [`WINDOW_BYTES`]; what nothing refers to may be zero.
    ///
    /// Empty, with a `bit_offset` of 0, where nothing can: where a gzip member or a zstd frame
    /// begins, and anywhere in plain tar.
    pub window: Vec<u8>,
}

impl Checkpoint {
    /// The start of the blob.
    pub const START: Self = Self {
        blob_offset: 0,
        bit_offset: 0,
        layer_offset: 0,
        window: Vec::new(),
    };

    /// Whether what begins there refers to nothing before it.
    pub(super) fn is_fresh(&self) -> bool {
        self.bit_offset == 0 && self.window.is_empty()
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("blob_offset", &self.blob_offset)
            .field("bit_offset", &self.bit_offset)
            .field("layer_offset", &self.layer_offset)
            .field("window_bytes", &self.window.len())
            .finish()
    }
}

/// Where a decompressor stands, if it could begin there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Boundary {
    /// Before a gzip member or a zstd frame.
    Fresh,
    /// Before a deflate block, whose first bits are the high ones of the last byte consumed.
    Block {
        /// How many.
        unused_bits: u8,
    },
}

/// What may become a checkpoint.
#[derive(Debug)]
struct Candidate {
    /// With its whole window.
    checkpoint: Checkpoint,
    /// The start of the compressed data that follows.
    tail: Vec<u8>,
}

impl Candidate {
    /// Takes note of compressed data that follows.
    fn follow(&mut self, compressed: &[u8]) {
        if !self.checkpoint.window.is_empty() {
            let room = MAX_TAIL_BYTES - self.tail.len();
            self.tail
                .extend_from_slice(&compressed[..compressed.len().min(room)]);
        }
    }

    /// Whether the tail is as long as it is needed, or may be.
    fn is_complete(&self, layer_offset: u64) -> bool {
        self.checkpoint.window.is_empty()
            || self.tail.len() == MAX_TAIL_BYTES
            || MIN_GAP_BYTES <= layer_offset - self.checkpoint.layer_offset
    }

    fn into_checkpoint(self) -> Checkpoint {
        let Self {
            mut checkpoint,
            tail,
        } = self;
        if let Some(trimmed) = trim(&checkpoint.window, checkpoint.bit_offset, &tail) {
            checkpoint.window = trimmed;
        }
        checkpoint
    }
}

/// Picks for every multiple of the stride a boundary before it.
///
/// The last one, if that needs no window. Else the last but those that would not halve the distance
/// to the multiple, because a window is copied for each candidate: five times or so for a stride of
/// 2 MB, when blocks are usual.
#[derive(Debug)]
pub(super) struct Picker {
    stride_bytes: u64,
    /// The multiple to come, or that has passed while its candidate is not complete.
    next_multiple: u64,
    /// The best boundary before it so far.
    candidate: Option<Candidate>,
    /// The layer offset of the last candidate, picked or not.
    last_offset: u64,
    /// The last byte of the blob that has passed.
    last_byte: u8,
    picked: Vec<Checkpoint>,
}

impl Picker {
    /// # Panics
    /// If `stride_bytes` is 0.
    pub(super) fn new(stride_bytes: u64) -> Self {
        assert_ne!(stride_bytes, 0, "a stride of nothing");
        Self {
            stride_bytes,
            next_multiple: stride_bytes,
            candidate: None,
            last_offset: 0,
            last_byte: 0,
            picked: vec![Checkpoint::START],
        }
    }

    /// Takes note that decompression stands at these offsets, behind `compressed`, and of what kind of
    /// place that is; `copy_window` is called if its window is wanted.
    pub(super) fn pass(
        &mut self,
        compressed: &[u8],
        (blob_offset, layer_offset): (u64, u64),
        boundary: Option<Boundary>,
        copy_window: impl FnOnce(&mut Vec<u8>),
    ) {
        self.last_byte = compressed.last().copied().unwrap_or(self.last_byte);
        if let Some(candidate) = &mut self.candidate {
            candidate.follow(compressed);
        }
        if self.next_multiple < layer_offset {
            self.pick(layer_offset, boundary);
        }
        let unused_bits = match boundary {
            Some(Boundary::Fresh) if self.is_new(layer_offset) => 0,
            Some(Boundary::Block { unused_bits }) if self.wanted_from() <= layer_offset => {
                unused_bits
            }
            _ => return,
        };
        let old = self.candidate.take();
        let (mut window, mut tail) =
            old.map_or_else(Default::default, |it| (it.checkpoint.window, it.tail));
        tail.clear();
        tail.extend((0 < unused_bits).then_some(self.last_byte));
        match boundary {
            Some(Boundary::Block { .. }) => copy_window(&mut window),
            _ => window.clear(),
        }
        self.last_offset = layer_offset;
        let checkpoint = Checkpoint {
            blob_offset: blob_offset - u64::from(0 < unused_bits),
            bit_offset: (8 - unused_bits) % 8,
            layer_offset,
            window,
        };
        self.candidate = Some(Candidate { checkpoint, tail });
    }

    /// Makes the candidate a checkpoint, now that its multiple has passed, unless it must wait.
    fn pick(&mut self, layer_offset: u64, boundary: Option<Boundary>) {
        let is_complete = self
            .candidate
            .as_ref()
            .is_none_or(|it| it.is_complete(layer_offset));
        // Behind a member's end nothing refers to the window.
        if is_complete || boundary == Some(Boundary::Fresh) {
            self.picked
                .extend(self.candidate.take().map(Candidate::into_checkpoint));
            // Beyond 2^64 there is none, and no layer.
            self.next_multiple = layer_offset
                .checked_next_multiple_of(self.stride_bytes)
                .unwrap_or(u64::MAX);
        }
    }

    /// Whether nothing was picked there before.
    fn is_new(&self, layer_offset: u64) -> bool {
        self.last_offset < layer_offset || self.candidate.is_some()
    }

    /// Offset in the layer from which on a boundary is worth a window.
    fn wanted_from(&self) -> u64 {
        let is_apart = self.last_offset + MIN_GAP_BYTES;
        match &self.candidate {
            None => is_apart,
            Some(Candidate { checkpoint, .. }) => {
                let halfway = (self.next_multiple - checkpoint.layer_offset) / 2;
                is_apart.max(self.next_multiple - halfway)
            }
        }
    }

    /// How much of the layer may pass before a block's boundary matters.
    pub(super) fn unwanted_bytes(&self, layer_offset: u64) -> usize {
        let bytes = self.wanted_from().saturating_sub(layer_offset);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Hands over what was picked since the last call.
    pub(super) fn take(&mut self) -> Vec<Checkpoint> {
        mem::take(&mut self.picked)
    }
}
