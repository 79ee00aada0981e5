//! What one layer contains: its tar entries in tar order, and the digests of its chunks.
//!
//! A function of the decompressed tar alone. It is built while the layer streams to disk, kept
//! beside the layer, and shared through the remote content cache.

use super::{
    IndexError,
    scratch::{Scratch, WriteAt, output::Output, paged::Paged},
    source::{self, IndexBytes},
    wire::{Reader, Write, count},
};
use crate::{
    chunk,
    digest::{ChunkDigest, DiffId},
    tar::{TarEntry, TarExtent, TarKind},
};

/// First bytes of a layer index.
const MAGIC: &[u8; 8] = b"CLIPLYIX";

/// Version of the format: raise it with every change of the bytes.
pub const LAYER_INDEX_VERSION: u32 = 1;

/// Bytes before the chunk digests.
const HEADER_BYTES: usize = 8 + 4 + 4 + 32 + 4 * 8;

/// Bytes of the BLAKE3 at the end, over all that precedes it.
const CHECKSUM_BYTES: usize = 32;

/// What errors call this format.
const WHAT: &str = "layer index";

const KIND_FILE: u8 = 0;
const KIND_HARD_LINK: u8 = 1;
const KIND_SYMLINK: u8 = 2;
const KIND_DIRECTORY: u8 = 3;
const KIND_CHAR_DEVICE: u8 = 4;
const KIND_BLOCK_DEVICE: u8 = 5;
const KIND_FIFO: u8 = 6;

/// Pages of entries that a builder holds: they are only appended.
const HELD_PAGES: usize = 16;

/// Collects the entries of a layer while it streams by, in a scratch file.
#[derive(Debug)]
pub struct LayerIndexBuilder<S> {
    entries: Paged<S>,
    n_entries: u64,
    chunk_digests: Vec<u8>,
    /// The entry that is being encoded.
    entry: Vec<u8>,
}

/// In memory.
impl Default for LayerIndexBuilder<Vec<u8>> {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl LayerIndexBuilder<Vec<u8>> {
    /// Closes the index of the layer `diff_id`, whose tar has `layer_bytes`.
    pub fn finish(self, diff_id: DiffId, layer_bytes: u64) -> Vec<u8> {
        let mut out = Vec::new();
        let finished = self.finish_in(&mut out, diff_id, layer_bytes);
        finished.expect("memory is no file that could fail");
        out
    }
}

impl<S: Scratch> LayerIndexBuilder<S> {
    /// Collects in `scratch`, which is empty.
    pub fn new(scratch: S) -> Self {
        Self {
            entries: Paged::new(scratch, HELD_PAGES),
            n_entries: 0,
            chunk_digests: Vec::new(),
            entry: Vec::new(),
        }
    }

    /// Adds the next entry of the tar.
    ///
    /// # Errors
    /// If a count or a length does not fit the format, or if the scratch file fails.
    pub fn push_entry(&mut self, entry: &TarEntry) -> Result<(), IndexError> {
        self.entry.clear();
        let out = &mut self.entry;
        let kind = match &entry.kind {
            TarKind::File { .. } => KIND_FILE,
            TarKind::HardLink(_) => KIND_HARD_LINK,
            TarKind::Symlink(_) => KIND_SYMLINK,
            TarKind::Directory => KIND_DIRECTORY,
            TarKind::CharDevice { .. } => KIND_CHAR_DEVICE,
            TarKind::BlockDevice { .. } => KIND_BLOCK_DEVICE,
            TarKind::Fifo => KIND_FIFO,
        };
        out.put_u8(kind);
        out.put_u16(u16::try_from(entry.mode & 0o7777).unwrap_or_default());
        out.put_u32(entry.uid);
        out.put_u32(entry.gid);
        out.put_i64(entry.mtime_seconds);
        out.put_u32(entry.mtime_nanoseconds);
        out.put_counted(&entry.path)?;
        match &entry.kind {
            TarKind::File { size, extents } => {
                out.put_u64(*size);
                out.put_u32(count("extents of a file", extents.len())?);
                for extent in extents {
                    out.put_u64(extent.file_offset);
                    out.put_u64(extent.layer_offset);
                    out.put_u64(extent.len);
                }
            }
            TarKind::HardLink(target) | TarKind::Symlink(target) => out.put_counted(target)?,
            TarKind::CharDevice { major, minor } | TarKind::BlockDevice { major, minor } => {
                out.put_u32(*major);
                out.put_u32(*minor);
            }
            TarKind::Directory | TarKind::Fifo => {}
        }
        out.put_u32(count("xattrs of a file", entry.xattrs.len())?);
        for (name, value) in &entry.xattrs {
            out.put_counted(name)?;
            out.put_counted(value)?;
        }
        self.entries.append(&self.entry)?;
        self.n_entries += 1;
        Ok(())
    }

    /// Adds the digest of the next chunk.
    pub fn push_chunk(&mut self, digest: &ChunkDigest) {
        self.chunk_digests.put(digest.as_bytes());
    }

