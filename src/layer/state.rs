//! The sidecar of a layer: which chunks are present, shared by every process on the node.
//!
//! ```text
//! word 0  "CLIPSTA1"
//! word 1  size of the decompressed layer in bytes
//! word 2  the boot of the machine in which the bits were set
//! word 3  flags: 1 = data is flushed, bits survive a reboot; 2 = data may hold chunks without bits
//! word 4… one bit per chunk, lowest first
//! ```

use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    path::Path,
};

use crate::{
    chunk, disk,
    sys::{SharedWords, WordsView},
};

const MAGIC: u64 = u64::from_le_bytes(*b"CLIPSTA1");
const WORD_MAGIC: usize = 0;
const WORD_LAYER_BYTES: usize = 1;
const WORD_BOOT: usize = 2;
const WORD_FLAGS: usize = 3;
const FIRST_BITMAP_WORD: usize = 4;

const FLAG_FLUSHED: u64 = 1;
const FLAG_SUSPECT: u64 = 2;

/// Which chunks of a layer are present.
#[derive(Debug)]
pub(super) struct State {
    words: SharedWords,
    n_chunks: u32,
}

/// Whether the chunks of a new state are present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Initial {
    Absent,
    Present,
}

impl State {
    /// The bytes of a new state file.
    pub(super) fn initial(layer_bytes: u64, initial: Initial, boot: u64) -> Vec<u8> {
        let n_chunks = chunk::n_chunks(layer_bytes);
        let mut words = vec![MAGIC, layer_bytes, boot, 0];
        for first in (0..n_chunks).step_by(64) {
            let n_bits = (n_chunks - first).min(64);
            let full = u64::MAX >> (64 - n_bits);
            words.push(if initial == Initial::Present { full } else { 0 });
        }
        words.iter().flat_map(|it| it.to_le_bytes()).collect()
    }

    /// Maps the state of a layer of `layer_bytes`; a file that does not fit is replaced, and then,
    /// as after an unclean stop, no chunk counts as present until it is verified.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn open(path: &Path, layer_bytes: u64, boot: u64) -> io::Result<Self> {
        let n_chunks = u32::try_from(chunk::n_chunks(layer_bytes))
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "too many chunks"))?;
        let expected_words = FIRST_BITMAP_WORD + n_chunks.div_ceil(64) as usize;
        let map = || -> io::Result<Option<SharedWords>> {
            let file = match OpenOptions::new().read(true).write(true).open(path) {
                Ok(file) => file,
                Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(err) => return Err(err),
            };
            if file.metadata()?.len() != expected_words as u64 * 8 {
                return Ok(None);
            }
            let words = SharedWords::new(&file)?;
            let fits =
                words.load(WORD_MAGIC) == MAGIC && words.load(WORD_LAYER_BYTES) == layer_bytes;
            Ok(fits.then_some(words))
        };
        let words = match map()? {
            Some(words) => words,
            None => {
                disk::publish(path, &Self::initial(layer_bytes, Initial::Absent, boot))?;
                let words =
                    map()?.ok_or_else(|| io::Error::other("state file changed meanwhile"))?;
                words.set_bits(WORD_FLAGS, FLAG_SUSPECT);
                words
            }
        };
        let state = Self { words, n_chunks };
        if state.words.load(WORD_BOOT) != boot {
            if state.words.load(WORD_FLAGS) & FLAG_FLUSHED == 0 {
                state.words.store(WORD_FLAGS, FLAG_SUSPECT);
                for word in FIRST_BITMAP_WORD..state.words.len() {
                    state.words.store(word, 0);
                }
            }
            state.words.store(WORD_BOOT, boot);
        }
        Ok(state)
    }

    pub(super) fn n_chunks(&self) -> u32 {
        self.n_chunks
    }

    /// Whether `chunk` is present and verified.
    pub(super) fn has(&self, chunk: u32) -> bool {
        let (word, bit) = place(chunk);
        chunk < self.n_chunks && self.words.load(word) & bit != 0
    }

    /// Whether all `chunks` are present and verified.
    pub(super) fn has_all(&self, mut chunks: Range<u32>) -> bool {
        chunks.all(|it| self.has(it))
    }

    /// How many chunks are present.
    pub(super) fn n_present(&self) -> u32 {
        (FIRST_BITMAP_WORD..self.words.len())
            .map(|it| self.words.load(it).count_ones())
            .sum()
    }

    /// Marks `chunk` present; says whether it was not before.
    pub(super) fn set(&self, chunk: u32) -> bool {
        let (word, bit) = place(chunk);
        self.words.set_bits(word, bit) & bit == 0
    }

    /// Marks `chunk` absent: its bytes turned out to be wrong.
    pub(super) fn clear(&self, chunk: u32) {
        let (word, bit) = place(chunk);
        self.words.clear_bits(word, bit);
    }

    /// Whether the data file may hold chunks that are not marked.
    pub(super) fn is_suspect(&self) -> bool {
        self.words.load(WORD_FLAGS) & FLAG_SUSPECT != 0
    }

    /// Records that the data is on stable storage, so that the bits survive a reboot.
    ///
    /// Call only after fsync of the data, with all bits set before that.
    ///
    /// # Errors
    /// Those of fsync(2).
    pub(super) fn mark_flushed(&self, path: &Path) -> io::Result<()> {
        self.words.set_bits(WORD_FLAGS, FLAG_FLUSHED);
        // Shared maps and file share pages, so fsync of any descriptor writes the bits.
        File::open(path)?.sync_all()
    }
}

