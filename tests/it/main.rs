//! The integration tests: one binary, one module per subject.

mod layering;
mod mount;
mod mount_fixture;
mod pb;
