use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, fence},
    thread,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    digest::{ChunkDigest, DiffId},
    index::layer_index::LayerIndexBuilder,
    layer::{
        disk::{CachePaths, DiskWait, INDEX, Staging},
        reader::LayerReader,
        state,
    },
};

/// Two extents, of which the second one has ten chunks and a part of one.
const TAIL_BYTES: u64 = 10 * CHUNK_BYTES + 5000;
const LAYER_BYTES: u64 = 16 * CHUNK_BYTES + TAIL_BYTES;

struct Case {
    dir: tempfile::TempDir,
    content: Vec<u8>,
    layer: DiffId,
}

impl Case {
    /// A layer that has all of its bytes, none of which is zero.
    fn new() -> Self {
        let mut state = 88172645463325252u64;
        let words = (0..LAYER_BYTES.div_ceil(8)).flat_map(|_| {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state | 0x0101_0101_0101_0101).to_le_bytes()
        });
        let content: Vec<u8> = words.take(usize::try_from(LAYER_BYTES).unwrap()).collect();
        let layer = DiffId::of(b"a layer");
        let mut index = LayerIndexBuilder::default();
        for chunk in content.chunks(usize::try_from(CHUNK_BYTES).unwrap()) {
            index.push_chunk(&ChunkDigest::of(chunk));
        }
        let case = Self {
            // XFS lets no hole be punched in the middle of a read, which is what is to be seen here.
            dir: tempfile::tempdir_in("/dev/shm")
                .or_else(|_| tempfile::tempdir())
                .unwrap(),
            content,
            layer,
        };
        let index = index.finish(layer, LAYER_BYTES);
        let staging = Staging::new(&case.paths(), layer).unwrap();
        staging.write(INDEX, &index).unwrap();
        staging
            .publish_empty(&case.paths(), layer, LAYER_BYTES)
            .unwrap();
        let file = case.open();
        (0..file.n_chunks()).for_each(|it| case.fill(&file, it));
        case
    }

    fn paths(&self) -> CachePaths {
        CachePaths::new(self.dir.path())
    }

    fn open(&self) -> LayerFile {
        let dir = self.paths().layer(self.layer);
        LayerFile::open(&dir, self.layer).unwrap().unwrap()
    }

    fn bytes(&self, range: Range<u64>) -> &[u8] {
        &self.content[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
    }

    fn fill(&self, file: &LayerFile, chunk: u32) {
        let bytes = self.bytes(chunk::byte_range(chunk, LAYER_BYTES));
        assert!(file.write_chunk(chunk, bytes).unwrap().is_some());
    }

    /// Makes the state look as the machine's next boot finds it.
    fn reboot(&self) {
        let path = self.paths().layer(self.layer).join(STATE);
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&(state::boot() ^ 1).to_le_bytes(), 16)
            .unwrap();
    }
}

fn present(file: &LayerFile) -> Vec<u32> {
    (0..file.n_chunks())
        .filter(|it| file.has(*it..*it + 1))
        .collect()
}

fn gone(evicted: Evicted) -> u64 {
    match evicted {
        Evicted::Some { bytes, .. } => bytes,
        Evicted::Busy | Evicted::Unsupported => 0,
    }
}

#[test]
fn an_evicted_extent_gives_its_bytes_to_the_disk_and_comes_back() {
    let case = Case::new();
    let file = case.open();
    let extents = |file: &LayerFile| {
        file.evictable()
            .iter()
            .map(|it| (it.extent, it.bytes))
            .collect::<Vec<_>>()
    };
    assert_eq!(extents(&file), [(0, 16 * CHUNK_BYTES), (1, TAIL_BYTES)]);
    assert!(!file.was_cut());
    // Blocks of the disk are counted, of which the file's last one is not full.
    let freed = gone(file.evict(&[0]).unwrap());
    assert_eq!(freed, 16 * CHUNK_BYTES);
    assert_eq!(present(&file), (16..27).collect::<Vec<_>>());
    assert!(file.was_cut());
    let mut hole = [1; 4096];
    assert!(
        file.read_at(&mut hole, 5 * CHUNK_BYTES, DiskWait::Allowed)
            .unwrap()
    );
    assert_eq!(hole, [0; 4096]);
    assert_eq!(extents(&file), [(1, TAIL_BYTES)]);
    case.fill(&file, 3);
    assert_eq!(extents(&file), [(0, CHUNK_BYTES), (1, TAIL_BYTES)]);
    // But for its last block, which stays in the file.
    assert!(TAIL_BYTES < gone(file.evict(&[0, 1]).unwrap()));
    assert_eq!((present(&file), extents(&file)), (vec![], vec![]));
    (0..file.n_chunks()).for_each(|it| case.fill(&file, it));
    let mut all = vec![0; case.content.len()];
    assert!(file.read_at(&mut all, 0, DiskWait::Allowed).unwrap());
    assert!(file.is_complete() && all == case.content);
}

