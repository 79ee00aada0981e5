//! The tree while layers are applied to it: nodes in an arena, names in sorted maps.

use std::collections::BTreeMap;

use super::{IndexError, path::entry_error};
use crate::tar::TarExtent;

/// How many symbolic links a path may lead through.
///
/// 255 as in the tools that unpack images; Linux itself stops at 40.
const MAX_SYMLINKS: u32 = 255;

/// Number of a node in the arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct NodeId(u32);

/// The names in a directory.
pub(super) type Children = BTreeMap<Box<[u8]>, NodeId>;

/// What a node is.
#[derive(Debug)]
pub(super) enum Body {
    Directory(Children),
    File {
        size: u64,
        layer: u32,
        extents: Box<[TarExtent]>,
    },
    Symlink(Box<[u8]>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Fifo,
}

/// Owner, mode and time of a node.
#[derive(Debug, Clone, Copy)]
pub(super) struct Meta {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime_seconds: i64,
    pub(super) mtime_nanoseconds: u32,
}

impl Meta {
    /// What a directory gets that no layer describes: root's, readable, at the epoch.
    pub(super) const IMPLIED_DIRECTORY: Self = Self {
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime_seconds: 0,
        mtime_nanoseconds: 0,
    };
}

/// Extended attributes, as `(name, value)`.
pub(super) type Xattrs = Box<[(Box<[u8]>, Box<[u8]>)]>;

/// A file system object; a hard link is a second name for one.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) meta: Meta,
    pub(super) xattrs: Xattrs,
    pub(super) body: Body,
}

/// The tree. Nodes that lost their last name stay in the arena, unreachable.
#[derive(Debug)]
pub(super) struct Tree {
    nodes: Vec<Node>,
    max_nodes: u32,
}

/// Whether missing directories on the way are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    Create,
    Leave,
}

impl Tree {
    pub(super) const ROOT: NodeId = NodeId(0);

    pub(super) fn new(max_nodes: u32) -> Self {
        let root = Node {
            meta: Meta::IMPLIED_DIRECTORY,
            xattrs: Box::default(),
            body: Body::Directory(Children::new()),
        };
        Self {
            nodes: vec![root],
            max_nodes,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    /// The position of a node in the arena.
    pub(super) fn position(id: NodeId) -> usize {
        id.0 as usize
    }

    pub(super) fn add(&mut self, node: Node) -> Result<NodeId, IndexError> {
        let id = u32::try_from(self.nodes.len()).unwrap_or(u32::MAX);
        if self.max_nodes <= id {
            let max = u64::from(self.max_nodes);
            return Err(IndexError::Limit {
                limit: "max_index_nodes",
                max,
            });
        }
        self.nodes.push(node);
        Ok(NodeId(id))
    }

    pub(super) fn children(&self, id: NodeId) -> Option<&Children> {
        match &self.node(id).body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    pub(super) fn children_mut(&mut self, id: NodeId) -> Option<&mut Children> {
        match &mut self.node_mut(id).body {
            Body::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Walks to the directory at `components`, through symbolic links, never above the root.
    ///
    /// This is what unpacking into a root directory does: an entry `lib/x` lands in `usr/lib/x`
    /// where a lower layer has `lib -> usr/lib`.
    ///
    /// # Errors
    /// If something on the way is neither a directory nor a link to one, or if links form a loop.
    pub(super) fn directory(
        &mut self,
        components: &[&[u8]],
        missing: Missing,
        path: &[u8],
    ) -> Result<Option<NodeId>, IndexError> {
        // The way back for `..`: the directories from the root to where we are.
        let mut trail = vec![Self::ROOT];
        let mut rest: Vec<Box<[u8]>> = components.iter().rev().map(|it| Box::from(*it)).collect();
        let mut n_symlinks = 0;
        while let Some(name) = rest.pop() {
            match &*name {
                b"" | b"." => continue,
                b".." => {
                    if 1 < trail.len() {
                        trail.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let here = *trail.last().unwrap_or(&Self::ROOT);
            let child = self.children(here).and_then(|it| it.get(&name)).copied();
            let Some(child) = child else {
                if missing == Missing::Leave {
                    return Ok(None);
                }
                let made = self.add(Node {
                    meta: Meta::IMPLIED_DIRECTORY,
                    xattrs: Box::default(),
                    body: Body::Directory(Children::new()),
                })?;
                if let Some(children) = self.children_mut(here) {
                    children.insert(name, made);
                }
                trail.push(made);
                continue;
            };
            match &self.node(child).body {
                Body::Directory(_) => trail.push(child),
                Body::Symlink(target) => {
                    n_symlinks += 1;
                    if MAX_SYMLINKS < n_symlinks {
                        return Err(entry_error(path, "its directory is behind a symlink loop"));
                    }
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    rest.extend(target.rsplit(|it| *it == b'/').map(Box::from));
                }
                _ if missing == Missing::Leave => return Ok(None),
                _ => return Err(entry_error(path, "its parent is not a directory")),
            }
        }
        Ok(trail.pop())
    }
}
