//! The tree while layers are applied to it: nodes, their names and their descriptions in tables, of which
//! a part is in memory.

use super::{
    IndexError,
    layer_index::{EntryKind, EntryRef},
    path::{MAX_NAME_BYTES, entry_error},
    scratch::{
        Scratch,
        paged::Paged,
        sorted::{Cursor, MAX_KEY_BYTES, SortedMap},
    },
    wire::{Reader, Write as _, count},
};

/// How many symbolic links a path may lead through.
///
/// 255 as in the tools that unpack images; Linux itself stops at 40.
const MAX_SYMLINKS: u32 = 255;

/// How many components one path may lead through, those of the links on its way included.
///
/// A path of 4095 bytes has 2048, one that Linux resolves leads through 40 links, and a link of a real image has
/// less than forty components: even all of these together are half of it. 255 links as long as may be have a
/// million.
const MAX_WALKED: usize = 8192;

/// Components that the paths of an image may lead through for each time that an entry is looked at: once in
/// the lowest layer, three times in others.
///
/// Real paths have about ten, also behind links such as `/lib -> usr/lib`, and most are in the directory of the
/// one before, which is not walked to again. A million entries, each [`MAX_WALKED`] away, would be eight
/// thousand million look-ups, and merges wait for each other.
pub(super) const WALKED_PER_LOOK: u64 = 64;

/// Components besides: 128 of the longest ways, so that an image of a few entries may be as odd as it likes.
const WALKED_AT_LEAST: u64 = 1 << 20;

/// Pages of names that are held: 1 MiB. Those of the directories on the way to where the tar is, and many more.
const HELD_NAME_PAGES: usize = 256;

/// Pages of nodes that are held, and of descriptions: 256 KiB each. They are made in the order of the tar, and
/// written to the index directory by directory.
const HELD_PAGES: usize = 64;

/// Bytes of a node in its table: kind, listing u32, description u64, number u32.
const NODE_BYTES: usize = 1 + 4 + 8 + 4;

/// Bytes before the entry in a description: layer u32, length of the entry u32.
const DESCRIPTION_HEADER_BYTES: usize = 4 + 4;

/// In place of a description: no layer describes it.
const IMPLIED: u64 = u64::MAX;

/// In place of a node: the name was taken away.
const GONE: u32 = u32::MAX;

/// Bytes of a listing before each name.
const LISTING_BYTES: usize = 4;

/// Number of a node in the order in which they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeId(pub(super) u32);

/// What a node is, as far as it decides where paths lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    Symlink,
    Other,
}

/// A file system object; a hard link is a second name for one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    pub(super) kind: Kind,
    /// Of a directory: under which number its names are. Another one hides all that it had.
    listing: u32,
    description: u64,
}

/// Where a layer's description of a node is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Description(u64);

/// What a layer says of a node.
#[derive(Debug, Default)]
pub(super) struct Described {
    layer: u32,
    entry: Vec<u8>,
}

impl Described {
    /// The layer's number, and its entry.
    pub(super) fn entry(&self) -> Result<(u32, EntryRef<'_>), IndexError> {
        Ok((self.layer, EntryRef::decode(&self.entry)?))
    }
}

/// The tree. Nodes that lost their last name stay, unreachable.
#[derive(Debug)]
pub(super) struct Tree<S> {
    /// Of each directory, by its listing: what its names name.
    names: SortedMap<S>,
    nodes: Paged<S>,
    descriptions: Paged<S>,
    n_nodes: u32,
    n_listings: u32,
    max_nodes: u32,
    /// How many components paths have led through, and how many they may.
    pub(super) n_walked: u64,
    max_walked: u64,
}

/// Whether missing directories on the way are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    Create,
    Leave,
}

impl<S: Scratch> Tree<S> {
    pub(super) const ROOT: NodeId = NodeId(0);

