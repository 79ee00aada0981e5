//! Reads what a manifest says of a layer's table of contents: pure, no I/O, and the input is hostile.
//!
//! # References
//! eStargz: `docs/estargz.md` of containerd's stargz-snapshotter, "Footer" and "TOC". zstd:chunked:
//! `pkg/chunked` of containers/storage.

use oci_client::manifest::OciDescriptor;
use tracing::warn;

use crate::{
    digest::BlobDigest,
    tier::{Toc, TocKind},
};

/// The digest of an eStargz table, decompressed.
const ESTARGZ_DIGEST: &str = "containerd.io/snapshot/stargz/toc.digest";

/// The digest of a zstd:chunked table, compressed.
const CHUNKED_DIGEST: &str = "io.github.containers.zstd-chunked.manifest-checksum";

/// `offset:compressed length:length:type` of a zstd:chunked table.
const CHUNKED_POSITION: &str = "io.github.containers.zstd-chunked.manifest-position";

/// The only type of tables that there is: JSON as eStargz has it.
const CHUNKED_TYPE: &str = "1";

/// The table of contents that the annotations of a layer name; none that cannot be read, without which
/// the layer can be read as well.
pub(super) fn of(layer: &OciDescriptor) -> Option<Toc> {
    parse(layer).unwrap_or_else(|reason| {
        warn!(layer.blob = %layer.digest, reason,
            "table of contents of a layer is not used: the manifest names it wrongly");
        None
    })
}

fn parse(layer: &OciDescriptor) -> Result<Option<Toc>, String> {
    let Some(annotations) = &layer.annotations else {
        return Ok(None);
    };
    let digest = |key: &str| -> Result<Option<BlobDigest>, String> {
        let text = annotations.get(key);
        let parsed = text.map(|it| it.parse().map_err(|err| format!("{key}: {err}")));
        parsed.transpose()
    };
    if let Some(digest) = digest(ESTARGZ_DIGEST)? {
        let kind = TocKind::Estargz;
        return Ok(Some(Toc { kind, digest }));
    }
    let Some(digest) = digest(CHUNKED_DIGEST)? else {
        return Ok(None);
    };
    let position = annotations.get(CHUNKED_POSITION);
    let position = position.ok_or_else(|| format!("{CHUNKED_POSITION} is missing"))?;
    let fields: Vec<&str> = position.split(':').collect();
    let (offset, compressed_bytes) = match fields[..] {
        [offset, compressed_bytes, _, CHUNKED_TYPE] => (offset.parse(), compressed_bytes.parse()),
        _ => return Err(format!("{CHUNKED_POSITION} is not of type 1")),
    };
    let (Ok(offset), Ok(compressed_bytes)) = (offset, compressed_bytes) else {
        return Err(format!("{CHUNKED_POSITION} has no numbers"));
    };
    let kind = TocKind::ZstdChunked {
        offset,
        compressed_bytes,
    };
    Ok(Some(Toc { kind, digest }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(annotations: &[(&str, &str)]) -> Result<Option<Toc>, String> {
        let annotations = annotations.iter();
        let annotations = annotations.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let layer = OciDescriptor {
            annotations: Some(annotations.collect()),
            ..OciDescriptor::default()
        };
        let parsed = parse(&layer);
        assert_eq!(of(&layer), parsed.clone().unwrap_or_default());
        parsed
    }

    #[test]
    fn annotations_name_a_table_or_none() {
        let (digest, other) = (BlobDigest::of(b"table"), BlobDigest::of(b"other"));
        let (text, other_text) = (digest.to_string(), other.to_string());
        assert_eq!(parse(&OciDescriptor::default()), Ok(None));
        assert_eq!(parsed(&[("a", "b")]), Ok(None));
        let kind = TocKind::Estargz;
        let estargz = Ok(Some(Toc { kind, digest }));
        assert_eq!(parsed(&[(ESTARGZ_DIGEST, &text)]), estargz);
        let both = [(ESTARGZ_DIGEST, &*text), (CHUNKED_DIGEST, &*other_text)];
        assert_eq!(parsed(&both), estargz);
        let chunked = |position| parsed(&[(CHUNKED_DIGEST, &text), (CHUNKED_POSITION, position)]);
        let kind = TocKind::ZstdChunked {
            offset: 10,
            compressed_bytes: 20,
        };
        assert_eq!(chunked("10:20:30:1"), Ok(Some(Toc { kind, digest })));
        for wrong in [
            "",
            "10:20:30",
            "10:20:30:2",
            "10:20:30:1:1",
            "-1:20:30:1",
            "10:99999999999999999999:30:1",
        ] {
            let reason = chunked(wrong).unwrap_err();
            assert!(reason.starts_with(CHUNKED_POSITION), "{wrong}: {reason}");
        }
        assert!(parsed(&[(CHUNKED_DIGEST, &text)]).is_err());
        for wrong in ["", "sha256:12", "sha512:34"] {
            assert!(parsed(&[(ESTARGZ_DIGEST, wrong)]).is_err(), "{wrong}");
        }
    }
}
