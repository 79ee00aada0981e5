//! Decompresses layers: gzip, zstd and plain tar, told apart by their first bytes.
