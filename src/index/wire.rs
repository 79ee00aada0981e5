//! Reads and writes little-endian fields, with every length checked.

use super::IndexError;

/// Reads fields one after the other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads from `bytes`; errors speak of `what`.
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.rest.is_empty()
    }

    /// What lies between here and where `later` is, which was read on from here.
    pub(crate) fn until(&self, later: &Self) -> &'a [u8] {
        let len = self.rest.len().saturating_sub(later.rest.len());
        self.rest.get(..len).unwrap_or_default()
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], IndexError> {
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(IndexError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], IndexError> {
        let (head, rest) = self
            .rest
            .split_first_chunk()
            .ok_or(IndexError::Truncated { what: self.what })?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, IndexError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, IndexError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, IndexError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, IndexError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn i64(&mut self) -> Result<i64, IndexError> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// Reads a `u32` length and as many bytes.
    pub(crate) fn counted(&mut self) -> Result<&'a [u8], IndexError> {
        let len = self.u32()?;
        self.bytes(usize::try_from(len).map_err(|_| IndexError::Truncated { what: self.what })?)
    }
}

/// Appends fields to a buffer.
pub(crate) trait Write {
    fn put(&mut self, bytes: &[u8]);

    fn put_u8(&mut self, value: u8) {
        self.put(&value.to_le_bytes());
    }

    fn put_u16(&mut self, value: u16) {
        self.put(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    fn put_i64(&mut self, value: i64) {
        self.put(&value.to_le_bytes());
    }

    /// Writes a `u32` length and the bytes.
    ///
    /// # Errors
    /// If the length does not fit.
    fn put_counted(&mut self, bytes: &[u8]) -> Result<(), IndexError> {
        self.put_u32(count("string bytes", bytes.len())?);
        self.put(bytes);
        Ok(())
    }
}

impl Write for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

/// Narrows a count or an offset to the 32 bits that the formats give it.
pub(crate) fn count(limit: &'static str, value: usize) -> Result<u32, IndexError> {
    u32::try_from(value).map_err(|_| IndexError::Limit {
        limit,
        max: u64::from(u32::MAX),
    })
}
