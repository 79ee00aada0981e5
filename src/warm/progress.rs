//! Tells whoever watches how far a seeding or a filling has come.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Finding out what the image is made of, and what is missing.
    Resolving = 0,
    /// Moving bytes.
    Moving = 1,
    /// Looking whether all of it is there.
    Verifying = 2,
    /// Nothing more.
    Done = 3,
}

/// How far the work has come, as it counts it; may be read at any time, from anywhere.
#[derive(Debug, Default)]
pub struct WarmProgress {
    phase: AtomicU8,
    layers_total: AtomicU64,
    layers_done: AtomicU64,
    bytes_total: AtomicU64,
    bytes_done: AtomicU64,
}

/// What a [`WarmProgress`] says at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WarmSnapshot {
    /// What is being done.
    pub phase: Phase,
    /// Layers of the image; 0 as long as they are not known.
    pub layers_total: u64,
    /// Layers that are where they are to be.
    pub layers_done: u64,
    /// Bytes of the image that are to be there: when it is seeded, of its blobs; when it is filled, of its
    /// decompressed layers.
    pub bytes_total: u64,
    /// How many of these are there.
    pub bytes_done: u64,
}

impl WarmProgress {
    /// Reads it.
    pub fn snapshot(&self) -> WarmSnapshot {
        let read = |it: &AtomicU64| it.load(Ordering::Relaxed);
        WarmSnapshot {
            phase: match self.phase.load(Ordering::Relaxed) {
                0 => Phase::Resolving,
                1 => Phase::Moving,
                2 => Phase::Verifying,
                _ => Phase::Done,
            },
            layers_total: read(&self.layers_total),
            layers_done: read(&self.layers_done),
            bytes_total: read(&self.bytes_total),
            // What was fetched again is not counted twice.
            bytes_done: read(&self.bytes_done).min(read(&self.bytes_total)),
        }
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    pub(crate) fn expect(&self, layers: u64, bytes: u64) {
        self.layers_total.store(layers, Ordering::Relaxed);
        self.bytes_total.store(bytes, Ordering::Relaxed);
    }

    pub(super) fn layer_done(&self) {
        self.layers_done.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn bytes_done(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }
}
