//! Writes a tree as a `.clip` file: numbers the nodes and lays the tables out.

use std::collections::{HashMap, VecDeque};

use super::{
    IndexError,
    image::{
        CHECKSUM_START, CLIP_HEADER_BYTES, DIRENT_BYTES, EXTENT_BYTES, HEADER_BYTES, LAYER_BYTES,
        NATIVE_MAGIC, NATIVE_START, NATIVE_VERSION, NODE_BYTES, TABLES, XATTR_BYTES, clip_header,
    },
    merge::LayerRecord,
    tree::{Body, NodeId, Tree},
    wire::{Write, count},
};
use crate::digest::ManifestDigest;

/// File type bits of `st_mode` (inode(7)).
mod file_type {
    pub(super) const FIFO: u32 = 0o010_000;
    pub(super) const CHAR_DEVICE: u32 = 0o020_000;
    pub(super) const DIRECTORY: u32 = 0o040_000;
    pub(super) const BLOCK_DEVICE: u32 = 0o060_000;
    pub(super) const REGULAR: u32 = 0o100_000;
    pub(super) const SYMLINK: u32 = 0o120_000;
}

/// The tables of the native section, as they grow.
#[derive(Debug, Default)]
struct Tables {
    nodes: Vec<u8>,
    dirents: Vec<u8>,
    extents: Vec<u8>,
    xattrs: Vec<u8>,
    layers: Vec<u8>,
    chunk_digests: Vec<u8>,
    strings: Vec<u8>,
    interned: HashMap<Box<[u8]>, u32>,
}

impl Tables {
    /// Returns where `text` stands in the strings, once for each distinct text.
    fn string(&mut self, text: &[u8]) -> Result<(u32, u32), IndexError> {
        let len = count("string bytes", text.len())?;
        if let Some(at) = self.interned.get(text) {
            return Ok((*at, len));
        }
        let at = count("bytes of names", self.strings.len())?;
        self.strings.put(text);
        self.interned.insert(text.into(), at);
        Ok((at, len))
    }
}

/// Node numbers by breadth-first order of sorted names, so that the same image has the same inode
/// numbers everywhere; a hard link has the number of its first name.
struct Numbers {
    /// Nodes in order.
    order: Vec<NodeId>,
    /// Number of each node of the arena.
    number: Vec<Option<u32>>,
    /// Number of the directory that has the first name, by number.
    parent: Vec<u32>,
    /// How many names each has, by number; for a directory, how many subdirectories.
    n_links: Vec<u32>,
}

fn number(tree: &Tree) -> Result<Numbers, IndexError> {
    let mut numbers = Numbers {
        order: vec![Tree::ROOT],
        number: vec![None; tree.len()],
        parent: vec![0],
        n_links: vec![0],
    };
    numbers.number[Tree::position(Tree::ROOT)] = Some(0);
    let mut queue = VecDeque::from([Tree::ROOT]);
    while let Some(directory) = queue.pop_front() {
        let Some(children) = tree.children(directory) else {
            continue;
        };
        let own = numbers.number[Tree::position(directory)].unwrap_or_default();
        for child in children.values() {
            let is_directory = tree.children(*child).is_some();
            let slot = &mut numbers.number[Tree::position(*child)];
            let at = match *slot {
                Some(at) => at,
                None => {
                    let at = count("nodes", numbers.order.len())?;
                    *slot = Some(at);
                    numbers.order.push(*child);
                    numbers.parent.push(own);
                    numbers.n_links.push(0);
                    if is_directory {
                        queue.push_back(*child);
                    }
                    at
                }
            };
            let counted = if is_directory { own } else { at };
            numbers.n_links[counted as usize] += 1;
        }
    }
    Ok(numbers)
}