/// Which chunks of a layer are present, for who only reads it.
#[derive(Debug)]
pub(super) struct StateView {
    words: WordsView,
    n_chunks: u32,
}

impl StateView {
    /// Maps the state of a layer of `layer_bytes` that somebody has opened in this boot.
    ///
    /// # Errors
    /// `InvalidData` if nobody has, or the file is of another layer; else those of mmap(2).
    pub(super) fn open(file: &File, layer_bytes: u64, boot: u64) -> io::Result<Self> {
        let n_chunks = chunk::n_chunks(layer_bytes);
        let expected_words = FIRST_BITMAP_WORD as u64 + n_chunks.div_ceil(64);
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "state of another layer or boot");
        let n_chunks = u32::try_from(n_chunks).map_err(|_| wrong())?;
        if file.metadata()?.len() != expected_words * 8 {
            return Err(wrong());
        }
        let words = WordsView::new(file)?;
        let has = |at, word| words.load(at) == word;
        if !has(WORD_MAGIC, MAGIC) || !has(WORD_LAYER_BYTES, layer_bytes) || !has(WORD_BOOT, boot) {
            return Err(wrong());
        }
        Ok(Self { words, n_chunks })
    }

    /// Whether all `chunks` are present and verified.
    pub(super) fn has_all(&self, mut chunks: Range<u32>) -> bool {
        chunks.all(|it| {
            let (word, bit) = place(it);
            it < self.n_chunks && self.words.load(word) & bit != 0
        })
    }
}

fn place(chunk: u32) -> (usize, u64) {
    (FIRST_BITMAP_WORD + chunk as usize / 64, 1 << (chunk % 64))
}

/// Identifies this boot of the machine (random(4), `boot_id`); 0 if the kernel does not tell.
pub(super) fn boot() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let hex: String = text
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(16)
        .collect();
    u64::from_str_radix(&hex, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::CHUNK_BYTES;

    const LAYER_BYTES: u64 = 70 * CHUNK_BYTES + 1;

    fn present(state: &State) -> Vec<u32> {
        (0..state.n_chunks()).filter(|it| state.has(*it)).collect()
    }

    #[test]
    fn bits_survive_reopening_in_the_same_boot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        disk::publish(&path, &State::initial(LAYER_BYTES, Initial::Absent, 1)).unwrap();
        let state = State::open(&path, LAYER_BYTES, 1).unwrap();
        assert!(state.set(0) && state.set(70) && !state.set(70));
        assert!(!state.has(71) && !state.has(u32::MAX - 1));
        let again = State::open(&path, LAYER_BYTES, 1).unwrap();
        assert_eq!(present(&again), [0, 70]);
        let view = StateView::open(&File::open(&path).unwrap(), LAYER_BYTES, 1).unwrap();
        assert!(view.has_all(0..1) && view.has_all(70..71) && !view.has_all(70..72));
        assert!(state.set(1) && view.has_all(0..2));
        state.clear(1);
        assert!(!view.has_all(0..2));
        for (layer_bytes, boot) in [(LAYER_BYTES + 1, 1), (LAYER_BYTES, 2), (1, 1)] {
            let err = StateView::open(&File::open(&path).unwrap(), layer_bytes, boot).unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::InvalidData);
        }
        assert_eq!(again.n_present(), 2);
        assert!(!again.is_suspect() && again.has_all(70..71) && !again.has_all(69..71));
        again.clear(70);
        assert_eq!(present(&state), [0]);
    }

    #[test]
    fn bits_of_another_boot_count_only_if_flushed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        disk::publish(&path, &State::initial(LAYER_BYTES, Initial::Present, 1)).unwrap();
        let state = State::open(&path, LAYER_BYTES, 2).unwrap();
        assert_eq!((state.n_present(), state.is_suspect()), (0, true));

        disk::publish(&path, &State::initial(LAYER_BYTES, Initial::Present, 1)).unwrap();
        State::open(&path, LAYER_BYTES, 1)
            .unwrap()
            .mark_flushed(&path)
            .unwrap();
        let state = State::open(&path, LAYER_BYTES, 2).unwrap();
        assert_eq!((state.n_present(), state.is_suspect()), (71, false));
    }

    #[test]
    fn a_file_that_does_not_fit_is_replaced_and_suspect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        for content in [&b""[..], b"garbage", &[0; 8 * 6]] {
            disk::publish(&path, content).unwrap();
            let state = State::open(&path, LAYER_BYTES, 1).unwrap();
            assert_eq!((state.n_present(), state.is_suspect()), (0, true));
        }
    }

    #[test]
    fn an_empty_layer_has_no_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        disk::publish(&path, &State::initial(0, Initial::Present, 1)).unwrap();
        let state = State::open(&path, 0, 1).unwrap();
        assert_eq!((state.n_chunks(), state.n_present()), (0, 0));
        assert!(state.has_all(0..0));
    }
}
