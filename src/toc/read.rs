//! Goes through a table of contents as it streams by.

use std::{
    fmt,
    io::{self, BufRead, BufReader, Read},
};

use serde::{
    Deserializer as _,
    de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{
    TocError, TocLimits,
    entry::{RawEntry, shorten},
    input::{Allowance, Bounded, Hashed, tar_header},
    layout::Layout,
};
use crate::{
    codec::{
        CodecError, Decoder,
        piece_map::{MAX_PIECE_BYTES, Piece, max_blob_bytes},
    },
    digest::BlobDigest,
    tar::{TarEntry, TarExtent, TarKind},
    tier::TocKind,
};

/// Version of the tables that are read.
const TABLE_VERSION: u64 = 1;

/// Bytes that are read at once between decompression and parsing.
const BUFFER_BYTES: usize = 32 << 10;

/// Files that eStargz adds at the root for itself; with the table, which does not name itself.
const OWN_FILES: [&str; 3] = [
    ".prefetch.landmark",
    ".no.prefetch.landmark",
    "stargz.index.json",
];

/// Type of an entry that goes on with the file before it.
const CHUNK: &str = "chunk";

/// Type of a chunk that is nothing but zeros.
const ZEROS: &str = "zeros";

/// Takes what a table says.
pub trait TocSink {
    /// What can go wrong with it.
    type Error;

    /// Takes an entry, in the table's order. The pieces of its data are taken before or after.
    ///
    /// # Errors
    /// Its own, which end the reading.
    fn entry(&mut self, entry: &TarEntry) -> Result<(), Self::Error>;

    /// Takes a piece, in the order of layer and blob.
    ///
    /// # Errors
    /// As of [`entry`](Self::entry).
    fn piece(&mut self, piece: &Piece) -> Result<(), Self::Error>;
}

/// What was found out about a table that was read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contents {
    /// Bytes of the layer that it describes.
    pub layer_bytes: u64,
    /// The table's digest, decompressed, without the tar that it may be in.
    pub digest: BlobDigest,
}

/// Reads the table of `kind` that `input` has, compressed, and nothing else; the data that it describes end
/// at `data_end` of the blob.
///
/// Nothing of it may be believed before its digest is compared.
///
/// # Errors
/// [`TocError`]. An error of `input` passes through.
///
/// # Blocking
/// As `input` does.
pub fn read<S: TocSink>(
    input: impl BufRead,
    kind: TocKind,
    data_end: u64,
    limits: &TocLimits,
    sink: &mut S,
) -> Result<Contents, TocError<S::Error>> {
    let mut decoder = Decoder::new(input).map_err(|err| of_input(err.into()))?;
    let len = match kind {
        TocKind::ZstdChunked { .. } => limits.max_table_bytes.saturating_add(1),
        TocKind::Estargz => tar_header(&mut decoder)
            .map_err(of_input)?
            .map_err(|reason| TocError::Unusable(reason.to_owned()))?,
    };
    if kind == TocKind::Estargz && limits.max_table_bytes < len {
        return Err(TocError::Unusable(too_long(limits)));
    }
    let allowance = Allowance::new(limits.max_entry_bytes);
    let hashed = Hashed::new(decoder.take(len));
    let mut bounded = Bounded {
        input: BufReader::with_capacity(BUFFER_BYTES, hashed),
        allowance: allowance.clone(),
    };
    let mut walk = Walk {
        sink,
        limits,
        data_end,
        allowance: allowance.clone(),
        layout: Layout::default(),
        file: None,
        pending: None,
        last_offset: 0,
        n_entries: 0,
        failed: None,
        has_own_files: kind == TocKind::Estargz,
    };
    let mut json = serde_json::Deserializer::from_reader(&mut bounded);
    let parsed = json.deserialize_map(Table(&mut walk));
    // Reads to the end, so that all was hashed.
    let parsed = parsed.and_then(|()| json.end());
    if let Some(failed) = walk.failed.take() {
        return Err(failed);
    }
    if let Err(err) = parsed {
        return Err(match err.is_io() {
            true if allowance.is_spent() => {
                let max = limits.max_entry_bytes;
                TocError::Unusable(format!("an entry is longer than {max} bytes"))
            }
            true => of_input(err.into()),
            false => TocError::Unusable(format!("it is not JSON of a table: {err}")),
        });
    }
    let layer_bytes = walk.finish()?;
    let hashed = bounded.input.get_ref();
    // It was cut there, and may go on.
    if kind != TocKind::Estargz && hashed.input().limit() == 0 {
        return Err(TocError::Unusable(too_long(limits)));
    }
    let digest = hashed.digest();
    Ok(Contents {
        layer_bytes,
        digest,
    })
}

