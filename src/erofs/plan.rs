//! Decides where each inode lies, and checks on the way what the kernel is to believe.

use super::{
    ErofsError, MAX_NODES,
    format::{
        self, BLOCK_BYTES, CHUNK_INDEX_BYTES, INODE_BYTES, NID_BYTES, SLOT_BYTES, SUPER_START,
        XATTR_ENTRY_BYTES, XATTR_HEADER, xattr_name,
    },
};
use crate::index::{
    image::{Extent, FileType, ImageIndex, Ino, Node},
    source::IndexBytes,
};

/// Of how many inodes one has its place noted; others are counted from there.
const NOTED_EVERY: u64 = NOTED_EVERY_LEN as u64;
const NOTED_EVERY_LEN: usize = 64;

/// Most bytes of inodes, and of directories and links: twice what a million symbolic links take. An index has
/// each text once, however often it is named, so that a small one could fill a disk.
pub(super) const MAX_PART_BYTES: u64 = 1 << 30;

/// Most chunks of one file: as many as half a megabyte of metadata.
const MAX_CHUNKS: u64 = 1 << 16;

/// Largest chunk, and file, in bits more than a block: a terabyte.
const MAX_CHUNK_BITS: u32 = 31;

/// Of a block, as other numbers of bits are.
const BLOCK_BITS: u32 = format::BLOCK_BITS as u32;

/// Longest target of a symbolic link (PATH_MAX, without the final NUL).
const MAX_TARGET_BYTES: u64 = 4095;

/// How many inodes or names are looked at before the pages of the index are given back.
pub(super) const GIVE_BACK_EVERY: u64 = 2048;

/// Where the inodes lie: one after the other, in the order of the index.
#[derive(Debug)]
pub(super) struct Plan<'a, B> {
    pub(super) index: &'a ImageIndex<B>,
    /// The number of each [`NOTED_EVERY`]th.
    noted: Vec<u32>,
    /// How much each takes, in what numbers count; 0 if that is more than a byte can say.
    taken: Vec<u8>,
    /// What those take, by their position.
    large: Vec<(usize, u32)>,
    /// Where the last one ends, in bytes from the start of the file.
    pub(super) end: u64,
}

/// What an inode has besides its attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Of its extended attributes, 0 if it has none.
    pub(super) xattr_bytes: u64,
    /// Chunks of its content, and their size in bits more than a block.
    pub(super) n_chunks: u64,
    pub(super) chunk_bits: u32,
}

impl Shape {
    /// What the inode takes in all.
    fn bytes(self) -> u64 {
        let head_bytes = self.head_bytes().next_multiple_of(CHUNK_INDEX_BYTES);
        (head_bytes + self.n_chunks * CHUNK_INDEX_BYTES).next_multiple_of(NID_BYTES)
    }

    /// What comes before its chunks.
    pub(super) fn head_bytes(self) -> u64 {
        INODE_BYTES + self.xattr_bytes
    }

    /// Bytes of a chunk.
    pub(super) fn chunk_bytes(self) -> u64 {
        BLOCK_BYTES << self.chunk_bits
    }
}

