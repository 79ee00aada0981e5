//! The manifest: what a layer in the store consists of, and why that may be believed.
//!
//! Specified in `docs/REMOTE_FORMAT.md`, "Manifest".

use super::{FormatError, len64};
use crate::{
    chunk::{self, CHUNK_BYTES},
    digest::{BlobDigest, ChunkDigest, DiffId},
    integrity::{IntegrityKey, TAG_BYTES},
};

/// Bytes of a manifest at most: those of a layer of 2 TiB.
pub(crate) const MAX_MANIFEST_BYTES: usize = 64 << 20;

const MAGIC: [u8; 4] = *b"CLRM";
const VERSION: u8 = 2;
const FLAG_COMPLETE: u8 = 1;
const HEADER_BYTES: usize = 144;
const DIGEST_BYTES: usize = 32;

/// Says why the digests of a [`RemoteManifest`] may be believed, or that they may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// A node with the installation's key wrote it, after it had checked the layer against its
    /// `DiffId`: what matches the digests may be served.
    Authenticated,
    /// No key is configured, and anybody who can write to the store may have written it.
    ///
    /// Chunks that match its digests are consistent with each other, and that is all. Before the
    /// first byte is served, the caller must fetch **all** chunks, hash them in order, and compare
    /// with the `DiffId`; the index must be rebuilt from these bytes, or compared with one that
    /// was. If they differ, [`ContentCache::reject`](crate::remote::ContentCache::reject).
    Unverified,
}

/// What the store says about a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteManifest {
    /// Names the layer.
    pub diff_id: DiffId,
    /// The layer's blob in the registry from which it was decompressed.
    pub blob: BlobDigest,
    /// Size of the blob.
    pub blob_bytes: u64,
    /// Size of the decompressed layer.
    pub layer_bytes: u64,
    /// One digest per chunk: as many as `layer_bytes` demands.
    pub chunk_digests: Vec<ChunkDigest>,
    /// BLAKE3 of the layer's index, decompressed.
    pub index_digest: ChunkDigest,
    /// Size of the index, decompressed.
    pub index_bytes: u64,
    /// Whether the fields above may be believed.
    pub trust: Trust,
}

/// The fields of a manifest that is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteLayer {
    pub(crate) diff_id: DiffId,
    pub(crate) blob: BlobDigest,
    pub(crate) blob_bytes: u64,
    pub(crate) layer_bytes: u64,
    pub(crate) chunk_digests: Vec<ChunkDigest>,
    pub(crate) index_digest: ChunkDigest,
    pub(crate) index_bytes: u64,
}

impl RemoteLayer {
    /// Encodes the manifest of a complete layer, authenticated if there is a key.
    ///
    /// # Errors
    /// If the number of digests is not that of the layer's chunks.
    pub(crate) fn encode(&self, key: Option<&IntegrityKey>) -> Result<Vec<u8>, FormatError> {
        let n_chunks = chunk::n_chunks(self.layer_bytes);
        if n_chunks != len64(self.chunk_digests.len()) {
            return Err(FormatError::Field {
                field: "number of chunks",
            });
        }
        let digests_bytes = self.chunk_digests.len() * DIGEST_BYTES;
        let mut value = Vec::with_capacity(HEADER_BYTES + digests_bytes + TAG_BYTES);
        value.extend(MAGIC);
        value.extend([VERSION, FLAG_COMPLETE, 0, 0]);
        value.extend(self.diff_id.as_bytes());
        value.extend(self.blob.as_bytes());
        value.extend(self.blob_bytes.to_le_bytes());
        value.extend(self.layer_bytes.to_le_bytes());
        value.extend(CHUNK_BYTES.to_le_bytes());
        value.extend(self.index_bytes.to_le_bytes());
        value.extend(self.index_digest.as_bytes());
        value.extend(n_chunks.to_le_bytes());
        for digest in &self.chunk_digests {
            value.extend(digest.as_bytes());
        }
        let tag = key.map_or([0; TAG_BYTES], |key| key.tag(&value));
        value.extend(tag);
        Ok(value)
    }
}

