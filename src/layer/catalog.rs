//! Looks at the cache directory as a whole: what `clip-csi cache ls|verify|rm` does, and the
//! clean-up at start. Works on a directory that other processes use at the same time.

use std::{fs, io, path::PathBuf};

use super::{
    disk::{CachePaths, LayerFile},
    lock,
};
use crate::{
    digest::{self, DiffId},
    disk::TEMPORARY_SUFFIX,
};

/// What the cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// How many layers.
    pub n_layers: u64,
    /// Bytes of the chunks that are present.
    pub present_bytes: u64,
}

/// One layer of the cache.
#[derive(Debug)]
pub struct CachedLayer {
    /// Names the layer.
    pub diff_id: DiffId,
    /// The layer, or why it cannot be opened.
    pub file: io::Result<LayerFile>,
}

/// Lists the layers, sorted by digest.
///
/// # Errors
/// If the directory cannot be read; an absent one is empty.
pub fn layers(paths: &CachePaths) -> io::Result<Vec<CachedLayer>> {
    let mut layers = Vec::new();
    for name in names(paths.layers())? {
        let Some(diff_id) = digest::from_hex(&name).map(DiffId::from_bytes) else {
            continue;
        };
        let file = LayerFile::open(&paths.layer(diff_id), diff_id)
            .and_then(|it| it.ok_or_else(|| io::Error::other("it has no index")));
        layers.push(CachedLayer { diff_id, file });
    }
    layers.sort_by_key(|it| it.diff_id);
    Ok(layers)
}

/// Sums the cache up.
///
/// # Errors
/// If the directory cannot be read.
pub fn usage(paths: &CachePaths) -> io::Result<Usage> {
    let mut usage = Usage::default();
    for layer in layers(paths)? {
        usage.n_layers += 1;
        usage.present_bytes += layer.file.map_or(0, |it| it.present_bytes());
    }
    Ok(usage)
}

/// What a verification found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    /// Chunks that match their digest.
    pub good: u32,
    /// Chunks that did not, and were dropped, so that they are fetched anew.
    pub wrong: u32,
    /// Chunks that are not there.
    pub absent: u32,
}

/// Compares every chunk of a layer that is present with its digest, and drops the wrong ones.
///
/// # Errors
/// Those of the file system.
///
/// # Blocking
/// Reads the whole layer.
pub fn verify(layer: &LayerFile) -> io::Result<Verified> {
    let mut verified = Verified::default();
    let mut buf = Vec::new();
    for chunk in 0..layer.n_chunks() {
        if !layer.has(chunk..chunk + 1) {
            verified.absent += 1;
        } else if layer.verify_chunk(chunk, &mut buf)? {
            verified.good += 1;
        } else {
            layer.drop_chunk(chunk);
            verified.wrong += 1;
        }
    }
    Ok(verified)
}

/// Whether something was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removed {
    /// It is gone.
    Yes,
    /// There was nothing.
    Absent,
    /// A process fills it right now.
    Busy,
}

/// Removes a layer. Who has it open keeps reading it; the next one to open it fetches it anew.
///
/// # Errors
/// Those of the file system.
pub fn remove(paths: &CachePaths, layer: DiffId) -> io::Result<Removed> {
    let place = paths.layer(layer);
    if !place.try_exists()? {
        return Ok(Removed::Absent);
    }
    let Some(_lock) = lock::try_lock(&paths.lock(layer))? else {
        return Ok(Removed::Busy);
    };
    fs::create_dir_all(paths.temporary())?;
    let aside = crate::disk::temporary_beside(&paths.temporary().join(layer.hex()));
    fs::rename(&place, &aside)?;
    fs::remove_dir_all(&aside)?;
    Ok(Removed::Yes)
}

/// Removes the image indexes; they are made anew from the layers' indexes when they are wanted.
///
/// # Errors
/// Those of the file system.
pub fn remove_images(paths: &CachePaths) -> io::Result<u64> {
    let mut n_removed = 0;
    for name in names(paths.images())? {
        fs::remove_file(paths.images().join(name))?;
        n_removed += 1;
    }
    Ok(n_removed)
}

/// Removes what fills left behind that ended before their time.
///
/// A fill holds its layer's lock, so what belongs to a layer whose lock is free is nobody's.
///
/// # Errors
/// Those of the file system.
pub(super) fn remove_leftovers(paths: &CachePaths) -> io::Result<()> {
    for name in names(paths.temporary())? {
        let hex = name
            .get(..64)
            .and_then(digest::from_hex)
            .map(DiffId::from_bytes);
        let (Some(layer), true) = (hex, name.ends_with(TEMPORARY_SUFFIX)) else {
            continue;
        };
        if let Some(_lock) = lock::try_lock(&paths.lock(layer))? {
            match fs::remove_dir_all(paths.temporary().join(&name)) {
                Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(err),
                Ok(()) | Err(_) => {}
            }
        }
    }
    Ok(())
}

/// The names in a directory; none if it does not exist.
fn names(dir: PathBuf) -> io::Result<Vec<String>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries
            .map(|it| Ok(it?.file_name().to_string_lossy().into_owned()))
            .collect(),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(err) => Err(err),
    }
}
