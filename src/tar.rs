//! Parses tar archives as they stream by: one parser for every layer, pure, no I/O.
#![allow(
    missing_docs,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason
)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    pub path: Vec<u8>,
    pub kind: TarKind,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime_seconds: i64,
    pub mtime_nanoseconds: u32,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarKind {
    File { size: u64, extents: Vec<TarExtent> },
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Directory,
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TarExtent {
    pub file_offset: u64,
    pub layer_offset: u64,
    pub len: u64,
}
