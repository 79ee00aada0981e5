//! The structures of EROFS as they are on disk, as far as they are used here.
//!
//! Linux 6.12, fs/erofs/erofs_fs.h: `erofs_super_block`, `erofs_deviceslot`, `erofs_inode_extended`,
//! `erofs_xattr_ibody_header`, `erofs_xattr_entry`, `erofs_inode_chunk_index`, `erofs_dirent`.

use super::ErofsError;
use crate::index::image::{FileType, Ino, Node};

/// A block: a tar's content begins at multiples of this.
pub(super) const BLOCK_BYTES: u64 = BLOCK_LEN as u64;
pub(super) const BLOCK_LEN: usize = 1 << BLOCK_BITS;
pub(super) const BLOCK_BITS: u8 = 9;

/// Where the superblock is.
pub(super) const SUPER_START: u64 = 1024;

/// Bytes of the superblock, and of each device's slot behind it.
pub(super) const SLOT_BYTES: u64 = SLOT_LEN as u64;
const SLOT_LEN: usize = 128;

/// The slot behind the superblock's, from the start of the file.
const FIRST_DEVICE_SLOT: u16 = 9;

/// What an inode's number counts.
pub(super) const NID_BYTES: u64 = 32;

/// An inode of the long form.
pub(super) const INODE_BYTES: u64 = INODE_LEN as u64;
const INODE_LEN: usize = 64;

/// What comes before the extended attributes of an inode: zeros, as nothing is said of them in advance.
pub(super) const XATTR_HEADER: [u8; 12] = [0; 12];

/// What comes before the name of an extended attribute.
pub(super) const XATTR_ENTRY_BYTES: u64 = 4;

/// Where a piece of a file is.
pub(super) const CHUNK_INDEX_BYTES: u64 = CHUNK_INDEX_LEN as u64;
const CHUNK_INDEX_LEN: usize = 8;

/// Of a name in a directory, without the name.
pub(super) const DIRENT_BYTES: usize = 12;

const MAGIC: u32 = 0xE0F5_E1E2;

/// A kernel that does not know files in chunks, or more than one device, refuses the mount.
const INCOMPATIBLE_CHUNKED_FILE: u32 = 0x4;
const INCOMPATIBLE_DEVICE_TABLE: u32 = 0x8;

/// Bit 0 of an inode's format: it has the long form. Then the layout of its data.
const LONG: u16 = 1;
const LAYOUT_PLAIN: u16 = 0;
const LAYOUT_CHUNKED: u16 = 4 << 1;

/// A file's chunks have devices.
const CHUNK_INDEXES: u16 = 0x20;

/// The block of a hole.
const HOLE: u32 = u32::MAX;

/// Numbers of what the names of extended attributes begin with.
const XATTR_PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];

/// What the file system is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Super {
    pub(super) root_nid: u16,
    pub(super) n_inodes: u64,
    /// Of the metadata alone.
    pub(super) n_blocks: u32,
    pub(super) n_devices: u16,
}

impl Super {
    pub(super) fn encode(self) -> [u8; SLOT_LEN] {
        let mut out = Record::new();
        out.put(0, &MAGIC.to_le_bytes());
        out.put(12, &[BLOCK_BITS]);
        out.put(14, &self.root_nid.to_le_bytes());
        out.put(16, &self.n_inodes.to_le_bytes());
        out.put(36, &self.n_blocks.to_le_bytes());
        let needs = INCOMPATIBLE_CHUNKED_FILE | INCOMPATIBLE_DEVICE_TABLE;
        out.put(80, &needs.to_le_bytes());
        out.put(86, &self.n_devices.to_le_bytes());
        out.put(88, &FIRST_DEVICE_SLOT.to_le_bytes());
        out.0
    }
}

/// A device's slot: it is named at the mount.
pub(super) fn device(n_blocks: u32) -> [u8; SLOT_LEN] {
    let mut out = Record::new();
    out.put(64, &n_blocks.to_le_bytes());
    out.0
}

/// Where the data of an inode are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: it has none, or its number says all, as a device's does.
    Number(u32),
    /// In the metadata, from this block on.
    Block(u32),
    /// In layers, by chunks of so many bits more than a block.
    Chunks { bits: u16 },
}

