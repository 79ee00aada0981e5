//! The only module with `unsafe`: memory maps, a descriptor's number, leases, the allocator, the inflater.

#![expect(
    unsafe_code,
    reason = "mmap, madvise, dup3, mallopt, leases, a peer without a pid and inflate between blocks have no safe interface; nothing else is here"
)]

pub mod inflate;

use std::{
    fs::File,
    io,
    ops::{Deref, Range},
    os::fd::{AsRawFd, BorrowedFd},
    sync::atomic::{AtomicU64, Ordering},
};

/// A file mapped for reading.
///
/// The mapped files are the driver's own, in a directory that only it writes, and are replaced by
/// rename, never changed or cut in place: a page that is mapped stays what it was.
#[derive(Debug)]
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps the whole of `file`.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn new(file: &File) -> io::Result<Self> {
        // SAFETY: the file is not truncated or written while it is mapped (see the type's doc), so
        // the bytes behind the returned slice neither change nor vanish.
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(Self(map))
    }

    /// Has the kernel read `range`, in pages of the usual size.
    ///
    /// What it reads ahead of somebody who goes through a mapping comes in folios of up to 2 MiB, and
    /// from Linux 6.18 on one access maps all of its folio.
    pub fn will_read(&self, range: Range<usize>) {
        // The advice is only that: a failure costs memory, not correctness.
        let _ = (self.0).advise_range(memmap2::Advice::WillNeed, range.start, range.len());
    }

    /// Gives the pages that were read back to the kernel; the next access faults them in again.
    ///
    /// Keeps a walk through a large index from growing the resident memory by the index's size.
    pub fn drop_resident(&self) {
        // SAFETY: MADV_DONTNEED on a shared, read-only, file-backed mapping loses no data.
        // The advice is only that: a failure costs memory, not correctness.
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// 64-bit words of a file, shared with every process that maps it.
#[derive(Debug)]
pub struct SharedWords(memmap2::MmapRaw);

impl SharedWords {
    /// Maps the whole of `file`, whose length must be a multiple of eight and must not change.
    ///
    /// # Errors
    /// `InvalidData` for another length, or those of mmap(2).
    pub fn new(file: &File) -> io::Result<Self> {
        let map = memmap2::MmapRaw::map_raw(file)?;
        if !map.len().is_multiple_of(8) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not whole 64-bit words",
            ));
        }
        Ok(Self(map))
    }

    /// How many words there are.
    pub fn len(&self) -> usize {
        self.0.len() / 8
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads word `at`; sees what was written before a bit that it sees was set.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn load(&self, at: usize) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }

    /// Sets bits of word `at` and returns the word as it was.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn set_bits(&self, at: usize, bits: u64) -> u64 {
        self.word(at).fetch_or(bits, Ordering::AcqRel)
    }

    /// Clears bits of word `at`.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn clear_bits(&self, at: usize, bits: u64) {
        self.word(at).fetch_and(!bits, Ordering::AcqRel);
    }

    /// Adds to word `at`, which wraps; who sees the sum sees what was written before.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn add(&self, at: usize, number: u64) {
        self.word(at).fetch_add(number, Ordering::AcqRel);
    }

    /// Replaces word `at`.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn store(&self, at: usize, value: u64) {
        self.word(at).store(value, Ordering::Release);
    }

    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at < self.len(), "word {at} of {}", self.len());
        // SAFETY: the map is page-aligned and lives as long as `self`; `at` is inside it; all
        // accesses, here and in other processes, are atomic.
        unsafe { &*self.0.as_ptr().cast::<AtomicU64>().add(at) }
    }
}

/// 64-bit words of a file that other processes change, mapped for reading.
#[derive(Debug)]
pub struct WordsView(memmap2::MmapRaw);

impl WordsView {
    /// Maps the whole of `file`, whose length must not change.
    ///
    /// # Errors
    /// Those of mmap(2).
    pub fn new(file: &File) -> io::Result<Self> {
        Ok(Self(memmap2::MmapOptions::new().map_raw_read_only(file)?))
    }

