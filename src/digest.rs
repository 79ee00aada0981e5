//! Names content: what a registry, an image or a cache calls a run of bytes.
//!
//! Each kind of digest is its own type, because mixing them up serves wrong bytes: a
//! [`BlobDigest`] names *compressed* bytes as a registry stores them, a [`DiffId`] the
//! *uncompressed* tar, a [`ManifestDigest`] an image, a [`ChunkDigest`] a chunk of a layer.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Characters of what is no digest that an error quotes: a digest has 71, and the text may be of any length.
const MAX_QUOTED_CHARS: usize = 100;

/// Says why a text is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// The algorithm is one that this driver does not verify.
    #[error("digest {text:?} is not supported: only sha256 digests are")]
    Algorithm {
        /// The text as it came, cut if it is very long.
        text: String,
    },
    /// The hexadecimal part is malformed.
    #[error(
        "digest {text:?} is malformed: 64 lower-case hexadecimal digits must follow \"sha256:\""
    )]
    Hex {
        /// The text as it came, cut likewise.
        text: String,
    },
}

/// Writes bytes as lower-case hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Reads exactly 64 lower-case hexadecimal digits.
pub fn from_hex(text: &str) -> Option<[u8; 32]> {
    fn nibble(digit: u8) -> Option<u8> {
        match digit {
            b'0'..=b'9' => Some(digit - b'0'),
            b'a'..=b'f' => Some(digit - b'a' + 10),
            _ => None,
        }
    }
    let digits: &[u8; 64] = text.as_bytes().try_into().ok()?;
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

/// As much of a text as an error quotes.
fn quoted(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

macro_rules! sha256_digest {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 32]);

        impl $name {
            /// Wraps the 32 raw bytes of a SHA-256.
            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            /// Hashes `content`.
            pub fn of(content: &[u8]) -> Self {
                Self(Sha256::digest(content).into())
            }

            /// The 32 raw bytes.
            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The 64 hexadecimal digits, without the algorithm: fit for a file name.
            pub fn hex(&self) -> String {
                to_hex(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "sha256:{}", self.hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = DigestError;

            /// Parses `sha256:<64 hex>` (OCI image-spec v1.1, descriptor.md, "Digests").
            fn from_str(text: &str) -> Result<Self, DigestError> {
                let Some(hex) = text.strip_prefix("sha256:") else {
                    return Err(DigestError::Algorithm { text: quoted(text) });
                };
                let bytes = from_hex(hex).ok_or_else(|| DigestError::Hex { text: quoted(text) })?;
                Ok(Self(bytes))
            }
        }

        impl TryFrom<String> for $name {
            type Error = DigestError;

            fn try_from(text: String) -> Result<Self, DigestError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(digest: $name) -> Self {
                digest.to_string()
            }
        }
    };
}

sha256_digest! {
    /// SHA-256 of a layer's *compressed* bytes, as the registry stores them.
    BlobDigest
}
sha256_digest! {
    /// SHA-256 of a layer's *uncompressed* tar (OCI image-spec v1.1, config.md, "Layer DiffID").
    DiffId
}
sha256_digest! {
    /// SHA-256 of an image manifest: names one image for one platform.
    ManifestDigest
}

/// BLAKE3 of one chunk of a decompressed layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkDigest([u8; 32]);

impl ChunkDigest {
    /// Wraps the 32 raw bytes of a BLAKE3.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Hashes `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(blake3::hash(content).into())
    }

    /// The 32 raw bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Debug for ChunkDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", to_hex(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_print_and_parse() {
        let digest = BlobDigest::of(b"abc");
        assert_eq!(
            digest.to_string(),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(digest.to_string().parse(), Ok(digest));
    }

    #[test]
    fn malformed_digests_are_refused() {
        let hex = "a".repeat(64);
        for text in [
            String::new(),
            hex.clone(),
            format!("sha512:{hex}"),
            format!("sha256:{}", &hex[1..]),
            format!("sha256:{hex}a"),
            format!("sha256:{}", hex.to_uppercase()),
            format!("sha256:../{}", &hex[3..]),
        ] {
            assert!(
                text.parse::<DiffId>().is_err(),
                "{text:?} was taken for a digest"
            );
        }
    }

    #[test]
    fn an_error_quotes_no_more_than_a_person_reads() {
        let cut = format!("{}…", "ä".repeat(MAX_QUOTED_CHARS));
        let text = "ä".repeat(MAX_QUOTED_CHARS + 1);
        let err = text.parse::<DiffId>().unwrap_err();
        assert_eq!(err, DigestError::Algorithm { text: cut });
        let whole = format!("sha256:{}", "0".repeat(MAX_QUOTED_CHARS - 7));
        let err = whole.parse::<DiffId>().unwrap_err();
        assert_eq!(err, DigestError::Hex { text: whole });
        let err = format!("sha256:{}", "0".repeat(200 << 10)).parse::<DiffId>();
        assert!(err.unwrap_err().to_string().len() < 300);
    }
}
