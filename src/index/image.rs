//! The index of an image: a `.clip` file that is served from a memory map.
//!
//! ```text
//! 0      header of the clip format, 54 bytes: magic, version, where the gob sections are
//! 54     gob index and gob storage info of the Go tool: empty in files of this version
//! 4096n  native section: header (256 bytes), then seven tables of fixed-size records
//! ```
//!
//! The native section begins at the first multiple of 4096 after the gob sections, wherever those
//! end. All fields are little-endian. Reading needs no decoding and no memory of its own: a lookup
//! is a binary search over the names of a directory, which lie side by side.
//!
//! [`ImageIndex::open`] checks the frame; every access after that checks its own bounds, so that a
//! damaged file yields `None`, never a panic. `docs/INDEX_FORMAT.md` specifies each field.

use std::ops::Range;

use super::{
    IndexError,
    source::{self, IndexBytes},
    wire::{Reader, Write},
};
use crate::digest::{BlobDigest, ChunkDigest, DiffId, ManifestDigest};

/// First bytes of a `.clip` file.
const CLIP_MAGIC: &[u8; 9] = b"\x89CLIP\r\n\x1a\n";

/// Version of the clip format itself.
const CLIP_VERSION: u8 = 1;

/// Bytes of the clip header.
pub(super) const CLIP_HEADER_BYTES: usize = 54;

/// Where the native section begins when the gob sections are empty.
pub(super) const NATIVE_START: usize = 4096;

/// First bytes of the native section.
pub(super) const NATIVE_MAGIC: &[u8; 8] = b"CLIPNATV";

/// Version of the native section: raise it with every change of the bytes.
pub const NATIVE_VERSION: u32 = 1;

/// Bytes of the native section's header.
pub(super) const HEADER_BYTES: usize = 256;

/// Where the checksum stands in that header; it covers all that follows it.
pub(super) const CHECKSUM_START: usize = 24;

/// How many tables there are.
pub(super) const TABLES: usize = 7;

pub(super) const NODE_BYTES: usize = 64;
pub(super) const DIRENT_BYTES: usize = 12;
pub(super) const EXTENT_BYTES: usize = 24;
pub(super) const XATTR_BYTES: usize = 16;
pub(super) const LAYER_BYTES: usize = 96;

/// What errors call this format.
const WHAT: &str = "image index";

const NODES: usize = 0;
const DIRENTS: usize = 1;
const EXTENTS: usize = 2;
const XATTRS: usize = 3;
const LAYERS: usize = 4;
const CHUNK_DIGESTS: usize = 5;
const STRINGS: usize = 6;

/// Record sizes in the order of the tables.
const RECORD_BYTES: [usize; TABLES] = [
    NODE_BYTES,
    DIRENT_BYTES,
    EXTENT_BYTES,
    XATTR_BYTES,
    LAYER_BYTES,
    32,
    1,
];

/// Mask of the file type in a mode (inode(7)).
const TYPE_MASK: u32 = 0o170_000;

/// Makes the clip header of a file whose gob sections are empty.
pub(super) fn clip_header() -> Vec<u8> {
    let end = CLIP_HEADER_BYTES as u64;
    let mut out = Vec::with_capacity(CLIP_HEADER_BYTES);
    out.put(CLIP_MAGIC);
    out.put_u8(CLIP_VERSION);
    for field in [0, end, 0, end] {
        out.put_u64(field);
    }
    out.put(b"oci\0\0\0\0\0\0\0\0\0");
    out
}

/// Inode number: the position in the node table, plus one; the root is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory.
    pub const ROOT: Self = Self(1);
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileType {
    /// A directory.
    Directory,
    /// A regular file.
    Regular,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
}

/// The attributes of an inode, and where its parts are.
#[derive(Debug, Clone, Copy)]
pub struct Node {
    /// What it is.
    pub file_type: FileType,
    /// Permission bits, setuid, setgid and sticky.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of hard links.
    pub n_links: u32,
    /// Size in bytes.
    pub size: u64,
    /// Modification time, seconds since 1970.
    pub mtime_seconds: i64,
    /// Modification time, the part below a second.
    pub mtime_nanoseconds: u32,
    a: u32,
    b: u32,
    first_xattr: u32,
    n_xattrs: u32,
    parent: u32,
    layer: u32,
}

