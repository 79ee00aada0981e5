//! A layer as a process reads it that never fills one: it sees what others make present.

use std::{
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use super::{
    disk::{DATA, DiskWait, STATE, read_at},
    lock,
    state::{self, StateView},
};
use crate::digest::DiffId;

/// A layer that is open for reading. As long as it is, no process removes it.
#[derive(Debug)]
pub struct LayerReader {
    dir: PathBuf,
    layer: DiffId,
    /// What its DiffId determines: the same if it is made anew.
    layer_bytes: u64,
    /// std RwLock: held to copy it, or to replace it when the layer was made anew.
    files: RwLock<Arc<Files>>,
}

#[derive(Debug)]
struct Files {
    /// Carries the pin.
    data: File,
    /// What `state` maps.
    state_file: File,
    state: StateView,
    layer_bytes: u64,
}

impl LayerReader {
    /// Opens the layer in `dir`, which somebody who fills it has open.
    ///
    /// # Errors
    /// Those of the file system; `NotFound` also if the layer is just being removed; `InvalidData`
    /// if nobody has looked after it since the machine started.
    pub fn open(dir: &Path, layer: DiffId) -> io::Result<Self> {
        let files = Files::open(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            layer,
            layer_bytes: files.layer_bytes,
            files: RwLock::new(Arc::new(files)),
        })
    }

    /// Names the layer.
    pub fn diff_id(&self) -> DiffId {
        self.layer
    }

    /// Size of the decompressed layer.
    pub fn layer_bytes(&self) -> u64 {
        self.layer_bytes
    }

    /// Whether all `chunks` are present and verified.
    pub fn has(&self, chunks: Range<u32>) -> bool {
        let files = self.files();
        if files.state.has_all(chunks.clone()) {
            return true;
        }
        // A layer that was found damaged is made anew, in other files.
        let is_at = |file, name| lock::is_at(file, &self.dir.join(name)).unwrap_or(true);
        if is_at(&files.data, DATA) && is_at(&files.state_file, STATE) {
            return false;
        }
        let Ok(anew) = Files::open(&self.dir) else {
            return false;
        };
        let anew = Arc::new(anew);
        *self.files.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&anew);
        anew.state.has_all(chunks)
    }

    /// Fills `buf` from `offset`; `Ok(false)` if that would have to wait for the disk and must not.
    ///
    /// # Errors
    /// Those of preadv2(2); `UnexpectedEof` beyond the layer's end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64, wait: DiskWait) -> io::Result<bool> {
        read_at(&self.files().data, buf, offset, wait)
    }

    fn files(&self) -> Arc<Files> {
        let files = self.files.read();
        Arc::clone(&files.unwrap_or_else(PoisonError::into_inner))
    }
}

impl Files {
    fn open(dir: &Path) -> io::Result<Self> {
        let data_path = dir.join(DATA);
        let data = File::open(&data_path)?;
        let going = || io::Error::new(io::ErrorKind::NotFound, "the layer is being removed");
        if !lock::try_pin(&data)? {
            return Err(going());
        }
        let state_file = File::open(dir.join(STATE))?;
        let layer_bytes = data.metadata()?.len();
        let state = StateView::open(&state_file, layer_bytes, state::boot())?;
        // Else the directory was replaced before the pin was held, and the files are of two.
        if !lock::is_at(&data, &data_path)? {
            return Err(going());
        }
        Ok(Self {
            data,
            state_file,
            state,
            layer_bytes,
        })
    }
}
