//! A layer as a process reads it that never fills one: it sees what others make present.

use std::{
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    disk::{DATA, DiskWait, STATE, read_at},
    extent, lock,
    state::{self, StateView},
};
use crate::{chunk, digest::DiffId};

/// What is added to the count of evictions for each time that the files were replaced.
const REPLACED: u64 = 1 << 32;

/// A layer that is open for reading. As long as it is, no process removes it.
#[derive(Debug)]
pub struct LayerReader {
    dir: PathBuf,
    layer: DiffId,
    /// What its DiffId determines: the same if it is made anew.
    layer_bytes: u64,
    /// std RwLock: held to copy it, or to replace it when the layer was made anew.
    files: RwLock<Arc<Files>>,
    /// A bit for each extent that was read since it was asked last, lowest first.
    ///
    /// Whoever only reads has no right to write to the cache: it tells the agent, who notes it.
    read: Box<[AtomicU64]>,
}

#[derive(Debug)]
struct Files {
    /// Carries the pin.
    data: File,
    /// What `state` maps.
    state_file: File,
    state: StateView,
    layer_bytes: u64,
    /// Which files of the layer these are: 0, [`REPLACED`], and so on.
    generation: u64,
}

impl LayerReader {
    /// Opens the layer in `dir`, which somebody who fills it has open.
    ///
    /// # Errors
    /// Those of the file system; `NotFound` also if the layer is just being removed; `InvalidData`
    /// if nobody has looked after it since the machine started.
    pub fn open(dir: &Path, layer: DiffId) -> io::Result<Self> {
        let files = Files::open(dir, 0)?;
        let n_extents = extent::n_extents(files.state.n_chunks());
        let read = (0..n_extents.div_ceil(u64::BITS)).map(|_| AtomicU64::new(0));
        Ok(Self {
            dir: dir.to_owned(),
            layer,
            layer_bytes: files.layer_bytes,
            read: read.collect(),
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
        let generation = files.generation.wrapping_add(REPLACED);
        let Ok(anew) = Files::open(&self.dir, generation) else {
            return false;
        };
        let anew = Arc::new(anew);
        *self.files.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&anew);
        anew.state.has_all(chunks)
    }

    /// A number that has changed if bytes of these chunks were taken away, or the files replaced, since it
    /// was read before.
    pub fn n_evictions(&self, chunks: &Range<u32>) -> u64 {
        let files = self.files();
        let n_evictions = files.state.n_evictions(chunks);
        files.generation.wrapping_add(n_evictions)
    }

    /// Which extents were read since this was asked before, as ranges in order.
    pub fn take_read(&self) -> Vec<Range<u32>> {
        let mut taken: Vec<Range<u32>> = Vec::new();
        for (word, first) in self.read.iter().zip((0..).step_by(64)) {
            let bits = word.swap(0, Ordering::Relaxed);
            for extent in (0..u64::BITS).filter(|it| bits & (1 << it) != 0) {
                let extent = first + extent;
                match taken.last_mut() {
                    Some(last) if last.end == extent => last.end += 1,
                    _ => taken.push(extent..extent + 1),
                }
            }
        }
        taken
    }

    fn note_read(&self, offset: u64, len: usize) {
        let Some(chunks) = chunk::covering(offset, len as u64) else {
            return;
        };
        for extent in extent::covering(&chunks, u32::MAX) {
            let bit = 1 << (extent % u64::BITS);
            if let Some(word) = self.read.get((extent / u64::BITS) as usize)
                && word.load(Ordering::Relaxed) & bit == 0
            {
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Fills `buf` from `offset`; `Ok(false)` if that would have to wait for the disk and must not.
    ///
    /// # Errors
    /// Those of preadv2(2); `UnexpectedEof` beyond the layer's end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64, wait: DiskWait) -> io::Result<bool> {
        let read = read_at(&self.files().data, buf, offset, wait)?;
        if read {
            self.note_read(offset, buf.len());
        }
        Ok(read)
    }

    fn files(&self) -> Arc<Files> {
        let files = self.files.read();
        Arc::clone(&files.unwrap_or_else(PoisonError::into_inner))
    }
}

impl Files {
    fn open(dir: &Path, generation: u64) -> io::Result<Self> {
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
            generation,
        })
    }
}
