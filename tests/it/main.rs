//! The integration tests: one binary, one module per subject.

mod layering;
mod registry;
