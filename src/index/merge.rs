//! Applies layers to a tree, bottom to top, as the OCI image specification says.
//!
//! Rules, each with a test (OCI image-spec v1.1, layer.md, "Applying Changesets"):
//!
//! - A whiteout hides what the layers *below* have under its name; an opaque marker hides all that
//!   they have in its directory. Their place in the tar does not matter: they are applied before
//!   the layer's own entries.
//! - A directory over a directory changes its metadata and keeps its children; anything else
//!   replaces what was there, with all below it. Of two entries of one layer, the later one wins.
//! - A hard link is one more name of one node, also where the node is from a lower layer, and even
//!   where the same layer whites out the name it links to: so a renamed file is written.
//! - Directories that no layer describes are made: root's, 0755, at the epoch.
//! - The way to an entry leads through symbolic links, as it does for those who unpack; `..` and
//!   absolute targets stop at the root.

use super::{
    IndexError,
    layer_index::{EntryKind, EntryRef, LayerIndex},
    path::{self, NameKind, entry_error},
    scratch::{
        Scratch, WriteAt,
        sorted::{SortedMap, TextMap},
    },
    source::IndexBytes,
    tree::{Kind, Missing, NodeId, Tree},
    writer,
};
use crate::digest::{BlobDigest, DiffId, ManifestDigest};

/// Pages that are held of each map in [`Below`]: 64 KiB. Few layers need any.
const HELD_PAGES: usize = 16;

/// Bytes of a path that count as one component where the path is copied and looked up as a whole: a long one is
/// digested for that.
const BYTES_PER_COMPONENT: u64 = 64;

/// What the image index records of a layer.
#[derive(Debug)]
pub(super) struct LayerRecord {
    pub(super) diff_id: DiffId,
    pub(super) blob: BlobDigest,
    pub(super) blob_bytes: u64,
    pub(super) layer_bytes: u64,
    pub(super) chunk_digests: Box<[u8]>,
}

/// What one layer refers to in the layers below, noted before its whiteouts hide anything.
#[derive(Debug)]
struct Below<S> {
    /// What its hard links name, by target path.
    linked: TextMap<S>,
    /// Clean paths of symbolic links that it replaces by directories.
    ///
    /// Its whiteouts below such a path are about the directory, not about what the link led to.
    replaced_links: TextMap<S>,
}

/// The directory of the last entry, which is most often the next one's, too.
#[derive(Debug)]
struct Parent {
    components: Vec<Box<[u8]>>,
    node: NodeId,
}

/// Merges the layers of one image.
#[derive(Debug)]
pub struct Merge<S> {
    tree: Tree<S>,
    layers: Vec<LayerRecord>,
    /// Forgotten when a name is taken away or becomes another node's, by which the way may change.
    parent: Option<Parent>,
}

impl Merge<Vec<u8>> {
    /// Starts with an empty root directory, in memory; more than `max_nodes` are refused.
    pub fn new(max_nodes: u32) -> Self {
        Self::in_scratch(&Vec::new(), max_nodes)
    }

    /// Returns the tree of `manifest` as a `.clip` file.
    ///
    /// # Errors
    /// If the tree does not fit the format.
    pub fn finish(self, manifest: ManifestDigest) -> Result<Vec<u8>, IndexError> {
        let mut file = Vec::new();
        self.finish_in(&mut file, manifest)?;
        Ok(file)
    }
}

impl<S: Scratch> Merge<S> {
    /// Starts with an empty root directory, and holds no more than some MiB: what is more is in files
    /// like `scratch`. More than `max_nodes` are refused.
    pub fn in_scratch(scratch: &S, max_nodes: u32) -> Self {
        Self {
            tree: Tree::new(scratch, max_nodes),
            layers: Vec::new(),
            parent: None,
        }
    }