/// An inode, up to its extended attributes.
pub(super) fn inode(
    node: &Node,
    ino: Ino,
    size: u64,
    xattr_count: u16,
    place: Place,
) -> [u8; INODE_LEN] {
    let mut out = [0; INODE_LEN];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    let (layout, number) = match place {
        Place::Number(number) | Place::Block(number) => (LAYOUT_PLAIN, number),
        Place::Chunks { bits } => (LAYOUT_CHUNKED, u32::from(bits | CHUNK_INDEXES)),
    };
    let mode = type_bits(node.file_type) | node.permissions;
    put(0, &(LONG | layout).to_le_bytes());
    put(2, &xattr_count.to_le_bytes());
    put(4, &mode.to_le_bytes());
    put(8, &size.to_le_bytes());
    put(16, &number.to_le_bytes());
    // For stat(2) of 32 bits, which has room for no more.
    put(20, &ino.0.to_le_bytes()[..4]);
    put(24, &node.uid.to_le_bytes());
    put(28, &node.gid.to_le_bytes());
    put(32, &node.mtime_seconds.to_le_bytes());
    put(40, &node.mtime_nanoseconds.to_le_bytes());
    put(44, &node.n_links.to_le_bytes());
    out
}

/// A chunk of a file: a block of a layer, whose device has the layer's number plus one, or a hole.
pub(super) fn chunk_index(block: Option<(u16, u32)>) -> [u8; CHUNK_INDEX_LEN] {
    let (device, block) = block.unwrap_or((0, HOLE));
    let mut out = [0; CHUNK_INDEX_LEN];
    out[2..4].copy_from_slice(&device.to_le_bytes());
    out[4..8].copy_from_slice(&block.to_le_bytes());
    out
}

/// A name in a directory, without the name, which begins `name_start` bytes into the block.
pub(super) fn dirent(nid: u64, name_start: u16, file_type: FileType) -> [u8; DIRENT_BYTES] {
    let mut out = [0; DIRENT_BYTES];
    out[..8].copy_from_slice(&nid.to_le_bytes());
    out[8..10].copy_from_slice(&name_start.to_le_bytes());
    out[10] = match file_type {
        FileType::Regular => 1,
        FileType::Directory => 2,
        FileType::CharDevice => 3,
        FileType::BlockDevice => 4,
        FileType::Fifo => 5,
        FileType::Symlink => 7,
    };
    out
}

/// An extended attribute's name as the format has it: the number of what it begins with, and the rest.
pub(super) fn xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    let mut prefixes = XATTR_PREFIXES.iter();
    prefixes.find_map(|(prefix, number)| Some((*number, name.strip_prefix(*prefix)?)))
}

/// What comes before the name and the value of an extended attribute.
pub(super) fn xattr_entry(prefix: u8, name_bytes: u8, value_bytes: u16) -> [u8; 4] {
    let [low, high] = value_bytes.to_le_bytes();
    [name_bytes, prefix, low, high]
}

/// The number of a device node as the kernel packs it (`new_encode_dev`).
pub(super) fn device_number(node: &Node, ino: Ino) -> Result<u32, ErofsError> {
    let (major, minor) = node.device();
    if 1 << 12 <= major || 1 << 20 <= minor {
        let what = "a device number beyond what Linux has";
        return Err(ErofsError::Unfit { ino, what });
    }
    Ok(minor & 0xff | major << 8 | (minor & !0xff) << 12)
}

/// The file type in a mode (inode(7)).
fn type_bits(file_type: FileType) -> u16 {
    match file_type {
        FileType::Fifo => 0o010_000,
        FileType::CharDevice => 0o020_000,
        FileType::Directory => 0o040_000,
        FileType::BlockDevice => 0o060_000,
        FileType::Regular => 0o100_000,
        FileType::Symlink => 0o120_000,
    }
}

/// A record of the superblock's size, zeros where nothing is put.
struct Record([u8; SLOT_LEN]);

impl Record {
    fn new() -> Self {
        Self([0; SLOT_LEN])
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