impl RemoteManifest {
    /// Decodes the manifest that the store has for `layer`; `None` if it is one of a layer that
    /// is not complete.
    pub(crate) fn decode(
        value: &[u8],
        layer: &DiffId,
        key: Option<&IntegrityKey>,
        max_index_bytes: u64,
    ) -> Result<Option<Self>, FormatError> {
        let too_short = FormatError::Length {
            what: "manifest",
            len: len64(value.len()),
            expected: len64(HEADER_BYTES + TAG_BYTES),
        };
        let Some((content, tag)) = value.split_last_chunk::<TAG_BYTES>() else {
            return Err(too_short);
        };
        let mut fields = Fields(content);
        let (Some(magic), Some([version, flags, _, _])) = (fields.take(), fields.take()) else {
            return Err(too_short);
        };
        if magic != MAGIC {
            return Err(FormatError::Magic { what: "manifest" });
        }
        if version != VERSION {
            return Err(FormatError::Version {
                what: "manifest",
                found: version,
                known: VERSION,
            });
        }
        // Before any other field: with a key, only its owner's bytes are looked at.
        let trust = match key {
            Some(key) if key.verifies(content, tag) => Trust::Authenticated,
            Some(_) => return Err(FormatError::Unauthenticated),
            None => Trust::Unverified,
        };
        let manifest = fields.manifest(trust).ok_or(too_short)?;
        manifest.check(layer, max_index_bytes)?;
        Ok((flags & FLAG_COMPLETE != 0).then_some(manifest))
    }

    fn check(&self, layer: &DiffId, max_index_bytes: u64) -> Result<(), FormatError> {
        let inconsistent = |field| Err(FormatError::Field { field });
        if self.diff_id != *layer {
            return inconsistent("DiffId");
        }
        let n_chunks = chunk::n_chunks(self.layer_bytes);
        if n_chunks != len64(self.chunk_digests.len()) || u32::try_from(n_chunks).is_err() {
            return inconsistent("number of chunks");
        }
        if self.index_bytes > max_index_bytes {
            return Err(FormatError::Limit {
                field: "index length",
                value: self.index_bytes,
                max: max_index_bytes,
            });
        }
        Ok(())
    }
}

