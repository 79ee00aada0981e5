//! The integration tests: one binary, one module per subject.

mod codec;
mod layering;
mod tar;
mod tar_fuzz;
mod tar_tools;
