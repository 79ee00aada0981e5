//! The integration tests: one binary, one module per subject.

mod admin;
mod codec;
mod csi;
mod fuse;
mod layering;
mod layers;
mod metrics_doc;
mod mount;
mod mount_fixture;
mod pb;
mod registry;
mod remote;
mod tar;
mod tar_fuzz;
mod tar_tools;
mod tidy;