/// Writes the file.
///
/// # Errors
/// [`IndexError::Limit`] if a count does not fit the format.
pub(super) fn write(
    tree: &Tree,
    layers: &[LayerRecord],
    manifest: ManifestDigest,
) -> Result<Vec<u8>, IndexError> {
    let numbers = number(tree)?;
    let mut tables = Tables::default();
    let mut content_bytes: u64 = 0;
    for (at, id) in numbers.order.iter().enumerate() {
        let node = tree.node(*id);
        let (kind, size, a, b, layer) = match &node.body {
            Body::Directory(children) => {
                let first = count("names", tables.dirents.len() / DIRENT_BYTES)?;
                for (name, child) in children {
                    let (name_at, name_bytes) = tables.string(name)?;
                    let number = numbers.number[Tree::position(*child)].unwrap_or_default();
                    tables.dirents.put_u32(name_at);
                    tables.dirents.put_u32(name_bytes);
                    tables.dirents.put_u32(number);
                }
                (
                    file_type::DIRECTORY,
                    4096,
                    first,
                    count("names", children.len())?,
                    0,
                )
            }
            Body::File {
                size,
                layer,
                extents,
            } => {
                let first = count("extents", tables.extents.len() / EXTENT_BYTES)?;
                for extent in extents {
                    tables.extents.put_u64(extent.file_offset);
                    tables.extents.put_u64(extent.layer_offset);
                    tables.extents.put_u64(extent.len);
                }
                content_bytes = content_bytes.saturating_add(*size);
                (
                    file_type::REGULAR,
                    *size,
                    first,
                    count("extents", extents.len())?,
                    *layer,
                )
            }
            Body::Symlink(target) => {
                let (at, len) = tables.string(target)?;
                (file_type::SYMLINK, u64::from(len), at, len, 0)
            }
            Body::CharDevice(major, minor) => (file_type::CHAR_DEVICE, 0, *major, *minor, 0),
            Body::BlockDevice(major, minor) => (file_type::BLOCK_DEVICE, 0, *major, *minor, 0),
            Body::Fifo => (file_type::FIFO, 0, 0, 0, 0),
        };
        let first_xattr = count("xattrs", tables.xattrs.len() / XATTR_BYTES)?;
        for (name, value) in &node.xattrs {
            let (name_at, name_bytes) = tables.string(name)?;
            let (value_at, value_bytes) = tables.string(value)?;
            for field in [name_at, name_bytes, value_at, value_bytes] {
                tables.xattrs.put_u32(field);
            }
        }
        let is_directory = kind == file_type::DIRECTORY;
        // A directory has its own `.`, its name, and the `..` of each subdirectory.
        let n_links = numbers.n_links[at] + if is_directory { 2 } else { 0 };
        let out = &mut tables.nodes;
        out.put_u32(kind | node.meta.mode & 0o7777);
        out.put_u32(node.meta.uid);
        out.put_u32(node.meta.gid);
        out.put_u32(n_links);
        out.put_u64(size);
        out.put_i64(node.meta.mtime_seconds);
        out.put_u32(node.meta.mtime_nanoseconds);
        out.put_u32(a);
        out.put_u32(b);
        out.put_u32(first_xattr);
        out.put_u32(count("xattrs of a file", node.xattrs.len())?);
        out.put_u32(numbers.parent[at]);
        out.put_u32(layer);
        out.put_u32(0);
    }
    for layer in layers {
        let out = &mut tables.layers;
        out.put(layer.diff_id.as_bytes());
        out.put(layer.blob.as_bytes());
        out.put_u64(layer.blob_bytes);
        out.put_u64(layer.layer_bytes);
        out.put_u64((tables.chunk_digests.len() / 32) as u64);
        out.put_u64((layer.chunk_digests.len() / 32) as u64);
        tables.chunk_digests.put(&layer.chunk_digests);
    }
    drop(std::mem::take(&mut tables.interned));
    Ok(assemble(&tables, manifest, content_bytes))
}

/// Puts header, padding, section header and tables one after the other.
fn assemble(tables: &Tables, manifest: ManifestDigest, content_bytes: u64) -> Vec<u8> {
    let parts: [(&Vec<u8>, usize); TABLES] = [
        (&tables.nodes, NODE_BYTES),
        (&tables.dirents, DIRENT_BYTES),
        (&tables.extents, EXTENT_BYTES),
        (&tables.xattrs, XATTR_BYTES),
        (&tables.layers, LAYER_BYTES),
        (&tables.chunk_digests, 32),
        (&tables.strings, 1),
    ];
    // Tables begin at multiples of eight, which leaves a reader free to cast.
    let padded = |len: usize| len.next_multiple_of(8);
    let section_bytes = HEADER_BYTES + parts.iter().map(|(it, _)| padded(it.len())).sum::<usize>();
    let mut out = Vec::with_capacity(NATIVE_START + section_bytes);
    out.put(&clip_header());
    debug_assert_eq!(out.len(), CLIP_HEADER_BYTES);
    out.resize(NATIVE_START, 0);
    out.put(NATIVE_MAGIC);
    out.put_u32(NATIVE_VERSION);
    out.put_u32(0);
    out.put_u64(section_bytes as u64);
    out.put(&[0; 32]);
    out.put(manifest.as_bytes());
    out.put_u64(content_bytes);
    let mut at = HEADER_BYTES;
    for (table, record_bytes) in parts {
        out.put_u64(at as u64);
        out.put_u64((table.len() / record_bytes) as u64);
        at += padded(table.len());
    }
    out.resize(NATIVE_START + HEADER_BYTES, 0);
    for (table, _) in parts {
        out.put(table);
        let end = out.len();
        out.resize(NATIVE_START + padded(end - NATIVE_START), 0);
    }
    let checksum = blake3::hash(&out[NATIVE_START + CHECKSUM_START + 32..]);
    out[NATIVE_START + CHECKSUM_START..][..32].copy_from_slice(checksum.as_bytes());
    out
}