impl Node {
    /// Major and minor number of a device; zeros for anything else.
    pub fn device(&self) -> (u32, u32) {
        match self.file_type {
            FileType::CharDevice | FileType::BlockDevice => (self.a, self.b),
            _ => (0, 0),
        }
    }

    /// The directory that has the inode's first name.
    pub fn parent(&self) -> Ino {
        Ino(u64::from(self.parent) + 1)
    }

    /// Whether it has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        0 < self.n_xattrs
    }
}

/// A run of a file's bytes inside a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Position in the image's list of layers.
    pub layer: u32,
    /// Offset in the file.
    pub file_offset: u64,
    /// Offset in the decompressed layer.
    pub layer_offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// What the index says about a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Names the uncompressed tar.
    pub diff_id: DiffId,
    /// Names the blob in the registry.
    pub blob: BlobDigest,
    /// Size of that blob.
    pub blob_bytes: u64,
    /// Size of the uncompressed tar.
    pub layer_bytes: u64,
    first_chunk: u64,
    n_chunks: u64,
}

/// An image index over the bytes of a `.clip` file.
#[derive(Debug)]
pub struct ImageIndex<B> {
    bytes: B,
    section: Range<usize>,
    tables: [Range<usize>; TABLES],
    manifest: ManifestDigest,
    content_bytes: u64,
}

impl<B: IndexBytes> ImageIndex<B> {
    /// Reads the headers and checks that every table lies in the file.
    ///
    /// # Errors
    /// [`IndexError`] says what is wrong. The checksum is not read: see [`Self::verify`].
    pub fn open(bytes: B) -> Result<Self, IndexError> {
        let truncated = IndexError::Truncated { what: WHAT };
        let start = native_start(&bytes)?;
        let mut reader = Reader::new(bytes.get(start..).ok_or(truncated.clone())?, WHAT);
        if reader.array::<8>()? != *NATIVE_MAGIC {
            return Err(IndexError::Magic { what: WHAT });
        }
        let version = reader.u32()?;
        if version != NATIVE_VERSION {
            return Err(IndexError::Version {
                what: WHAT,
                found: version,
                max: NATIVE_VERSION,
            });
        }
        let _reserved = reader.u32()?;
        let section_bytes = usize::try_from(reader.u64()?).map_err(|_| truncated.clone())?;
        let end = start.checked_add(section_bytes).ok_or(truncated.clone())?;
        if bytes.len() != end || section_bytes < HEADER_BYTES {
            return Err(truncated);
        }
        let _checksum = reader.array::<32>()?;
        let manifest = ManifestDigest::from_bytes(reader.array()?);
        let content_bytes = reader.u64()?;
        let mut tables: [Range<usize>; TABLES] = Default::default();
        for (table, record_bytes) in tables.iter_mut().zip(RECORD_BYTES) {
            let (at, n_records) = (reader.u64()?, reader.u64()?);
            let first = usize::try_from(at)
                .ok()
                .and_then(|it| it.checked_add(start));
            let len = usize::try_from(n_records)
                .ok()
                .and_then(|it| it.checked_mul(record_bytes));
            let last = first
                .zip(len)
                .and_then(|(first, len)| first.checked_add(len));
            match first.zip(last) {
                Some((first, last)) if start + HEADER_BYTES <= first && last <= end => {
                    *table = first..last;
                }
                _ => return Err(truncated),
            }
        }
        let index = Self {
            bytes,
            section: start..end,
            tables,
            manifest,
            content_bytes,
        };
        match index.node(Ino::ROOT) {
            Some(Node {
                file_type: FileType::Directory,
                ..
            }) => Ok(index),
            _ => Err(truncated),
        }
    }

    /// Compares the whole native section with its checksum.
    ///
    /// # Errors
    /// [`IndexError::Checksum`] if a bit of it has changed since it was written.
    pub fn verify(&self) -> Result<(), IndexError> {
        let content = self.section.start + CHECKSUM_START + 32..self.section.end;
        let checksum = &self.bytes[content.start - 32..content.start];
        if source::hash(&self.bytes, content).as_bytes() == checksum {
            Ok(())
        } else {
            Err(IndexError::Checksum { what: WHAT })
        }
    }

    /// The bytes of the file.
    pub fn source(&self) -> &B {
        &self.bytes
    }

    /// Names the image.
    pub fn manifest(&self) -> ManifestDigest {
        self.manifest
    }

