//! The digests of a layer's chunks that are learned when the chunks come.
//!
//! A layer that was laid out by its blob's table of contents has an index without them: the table has the
//! SHA-256 of pieces. So its directory has a file of 32 bytes for each chunk, zeros for those that never came,
//! mapped by every process that fills it. The index alone says whether a layer has such a file: its digests
//! are zeros.
//!
//! A digest is written word by word, its first word last, and always the same one, because its bytes were
//! verified before: who sees a part of it finds that bytes do not match, and takes them for absent. So does
//! who finds what a power cut has left.

use std::{
    fs::{File, OpenOptions},
    io,
    path::Path,
};

use crate::{
    digest::ChunkDigest,
    index::layer_index::LayerIndex,
    sys::{MappedFile, SharedWords},
};

/// Words of a digest.
const WORDS: usize = 4;

/// What stands where a digest is not known.
pub(super) const UNKNOWN: ChunkDigest = ChunkDigest::from_bytes([0; 32]);

/// Digests that are learned.
#[derive(Debug)]
pub(super) struct Learned(SharedWords);

impl Learned {
    /// Maps the file at `path`, of a layer of `n_chunks`.
    ///
    /// # Errors
    /// `InvalidData` if there is none, or one of another length; else those of the file system.
    pub(super) fn open(path: &Path, n_chunks: u32) -> io::Result<Self> {
        let wrong = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(|err| match err.kind() {
            io::ErrorKind::NotFound => wrong("it has no digests".to_owned()),
            _ => err,
        })?;
        if file.metadata()?.len() != u64::from(n_chunks) * 32 {
            return Err(wrong("it has digests of another layer".to_owned()));
        }
        Ok(Self(SharedWords::new(&file)?))
    }

    /// The digest of `chunk`, if it is known.
    pub(super) fn get(&self, chunk: u32) -> Option<ChunkDigest> {
        let first = self.first_word(chunk)?;
        let mut bytes = [0; 32];
        for (word, bytes) in (first..).zip(bytes.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&self.0.load(word).to_le_bytes());
        }
        // One that begins so is never known, which costs a fetch.
        (bytes[..8] != [0; 8]).then(|| ChunkDigest::from_bytes(bytes))
    }

    /// Notes the digest of `chunk`, whose bytes were verified.
    pub(super) fn learn(&self, chunk: u32, digest: &ChunkDigest) {
        let Some(first) = self.first_word(chunk) else {
            return;
        };
        let words = digest.as_bytes().chunks_exact(8);
        for (word, bytes) in (first..first + WORDS).zip(words).rev() {
            let bytes = bytes.first_chunk().expect("it has eight bytes");
            self.0.store(word, u64::from_le_bytes(*bytes));
        }
    }

    fn first_word(&self, chunk: u32) -> Option<usize> {
        let first = usize::try_from(chunk).ok()?.checked_mul(WORDS)?;
        (first + WORDS <= self.0.len()).then_some(first)
    }
}

/// The index of a layer whose digests were learned, with them: what one has that was made of a stream.
#[derive(Debug)]
pub(in crate::layer) struct CompletedIndex {
    /// Where the digests stand.
    start: usize,
    digests: Vec<u8>,
    checksum: [u8; 32],
    digest: ChunkDigest,
}

impl CompletedIndex {
    /// Puts the digests of all chunks, in order, into `index`.
    pub(super) fn new(index: &LayerIndex<MappedFile>, digests: Vec<u8>) -> Self {
        let (start, body_end) = (index.digests_start(), index.body_end());
        let bytes = index.source();
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..start]);
        hasher.update(&digests);
        // Some pieces of it at a time are resident.
        for piece in bytes[start + digests.len()..body_end].chunks(256 << 10) {
            hasher.update(piece);
            bytes.drop_resident();
        }
        let checksum = *hasher.finalize().as_bytes();
        hasher.update(&checksum);
        Self {
            start,
            digests,
            checksum,
            digest: ChunkDigest::from_bytes(hasher.finalize().into()),
        }
    }

    /// BLAKE3 of the whole index.
    pub(in crate::layer) fn digest(&self) -> ChunkDigest {
        self.digest
    }

    /// Reads a part of it; `file` is the index without the digests.
    ///
    /// # Errors
    /// Those of the file system.
    pub(in crate::layer) fn read_at(
        &self,
        file: &File,
        into: &mut [u8],
        offset: u64,
    ) -> io::Result<()> {
        use std::os::unix::fs::FileExt as _;
        file.read_exact_at(into, offset)?;
        let len = file.metadata()?.len();
        let checksum_start = len.saturating_sub(self.checksum.len() as u64);
        put(into, offset, &self.digests, self.start as u64);
        put(into, offset, &self.checksum, checksum_start);
        Ok(())
    }
}