    /// Applies the next layer up. `blob` and `blob_bytes` say what the registry calls it.
    ///
    /// # Errors
    /// [`IndexError::Entry`] names the first entry that cannot be applied.
    pub fn add_layer<B: IndexBytes>(
        &mut self,
        layer: &LayerIndex<B>,
        blob: BlobDigest,
        blob_bytes: u64,
    ) -> Result<(), IndexError> {
        let number = super::wire::count("layers", self.layers.len())?;
        let mut below = Below {
            linked: SortedMap::new(self.tree.another(), HELD_PAGES).into(),
            replaced_links: SortedMap::new(self.tree.another(), HELD_PAGES).into(),
        };
        // The lowest layer has nothing below.
        if 0 < number {
            for entry in entries(layer) {
                self.tree.look();
                self.note(&entry?, &mut below)?;
            }
            for entry in entries(layer) {
                self.tree.look();
                self.hide(entry?.path, &mut below)?;
            }
        }
        self.parent = None;
        for entry in entries(layer) {
            self.tree.look();
            self.apply(&entry?, number, &mut below)?;
        }
        self.layers.push(LayerRecord {
            diff_id: layer.diff_id(),
            blob,
            blob_bytes,
            layer_bytes: layer.layer_bytes(),
            chunk_digests: layer.chunk_digest_bytes().into(),
        });
        Ok(())
    }

    /// Writes the tree of `manifest` as a `.clip` file to `file`, which is empty.
    ///
    /// # Errors
    /// If the tree does not fit the format, or if a file fails.
    pub fn finish_in(
        self,
        file: &mut impl WriteAt,
        manifest: ManifestDigest,
    ) -> Result<(), IndexError> {
        writer::write(self.tree, &self.layers, manifest, file)
    }

