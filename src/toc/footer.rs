//! Finds the table of contents in an eStargz blob, whose end says where it is.
//!
//! ```text
//! 1f 8b 08 04 00 00 00 00 00 ff   gzip header with an extra field
//! 1a 00                           length of that: 26
//! 53 47 16 00                     subfield "SG" of 22 bytes
//! %016x                           where the table begins in the blob
//! STARGZ
//! 01 00 00 ff ff 00 … 00          an empty stored block, and checksum and size of nothing
//! ```
//!
//! The first release's, without the subfield's length, is not known here: no current tool writes it.

/// Bytes of a footer.
pub const FOOTER_BYTES: u64 = 51;

/// What precedes the number.
const BEFORE: &[u8; 16] = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0";

/// What follows it.
const AFTER: &[u8; 6] = b"STARGZ";

/// Digits of the number.
const DIGITS: usize = 16;

/// Where the table begins in a blob of `blob_bytes` that ends with `footer`; it ends where the footer
/// begins. `None` if this is no footer, or it names a place that cannot be.
pub fn table_offset(footer: &[u8], blob_bytes: u64) -> Option<u64> {
    if u64::try_from(footer.len()) != Ok(FOOTER_BYTES) {
        return None;
    }
    let rest = footer.strip_prefix(BEFORE)?;
    let (digits, rest) = rest.split_at_checked(DIGITS)?;
    if !rest.starts_with(AFTER) || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let offset = u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    (0 < offset && offset < blob_bytes.checked_sub(FOOTER_BYTES)?).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(offset: &str) -> Vec<u8> {
        let mut footer = BEFORE.to_vec();
        footer.extend(offset.as_bytes());
        footer.extend(AFTER);
        footer.extend(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
        footer
    }

    #[test]
    fn a_footer_names_a_place_within_its_blob() {
        let good = footer("00000000000003e8");
        assert_eq!(good.len() as u64, FOOTER_BYTES);
        assert_eq!(table_offset(&good, 1100), Some(1000));
        assert_eq!(table_offset(&good, 1052), Some(1000));
        for blob_bytes in [0, 50, 1000, 1051] {
            assert_eq!(table_offset(&good, blob_bytes), None, "{blob_bytes}");
        }
        for wrong in [
            "0000000000000000",
            "000000000000g000",
            "+0000000000003e8",
            "ffffffffffffffff",
        ] {
            assert_eq!(table_offset(&footer(wrong), 1 << 40), None, "{wrong}");
        }
        for cut in [0, 1, 50] {
            assert_eq!(table_offset(&good[..cut], 1100), None, "{cut}");
        }
        for at in [0, 3, 12, 13, 14, 32, 37] {
            let mut wrong = good.clone();
            wrong[at] ^= 1;
            assert_eq!(table_offset(&wrong, 1100), None, "{at}");
        }
    }
}
