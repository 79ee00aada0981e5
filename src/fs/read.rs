//! Puts the bytes of a file together from extents of a layer and holes.

use std::{
    collections::BTreeMap,
    io,
    ops::Range,
    sync::atomic::{Ordering, fence},
};

use super::{ClipFs, FsError, LayerData, ServedBytes, Wait};
use crate::{
    chunk::{self, CHUNK_BYTES},
    digest::DiffId,
    index::image::{Extent, FileType, Ino, Node},
    tier::{Chunk, lent::LentChunk},
};

/// Chunks that are to be made present.
pub type Missing = Vec<(DiffId, Range<u32>)>;

/// How a read ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadOutcome {
    /// The buffer holds all bytes of the range that the file has.
    Ready,
    /// All bytes are on the local disk, but it would have to be waited for.
    WouldBlock,
    /// These chunks are not on the local disk. Never empty; ranges of one layer do not touch.
    Missing(Missing),
    /// All chunks are on the local disk, but were not while they were read: it is to be read again. Names a
    /// layer of the range.
    Evicted(DiffId),
}

/// Which of a range's chunks are to be lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needed {
    /// Those that are not on the local disk.
    Absent,
    /// All: the disk cannot be read.
    All,
}

impl<I: ServedBytes> ClipFs<I> {
    /// Reads up to `len` bytes of a file from `offset`.
    ///
    /// When [`ReadOutcome::Ready`], `buf` has exactly as many bytes as the file has in the range;
    /// otherwise what it has is undefined. Its old content saves it from being filled with zeros:
    /// keep one buffer for many reads.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsDir`], [`FsError::WrongType`], [`FsError::Damaged`],
    /// [`FsError::Io`].
    pub fn read(
        &self,
        ino: Ino,
        offset: u64,
        len: u32,
        buf: &mut Vec<u8>,
        wait: Wait,
    ) -> Result<ReadOutcome, FsError> {
        self.read_from((&[], wait), ino, offset, len, buf)
    }

    /// Does the same with what of the file is lent, and waits for the disk with what is not.
    ///
    /// # Errors
    /// Those of [`read`](Self::read).
    pub fn read_lent(
        &self,
        ino: Ino,
        offset: u64,
        len: u32,
        buf: &mut Vec<u8>,
        lent: &[LentChunk],
    ) -> Result<ReadOutcome, FsError> {
        self.read_from((lent, Wait::ForDisk), ino, offset, len, buf)
    }

    /// Names the chunks that a range of a file lies in, for them to be lent.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::Damaged`].
    pub fn chunks(
        &self,
        ino: Ino,
        offset: u64,
        len: u32,
        needed: Needed,
    ) -> Result<Vec<Chunk>, FsError> {
        let node = self.node(ino)?;
        let len = node.size.saturating_sub(offset).min(u64::from(len));
        let mut found = BTreeMap::new();
        self.visit(ino, &node, offset, len, &mut |layer, chunks| {
            for number in chunks {
                if needed == Needed::All || !layer.has(number..number + 1) {
                    let range = chunk::byte_range(number, layer.layer_bytes());
                    found.insert((layer.diff_id(), number), range.end - range.start);
                }
            }
        })?;
        let named = found.into_iter().map(|((layer, number), bytes)| Chunk {
            layer,
            number,
            bytes,
        });
        Ok(named.collect())
    }

    fn read_from(
        &self,
        from: (&[LentChunk], Wait),
        ino: Ino,
        offset: u64,
        len: u32,
        buf: &mut Vec<u8>,
    ) -> Result<ReadOutcome, FsError> {
        let node = self.node(ino)?;
        match node.file_type {
            FileType::Regular => {}
            FileType::Directory => return Err(FsError::IsDir),
            FileType::Symlink | FileType::CharDevice | FileType::BlockDevice | FileType::Fifo => {
                return Err(FsError::WrongType);
            }
        }
        let (lent, _) = from;
        let len = node.size.saturating_sub(offset).min(u64::from(len));
        let (n_evictions, missing) = self.missing(lent, ino, &node, offset, len)?;
        if !missing.is_empty() {
            return Ok(ReadOutcome::Missing(missing));
        }
        let damaged = || FsError::Damaged { ino: ino.0 };
        buf.resize(usize::try_from(len).map_err(|_| damaged())?, 0);
        let mut rest = &mut buf[..];
        let mut at = offset;
        let mut of = None;
        for extent in self.index.extents(&node, offset, len) {
            let layer = self.layer(&extent).ok_or_else(damaged)?;
            // `missing` has checked that extents lie in order inside the range.
            let hole_bytes = usize::try_from(extent.file_offset - at).map_err(|_| damaged())?;
            let data_bytes = usize::try_from(extent.len).map_err(|_| damaged())?;
            let (hole, behind) = rest.split_at_mut(hole_bytes);
            let (data, behind) = behind.split_at_mut(data_bytes);
            hole.fill(0);
            of = Some(layer.diff_id());
            let read = read_extent(layer, extent.layer_offset, data, from);
            if !read.map_err(|source| FsError::Io {
                layer: layer.diff_id(),
                offset: extent.layer_offset,
                source,
            })? {
                return Ok(ReadOutcome::WouldBlock);
            }
            rest = behind;
            at = extent.file_offset + extent.len;
        }
        rest.fill(0);
        // An eviction clears the presence of a chunk, and counts itself, before it takes the bytes: what
        // is present now, and was not evicted in between, was so while it was read (`layer::state`, where
        // the argument is). This is the one place where bytes of the disk cache are given to readers.
        fence(Ordering::Acquire);
        let (n_evictions_now, missing) = self.missing(lent, ino, &node, offset, len)?;
        Ok(match of {
            _ if !missing.is_empty() => ReadOutcome::Missing(missing),
            Some(layer) if n_evictions_now != n_evictions => ReadOutcome::Evicted(layer),
            Some(_) | None => ReadOutcome::Ready,
        })
    }

