//! The integration tests: one binary, one module per subject.

mod layering;
mod remote;
mod mount;
mod mount_fixture;
mod pb;
