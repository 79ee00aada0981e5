//! An entry of a table as JSON has it, and what it is as an archive's entry.

use std::collections::BTreeMap;

use base64::Engine as _;
use serde::Deserialize;

use super::{TocLimits, time};
use crate::{
    digest::BlobDigest,
    tar::{TarEntry, TarKind},
};

/// What a decoder puts in the place of what is not UTF-8: nobody knows the name any more.
const REPLACEMENT: char = '\u{fffd}';

/// Name and value.
type Xattr = (Vec<u8>, Vec<u8>);

/// An entry as JSON has it. What is not named here says nothing that is not known otherwise.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct RawEntry {
    pub(super) name: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) size: u64,
    modtime: Option<String>,
    link_name: String,
    mode: i64,
    uid: i64,
    gid: i64,
    pub(super) offset: u64,
    pub(super) inner_offset: u64,
    dev_major: u32,
    dev_minor: u32,
    xattrs: Option<BTreeMap<String, String>>,
    pub(super) digest: String,
    pub(super) chunk_offset: u64,
    pub(super) chunk_size: u64,
    pub(super) chunk_digest: String,
    pub(super) chunk_type: String,
}

impl RawEntry {
    /// What it is as an archive's entry; a file's data are not placed yet.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn entry(&self, limits: &TocLimits) -> Result<TarEntry, String> {
        let path = checked("name", &self.name, limits)?;
        let link = || checked("link target", &self.link_name, limits);
        let kind = match &*self.kind {
            // As in a tar.
            "reg" if path.ends_with(b"/") && self.size == 0 => TarKind::Directory,
            "reg" if path.ends_with(b"/") => {
                return Err("it is a directory by its name, with data of a file".to_owned());
            }
            "reg" => TarKind::File {
                size: self.size,
                extents: Vec::new(),
            },
            "dir" => TarKind::Directory,
            "symlink" => TarKind::Symlink(link()?),
            "hardlink" => TarKind::HardLink(link()?),
            "char" => TarKind::CharDevice {
                major: self.dev_major,
                minor: self.dev_minor,
            },
            "block" => TarKind::BlockDevice {
                major: self.dev_major,
                minor: self.dev_minor,
            },
            "fifo" => TarKind::Fifo,
            other => return Err(format!("it has the unknown type {:?}", shorten(other))),
        };
        let (mtime_seconds, mtime_nanoseconds) = match self.modtime.as_deref() {
            None | Some("") => (0, 0),
            Some(text) => time::parse(text)
                .ok_or_else(|| format!("its modtime {:?} is no time", shorten(text)))?,
        };
        let id = |what, id| u32::try_from(id).map_err(|_| format!("its {what} {id} is none"));
        Ok(TarEntry {
            path,
            kind,
            mode: u32::try_from(self.mode & 0o7777).unwrap_or_default(),
            uid: id("uid", self.uid)?,
            gid: id("gid", self.gid)?,
            mtime_seconds,
            mtime_nanoseconds,
            xattrs: self.xattrs()?,
        })
    }

    /// In the order of their names.
    fn xattrs(&self) -> Result<Vec<Xattr>, String> {
        let xattrs = self.xattrs.iter().flatten().map(|(name, value)| {
            if name.is_empty() || name.contains(['\0', REPLACEMENT]) {
                return Err("an extended attribute has no name".to_owned());
            }
            let decoded = base64::engine::general_purpose::STANDARD.decode(value);
            let value = decoded.map_err(|err| format!("an extended attribute's value: {err}"))?;
            Ok((name.clone().into_bytes(), value))
        });
        xattrs.collect()
    }

    /// The digest of the chunk of so many bytes that it describes, of a file of so many.
    ///
    /// # Errors
    /// That it has none that can be verified.
    pub(super) fn digest_of(&self, len: u64, file_bytes: u64) -> Result<BlobDigest, String> {
        let text = match &*self.chunk_digest {
            // The only chunk of a file has that of the file.
            "" if self.chunk_offset == 0 && len == file_bytes => &self.digest,
            text => text,
        };
        text.parse()
            .map_err(|err| format!("the digest of a chunk: {err}"))
    }
}

fn checked(what: &str, name: &str, limits: &TocLimits) -> Result<Vec<u8>, String> {
    if name.is_empty() {
        return Err(format!("its {what} is empty"));
    }
    if limits.max_path_bytes < name.len() {
        let max = limits.max_path_bytes;
        return Err(format!("its {what} is longer than {max} bytes"));
    }
    if name.contains(['\0', REPLACEMENT]) {
        return Err(format!("its {what} cannot be told from JSON"));
    }
    Ok(name.as_bytes().to_vec())
}

/// The beginning of a text, for errors.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}