#[test]
fn what_is_waited_for_written_or_kept_stays() {
    let case = Case::new();
    let (file, other_process) = (case.open(), case.open());
    let waiting = [file.wait_for(&(2..3)), file.wait_for(&(3..4))];
    let evictable = || {
        file.evictable()
            .iter()
            .map(|it| it.extent)
            .collect::<Vec<_>>()
    };
    assert_eq!(evictable(), [1]);
    let [one, other] = waiting;
    drop(one);
    assert_eq!(evictable(), [1]);
    drop(other);
    assert_eq!(evictable(), [0, 1]);
    let kept = other_process.keep_whole().unwrap();
    assert_eq!(file.evict(&[0, 1]).unwrap(), Evicted::Busy);
    drop(kept);
    let writing = lock::write(&case.paths().layer(case.layer).join(STATE)).unwrap();
    assert_eq!(file.evict(&[0, 1]).unwrap(), Evicted::Busy);
    drop(writing);
    assert!(file.is_complete());
    assert!(0 < gone(file.evict(&[0, 1]).unwrap()));
}

#[test]
fn what_is_not_all_there_is_not_flushed() {
    let case = Case::new();
    let file = case.open();
    file.drop_chunk(3);
    // Who may not write cannot mark it: a flush that would is noticed.
    let _alone = lock::try_write_alone(&file.dir.join(STATE)).unwrap();
    assert!(file.flush().run().is_ok(), "its readers bring the rest");
}

#[test]
fn a_read_is_a_use() {
    let case = Case::new();
    let file = case.open();
    let uses = |file: &LayerFile| [0, 1].map(|it| file.state.last_use_ms(it));
    file.state.note_use(&(0..27), 1000);
    assert_eq!(uses(&file), [1000, 1000]);
    let before = now_ms();
    let mut buf = [0; 10];
    file.read_at(&mut buf, 16 * CHUNK_BYTES, DiskWait::Allowed)
        .unwrap();
    assert!(uses(&file)[0] == 1000 && before <= uses(&file)[1]);
    // Also one that was read by somebody who tells of it.
    let reader = LayerReader::open(file.dir(), case.layer).unwrap();
    assert_eq!(reader.take_read(), []);
    reader
        .read_at(&mut buf, 16 * CHUNK_BYTES - 5, DiskWait::Allowed)
        .unwrap();
    let take_read = || {
        (reader.take_read().iter())
            .map(|it| (it.start, it.end))
            .collect::<Vec<_>>()
    };
    assert_eq!(take_read(), [(0, 2)]);
    assert_eq!(take_read(), []);
    reader.read_at(&mut buf, 0, DiskWait::Allowed).unwrap();
    let read = reader.take_read();
    assert_eq!((read.len(), read[0].clone()), (1, 0..1));
    file.note_extents(&read[0]);
    assert!(before <= uses(&file)[0]);
    // Others of the same layer know.
    assert_eq!(uses(&case.open()), uses(&file));
}

/// A reboot in which the kernel had written the bits and not what they are of.
#[test]
fn no_bit_that_was_set_after_an_eviction_survives_a_reboot() {
    let case = Case::new();
    let file = case.open();
    file.flush().run().unwrap();
    case.reboot();
    assert!(case.open().is_complete(), "it was flushed");
    assert!(!case.open().is_suspect());
    let file = case.open();
    assert!(0 < gone(file.evict(&[0]).unwrap()));
    case.fill(&file, 0);
    // The power fails before chunk 0 came to the disk.
    let zeros = vec![0; usize::try_from(CHUNK_BYTES).unwrap()];
    file.data.write_all_at(&zeros, 0).unwrap();
    case.reboot();
    let file = case.open();
    assert_eq!((present(&file), file.is_suspect()), (vec![], true));
    let adopted: Vec<u32> = (0..27)
        .filter(|it| file.adopt_chunk(*it).unwrap())
        .collect();
    assert_eq!(
        adopted,
        (16..27).collect::<Vec<_>>(),
        "the others are not what they should be"
    );
}

#[test]
fn a_flush_that_an_eviction_overtakes_vouches_for_nothing() {
    let case = Case::new();
    let file = case.open();
    let flush = file.flush();
    assert!(0 < gone(file.evict(&[1]).unwrap()));
    flush.run().unwrap();
    case.reboot();
    assert_eq!(present(&case.open()), [] as [u32; 0]);
}

