//! The three processes of a node, and what holds them together.
//!
//! ```text
//! kubelet ──► node ── Prepare ──► agent ──► registries, remote content cache
//!              │ mounts, binds      ▲  ╲ writes
//!              │ and keeps a copy   │   ▼ layers on disk
//!              └─ Serve + fd ──► serve ◄── reads
//!                                  ▲
//!                          kernel: FUSE requests
//! ```
//!
//! - [`agent`] owns the network and the cache; it may die at any time: what is on disk is read on,
//!   what is not waits.
//! - [`server`] serves FUSE and does nothing else. It may die at any time: [`escrow`] holds a copy of
//!   each connection, and its successor goes on.
//! - [`escrow`] and [`NodeMounter`] are the node service's part. It may die at any time: the server has
//!   the connections, and the records say what is bound where.
//!
//! An image that is whole on disk needs no server: the node service has the kernel read its layers (`whole`).
//!
//! If node service and server die at the same moment, the connections are gone, and their mounts are
//! dead: that is what the kernel does when nobody has them.

pub mod agent;
mod agent_link;
pub mod escrow;
mod node;
pub mod notices;
pub mod protocol;
pub mod server;
pub mod status;
mod whole;

pub use node::NodeMounter;
