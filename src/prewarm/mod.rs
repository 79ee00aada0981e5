//! Has images where pods will want them: what `ImagePrewarm` objects ask for, on all nodes, at a pace.
//!
//! ```text
//! ImagePrewarm ──► controller ── seeds ──► remote content cache ──► agents fill their disks
//!        ▲            │ status.admittedPermille, annotation ROLLOUT        │
//!        └────────────┴───────────── NodeImageCache, one per node ◄────────┘
//! ```
//!
//! The controller tells no node anything: it writes which share of the nodes may begin, and each agent knows by
//! [`rollout::slot`] whether it is among them. Agents watch the metadata of the objects alone; what they need of it is an
//! annotation, and they read an object only when it is their turn. So one write of the controller costs one small message
//! for each node, and a node costs the API server a read and two writes for each object.
//!
//! Deliberately absent: connections between controller and nodes, jobs, pods, credentials on nodes.

pub mod agent;
pub mod config;
pub mod controller;
pub mod nodes;
pub mod rollout;
mod table;
pub mod workloads;
