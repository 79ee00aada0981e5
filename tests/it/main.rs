//! The integration tests: one binary, one module per subject.

#![expect(
    clippy::unwrap_used,
    reason = "a test may panic; allow-unwrap-in-tests does not reach its helper functions"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "tests run on 64-bit machines"
)]

mod admin;
mod agent;
mod blocking_threads;
mod by_toc;
mod by_toc_remote;
mod checkpoints;
mod cluster_watch;
mod codec;
mod crds;
mod csi;
mod csi_controller;
mod decompressions;
mod erofs;
mod eviction;
mod flipped_bits;
mod fs;
mod full_disk;
mod fuse;
mod fuse_fakes;
#[path = "support/http_server.rs"]
mod http_server;
mod layer_distrust;
mod layer_fixture;
mod layer_leases;
mod layer_pushed;
mod layering;
mod layers;
mod leave;
mod metrics_doc;
mod mount;
mod mount_fixture;
mod node_events;
mod node_taint;
mod origins;
mod pb;
mod prefetch;
mod random_access;
mod registration;
mod registry;
mod remote;
mod service_accounts;
mod start;
mod tar;
mod tar_fuzz;
mod tar_tools;
mod tidy;
mod toc_fixture;
mod toc_node;
mod trim;
mod volumes_doc;
mod warm;
mod wrong_maps;
