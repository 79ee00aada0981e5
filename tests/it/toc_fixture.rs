//! Layers whose blobs carry a table of contents, as eStargz and zstd:chunked have them: written here, after
//! their descriptions. `e2e/` has some that the formats' own libraries wrote.

use std::{io::Write as _, sync::Arc};

use clip_csi::{
    chunk::CHUNK_BYTES,
    digest::{BlobDigest, DiffId},
    tier::{LayerDesc, Toc, TocKind},
};
use serde_json::{Value, json};

use crate::layer_fixture::FakeSource;

/// A format of blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Estargz,
    ZstdChunked,
}

pub(crate) const FORMATS: [Format; 2] = [Format::Estargz, Format::ZstdChunked];

/// A blob with a table of contents.
pub(crate) struct TocFixture {
    pub(crate) blob: Vec<u8>,
    pub(crate) desc: LayerDesc,
    /// Where in the blob each piece begins, and how long it is there.
    pub(crate) pieces: Vec<(usize, usize)>,
    /// Where the table begins.
    pub(crate) table: usize,
}

/// What a blob is made of.
pub(crate) struct Writer {
    format: Format,
    blob: Vec<u8>,
    tar: Vec<u8>,
    /// Bytes of the tar that are in no gzip member or zstd frame yet.
    pending: Vec<u8>,
    entries: Vec<Value>,
    pieces: Vec<(usize, usize)>,
    chunk_bytes: usize,
}

/// Bytes that compress a little, another sequence for each seed.
pub(crate) fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state & 0x3f) as u8
    };
    (0..len).map(next).collect()
}

