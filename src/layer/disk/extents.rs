//! Evicts extents of an open layer, and says which of them may be.

use std::{
    io,
    ops::Range,
    os::unix::fs::MetadataExt,
    sync::{Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::io::Errno;

use super::{INDEX, LayerFile, STATE, hole};
use crate::{
    chunk::{self, CHUNK_BYTES},
    layer::{extent, lock, whole},
};

/// An extent that has bytes on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::layer) struct Present {
    pub(in crate::layer) extent: u32,
    pub(in crate::layer) bytes: u64,
    /// In milliseconds since 1970.
    pub(in crate::layer) last_use_ms: u64,
}

/// What came of an eviction of extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::layer) enum Evicted {
    /// So many extents, of which the disk has so many bytes back.
    Some { n_extents: u64, bytes: u64 },
    /// Nothing: somebody writes to the layer, needs all of it, or would not see it.
    Busy,
    /// Nothing: the file system cannot punch holes.
    Unsupported,
}

/// Chunks that somebody waits for, whose extents are not to be evicted before they are answered.
#[derive(Debug, Default)]
pub(super) struct Wanted(
    /// std Mutex: held to look, to add or to remove.
    Mutex<Vec<Range<u32>>>,
);

impl Wanted {
    fn lock(&self) -> MutexGuard<'_, Vec<Range<u32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the extents of some chunks from being evicted by this process until it is dropped.
#[derive(Debug)]
pub(in crate::layer) struct Waiting<'a> {
    wanted: &'a Wanted,
    extents: Range<u32>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut wanted = self.wanted.lock();
        let at = wanted.iter().position(|it| *it == self.extents);
        at.map(|it| wanted.swap_remove(it));
    }
}

impl LayerFile {
    /// A number that has changed if bytes of these chunks were taken away since it was read before.
    ///
    /// Whoever reads bytes compares it, because they may have been taken away and filled again meanwhile
    /// (`state`).
    pub fn n_evictions(&self, chunks: &Range<u32>) -> u64 {
        self.state.n_evictions(chunks)
    }

    /// Notes that `len` bytes from `offset` are read now.
    pub(in crate::layer) fn note_read(&self, offset: u64, len: usize) {
        if let Some(chunks) = chunk::covering(offset, len as u64) {
            self.state.note_use(&chunks, now_ms());
        }
    }

    /// Notes that `extents` were read lately.
    pub(in crate::layer) fn note_extents(&self, extents: &Range<u32>) {
        let first = extents.start.saturating_mul(extent::EXTENT_CHUNKS);
        let end = extents.end.saturating_mul(extent::EXTENT_CHUNKS);
        self.state.note_use(&(first..end), now_ms());
    }

    /// Says that somebody waits for `chunks`, until the result is dropped.
    pub(in crate::layer) fn wait_for(&self, chunks: &Range<u32>) -> Waiting<'_> {
        let extents = extent::covering(chunks, self.n_chunks());
        self.wanted.lock().push(extents.clone());
        Waiting {
            wanted: &self.wanted,
            extents,
        }
    }

    /// Keeps every process from evicting extents of the layer, until the result is dropped: for whoever
    /// reads all of it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn keep_whole(&self) -> io::Result<Kept> {
        lock::keep(&self.dir.join(INDEX)).map(|held| Kept { _held: held })
    }

    /// Whether this process has evicted extents of the layer since it opened it.
    pub(in crate::layer) fn was_cut(&self) -> bool {
        self.is_cut.load(Ordering::Relaxed)
    }

    /// The extents that have bytes, and that nobody waits for; none where somebody would not see them go.
    pub(in crate::layer) fn evictable(&self) -> Vec<Present> {
        if !self.state.is_seen_by_all() || self.is_mounted() {
            return Vec::new();
        }
        let wanted = self.wanted.lock().clone();
        let extents = 0..extent::n_extents(self.n_chunks());
        let free = extents.filter(|it| !wanted.iter().any(|wanted| wanted.contains(it)));
        let present = free.map(|it| {
            let chunks = extent::chunks(it, self.n_chunks());
            let present = chunks.filter(|it| self.state.has(*it));
            Present {
                extent: it,
                bytes: present.map(|it| self.chunk_bytes(it)).sum(),
                last_use_ms: self.state.last_use_ms(it),
            }
        });
        present.filter(|it| 0 < it.bytes).collect()
    }

    /// Takes `extents` off the disk.
    ///
    /// Readers in any process notice (`state`), and ask for them anew. A process that dies here leaves
    /// bytes without marks, which are overwritten by the next fill.
    ///
    /// # Errors
    /// Those of the file system. What was taken away until then is gone.
    ///
    /// # Blocking
    /// For a moment while chunks of the layer are written; and for the disk if the layer was flushed.
    pub(in crate::layer) fn evict(&self, extents: &[u32]) -> io::Result<Evicted> {
        if !self.state.is_seen_by_all() {
            return Ok(Evicted::Busy);
        }
        let Some(_nobody_mounts) = whole::try_unmounted(&self.dir)? else {
            return Ok(Evicted::Busy);
        };
        // Mostly here already, so that nobody waits for the disk below.
        self.state.distrust(&self.dir.join(STATE))?;
        let (mut n_extents, mut bytes) = (0, 0);
        for extent in extents {
            // One by one: a file system may write what is dirty before it punches, and others wait.
            match self.evict_one(*extent)? {
                Evicted::Some {
                    n_extents: n,
                    bytes: freed,
                } => (n_extents, bytes) = (n_extents + n, bytes + freed),
                refused @ (Evicted::Busy | Evicted::Unsupported) if n_extents == 0 => {
                    return Ok(refused);
                }
                Evicted::Busy | Evicted::Unsupported => break,
            }
        }
        Ok(Evicted::Some { n_extents, bytes })
    }

    fn evict_one(&self, extent: u32) -> io::Result<Evicted> {
        let Some(_nobody_keeps) = lock::try_let_go(&self.dir.join(INDEX))? else {
            return Ok(Evicted::Busy);
        };
        let state_path = self.dir.join(STATE);
        let Some(_alone) = lock::try_write_alone(&state_path)? else {
            return Ok(Evicted::Busy);
        };
        // A flush may have ended since; from here on none can.
        self.state.distrust(&state_path)?;
        // st_blocks is in units of 512 bytes (stat(3type)).
        let disk_bytes = || {
            self.data
                .metadata()
                .map(|it| it.blocks().saturating_mul(512))
        };
        let bytes_before = disk_bytes()?;
        let present = self.state.begin_eviction(extent);
        match self.punch(extent) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                // Nobody else could write: the bytes are those that were marked.
                present.into_iter().for_each(|it| {
                    self.state.set(it);
                });
                return Ok(Evicted::Unsupported);
            }
            Err(err) => return Err(err.into()),
        }
        self.is_cut.store(true, Ordering::Relaxed);
        Ok(Evicted::Some {
            n_extents: 1,
            bytes: bytes_before.saturating_sub(disk_bytes()?),
        })
    }

    fn punch(&self, extent: u32) -> Result<(), Errno> {
        let chunks = extent::chunks(extent, self.n_chunks());
        let start = u64::from(chunks.start) * CHUNK_BYTES;
        let end = (u64::from(chunks.end) * CHUNK_BYTES).min(self.layer_bytes());
        hole::punch(&self.data, start..end)
    }
}

/// Keeps extents of a layer from being evicted.
#[derive(Debug)]
pub struct Kept {
    _held: lock::Held,
}

/// The time as extents' uses are noted. Before 1970 nothing is known.
pub(in crate::layer) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |it| u64::try_from(it.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests;
