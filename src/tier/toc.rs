//! Names a layer's table of contents, which its blob carries, and the layer that it describes.
//!
//! What a table says of a layer is not what the layer's DiffId promises: a blob may come with a table that
//! lies about it. So a layer that is read by its table is a layer of its own, named by the table and the
//! blob, and shares nothing with the one of the DiffId: neither files nor keys.

use sha2::{Digest, Sha256};

use super::LayerDesc;
use crate::digest::{BlobDigest, DiffId};

/// Begins what is hashed for the name of such a layer. It changes with what a table is taken to say, or
/// how its content is laid out: nodes of both releases then have layers of their own.
///
/// What is hashed is no tar, for which it is too short: no layer has this name as its DiffId.
const DOMAIN: &[u8] = b"clip-csi toc layer v2\0";

/// The table of contents of a layer's blob, as the image's manifest names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Toc {
    /// Which format the blob has.
    pub kind: TocKind,
    /// Names the table: of eStargz decompressed, of zstd:chunked as it is in the blob.
    pub digest: BlobDigest,
}

/// A format of blobs that have a table of contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TocKind {
    /// gzip members, whose last one says where the table is.
    Estargz,
    /// zstd frames; the image's manifest says where the table is.
    ZstdChunked {
        /// Where in the blob it begins.
        offset: u64,
        /// How long it is there.
        compressed_bytes: u64,
    },
}

impl TocKind {
    /// What the format is called.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Estargz => "eStargz",
            Self::ZstdChunked { .. } => "zstd:chunked",
        }
    }
}

impl Toc {
    /// Names the layer that this table describes in `blob`.
    pub fn layer(&self, blob: &BlobDigest) -> DiffId {
        let mut hasher = Sha256::new();
        hasher.update(DOMAIN);
        hasher.update([match self.kind {
            TocKind::Estargz => 0,
            // Where the table is changes nothing of what it says.
            TocKind::ZstdChunked { .. } => 1,
        }]);
        hasher.update(self.digest.as_bytes());
        hasher.update(blob.as_bytes());
        DiffId::from_bytes(hasher.finalize().into())
    }
}

impl LayerDesc {
    /// The layer that the blob's table of contents describes, if it has one.
    pub fn by_toc(&self) -> Option<Self> {
        let toc = self.toc?;
        Some(Self {
            diff_id: toc.layer(&self.blob),
            ..self.clone()
        })
    }

    /// Whether this is the layer that a table of contents describes, and not that of a DiffId.
    pub fn is_by_toc(&self) -> bool {
        self.toc
            .is_some_and(|it| it.layer(&self.blob) == self.diff_id)
    }

    /// The same layer as if its blob had no table.
    #[must_use]
    pub fn without_toc(&self) -> Self {
        Self {
            toc: None,
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_by_its_table_has_a_name_of_its_own() {
        let (blob, digest) = (BlobDigest::of(b"blob"), BlobDigest::of(b"table"));
        let toc = |kind| Toc { kind, digest };
        let at = |offset| TocKind::ZstdChunked {
            offset,
            compressed_bytes: 1,
        };
        let desc = |toc| LayerDesc {
            diff_id: DiffId::of(b"tar"),
            blob,
            blob_bytes: 4,
            toc,
        };
        assert_eq!(desc(None).by_toc(), None);
        assert!(!desc(None).is_by_toc());
        let by_toc = desc(Some(toc(TocKind::Estargz))).by_toc().unwrap();
        // Nodes of every release share what they have under it.
        let name = "sha256:5feb861957194b9a99ec3d6205aeabce8a71f0a88fc8f9b964419c867748f9e3";
        assert_eq!(by_toc.diff_id.to_string(), name);
        assert!(by_toc.is_by_toc() && by_toc.by_toc() == Some(by_toc.clone()));
        assert!(!by_toc.without_toc().is_by_toc());
        let name = |kind, blob: &BlobDigest| toc(kind).layer(blob);
        let another = BlobDigest::of(b"another");
        let other_table = Toc {
            kind: TocKind::Estargz,
            digest: another,
        };
        let others = [
            name(at(0), &blob),
            name(TocKind::Estargz, &another),
            other_table.layer(&blob),
        ];
        assert!(!others.contains(&by_toc.diff_id));
        assert_eq!(name(at(0), &blob), name(at(7), &blob), "where it is");
    }
}
