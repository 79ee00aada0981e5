//! Holes in a layer's data: what was taken away, and zeros that need no room on the disk.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

/// Zeros at the end of a chunk from this many bytes on are a hole: a chunk that a piece of its blob does not
/// fill (`layer::pieces`) is mostly zeros, and so may be the end of any file.
const LEAST_BYTES: usize = 64 << 10;

/// What a file system gives away is a page, at most.
const BLOCK_BYTES: usize = 4096;

/// Makes `range` of `data` a hole, which reads as zeros; the file stays as long as it is.
///
/// # Errors
/// Those of fallocate(2); `OPNOTSUPP` and `NOSYS` where there are no holes.
pub(super) fn punch(data: &File, range: Range<u64>) -> Result<(), Errno> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match range.is_empty() {
        true => Ok(()),
        false => fallocate(data, flags, range.start, range.end - range.start),
    }
}

/// Writes `bytes` at `offset`, which begins a block, without those zeros at their end that a hole can stand for.
///
/// What was there before is gone either way: it may have been wrong.
///
/// # Errors
/// Those of the file system.
pub(super) fn write_all_at(data: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    let content_bytes = bytes.len() - zeros_at_end(bytes);
    let kept_bytes = content_bytes.next_multiple_of(BLOCK_BYTES).min(bytes.len());
    if LEAST_BYTES <= bytes.len() - kept_bytes {
        let end = offset + bytes.len() as u64;
        match punch(data, offset + kept_bytes as u64..end) {
            Ok(()) => return data.write_all_at(&bytes[..kept_bytes], offset),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(err) => return Err(err.into()),
        }
    }
    data.write_all_at(bytes, offset)
}

fn zeros_at_end(bytes: &[u8]) -> usize {
    let is_zero = |block: &&[u8]| block.iter().fold(0, |all, it| all | it) == 0;
    // By blocks, which is as fast as reading them; what is left of the one that has something, by bytes.
    let blocks: usize = bytes
        .rchunks(512)
        .take_while(is_zero)
        .map(<[u8]>::len)
        .sum();
    let rest = &bytes[..bytes.len() - blocks];
    blocks + rest.iter().rev().take_while(|it| **it == 0).count()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const LEN: usize = 1 << 20;

    #[test]
    fn zeros_are_counted_from_the_end() {
        for n in [0, 1, 7, 511, 512, 513, 5000, LEN] {
            let mut bytes = vec![7; LEN - n];
            bytes.resize(LEN, 0);
            assert_eq!(zeros_at_end(&bytes), n);
        }
        assert_eq!(zeros_at_end(&[]), 0);
    }

    #[test]
    fn zeros_at_the_end_take_no_room_and_nothing_shows_through() {
        let file = tempfile::tempfile().unwrap();
        let has_holes = {
            file.write_all_at(&[9; BLOCK_BYTES], 0).unwrap();
            punch(&file, 0..BLOCK_BYTES as u64).is_ok()
        };
        let (start, before) = (8192, vec![9; 3 * LEN]);
        let disk_bytes = || file.metadata().unwrap().blocks() * 512;
        for zeros in [
            0,
            5,
            LEAST_BYTES - 1,
            LEAST_BYTES + BLOCK_BYTES,
            LEN - 5000,
            LEN - 1,
            LEN,
        ] {
            file.write_all_at(&before, 0).unwrap();
            file.sync_all().unwrap();
            let full_bytes = disk_bytes();
            let mut bytes = vec![7; LEN - zeros];
            bytes.resize(LEN, 0);
            write_all_at(&file, &bytes, start as u64).unwrap();
            file.sync_all().unwrap();
            let mut expected = before.clone();
            expected[start..start + LEN].copy_from_slice(&bytes);
            let mut found = vec![0; expected.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            assert!(found == expected, "{zeros}");
            // How much a hole saves exactly is the file system's affair.
            let saved_bytes = full_bytes.saturating_sub(disk_bytes());
            if has_holes && LEAST_BYTES + BLOCK_BYTES <= zeros {
                assert!(zeros as u64 / 2 <= saved_bytes, "{saved_bytes} of {zeros}");
            }
        }
    }
}
