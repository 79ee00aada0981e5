//! Holds the generated gRPC code: the Container Storage Interface, and kubelet's registration.
//!
//! The files come from `proto/` and are committed, so that a build needs no `protoc`;
//! `tests/it/pb.rs` generates them anew and compares. Nobody edits them.

#[expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::doc_markdown,
    reason = "generated: its style is prost's, its comments are the specification's"
)]
#[rustfmt::skip]
#[path = "csi.v1.rs"]
pub mod v1;

#[expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated: its style is prost's, its comments are the specification's"
)]
#[rustfmt::skip]
#[path = "pluginregistration.rs"]
pub mod registration;