    /// Finds the chunks of a range of a file that are neither present nor lent, and checks that its
    /// extents lie in order inside the range. With them comes a number that has changed if any were evicted
    /// since it was found before.
    fn missing(
        &self,
        lent: &[LentChunk],
        ino: Ino,
        node: &Node,
        offset: u64,
        len: u64,
    ) -> Result<(u64, Missing), FsError> {
        let mut missing = Missing::new();
        let mut n_evictions: u64 = 0;
        self.visit(ino, node, offset, len, &mut |layer, chunks| {
            let diff_id = layer.diff_id();
            let is_lent = |chunk| lent.iter().any(|it| it.is(diff_id, chunk));
            // Before it is looked whether they are present. Counts only grow, and so does their sum.
            let from_disk = chunks.clone().filter(|it| !is_lent(*it));
            let counts = from_disk.map(|it| layer.n_evictions(it..it + 1));
            n_evictions = counts.fold(n_evictions, u64::wrapping_add);
            if layer.has(chunks.clone()) {
                return;
            }
            let absent = chunks.filter(|it| !layer.has(*it..*it + 1) && !is_lent(*it));
            missing.extend(absent.map(|it| (diff_id, it..it + 1)));
        })?;
        join_touching(&mut missing);
        Ok((n_evictions, missing))
    }

    /// Shows `visit` which chunks of which layers a range of a file lies in, and checks that its extents
    /// lie in order inside the range.
    fn visit(
        &self,
        ino: Ino,
        node: &Node,
        offset: u64,
        len: u64,
        visit: &mut dyn FnMut(&dyn LayerData, Range<u32>),
    ) -> Result<(), FsError> {
        let damaged = || FsError::Damaged { ino: ino.0 };
        let (mut at, end) = (offset, offset.checked_add(len).ok_or_else(damaged)?);
        for extent in self.index.extents(node, offset, len) {
            let layer = self.layer(&extent).ok_or_else(damaged)?;
            let chunks = chunk::covering(extent.layer_offset, extent.len).ok_or_else(damaged)?;
            let extent_end = extent.file_offset.checked_add(extent.len);
            if extent.file_offset < at || extent_end.is_none_or(|it| end < it) {
                return Err(damaged());
            }
            at = extent_end.ok_or_else(damaged)?;
            visit(layer, chunks);
        }
        Ok(())
    }

    fn layer(&self, extent: &Extent) -> Option<&dyn LayerData> {
        let at = usize::try_from(extent.layer).ok()?;
        self.layers.get(at).map(|it| &**it)
    }
}

/// Fills `data` from `offset` of `layer`, chunk by chunk out of `lent`, else from the disk; `Ok(false)` if
/// that would have to be waited for and must not.
///
/// # Errors
/// Those of [`LayerData::read_at`].
fn read_extent(
    layer: &dyn LayerData,
    offset: u64,
    data: &mut [u8],
    (lent, wait): (&[LentChunk], Wait),
) -> io::Result<bool> {
    if lent.is_empty() {
        return layer.read_at(data, offset, wait);
    }
    let (mut rest, mut at) = (data, offset);
    while !rest.is_empty() {
        let in_chunk = at % CHUNK_BYTES;
        let number = u32::try_from(at / CHUNK_BYTES).map_err(io::Error::other)?;
        let left = usize::try_from(CHUNK_BYTES - in_chunk).unwrap_or(usize::MAX);
        let (piece, behind) = rest.split_at_mut(left.min(rest.len()));
        match lent.iter().find(|it| it.is(layer.diff_id(), number)) {
            Some(lent) => lent.read_at(piece, in_chunk)?,
            None if layer.read_at(piece, at, wait)? => {}
            None => return Ok(false),
        }
        at += piece.len() as u64;
        rest = behind;
    }
    Ok(true)
}

/// Sorts ranges and joins those of one layer that touch.
fn join_touching(ranges: &mut Vec<(DiffId, Range<u32>)>) {
    ranges.sort_unstable_by_key(|(layer, chunks)| (*layer, chunks.start));
    ranges.dedup_by(|(layer, chunks), (last_layer, last)| {
        let touching = layer == last_layer && chunks.start <= last.end;
        if touching {
            last.end = last.end.max(chunks.end);
        }
        touching
    });
}