    /// A tree with nothing but its root, in files like `scratch`.
    pub(super) fn new(scratch: &S, max_nodes: u32) -> Self {
        Self {
            names: SortedMap::new(scratch.another(), HELD_NAME_PAGES),
            nodes: Paged::new(scratch.another(), HELD_PAGES),
            descriptions: Paged::new(scratch.another(), HELD_PAGES),
            // The root is there from the beginning, and its page is zeros: see `node`.
            n_nodes: 1,
            n_listings: 1,
            max_nodes,
            n_walked: 0,
            max_walked: WALKED_AT_LEAST,
        }
    }

    /// Lets paths lead further, because an entry is looked at.
    pub(super) fn look(&mut self) {
        self.max_walked = self.max_walked.saturating_add(WALKED_PER_LOOK);
    }

    /// Another scratch file of the same kind.
    pub(super) fn another(&self) -> S {
        self.names.another()
    }

    pub(super) fn node(&mut self, id: NodeId) -> Result<Node, IndexError> {
        let mut bytes = [0; NODE_BYTES];
        self.nodes.read(&mut bytes, place(id))?;
        let mut reader = Reader::new(&bytes, "node of a tree");
        let kind = match reader.u8()? {
            0 => Kind::Directory,
            1 => Kind::Symlink,
            _ => Kind::Other,
        };
        Ok(Node {
            kind,
            listing: reader.u32()?,
            // What was never written is zeros: so is the root, until a layer describes it.
            description: reader.u64()?.wrapping_sub(1),
        })
    }

    fn set(&mut self, id: NodeId, node: Node) -> Result<(), IndexError> {
        let mut bytes = Vec::with_capacity(NODE_BYTES);
        bytes.put_u8(match node.kind {
            Kind::Directory => 0,
            Kind::Symlink => 1,
            Kind::Other => 2,
        });
        bytes.put_u32(node.listing);
        bytes.put_u64(node.description.wrapping_add(1));
        Ok(self.nodes.write(&bytes, place(id))?)
    }

    /// The number that a node was given.
    pub(super) fn number(&mut self, id: NodeId) -> Result<Option<u32>, IndexError> {
        let mut bytes = [0; 4];
        self.nodes
            .read(&mut bytes, place(id) + NODE_BYTES as u64 - 4)?;
        Ok(u32::from_le_bytes(bytes).checked_sub(1))
    }

    /// Gives a node a number.
    pub(super) fn set_number(&mut self, id: NodeId, number: u32) -> Result<(), IndexError> {
        let number = count("nodes", number as usize + 1)?;
        let at = place(id) + NODE_BYTES as u64 - 4;
        Ok(self.nodes.write(&number.to_le_bytes(), at)?)
    }

    /// Keeps what `layer` says of a node.
    pub(super) fn describe(
        &mut self,
        layer: u32,
        entry: &EntryRef<'_>,
    ) -> Result<Description, IndexError> {
        let mut header = Vec::with_capacity(DESCRIPTION_HEADER_BYTES);
        header.put_u32(layer);
        header.put_u32(count("bytes of an entry", entry.encoded.len())?);
        let at = self.descriptions.append(&header)?;
        self.descriptions.append(entry.encoded)?;
        Ok(Description(at))
    }

    /// Reads what a layer says of `node`; `false` if none does.
    pub(super) fn read_description(
        &mut self,
        node: Node,
        into: &mut Described,
    ) -> Result<bool, IndexError> {
        if node.description == IMPLIED {
            return Ok(false);
        }
        let mut header = [0; DESCRIPTION_HEADER_BYTES];
        self.descriptions.read(&mut header, node.description)?;
        let mut reader = Reader::new(&header, "description of a node");
        into.layer = reader.u32()?;
        into.entry.clear();
        into.entry.resize(reader.u32()? as usize, 0);
        let at = node.description + DESCRIPTION_HEADER_BYTES as u64;
        self.descriptions.read(&mut into.entry, at)?;
        Ok(true)
    }

