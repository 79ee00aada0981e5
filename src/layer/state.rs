//! The sidecar of a layer: which chunks are present, shared by every process on the node.
//!
//! ```text
//! word 0  "CLIPSTA2"
//! word 1  size of the decompressed layer in bytes
//! word 2  the boot of the machine in which the bits were set
//! word 3  flags: 1 = data is flushed, bits survive a reboot; 2 = data may hold chunks without bits;
//!         4 = this file took another's place, which processes may have mapped since before
//! word 4… one bit per chunk, lowest first
//! then    a word per extent: how often bytes of it were taken away
//! then    a word per extent: when it was used last, in milliseconds since 1970
//! ```
//!
//! # Readers and evictions
//!
//! Readers take no lock, and may read bytes just when these are taken away. Who takes them away
//!
//! 1. clears the bits, 2. counts the eviction, 3. punches the hole,
//!
//! while nobody may write or set a bit (`lock::try_write_alone`, against `lock::write`). A reader
//!
//! 1. reads the count, 2. sees all bits set, 3. reads the bytes, 4. sees all bits set, and the same count.
//!
//! Then the bytes are the chunk's. Let the read have met the hole. The punch was then over or under way,
//! and the count before it: the kernel's locks of the file order what comes before the one system call
//! with what comes after the other, and fences keep compiler and processor from moving our own
//! accesses across them. So the count read in 4 has this eviction in it, and must in 1, too. Whoever reads a
//! count also sees what was done before it was counted, the bits cleared, so that bits seen in 2 were set
//! after that: by a fill, which could not begin before the punch was over. Its bytes were written before
//! the bits, and the read in 3 has got them, not the hole. Without the count, an eviction and a fill that
//! both fall into one read would go unseen.
//!
//! A server may have mapped a state file before this one took its place: one of a former version of the
//! driver, or a damaged one. It sees no eviction. So nothing is taken away of a layer whose file says
//! that it took another's place, in this boot of the machine.

use std::{
    fs::{File, OpenOptions},
    io,
    ops::Range,
    path::Path,
    sync::atomic::{Ordering, fence},
};

use super::extent::{self, EXTENT_CHUNKS};
use crate::{
    chunk, disk,
    sys::{SharedWords, WordsView},
};

const MAGIC: u64 = u64::from_le_bytes(*b"CLIPSTA2");
const WORD_MAGIC: usize = 0;
const WORD_LAYER_BYTES: usize = 1;
const WORD_BOOT: usize = 2;
const WORD_FLAGS: usize = 3;
const FIRST_BITMAP_WORD: usize = 4;

const FLAG_FLUSHED: u64 = 1;
const FLAG_SUSPECT: u64 = 2;
const FLAG_REPLACED: u64 = 4;

/// How much later a use must be than the one noted last to be noted: less says nothing, and a reader in
/// order would write the word for each read.
const USE_GRAIN_MS: u64 = 64;

/// Where things are in the state of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Places {
    n_chunks: u32,
}

impl Places {
    /// Those of a layer of `layer_bytes`; `None` if no layer is so large.
    fn new(layer_bytes: u64) -> Option<Self> {
        let n_chunks = u32::try_from(chunk::n_chunks(layer_bytes)).ok()?;
        Some(Self { n_chunks })
    }

    fn n_extents(self) -> usize {
        extent::n_extents(self.n_chunks) as usize
    }

    fn n_bitmap_words(self) -> usize {
        self.n_chunks.div_ceil(64) as usize
    }

    fn n_words(self) -> usize {
        FIRST_BITMAP_WORD + self.n_bitmap_words() + 2 * self.n_extents()
    }

    fn bitmap(self) -> Range<usize> {
        FIRST_BITMAP_WORD..FIRST_BITMAP_WORD + self.n_bitmap_words()
    }

    /// The word that counts the evictions of `extent`.
    fn evictions(self, extent: u32) -> usize {
        self.bitmap().end + extent as usize
    }

    /// The word that says when `extent` was used last.
    fn last_use(self, extent: u32) -> usize {
        self.evictions(extent) + self.n_extents()
    }

    /// How often bytes of these chunks were taken away, or of their neighbours.
    fn n_evictions(self, chunks: &Range<u32>, load: impl Fn(usize) -> u64) -> u64 {
        let extents = extent::covering(chunks, self.n_chunks);
        let counts = extents.map(|it| load(self.evictions(it)));
        counts.fold(0, u64::wrapping_add)
    }
}