/// The fields of a manifest that are still to be read.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*field)
    }

    fn number(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// Reads what follows magic, version and flags: to the end, neither more nor less.
    fn manifest(&mut self, trust: Trust) -> Option<RemoteManifest> {
        let diff_id = DiffId::from_bytes(self.take()?);
        let blob = BlobDigest::from_bytes(self.take()?);
        let blob_bytes = self.number()?;
        let layer_bytes = self.number()?;
        let chunk_bytes = self.number()?;
        let index_bytes = self.number()?;
        let index_digest = ChunkDigest::from_bytes(self.take()?);
        let n_chunks = self.number()?;
        let (digests, rest) = self.0.as_chunks::<DIGEST_BYTES>();
        if chunk_bytes != CHUNK_BYTES || !rest.is_empty() || n_chunks != len64(digests.len()) {
            return None;
        }
        Some(RemoteManifest {
            diff_id,
            blob,
            blob_bytes,
            layer_bytes,
            chunk_digests: digests
                .iter()
                .map(|it| ChunkDigest::from_bytes(*it))
                .collect(),
            index_digest,
            index_bytes,
            trust,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::to_hex;

    const MAX_INDEX: u64 = 1 << 20;

    fn key(byte: u8) -> IntegrityKey {
        IntegrityKey::new(&[byte; 32]).unwrap()
    }

    fn layer() -> RemoteLayer {
        RemoteLayer {
            diff_id: DiffId::of(b"layer"),
            blob: BlobDigest::of(b"blob"),
            blob_bytes: 0x0102_0304,
            layer_bytes: CHUNK_BYTES + 7,
            chunk_digests: vec![ChunkDigest::of(b"0"), ChunkDigest::of(b"1")],
            index_digest: ChunkDigest::of(b"index"),
            index_bytes: 5,
        }
    }

    fn decode(
        value: &[u8],
        key: Option<&IntegrityKey>,
    ) -> Result<Option<RemoteManifest>, FormatError> {
        RemoteManifest::decode(value, &layer().diff_id, key, MAX_INDEX)
    }

    /// Format changed? Bump VERSION and say so in docs/REMOTE_FORMAT.md.
    #[test]
    fn golden_bytes_of_a_manifest() {
        let layer = RemoteLayer {
            diff_id: DiffId::from_bytes([0x11; 32]),
            blob: BlobDigest::from_bytes([0x22; 32]),
            index_digest: ChunkDigest::from_bytes([0x33; 32]),
            chunk_digests: [[0x44; 32], [0x55; 32]].map(ChunkDigest::from_bytes).into(),
            ..layer()
        };
        let content = [
            "434c524d",                                     // magic
            "02010000",                                     // version, flags, reserved
            &"11".repeat(32),                               // DiffId
            &"22".repeat(32),                               // BlobDigest
            "0403020100000000",                             // bytes of the blob
            "07f00f0000000000",                             // bytes of the layer
            "00f00f0000000000",                             // bytes of a chunk
            "0500000000000000",                             // bytes of the index
            &"33".repeat(32),                               // digest of the index
            "0200000000000000",                             // number of chunks
            &["44", "55"].map(|it| it.repeat(32)).concat(), // their digests
        ]
        .concat();
        let unsigned = to_hex(&layer.encode(None).unwrap());
        assert_eq!(unsigned, format!("{content}{}", "00".repeat(32)));
        // Computed by Python's hmac over the same bytes.
        let tag = "86a67f8ba6ea13e7a9e001c7fb92aa6803ead91a6cb0b087cddfa576857f44a9";
        let signed = to_hex(&layer.encode(Some(&key(7))).unwrap());
        assert_eq!(signed, format!("{content}{tag}"));
    }

    #[test]
    fn a_manifest_survives_encode_and_decode() {
        for (writer, reader, trust) in [
            (None, None, Trust::Unverified),
            (Some(key(1)), None, Trust::Unverified),
            (Some(key(1)), Some(key(1)), Trust::Authenticated),
        ] {
            let value = layer().encode(writer.as_ref()).unwrap();
            let manifest = decode(&value, reader.as_ref()).unwrap().unwrap();
            let RemoteLayer {
                diff_id,
                blob,
                blob_bytes,
                layer_bytes,
                chunk_digests,
                index_digest,
                index_bytes,
            } = layer();
            let expected = RemoteManifest {
                diff_id,
                blob,
                blob_bytes,
                layer_bytes,
                chunk_digests,
                index_digest,
                index_bytes,
                trust,
            };
            assert_eq!(manifest, expected);
        }
    }

    #[test]
    fn with_a_key_nothing_else_is_believed() {
        let key_1 = key(1);
        let unsigned = layer().encode(None).unwrap();
        let foreign = layer().encode(Some(&key(2))).unwrap();
        for value in [unsigned, foreign] {
            assert_eq!(
                decode(&value, Some(&key_1)),
                Err(FormatError::Unauthenticated)
            );
        }
        // Every single bit is bound.
        let good = layer().encode(Some(&key_1)).unwrap();
        for bit in 0..good.len() * 8 {
            let mut value = good.clone();
            value[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&value, Some(&key_1)).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn inconsistent_manifests_are_refused() {
        let good = layer().encode(None).unwrap();
        assert!(decode(&good, None).unwrap().is_some());
        let with = |at: usize, bytes: &[u8]| {
            let mut value = good.clone();
            value[at..at + bytes.len()].copy_from_slice(bytes);
            decode(&value, None)
        };
        let field = |field| Err(FormatError::Field { field });
        assert_eq!(
            with(0, b"X"),
            Err(FormatError::Magic { what: "manifest" }),
            "magic"
        );
        let version = FormatError::Version {
            what: "manifest",
            found: 3,
            known: 2,
        };
        assert_eq!(with(4, &[3]), Err(version), "version");
        assert_eq!(with(5, &[0]), Ok(None), "not complete");
        assert_eq!(with(8, &[0; 32]), field("DiffId"));
        for layer_bytes in [0, CHUNK_BYTES, 2 * CHUNK_BYTES + 1, u64::MAX] {
            let got = with(80, &layer_bytes.to_le_bytes());
            assert_eq!(got, field("number of chunks"), "{layer_bytes}");
        }
        let got = with(96, &(MAX_INDEX + 1).to_le_bytes());
        assert!(matches!(got, Err(FormatError::Limit { .. })), "{got:?}");
        for (what, at, number) in [("chunk size", 88, 1 << 20), ("count", 136, u64::MAX)] {
            let got = with(at, &u64::to_le_bytes(number));
            assert!(matches!(got, Err(FormatError::Length { .. })), "{what}");
        }
        for len in 0..good.len() {
            assert!(decode(&good[..len], None).is_err(), "cut to {len}");
        }
        let mut longer = good.clone();
        longer.extend([0; 32]);
        assert!(decode(&longer, None).is_err(), "one digest too many");
    }

    #[test]
    fn a_manifest_with_a_wrong_count_is_not_written() {
        let mut layer = layer();
        layer.chunk_digests.pop();
        assert!(layer.encode(None).is_err());
    }

    proptest::proptest! {
        /// Errors are fine, panics are bugs.
        #[test]
        fn garbage_never_panics(tail: Vec<u8>, fit: bool) {
            let mut value = layer().encode(None).unwrap();
            if fit {
                let at = value.len().saturating_sub(tail.len());
                let from = tail.len().saturating_sub(value.len());
                value[at..].copy_from_slice(&tail[from..]);
            } else {
                value.truncate(8);
                value.extend(tail);
            }
            let _ = decode(&value, None);
        }
    }
}
