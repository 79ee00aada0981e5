//! Has images where pods will want them: what `ImagePrewarm` objects ask for, on all nodes, at a pace.
//!
//! ```text
//! ImagePrewarm ──► controller ── seeds ──► remote content cache ──► agents fill their disks
//!        ▲          │  │  ▲                                             ▲  │
//!        └─ status ─┘  │  └────── NodeImageCache, one per node ◄────────┼──┘
//!                      └───────── ImageRollout, one per ImagePrewarm ───┘
//! ```
//!
//! The controller tells no node anything: it writes which share of the nodes may begin into an object that all of them
//! watch, and each agent knows by [`rollout::slot`] whether it is among them. That object is small, and apart from the
//! status that people see, because a write of it is a message to each node. Agents read an ImagePrewarm only when it is
//! their turn. So a node costs the API server a read and two writes for each object.
//!
//! Deliberately absent: connections between controller and nodes, jobs, pods, credentials on nodes.

pub mod agent;
pub mod config;
pub mod controller;
pub mod nodes;
pub mod rollout;
mod table;
pub mod workloads;
