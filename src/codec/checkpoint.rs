//! Picks the places of a blob at which decompression can begin anew, while it is decompressed.

use std::{fmt, mem};

use crate::sys::inflate::WINDOW_BYTES;

/// Uncompressed bytes between two candidates at least, the starts of members and frames apart.
///
/// Copying a window costs as much as copying so much output: a blob of tiny blocks cannot make it
/// cost more than that.
const MIN_GAP_BYTES: u64 = WINDOW_BYTES as u64;

/// A place in a blob at which decompression can begin, and what it needs there.
#[derive(Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where in the blob.
    pub blob_offset: u64,
    /// How many low bits of the byte there belong to what precedes: 0 to 7.
    pub bit_offset: u8,
    /// Offset in the layer of the first byte that comes out.
    pub layer_offset: u64,
    /// The output before it that what follows may refer to, up to [`WINDOW_BYTES`].
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

/// Picks for every multiple of the stride the last boundary at or before it.
#[derive(Debug)]
pub(super) struct Picker {
    stride_bytes: u64,
    /// The multiple to come.
    next_multiple: u64,
    /// The last boundary before it so far.
    candidate: Option<Checkpoint>,
    /// The layer offset of the last candidate or checkpoint.
    last_offset: u64,
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
            picked: vec![Checkpoint::START],
        }
    }

    /// Takes note that decompression stands at these offsets, and of what kind of place that is.
    pub(super) fn pass(
        &mut self,
        blob_offset: u64,
        layer_offset: u64,
        boundary: Option<Boundary>,
        window: impl FnOnce() -> Vec<u8>,
    ) {
        if self.next_multiple < layer_offset {
            self.picked.extend(self.candidate.take());
            // Beyond 2^64 there is none, and no layer.
            self.next_multiple = layer_offset
                .checked_next_multiple_of(self.stride_bytes)
                .unwrap_or(u64::MAX);
        }
        let gap = layer_offset - self.last_offset;
        let checkpoint = match boundary {
            Some(Boundary::Fresh) if 0 < gap || self.candidate.is_some() => Checkpoint {
                blob_offset,
                bit_offset: 0,
                layer_offset,
                window: Vec::new(),
            },
            Some(Boundary::Block { unused_bits }) if MIN_GAP_BYTES <= gap => Checkpoint {
                blob_offset: blob_offset - u64::from(0 < unused_bits),
                bit_offset: (8 - unused_bits) % 8,
                layer_offset,
                window: window(),
            },
            _ => return,
        };
        self.last_offset = layer_offset;
        self.candidate = Some(checkpoint);
    }

    /// Hands over what was picked since the last call.
    pub(super) fn take(&mut self) -> Vec<Checkpoint> {
        mem::take(&mut self.picked)
    }
}
