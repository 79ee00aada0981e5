//! Says which chunks of an image's layers were touched first, and in which order: its profile.
//!
//! A hint, nothing more: whoever follows a wrong one fetches, of the image itself and verified like
//! all else, what nobody will read.

use std::collections::HashSet;

use super::{
    IndexError,
    wire::{Reader, Write, count},
};
use crate::digest::ManifestDigest;

/// First bytes of a profile.
const MAGIC: &[u8; 8] = b"CLIPPROF";

/// Version of the format: raise it with every change of the bytes.
pub const PROFILE_VERSION: u32 = 1;

/// Bytes before the touches.
const HEADER_BYTES: usize = 8 + 4 + 4 + 4 + 4 + 32;

/// Set if as much was seen as is recorded at all.
const FLAG_WHOLE: u32 = 1;

/// Bytes of a touch.
const TOUCH_BYTES: usize = 4 + 4;

/// Bytes of the BLAKE3 at the end, over all that precedes it.
const CHECKSUM_BYTES: usize = 32;

/// What errors call this format.
const WHAT: &str = "profile";

/// Touches that a profile has at most: 4 GB of layers, which is more than programs read to start, and
/// as much as a wrong profile can cost.
pub const MAX_TOUCHES: usize = 4096;

/// Bytes of a profile at most.
pub const MAX_PROFILE_BYTES: usize = HEADER_BYTES + MAX_TOUCHES * TOUCH_BYTES + CHECKSUM_BYTES;

/// A chunk that somebody wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Touch {
    /// Which layer of the image, from the bottom.
    pub layer: u32,
    /// Which chunk of it.
    pub chunk: u32,
}

/// What an image's readers wanted first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Profile {
    /// In the order in which it was wanted.
    pub touches: Vec<Touch>,
    /// Whether as much was seen as is recorded at all. If not, as of a program that ended at once, who
    /// mounts the image next adds to it.
    pub is_whole: bool,
}

impl Profile {
    /// What came to be known later, after what was known before; the end is left out if it is too much.
    #[must_use]
    pub fn with(mut self, later: Self) -> Self {
        let known: HashSet<Touch> = self.touches.iter().copied().collect();
        let new = later.touches.into_iter().filter(|it| !known.contains(it));
        self.touches.extend(new);
        self.touches.truncate(MAX_TOUCHES);
        self.is_whole |= later.is_whole;
        self
    }
}

/// Writes the profile of the image `manifest`.
///
/// # Errors
/// If it has more than [`MAX_TOUCHES`].
pub fn encode(manifest: ManifestDigest, profile: &Profile) -> Result<Vec<u8>, IndexError> {
    let n_touches = profile.touches.len();
    check_count(n_touches)?;
    let len = HEADER_BYTES + n_touches * TOUCH_BYTES + CHECKSUM_BYTES;
    let mut out = Vec::with_capacity(len);
    out.put(MAGIC);
    out.put_u32(PROFILE_VERSION);
    out.put_u32(if profile.is_whole { FLAG_WHOLE } else { 0 });
    out.put_u32(count("touches of a profile", n_touches)?);
    out.put_u32(0);
    out.put(manifest.as_bytes());
    for touch in &profile.touches {
        out.put_u32(touch.layer);
        out.put_u32(touch.chunk);
    }
    let checksum = blake3::hash(&out);
    out.put(checksum.as_bytes());
    Ok(out)
}

/// Reads the profile of the image `manifest`, whose layers have `n_chunks` chunks each, in order.
///
/// # Errors
/// [`IndexError`] says what is wrong with it: it is damaged, another image's, or names what the image
/// does not have.
pub fn decode(
    content: &[u8],
    manifest: ManifestDigest,
    n_chunks: &[u32],
) -> Result<Profile, IndexError> {
    let damaged = || IndexError::Truncated { what: WHAT };
    let mut header = Reader::new(content, WHAT);
    if header.bytes(MAGIC.len())? != MAGIC {
        return Err(IndexError::Magic { what: WHAT });
    }
    let found = header.u32()?;
    if found != PROFILE_VERSION {
        return Err(IndexError::Version {
            what: WHAT,
            found,
            max: PROFILE_VERSION,
        });
    }
    let flags = header.u32()?;
    let n_touches = usize::try_from(header.u32()?).map_err(|_| damaged())?;
    check_count(n_touches)?;
    // The count is bounded, so nothing overflows.
    if content.len() != HEADER_BYTES + n_touches * TOUCH_BYTES + CHECKSUM_BYTES {
        return Err(damaged());
    }
    let (body, checksum) = content
        .split_last_chunk::<CHECKSUM_BYTES>()
        .ok_or_else(damaged)?;
    if blake3::hash(body).as_bytes() != checksum {
        return Err(IndexError::Checksum { what: WHAT });
    }
    let mut fields = Reader::new(&body[HEADER_BYTES - 32..], WHAT);
    let other = |reason| IndexError::Entry {
        path: WHAT.to_owned(),
        reason,
    };
    if fields.array()? != *manifest.as_bytes() {
        return Err(other("it is of another image"));
    }
    let mut touches = Vec::with_capacity(n_touches);
    for _ in 0..n_touches {
        let touch = Touch {
            layer: fields.u32()?,
            chunk: fields.u32()?,
        };
        let layer = usize::try_from(touch.layer).ok();
        let layer = layer.and_then(|it| n_chunks.get(it));
        if layer.is_none_or(|n_chunks| *n_chunks <= touch.chunk) {
            return Err(other("it names a chunk that the image does not have"));
        }
        touches.push(touch);
    }
    Ok(Profile {
        touches,
        is_whole: flags & FLAG_WHOLE != 0,
    })
}

