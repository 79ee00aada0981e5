//! An image's profile as a value: its bytes, and the code by which the installation's nodes know it.

use bytes::Bytes;

use super::{FormatError, len64};
use crate::integrity::{IntegrityKey, TAG_BYTES};

/// Bytes that a value has beside the profile.
pub(in crate::remote) const PROFILE_TAG_BYTES: usize = TAG_BYTES;

/// Writes the value of `profile`, whose first bytes are the magic of its kind; without a key, its code
/// is zeros.
pub(in crate::remote) fn encode_profile(profile: &[u8], key: Option<&IntegrityKey>) -> Vec<u8> {
    let tag = key.map_or([0; TAG_BYTES], |key| key.tag(profile));
    [profile, &tag].concat()
}

/// Takes the profile out of a value.
///
/// # Errors
/// If it is too short to be one, or `key` does not authenticate it. Its form is the reader's to check.
pub(in crate::remote) fn decode_profile(
    value: Bytes,
    key: Option<&IntegrityKey>,
) -> Result<Bytes, FormatError> {
    let too_short = FormatError::Length {
        what: "profile",
        len: len64(value.len()),
        expected: len64(TAG_BYTES),
    };
    let len = value.len().checked_sub(TAG_BYTES).ok_or(too_short)?;
    let (profile, tag) = value.split_at(len);
    match key {
        Some(key) if !key.verifies(profile, tag) => Err(FormatError::Unauthenticated),
        Some(_) | None => Ok(value.slice(..len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_known_by_its_key_alone() {
        let [one, other] = [1, 2].map(|it| IntegrityKey::new(&[it; 32]).unwrap());
        let value = Bytes::from(encode_profile(b"CLIPPROF...", Some(&one)));
        let profile = Bytes::from_static(b"CLIPPROF...");
        assert_eq!(
            decode_profile(value.clone(), Some(&one)),
            Ok(profile.clone())
        );
        let refused = Err(FormatError::Unauthenticated);
        assert_eq!(decode_profile(value.clone(), Some(&other)), refused);
        let mut changed = value.to_vec();
        changed[9] ^= 1;
        assert_eq!(decode_profile(changed.into(), Some(&one)), refused);
        // Without a key nobody vouches for it, and with one nobody takes it.
        assert_eq!(decode_profile(value, None), Ok(profile.clone()));
        let bare = Bytes::from(encode_profile(&profile, None));
        assert_eq!(decode_profile(bare.clone(), None), Ok(profile));
        assert_eq!(decode_profile(bare, Some(&one)), refused);
    }

    #[test]
    fn what_is_too_short_is_refused() {
        for len in [0, 31] {
            let value = Bytes::from(vec![0; len]);
            assert!(matches!(
                decode_profile(value, None),
                Err(FormatError::Length { .. })
            ));
        }
    }
}