fn header(name: &str, typeflag: u8, size: usize, link: &str, mode: u32) -> [u8; 512] {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
    header[108..115].copy_from_slice(b"0000007");
    header[116..123].copy_from_slice(b"0000010");
    header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    // 2000-03-01T00:00:00Z.
    header[136..147].copy_from_slice(format!("{:011o}", 951_868_800).as_bytes());
    header[148..156].copy_from_slice(b"        ");
    header[156] = typeflag;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|it| u32::from(*it)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

impl Writer {
    /// One whose files are cut into chunks of so many bytes.
    pub(crate) fn new(format: Format, chunk_bytes: usize) -> Self {
        Self {
            format,
            blob: Vec::new(),
            tar: Vec::new(),
            pending: Vec::new(),
            entries: Vec::new(),
            pieces: Vec::new(),
            chunk_bytes,
        }
    }

    fn compress(&self, bytes: &[u8]) -> Vec<u8> {
        match self.format {
            Format::Estargz => {
                let level = flate2::Compression::fast();
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), level);
                gzip.write_all(bytes).unwrap();
                gzip.finish().unwrap()
            }
            Format::ZstdChunked => zstd::bulk::compress(bytes, 3).unwrap(),
        }
    }

    /// Ends the member or frame under way.
    fn flush(&mut self) {
        if !self.pending.is_empty() {
            let pending = std::mem::take(&mut self.pending);
            let compressed = self.compress(&pending);
            self.blob.extend(compressed);
            self.tar.extend(pending);
        }
    }

    fn pad(&mut self, len: usize) {
        let padding = len.next_multiple_of(512) - len;
        self.pending.extend(vec![0; padding]);
    }

    fn entry(&mut self, name: &str, kind: &str, mode: u32, fields: &Value) {
        let mut entry = json!({
            "name": name, "type": kind, "mode": mode, "uid": 7, "gid": 8,
            "modtime": "2000-03-01T00:00:00Z",
        });
        let fields = fields.as_object().unwrap().clone();
        entry.as_object_mut().unwrap().extend(fields);
        self.entries.push(entry);
    }

    pub(crate) fn directory(&mut self, name: &str) {
        self.pending.extend(header(name, b'5', 0, "", 0o755));
        self.entry(name, "dir", 0o755, &json!({}));
    }

    pub(crate) fn link(&mut self, name: &str, kind: &str, target: &str) {
        let typeflag = if kind == "symlink" { b'2' } else { b'1' };
        self.pending
            .extend(header(name, typeflag, 0, target, 0o777));
        self.entry(name, kind, 0o777, &json!({ "linkName": target }));
    }

    /// A file in chunks, each in a member or frame of its own.
    pub(crate) fn file(&mut self, name: &str, content: &[u8]) {
        self.file_that_says(name, content, content);
    }

    /// A file of which the table says that it has other bytes, as many.
    pub(crate) fn file_that_says(&mut self, name: &str, content: &[u8], said: &[u8]) {
        self.pending
            .extend(header(name, b'0', content.len(), "", 0o644));
        let digest = BlobDigest::of(said).to_string();
        if content.is_empty() {
            let fields = json!({ "size": 0, "digest": digest });
            return self.entry(name, "reg", 0o644, &fields);
        }
        self.flush();
        let n_chunks = content.len().div_ceil(self.chunk_bytes);
        let mut fields = Vec::new();
        for (n, chunk) in content.chunks(self.chunk_bytes).enumerate() {
            let compressed = self.compress(chunk);
            let said = &said[n * self.chunk_bytes..][..chunk.len()];
            fields.push(json!({
                "offset": self.blob.len(), "chunkOffset": n * self.chunk_bytes,
                "chunkDigest": BlobDigest::of(said).to_string(),
            }));
            // eStargz leaves the last one's out.
            if n + 1 < n_chunks || (self.format == Format::ZstdChunked && 1 < n_chunks) {
                fields[n]["chunkSize"] = chunk.len().into();
            }
            self.pieces.push((self.blob.len(), compressed.len()));
            self.blob.extend(compressed);
            self.tar.extend(chunk);
        }
        self.pad(content.len());
        for (n, mut fields) in fields.into_iter().enumerate() {
            if n == 0 {
                fields["size"] = content.len().into();
                fields["digest"] = digest.clone().into();
                if n_chunks == 1 && self.format == Format::ZstdChunked {
                    fields.as_object_mut().unwrap().remove("chunkDigest");
                }
                self.entry(name, "reg", 0o644, &fields);
            } else {
                self.entry(name, "chunk", 0, &fields);
            }
        }
    }

    /// Small files that share a member, as eStargz has them with a least size of chunks.
    pub(crate) fn files_in_one(&mut self, files: &[(&str, &[u8])]) {
        let [(first, _), ..] = files else { return };
        self.pending
            .extend(header(first, b'0', files[0].1.len(), "", 0o644));
        self.flush();
        let offset = self.blob.len();
        for (n, (name, content)) in files.iter().enumerate() {
            if 0 < n {
                self.pending
                    .extend(header(name, b'0', content.len(), "", 0o644));
            }
            let digest = BlobDigest::of(content).to_string();
            let fields = json!({
                "size": content.len(), "offset": offset, "innerOffset": self.pending.len(),
                "digest": digest, "chunkDigest": digest,
            });
            self.entry(name, "reg", 0o644, &fields);
            self.pending.extend_from_slice(content);
            self.pad(content.len());
        }
        self.flush();
        self.pieces.push((offset, self.blob.len() - offset));
    }

    pub(crate) fn finish(mut self) -> TocFixture {
        let json = json!({ "version": 1, "entries": self.entries }).to_string();
        let json = json.as_bytes();
        let toc = match self.format {
            Format::Estargz => {
                self.flush();
                let table = self.blob.len();
                let mut tar = header("stargz.index.json", b'0', json.len(), "", 0o444).to_vec();
                tar.extend_from_slice(json);
                tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
                self.pending = tar;
                self.flush();
                self.blob
                    .extend(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x1a\0SG\x16\0");
                self.blob.extend(format!("{table:016x}STARGZ").as_bytes());
                self.blob.extend(b"\x01\0\0\xff\xff\0\0\0\0\0\0\0\0");
                let digest = BlobDigest::of(json);
                let kind = TocKind::Estargz;
                (Toc { kind, digest }, table)
            }
            Format::ZstdChunked => {
                self.pending.extend([0; 1024]);
                self.flush();
                let compressed = zstd::bulk::compress(json, 3).unwrap();
                let len = u32::try_from(compressed.len()).unwrap();
                self.blob.extend(0x184d_2a50_u32.to_le_bytes());
                self.blob.extend(len.to_le_bytes());
                let offset = self.blob.len();
                self.blob.extend(&compressed);
                let kind = TocKind::ZstdChunked {
                    offset: offset as u64,
                    compressed_bytes: len.into(),
                };
                let digest = BlobDigest::of(&compressed);
                (Toc { kind, digest }, offset)
            }
        };
        let (toc, table) = toc;
        TocFixture {
            desc: LayerDesc {
                diff_id: DiffId::of(&self.tar),
                blob: BlobDigest::of(&self.blob),
                blob_bytes: self.blob.len() as u64,
                toc: Some(toc),
            },
            blob: self.blob,
            pieces: self.pieces,
            table,
        }
    }
}

/// Chunks of files in the fixture: pieces that have chunks for themselves.
pub(crate) const PIECE_BYTES: usize = CHUNK_BYTES as usize * 2 + 1234;

impl TocFixture {
    /// With small files, files of several pieces, and all else that there is.
    pub(crate) fn new(format: Format) -> Self {
        let mut writer = Writer::new(format, PIECE_BYTES);
        if format == Format::Estargz {
            writer.file(".no.prefetch.landmark", b"\x0f");
        }
        writer.directory("bin/");
        writer.file("bin/tool", &content(1, 300_000));
        writer.file("empty", b"");
        writer.link("sh", "symlink", "bin/tool");
        writer.directory("data/");
        for n in 0..6u64 {
            let name = format!("data/{n}");
            writer.file(&name, &content(10 + n, 250_000 + n as usize));
        }
        writer.files_in_one(&[
            ("data/one", &content(20, 4000)),
            ("data/two", &content(21, 1)),
            ("data/three", &content(22, 70_000)),
        ]);
        writer.link("hard", "hardlink", "bin/tool");
        writer.file("model", &content(30, 5 * CHUNK_BYTES as usize + 99));
        writer.file("data/last", &content(31, 5000));
        writer.file("data/.wh.gone", b"");
        writer.finish()
    }

    pub(crate) fn source(&self) -> Arc<FakeSource> {
        FakeSource::new(self.blob.clone())
    }

    /// The layer that the table describes.
    pub(crate) fn by_toc(&self) -> LayerDesc {
        self.desc.by_toc().unwrap()
    }
}
