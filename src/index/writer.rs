//! Writes a tree as a `.clip` file: numbers the nodes and lays the tables out.
//!
//! Nodes are numbered breadth first, in the order of sorted names, so that the same image has the same inode
//! numbers everywhere; a hard link has the number of its first name. The table of nodes is the queue of
//! that walk as well: a node gets its place when its first name is met, and its fields when its turn comes.

use super::{
    IndexError,
    image::{
        CHECKSUM_START, CLIP_HEADER_BYTES, DIRENT_BYTES, EXTENT_BYTES, HEADER_BYTES, LAYER_BYTES,
        NATIVE_MAGIC, NATIVE_START, NATIVE_VERSION, NODE_BYTES, TABLES, XATTR_BYTES, clip_header,
    },
    layer_index::{EntryKind, EntryRef},
    merge::LayerRecord,
    scratch::{
        Scratch, WriteAt,
        output::Output,
        paged::Paged,
        sorted::{SortedMap, TextMap},
    },
    tree::{Described, Kind, Node, NodeId, Tree},
    wire::{Write, count},
};
use crate::digest::ManifestDigest;

/// Pages that are held of a table that is appended to.
const HELD_PAGES: usize = 8;

/// Pages that are held of the table of nodes, which is written at its end, at the walk's place, and where
/// hard links are.
const HELD_NODE_PAGES: usize = 64;

/// Pages that are held of the texts and where they are: 1 MiB. Names come in the order of their
/// directories, which have many names in common.
const HELD_TEXT_PAGES: usize = 256;

/// Where a node's number of links is in its record.
const LINKS_AT: u64 = 12;

/// Where a node's parent is in its record.
const PARENT_AT: u64 = 52;

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
#[derive(Debug)]
struct Tables<S> {
    nodes: Paged<S>,
    dirents: Paged<S>,
    extents: Paged<S>,
    xattrs: Paged<S>,
    layers: Paged<S>,
    chunk_digests: Paged<S>,
    strings: Paged<S>,
    interned: TextMap<S>,
    content_bytes: u64,
}

/// The fields of a node that depend on what it is.
#[derive(Debug, Default)]
struct Body {
    /// File type bits and permissions.
    mode: u32,
    size: u64,
    a: u32,
    b: u32,
    layer: u32,
}

impl<S: Scratch> Tables<S> {
    fn new(tree: &Tree<S>) -> Self {
        let table = |n_held| Paged::new(tree.another(), n_held);
        Self {
            nodes: table(HELD_NODE_PAGES),
            dirents: table(HELD_PAGES),
            extents: table(HELD_PAGES),
            xattrs: table(HELD_PAGES),
            layers: table(HELD_PAGES),
            chunk_digests: table(HELD_PAGES),
            strings: table(HELD_PAGES),
            interned: SortedMap::new(tree.another(), HELD_TEXT_PAGES).into(),
            content_bytes: 0,
        }
    }

    /// Returns where `text` stands in the strings, once for each distinct text.
    fn string(&mut self, text: &[u8]) -> Result<(u32, u32), IndexError> {
        let len = count("string bytes", text.len())?;
        let end = count_of("bytes of names", self.strings.len())?;
        match self.interned.insert_new(text, end)? {
            Some(at) => Ok((at, len)),
            None => {
                self.strings.append(text)?;
                Ok((end, len))
            }
        }
    }

    /// How many nodes have a place.
    fn n_nodes(&self) -> Result<u32, IndexError> {
        count_of("nodes", self.nodes.len() / NODE_BYTES as u64)
    }

    /// Gives a node a place, until its turn comes: its first name is in directory number `parent`.
    fn add_node(&mut self, id: NodeId, parent: u32) -> Result<u32, IndexError> {
        let number = self.n_nodes()?;
        let mut record = vec![0; NODE_BYTES];
        record[..4].copy_from_slice(&id.0.to_le_bytes());
        self.nodes.append(&record)?;
        self.put_field(number, PARENT_AT, parent)?;
        Ok(number)
    }