    /// Bytes that the index has so far: what a limit on indexes is compared with.
    pub fn index_bytes(&self) -> u64 {
        self.entries.len() + self.chunk_digests.len() as u64
    }

    /// Closes the index of the layer `diff_id`, whose tar has `layer_bytes`, and writes it to `file`,
    /// which is empty.
    ///
    /// # Errors
    /// If one of the files fails.
    pub fn finish_in(
        mut self,
        file: &mut impl WriteAt,
        diff_id: DiffId,
        layer_bytes: u64,
    ) -> Result<(), IndexError> {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.put(MAGIC);
        header.put_u32(LAYER_INDEX_VERSION);
        header.put_u32(0);
        header.put(diff_id.as_bytes());
        header.put_u64(layer_bytes);
        header.put_u64((self.chunk_digests.len() / 32) as u64);
        header.put_u64(self.n_entries);
        header.put_u64(self.entries.len());
        let mut out = Output::new(file, 0);
        out.put(&header)?;
        out.put(&self.chunk_digests)?;
        out.put_table(&mut self.entries)?;
        let (checksum, end) = out.finish()?;
        file.write_at(checksum.as_bytes(), end)?;
        Ok(())
    }
}

/// A layer index, checked as a whole; entries are decoded as they are iterated.
#[derive(Debug, Clone)]
pub struct LayerIndex<B> {
    bytes: B,
    diff_id: DiffId,
    layer_bytes: u64,
    n_chunks: u32,
    n_entries: u64,
}

impl<B: IndexBytes> LayerIndex<B> {
    /// Reads a layer index and checks its version, its lengths and its checksum.
    ///
    /// # Errors
    /// [`IndexError`] says which of them is wrong.
    pub fn decode(bytes: B) -> Result<Self, IndexError> {
        let body_bytes = bytes
            .len()
            .checked_sub(CHECKSUM_BYTES)
            .ok_or(IndexError::Truncated { what: WHAT })?;
        let (body, checksum) = bytes.split_at(body_bytes);
        let mut reader = Reader::new(body, WHAT);
        if reader.array::<8>()? != *MAGIC {
            return Err(IndexError::Magic { what: WHAT });
        }
        let version = reader.u32()?;
        if version != LAYER_INDEX_VERSION {
            return Err(IndexError::Version {
                what: WHAT,
                found: version,
                max: LAYER_INDEX_VERSION,
            });
        }
        if source::hash(&bytes, 0..body_bytes).as_bytes() != checksum {
            return Err(IndexError::Checksum { what: WHAT });
        }
        let _reserved = reader.u32()?;
        let diff_id = DiffId::from_bytes(reader.array()?);
        let layer_bytes = reader.u64()?;
        let n_chunks = reader.u64()?;
        let n_entries = reader.u64()?;
        let entries_bytes = reader.u64()?;
        let digest_bytes = n_chunks.checked_mul(32);
        let expected = digest_bytes.and_then(|it| {
            it.checked_add(entries_bytes)?
                .checked_add(HEADER_BYTES as u64)
        });
        if n_chunks != chunk::n_chunks(layer_bytes) || expected != Some(body_bytes as u64) {
            return Err(IndexError::Truncated { what: WHAT });
        }
        let n_chunks = u32::try_from(n_chunks).map_err(|_| IndexError::Truncated { what: WHAT })?;
        Ok(Self {
            bytes,
            diff_id,
            layer_bytes,
            n_chunks,
            n_entries,
        })
    }

    /// Names the layer.
    pub fn diff_id(&self) -> DiffId {
        self.diff_id
    }

    /// Size of the decompressed tar.
    pub fn layer_bytes(&self) -> u64 {
        self.layer_bytes
    }

    /// How many chunks the layer has.
    pub fn n_chunks(&self) -> u32 {
        self.n_chunks
    }

    /// How many entries the tar has.
    pub fn n_entries(&self) -> u64 {
        self.n_entries
    }

    /// The digest of chunk `chunk`, or `None` if the layer has no such chunk.
    pub fn chunk_digest(&self, chunk: u32) -> Option<ChunkDigest> {
        if self.n_chunks <= chunk {
            return None;
        }
        let at = HEADER_BYTES + usize::try_from(chunk).ok()? * 32;
        Some(ChunkDigest::from_bytes(
            *self.bytes.get(at..)?.first_chunk()?,
        ))
    }

    /// The digests of all chunks, 32 bytes each.
    pub(super) fn chunk_digest_bytes(&self) -> &[u8] {
        let digest_bytes = usize::try_from(self.n_chunks).unwrap_or(0) * 32;
        &self.bytes[HEADER_BYTES..HEADER_BYTES + digest_bytes]
    }

    /// Where in the index the digests of the chunks stand.
    pub fn digests_start(&self) -> usize {
        HEADER_BYTES
    }

    /// Where in the index the checksum of all that precedes it stands.
    pub fn body_end(&self) -> usize {
        self.bytes.len() - CHECKSUM_BYTES
    }

    /// Where the index is kept.
    pub fn source(&self) -> &B {
        &self.bytes
    }