impl<'a, B: IndexBytes> Plan<'a, B> {
    /// Goes through all inodes.
    ///
    /// # Errors
    /// Those of [`ErofsError`], without the disk's.
    pub(super) fn new(index: &'a ImageIndex<B>) -> Result<Self, ErofsError> {
        let n_nodes = index.n_nodes();
        let root = Ino::ROOT;
        if MAX_NODES < n_nodes {
            let what = "more inodes than are mounted so";
            return Err(ErofsError::Unfit { ino: root, what });
        }
        let n_slots = 1 + 2 * u64::from(index.n_layers());
        // The root's number has 16 bits only: it is the first.
        let mut end = (SUPER_START + n_slots * SLOT_BYTES).next_multiple_of(NID_BYTES);
        if u64::from(u16::MAX) < end / NID_BYTES {
            let what = "an image of so many layers";
            return Err(ErofsError::Unfit { ino: root, what });
        }
        let (mut noted, mut taken, mut large) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..n_nodes {
            let ino = Ino(number + 1);
            if number.is_multiple_of(NOTED_EVERY) {
                let nid = u32::try_from(end / NID_BYTES).map_err(|_| too_much(ino))?;
                noted.push(nid);
            }
            let bytes = shape(index, &node(index, ino)?, ino)?.bytes();
            let n_nids = u32::try_from(bytes / NID_BYTES).map_err(|_| too_much(ino))?;
            match u8::try_from(n_nids) {
                Ok(n_nids) => taken.push(n_nids),
                Err(_) => {
                    large.push((taken.len(), n_nids));
                    taken.push(0);
                }
            }
            end += bytes;
            if MAX_PART_BYTES < end {
                return Err(too_much(ino));
            }
            if number.is_multiple_of(GIVE_BACK_EVERY) {
                index.source().drop_resident();
            }
        }
        Ok(Self {
            index,
            noted,
            taken,
            large,
            end,
        })
    }

    /// The number of an inode: where it lies.
    ///
    /// # Errors
    /// There is no such inode.
    pub(super) fn nid(&self, ino: Ino) -> Result<u64, ErofsError> {
        let what = "a name of no inode";
        let number = ino.0.checked_sub(1).and_then(|it| usize::try_from(it).ok());
        let number = number.filter(|it| *it < self.taken.len());
        let number = number.ok_or(ErofsError::Damaged { ino, what })?;
        let noted = number / NOTED_EVERY_LEN;
        let before = noted * NOTED_EVERY_LEN..number;
        let taken = before.map(|it| match self.taken[it] {
            0 => {
                let found = self.large.binary_search_by_key(&it, |it| it.0);
                found.map_or(0, |it| u64::from(self.large[it].1))
            }
            n_nids => u64::from(n_nids),
        });
        Ok(u64::from(self.noted[noted]) + taken.sum::<u64>())
    }
}

/// An inode that must be there.
///
/// # Errors
/// It is not, or is none.
pub(super) fn node<B: IndexBytes>(index: &ImageIndex<B>, ino: Ino) -> Result<Node, ErofsError> {
    let what = "an inode that cannot be read";
    index.node(ino).ok_or(ErofsError::Damaged { ino, what })
}

/// Measures an inode, and checks what belongs to it alone.
///
/// # Errors
/// Those of [`ErofsError`], without the disk's.
pub(super) fn shape<B: IndexBytes>(
    index: &ImageIndex<B>,
    node: &Node,
    ino: Ino,
) -> Result<Shape, ErofsError> {
    let damaged = |what| Err(ErofsError::Damaged { ino, what });
    if 1_000_000_000 <= node.mtime_nanoseconds {
        return damaged("a time of more than a second's nanoseconds");
    }
    let mut shape = Shape {
        xattr_bytes: xattr_bytes(index, node, ino)?,
        n_chunks: 0,
        chunk_bits: 0,
    };
    match node.file_type {
        FileType::Regular if 0 < node.size => {
            shape.chunk_bits = chunk_bits(index, node, ino)?;
            shape.n_chunks = node.size.div_ceil(shape.chunk_bytes());
            if MAX_CHUNKS < shape.n_chunks {
                let what = "a sparse file of too many parts";
                return Err(ErofsError::Unfit { ino, what });
            }
        }
        FileType::Symlink => {
            let target = index.symlink_target(node).unwrap_or_default();
            let len = target.len() as u64;
            if len != node.size || !(1..=MAX_TARGET_BYTES).contains(&len) || target.contains(&0) {
                return damaged("the target of a symbolic link");
            }
        }
        _ => {}
    }
    Ok(shape)
}

