//! Answers file system questions about an image, without a kernel.
//!
//! [`ClipFs`] joins an index (what the tree is) with the local data of its layers (what of its
//! bytes is here). It knows POSIX and nothing of FUSE; [`read`] knows how a file is put together.
//!
//! - A metadata question is answered from the index alone: no disk, no network, no wait.
//! - A read never fetches. It returns the bytes, or says which chunks are missing.
//! - Nothing changes: inode numbers, attributes and bytes are functions of the image.
//! - The index may be damaged or hostile. Then the answer is [`FsError::Damaged`], not a panic.

mod layer;
pub mod read;

use std::{fmt, io, ops::Range, sync::Arc};

use crate::{
    digest::DiffId,
    index::{
        image::{FileType, ImageIndex, Ino, Node},
        source::IndexBytes,
    },
    metrics::Metrics,
};

/// What `st_blksize` and the block size of statfs(2) say: the page size of the usual machine.
const BLOCK_BYTES: u32 = 4096;

/// Longest name (limits.h, `NAME_MAX`).
const MAX_NAME_BYTES: u8 = u8::MAX;

/// Local data of one layer, as far as it is present.
pub trait LayerData: Send + Sync + fmt::Debug {
    /// Names the uncompressed tar.
    fn diff_id(&self) -> DiffId;

    /// Size of the decompressed layer.
    fn layer_bytes(&self) -> u64;

    /// Whether all these chunks are present and verified.
    fn has(&self, chunks: Range<u32>) -> bool;

    /// A number that has changed if bytes of these chunks were taken away since it was read before, even
    /// if they have come again.
    fn n_evictions(&self, chunks: Range<u32>) -> u64;

    /// Fills `buf` from `offset` of the decompressed layer.
    ///
    /// Returns `false`, with `buf` in any state, if it would have to wait for the disk and `wait`
    /// is [`Wait::Never`]. What chunks that are not present yield is undefined.
    ///
    /// # Errors
    /// If the disk fails, or the layer ends before `buf` is full.
    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<bool>;
}

/// Whether a read may wait for the local disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// Only what the page cache holds.
    Never,
    /// The disk may be read.
    ForDisk,
}

/// The bytes of an index that several threads serve.
pub trait ServedBytes: IndexBytes + Send + Sync + fmt::Debug + 'static {}

impl<B: IndexBytes + Send + Sync + fmt::Debug + 'static> ServedBytes for B {}

/// What stat(2) says of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Its number.
    pub ino: Ino,
    /// What it is.
    pub file_type: FileType,
    /// Permission bits, setuid, setgid and sticky.
    pub permissions: u16,
    /// Number of hard links.
    pub n_links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
    /// Space it takes in units of 512 bytes, holes not counted.
    pub blocks: u64,
    /// Modification time, which is the time of access and change as well: seconds since 1970.
    pub mtime_seconds: i64,
    /// Modification time, the part below a second.
    pub mtime_nanoseconds: u32,
    /// Major and minor number of a device; zeros for anything else.
    pub device: (u32, u32),
    /// Preferred size of a read.
    pub block_bytes: u32,
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// What it names.
    pub attributes: Attributes,
    /// Where to go on behind this entry.
    pub next_offset: u64,
}

/// What statfs(2) says of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// Size of all files in units of `block_bytes`; none are free.
    pub blocks: u64,
    /// Number of inodes; none are free.
    pub inodes: u64,
    /// The unit.
    pub block_bytes: u32,
    /// Longest name.
    pub max_name_bytes: u32,
}

/// Says why a question has no answer. `fuse/errno.rs` says which errno it becomes.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// No such name, or no such inode.
    #[error("no such file or directory")]
    NotFound,
    /// Something else than a directory was to be searched or listed.
    #[error("not a directory")]
    NotDir,
    /// A directory was to be read as a file.
    #[error("is a directory")]
    IsDir,
    /// The inode is of a kind for which the question makes no sense.
    #[error("not possible for this type of file")]
    WrongType,
    /// The name is longer than any name can be.
    #[error("name too long")]
    NameTooLong,
    /// The image cannot be changed.
    #[error("images are read-only")]
    ReadOnly,
    /// The inode has no such extended attribute.
    #[error("no such extended attribute")]
    NoAttr,
    /// The index contradicts itself.
    #[error("index is damaged at inode {ino}: delete the cached index, it is rebuilt")]
    Damaged {
        /// The inode in question.
        ino: u64,
    },
    /// The local copy of a layer cannot be read.
    #[error("reading layer {layer} at {offset} from the local disk")]
    Io {
        /// The layer.
        layer: DiffId,
        /// Where, in the decompressed layer.
        offset: u64,
        /// What the disk said.
        #[source]
        source: io::Error,
    },
}