    /// Notes what the entry refers to in the layers below.
    fn note(&mut self, entry: &EntryRef<'_>, below: &mut Below<S>) -> Result<(), IndexError> {
        match entry.kind {
            EntryKind::HardLink(target) => {
                if let Some(node) = self.lookup(target, entry.path)? {
                    below.linked.insert(target, node.0)?;
                }
            }
            EntryKind::Directory => {
                if let Some(node) = self.lookup(entry.path, entry.path)?
                    && self.tree.node(node)?.kind == Kind::Symlink
                {
                    let link = path::components(entry.path)?.join(&b'/');
                    below.replaced_links.insert(&link, node.0)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Applies the entry at `path` if it is a whiteout or an opaque marker.
    fn hide(&mut self, path: &[u8], below: &mut Below<S>) -> Result<(), IndexError> {
        let components = path::components(path)?;
        let Some((name, parents)) = components.split_last() else {
            return Ok(());
        };
        let kind = path::name_kind(name);
        if !matches!(kind, NameKind::Whiteout(_) | NameKind::Opaque) {
            return Ok(());
        }
        if !below.replaced_links.is_empty() {
            for len in 1..=parents.len() {
                let link = parents[..len].join(&b'/');
                let n_bytes = link.len() as u64;
                self.tree.count_walked(1 + n_bytes / BYTES_PER_COMPONENT)?;
                if below.replaced_links.get(&link)?.is_some() {
                    return Ok(());
                }
            }
        }
        let Some(directory) = self.tree.directory(parents, Missing::Leave, path)? else {
            return Ok(());
        };
        match kind {
            NameKind::Whiteout(hidden) => self.tree.remove(directory, hidden),
            NameKind::Opaque => self.tree.clear(directory),
            NameKind::Plain | NameKind::Ignored => Ok(()),
        }
    }

    /// Applies the entry if it is a file of the layer.
    fn apply(
        &mut self,
        entry: &EntryRef<'_>,
        layer: u32,
        below: &mut Below<S>,
    ) -> Result<(), IndexError> {
        let components = path::components(entry.path)?;
        let Some((name, parents)) = components.split_last() else {
            return self.apply_root(entry, layer);
        };
        if path::name_kind(name) != NameKind::Plain {
            return Ok(());
        }
        let parent = self.parent(parents, entry.path)?;
        let node = match (&entry.kind, kind_of(entry)?) {
            (EntryKind::HardLink(target), _) => self.link_target(target, entry.path, below)?,
            (_, Kind::Directory) => {
                let old = self.tree.child(parent, name)?;
                if let Some(old) = old
                    && self.tree.node(old)?.kind == Kind::Directory
                {
                    let description = self.tree.describe(layer, entry)?;
                    return self.tree.redescribe(old, description);
                }
                self.add(entry, layer, Kind::Directory)?
            }
            (_, kind) => self.add(entry, layer, kind)?,
        };
        if self.tree.insert(parent, name, node)? {
            self.parent = None;
        }
        Ok(())
    }

    /// Makes the node that the entry describes.
    fn add(&mut self, entry: &EntryRef<'_>, layer: u32, kind: Kind) -> Result<NodeId, IndexError> {
        let description = self.tree.describe(layer, entry)?;
        self.tree.add(kind, Some(description))
    }

    /// The directory at `parents`, made where it is missing, of the entry at `path`.
    fn parent(&mut self, parents: &[&[u8]], path: &[u8]) -> Result<NodeId, IndexError> {
        if let Some(parent) = &self.parent
            && parent
                .components
                .iter()
                .map(|it| &**it)
                .eq(parents.iter().copied())
        {
            return Ok(parent.node);
        }
        let node = self
            .tree
            .directory(parents, Missing::Create, path)?
            .ok_or_else(|| entry_error(path, "its parent cannot be made"))?;
        self.parent = Some(Parent {
            components: parents.iter().map(|it| Box::from(*it)).collect(),
            node,
        });
        Ok(node)
    }

    /// Applies an entry for the root directory itself, such as `./`.
    fn apply_root(&mut self, entry: &EntryRef<'_>, layer: u32) -> Result<(), IndexError> {
        if !matches!(entry.kind, EntryKind::Directory) {
            return Err(entry_error(entry.path, "the root can only be a directory"));
        }
        let description = self.tree.describe(layer, entry)?;
        self.tree.redescribe(Tree::<S>::ROOT, description)
    }

    /// Finds what a hard link at `path` is another name of.
    fn link_target(
        &mut self,
        target: &[u8],
        path: &[u8],
        below: &mut Below<S>,
    ) -> Result<NodeId, IndexError> {
        let node = match self.lookup(target, path)? {
            Some(node) => Some(node),
            None => below.linked.get(target)?.map(NodeId),
        };
        let node = node
            .ok_or_else(|| entry_error(path, "it is a hard link to a file that does not exist"))?;
        if self.tree.node(node)?.kind == Kind::Directory {
            return Err(entry_error(path, "it is a hard link to a directory"));
        }
        Ok(node)
    }

    /// Finds the node at `target`, a link target of the entry at `path`.
    fn lookup(&mut self, target: &[u8], path: &[u8]) -> Result<Option<NodeId>, IndexError> {
        let components = path::components(target)?;
        let Some((name, parents)) = components.split_last() else {
            return Ok(Some(Tree::<S>::ROOT));
        };
        match self.tree.directory(parents, Missing::Leave, path)? {
            Some(directory) => self.tree.child(directory, name),
            None => Ok(None),
        }
    }
}

/// All entries of a layer, of whose index no more than a part stays resident.
fn entries<B: IndexBytes>(
    layer: &LayerIndex<B>,
) -> impl Iterator<Item = Result<EntryRef<'_>, IndexError>> {
    const AT_ONCE: usize = 1024;
    let numbered = layer.entries().enumerate();
    numbered.map(|(number, entry)| {
        if number.is_multiple_of(AT_ONCE) {
            layer.source().drop_resident();
        }
        entry
    })
}

/// What kind of node an entry makes.
fn kind_of(entry: &EntryRef<'_>) -> Result<Kind, IndexError> {
    match entry.kind {
        EntryKind::Directory => Ok(Kind::Directory),
        EntryKind::Symlink(target) => match target.len() {
            1..=path::MAX_PATH_BYTES => Ok(Kind::Symlink),
            _ => Err(entry_error(
                entry.path,
                "its link target is empty or too long",
            )),
        },
        EntryKind::File { .. }
        | EntryKind::HardLink(_)
        | EntryKind::CharDevice(..)
        | EntryKind::BlockDevice(..)
        | EntryKind::Fifo => Ok(Kind::Other),
    }
}

#[cfg(test)]
mod tests;