    /// How many inodes there are.
    pub fn n_nodes(&self) -> u64 {
        (self.tables[NODES].len() / NODE_BYTES) as u64
    }

    /// Sum of the sizes of all regular files.
    pub fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// Whether any inode has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        !self.tables[XATTRS].is_empty()
    }

    /// The inode `ino`, or `None` if there is no such inode.
    pub fn node(&self, ino: Ino) -> Option<Node> {
        let mut reader = self.record::<NODE_BYTES>(NODES, ino.0.checked_sub(1)?)?;
        let read = &mut reader;
        let mode = read.u32().ok()?;
        let file_type = match mode & TYPE_MASK {
            0o040_000 => FileType::Directory,
            0o100_000 => FileType::Regular,
            0o120_000 => FileType::Symlink,
            0o020_000 => FileType::CharDevice,
            0o060_000 => FileType::BlockDevice,
            0o010_000 => FileType::Fifo,
            _ => return None,
        };
        Some(Node {
            file_type,
            permissions: u16::try_from(mode & 0o7777).ok()?,
            uid: read.u32().ok()?,
            gid: read.u32().ok()?,
            n_links: read.u32().ok()?,
            size: read.u64().ok()?,
            mtime_seconds: read.i64().ok()?,
            mtime_nanoseconds: read.u32().ok()?,
            a: read.u32().ok()?,
            b: read.u32().ok()?,
            first_xattr: read.u32().ok()?,
            n_xattrs: read.u32().ok()?,
            parent: read.u32().ok()?,
            layer: read.u32().ok()?,
        })
    }

    /// How many names `directory` has; 0 if it is no directory.
    pub fn n_names(&self, directory: &Node) -> u32 {
        if directory.file_type == FileType::Directory {
            directory.b
        } else {
            0
        }
    }

    /// Name number `at` of `directory`, in byte order, and what it names.
    pub fn name(&self, directory: &Node, at: u32) -> Option<(&[u8], Ino)> {
        if self.n_names(directory) <= at {
            return None;
        }
        let number = u64::from(directory.a) + u64::from(at);
        let mut reader = self.record::<DIRENT_BYTES>(DIRENTS, number)?;
        let name = self.string(reader.u32().ok()?, reader.u32().ok()?)?;
        Some((name, Ino(u64::from(reader.u32().ok()?) + 1)))
    }

    /// What `name` names in `directory`.
    pub fn lookup(&self, directory: &Node, name: &[u8]) -> Option<Ino> {
        let (mut low, mut high) = (0, self.n_names(directory));
        while low < high {
            let middle = low + (high - low) / 2;
            let (found, ino) = self.name(directory, middle)?;
            match found.cmp(name) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Some(ino),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// The target of a symbolic link.
    pub fn symlink_target(&self, node: &Node) -> Option<&[u8]> {
        match node.file_type {
            FileType::Symlink => self.string(node.a, node.b),
            _ => None,
        }
    }

    /// The extended attributes of `node`, as `(name, value)`.
    pub fn xattrs(&self, node: &Node) -> impl Iterator<Item = (&[u8], &[u8])> {
        let first = u64::from(node.first_xattr);
        (first..first + u64::from(node.n_xattrs)).map_while(|number| {
            let mut reader = self.record::<XATTR_BYTES>(XATTRS, number)?;
            let name = self.string(reader.u32().ok()?, reader.u32().ok()?)?;
            Some((name, self.string(reader.u32().ok()?, reader.u32().ok()?)?))
        })
    }

    /// The extents that hold bytes of `[offset, offset + len)` of a file, cut to that range, in
    /// order. What lies between them is a hole and reads as zeros.
    pub fn extents(&self, node: &Node, offset: u64, len: u64) -> impl Iterator<Item = Extent> {
        let n_extents = if node.file_type == FileType::Regular {
            node.b
        } else {
            0
        };
        let end = offset.saturating_add(len).min(node.size);
        let node = *node;
        // The first extent that ends behind `offset`.
        let (mut low, mut high) = (0, n_extents);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.extent(&node, middle) {
                Some(it) if it.file_offset.saturating_add(it.len) <= offset => low = middle + 1,
                _ => high = middle,
            }
        }
        (low..n_extents)
            .map_while(move |at| self.extent(&node, at))
            .take_while(move |it| it.file_offset < end)
            .map(move |it| {
                let skip = offset.saturating_sub(it.file_offset);
                let last = it.file_offset.saturating_add(it.len).min(end);
                let file_offset = it.file_offset + skip;
                Extent {
                    file_offset,
                    layer_offset: it.layer_offset.saturating_add(skip),
                    len: last.saturating_sub(file_offset),
                    ..it
                }
            })
    }

    /// How many layers the image has.
    pub fn n_layers(&self) -> u32 {
        // The writer counts layers in 32 bits.
        u32::try_from(self.tables[LAYERS].len() / LAYER_BYTES).unwrap_or(u32::MAX)
    }

    /// Layer number `at`, counted from the bottom.
    pub fn layer(&self, at: u32) -> Option<Layer> {
        let mut reader = self.record::<LAYER_BYTES>(LAYERS, u64::from(at))?;
        Some(Layer {
            diff_id: DiffId::from_bytes(reader.array().ok()?),
            blob: BlobDigest::from_bytes(reader.array().ok()?),
            blob_bytes: reader.u64().ok()?,
            layer_bytes: reader.u64().ok()?,
            first_chunk: reader.u64().ok()?,
            n_chunks: reader.u64().ok()?,
        })
    }

    /// The digest of chunk `chunk` of `layer`.
    pub fn chunk_digest(&self, layer: &Layer, chunk: u32) -> Option<ChunkDigest> {
        let chunk = u64::from(chunk);
        if layer.n_chunks <= chunk {
            return None;
        }
        let number = layer.first_chunk.checked_add(chunk)?;
        Some(ChunkDigest::from_bytes(
            self.record::<32>(CHUNK_DIGESTS, number)?.array().ok()?,
        ))
    }

    fn extent(&self, node: &Node, at: u32) -> Option<Extent> {
        let number = u64::from(node.a) + u64::from(at);
        let mut reader = self.record::<EXTENT_BYTES>(EXTENTS, number)?;
        Some(Extent {
            layer: node.layer,
            file_offset: reader.u64().ok()?,
            layer_offset: reader.u64().ok()?,
            len: reader.u64().ok()?,
        })
    }

    fn record<const N: usize>(&self, table: usize, number: u64) -> Option<Reader<'_>> {
        let at = usize::try_from(number).ok()?.checked_mul(N)?;
        let table = &self.bytes[self.tables[table].clone()];
        Some(Reader::new(table.get(at..at.checked_add(N)?)?, WHAT))
    }

    fn string(&self, at: u32, len: u32) -> Option<&[u8]> {
        let start = usize::try_from(at).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        self.bytes[self.tables[STRINGS].clone()].get(start..end)
    }
}