/// Which chunks of a layer are present.
#[derive(Debug)]
pub(super) struct State {
    words: SharedWords,
    places: Places,
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
        Self::flagged(layer_bytes, initial, boot, 0)
    }

    /// As [`initial`](Self::initial), with flags: who is killed leaves no file without those that it must have.
    fn flagged(layer_bytes: u64, initial: Initial, boot: u64, flags: u64) -> Vec<u8> {
        let n_chunks = chunk::n_chunks(layer_bytes);
        let mut words = vec![MAGIC, layer_bytes, boot, flags];
        for first in (0..n_chunks).step_by(64) {
            let n_bits = (n_chunks - first).min(64);
            let full = u64::MAX >> (64 - n_bits);
            words.push(if initial == Initial::Present { full } else { 0 });
        }
        // No evictions, and no use: whoever opens the layer notes one.
        let n_extents = n_chunks.div_ceil(u64::from(EXTENT_CHUNKS));
        words.extend((0..2 * n_extents).map(|_| 0));
        words.iter().flat_map(|it| it.to_le_bytes()).collect()
    }

    /// Maps the state of a layer of `layer_bytes`; a file that does not fit is replaced, and then,
    /// as after an unclean stop, no chunk counts as present until it is verified.
    ///
    /// # Errors
    /// Those of the file system.
    pub(super) fn open(path: &Path, layer_bytes: u64, boot: u64) -> io::Result<Self> {
        let places = Places::new(layer_bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "too many chunks"))?;
        let map = || -> io::Result<Option<SharedWords>> {
            let file = match OpenOptions::new().read(true).write(true).open(path) {
                Ok(file) => file,
                Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(err) => return Err(err),
            };
            if file.metadata()?.len() != places.n_words() as u64 * 8 {
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
                let flags = match path.try_exists()? {
                    true => FLAG_SUSPECT | FLAG_REPLACED,
                    false => FLAG_SUSPECT,
                };
                let content = Self::flagged(layer_bytes, Initial::Absent, boot, flags);
                disk::publish(path, &content)?;
                map()?.ok_or_else(|| io::Error::other("state file changed meanwhile"))?
            }
        };
        let state = Self { words, places };
        if state.words.load(WORD_BOOT) != boot {
            if state.words.load(WORD_FLAGS) & FLAG_FLUSHED == 0 {
                state.words.store(WORD_FLAGS, FLAG_SUSPECT);
                for word in places.bitmap() {
                    state.words.store(word, 0);
                }
            }
            state.words.clear_bits(WORD_FLAGS, FLAG_REPLACED);
            state.words.store(WORD_BOOT, boot);
        }
        Ok(state)
    }

    pub(super) fn n_chunks(&self) -> u32 {
        self.places.n_chunks
    }

    /// Whether `chunk` is present and verified.
    pub(super) fn has(&self, chunk: u32) -> bool {
        let (word, bit) = place(chunk);
        chunk < self.n_chunks() && self.words.load(word) & bit != 0
    }

    /// Whether all `chunks` are present and verified.
    pub(super) fn has_all(&self, mut chunks: Range<u32>) -> bool {
        chunks.all(|it| self.has(it))
    }

    /// How many chunks are present.
    pub(super) fn n_present(&self) -> u32 {
        (self.places.bitmap())
            .map(|it| self.words.load(it).count_ones())
            .sum()
    }

    /// Whether bytes may be taken away: whether everybody who has the layer open sees it.
    pub(super) fn is_seen_by_all(&self) -> bool {
        self.words.load(WORD_FLAGS) & FLAG_REPLACED == 0
    }

    /// Marks `chunk` present; says whether it was not before. The caller may write (`lock::write`).
    pub(super) fn set(&self, chunk: u32) -> bool {
        let (word, bit) = place(chunk);
        self.words.set_bits(word, bit) & bit == 0
    }

    /// Marks `chunk` absent: its bytes turned out to be wrong.
    ///
    /// What takes its place is not flushed.
    pub(super) fn clear(&self, chunk: u32) {
        let (word, bit) = place(chunk);
        self.words.clear_bits(WORD_FLAGS, FLAG_FLUSHED);
        self.words.clear_bits(word, bit);
        let extents = extent::covering(&(chunk..chunk.saturating_add(1)), self.n_chunks());
        extents.for_each(|it| self.words.add(self.places.evictions(it), 1));
        // Whoever looked before that was counted may have marked the layer since: it waits for no lock.
        self.words.clear_bits(WORD_FLAGS, FLAG_FLUSHED);
    }

    /// A number that has changed if bytes of `chunks` were taken away since it was read before.
    pub(super) fn n_evictions(&self, chunks: &Range<u32>) -> u64 {
        (self.places).n_evictions(chunks, |it| self.words.load(it))
    }

    /// Marks the chunks of `extent` absent, which are to be taken away when this has returned; says which
    /// were present.
    ///
    /// The caller alone may write (`lock::try_write_alone`), and has had [`distrust`](Self::distrust) done.
    pub(super) fn begin_eviction(&self, extent: u32) -> Vec<u32> {
        let chunks = extent::chunks(extent, self.n_chunks());
        let present: Vec<u32> = chunks.clone().filter(|it| self.has(*it)).collect();
        let (word, first) = place(chunks.start);
        // An extent's bits are in one word.
        let mask = (1 << EXTENT_CHUNKS) - 1;
        self.words.clear_bits(word, first * mask);
        self.words.add(self.places.evictions(extent), 1);
        // Before the system call that punches.
        fence(Ordering::SeqCst);
        present
    }

    /// When `extent` was used last, in milliseconds since 1970; 0 if nobody knows.
    pub(super) fn last_use_ms(&self, extent: u32) -> u64 {
        self.words.load(self.places.last_use(extent))
    }

    /// Notes for all extents of which no use is known that they are used now.
    pub(super) fn note_first_use(&self, now_ms: u64) {
        for extent in 0..extent::n_extents(self.n_chunks()) {
            let word = self.places.last_use(extent);
            if self.words.load(word) == 0 {
                self.words.store(word, now_ms);
            }
        }
    }

    /// Notes that the extents of `chunks` are used now.
    pub(super) fn note_use(&self, chunks: &Range<u32>, now_ms: u64) {
        for extent in extent::covering(chunks, self.n_chunks()) {
            let word = self.places.last_use(extent);
            let noted = self.words.load(word);
            // What is noted of a time to come was noted by a clock that was wrong.
            if noted.saturating_add(USE_GRAIN_MS) <= now_ms || now_ms < noted {
                self.words.store(word, now_ms);
            }
        }
    }

    /// Whether the data file may hold chunks that are not marked.
    pub(super) fn is_suspect(&self) -> bool {
        self.words.load(WORD_FLAGS) & FLAG_SUSPECT != 0
    }

    /// What [`mark_flushed`](Self::mark_flushed) wants to know of how it was before the data is flushed; `None`
    /// if chunks are absent: what comes while the data is flushed may not be.
    pub(super) fn begin_flush(&self) -> Option<u64> {
        let n_evictions = self.n_evictions(&(0..self.n_chunks()));
        (self.n_present() == self.n_chunks()).then_some(n_evictions)
    }

    /// Records that the data is on stable storage, so that the bits survive a reboot, unless chunks are
    /// absent, or bytes were taken away since [`begin_flush`](Self::begin_flush) gave `n_evictions`, before the
    /// data was flushed. What has come since may not be flushed.
    ///
    /// The caller may write (`lock::write`), so that nothing is taken away meanwhile.
    ///
    /// # Errors
    /// Those of fsync(2).
    pub(super) fn mark_flushed(&self, path: &Path, n_evictions: u64) -> io::Result<()> {
        if self.begin_flush() != Some(n_evictions) || !self.flag_flushed(n_evictions) {
            return Ok(());
        }
        // Shared maps and file share pages, so fsync of any descriptor writes the bits.
        File::open(path)?.sync_all()
    }

    /// Flags that the data is flushed, unless a chunk was [cleared](Self::clear) that was there a moment ago:
    /// either this sees that it was counted, or who counted it takes the flag away afterwards.
    fn flag_flushed(&self, n_evictions: u64) -> bool {
        self.words.set_bits(WORD_FLAGS, FLAG_FLUSHED);
        let is_as_before = self.n_evictions(&(0..self.n_chunks())) == n_evictions;
        if !is_as_before {
            self.words.clear_bits(WORD_FLAGS, FLAG_FLUSHED);
        }
        is_as_before
    }

    /// Sees to it that no bit survives a reboot, before bytes are taken away: the kernel writes a bit that
    /// is set again, and the hole, and what comes into it, in any order.
    ///
    /// Waits for the disk only if the data was flushed before.
    ///
    /// # Errors
    /// Those of fsync(2): then nothing may be taken away.
    pub(super) fn distrust(&self, path: &Path) -> io::Result<()> {
        if self.words.load(WORD_FLAGS) & FLAG_FLUSHED == 0 {
            return Ok(());
        }
        self.words.clear_bits(WORD_FLAGS, FLAG_FLUSHED);
        File::open(path)?.sync_all().inspect_err(|_| {
            // The next one is to try again.
            self.words.set_bits(WORD_FLAGS, FLAG_FLUSHED);
        })
    }
}

