//! Looks at the cache directory as a whole: what `clip-csi cache ls|verify|rm` does, what eviction
//! chooses from, and the clean-up at start. Works on a directory that other processes use at the
//! same time.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{
    disk::{ASIDE_SUFFIX, CachePaths, DATA, IMAGE_SUFFIX, LayerFile, MOUNTED, PROFILE_SUFFIX},
    evict::{Item, ItemId},
    lock, whole,
};
use crate::{
    digest::{self, DiffId, ManifestDigest},
    disk::TEMPORARY_SUFFIX,
    index::image::ImageIndex,
    sys::MappedFile,
};

/// How old an unpublished image index is that nobody can be writing any more.
const ABANDONED_AFTER: Duration = Duration::from_secs(60 * 60);

/// Lists the layers, sorted by digest.
///
/// # Errors
/// If the directory cannot be read; an absent one is empty.
pub fn layers(paths: &CachePaths) -> io::Result<Vec<DiffId>> {
    let mut layers: Vec<DiffId> = names(paths.layers())?
        .iter()
        .filter_map(|it| digest::from_hex(it).map(DiffId::from_bytes))
        .collect();
    layers.sort_unstable();
    Ok(layers)
}

/// Opens a layer to look at it, which is no use of it; `None` if it has gone meanwhile.
///
/// # Errors
/// Why it cannot be used.
pub fn open(paths: &CachePaths, layer: DiffId) -> io::Result<Option<LayerFile>> {
    let place = paths.layer(layer);
    match LayerFile::open(&place, layer)? {
        None if place.try_exists()? => Err(io::Error::other("it is not complete")),
        opened => Ok(opened),
    }
}

/// What the cache holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// The layers and the image indexes.
    pub(super) items: Vec<Item>,
    /// How many of them are layers.
    pub(super) n_layers: u64,
    /// What all takes on disk, layers in the making included.
    pub(super) used_bytes: u64,
}

/// Measures the cache: as much as the disk has given to it, which is less than the sizes of sparse
/// files, and more than what is marked present where a power cut took the marks.
///
/// # Errors
/// If a directory cannot be read. What vanishes meanwhile is left out.
pub(super) fn measure(paths: &CachePaths) -> io::Result<Contents> {
    let mut contents = Contents::default();
    for layer in layers(paths)? {
        let place = paths.layer(layer);
        let bytes = directory_bytes(&place)?;
        contents.items.push(Item {
            id: ItemId::Layer(layer),
            bytes,
            // The directory, and the lock.
            n_inodes: names(place.clone())?.len() as u64 + 2,
            last_use: last_use(&place.join(DATA))?,
        });
        contents.n_layers += 1;
        contents.used_bytes += bytes;
    }
    for (image, path) in images(paths)? {
        let bytes = file_bytes(&path)?;
        contents.items.push(Item {
            id: ItemId::Image(image),
            bytes,
            n_inodes: 1,
            last_use: last_use(&path)?,
        });
        contents.used_bytes += bytes;
    }
    for path in profiles(paths)? {
        contents.used_bytes += file_bytes(&path)?;
    }
    for name in names(paths.temporary())? {
        let path = paths.temporary().join(&name);
        // What was set aside is about to be gone.
        if !name.contains(ASIDE_SUFFIX) {
            // A map in the making is a file.
            contents.used_bytes += match path.is_dir() {
                true => directory_bytes(&path)?,
                false => file_bytes(&path)?,
            };
        }
    }
    Ok(contents)
}

/// What the files of a directory take on disk. What is no directory is not ours, and not counted.
fn directory_bytes(dir: &Path) -> io::Result<u64> {
    match names(dir.to_owned()) {
        Ok(names) => names.iter().map(|it| file_bytes(&dir.join(it))).sum(),
        Err(err) if err.kind() == io::ErrorKind::NotADirectory => Ok(0),
        Err(err) => Err(err),
    }
}

/// What a file takes on disk.
fn file_bytes(path: &Path) -> io::Result<u64> {
    // st_blocks is in units of 512 bytes, whatever the file system's blocks are (stat(3type)).
    Ok(found(fs::metadata(path))?.map_or(0, |it| it.blocks() * 512))
}