/// Finds the native section behind the gob sections that the clip header names.
fn native_start(bytes: &[u8]) -> Result<usize, IndexError> {
    let mut reader = Reader::new(bytes, "clip file");
    if reader.array::<9>()? != *CLIP_MAGIC {
        return Err(IndexError::Magic { what: "clip file" });
    }
    let version = reader.u8()?;
    if version != CLIP_VERSION {
        let max = u32::from(CLIP_VERSION);
        return Err(IndexError::Version {
            what: "clip file",
            found: u32::from(version),
            max,
        });
    }
    let mut end = CLIP_HEADER_BYTES as u64;
    for _ in 0..2 {
        let (len, at) = (reader.u64()?, reader.u64()?);
        let last = len
            .checked_add(at)
            .ok_or(IndexError::Truncated { what: "clip file" })?;
        end = end.max(last);
    }
    end.checked_next_multiple_of(NATIVE_START as u64)
        .and_then(|it| usize::try_from(it).ok())
        .ok_or(IndexError::Truncated { what: "clip file" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clip_header_is_the_go_tools() {
        let header = clip_header();
        assert_eq!(header.len(), CLIP_HEADER_BYTES);
        assert_eq!(&header[..10], b"\x89CLIP\r\n\x1a\n\x01");
        assert_eq!(&header[42..], b"oci\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn the_native_section_is_found_behind_gob_sections() {
        let mut file = clip_header();
        assert_eq!(native_start(&file), Ok(4096));
        // Storage info of 5000 bytes at 54.
        file[26..34].copy_from_slice(&5000u64.to_le_bytes());
        assert_eq!(native_start(&file), Ok(8192));
        file[26..34].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(native_start(&file).is_err());
    }
}
