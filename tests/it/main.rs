//! The integration tests: one binary, one module per subject.

mod fs;
mod fuse;
mod fuse_fakes;
mod layering;
