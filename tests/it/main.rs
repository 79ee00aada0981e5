//! The integration tests: one binary, one module per subject.

mod layering;
mod layers;
mod metrics_doc;
mod mount;
mod mount_fixture;
mod pb;
mod remote;
mod tidy;
