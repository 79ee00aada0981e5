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

use std::collections::{HashMap, HashSet};

use super::{
    IndexError,
    layer_index::{EntryKind, EntryRef, LayerIndex},
    path::{self, NameKind, entry_error},
    source::IndexBytes,
    tree::{Body, Children, Meta, Missing, Node, NodeId, Tree},
    writer,
};
use crate::{
    digest::{BlobDigest, DiffId, ManifestDigest},
    tar::TarExtent,
};

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
#[derive(Debug, Default)]
struct Below {
    /// What its hard links name, by target path.
    linked: HashMap<Box<[u8]>, NodeId>,
    /// Clean paths of symbolic links that it replaces by directories.
    ///
    /// Its whiteouts below such a path are about the directory, not about what the link led to.
    replaced_links: HashSet<Vec<u8>>,
}

/// Merges the layers of one image.
#[derive(Debug)]
pub struct Merge {
    tree: Tree,
    layers: Vec<LayerRecord>,
}

impl Merge {
    /// Starts with an empty root directory; more than `max_nodes` are refused.
    pub fn new(max_nodes: u32) -> Self {
        Self {
            tree: Tree::new(max_nodes),
            layers: Vec::new(),
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
        let mut below = Below::default();
        for entry in entries(layer) {
            self.note(&entry?, &mut below)?;
        }
        for entry in entries(layer) {
            self.hide(entry?.path, &below)?;
        }
        for entry in entries(layer) {
            self.apply(&entry?, number, &below)?;
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

    /// Writes the tree of `manifest` as a `.clip` file.
    ///
    /// # Errors
    /// If the tree does not fit the format.
    pub fn finish(self, manifest: ManifestDigest) -> Result<Vec<u8>, IndexError> {
        writer::write(&self.tree, &self.layers, manifest)
    }

    /// Notes what the entry refers to in the layers below.
    fn note(&mut self, entry: &EntryRef<'_>, below: &mut Below) -> Result<(), IndexError> {
        match entry.kind {
            EntryKind::HardLink(target) => {
                if let Some(node) = self.lookup(target, entry.path)? {
                    below.linked.insert(target.into(), node);
                }
            }
            EntryKind::Directory => {
                let node = self.lookup(entry.path, entry.path)?;
                if node.is_some_and(|it| matches!(self.tree.node(it).body, Body::Symlink(_))) {
                    below
                        .replaced_links
                        .insert(path::components(entry.path)?.join(&b'/'));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Applies the entry at `path` if it is a whiteout or an opaque marker.
    fn hide(&mut self, path: &[u8], below: &Below) -> Result<(), IndexError> {
        let components = path::components(path)?;
        let Some((name, parents)) = components.split_last() else {
            return Ok(());
        };
        let kind = path::name_kind(name);
        if !matches!(kind, NameKind::Whiteout(_) | NameKind::Opaque) {
            return Ok(());
        }
        let is_new = |len| below.replaced_links.contains(&parents[..len].join(&b'/'));
        if !below.replaced_links.is_empty() && (1..=parents.len()).any(is_new) {
            return Ok(());
        }
        let Some(directory) = self.tree.directory(parents, Missing::Leave, path)? else {
            return Ok(());
        };
        if let Some(children) = self.tree.children_mut(directory) {
            match kind {
                NameKind::Whiteout(hidden) => drop(children.remove(hidden)),
                NameKind::Opaque => children.clear(),
                NameKind::Plain | NameKind::Ignored => {}
            }
        }
        Ok(())
    }

    /// Applies the entry if it is a file of the layer.
    fn apply(&mut self, entry: &EntryRef<'_>, layer: u32, below: &Below) -> Result<(), IndexError> {
        let components = path::components(entry.path)?;
        let Some((name, parents)) = components.split_last() else {
            return self.apply_root(entry);
        };
        if path::name_kind(name) != NameKind::Plain {
            return Ok(());
        }
        let Some(parent) = self.tree.directory(parents, Missing::Create, entry.path)? else {
            return Err(entry_error(entry.path, "its parent cannot be made"));
        };
        let node = if let EntryKind::HardLink(target) = entry.kind {
            self.link_target(target, entry.path, below)?
        } else {
            let old = self
                .tree
                .children(parent)
                .and_then(|it| it.get(*name))
                .copied();
            match (old, &entry.kind) {
                (Some(old), EntryKind::Directory) if self.tree.children(old).is_some() => {
                    let node = self.tree.node_mut(old);
                    node.meta = meta(entry);
                    node.xattrs = xattrs(entry);
                    return Ok(());
                }
                _ => self.tree.add(new_node(entry, layer)?)?,
            }
        };
        if let Some(children) = self.tree.children_mut(parent) {
            children.insert(Box::from(*name), node);
        }
        Ok(())
    }

    /// Applies an entry for the root directory itself, such as `./`.
    fn apply_root(&mut self, entry: &EntryRef<'_>) -> Result<(), IndexError> {
        if !matches!(entry.kind, EntryKind::Directory) {
            return Err(entry_error(entry.path, "the root can only be a directory"));
        }
        let root = self.tree.node_mut(Tree::ROOT);
        root.meta = meta(entry);
        root.xattrs = xattrs(entry);
        Ok(())
    }

    /// Finds what a hard link at `path` is another name of.
    fn link_target(
        &mut self,
        target: &[u8],
        path: &[u8],
        below: &Below,
    ) -> Result<NodeId, IndexError> {
        let node = self
            .lookup(target, path)?
            .or_else(|| below.linked.get(target).copied());
        let node = node
            .ok_or_else(|| entry_error(path, "it is a hard link to a file that does not exist"))?;
        if self.tree.children(node).is_some() {
            return Err(entry_error(path, "it is a hard link to a directory"));
        }
        Ok(node)
    }

    /// Finds the node at `target`, a link target of the entry at `path`.
    fn lookup(&mut self, target: &[u8], path: &[u8]) -> Result<Option<NodeId>, IndexError> {
        let components = path::components(target)?;
        let Some((name, parents)) = components.split_last() else {
            return Ok(Some(Tree::ROOT));
        };
        let Some(directory) = self.tree.directory(parents, Missing::Leave, path)? else {
            return Ok(None);
        };
        Ok(self
            .tree
            .children(directory)
            .and_then(|it| it.get(*name))
            .copied())
    }
}

/// All entries of a layer, of whose index no more than a part stays resident.
fn entries<B: IndexBytes>(
    layer: &LayerIndex<B>,
) -> impl Iterator<Item = Result<EntryRef<'_>, IndexError>> {
    const AT_ONCE: usize = 4096;
    let numbered = layer.entries().enumerate();
    numbered.map(|(number, entry)| {
        if number.is_multiple_of(AT_ONCE) {
            layer.source().drop_resident();
        }
        entry
    })
}

fn meta(entry: &EntryRef<'_>) -> Meta {
    Meta {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime_seconds: entry.mtime_seconds,
        mtime_nanoseconds: entry.mtime_nanoseconds,
    }
}

/// Whether an attribute is dropped, as tools do that unpack images: those about the machine that
/// wrote the layer would mislead this one, and an empty PAX record takes an attribute back.
fn is_dropped(name: &[u8], value: &[u8]) -> bool {
    value.is_empty() || name == b"security.selinux" || name.starts_with(b"trusted.overlay.")
}

fn xattrs(entry: &EntryRef<'_>) -> super::tree::Xattrs {
    let kept = entry
        .xattrs
        .iter()
        .filter(|(name, value)| !is_dropped(name, value));
    kept.map(|(name, value)| (Box::from(*name), Box::from(*value)))
        .collect()
}

fn new_node(entry: &EntryRef<'_>, layer: u32) -> Result<Node, IndexError> {
    let body = match &entry.kind {
        EntryKind::File { size, extents } => Body::File {
            size: *size,
            layer,
            extents: non_empty(extents),
        },
        EntryKind::Symlink(target) => {
            if target.is_empty() || path::MAX_PATH_BYTES < target.len() {
                return Err(entry_error(
                    entry.path,
                    "its link target is empty or too long",
                ));
            }
            Body::Symlink(Box::from(*target))
        }
        EntryKind::Directory => Body::Directory(Children::new()),
        EntryKind::CharDevice(major, minor) => Body::CharDevice(*major, *minor),
        EntryKind::BlockDevice(major, minor) => Body::BlockDevice(*major, *minor),
        EntryKind::Fifo => Body::Fifo,
        EntryKind::HardLink(_) => {
            return Err(entry_error(entry.path, "a hard link is no node of its own"));
        }
    };
    Ok(Node {
        meta: meta(entry),
        xattrs: xattrs(entry),
        body,
    })
}

/// Drops extents without bytes, which a binary search must not meet.
fn non_empty(extents: &[TarExtent]) -> Box<[TarExtent]> {
    extents.iter().filter(|it| 0 < it.len).copied().collect()
}

#[cfg(test)]
mod tests;
