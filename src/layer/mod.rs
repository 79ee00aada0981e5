//! Keeps decompressed layers on the local disk and fills them from the other tiers.
//!
//! On disk, below the cache directory:
//!
//! ```text
//! layers/<diffid-hex>/index    what the layer contains, its chunk digests (layer_index); flock: shared
//!                              by whoever needs all of the layer
//! layers/<diffid-hex>/data     the decompressed tar, sparse: chunks that are absent are holes;
//!                              flock: shared by whoever has the layer open; mtime: its last use
//! layers/<diffid-hex>/state    which chunks are present, and when they were used last, mapped by every
//!                              process; flock: shared by whoever writes a chunk
//! layers/<diffid-hex>/access   where the layer's blob can be entered in its middle (codec::access_map,
//!                              codec::piece_map)
//! layers/<diffid-hex>/digests  the chunk digests of a layer whose index has none: see `by_toc`
//! layers/<diffid-hex>/upload   there while the remote content cache lacks the layer
//! layers/<diffid-hex>/mounted  empty; the kernel has it open as long as it has the layer mounted (whole);
//!                              flock: shared by whoever is about to mount it
//! images/<manifest-hex>.clip   an image's index (indexer); mtime: its last use
//! images/<manifest-hex>.profile  what was read first of the image (index::profile); mtime: its last use
//! locks/<diffid-hex>           flock: held by the process that fills or removes the layer
//! tmp/*.tmp                    first fills under way, and layers on their way out; what a crash
//!                              leaves is removed at start
//! ```
//!
//! Invariants:
//!
//! - A layer directory appears by rename, with a valid index, or not at all.
//! - A chunk's bit is set only after its bytes matched their digest and were written
//!   (`disk::LayerFile::write_chunk` and the end of a first fill are the only places).
//! - Bits written in an earlier boot of the machine count only if the data was flushed before;
//!   otherwise chunks are verified on first use.
//! - A layer is decompressed once per node, however many mounts, readers and processes want it: one
//!   flight per layer in a process (`flight`), one lock file between processes (`lock`).
//! - A broken cache never fails a reader: only the origin's last word does. What the disk cannot take
//!   or give is verified and lent to readers in memory (`through`), a few chunks at once.
//! - Bits are cleared, and the eviction is counted, before bytes are taken away; readers look at both
//!   again when they have read (`state` has the argument), and nothing else hands out bytes of the data
//!   file without comparing them with their digest.
//! - A layer that any process has open is never removed, though extents of it may be evicted
//!   (`disk::extents`), if this process could have them again (`reach`). Removing takes the fill lock, then the
//!   data file's lock, then renames the directory away: whoever opens the layer meanwhile gets all
//!   of it, or finds none and makes it anew. Of a layer that the kernel has mounted nothing is taken away (`whole`).
//! - The cache stays within its bounds (`evict` decides, `room` acts), except for what is in use and could
//!   not be had again: then readers go on, and an image that would need more is refused.

pub mod catalog;
pub mod disk;
pub mod images;
pub mod reader;
pub mod scratch;
pub mod store;
pub mod warm;
pub mod whole;

mod access;
mod adopt;
mod ahead;
mod asked;
mod by_toc;
mod evict;
mod extent;
mod feed;
mod fill;
mod flight;
mod lock;
mod make;
mod origins;
mod parallel;
mod pieces;
mod pipeline;
mod present;
mod pushed;
mod random;
mod reach;
mod recording;
mod replay;
mod riders;
mod room;
mod seek;
mod span;
mod state;
mod through;
mod upload;

pub use upload::UploadEnd;

use std::{ops::Range, path::PathBuf};

use serde::Deserialize;

use crate::{index::source::IndexBytes, sys::MappedFile, tier::Prefetch};

impl IndexBytes for MappedFile {
    fn will_read(&self, range: Range<usize>) {
        Self::will_read(self, range);
    }

    fn drop_resident(&self) {
        Self::drop_resident(self);
    }
}

/// Settings of the layer store.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Where layers and indexes are kept.
    pub dir: PathBuf,
    /// Largest decompressed layer that is taken, in bytes.
    pub max_layer_bytes: u64,
    /// Most entries that one layer may have.
    pub max_layer_entries: u64,
    /// Largest index of one layer, in bytes.
    pub max_layer_index_bytes: u64,
    /// Most inodes that one image may have.
    pub max_index_nodes: u32,
    /// Bytes that the cache may take; 0 if the disk alone is the bound.
    pub max_bytes: u64,
    /// Share of `max_bytes` above which what is not in use is evicted, least recently used first.
    pub high_watermark_percent: u32,
    /// Share of `max_bytes` at which eviction ends.
    pub low_watermark_percent: u32,
    /// Bytes that a fill leaves free on the disk.
    pub min_free_bytes: u64,
    /// Inodes that stay free on the disk, as far as evicting unused layers can see to it.
    pub min_free_inodes: u64,
    /// How many layers are decompressed at once.
    pub max_decompressions: usize,
    /// Whether a layer that was read at random is fetched whole, beside its readers; for images of
    /// which what was recorded is wanted.
    pub complete_layers: bool,
    /// Whether layers are read by their blobs' tables of contents, where these have any.
    pub layers_by_toc: bool,
    /// What is fetched ahead of an image for volumes that do not say.
    pub prefetch: Prefetch,
    /// How long a reader waits for a layer that makes no progress, in seconds.
    pub stall_timeout_seconds: u64,
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("/var/lib/clip-csi/cache"),
            // Larger than any layer seen in the field (model weights of some tens of GB), small
            // enough that a bomb does not fill a node's disk unnoticed.
            max_layer_bytes: 64 << 30,
            max_layer_entries: 10_000_000,
            max_layer_index_bytes: 1 << 30,
            max_index_nodes: 20_000_000,
            max_bytes: 0,
            high_watermark_percent: 90,
            low_watermark_percent: 80,
            min_free_bytes: 256 << 20,
            // A layer takes six, so that this is room for some images; few enough for a small disk.
            min_free_inodes: 1000,
            max_decompressions: default_decompressions(),
            complete_layers: true,
            layers_by_toc: true,
            prefetch: Prefetch::default(),
            stall_timeout_seconds: 60,
        }
    }
}

impl CacheConfig {
    /// Checks what a type cannot.
    ///
    /// # Errors
    /// One sentence that names the key and says what would do.
    pub fn check(&self) -> Result<(), String> {
        let (high, low) = (self.high_watermark_percent, self.low_watermark_percent);
        for (key, percent) in [
            ("high_watermark_percent", high),
            ("low_watermark_percent", low),
        ] {
            if !(1..=100).contains(&percent) {
                return Err(format!("cache.{key} = {percent}: it must be from 1 to 100"));
            }
        }
        if high <= low {
            return Err(format!(
                "cache.low_watermark_percent = {low} must be less than \
                 cache.high_watermark_percent = {high}"
            ));
        }
        Ok(())
    }
}

/// One for two cores, since each takes two threads: more at once would take memory, not less time.
fn default_decompressions() -> usize {
    let n_cores = std::thread::available_parallelism().map_or(2, usize::from);
    (n_cores / 2).clamp(1, 4)
}