    /// The whole index, as it is stored.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// BLAKE3 of the whole index, as it is stored.
    pub fn digest(&self) -> ChunkDigest {
        let digest = source::hash(&self.bytes, 0..self.bytes.len());
        ChunkDigest::from_bytes(digest.into())
    }

    /// Iterates over the entries in tar order.
    pub fn entries(&self) -> Entries<'_> {
        let start = HEADER_BYTES + self.chunk_digest_bytes().len();
        let end = self.bytes.len() - CHECKSUM_BYTES;
        Entries {
            reader: Reader::new(&self.bytes[start..end], WHAT),
            layer_bytes: self.layer_bytes,
            failed: false,
        }
    }
}

/// Iterates over the entries of a layer index.
#[derive(Debug)]
pub struct Entries<'a> {
    reader: Reader<'a>,
    layer_bytes: u64,
    failed: bool,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<EntryRef<'a>, IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed || self.reader.is_at_end() {
            return None;
        }
        let entry = EntryRef::read(&mut self.reader, self.layer_bytes);
        self.failed = entry.is_err();
        Some(entry)
    }
}

/// One entry of a layer, borrowed from its index.
#[derive(Debug, Clone)]
pub struct EntryRef<'a> {
    /// The path as the archive has it.
    pub path: &'a [u8],
    /// What it is.
    pub kind: EntryKind<'a>,
    /// Permission bits, setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime_seconds: i64,
    /// Modification time, the part below a second.
    pub mtime_nanoseconds: u32,
    /// Extended attributes, as `(name, value)`.
    pub xattrs: Vec<(&'a [u8], &'a [u8])>,
    /// The entry as the index has it.
    pub(super) encoded: &'a [u8],
}

/// What an entry is.
#[derive(Debug, Clone)]
pub enum EntryKind<'a> {
    /// A regular file.
    File {
        /// Its size, holes included.
        size: u64,
        /// Where its data lies, in file order, without overlap.
        extents: Vec<TarExtent>,
    },
    /// Another name of the file at this path.
    HardLink(&'a [u8]),
    /// A symbolic link with this target.
    Symlink(&'a [u8]),
    /// A directory.
    Directory,
    /// A character device.
    CharDevice(u32, u32),
    /// A block device.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

impl<'a> EntryRef<'a> {
    /// Reads an entry out of `encoded`, which has that and no more.
    pub(super) fn decode(encoded: &'a [u8]) -> Result<Self, IndexError> {
        Self::read(&mut Reader::new(encoded, WHAT), u64::MAX)
    }

    fn read(reader: &mut Reader<'a>, layer_bytes: u64) -> Result<Self, IndexError> {
        let start = *reader;
        let kind = reader.u8()?;
        let mode = u32::from(reader.u16()?) & 0o7777;
        let uid = reader.u32()?;
        let gid = reader.u32()?;
        let mtime_seconds = reader.i64()?;
        let mtime_nanoseconds = reader.u32()?;
        let path = reader.counted()?;
        let kind = match kind {
            KIND_FILE => {
                let size = reader.u64()?;
                EntryKind::File {
                    size,
                    extents: read_extents(reader, size, layer_bytes)?,
                }
            }
            KIND_HARD_LINK => EntryKind::HardLink(reader.counted()?),
            KIND_SYMLINK => EntryKind::Symlink(reader.counted()?),
            KIND_DIRECTORY => EntryKind::Directory,
            KIND_CHAR_DEVICE => EntryKind::CharDevice(reader.u32()?, reader.u32()?),
            KIND_BLOCK_DEVICE => EntryKind::BlockDevice(reader.u32()?, reader.u32()?),
            KIND_FIFO => EntryKind::Fifo,
            _ => return Err(IndexError::Truncated { what: WHAT }),
        };
        let n_xattrs = reader.u32()?;
        let mut xattrs = Vec::new();
        for _ in 0..n_xattrs {
            xattrs.push((reader.counted()?, reader.counted()?));
        }
        Ok(Self {
            path,
            kind,
            mode,
            uid,
            gid,
            mtime_seconds,
            mtime_nanoseconds,
            xattrs,
            encoded: start.until(reader),
        })
    }
}

/// Reads extents and checks that they lie in the file and in the layer, in order.
fn read_extents(
    reader: &mut Reader<'_>,
    size: u64,
    layer_bytes: u64,
) -> Result<Vec<TarExtent>, IndexError> {
    let n_extents = reader.u32()?;
    let mut extents = Vec::new();
    let mut file_end = 0;
    for _ in 0..n_extents {
        let extent = TarExtent {
            file_offset: reader.u64()?,
            layer_offset: reader.u64()?,
            len: reader.u64()?,
        };
        let ends = extent
            .file_offset
            .checked_add(extent.len)
            .zip(extent.layer_offset.checked_add(extent.len));
        match ends {
            Some((in_file, in_layer))
                if file_end <= extent.file_offset && in_file <= size && in_layer <= layer_bytes =>
            {
                file_end = in_file;
            }
            _ => {
                return Err(IndexError::Truncated {
                    what: "extent of a layer index",
                });
            }
        }
        extents.push(extent);
    }
    Ok(extents)
}

#[cfg(test)]
mod tests;
