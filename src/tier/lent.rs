//! Carries the bytes of one chunk past the local disk, from who fetched them to who reads them.
//!
//! They are in a memfd: no part of either process's heap, sealed, so that nobody changes them behind a
//! reader, and a descriptor that another process can be given. They are gone when the last descriptor is
//! closed.

use std::{
    fs::File,
    io::{self, Write as _},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::Arc,
};

use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create},
    io::Errno,
};

use crate::{chunk::CHUNK_BYTES, digest::DiffId};

/// How many chunks are lent at once, in a process: more readers than that wait for their turn.
///
/// Four have 4 MB, which is what a full disk may cost a node in memory. A read of 1 MiB, the longest
/// that the kernel asks for, touches three at most.
pub const MAX_LENT: usize = 4;

/// What keeps a memfd as it is.
const SEALS: SealFlags = SealFlags::WRITE
    .union(SealFlags::SHRINK)
    .union(SealFlags::GROW);

/// The bytes of a chunk, verified by whoever made it. Clones share them.
#[derive(Debug, Clone)]
pub struct LentChunk {
    layer: DiffId,
    chunk: u32,
    file: Arc<File>,
}

impl LentChunk {
    /// Copies the bytes of `chunk`, which are verified, and seals them.
    ///
    /// # Errors
    /// Those of memfd_create(2) and write(2).
    pub fn seal(layer: DiffId, chunk: u32, bytes: &[u8]) -> io::Result<Self> {
        let mut file = File::from(memfd()?);
        file.write_all(bytes)?;
        fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
        Ok(Self {
            layer,
            chunk,
            file: Arc::new(file),
        })
    }

    /// Takes what another process has sealed, if it is a chunk of `chunk_bytes` that cannot change.
    ///
    /// # Errors
    /// `InvalidData` if it is not, with the reason; else those of fcntl(2).
    pub fn accept(layer: DiffId, chunk: u32, chunk_bytes: u64, fd: OwnedFd) -> io::Result<Self> {
        let refused = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
        match fcntl_get_seals(&fd) {
            Ok(seals) if seals.contains(SEALS) => {}
            // Which a file on a disk answers.
            Ok(_) | Err(Errno::INVAL) => {
                return Err(refused("it can still be changed".to_owned()));
            }
            Err(err) => return Err(err.into()),
        }
        let file = File::from(fd);
        let len = file.metadata()?.len();
        if len != chunk_bytes || CHUNK_BYTES < len {
            return Err(refused(format!(
                "it has {len} bytes, the chunk has {chunk_bytes}"
            )));
        }
        Ok(Self {
            layer,
            chunk,
            file: Arc::new(file),
        })
    }

    /// Whether these are the bytes of `chunk` of `layer`.
    pub fn is(&self, layer: DiffId, chunk: u32) -> bool {
        (self.layer, self.chunk) == (layer, chunk)
    }

    /// Fills `buf` from `offset` in the chunk.
    ///
    /// # Errors
    /// `UnexpectedEof` beyond its end.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

impl AsFd for LentChunk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Makes one that nobody can run as a program, which some nodes demand (`vm.memfd_noexec`).
fn memfd() -> io::Result<OwnedFd> {
    const NAME: &str = "clip-csi-chunk";
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    match memfd_create(NAME, flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not know that flag.
        Err(Errno::INVAL) => Ok(memfd_create(NAME, flags)?),
        made => Ok(made?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> DiffId {
        DiffId::of(b"layer")
    }

    #[test]
    fn what_is_lent_is_read_and_cannot_be_changed() {
        let lent = LentChunk::seal(layer(), 3, b"0123456789").unwrap();
        assert!(lent.is(layer(), 3) && !lent.is(layer(), 4) && !lent.is(DiffId::of(b""), 3));
        let fd = lent.as_fd().try_clone_to_owned().unwrap();
        let file = File::from(fd.try_clone().unwrap());
        assert!(file.write_all_at(b"x", 0).is_err());
        assert!(file.set_len(1).is_err() && file.set_len(11).is_err());
        let accepted = LentChunk::accept(layer(), 3, 10, fd).unwrap();
        drop(lent);
        let mut read = [0; 4];
        accepted.read_at(&mut read, 6).unwrap();
        assert_eq!(&read, b"6789");
        let err = accepted.read_at(&mut read, 7).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_can_change_or_has_another_length_is_refused() {
        let accept = |fd: OwnedFd| LentChunk::accept(layer(), 3, 10, fd).map(|_| ());
        let sealed = |bytes: &[u8]| {
            let lent = LentChunk::seal(layer(), 3, bytes).unwrap();
            lent.as_fd().try_clone_to_owned().unwrap()
        };
        accept(sealed(b"0123456789")).unwrap();
        let open = memfd().unwrap();
        File::from(open.try_clone().unwrap())
            .write_all(b"0123456789")
            .unwrap();
        // All but one of the seals.
        fcntl_add_seals(&open, SealFlags::WRITE | SealFlags::GROW).unwrap();
        let on_disk = tempfile::tempfile().unwrap();
        on_disk.set_len(10).unwrap();
        for (what, fd) in [
            ("shorter", sealed(b"012345678")),
            ("longer", sealed(b"0123456789a")),
            ("not sealed", open),
            ("a file on disk", on_disk.into()),
        ] {
            let err = accept(fd).unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::InvalidData, "{what}: {err}");
        }
    }
}