/// What readers have met.
#[derive(Default)]
struct Met {
    good: AtomicU64,
    /// Wrong bytes of chunks that had been filled again by then.
    refilled_holes: AtomicU64,
}

/// Reads again and again, as the server does: with a map and a descriptor of its own, which it only reads.
fn read_for_ever(case: &Case, met: &Met, is_over: &AtomicBool, seed: u64) {
    let dir = case.paths().layer(case.layer);
    let reader = LayerReader::open(&dir, case.layer).unwrap();
    let mut buf = vec![0; 10 << 20];
    let mut random = seed;
    while !is_over.load(Ordering::Relaxed) {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        // The end of the extent that comes and goes, so much of it that it may go meanwhile; and then, in
        // most, much of the other one: time enough for the hole to be filled.
        let len = match random >> 62 {
            0 => usize::try_from(CHUNK_BYTES).unwrap(),
            _ => buf.len(),
        };
        let offset = 15 * CHUNK_BYTES;
        let chunks = chunk::covering(offset, len as u64).unwrap();
        // The order of `fs::read`.
        let n_evictions = reader.n_evictions(&chunks);
        if !reader.has(chunks.clone()) {
            continue;
        }
        let buf = &mut buf[..len];
        assert!(reader.read_at(buf, offset, DiskWait::Allowed).unwrap());
        fence(Ordering::Acquire);
        let is_good = *buf == *case.bytes(offset..offset + len as u64);
        let (is_there, is_as_before) = (
            reader.has(chunks.clone()),
            reader.n_evictions(&chunks) == n_evictions,
        );
        let counter = match (is_there, is_as_before) {
            (true, true) => {
                assert!(is_good, "wrong bytes at {offset}, {len} of them");
                &met.good
            }
            (false, _) => continue,
            (true, false) if is_good => continue,
            (true, false) => &met.refilled_holes,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Evicts and fills as fast as it goes, while others read: no read that counts may have wrong bytes.
#[test]
fn readers_never_take_a_hole_for_a_chunk() {
    let case = Case::new();
    let (file, other_process) = (case.open(), case.open());
    let (met, is_over) = (Met::default(), AtomicBool::new(false));
    let count = |it: &AtomicU64| it.load(Ordering::Relaxed);
    let (mut n_evictions, mut is_marked_right, mut read_back) = (0, true, Vec::new());
    thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|seed| {
                let (case, met, is_over) = (&case, &met, &is_over);
                scope.spawn(move || read_for_ever(case, met, is_over, seed))
            })
            .collect();
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                match other_process.has(15..16) {
                    true => thread::yield_now(),
                    false => case.fill(&other_process, 15),
                }
            }
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        while (count(&met.refilled_holes) < 2 || n_evictions < 1000)
            && Instant::now() < deadline
            && !readers.iter().any(|it| it.is_finished())
            && is_marked_right
        {
            n_evictions += u32::from(file.evict(&[0]).unwrap() != Evicted::Busy);
            case.fill(&file, 15);
            // Nor is what is marked ever a hole, whoever has filled it.
            let is_right = file.verify_present(15, &mut read_back).unwrap();
            is_marked_right &= is_right != Some(false);
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert!(is_marked_right, "a hole is marked as a chunk");
    let (good, refilled) = (count(&met.good), count(&met.refilled_holes));
    assert!(
        0 < good && 0 < refilled,
        "nothing happened that could go wrong in {n_evictions} evictions and {good} reads"
    );
}

#[test]
fn nothing_goes_that_a_reader_of_a_former_state_would_not_see_go() {
    let case = Case::new();
    let dir = case.paths().layer(case.layer);
    let reader = LayerReader::open(&dir, case.layer).unwrap();
    // As where a driver of another version made it.
    crate::disk::publish(&dir.join(STATE), b"CLIPSTA1").unwrap();
    let file = case.open();
    let fill = |file: &LayerFile| (0..file.n_chunks()).for_each(|it| case.fill(file, it));
    fill(&file);
    assert_eq!(file.evictable(), []);
    assert_eq!(file.evict(&[0, 1]).unwrap(), Evicted::Busy);
    assert!(reader.has(0..1));
    let mut bytes = [0; 4096];
    assert!(reader.read_at(&mut bytes, 0, DiskWait::Allowed).unwrap());
    assert_eq!(bytes[..], *case.bytes(0..4096));
    drop(file);
    case.reboot();
    let file = case.open();
    fill(&file);
    assert_eq!(file.evictable().len(), 2);
}