/// Which chunks of a layer are present, for who only reads it.
#[derive(Debug)]
pub(super) struct StateView {
    words: WordsView,
    places: Places,
}

impl StateView {
    /// Maps the state of a layer of `layer_bytes` that somebody has opened in this boot.
    ///
    /// # Errors
    /// `InvalidData` if nobody has, or the file is of another layer; else those of mmap(2).
    pub(super) fn open(file: &File, layer_bytes: u64, boot: u64) -> io::Result<Self> {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "state of another layer or boot");
        let places = Places::new(layer_bytes).ok_or_else(wrong)?;
        if file.metadata()?.len() != places.n_words() as u64 * 8 {
            return Err(wrong());
        }
        let words = WordsView::new(file)?;
        let has = |at, word| words.load(at) == word;
        if !has(WORD_MAGIC, MAGIC) || !has(WORD_LAYER_BYTES, layer_bytes) || !has(WORD_BOOT, boot) {
            return Err(wrong());
        }
        Ok(Self { words, places })
    }

    /// Whether all `chunks` are present and verified.
    pub(super) fn has_all(&self, mut chunks: Range<u32>) -> bool {
        chunks.all(|it| {
            let (word, bit) = place(it);
            it < self.places.n_chunks && self.words.load(word) & bit != 0
        })
    }

    /// As [`State::n_evictions`].
    pub(super) fn n_evictions(&self, chunks: &Range<u32>) -> u64 {
        (self.places).n_evictions(chunks, |it| self.words.load(it))
    }

    pub(super) fn n_chunks(&self) -> u32 {
        self.places.n_chunks
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
            .mark_flushed(&path, 0)
            .unwrap();
        let state = State::open(&path, LAYER_BYTES, 2).unwrap();
        assert_eq!((state.n_present(), state.is_suspect()), (71, false));
    }

    #[test]
    fn a_file_that_does_not_fit_is_replaced_and_suspect() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        // The last one is of version 1, which knew no extents.
        let mut former = State::initial(LAYER_BYTES, Initial::Present, 1);
        former.truncate(8 * 6);
        former[7] = b'1';
        for content in [&b""[..], b"garbage", &[0; 8 * 6], &former] {
            disk::publish(&path, content).unwrap();
            let state = State::open(&path, LAYER_BYTES, 1).unwrap();
            assert_eq!((state.n_present(), state.is_suspect()), (0, true));
            assert!(!state.is_seen_by_all());
        }
        let open = |boot| State::open(&path, LAYER_BYTES, boot).unwrap();
        assert!(!open(1).is_seen_by_all());
        // Also if whoever replaced it was killed the moment after.
        let flags = FLAG_SUSPECT | FLAG_REPLACED;
        let content = State::flagged(LAYER_BYTES, Initial::Absent, 1, flags);
        disk::publish(&path, &content).unwrap();
        assert!(open(1).is_suspect() && !open(1).is_seen_by_all());
        // Nobody has anything mapped from before the machine started.
        assert!(open(2).is_seen_by_all());
        std::fs::remove_file(&path).unwrap();
        assert!(open(2).is_seen_by_all(), "there was none before");
    }

    /// Fails if the format changes: raise the version in the magic, so that both are told apart.
    #[test]
    fn golden_bytes() {
        let bytes = State::initial(LAYER_BYTES, Initial::Present, 0x1122_3344_5566_7788);
        let mut expected = b"CLIPSTA2".to_vec();
        expected.extend(LAYER_BYTES.to_le_bytes());
        expected.extend([0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11]);
        expected.extend([0; 8]);
        expected.extend([0xff; 8]);
        expected.extend([0x7f, 0, 0, 0, 0, 0, 0, 0]);
        // Evictions and last uses of five extents.
        expected.extend([0; 2 * 5 * 8]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn an_eviction_takes_the_chunks_of_its_extent_and_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        disk::publish(&path, &State::initial(LAYER_BYTES, Initial::Present, 1)).unwrap();
        let state = State::open(&path, LAYER_BYTES, 1).unwrap();
        let view = StateView::open(&File::open(&path).unwrap(), LAYER_BYTES, 1).unwrap();
        assert_eq!(state.begin_eviction(1), (16..32).collect::<Vec<_>>());
        assert_eq!(state.begin_eviction(4), (64..71).collect::<Vec<_>>());
        let left: Vec<u32> = (0..16).chain(32..64).collect();
        assert_eq!(present(&state), left);
        let counts = |of: &dyn Fn(&Range<u32>) -> u64| {
            [0..16, 15..17, 16..17, 0..71, 70..99].map(|it| of(&it))
        };
        assert_eq!(counts(&|it| state.n_evictions(it)), [0, 1, 1, 2, 1]);
        assert_eq!(counts(&|it| view.n_evictions(it)), [0, 1, 1, 2, 1]);
        // What was wrong and is to be fetched anew is as if it were evicted.
        state.clear(0);
        assert_eq!(counts(&|it| view.n_evictions(it)), [1, 2, 1, 3, 1]);
        // Filled again, it is there, and has been away.
        (16..32).for_each(|it| assert!(state.set(it)));
        assert!(view.has_all(16..32));
        assert_eq!(view.n_evictions(&(16..32)), 1);
        // Counts are the file's, not the process's.
        let again = State::open(&path, LAYER_BYTES, 1).unwrap();
        assert_eq!(again.n_evictions(&(0..71)), 3);
    }

    #[test]
    fn uses_are_noted_by_extent_and_not_too_often() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        disk::publish(&path, &State::initial(LAYER_BYTES, Initial::Absent, 1)).unwrap();
        let state = State::open(&path, LAYER_BYTES, 1).unwrap();
        state.note_use(&(70..71), 5000);
        state.note_first_use(6000);
        let uses = || [0, 1, 2, 3, 4].map(|it| state.last_use_ms(it));
        assert_eq!(uses(), [6000, 6000, 6000, 6000, 5000]);
        for (now_ms, noted) in [(6063, 6000), (6064, 6064), (6065, 6064), (9000, 9000)] {
            state.note_use(&(0..17), now_ms);
            assert_eq!(uses(), [noted, noted, 6000, 6000, 5000], "at {now_ms}");
        }
        // The clock was set back.
        state.note_use(&(0..1), 100);
        assert_eq!(state.last_use_ms(0), 100);
        state.note_use(&(71..u32::MAX), 9000);
        assert_eq!(uses(), [100, 9000, 6000, 6000, 5000]);
    }

    #[test]
    fn bits_of_a_layer_that_lost_bytes_do_not_survive_a_reboot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let open = |boot| State::open(&path, LAYER_BYTES, boot).unwrap();
        let n_evictions = |state: &State| state.n_evictions(&(0..71));
        disk::publish(&path, &State::initial(LAYER_BYTES, Initial::Present, 1)).unwrap();
        let state = open(1);
        state.mark_flushed(&path, 0).unwrap();
        assert_eq!(open(2).n_present(), 71);
        state.distrust(&path).unwrap();
        state.begin_eviction(0);
        (0..16).for_each(|it| assert!(state.set(it)));
        // It had been flushed before that, and not since.
        state.mark_flushed(&path, 0).unwrap();
        let state = open(3);
        assert_eq!((state.n_present(), state.is_suspect()), (0, true));
        // Flushed anew, once all is there.
        (0..70).for_each(|it| assert!(state.set(it)));
        assert_eq!(state.begin_flush(), None, "what comes meanwhile is not");
        state.mark_flushed(&path, n_evictions(&state)).unwrap();
        assert_eq!(open(4).n_present(), 0, "a chunk was absent");
        (0..71).for_each(|it| assert!(state.set(it)));
        let begun = state.begin_flush();
        assert_eq!(begun, Some(n_evictions(&state)));
        state.mark_flushed(&path, begun.unwrap()).unwrap();
        assert_eq!(open(5).n_present(), 71);
        // What takes the place of a chunk that was wrong is not flushed.
        state.clear(7);
        state.set(7);
        assert!(!state.flag_flushed(begun.unwrap()), "it had been looked at");
        assert_eq!(open(6).n_present(), 0);
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