fn too_long(limits: &TocLimits) -> String {
    format!("it is longer than {} bytes", limits.max_table_bytes)
}

/// What it means that decompressed bytes could not be read: their source failed, or they are none.
fn of_input<E>(err: io::Error) -> TocError<E> {
    match CodecError::of(&err) {
        Some(CodecError::Source(_)) | None => TocError::Input(err),
        Some(wrong) => TocError::Unusable(wrong.to_string()),
    }
}

/// Visits a table.
struct Table<'w, 'a, S: TocSink>(&'w mut Walk<'a, S>);

impl<'de, S: TocSink> Visitor<'de> for Table<'_, '_, S> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut version, mut has_entries) = (None, false);
        while let Some(key) = map.next_key::<String>()? {
            match &*key {
                "version" if version.is_none() => version = Some(map.next_value::<u64>()?),
                "entries" if !has_entries => {
                    has_entries = true;
                    map.next_value_seed(Entries(self.0))?;
                }
                "version" | "entries" => return Err(A::Error::custom("a field is there twice")),
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        if version != Some(TABLE_VERSION) || !has_entries {
            return Err(A::Error::custom(
                "it has no entries, or is not of version 1",
            ));
        }
        Ok(())
    }
}

/// Visits the entries of a table, one by one.
struct Entries<'w, 'a, S: TocSink>(&'w mut Walk<'a, S>);

impl<'de, S: TocSink> DeserializeSeed<'de> for Entries<'_, '_, S> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, S: TocSink> Visitor<'de> for Entries<'_, '_, S> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        let walk = self.0;
        walk.allowance.renew();
        while let Some(entry) = entries.next_element::<RawEntry>()? {
            if let Err(err) = walk.take(&entry) {
                // Told by another way than JSON's errors.
                walk.failed = Some(err);
                return Err(A::Error::custom("an entry cannot be used"));
            }
            walk.allowance.renew();
        }
        Ok(())
    }
}

/// A file whose chunks are coming.
struct OpenFile {
    entry: TarEntry,
    name: String,
    size: u64,
    /// Bytes of it that were described.
    described_bytes: u64,
    extents: Vec<TarExtent>,
    is_shown: bool,
}

/// Goes from entry to entry.
struct Walk<'a, S: TocSink> {
    sink: &'a mut S,
    limits: &'a TocLimits,
    /// Where in the blob the data end.
    data_end: u64,
    allowance: Allowance,
    layout: Layout,
    file: Option<OpenFile>,
    /// The last piece, of which is not known yet where in the blob it ends.
    pending: Option<Piece>,
    /// Where in the blob the last data were.
    last_offset: u64,
    n_entries: u64,
    failed: Option<TocError<S::Error>>,
    has_own_files: bool,
}

