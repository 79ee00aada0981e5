//! Mounts OCI images lazily: files appear at once and their bytes are fetched when they are read.
//!
//! Start with [`index`] (what an image's merged tree is), then [`layer`] (where its bytes come
//! from), then [`fs`] and [`fuse`] (how the kernel reads them) and [`csi`] (how Kubernetes asks).
//! `docs/ARCHITECTURE.md` has the map; `tests/it/layering.rs` keeps the direction of imports.

// Modules in reading order, outermost last.
pub mod chunk;
pub mod clock;
pub mod digest;
pub mod disk;
pub mod exposition;
mod failpoint;
pub mod fair;
pub mod health;
pub mod integrity;
pub mod metrics;
pub mod secret;
pub mod sys;
pub mod telemetry;
mod tls;

pub mod ipc;

pub mod index;
pub mod tar;

pub mod codec;
pub mod tier;

pub mod toc;

pub mod registry;
pub mod remote;

pub mod api;
pub mod cluster;
pub mod node_events;
pub mod node_taint;
pub mod service_accounts;

pub mod layer;

pub mod fs;
pub mod indexer;
pub mod prewarm;
pub mod warm;

pub mod erofs;
pub mod fuse;

pub mod mount;

pub mod roles;

pub mod admin;
pub mod csi;
pub mod pb;

pub mod cli;
pub mod config;
pub mod run;