fn check_count(n_touches: usize) -> Result<(), IndexError> {
    if MAX_TOUCHES < n_touches {
        return Err(IndexError::Limit {
            limit: "touches of a profile",
            max: MAX_TOUCHES as u64,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::to_hex;

    const TOUCHES: [Touch; 3] = [
        Touch { layer: 1, chunk: 4 },
        Touch { layer: 0, chunk: 0 },
        Touch { layer: 1, chunk: 3 },
    ];

    const N_CHUNKS: [u32; 2] = [1, 5];

    fn manifest() -> ManifestDigest {
        ManifestDigest::of(b"image")
    }

    fn profile() -> Profile {
        Profile {
            touches: TOUCHES.to_vec(),
            is_whole: true,
        }
    }

    fn sample() -> Vec<u8> {
        encode(manifest(), &profile()).unwrap()
    }

    /// As somebody would write it who knows the format.
    fn sealed(mut body: Vec<u8>) -> Vec<u8> {
        let checksum = blake3::hash(&body);
        body.extend_from_slice(checksum.as_bytes());
        body
    }

    fn body() -> Vec<u8> {
        let mut bytes = sample();
        bytes.truncate(bytes.len() - CHECKSUM_BYTES);
        bytes
    }

    #[test]
    fn golden_bytes() {
        // Format changed: raise PROFILE_VERSION, and say so in docs/INDEX_FORMAT.md.
        let expected = format!(
            "434c495050524f46{}{}{}{}{}{}",
            "0100000001000000",
            "0300000000000000",
            manifest().hex(),
            "0100000004000000",
            "0000000000000000",
            "0100000003000000",
        );
        assert_eq!(to_hex(&body()), expected);
        assert_eq!(sample(), sealed(body()));
    }

    #[test]
    fn what_was_written_is_read_back_in_its_order() {
        assert_eq!(decode(&sample(), manifest(), &N_CHUNKS).unwrap(), profile());
        let empty = encode(manifest(), &Profile::default()).unwrap();
        assert_eq!(decode(&empty, manifest(), &[]).unwrap(), Profile::default());
        let full = Profile {
            touches: vec![TOUCHES[0]; MAX_TOUCHES],
            is_whole: false,
        };
        let bytes = encode(manifest(), &full).unwrap();
        assert_eq!(bytes.len(), MAX_PROFILE_BYTES);
        assert_eq!(decode(&bytes, manifest(), &N_CHUNKS).unwrap(), full);
    }

    #[test]
    fn what_is_known_comes_first_and_once() {
        let [a, b, c] = TOUCHES;
        let of = |touches: &[Touch], is_whole| Profile {
            touches: touches.to_vec(),
            is_whole,
        };
        let joined = of(&[a, b], false).with(of(&[b, c], false));
        assert_eq!(joined, of(&[a, b, c], false));
        assert!(joined.with(of(&[], true)).is_whole);
        let full = of(&vec![a; MAX_TOUCHES], false).with(of(&[b], true));
        assert_eq!(full, of(&vec![a; MAX_TOUCHES], true));
    }

    #[test]
    fn what_is_wrong_is_refused_and_told() {
        let with = |at: usize, byte: u8| {
            let mut body = body();
            body[at] = byte;
            sealed(body)
        };
        let longer = {
            let mut body = body();
            body.extend_from_slice(&[0; TOUCH_BYTES]);
            sealed(body)
        };
        let mut flipped = sample();
        flipped[60] ^= 1;
        for (bytes, expected) in [
            (Vec::new(), "profile is truncated or damaged"),
            (with(0, b'X'), "not a profile: its first bytes are wrong"),
            (
                with(8, 2),
                "profile has version 2, this program reads up to 1: rebuild it",
            ),
            (with(16, 2), "profile is truncated or damaged"),
            (with(16, 4), "profile is truncated or damaged"),
            (
                with(17, 0x11),
                "the image exceeds touches of a profile = 4096",
            ),
            (
                with(19, 0xff),
                "the image exceeds touches of a profile = 4096",
            ),
            (longer, "profile is truncated or damaged"),
            (flipped, "profile does not match its checksum"),
            (with(24, 0), "entry \"profile\": it is of another image"),
            (
                with(56, 2),
                "entry \"profile\": it names a chunk that the image does not have",
            ),
            (
                with(60, 5),
                "entry \"profile\": it names a chunk that the image does not have",
            ),
        ] {
            let err = decode(&bytes, manifest(), &N_CHUNKS).unwrap_err();
            assert_eq!(err.to_string(), expected);
        }
        let too_many = Profile {
            touches: vec![TOUCHES[0]; MAX_TOUCHES + 1],
            is_whole: true,
        };
        assert!(matches!(
            encode(manifest(), &too_many),
            Err(IndexError::Limit { max: 4096, .. })
        ));
    }

    proptest::proptest! {
        #[test]
        fn errors_are_fine_and_panics_are_bugs(
            bytes in proptest::collection::vec(0u8.., 0..200),
            at in 0usize..80,
            byte: u8,
        ) {
            // Only that both return.
            let _ = decode(&bytes, manifest(), &N_CHUNKS);
            let mut body = body();
            if let Some(it) = body.get_mut(at) {
                *it = byte;
            }
            let _ = decode(&sealed(body), manifest(), &N_CHUNKS);
        }
    }
}
