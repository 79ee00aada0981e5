//! What must hold for any bytes: no panic, the same entries however they are cut, sound extents, and an
//! index that is sound, too, of an image with such a layer.

use clip_csi::{
    chunk::n_chunks,
    digest::{BlobDigest, ChunkDigest, DiffId, ManifestDigest},
    index::{
        image::ImageIndex,
        layer_index::{LayerIndex, LayerIndexBuilder},
        merge::Merge,
    },
    tar::{Parser, TarEntry, TarError, TarKind, TarLimits},
};

/// Small enough for inputs of a fuzzer to reach.
const LIMITS: TarLimits = TarLimits {
    max_metadata_bytes: 64 << 10,
    max_entries: 1000,
    max_sparse_segments: 64,
    max_path_bytes: 4096,
};

/// Parses the bytes in one piece and in several; returns the number of entries of a whole archive.
pub(crate) fn run(bytes: &[u8]) -> Option<usize> {
    let whole = parse(bytes, bytes.len().max(1));
    // The input itself chooses where it is cut, so that a finding can be repeated.
    let sum: usize = bytes
        .iter()
        .step_by(61)
        .map(|byte| usize::from(*byte))
        .sum();
    for len in [1 + sum % 600, 511, 513] {
        assert_eq!(parse(bytes, len), whole, "in pieces of {len}");
    }
    let (entries, outcome) = whole;
    for entry in &entries {
        check(entry);
    }
    outcome.ok()?;
    let len = u64::try_from(bytes.len()).expect("a length");
    assert!(
        entries.iter().all(|entry| data_end(entry) <= len),
        "data beyond the end"
    );
    // Files do not share data.
    assert!(
        entries
            .windows(2)
            .all(|pair| data_end(&pair[0]) <= data_start(&pair[1]))
    );
    merge(&entries, len);
    Some(entries.len())
}

/// Merges the archive with itself, so that its entries meet its links; the image may be refused.
fn merge(entries: &[TarEntry], layer_bytes: u64) {
    let mut builder = LayerIndexBuilder::default();
    for entry in entries {
        builder.push_entry(entry).expect("it is small");
    }
    for _ in 0..n_chunks(layer_bytes) {
        builder.push_chunk(&ChunkDigest::of(b""));
    }
    let index = builder.finish(DiffId::of(b""), layer_bytes);
    let layer = LayerIndex::decode(index).expect("it was just made");
    let mut merge = Merge::new(1000);
    for _ in 0..2 {
        if merge.add_layer(&layer, BlobDigest::of(b""), 1).is_err() {
            return;
        }
    }
    let file = merge.finish(ManifestDigest::of(b"")).expect("it is small");
    let index = ImageIndex::open(file).expect("it was just made");
    index.verify().expect("it was just made");
}

fn parse(bytes: &[u8], len: usize) -> (Vec<TarEntry>, Result<(), TarError>) {
    let mut entries = Vec::new();
    let mut parser = Parser::new(LIMITS);
    for piece in bytes.chunks(len) {
        if let Err(error) = parser.push(piece, &mut |entry| entries.push(entry)) {
            return (entries, Err(error));
        }
    }
    (entries, parser.finish())
}

/// Checks what the index relies on, which holds even if the archive breaks off later.
fn check(entry: &TarEntry) {
    assert!(!entry.path.is_empty() && !entry.path.contains(&0));
    assert!(entry.path.len() <= LIMITS.max_path_bytes);
    assert_eq!(entry.mode & !0o7777, 0);
    assert!(entry.mtime_nanoseconds < 1_000_000_000);
    assert!(entry.xattrs.windows(2).all(|pair| pair[0].0 < pair[1].0));
    if let TarKind::File { size, extents } = &entry.kind {
        assert!(extents.len() <= LIMITS.max_sparse_segments);
        let mut end = (0, 0);
        for extent in extents {
            assert!(0 < extent.len && end.0 <= extent.file_offset && end.1 <= extent.layer_offset);
            end = (
                extent.file_offset + extent.len,
                extent.layer_offset + extent.len,
            );
        }
        assert!(end.0 <= *size);
    }
}

fn data_start(entry: &TarEntry) -> u64 {
    match &entry.kind {
        TarKind::File { extents, .. } => extents.first().map_or(u64::MAX, |it| it.layer_offset),
        _ => u64::MAX,
    }
}

fn data_end(entry: &TarEntry) -> u64 {
    match &entry.kind {
        TarKind::File { extents, .. } => extents.last().map_or(0, |it| it.layer_offset + it.len),
        _ => 0,
    }
}

/// Writes the right checksum into a header, so that a mutation reaches what is behind it.
pub(crate) fn seal(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
