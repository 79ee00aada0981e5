//! Makes a layer's index anew from the layer's bytes, after comparing them with the DiffID: for whoever
//! vouches for the index to others, whatever this node has believed before.

use std::io;

use sha2::{Digest, Sha256};

use crate::{
    chunk,
    digest::{ChunkDigest, DiffId},
    index::{IndexError, layer_index::LayerIndexBuilder},
    layer::disk::{DiskWait, LayerFile},
    tar::{self, TarEntry, TarError, TarLimits},
};

/// Says why a layer on disk has no index that can be vouched for.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The disk failed.
    #[error("reading it from the cache: {0}")]
    Disk(#[from] io::Error),
    /// It is not a tar archive that can be used.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// It does not fit the format of indexes.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// What is on disk is another layer.
    #[error(
        "what the cache has of it has DiffID {found}: remove it with `clip-csi cache rm {layer}` and push again"
    )]
    Differs {
        /// The layer.
        layer: DiffId,
        /// What the bytes are.
        found: DiffId,
    },
}

/// Reads the whole layer, all of whose chunks must be present and stay so
/// ([`keep_whole`](LayerFile::keep_whole)), and returns its index.
///
/// # Errors
/// [`RebuildError`].
///
/// # Blocking
/// For the disk and for hashing: about a second for each GB.
pub fn layer_index(file: &LayerFile) -> Result<Vec<u8>, RebuildError> {
    let mut hasher = Sha256::new();
    let mut parser = tar::Parser::new(TarLimits::default());
    let mut builder = LayerIndexBuilder::default();
    let mut buffer = Vec::new();
    // Of bytes that are another layer's, that is what is to be said, and not what is wrong with them.
    let mut parsed: Result<(), RebuildError> = Ok(());
    for n in 0..file.n_chunks() {
        let range = chunk::byte_range(n, file.layer_bytes());
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        buffer.resize(len, 0);
        file.read_at(&mut buffer, range.start, DiskWait::Allowed)?;
        hasher.update(&buffer);
        builder.push_chunk(&ChunkDigest::of(&buffer));
        if parsed.is_ok() {
            parsed = parse(&mut parser, &buffer, &mut builder);
        }
    }
    let found = DiffId::from_bytes(hasher.finalize().into());
    let layer = file.diff_id();
    if found != layer {
        return Err(RebuildError::Differs { layer, found });
    }
    parsed?;
    parser.finish()?;
    Ok(builder.finish(layer, file.layer_bytes()))
}

/// Adds the entries that end in `bytes`.
fn parse(
    parser: &mut tar::Parser,
    bytes: &[u8],
    builder: &mut LayerIndexBuilder<Vec<u8>>,
) -> Result<(), RebuildError> {
    let mut pushed = Ok(());
    let mut push = |entry: TarEntry| {
        if pushed.is_ok() {
            pushed = builder.push_entry(&entry);
        }
    };
    parser.push(bytes, &mut push)?;
    Ok(pushed?)
}
