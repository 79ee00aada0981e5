//! Holds the generated gRPC code of the Container Storage Interface.
//!
//! `csi.v1.rs` comes from `proto/csi.proto` and is committed, so that a build needs no `protoc`;
//! `tests/it/pb.rs` generates it anew and compares. Nobody edits it.

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
