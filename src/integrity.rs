//! The key by which the nodes of an installation recognize what one of them vouches for.
//!
//! Whoever has it has checked a layer against its DiffID before it wrote down the digests of the
//! layer's chunks. Each kind of content that is authenticated begins with a magic of its own, so that
//! the code of one is of no use for another.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::secret::Secret;

/// Bytes of an authentication code.
pub const TAG_BYTES: usize = 32;

/// The key that all nodes of an installation share.
#[derive(Clone)]
pub struct IntegrityKey(Secret<Hmac<Sha256>>);

impl std::fmt::Debug for IntegrityKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl IntegrityKey {
    /// Bytes of a key, at least: as many as the hash has (RFC 2104, section 3).
    pub const MIN_BYTES: usize = 32;

    /// Takes `key`, or returns `None` if it is shorter than [`Self::MIN_BYTES`].
    pub fn new(key: &[u8]) -> Option<Self> {
        if key.len() < Self::MIN_BYTES {
            return None;
        }
        let state = Hmac::<Sha256>::new_from_slice(key).ok()?;
        Some(Self(Secret::new(state)))
    }

    /// Returns the HMAC-SHA256 of `content`, which begins with the magic of its kind.
    pub fn tag(&self, content: &[u8]) -> [u8; TAG_BYTES] {
        self.keyed(content).finalize().into_bytes().into()
    }

    /// Whether `tag` is that of `content`. Compares in constant time.
    pub fn verifies(&self, content: &[u8], tag: &[u8]) -> bool {
        self.keyed(content).verify_slice(tag).is_ok()
    }

    fn keyed(&self, content: &[u8]) -> Hmac<Sha256> {
        let mut state = self.0.expose().clone();
        state.update(content);
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_keys_are_refused_and_no_key_is_printed() {
        assert!(IntegrityKey::new(&[1; 31]).is_none());
        let key = IntegrityKey::new(&[65; 32]).unwrap();
        assert_eq!(format!("{key:?}"), "<redacted>");
    }

    #[test]
    fn a_tag_is_of_one_content_and_one_key() {
        let [one, other] = [1, 2].map(|it| IntegrityKey::new(&[it; 32]).unwrap());
        let tag = one.tag(b"content");
        assert!(one.verifies(b"content", &tag));
        assert!(!one.verifies(b"contents", &tag));
        assert!(!other.verifies(b"content", &tag));
        assert!(!one.verifies(b"content", &tag[..31]));
    }
}
