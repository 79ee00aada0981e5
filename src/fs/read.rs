//! Puts the bytes of a file together from extents of a layer and holes.

use std::ops::Range;

use super::{ClipFs, FsError, LayerData, ServedBytes, Wait};
use crate::{
    chunk,
    digest::DiffId,
    index::image::{Extent, FileType, Ino, Node},
};

/// How a read ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadOutcome {
    /// The buffer holds all bytes of the range that the file has.
    Ready,
    /// All bytes are on the local disk, but it would have to be waited for.
    WouldBlock,
    /// These chunks are not on the local disk. Never empty; ranges of one layer do not touch.
    Missing(Vec<(DiffId, Range<u32>)>),
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
        let node = self.node(ino)?;
        match node.file_type {
            FileType::Regular => {}
            FileType::Directory => return Err(FsError::IsDir),
            FileType::Symlink | FileType::CharDevice | FileType::BlockDevice | FileType::Fifo => {
                return Err(FsError::WrongType);
            }
        }
        let len = node.size.saturating_sub(offset).min(u64::from(len));
        let missing = self.missing(ino, &node, offset, len)?;
        if !missing.is_empty() {
            return Ok(ReadOutcome::Missing(missing));
        }
        let damaged = || FsError::Damaged { ino: ino.0 };
        buf.resize(usize::try_from(len).map_err(|_| damaged())?, 0);
        let mut rest = &mut buf[..];
        let mut at = offset;
        for extent in self.index.extents(&node, offset, len) {
            let layer = self.layer(&extent).ok_or_else(damaged)?;
            // `missing` has checked that extents lie in order inside the range.
            let hole_bytes = usize::try_from(extent.file_offset - at).map_err(|_| damaged())?;
            let data_bytes = usize::try_from(extent.len).map_err(|_| damaged())?;
            let (hole, behind) = rest.split_at_mut(hole_bytes);
            let (data, behind) = behind.split_at_mut(data_bytes);
            hole.fill(0);
            let read = layer.read_at(data, extent.layer_offset, wait);
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
        // An eviction clears the presence of a chunk before it takes its bytes: what is present
        // now was so while it was read.
        let missing = self.missing(ino, &node, offset, len)?;
        Ok(if missing.is_empty() {
            ReadOutcome::Ready
        } else {
            ReadOutcome::Missing(missing)
        })
    }

    /// Finds the chunks of a range of a file that are not present, and checks that its extents lie
    /// in order inside the range.
    fn missing(
        &self,
        ino: Ino,
        node: &Node,
        offset: u64,
        len: u64,
    ) -> Result<Vec<(DiffId, Range<u32>)>, FsError> {
        let damaged = || FsError::Damaged { ino: ino.0 };
        let mut missing: Vec<(DiffId, Range<u32>)> = Vec::new();
        let (mut at, end) = (offset, offset.checked_add(len).ok_or_else(damaged)?);
        for extent in self.index.extents(node, offset, len) {
            let layer = self.layer(&extent).ok_or_else(damaged)?;
            let chunks = chunk::covering(extent.layer_offset, extent.len).ok_or_else(damaged)?;
            let extent_end = extent.file_offset.checked_add(extent.len);
            if extent.file_offset < at || extent_end.is_none_or(|it| end < it) {
                return Err(damaged());
            }
            at = extent_end.ok_or_else(damaged)?;
            if layer.has(chunks.clone()) {
                continue;
            }
            let diff_id = layer.diff_id();
            let absent = chunks.filter(|it| !layer.has(*it..*it + 1));
            missing.extend(absent.map(|it| (diff_id, it..it + 1)));
        }
        join_touching(&mut missing);
        Ok(missing)
    }

    fn layer(&self, extent: &Extent) -> Option<&dyn LayerData> {
        let at = usize::try_from(extent.layer).ok()?;
        self.layers.get(at).map(|it| &**it)
    }
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