/// Says that an index and the layers given for it do not belong together.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayerMismatch {
    /// There are too many or too few.
    #[error("the index has {expected} layers, but {found} are given")]
    Count {
        /// How many the index has.
        expected: usize,
        /// How many were given.
        found: usize,
    },
    /// One is another layer.
    #[error("layer number {at} of the index is {expected}, but {found} is given")]
    DiffId {
        /// Its position, from the bottom.
        at: usize,
        /// What the index names.
        expected: DiffId,
        /// What was given.
        found: DiffId,
    },
}

/// The file system of one image.
#[derive(Debug)]
pub struct ClipFs<I> {
    index: ImageIndex<I>,
    layers: Vec<Arc<dyn LayerData>>,
    metrics: Metrics,
}

impl<I: ServedBytes> ClipFs<I> {
    /// Joins an index with the data of its layers, bottom first.
    ///
    /// # Errors
    /// [`LayerMismatch`] if these are not the layers that the index names.
    pub fn new(
        index: ImageIndex<I>,
        layers: Vec<Arc<dyn LayerData>>,
        metrics: Metrics,
    ) -> Result<Self, LayerMismatch> {
        let named: Vec<DiffId> = (0..index.n_layers())
            .filter_map(|at| Some(index.layer(at)?.diff_id))
            .collect();
        if named.len() != layers.len() {
            return Err(LayerMismatch::Count {
                expected: named.len(),
                found: layers.len(),
            });
        }
        for (at, (expected, layer)) in named.into_iter().zip(&layers).enumerate() {
            let found = layer.diff_id();
            if found != expected {
                return Err(LayerMismatch::DiffId {
                    at,
                    expected,
                    found,
                });
            }
        }
        let fs = Self {
            index,
            layers,
            metrics,
        };
        // Opening an index maps most of a small one: nothing for one mount, megabytes for fifty.
        fs.trim();
        Ok(fs)
    }

    /// The index that answers.
    pub fn index(&self) -> &ImageIndex<I> {
        &self.index
    }

    /// Where requests are counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Gives the pages of the index that requests touched back to the kernel.
    ///
    /// A walk through a large index would keep all of it resident: whoever sends requests calls this
    /// every now and then, and when a burst of them is over.
    pub fn trim(&self) {
        self.index.source().drop_resident();
    }