impl<S: TocSink> Walk<'_, S> {
    fn take(&mut self, raw: &RawEntry) -> Result<(), TocError<S::Error>> {
        let wrong = |reason: String| {
            let name = shorten(&raw.name);
            TocError::Unusable(format!("entry {name:?}: {reason}"))
        };
        self.n_entries += 1;
        if self.limits.max_entries < self.n_entries {
            let max = self.limits.max_entries;
            return Err(wrong(format!("there are more than {max} entries")));
        }
        if raw.kind == CHUNK {
            let mut file = self.file.take();
            let file = file.take_if(|it| it.name == raw.name);
            let file = file.ok_or_else(|| wrong("a chunk does not follow its file".to_owned()))?;
            return self.take_chunk(raw, file, &wrong);
        }
        if self.file.is_some() {
            return Err(wrong("the file before it lacks chunks".to_owned()));
        }
        let entry = raw.entry(self.limits).map_err(wrong)?;
        let is_shown = !(self.has_own_files && is_own(&raw.name));
        match &entry.kind {
            TarKind::File { size, .. } if 0 < *size => {
                let file = OpenFile {
                    size: *size,
                    entry,
                    name: raw.name.clone(),
                    described_bytes: 0,
                    extents: Vec::new(),
                    is_shown,
                };
                self.take_chunk(raw, file, &wrong)
            }
            _ if is_shown => self.sink.entry(&entry).map_err(TocError::Sink),
            _ => Ok(()),
        }
    }

    /// Takes the next chunk of `file`, and the file if that was its last.
    fn take_chunk(
        &mut self,
        raw: &RawEntry,
        mut file: OpenFile,
        wrong: &dyn Fn(String) -> TocError<S::Error>,
    ) -> Result<(), TocError<S::Error>> {
        let left_bytes = file.size - file.described_bytes;
        let len = match raw.chunk_size {
            0 => left_bytes,
            len => len,
        };
        if raw.chunk_offset != file.described_bytes || left_bytes < len {
            return Err(wrong("its chunks are no partition of it".to_owned()));
        }
        if raw.offset < self.last_offset || self.data_end <= raw.offset {
            return Err(wrong("its data are not in order in the blob".to_owned()));
        }
        if self.last_offset < raw.offset {
            self.end_piece(raw.offset)?;
        }
        self.last_offset = raw.offset;
        match &*raw.chunk_type {
            ZEROS => {}
            "" if file.is_shown => self.place(raw, &mut file, len, wrong)?,
            "" => {}
            other => {
                let kind = shorten(other);
                return Err(wrong(format!("a chunk has the unknown type {kind:?}")));
            }
        }
        file.described_bytes += len;
        if file.described_bytes < file.size {
            self.file = Some(file);
            return Ok(());
        }
        if !file.is_shown {
            return Ok(());
        }
        let OpenFile {
            mut entry,
            size,
            extents,
            ..
        } = file;
        entry.kind = TarKind::File { size, extents };
        self.sink.entry(&entry).map_err(TocError::Sink)
    }

    /// Lays a chunk out.
    fn place(
        &mut self,
        raw: &RawEntry,
        file: &mut OpenFile,
        len: u64,
        wrong: &dyn Fn(String) -> TocError<S::Error>,
    ) -> Result<(), TocError<S::Error>> {
        let digest = raw.digest_of(len, file.size).map_err(wrong)?;
        let too_large = || {
            wrong(format!(
                "a chunk of {len} bytes, behind {} others, is larger than {MAX_PIECE_BYTES}",
                raw.inner_offset
            ))
        };
        if MAX_PIECE_BYTES < raw.inner_offset {
            return Err(too_large());
        }
        // Of what begins at one place of the blob, the later comes later.
        if let Some(last) = &self.pending
            && last.blob.start == raw.offset
            && raw.inner_offset < last.skipped.saturating_add(last.len)
        {
            return Err(wrong("its data are not in order in the blob".to_owned()));
        }
        // Where the last one began, too, if it did not end there.
        self.end_piece(raw.offset)?;
        let placed = self.layout.place(len, raw.offset, file.described_bytes);
        let layer_offset = placed.ok_or_else(too_large)?;
        if self.limits.max_layer_bytes < self.layout.layer_bytes() {
            let max = self.limits.max_layer_bytes;
            return Err(wrong(format!("the layer has more than {max} bytes")));
        }
        let max = self.limits.max_extents;
        let extent = TarExtent {
            file_offset: file.described_bytes,
            layer_offset,
            len,
        };
        if !join(&mut file.extents, &extent) {
            if max <= file.extents.len() {
                return Err(wrong(format!("its data are in more than {max} runs")));
            }
            file.extents.push(extent);
        }
        self.pending = Some(Piece {
            layer_offset,
            len,
            blob: raw.offset..raw.offset,
            skipped: raw.inner_offset,
            digest,
        });
        Ok(())
    }

    /// Tells the last piece, which ends where the blob's next data begin, or where it must have ended; if
    /// these begin together, where is not known yet, and the most is taken that it can be.
    fn end_piece(&mut self, next_offset: u64) -> Result<(), TocError<S::Error>> {
        let Some(mut piece) = self.pending.take() else {
            return Ok(());
        };
        let most = max_blob_bytes(piece.skipped, piece.len);
        let furthest = piece.blob.start.saturating_add(most).min(self.data_end);
        piece.blob.end = match piece.blob.start < next_offset {
            true => furthest.min(next_offset),
            false => furthest,
        };
        self.sink.piece(&piece).map_err(TocError::Sink)
    }

    /// Bytes of the layer.
    fn finish(&mut self) -> Result<u64, TocError<S::Error>> {
        if self.file.is_some() {
            return Err(TocError::Unusable("its last file lacks chunks".to_owned()));
        }
        self.end_piece(self.data_end)?;
        match self.layout.layer_bytes() {
            0 => Err(TocError::NoContent),
            layer_bytes => Ok(layer_bytes),
        }
    }
}

/// Makes the last of `extents` longer by `next`, if that goes on where it ends, in the file and in the layer.
fn join(extents: &mut [TarExtent], next: &TarExtent) -> bool {
    let Some(last) = extents.last_mut() else {
        return false;
    };
    let ends = (last.file_offset + last.len, last.layer_offset + last.len);
    let joins = ends == (next.file_offset, next.layer_offset);
    if joins {
        last.len += next.len;
    }
    joins
}

/// Whether the name is that of a file which eStargz has added for itself.
fn is_own(name: &str) -> bool {
    let name = name.strip_prefix("./").unwrap_or(name);
    OWN_FILES.contains(&name.trim_start_matches('/'))
}

#[cfg(test)]
mod tests;