/// Bytes of the extended attributes of an inode; 0 if it has none.
fn xattr_bytes<B: IndexBytes>(
    index: &ImageIndex<B>,
    node: &Node,
    ino: Ino,
) -> Result<u64, ErofsError> {
    if !node.has_xattrs() {
        return Ok(0);
    }
    let unfit = |what| ErofsError::Unfit { ino, what };
    let header_bytes = XATTR_HEADER.len() as u64;
    let mut bytes = header_bytes;
    for (name, value) in index.xattrs(node) {
        // The rest are access control lists, which a FUSE mount shows and EROFS would obey.
        let (_, name) = xattr_name(name).ok_or(unfit("an extended attribute of another kind"))?;
        let fits = (1..=usize::from(u8::MAX)).contains(&name.len())
            && value.len() <= usize::from(u16::MAX)
            && !name.contains(&0);
        if !fits {
            return Err(unfit("a long extended attribute"));
        }
        let entry_bytes = XATTR_ENTRY_BYTES + (name.len() + value.len()) as u64;
        bytes += entry_bytes.next_multiple_of(XATTR_ENTRY_BYTES);
        // What the count of their words can say.
        if (u64::from(u16::MAX) - 1) * XATTR_ENTRY_BYTES < bytes - header_bytes {
            return Err(unfit("many extended attributes"));
        }
    }
    Ok(bytes)
}

/// The size of a file's chunks, in bits more than a block: as large as it can be if each is to lie in one
/// piece, or to be a hole.
fn chunk_bits<B: IndexBytes>(
    index: &ImageIndex<B>,
    node: &Node,
    ino: Ino,
) -> Result<u32, ErofsError> {
    let damaged = |what| Err(ErofsError::Damaged { ino, what });
    let unfit = |what| Err(ErofsError::Unfit { ino, what });
    if 1 << (BLOCK_BITS + MAX_CHUNK_BITS) < node.size {
        return unfit("a very large file");
    }
    // A bit is set that is set in any place where a piece begins or ends.
    let (mut edges, mut end) = (0, 0);
    for extent in index.extents(node, 0, node.size) {
        if extent.len == 0 || extent.file_offset < end {
            return damaged("parts of a file that overlap");
        }
        end = extent.file_offset + extent.len;
        edges |= extent.file_offset;
        if end < node.size {
            edges |= end;
        }
        block_of(index, &extent, ino)?;
    }
    let largest = node.size.next_power_of_two().trailing_zeros();
    let bits = match edges {
        0 => largest.max(BLOCK_BITS),
        _ => edges.trailing_zeros(),
    };
    // What follows a part in its last block would show.
    if bits < BLOCK_BITS {
        return unfit("a file whose parts do not begin and end with blocks");
    }
    Ok(bits - BLOCK_BITS)
}

/// The device and the block where an extent begins, all of whose blocks the layer has.
///
/// # Errors
/// It has not, or the extent does not begin a block.
pub(super) fn block_of<B: IndexBytes>(
    index: &ImageIndex<B>,
    extent: &Extent,
    ino: Ino,
) -> Result<(u16, u32), ErofsError> {
    let layer = index.layer(extent.layer);
    let end = extent.layer_offset.checked_add(extent.len);
    let (Some(layer), Some(end)) = (layer, end) else {
        let what = "a part of a file in no layer";
        return Err(ErofsError::Damaged { ino, what });
    };
    if layer.layer_bytes < end {
        let what = "a part of a file that its layer does not have";
        return Err(ErofsError::Damaged { ino, what });
    }
    // The kernel reads blocks, and has an error for one that is not whole.
    if layer.layer_bytes < end.next_multiple_of(BLOCK_BYTES) {
        let what = "an archive that ends within a block";
        return Err(ErofsError::Unfit { ino, what });
    }
    if !extent.layer_offset.is_multiple_of(BLOCK_BYTES) {
        let what = "content that does not begin a block";
        return Err(ErofsError::Unfit { ino, what });
    }
    let block = u32::try_from(extent.layer_offset / BLOCK_BYTES).ok();
    let device = u16::try_from(extent.layer + 1).ok();
    // The last block is that of a hole.
    let block = block.filter(|it| *it < u32::MAX);
    device.zip(block).ok_or(too_much(ino))
}

/// More than the format's numbers can say.
pub(super) fn too_much(ino: Ino) -> ErofsError {
    let what = "a layer or an index that is too large";
    ErofsError::Unfit { ino, what }
}