/// When a file was used last; what is gone or damaged goes first.
fn last_use(path: &Path) -> io::Result<SystemTime> {
    match found(fs::metadata(path))? {
        Some(metadata) => metadata.modified(),
        None => Ok(SystemTime::UNIX_EPOCH),
    }
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
        match layer.verify_present(chunk, &mut buf)? {
            None => verified.absent += 1,
            Some(true) => verified.good += 1,
            Some(false) => {
                layer.drop_chunk(chunk);
                verified.wrong += 1;
            }
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
    Filling,
    /// A process has it open, or the kernel has it mounted.
    InUse,
}

/// Removes a layer that no process fills or has open.
///
/// Whoever opens it at the same time gets all of it, and then it stays, or does not find it.
///
/// # Errors
/// Those of the file system. What is left then is out of sight, and removed at the next start.
pub fn remove(paths: &CachePaths, layer: DiffId) -> io::Result<Removed> {
    let place = paths.layer(layer);
    if !place.try_exists()? {
        return Ok(Removed::Absent);
    }
    let Some(fill_lock) = lock::try_lock(&paths.lock(layer))? else {
        return Ok(Removed::Filling);
    };
    // Without data nobody can have it open. Held until the directory is out of sight.
    let data = found(File::open(place.join(DATA)))?;
    if let Some(data) = &data
        && !lock::try_claim(data)?
    {
        return Ok(Removed::InUse);
    }
    // Who is about to mount it has it open.
    if place.join(MOUNTED).try_exists()? && whole::try_unmounted(&place)?.is_none() {
        return Ok(Removed::InUse);
    }
    let Some(aside) = found(paths.set_aside(layer))? else {
        return Ok(Removed::Absent);
    };
    // From here on it can be made anew.
    fill_lock.remove()?;
    drop(data);
    found(fs::remove_dir_all(&aside))?;
    Ok(Removed::Yes)
}

/// Removes an image's index, unless somebody has pinned it. It is made anew when it is wanted.
///
/// # Errors
/// Those of the file system.
pub(super) fn remove_image(paths: &CachePaths, image: ManifestDigest) -> io::Result<Removed> {
    let path = paths.image(image);
    let Some(file) = found(File::open(&path))? else {
        return Ok(Removed::Absent);
    };
    if !lock::try_claim(&file)? {
        return Ok(Removed::InUse);
    }
    let removed = found(fs::remove_file(path))?;
    Ok(removed.map_or(Removed::Absent, |()| Removed::Yes))
}

/// Removes the image indexes of which a layer is gone: the image has to be opened layer by layer
/// anyway.
///
/// # Errors
/// Those of the file system.
pub(super) fn remove_orphaned_images(paths: &CachePaths) -> io::Result<()> {
    for (image, path) in images(paths)? {
        let Some(file) = found(File::open(&path))? else {
            continue;
        };
        let index = MappedFile::new(&file).map(ImageIndex::open);
        let is_whole = index.is_ok_and(|it| {
            it.is_ok_and(|index| {
                let mut layers = (0..index.n_layers()).map(|it| index.layer(it));
                layers.all(|it| it.is_some_and(|it| paths.layer(it.diff_id).exists()))
            })
        });
        if !is_whole {
            remove_image(paths, image)?;
        }
    }
    Ok(())
}

/// Removes the profiles of images that were used least recently, if there are more than `max`.
///
/// One outlives its image's index: it is for the day when the image's layers have to come again.
///
/// # Errors
/// Those of the file system.
pub(super) fn remove_surplus_profiles(paths: &CachePaths, max: usize) -> io::Result<()> {
    let profiles = profiles(paths)?;
    let n_surplus = profiles.len().saturating_sub(max);
    if n_surplus == 0 {
        return Ok(());
    }
    let dated = profiles.into_iter().map(|it| Ok((last_use(&it)?, it)));
    let mut dated = dated.collect::<io::Result<Vec<_>>>()?;
    dated.sort_unstable();
    for (_, path) in dated.into_iter().take(n_surplus) {
        found(fs::remove_file(path))?;
    }
    Ok(())
}

/// Removes the image indexes and profiles, and returns how many indexes; they are made anew from the
/// layers' indexes when they are wanted.
///
/// # Errors
/// Those of the file system.
pub fn remove_images(paths: &CachePaths) -> io::Result<u64> {
    let mut n_removed = 0;
    for name in names(paths.images())? {
        fs::remove_file(paths.images().join(&name))?;
        n_removed += u64::from(name.ends_with(IMAGE_SUFFIX));
    }
    Ok(n_removed)
}

/// Removes what processes left behind that ended before their time.
///
/// Whoever fills or removes a layer holds its lock, so what belongs to a layer whose lock is free is
/// nobody's.
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
            let path = paths.temporary().join(&name);
            // A map in the making is a file.
            found(match path.is_dir() {
                true => fs::remove_dir_all(path),
                false => fs::remove_file(path),
            })?;
        }
    }
    for name in names(paths.locks())? {
        let Some(layer) = digest::from_hex(&name).map(DiffId::from_bytes) else {
            continue;
        };
        if paths.layer(layer).try_exists()? {
            continue;
        }
        if let Some(lock) = lock::try_lock(&paths.lock(layer))?
            && !paths.layer(layer).try_exists()?
        {
            lock.remove()?;
        }
    }
    for name in names(paths.images())? {
        let path = paths.images().join(&name);
        if name.ends_with(TEMPORARY_SUFFIX) && is_abandoned(&path)? {
            found(fs::remove_file(path))?;
        }
    }
    Ok(())
}

/// Whether nobody can be writing the file any more.
fn is_abandoned(path: &Path) -> io::Result<bool> {
    let age = SystemTime::now().duration_since(last_use(path)?);
    Ok(age.is_ok_and(|it| ABANDONED_AFTER < it))
}

/// The image indexes and their files.
fn images(paths: &CachePaths) -> io::Result<Vec<(ManifestDigest, PathBuf)>> {
    let names = names(paths.images())?;
    let images = names.iter().filter_map(|name| {
        let hex = name.strip_suffix(IMAGE_SUFFIX)?;
        let image = digest::from_hex(hex).map(ManifestDigest::from_bytes)?;
        Some((image, paths.images().join(name)))
    });
    Ok(images.collect())
}

/// The profiles of images.
fn profiles(paths: &CachePaths) -> io::Result<Vec<PathBuf>> {
    let names = names(paths.images())?;
    let names = names.iter().filter(|it| it.ends_with(PROFILE_SUFFIX));
    Ok(names.map(|it| paths.images().join(it)).collect())
}

/// The names in a directory; none if it does not exist.
fn names(dir: PathBuf) -> io::Result<Vec<String>> {
    match found(fs::read_dir(dir))? {
        Some(entries) => entries
            .map(|it| Ok(it?.file_name().to_string_lossy().into_owned()))
            .collect(),
        None => Ok(Vec::new()),
    }
}

/// Makes an absence a value.
fn found<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}