    /// Looks a name up in a directory.
    ///
    /// `.` and `..` are names too, `.` even in what is no directory: the kernel asks for them when
    /// it resolves a file handle (open_by_handle_at(2)).
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDir`], [`FsError::NameTooLong`], [`FsError::Damaged`].
    pub fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attributes, FsError> {
        let directory = self.node(parent)?;
        if name == b"." {
            return Ok(self.attributes_of(parent, &directory));
        }
        if directory.file_type != FileType::Directory {
            return Err(FsError::NotDir);
        }
        if usize::from(MAX_NAME_BYTES) < name.len() {
            return Err(FsError::NameTooLong);
        }
        let ino = match name {
            b".." => directory.parent(),
            _ => {
                let found = self.index.lookup(&directory, name);
                found.ok_or(FsError::NotFound)?
            }
        };
        let node = self
            .index
            .node(ino)
            .ok_or(FsError::Damaged { ino: ino.0 })?;
        Ok(self.attributes_of(ino, &node))
    }

    /// Returns the attributes of an inode.
    ///
    /// # Errors
    /// [`FsError::NotFound`].
    pub fn attributes(&self, ino: Ino) -> Result<Attributes, FsError> {
        Ok(self.attributes_of(ino, &self.node(ino)?))
    }

    /// Returns the target of a symbolic link.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::WrongType`], [`FsError::Damaged`].
    pub fn read_link(&self, ino: Ino) -> Result<&[u8], FsError> {
        let node = self.node(ino)?;
        if node.file_type != FileType::Symlink {
            return Err(FsError::WrongType);
        }
        let target = self.index.symlink_target(&node);
        target.ok_or(FsError::Damaged { ino: ino.0 })
    }

    /// Lists a directory from `offset`, which is 0 or the `next_offset` of an entry: `.`, `..`,
    /// then the names in byte order.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotDir`]; the entries themselves: [`FsError::Damaged`].
    pub fn read_dir(
        &self,
        ino: Ino,
        offset: u64,
    ) -> Result<impl Iterator<Item = Result<DirEntry<'_>, FsError>>, FsError> {
        let directory = self.node(ino)?;
        if directory.file_type != FileType::Directory {
            return Err(FsError::NotDir);
        }
        let end = u64::from(self.index.n_names(&directory)) + 2;
        Ok((offset..end).map(move |at| {
            let damaged = || FsError::Damaged { ino: ino.0 };
            let (name, child) = match at {
                0 => (&b"."[..], ino),
                1 => (&b".."[..], directory.parent()),
                _ => {
                    let number = u32::try_from(at - 2).map_err(|_| damaged())?;
                    self.index.name(&directory, number).ok_or_else(damaged)?
                }
            };
            let node = self.index.node(child).ok_or_else(damaged)?;
            Ok(DirEntry {
                name,
                attributes: self.attributes_of(child, &node),
                next_offset: at + 1,
            })
        }))
    }

    /// Whether any inode has extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.index.has_xattrs()
    }

    /// Returns the value of an extended attribute.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NoAttr`].
    pub fn get_xattr(&self, ino: Ino, name: &[u8]) -> Result<&[u8], FsError> {
        let node = self.node(ino)?;
        let mut xattrs = self.index.xattrs(&node);
        let found = xattrs.find(|(it, _)| *it == name);
        found.map(|(_, value)| value).ok_or(FsError::NoAttr)
    }

    /// Returns the names of an inode's extended attributes.
    ///
    /// # Errors
    /// [`FsError::NotFound`].
    pub fn list_xattrs(&self, ino: Ino) -> Result<Vec<&[u8]>, FsError> {
        let node = self.node(ino)?;
        Ok(self.index.xattrs(&node).map(|(name, _)| name).collect())
    }

    /// Returns the size of the image.
    pub fn statfs(&self) -> Statistics {
        Statistics {
            blocks: self.index.content_bytes().div_ceil(u64::from(BLOCK_BYTES)),
            inodes: self.index.n_nodes(),
            block_bytes: BLOCK_BYTES,
            max_name_bytes: u32::from(MAX_NAME_BYTES),
        }
    }

    fn node(&self, ino: Ino) -> Result<Node, FsError> {
        self.index.node(ino).ok_or(FsError::NotFound)
    }

    fn attributes_of(&self, ino: Ino, node: &Node) -> Attributes {
        Attributes {
            ino,
            file_type: node.file_type,
            permissions: node.permissions,
            n_links: node.n_links,
            uid: node.uid,
            gid: node.gid,
            size: node.size,
            blocks: self.allocated_bytes(node).div_ceil(512),
            mtime_seconds: node.mtime_seconds,
            mtime_nanoseconds: node.mtime_nanoseconds,
            device: node.device(),
            block_bytes: BLOCK_BYTES,
        }
    }

    /// Bytes of a node that are no hole.
    fn allocated_bytes(&self, node: &Node) -> u64 {
        /// Smaller files count in full: a hole in them is not worth touching the table of extents
        /// for, which would double the pages that a walk through the tree reads.
        const SMALL_FILE_BYTES: u64 = 64 << 10;
        match node.file_type {
            FileType::Regular if SMALL_FILE_BYTES < node.size => {
                let extents = self.index.extents(node, 0, node.size);
                extents.fold(0u64, |sum, it| sum.saturating_add(it.len))
            }
            FileType::Regular | FileType::Directory => node.size,
            FileType::Symlink | FileType::CharDevice | FileType::BlockDevice | FileType::Fifo => 0,
        }
    }
}
