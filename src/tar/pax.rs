//! Reads the records of PAX extended headers: `"%d %s=%s\n", length, keyword, value`.
//!
//! Values are bytes, whatever `hdrcharset` says: names in Linux are bytes, and GNU tar, bsdtar and
//! Go write them as they are. Keywords that say nothing about the file tree (`atime`, `uname`,
//! `SCHILY.fflags`, `comment`, …) are skipped.
//!
//! # References
//! POSIX.1-2017, pax, "pax Extended Header"; GNU tar manual, "Storing Sparse Files"; star(4) for
//! `SCHILY.xattr`; tar(5) of libarchive for `LIBARCHIVE.xattr`.

use std::collections::BTreeMap;

use super::{
    Fault,
    sparse::{SparseMap, SparseRecords},
};

/// What the extended headers say about an entry; `None` leaves it to the entry's own header.
#[derive(Debug, Clone, Default)]
pub(super) struct PaxRecords {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) sparse: SparseRecords,
    schily_xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    libarchive_xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl PaxRecords {
    /// Reads all records of one extended header on top of those that are here.
    pub(super) fn read(
        &mut self,
        mut payload: &[u8],
        max_sparse_segments: usize,
    ) -> Result<(), Fault> {
        let mut map = MapRecords::new(max_sparse_segments);
        while !payload.is_empty() {
            let (key, value, rest) =
                next_record(payload).ok_or(Fault::Malformed("a PAX record out of form"))?;
            payload = rest;
            if !map.read(key, value)? {
                self.read_record(key, value)?;
            }
        }
        if let Some(map) = map.finish()? {
            self.sparse.map = Some(map);
        }
        Ok(())
    }

    /// Refuses what a global header may not say.
    ///
    /// POSIX lets it say anything, GNU tar and Python believe it, Go and libarchive do not. For
    /// owner and time that is no danger; for the layout and the names it would be.
    pub(super) fn check_global(&self) -> Result<(), Fault> {
        let ambiguous = self.size.is_some()
            || self.path.is_some()
            || self.link_path.is_some()
            || !self.schily_xattrs.is_empty()
            || !self.libarchive_xattrs.is_empty()
            || !self.sparse.is_empty();
        if ambiguous {
            return Err(Fault::Ambiguous(
                "a global header with a size, name, sparse map or attribute for every entry",
            ));
        }
        Ok(())
    }

    /// Returns the extended attributes by name; `SCHILY.xattr` is raw, so it wins.
    pub(super) fn into_xattrs(self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut xattrs = self.libarchive_xattrs;
        xattrs.extend(self.schily_xattrs);
        xattrs.into_iter().collect()
    }

    fn read_record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        match key {
            b"path" => self.path = name(value)?,
            b"linkpath" => self.link_path = name(value)?,
            b"size" => self.size = number(value, "a bad PAX size")?,
            b"uid" => self.uid = id(value, "a bad PAX uid, or one beyond 32 bits")?,
            b"gid" => self.gid = id(value, "a bad PAX gid, or one beyond 32 bits")?,
            b"mtime" => {
                self.mtime = match value {
                    b"" => None,
                    _ => Some(time(value).ok_or(Fault::Malformed("a bad PAX mtime"))?),
                }
            }
            b"GNU.sparse.name" => self.sparse.name = name(value)?,
            b"GNU.sparse.major" => self.sparse.major = number(value, BAD_SPARSE)?,
            b"GNU.sparse.minor" => self.sparse.minor = number(value, BAD_SPARSE)?,
            b"GNU.sparse.size" => self.sparse.size = number(value, BAD_SPARSE)?,
            b"GNU.sparse.realsize" => self.sparse.real_size = number(value, BAD_SPARSE)?,
            b"GNU.sparse.numblocks" => self.sparse.n_blocks = number(value, BAD_SPARSE)?,
            _ => self.read_xattr(key, value)?,
        }
        Ok(())
    }

    fn read_xattr(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        let (name, value, xattrs) = if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            (name.to_vec(), value.to_vec(), &mut self.schily_xattrs)
        } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let bad = Fault::Malformed("a bad LIBARCHIVE.xattr record");
            let name = percent_decode(name).ok_or(bad)?;
            (
                name,
                base64_decode(value).ok_or(bad)?,
                &mut self.libarchive_xattrs,
            )
        } else {
            return Ok(());
        };
        if name.is_empty() || name.contains(&0) {
            return Err(Fault::Malformed("an extended attribute with a bad name"));
        }
        xattrs.insert(name, value);
        Ok(())
    }
}

const BAD_SPARSE: &str = "a bad GNU.sparse record";

/// The records that hold a sparse map: many of one name (0.0), or one with all numbers (0.1).
#[derive(Debug)]
struct MapRecords {
    max_segments: usize,
    offset: Option<u64>,
    map: Option<SparseMap>,
}

