//! Decodes one 512-byte tar header: its format, its numbers and its names.
//!
//! # References
//! POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format", for base-256
//! numbers and the GNU fields.

use super::Fault;

/// Bytes of a block: headers and payloads start at multiples of this.
pub(super) const BLOCK_BYTES: usize = 512;

/// [`BLOCK_BYTES`], as a difference of stream offsets.
pub(super) const BLOCK_LEN: u64 = 512;

/// One block of the archive.
pub(super) type Block = [u8; BLOCK_BYTES];

/// Returns whether a block is one of those that end an archive.
pub(super) fn is_zero(block: &Block) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// Returns how many bytes fill up the last block of a payload.
pub(super) fn padding(len: u64) -> u64 {
    len.wrapping_neg() % BLOCK_LEN
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    V7,
    /// Also PAX, whose headers look the same.
    Ustar,
    Star,
    Gnu,
}

/// A header whose checksum is right.
#[derive(Debug)]
pub(super) struct Header<'a> {
    block: &'a Block,
    format: Format,
}

impl<'a> Header<'a> {
    /// Checks a block's checksum and recognises its format.
    pub(super) fn parse(block: &'a Block) -> Result<Self, Fault> {
        let wrong = Fault::Malformed("its checksum is wrong: not a tar archive, or corrupt");
        let stored = octal(&block[148..156]).ok_or(wrong)?;
        // Some old writers summed signed chars.
        let (unsigned, signed) = checksums(block);
        if stored != i64::from(unsigned) && stored != i64::from(signed) {
            return Err(wrong);
        }
        let format = match (&block[257..265], &block[508..512]) {
            (b"ustar  \0", _) => Format::Gnu,
            (magic, b"tar\0") if magic.starts_with(b"ustar\0") => Format::Star,
            (magic, _) if magic.starts_with(b"ustar\0") => Format::Ustar,
            _ => Format::V7,
        };
        Ok(Self { block, format })
    }

    pub(super) fn typeflag(&self) -> u8 {
        self.block[156]
    }

    pub(super) fn is_gnu(&self) -> bool {
        self.format == Format::Gnu
    }

    /// Returns the name field, with the prefix where the format has one.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(&self.block[0..100]);
        let prefix = match self.format {
            Format::V7 => &[],
            Format::Ustar => text(&self.block[345..500]),
            Format::Star => text(&self.block[345..476]),
            Format::Gnu => self.stray_prefix(),
        };
        if prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    /// Returns the prefix that Go's writer before 1.8 put into GNU headers by mistake.
    ///
    /// Images of that time exist. GNU headers have access and change time there: it is a prefix
    /// only if it cannot be those, the rule of Go's reader.
    fn stray_prefix(&self) -> &'a [u8] {
        let is_time = |field: &[u8]| field[0] == 0 || number(field).is_some();
        if is_time(&self.block[345..357]) && is_time(&self.block[357..369]) {
            return &[];
        }
        let prefix = text(&self.block[345..500]);
        if prefix.is_ascii() { prefix } else { &[] }
    }

    pub(super) fn link_path(&self) -> &'a [u8] {
        text(&self.block[157..257])
    }

    pub(super) fn mode(&self) -> Result<u32, Fault> {
        let mode = number(&self.block[100..108]).ok_or(Fault::Malformed("a bad mode"))?;
        Ok(u32::try_from(mode & 0o7777).expect("twelve bits fit"))
    }

    pub(super) fn uid(&self) -> Result<u32, Fault> {
        self.small(108..116, "a bad uid, or one beyond 32 bits")
    }

    pub(super) fn gid(&self) -> Result<u32, Fault> {
        self.small(116..124, "a bad gid, or one beyond 32 bits")
    }

    pub(super) fn size(&self) -> Result<u64, Fault> {
        unsigned(&self.block[124..136]).ok_or(Fault::Malformed("a bad or negative size"))
    }

    pub(super) fn mtime(&self) -> Result<i64, Fault> {
        number(&self.block[136..148]).ok_or(Fault::Malformed("a bad modification time"))
    }

    pub(super) fn device(&self) -> Result<(u32, u32), Fault> {
        Ok((
            self.small(329..337, "a bad major device number")?,
            self.small(337..345, "a bad minor device number")?,
        ))
    }

    /// Returns the block, for the sparse map that old GNU headers have in it.
    pub(super) fn block(&self) -> &'a Block {
        self.block
    }

    fn small(&self, field: std::ops::Range<usize>, what: &'static str) -> Result<u32, Fault> {
        number(&self.block[field])
            .and_then(|value| u32::try_from(value).ok())
            .ok_or(Fault::Malformed(what))
    }
}

/// Returns a number that is not negative.
pub(super) fn unsigned(field: &[u8]) -> Option<u64> {
    number(field).and_then(|value| u64::try_from(value).ok())
}

/// Returns a number written in octal digits, or in base 256 if the first bit is set.
fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    // Two's complement, big endian; the first bit is the mark, the second the sign.
    let invert = if first & 0x40 == 0 { 0 } else { 0xff };
    let mut value: i64 = 0;
    for (at, byte) in field.iter().enumerate() {
        let byte = if at == 0 {
            (byte ^ invert) & 0x7f
        } else {
            byte ^ invert
        };
        value = value.checked_mul(256)? | i64::from(byte);
    }
    Some(if invert == 0 { value } else { !value })
}

/// Returns a number in octal digits between blanks or NULs; an empty field is 0.
///
/// As Go: what follows a NUL after the digits is ignored, digits after a blank are not.
fn octal(field: &[u8]) -> Option<i64> {
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field
        .iter()
        .position(|byte| !blank(byte))
        .unwrap_or(field.len());
    let digits = text(&field[start..]);
    let end = digits
        .iter()
        .rposition(|byte| *byte != b' ')
        .map_or(0, |last| last + 1);
    digits[..end]
        .iter()
        .try_fold(0_i64, |value, byte| match byte {
            b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
            _ => None,
        })
}

/// Returns the field up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    let len = field.iter().position(|byte| *byte == 0);
    &field[..len.unwrap_or(field.len())]
}

/// Returns the sums of the header's bytes as unsigned and as signed, the checksum as blanks.
fn checksums(block: &Block) -> (i32, i32) {
    let (mut unsigned, mut n_negative) = (8 * i32::from(b' '), 0);
    // Loops: iterators are calls, one a byte, where code is optimised for size.
    for part in [&block[..148], &block[156..]] {
        for byte in part {
            unsigned += i32::from(*byte);
            n_negative += i32::from(byte >> 7);
        }
    }
    (unsigned, unsigned - 256 * n_negative)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_go_reads_them() {
        let cases: &[(&[u8], Option<i64>)] = &[
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"644     ", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"\0 \x00644\0\0", Some(0o644)),
            (b"64\0junk!", Some(0o64)),
            (b"6 4\0\0\0\0\0", None),
            (b"-644\0\0\0\0", None),
            (b"0000689\0", None),
            (b"77777777", Some(0o77_777_777)),
            (b"7777777777777777777777", None),
            (b"777777777777777777777", Some(i64::MAX)),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\x00", Some(-256)),
            (
                b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                Some(i64::MAX),
            ),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
            (b"\xff\xff\xff\xff\x7f\0\0\0\0\0\0\0", None),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
        ];
        for (field, value) in cases {
            assert_eq!(number(field), *value, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn padding_fills_the_last_block() {
        let lens = [0, 1, 511, 512, 513, u64::MAX >> 1];
        assert_eq!(lens.map(padding), [0, 511, 1, 0, 511, 1]);
    }
}
