//! Writes the metadata of an image: superblock, devices, inodes, then directories and links.

use std::{fs::File, os::unix::fs::FileExt};

use super::{
    ErofsError,
    directory::Directories,
    format::{
        self, BLOCK_BYTES, BLOCK_LEN, CHUNK_INDEX_BYTES, NID_BYTES, Place, SUPER_START, Super,
        XATTR_ENTRY_BYTES, XATTR_HEADER, xattr_name,
    },
    plan::{GIVE_BACK_EVERY, MAX_PART_BYTES, Plan, Shape, block_of, node, shape, too_much},
};
use crate::index::{
    image::{Extent, FileType, ImageIndex, Ino, Node},
    source::IndexBytes,
};

/// The file is made a multiple of the largest pages that Linux has: kernels from 7 on have an error for metadata
/// whose page the file does not fill.
const PAGE_BYTES: u64 = 64 << 10;

/// How much is written at once.
const PIECE_BYTES: usize = 64 << 10;

/// Writes the metadata of the image `index` to `file`, which is empty. The layers are its devices, each
/// followed by one that is never read (see [`mount`](fn@super::mount)).
///
/// The index may be anybody's: what is written is a tree, and names bytes that the layers have.
///
/// # Errors
/// Those of [`ErofsError`].
///
/// # Blocking
/// Writes some hundred bytes for each inode.
pub fn write<B: IndexBytes>(index: &ImageIndex<B>, file: &File) -> Result<(), ErofsError> {
    let plan = Plan::new(index)?;
    let mut inodes = Output::new(file, plan.nid(Ino::ROOT)? * NID_BYTES);
    let mut data = Output::new(file, plan.end.next_multiple_of(BLOCK_BYTES));
    let mut directories = Directories::new(&plan);
    for number in 0..index.n_nodes() {
        let ino = Ino(number + 1);
        let node = node(index, ino)?;
        let shape = shape(index, &node, ino)?;
        let (size, place) = match node.file_type {
            FileType::Directory => {
                let block = data.block(ino)?;
                let n_blocks = directories.write(&node, ino, |it| data.put(it))?;
                (n_blocks * BLOCK_BYTES, Place::Block(block))
            }
            FileType::Symlink => {
                let block = data.block(ino)?;
                data.put(index.symlink_target(&node).unwrap_or_default())?;
                data.pad(BLOCK_BYTES)?;
                (node.size, Place::Block(block))
            }
            FileType::Regular if 0 < node.size => {
                // Checked: 31 at most.
                let bits = u16::try_from(shape.chunk_bits).map_err(|_| too_much(ino))?;
                (node.size, Place::Chunks { bits })
            }
            FileType::Regular | FileType::Fifo => (0, Place::Number(0)),
            FileType::CharDevice | FileType::BlockDevice => {
                (0, Place::Number(format::device_number(&node, ino)?))
            }
        };
        let xattr_count = xattr_count(shape);
        inodes.put(&format::inode(&node, ino, size, xattr_count, place))?;
        if node.has_xattrs() {
            put_xattrs(index, &node, &mut inodes)?;
        }
        inodes.pad(CHUNK_INDEX_BYTES)?;
        if let Place::Chunks { .. } = place {
            put_chunks(index, &node, ino, shape, &mut inodes)?;
        }
        inodes.pad(NID_BYTES)?;
        if number.is_multiple_of(GIVE_BACK_EVERY) {
            index.source().drop_resident();
        }
    }
    inodes.flush()?;
    let n_blocks = data.block(Ino::ROOT)?;
    data.flush()?;
    file.set_len(data.end().next_multiple_of(PAGE_BYTES))?;
    put_head(&plan, n_blocks, file)
}

/// What an inode says of the length of its extended attributes (`erofs_xattr_ibody_size`).
fn xattr_count(shape: Shape) -> u16 {
    let words = shape.xattr_bytes.checked_sub(XATTR_HEADER.len() as u64);
    let count = words.map_or(0, |it| 1 + it / XATTR_ENTRY_BYTES);
    // Checked when they were measured.
    u16::try_from(count).unwrap_or(u16::MAX)
}