    /// Adds a node without a name.
    pub(super) fn add(
        &mut self,
        kind: Kind,
        description: Option<Description>,
    ) -> Result<NodeId, IndexError> {
        let id = self.n_nodes;
        if self.max_nodes <= id {
            let max = u64::from(self.max_nodes);
            return Err(IndexError::Limit {
                limit: "max_index_nodes",
                max,
            });
        }
        self.n_nodes += 1;
        let listing = match kind {
            Kind::Directory => self.new_listing()?,
            Kind::Symlink | Kind::Other => 0,
        };
        let node = Node {
            kind,
            listing,
            description: description.map_or(IMPLIED, |it| it.0),
        };
        self.set(NodeId(id), node)?;
        Ok(NodeId(id))
    }

    /// Describes a directory anew, which keeps its names.
    pub(super) fn redescribe(
        &mut self,
        id: NodeId,
        description: Description,
    ) -> Result<(), IndexError> {
        let node = self.node(id)?;
        self.set(
            id,
            Node {
                description: description.0,
                ..node
            },
        )
    }

    /// What `name` names in a directory; nothing in what is none.
    pub(super) fn child(&mut self, of: NodeId, name: &[u8]) -> Result<Option<NodeId>, IndexError> {
        let node = self.node(of)?;
        if node.kind != Kind::Directory {
            return Ok(None);
        }
        // No entry may have a longer name, but a link may lead to one.
        let Some((key, len)) = key(node.listing, name) else {
            return Ok(None);
        };
        let found = self.names.get(&key[..len])?;
        Ok(found.filter(|it| *it != GONE).map(NodeId))
    }

    /// Names `child` in a directory; whether the name was another one's.
    pub(super) fn insert(
        &mut self,
        of: NodeId,
        name: &[u8],
        child: NodeId,
    ) -> Result<bool, IndexError> {
        self.put_name(of, name, child.0)
    }

    /// Takes a name away, with all below it.
    pub(super) fn remove(&mut self, of: NodeId, name: &[u8]) -> Result<(), IndexError> {
        if self.child(of, name)?.is_some() {
            self.put_name(of, name, GONE)?;
        }
        Ok(())
    }

    /// Takes all names of a directory away.
    pub(super) fn clear(&mut self, of: NodeId) -> Result<(), IndexError> {
        let node = self.node(of)?;
        let listing = self.new_listing()?;
        self.set(of, Node { listing, ..node })
    }

    /// The names in a directory, in their order.
    pub(super) fn names(&mut self, of: Node) -> Result<Names, IndexError> {
        let (key, len) = key(of.listing, b"").unwrap_or(([0; MAX_KEY_BYTES], 0));
        Ok(Names {
            listing: of.listing,
            cursor: self.names.cursor(&key[..len])?,
        })
    }

    fn put_name(&mut self, of: NodeId, name: &[u8], value: u32) -> Result<bool, IndexError> {
        let listing = self.node(of)?.listing;
        let too_long = || entry_error(name, "a link leads to a name that is longer than 255 bytes");
        let (key, len) = key(listing, name).ok_or_else(too_long)?;
        let old = self.names.insert(&key[..len], value)?;
        Ok(old.is_some_and(|it| it != GONE))
    }

    fn new_listing(&mut self) -> Result<u32, IndexError> {
        let listing = self.n_listings;
        self.n_listings = count("directories", listing as usize + 1)?;
        Ok(listing)
    }

    /// Counts components that are walked, or what costs as much.
    pub(super) fn count_walked(&mut self, n_components: u64) -> Result<(), IndexError> {
        self.n_walked += n_components;
        if self.max_walked < self.n_walked {
            return Err(IndexError::Limit {
                limit: "path components, those of links included",
                max: self.max_walked,
            });
        }
        Ok(())
    }

