//! Makes the content of directories: blocks of names in order, each block with its own names behind what
//! they name.

use super::{
    ErofsError,
    format::{BLOCK_LEN, DIRENT_BYTES, dirent},
    plan::{GIVE_BACK_EVERY, Plan, node},
};
use crate::index::{
    image::{FileType, Ino, Node},
    source::IndexBytes,
};

/// Longest name (NAME_MAX).
const MAX_NAME_BYTES: usize = 255;

/// Goes through directories in their order and checks that they make a tree.
#[derive(Debug)]
pub(super) struct Directories<'a, 'b, B> {
    plan: &'b Plan<'a, B>,
    /// The directory that was named last: each is named once, in the order of their numbers.
    last: Ino,
    n_names: u64,
    block: Block,
}

impl<'a, 'b, B: IndexBytes> Directories<'a, 'b, B> {
    pub(super) fn new(plan: &'b Plan<'a, B>) -> Self {
        Self {
            plan,
            last: Ino::ROOT,
            n_names: 0,
            block: Block::default(),
        }
    }

    /// Hands the blocks of the directory `ino` to `put`, and returns how many there are.
    ///
    /// # Errors
    /// Those of [`ErofsError`], and of `put`.
    pub(super) fn write(
        &mut self,
        directory: &Node,
        ino: Ino,
        mut put: impl FnMut(&[u8]) -> Result<(), ErofsError>,
    ) -> Result<u64, ErofsError> {
        let index = self.plan.index;
        let parent = match ino {
            Ino::ROOT => Ino::ROOT,
            _ => directory.parent(),
        };
        let mut n_blocks = 0;
        let mut own = [(&b"."[..], ino), (&b".."[..], parent)]
            .into_iter()
            .peekable();
        let mut before: Option<&[u8]> = None;
        let damaged = |what| ErofsError::Damaged { ino, what };
        for at in 0..index.n_names(directory) {
            let named = index.name(directory, at);
            let (name, child) = named.ok_or(damaged("a name that cannot be read"))?;
            if !is_name(name) || before.is_some_and(|it| name <= it) {
                return Err(damaged("names of a directory"));
            }
            before = Some(name);
            while let Some((name, own)) = own.next_if(|it| it.0 < name) {
                n_blocks += self.add(name, own, FileType::Directory, &mut put)?;
            }
            let file_type = node(index, child)?.file_type;
            if file_type == FileType::Directory {
                self.adopt(ino, child)?;
            }
            n_blocks += self.add(name, child, file_type, &mut put)?;
        }
        for (name, own) in own {
            n_blocks += self.add(name, own, FileType::Directory, &mut put)?;
        }
        Ok(n_blocks + self.block.flush(&mut put)?)
    }

    /// Checks that a directory is named by its parent alone, and once: what is no tree has no place in the
    /// kernel.
    fn adopt(&mut self, parent: Ino, child: Ino) -> Result<(), ErofsError> {
        if child <= self.last || node(self.plan.index, child)?.parent() != parent {
            let what = "a directory with two places";
            return Err(ErofsError::Damaged { ino: child, what });
        }
        self.last = child;
        Ok(())
    }

    fn add(
        &mut self,
        name: &[u8],
        ino: Ino,
        file_type: FileType,
        put: &mut impl FnMut(&[u8]) -> Result<(), ErofsError>,
    ) -> Result<u64, ErofsError> {
        let n_flushed = match self.block.has_room(name) {
            true => 0,
            false => self.block.flush(put)?,
        };
        self.block.add(name, self.plan.nid(ino)?, file_type);
        self.n_names += 1;
        if self.n_names.is_multiple_of(GIVE_BACK_EVERY) {
            self.plan.index.source().drop_resident();
        }
        Ok(n_flushed)
    }
}

fn is_name(name: &[u8]) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && !name.iter().any(|it| matches!(it, b'/' | 0))
        && !matches!(name, b"." | b"..")
}

/// A block in the making.
#[derive(Debug, Default)]
struct Block {
    named: Vec<(u64, FileType, usize)>,
    names: Vec<u8>,
}

impl Block {
    fn has_room(&self, name: &[u8]) -> bool {
        let used = self.named.len() * DIRENT_BYTES + self.names.len();
        used + DIRENT_BYTES + name.len() <= BLOCK_LEN
    }

    fn add(&mut self, name: &[u8], nid: u64, file_type: FileType) {
        self.named.push((nid, file_type, self.names.len()));
        self.names.extend_from_slice(name);
    }

    /// Hands the block on if there is anything in it; returns how many that are.
    fn flush(
        &mut self,
        put: &mut impl FnMut(&[u8]) -> Result<(), ErofsError>,
    ) -> Result<u64, ErofsError> {
        if self.named.is_empty() {
            return Ok(0);
        }
        let mut out = Vec::with_capacity(BLOCK_LEN);
        let names_start = self.named.len() * DIRENT_BYTES;
        for (nid, file_type, at) in self.named.drain(..) {
            // Within a block.
            let name_start = u16::try_from(names_start + at).unwrap_or(u16::MAX);
            out.extend_from_slice(&dirent(nid, name_start, file_type));
        }
        out.append(&mut self.names);
        out.resize(BLOCK_LEN, 0);
        put(&out)?;
        Ok(1)
    }
}