fn put_xattrs<B: IndexBytes>(
    index: &ImageIndex<B>,
    node: &Node,
    out: &mut Output<'_>,
) -> Result<(), ErofsError> {
    out.put(&XATTR_HEADER)?;
    for (name, value) in index.xattrs(node) {
        // All was checked when they were measured.
        let Some((prefix, name)) = xattr_name(name) else {
            continue;
        };
        let name_bytes = u8::try_from(name.len()).unwrap_or(u8::MAX);
        let value_bytes = u16::try_from(value.len()).unwrap_or(u16::MAX);
        out.put(&format::xattr_entry(prefix, name_bytes, value_bytes))?;
        out.put(name)?;
        out.put(value)?;
        out.pad(XATTR_ENTRY_BYTES)?;
    }
    Ok(())
}

fn put_chunks<B: IndexBytes>(
    index: &ImageIndex<B>,
    node: &Node,
    ino: Ino,
    shape: Shape,
    out: &mut Output<'_>,
) -> Result<(), ErofsError> {
    let mut extents = index.extents(node, 0, node.size).peekable();
    for chunk in 0..shape.n_chunks {
        let start = chunk * shape.chunk_bytes();
        let is_past = |it: &Extent| it.file_offset + it.len <= start;
        while extents.next_if(is_past).is_some() {}
        let block = match extents.peek() {
            Some(extent) if extent.file_offset <= start => {
                let (device, block) = block_of(index, extent, ino)?;
                // Its last block was found to be one of the layer.
                let skipped = (start - extent.file_offset) / BLOCK_BYTES;
                let skipped = u32::try_from(skipped).map_err(|_| too_much(ino))?;
                // Of two devices for each layer, the first.
                Some((2 * device - 1, block.saturating_add(skipped)))
            }
            Some(_) | None => None,
        };
        out.put(&format::chunk_index(block))?;
    }
    Ok(())
}

/// Writes what comes before the inodes, last: it has the number of all blocks.
fn put_head<B: IndexBytes>(
    plan: &Plan<'_, B>,
    n_blocks: u32,
    file: &File,
) -> Result<(), ErofsError> {
    let (index, root) = (plan.index, Ino::ROOT);
    let mut out = Output::new(file, SUPER_START);
    let root_nid = u16::try_from(plan.nid(root)?).map_err(|_| too_much(root))?;
    let n_devices = u16::try_from(2 * index.n_layers()).map_err(|_| too_much(root))?;
    let head = Super {
        root_nid,
        n_inodes: index.n_nodes(),
        n_blocks,
        n_devices,
    };
    out.put(&head.encode())?;
    for at in 0..index.n_layers() {
        let what = "its list of layers";
        let layer = index.layer(at);
        let layer = layer.ok_or(ErofsError::Damaged { ino: root, what })?;
        let n_blocks = layer.layer_bytes.div_ceil(BLOCK_BYTES);
        let n_blocks = u32::try_from(n_blocks).map_err(|_| too_much(root))?;
        out.put(&format::device(n_blocks))?;
        out.put(&format::device(0))?;
    }
    Ok(out.flush()?)
}

/// A part of the file that is written from its start to its end.
#[derive(Debug)]
struct Output<'a> {
    file: &'a File,
    start: u64,
    /// Where what is held goes.
    at: u64,
    held: Vec<u8>,
}

impl<'a> Output<'a> {
    fn new(file: &'a File, at: u64) -> Self {
        let held = Vec::with_capacity(PIECE_BYTES);
        let start = at;
        Self {
            file,
            start,
            at,
            held,
        }
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ErofsError> {
        if MAX_PART_BYTES < self.end() - self.start {
            return Err(too_much(Ino::ROOT));
        }
        if PIECE_BYTES < self.held.len() + bytes.len() {
            self.flush()?;
        }
        self.held.extend_from_slice(bytes);
        Ok(())
    }

    /// Puts zeros up to the next multiple of `bytes`.
    fn pad(&mut self, bytes: u64) -> Result<(), ErofsError> {
        let end = self.end();
        let zeros = [0; BLOCK_LEN];
        let n_zeros = end.next_multiple_of(bytes) - end;
        // Below a block.
        self.put(&zeros[..usize::try_from(n_zeros).unwrap_or(0)])
    }

    fn end(&self) -> u64 {
        self.at + self.held.len() as u64
    }

    /// The block that comes next.
    fn block(&self, ino: Ino) -> Result<u32, ErofsError> {
        u32::try_from(self.end() / BLOCK_BYTES).map_err(|_| too_much(ino))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.write_all_at(&self.held, self.at)?;
        self.at = self.end();
        self.held.clear();
        Ok(())
    }
}