impl MapRecords {
    fn new(max_segments: usize) -> Self {
        Self {
            max_segments,
            offset: None,
            map: None,
        }
    }

    /// Returns whether the record was one of them.
    fn read(&mut self, key: &[u8], value: &[u8]) -> Result<bool, Fault> {
        let bad = Fault::Malformed(BAD_SPARSE);
        match key {
            b"GNU.sparse.offset" if self.offset.is_none() => {
                self.offset = Some(decimal(value).ok_or(bad)?);
            }
            b"GNU.sparse.numbytes" => {
                let offset = self.offset.take().ok_or(bad)?;
                let len = decimal(value).ok_or(bad)?;
                let map = self.map.get_or_insert(SparseMap::new(self.max_segments));
                map.push(offset, len)?;
            }
            b"GNU.sparse.map" if self.map.is_none() => {
                let mut map = SparseMap::new(self.max_segments);
                let mut numbers = value.split(|byte| *byte == b',');
                while let (false, Some(offset)) = (value.is_empty(), numbers.next()) {
                    let len = numbers.next().and_then(decimal).ok_or(bad)?;
                    map.push(decimal(offset).ok_or(bad)?, len)?;
                }
                self.map = Some(map);
            }
            b"GNU.sparse.offset" | b"GNU.sparse.map" => return Err(bad),
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn finish(self) -> Result<Option<SparseMap>, Fault> {
        match self.offset {
            Some(_) => Err(Fault::Malformed(BAD_SPARSE)),
            None => Ok(self.map),
        }
    }
}

/// Splits off the first record: keyword, value, rest.
fn next_record(payload: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = payload.iter().position(|byte| *byte == b' ')?;
    let len = usize::try_from(decimal(&payload[..blank])?).ok()?;
    let (record, rest) = payload.split_at_checked(len)?;
    let record = record.get(blank + 1..)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    let (key, value) = (&record[..equals], &record[equals + 1..]);
    (!key.is_empty() && !key.contains(&0)).then_some((key, value, rest))
}

fn name(value: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
    if value.contains(&0) {
        return Err(Fault::Malformed("a PAX name with a NUL in it"));
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn number(value: &[u8], what: &'static str) -> Result<Option<u64>, Fault> {
    match value {
        b"" => Ok(None),
        _ => Ok(Some(decimal(value).ok_or(Fault::Malformed(what))?)),
    }
}

fn id(value: &[u8], what: &'static str) -> Result<Option<u32>, Fault> {
    number(value, what)?
        .map(|id| u32::try_from(id).map_err(|_| Fault::Malformed(what)))
        .transpose()
}

/// Returns a number in decimal digits and nothing else, up to `i64::MAX` as for header fields.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    let value = text.iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })?;
    u64::try_from(value).ok()
}

/// Returns seconds rounded down and nanoseconds of a decimal fraction, which may be negative.
///
/// Digits behind the ninth are dropped, towards zero as in Go.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, byte| value * 10 + u32::from(byte - b'0'));
    match (negative, nanoseconds) {
        (false, _) => Some((seconds, nanoseconds)),
        (true, 0) => Some((-seconds, 0)),
        (true, _) => Some(((-seconds).checked_sub(1)?, 1_000_000_000 - nanoseconds)),
    }
}

fn percent_decode(text: &[u8]) -> Option<Vec<u8>> {
    let hex = |byte: &u8| char::from(*byte).to_digit(16);
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.iter();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => u8::try_from(hex(bytes.next()?)? * 16 + hex(bytes.next()?)?).ok()?,
            _ => *byte,
        });
    }
    Some(decoded)
}

/// Decodes standard base 64; libarchive leaves the padding out.
fn base64_decode(text: &[u8]) -> Option<Vec<u8>> {
    let digits = text.trim_ascii_end();
    let end = digits
        .iter()
        .rposition(|byte| *byte != b'=')
        .map_or(0, |last| last + 1);
    let mut decoded = Vec::with_capacity(end / 4 * 3 + 2);
    for group in digits[..end].chunks(4) {
        let mut bits = 0_u32;
        for byte in group {
            let digit = match byte {
                b'A'..=b'Z' => byte - b'A',
                b'a'..=b'z' => byte - b'a' + 26,
                b'0'..=b'9' => byte - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits = bits << 6 | u32::from(digit);
        }
        bits <<= 6 * (4 - group.len());
        let bytes = bits.to_be_bytes();
        decoded.extend_from_slice(match group.len() {
            4 => &bytes[1..4],
            3 => &bytes[1..3],
            2 => &bytes[1..2],
            _ => return None,
        });
    }
    Some(decoded)
}