    fn field(&mut self, number: u32, at: u64) -> Result<u32, IndexError> {
        let mut bytes = [0; 4];
        self.nodes.read(&mut bytes, place(number) + at)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn put_field(&mut self, number: u32, at: u64, value: u32) -> Result<(), IndexError> {
        Ok(self.nodes.write(&value.to_le_bytes(), place(number) + at)?)
    }

    /// Adds the names of directory number `own`, and gives what they name its place.
    ///
    /// Returns the directory's fields, and how many subdirectories it has.
    fn put_names(
        &mut self,
        tree: &mut Tree<S>,
        directory: Node,
        own: u32,
    ) -> Result<(Body, u32), IndexError> {
        let first = count_of("names", self.dirents.len() / DIRENT_BYTES as u64)?;
        let (mut n_names, mut n_subdirectories) = (0, 0);
        let mut names = tree.names(directory)?;
        while let Some((name, child)) = names.next(tree)? {
            let (name_at, name_bytes) = self.string(name)?;
            let number = match tree.number(child)? {
                Some(number) => number,
                None => {
                    let number = self.add_node(child, own)?;
                    tree.set_number(child, number)?;
                    number
                }
            };
            if tree.node(child)?.kind == Kind::Directory {
                n_subdirectories += 1;
            } else {
                let n_links = self.field(number, LINKS_AT)?;
                self.put_field(number, LINKS_AT, n_links + 1)?;
            }
            let mut record = Vec::with_capacity(DIRENT_BYTES);
            record.put_u32(name_at);
            record.put_u32(name_bytes);
            record.put_u32(number);
            self.dirents.append(&record)?;
            n_names += 1;
        }
        let body = Body {
            mode: file_type::DIRECTORY,
            size: 4096,
            a: first,
            b: n_names,
            layer: 0,
        };
        Ok((body, n_subdirectories))
    }

    /// Adds what a layer says of a node that is no directory.
    fn put_body(&mut self, layer: u32, entry: &EntryRef<'_>) -> Result<Body, IndexError> {
        let body = |mode, a, b| Body {
            mode,
            a,
            b,
            ..Body::default()
        };
        match &entry.kind {
            EntryKind::File { size, extents } => {
                let first = count_of("extents", self.extents.len() / EXTENT_BYTES as u64)?;
                let mut n_extents = 0;
                // A binary search must not meet extents without bytes.
                for extent in extents.iter().filter(|it| 0 < it.len) {
                    let mut record = Vec::with_capacity(EXTENT_BYTES);
                    record.put_u64(extent.file_offset);
                    record.put_u64(extent.layer_offset);
                    record.put_u64(extent.len);
                    self.extents.append(&record)?;
                    n_extents += 1;
                }
                self.content_bytes = self.content_bytes.saturating_add(*size);
                Ok(Body {
                    size: *size,
                    layer,
                    ..body(file_type::REGULAR, first, n_extents)
                })
            }
            EntryKind::Symlink(target) => {
                let (at, len) = self.string(target)?;
                Ok(Body {
                    size: u64::from(len),
                    ..body(file_type::SYMLINK, at, len)
                })
            }
            EntryKind::CharDevice(major, minor) => Ok(body(file_type::CHAR_DEVICE, *major, *minor)),
            EntryKind::BlockDevice(major, minor) => {
                Ok(body(file_type::BLOCK_DEVICE, *major, *minor))
            }
            EntryKind::Fifo => Ok(body(file_type::FIFO, 0, 0)),
            EntryKind::Directory | EntryKind::HardLink(_) => {
                Err(IndexError::Truncated { what: "tree" })
            }
        }
    }

    /// Adds the extended attributes of a node; returns how many it has.
    fn put_xattrs(&mut self, entry: &EntryRef<'_>) -> Result<u32, IndexError> {
        let mut n_xattrs = 0;
        for (name, value) in &entry.xattrs {
            if is_dropped(name, value) {
                continue;
            }
            let (name_at, name_bytes) = self.string(name)?;
            let (value_at, value_bytes) = self.string(value)?;
            let mut record = Vec::with_capacity(XATTR_BYTES);
            for field in [name_at, name_bytes, value_at, value_bytes] {
                record.put_u32(field);
            }
            self.xattrs.append(&record)?;
            n_xattrs += 1;
        }
        Ok(n_xattrs)
    }

    /// Fills the place of node `number`, whose turn it is.
    fn put_node(
        &mut self,
        tree: &mut Tree<S>,
        number: u32,
        described: &mut Described,
    ) -> Result<(), IndexError> {
        let node = tree.node(NodeId(self.field(number, 0)?))?;
        let is_described = tree.read_description(node, described)?;
        let described = is_described.then(|| described.entry()).transpose()?;
        let (mut body, n_links) = match (node.kind, &described) {
            (Kind::Directory, _) => {
                let (body, n_subdirectories) = self.put_names(tree, node, number)?;
                // A directory has its own `.`, its name, and the `..` of each subdirectory.
                (body, n_subdirectories + 2)
            }
            (_, Some((layer, entry))) => {
                (self.put_body(*layer, entry)?, self.field(number, LINKS_AT)?)
            }
            (_, None) => return Err(IndexError::Truncated { what: "tree" }),
        };
        let first_xattr = count_of("xattrs", self.xattrs.len() / XATTR_BYTES as u64)?;
        let mut record = Vec::with_capacity(NODE_BYTES);
        let out = &mut record;
        let entry = described.as_ref().map(|(_, entry)| entry);
        body.mode |= entry.map_or(IMPLIED_MODE, |it| it.mode) & 0o7777;
        out.put_u32(body.mode);
        out.put_u32(entry.map_or(0, |it| it.uid));
        out.put_u32(entry.map_or(0, |it| it.gid));
        out.put_u32(n_links);
        out.put_u64(body.size);
        out.put_i64(entry.map_or(0, |it| it.mtime_seconds));
        out.put_u32(entry.map_or(0, |it| it.mtime_nanoseconds));
        out.put_u32(body.a);
        out.put_u32(body.b);
        out.put_u32(first_xattr);
        out.put_u32(entry.map_or(Ok(0), |it| self.put_xattrs(it))?);
        out.put_u32(self.field(number, PARENT_AT)?);
        out.put_u32(body.layer);
        out.put_u32(0);
        Ok(self.nodes.write(&record, place(number))?)
    }

    fn put_layer(&mut self, layer: &LayerRecord) -> Result<(), IndexError> {
        let mut record = Vec::with_capacity(LAYER_BYTES);
        record.put(layer.diff_id.as_bytes());
        record.put(layer.blob.as_bytes());
        record.put_u64(layer.blob_bytes);
        record.put_u64(layer.layer_bytes);
        record.put_u64(self.chunk_digests.len() / 32);
        record.put_u64((layer.chunk_digests.len() / 32) as u64);
        self.layers.append(&record)?;
        self.chunk_digests.append(&layer.chunk_digests)?;
        Ok(())
    }
}

/// Permissions of a directory that no layer describes; the rest of it is zeros: root's, at the epoch.
const IMPLIED_MODE: u32 = 0o755;

/// Whether an attribute is dropped, as tools do that unpack images: those about the machine that
/// wrote the layer would mislead this one, and an empty PAX record takes an attribute back.
fn is_dropped(name: &[u8], value: &[u8]) -> bool {
    value.is_empty() || name == b"security.selinux" || name.starts_with(b"trusted.overlay.")
}

/// Where a node's record is.
fn place(number: u32) -> u64 {
    u64::from(number) * NODE_BYTES as u64
}

/// Narrows a count to the 32 bits that the format gives it.
fn count_of(limit: &'static str, value: u64) -> Result<u32, IndexError> {
    count(limit, usize::try_from(value).unwrap_or(usize::MAX))
}

/// Writes the file.
///
/// # Errors
/// [`IndexError::Limit`] if a count does not fit the format, [`IndexError::Scratch`] if a file fails.
pub(super) fn write<S: Scratch>(
    mut tree: Tree<S>,
    layers: &[LayerRecord],
    manifest: ManifestDigest,
    file: &mut impl WriteAt,
) -> Result<(), IndexError> {
    let mut tables = Tables::new(&tree);
    let mut described = Described::default();
    tables.add_node(Tree::<S>::ROOT, 0)?;
    tree.set_number(Tree::<S>::ROOT, 0)?;
    let mut number = 0;
    while number < tables.n_nodes()? {
        tables.put_node(&mut tree, number, &mut described)?;
        number += 1;
    }
    drop(tree);
    for layer in layers {
        tables.put_layer(layer)?;
    }
    assemble(tables, manifest, file)
}

/// Puts header, padding, section header and tables one after the other.
fn assemble<S: Scratch>(
    tables: Tables<S>,
    manifest: ManifestDigest,
    file: &mut impl WriteAt,
) -> Result<(), IndexError> {
    drop(tables.interned);
    let mut parts: [(Paged<S>, usize); TABLES] = [
        (tables.nodes, NODE_BYTES),
        (tables.dirents, DIRENT_BYTES),
        (tables.extents, EXTENT_BYTES),
        (tables.xattrs, XATTR_BYTES),
        (tables.layers, LAYER_BYTES),
        (tables.chunk_digests, 32),
        (tables.strings, 1),
    ];
    // Tables begin at multiples of eight, which leaves a reader free to cast.
    let padded = |len: u64| len.next_multiple_of(8);
    let header_bytes = HEADER_BYTES as u64;
    let section_bytes = header_bytes + parts.iter().map(|(it, _)| padded(it.len())).sum::<u64>();
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.put(manifest.as_bytes());
    header.put_u64(tables.content_bytes);
    let mut at = header_bytes;
    for (table, record_bytes) in &parts {
        header.put_u64(at);
        header.put_u64(table.len() / *record_bytes as u64);
        at += padded(table.len());
    }
    // What precedes it is not hashed: see the end.
    let hashed = NATIVE_START + CHECKSUM_START + 32;
    header.resize(NATIVE_START + HEADER_BYTES - hashed, 0);
    let mut out = Output::new(file, hashed as u64);
    out.put(&header)?;
    for (table, _) in &mut parts {
        out.put_table(table)?;
        let padding = padded(table.len()) - table.len();
        // Less than eight.
        out.put(&[0; 8][..usize::try_from(padding).unwrap_or_default()])?;
    }
    let (checksum, _) = out.finish()?;
    let mut start = clip_header();
    debug_assert_eq!(start.len(), CLIP_HEADER_BYTES);
    start.resize(NATIVE_START, 0);
    start.put(NATIVE_MAGIC);
    start.put_u32(NATIVE_VERSION);
    start.put_u32(0);
    start.put_u64(section_bytes);
    start.put(checksum.as_bytes());
    Ok(file.write_at(&start, 0)?)
}
