//! What lies between a blob's bytes and the table's JSON: bounds, a hash, and eStargz' tar.

use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

use sha2::{Digest, Sha256};

use crate::digest::BlobDigest;

/// Bytes of a tar header.
const TAR_BLOCK: usize = 512;

/// Name of the only entry of the tar that an eStargz table is in.
const TABLE_NAME: &[u8] = b"stargz.index.json";

/// Hashes what is read through it.
pub(super) struct Hashed<R> {
    input: R,
    hasher: Sha256,
}

impl<R: Read> Hashed<R> {
    pub(super) fn new(input: R) -> Self {
        let hasher = Sha256::new();
        Self { input, hasher }
    }

    /// What is read through it.
    pub(super) fn input(&self) -> &R {
        &self.input
    }

    /// The digest of all that was read.
    pub(super) fn digest(&self) -> BlobDigest {
        BlobDigest::from_bytes(self.hasher.clone().finalize().into())
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buf)?;
        self.hasher.update(&buf[..len]);
        Ok(len)
    }
}

/// How much of one entry may still be read.
#[derive(Debug, Clone)]
pub(super) struct Allowance {
    max_bytes: u64,
    left_bytes: Rc<Cell<u64>>,
}

impl Allowance {
    pub(super) fn new(max_bytes: u64) -> Self {
        let left_bytes = Rc::new(Cell::new(max_bytes));
        Self {
            max_bytes,
            left_bytes,
        }
    }

    /// An entry has ended, and the next one may be as long.
    pub(super) fn renew(&self) {
        self.left_bytes.set(self.max_bytes);
    }

    /// Whether it was used up.
    pub(super) fn is_spent(&self) -> bool {
        self.left_bytes.get() == 0
    }
}

/// Reads no further than is allowed, which keeps whoever parses from holding more.
///
/// To be read byte by byte, as serde_json does: what is read ahead would count as the entry under way.
pub(super) struct Bounded<R> {
    pub(super) input: R,
    pub(super) allowance: Allowance,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = &self.allowance.left_bytes;
        if left.get() == 0 {
            return Err(io::Error::other("an entry is too long"));
        }
        let len = self.input.read(buf)?;
        left.set(left.get().saturating_sub(len as u64));
        Ok(len)
    }
}

/// Reads the header of the tar that an eStargz table is in; returns the table's length, or what is wrong.
///
/// # Errors
/// Those of `input`.
pub(super) fn tar_header(input: &mut impl Read) -> io::Result<Result<u64, &'static str>> {
    let mut header = [0; TAR_BLOCK];
    match input.read_exact(&mut header) {
        Ok(()) => {}
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof && err.get_ref().is_none() => {
            return Ok(Err("it ends within its tar header"));
        }
        Err(err) => return Err(err),
    }
    let text = |field: &[u8]| -> Vec<u8> {
        let end = field.iter().position(|it| *it == 0 || *it == b' ');
        field[..end.unwrap_or(field.len())].to_vec()
    };
    if text(&header[..100]) != TABLE_NAME || !matches!(header[156], 0 | b'0') {
        return Ok(Err("its tar does not begin with stargz.index.json"));
    }
    let size = String::from_utf8(text(&header[124..136])).ok();
    let size = size.and_then(|it| u64::from_str_radix(&it, 8).ok());
    Ok(size.ok_or("its tar header has no size"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_may_be_so_long_and_no_longer() {
        let allowance = Allowance::new(3);
        let mut bounded = Bounded {
            input: &b"abcdefgh"[..],
            allowance: allowance.clone(),
        };
        let mut next = || {
            let mut byte = [0];
            bounded.read_exact(&mut byte).ok().map(|()| byte[0])
        };
        assert_eq!([next(), next()], [Some(b'a'), Some(b'b')]);
        assert!(!allowance.is_spent());
        allowance.renew();
        assert_eq!([next(), next(), next()], [b'c', b'd', b'e'].map(Some));
        assert!(allowance.is_spent());
        assert_eq!(next(), None);
    }

    #[test]
    fn a_table_is_found_in_its_tar() {
        let mut header = [0; TAR_BLOCK];
        header[..17].copy_from_slice(TABLE_NAME);
        header[124..135].copy_from_slice(b"00000000144");
        let read = |header: &[u8]| tar_header(&mut &*header).unwrap();
        assert_eq!(read(&header), Ok(100));
        assert!(read(&header[1..]).is_err());
        for (at, byte) in [(0, b'S'), (17, b'x'), (156, b'5'), (124, b'9')] {
            let mut wrong = header;
            wrong[at] = byte;
            assert!(read(&wrong).is_err(), "{at}");
        }
    }
}