    /// Walks to the directory at `components`, through symbolic links, never above the root.
    ///
    /// This is what unpacking into a root directory does: an entry `lib/x` lands in `usr/lib/x`
    /// where a lower layer has `lib -> usr/lib`.
    ///
    /// # Errors
    /// If something on the way is neither a directory nor a link to one, if links form a loop or lead too far,
    /// or if those of all paths together do.
    pub(super) fn directory(
        &mut self,
        components: &[&[u8]],
        missing: Missing,
        path: &[u8],
    ) -> Result<Option<NodeId>, IndexError> {
        // The way back for `..`: the directories from the root to where we are.
        let mut trail = vec![Self::ROOT];
        let mut rest: Vec<Box<[u8]>> = components.iter().rev().map(|it| Box::from(*it)).collect();
        let (mut n_symlinks, mut n_walked) = (0, 0);
        while let Some(name) = rest.pop() {
            n_walked += 1;
            self.count_walked(1)?;
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
            let Some(child) = self.child(here, &name)? else {
                if missing == Missing::Leave {
                    return Ok(None);
                }
                let made = self.add(Kind::Directory, None)?;
                self.insert(here, &name, made)?;
                trail.push(made);
                continue;
            };
            let node = self.node(child)?;
            match node.kind {
                Kind::Directory => trail.push(child),
                Kind::Symlink => {
                    n_symlinks += 1;
                    if MAX_SYMLINKS < n_symlinks {
                        return Err(entry_error(path, "its directory is behind a symlink loop"));
                    }
                    let mut described = Described::default();
                    self.read_description(node, &mut described)?;
                    let EntryKind::Symlink(target) = described.entry()?.1.kind else {
                        return Err(IndexError::Truncated { what: "tree" });
                    };
                    if target.starts_with(b"/") {
                        trail.truncate(1);
                    }
                    rest.extend(target.rsplit(|it| *it == b'/').map(Box::from));
                    if MAX_WALKED < n_walked + rest.len() {
                        let reason = "links on its way lead through more than 8192 names";
                        return Err(entry_error(path, reason));
                    }
                }
                Kind::Other if missing == Missing::Leave => return Ok(None),
                Kind::Other => return Err(entry_error(path, "its parent is not a directory")),
            }
        }
        Ok(trail.pop())
    }
}

/// Goes through the names of a directory.
#[derive(Debug)]
pub(super) struct Names {
    listing: u32,
    cursor: Cursor,
}

impl Names {
    /// The next name, and what it names.
    pub(super) fn next<S: Scratch>(
        &mut self,
        tree: &mut Tree<S>,
    ) -> Result<Option<(&[u8], NodeId)>, IndexError> {
        while self.cursor.step(&mut tree.names)? {
            let (key, value) = self.cursor.current()?;
            if !key.starts_with(&self.listing.to_be_bytes()) {
                break;
            }
            if value != GONE {
                let (key, value) = self.cursor.current()?;
                return Ok(Some((&key[LISTING_BYTES..], NodeId(value))));
            }
        }
        Ok(None)
    }
}

/// The key of a name: the listing, so that all names of a directory lie side by side, and the name;
/// nothing if that is too long to be one.
fn key(listing: u32, name: &[u8]) -> Option<([u8; MAX_KEY_BYTES], usize)> {
    const { assert!(LISTING_BYTES + MAX_NAME_BYTES <= MAX_KEY_BYTES) };
    if MAX_NAME_BYTES < name.len() {
        return None;
    }
    let len = LISTING_BYTES + name.len();
    let mut key = [0; MAX_KEY_BYTES];
    key[..LISTING_BYTES].copy_from_slice(&listing.to_be_bytes());
    key[LISTING_BYTES..len].copy_from_slice(name);
    Some((key, len))
}

/// Where a node is in its table.
fn place(id: NodeId) -> u64 {
    u64::from(id.0) * NODE_BYTES as u64
}
