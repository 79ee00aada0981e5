//! The integration tests: one binary, one module per subject.

mod admin;
mod csi;
mod layering;
mod mount;
mod mount_fixture;
mod pb;