/// Puts what `patch`, which stands at `patch_offset`, has of the part `into` of a file, which is at `offset`.
fn put(into: &mut [u8], offset: u64, patch: &[u8], patch_offset: u64) {
    let end = offset + into.len() as u64;
    let patch_end = patch_offset + patch.len() as u64;
    let (from, to) = (offset.max(patch_offset), end.min(patch_end));
    if from < to {
        let within = |base: u64| super::usize_of(from - base)..super::usize_of(to - base);
        into[within(offset)].copy_from_slice(&patch[within(patch_offset)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{digest::DiffId, index::layer_index::LayerIndexBuilder};

    #[test]
    fn digests_are_known_when_they_were_learned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("digests");
        crate::disk::publish(&path, &[0; 3 * 32]).unwrap();
        let learned = Learned::open(&path, 3).unwrap();
        let other = Learned::open(&path, 3).unwrap();
        let digest = ChunkDigest::of(b"chunk");
        assert_eq!([0, 1, 2, 3].map(|it| learned.get(it)), [None; 4]);
        learned.learn(1, &digest);
        learned.learn(3, &digest);
        assert_eq!(other.get(1), Some(digest));
        assert_eq!([0, 2, 3].map(|it| other.get(it)), [None; 3]);
        for n_chunks in [2, 4] {
            let err = Learned::open(&path, n_chunks).unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::InvalidData);
        }
        let err = Learned::open(&dir.path().join("none"), 3).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn an_index_with_what_was_learned_is_the_one_that_knew() {
        let digests = [ChunkDigest::of(b"one"), ChunkDigest::of(b"two")];
        let layer_bytes = crate::chunk::CHUNK_BYTES + 1;
        let index = |digests: &[ChunkDigest]| {
            let mut builder = LayerIndexBuilder::default();
            let entry = crate::tar::TarEntry {
                path: b"file".to_vec(),
                kind: crate::tar::TarKind::Fifo,
                mode: 0o600,
                uid: 1,
                gid: 2,
                mtime_seconds: 3,
                mtime_nanoseconds: 4,
                xattrs: Vec::new(),
            };
            builder.push_entry(&entry).unwrap();
            digests.iter().for_each(|it| builder.push_chunk(it));
            builder.finish(DiffId::of(b"layer"), layer_bytes)
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        crate::disk::publish(&path, &index(&[UNKNOWN; 2])).unwrap();
        let file = File::open(&path).unwrap();
        let without = LayerIndex::decode(MappedFile::new(&file).unwrap()).unwrap();
        let all = digests.iter().flat_map(|it| *it.as_bytes()).collect();
        let completed = CompletedIndex::new(&without, all);
        let expected = index(&digests);
        assert_eq!(completed.digest(), ChunkDigest::of(&expected));
        for part in [1, 7, 40, expected.len()] {
            let mut read = Vec::new();
            for at in (0..expected.len()).step_by(part) {
                let mut into = vec![0; part.min(expected.len() - at)];
                completed.read_at(&file, &mut into, at as u64).unwrap();
                read.extend(into);
            }
            assert!(read == expected, "in parts of {part}");
        }
        assert_eq!(
            LayerIndex::decode(&*expected).unwrap().chunk_digest(1),
            Some(digests[1])
        );
    }
}