    /// Reads word `at`; sees what was written before a bit that it sees was set.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn load(&self, at: usize) -> u64 {
        assert!(at < self.0.len() / 8, "word {at} of {}", self.0.len() / 8);
        // SAFETY: the map is page-aligned and lives as long as `self`; `at` is inside it; all
        // accesses, here and in other processes, are atomic, and this one only reads.
        let word = unsafe { &*self.0.as_ptr().cast::<AtomicU64>().add(at) };
        word.load(Ordering::Acquire)
    }
}

/// Makes the descriptor number `place` another name of the open file `file`; what it named is closed.
///
/// # Errors
/// Those of dup3(2); then nothing is changed.
pub fn replace_descriptor(place: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both numbers are open descriptors, as their types say, and `place` stays one: whoever
    // owns it goes on to own an open descriptor.
    let made = unsafe { libc::dup3(file.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether anybody else has the file open, the kernel included: as a mapping, or for a file system that is
/// mounted.
///
/// A lease for writing is given to who is alone (fcntl(2), "Leases"), and given back at once.
///
/// # Errors
/// `InvalidInput` if the file system, or the machine, has no leases; `PermissionDenied` if the file is another
/// user's.
pub fn is_open_elsewhere(file: &File) -> io::Result<bool> {
    /// fcntl.h of Linux; libc has no name for it.
    const F_SETSIG: libc::c_int = 10;
    let call = |command, argument: libc::c_int| {
        // SAFETY: the descriptor is open, and these commands take a number.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // Who opens the file meanwhile waits, and the holder is sent a signal: one that means nothing to it.
    call(F_SETSIG, libc::SIGURG)?;
    match call(libc::F_SETLEASE, libc::F_WRLCK) {
        Ok(()) => call(libc::F_SETLEASE, libc::F_UNLCK).map(|()| false),
        Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(err) => Err(err),
    }
}

/// Who is at the other end of a Unix socket.
///
/// rustix has this, but takes the peer's pid for one that is never 0: it is, where the peer is in
/// another pod, whose processes this one cannot see.
///
/// # Errors
/// Those of getsockopt(2).
pub fn peer_uid(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let wanted = std::mem::size_of::<libc::ucred>();
    let mut len = libc::socklen_t::try_from(wanted).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `len` bytes to `peer`, of which every value is valid.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut len,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    if usize::try_from(len) != Ok(wanted) {
        return Err(io::Error::other(
            "SO_PEERCRED: the kernel's answer has another length",
        ));
    }
    Ok(peer.uid)
}

/// Gives up, for this process and all that it starts, the network: from now on sockets are Unix
/// sockets, and io_uring, which could make others, is none.
///
/// # Errors
/// If the kernel has no seccomp filters.
pub fn unix_sockets_only() -> io::Result<()> {
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, apply_filter_all_threads,
    };
    let make = || -> Result<BpfProgram, seccompiler::BackendError> {
        let family = u64::from(libc::AF_UNIX.unsigned_abs());
        let others = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, family)?;
        let rules = [
            (libc::SYS_socket, vec![SeccompRule::new(vec![others])?]),
            (libc::SYS_io_uring_setup, Vec::new()),
        ];
        let refused = libc::EAFNOSUPPORT.unsigned_abs();
        let filter = SeccompFilter::new(
            rules.into_iter().collect(),
            SeccompAction::Allow,
            SeccompAction::Errno(refused),
            std::env::consts::ARCH.try_into()?,
        )?;
        filter.try_into()
    };
    let program = make().map_err(io::Error::other)?;
    apply_filter_all_threads(&program).map_err(io::Error::other)
}

/// Sets the allocator up for a small resident size; call it first in `main`.
///
/// glibc raises its mmap threshold when a large block is freed, and later large blocks (fuser's
/// 16 MiB read buffers) then come zeroed from the heap and stay resident: fixed thresholds keep
/// them untouched pages of their own. One arena, because the threads allocate little.
pub fn tune_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) only sets parameters of the allocator, and no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Gives free heap pages back to the kernel: after a burst of work.
pub fn trim_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim(3) is thread-safe and touches only free memory.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Gives the pages of code and constants that were mapped back to the kernel; what runs is mapped
/// again, from the page cache.
///
/// Most of what a process has resident is code that ran once, at its start, and what the kernel maps
/// around it (64 KiB with each page). Call it when a stage of the work is over.
pub fn drop_code() {
    /// Gives back the segments of one object that nobody can write to.
    ///
    /// # Safety
    /// As dl_iterate_phdr(3) calls it.
    unsafe extern "C" fn drop_object(
        object: *mut libc::dl_phdr_info,
        _: usize,
        _: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: the loader passes a valid object, whose headers are that many.
        let (base, headers) = unsafe {
            let object = &*object;
            let n_headers = usize::from(object.dlpi_phnum);
            let headers = std::slice::from_raw_parts(object.dlpi_phdr, n_headers);
            (object.dlpi_addr, headers)
        };
        for header in headers {
            if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
                continue;
            }
            const PAGE_MASK: u64 = 4095;
            let begin = (base + header.p_vaddr) & !PAGE_MASK;
            let end = base + header.p_vaddr + header.p_memsz;
            let (Ok(begin), Ok(len)) = (usize::try_from(begin), usize::try_from(end - begin))
            else {
                continue;
            };
            // SAFETY: a segment that was never writable equals its file, from which it is mapped
            // again at the next access. Where that is refused (the vdso), nothing happens.
            unsafe {
                libc::madvise(begin as *mut libc::c_void, len, libc::MADV_DONTNEED);
            }
        }
        0
    }
    // SAFETY: the callback keeps nothing of what it is given.
    unsafe {
        libc::dl_iterate_phdr(Some(drop_object), std::ptr::null_mut());
    }
}

