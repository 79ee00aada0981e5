//! A file of which a bounded number of pages is in memory, and the others are read when they are wanted.

use std::io;

use super::Scratch;

/// Bytes of a page: what a file system writes at least.
pub(in crate::index) const PAGE_BYTES: usize = 4096;

/// A page, as it is in memory.
pub(in crate::index) type Page = [u8; PAGE_BYTES];

/// In how many places a page may be held, of which the least recently used one is given up.
const N_WAYS: usize = 4;

/// One page in memory.
#[derive(Debug, Default)]
struct Slot {
    /// Number of the page, and when it was used; no page was ever used at 0.
    page: u64,
    used: u64,
    is_changed: bool,
    bytes: Option<Box<Page>>,
}

/// Bytes in a scratch file: a table of records, or what is appended piece by piece.
///
/// After a failure of the file it is good for nothing more.
#[derive(Debug)]
pub(in crate::index) struct Paged<S> {
    file: S,
    /// Pages of the file that were written, holes between them included; the others are zeros.
    n_written: u64,
    len: u64,
    slots: Vec<Slot>,
    clock: u64,
}

impl<S: Scratch> Paged<S> {
    /// An empty one in `file`, which is empty, too. It holds `n_held` pages at most, and no more
    /// than it has.
    pub(in crate::index) fn new(file: S, n_held: usize) -> Self {
        let n_slots = n_held.next_multiple_of(N_WAYS).max(N_WAYS);
        Self {
            file,
            n_written: 0,
            len: 0,
            slots: (0..n_slots).map(|_| Slot::default()).collect(),
            clock: 0,
        }
    }

    /// How many bytes there are: up to the last one that was written.
    pub(in crate::index) fn len(&self) -> u64 {
        self.len
    }

    /// Another scratch file of the same kind.
    pub(in crate::index) fn another(&self) -> S {
        self.file.another()
    }

    /// Page `number`, to be read.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn page(&mut self, number: u64) -> io::Result<&Page> {
        let slot = self.slot(number)?;
        slot.bytes.as_deref().ok_or_else(no_page)
    }

    /// Page `number`, to be changed.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn page_mut(&mut self, number: u64) -> io::Result<&mut Page> {
        self.len = self.len.max((number + 1) * PAGE_BYTES as u64);
        self.changed(number)
    }

    /// Fills `buf` from `offset`; what was never written is zeros.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn read(&mut self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let (number, start) = place(offset + done as u64);
            let len = (PAGE_BYTES - start).min(buf.len() - done);
            buf[done..done + len].copy_from_slice(&self.page(number)?[start..start + len]);
            done += len;
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let (number, start) = place(offset + done as u64);
            let len = (PAGE_BYTES - start).min(bytes.len() - done);
            self.changed(number)?[start..start + len].copy_from_slice(&bytes[done..done + len]);
            done += len;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
        Ok(())
    }

    /// Writes `bytes` behind all that there is; returns where.
    ///
    /// # Errors
    /// Those of the file.
    pub(in crate::index) fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let offset = self.len;
        self.write(bytes, offset)?;
        Ok(offset)
    }

    fn changed(&mut self, number: u64) -> io::Result<&mut Page> {
        let slot = self.slot(number)?;
        slot.is_changed = true;
        slot.bytes.as_deref_mut().ok_or_else(no_page)
    }

    /// Has page `number` in memory.
    fn slot(&mut self, number: u64) -> io::Result<&mut Slot> {
        self.clock += 1;
        let n_sets = (self.slots.len() / N_WAYS) as u64;
        // Less than the number of slots.
        let first = usize::try_from(number % n_sets).map_err(io::Error::other)? * N_WAYS;
        let ways = &mut self.slots[first..first + N_WAYS];
        let held = ways.iter().position(|it| it.page == number && 0 < it.used);
        let at = match held {
            Some(at) => at,
            None => {
                let oldest = (0..N_WAYS).min_by_key(|at| ways[*at].used).unwrap_or(0);
                let slot = &mut ways[oldest];
                let mut bytes = match slot.bytes.take() {
                    Some(bytes) => bytes,
                    None => Box::new([0; PAGE_BYTES]),
                };
                if slot.is_changed {
                    self.file.write_at(&*bytes, slot.page * PAGE_BYTES as u64)?;
                    self.n_written = self.n_written.max(slot.page + 1);
                }
                *slot = Slot::default();
                if number < self.n_written {
                    self.file.read_at(&mut *bytes, number * PAGE_BYTES as u64)?;
                } else {
                    bytes.fill(0);
                }
                slot.page = number;
                slot.bytes = Some(bytes);
                oldest
            }
        };
        ways[at].used = self.clock;
        Ok(&mut ways[at])
    }
}

/// The page of `offset`, and where it is in there.
fn place(offset: u64) -> (u64, usize) {
    let page_bytes = PAGE_BYTES as u64;
    // Below the size of a page.
    let start = usize::try_from(offset % page_bytes).unwrap_or_default();
    (offset / page_bytes, start)
}

/// Every slot in use has its bytes: this does not happen.
fn no_page() -> io::Error {
    io::Error::other("a page is not held")
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// As a vector does, whatever is written where, with far fewer pages held than there are.
        #[test]
        fn it_keeps_what_was_written(writes: Vec<(u32, Vec<u8>)>) {
            let mut paged = Paged::new(Vec::new(), 4);
            let mut model = vec![0; 0];
            for (offset, bytes) in writes {
                let start = offset as usize % (64 * PAGE_BYTES);
                paged.write(&bytes, start as u64).unwrap();
                let end = model.len().max(start + bytes.len());
                if !bytes.is_empty() {
                    model.resize(end, 0);
                }
                let len = bytes.len();
                if 0 < len {
                    model[start..start + len].copy_from_slice(&bytes);
                }
            }
            let mut all = vec![1; model.len() + 5];
            paged.read(&mut all, 0).unwrap();
            proptest::prop_assert_eq!(&all[..model.len()], &model[..]);
            proptest::prop_assert_eq!(&all[model.len()..], &[0; 5]);
        }
    }

    #[test]
    fn no_more_than_its_pages_are_held() {
        let mut paged = Paged::new(Vec::new(), 8);
        for number in 0..100_u64 {
            paged.page_mut(number).unwrap()[7] = 1 + u8::try_from(number).unwrap();
        }
        let held = paged.slots.iter().filter(|it| it.bytes.is_some()).count();
        assert_eq!(held, 8);
        for number in 0..100_u64 {
            let expected = 1 + u8::try_from(number).unwrap();
            assert_eq!(paged.page(number).unwrap()[7], expected);
        }
    }

    #[test]
    fn what_is_small_reaches_no_file() {
        let mut paged = Paged::new(Vec::new(), 8);
        paged.append(&[7; 3 * PAGE_BYTES]).unwrap();
        assert!(paged.file.is_empty());
    }
}