/// Resident memory of this process.
#[derive(Debug, Clone, Copy, Default)]
pub struct Memory {
    /// `VmRSS`.
    pub resident_bytes: u64,
    /// `VmHWM`.
    pub highwater_bytes: u64,
}

/// Reads the resident memory of this process from `/proc/self/status`; zeros if it cannot.
pub fn memory() -> Memory {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|it| it.strip_prefix(name))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kib << 10)
    };
    Memory {
        resident_bytes: field("VmRSS:").unwrap_or(0),
        highwater_bytes: field("VmHWM:").unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_shared_between_maps_of_one_file() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16).unwrap();
        let (one, other) = (
            SharedWords::new(&file).unwrap(),
            SharedWords::new(&file).unwrap(),
        );
        assert_eq!(one.set_bits(1, 0b100), 0);
        assert_eq!(other.load(1), 0b100);
        file.set_len(9).unwrap();
        assert!(SharedWords::new(&file).is_err());
    }

    #[test]
    fn a_file_that_is_open_elsewhere_is_known() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let mut options = File::options();
        let alone = options.read(true).write(true).open(&path).unwrap();
        alone.set_len(1).unwrap();
        assert!(!is_open_elsewhere(&alone).unwrap());
        let other = File::open(&path).unwrap();
        assert!(is_open_elsewhere(&alone).unwrap());
        drop(other);
        // A mapping keeps a file open that has no descriptor any more.
        let mapped = MappedFile::new(&File::open(&path).unwrap()).unwrap();
        assert!(is_open_elsewhere(&alone).unwrap());
        drop(mapped);
        assert!(!is_open_elsewhere(&alone).unwrap());
    }

    #[test]
    fn code_that_was_given_back_runs_on() {
        drop_code();
        let before = memory().resident_bytes;
        drop_code();
        assert_eq!(format!("{:>5}", 17), "   17");
        assert!(memory().resident_bytes <= before + (4 << 20));
    }

    #[test]
    fn memory_is_read() {
        let memory = memory();
        assert!(0 < memory.resident_bytes && memory.resident_bytes <= memory.highwater_bytes);
    }
}
