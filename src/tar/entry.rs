//! Makes an entry of its header, its extended headers and its long names.

use std::mem;

use super::{
    Fault, Parser, TarEntry, TarExtent, TarKind,
    header::{self, BLOCK_LEN, Header},
    parser::State,
    pax::PaxRecords,
    sparse::{self, PaxMapNumbers, SparseEntry, SparseForm, SparseMap},
};

/// No stream is that long; the header that says so lies.
const TOO_LARGE: Fault = Fault::Malformed("a file larger than any stream");

impl Parser {
    /// Reads a header that is an entry's own.
    pub(super) fn read_entry(
        &mut self,
        header: &Header<'_>,
        offset: u64,
        sink: &mut dyn FnMut(TarEntry),
    ) -> Result<(), Fault> {
        if self.n_entries == self.limits.max_entries {
            return Err(Fault::Limit {
                what: "entries",
                max: self.limits.max_entries,
            });
        }
        self.n_entries += 1;

        let pending = mem::take(&mut self.pending);
        let mut pax = match pending.pax {
            Some(records) => records,
            None => self.globals.clone(),
        };
        let sparse = mem::take(&mut pax.sparse);
        let path = first_name([
            sparse.name.clone(),
            pending.long_name,
            pax.path.take(),
            Some(header.path()),
        ]);
        let target = first_name([
            pending.long_link,
            pax.link_path.take(),
            Some(header.link_path().to_vec()),
        ]);
        self.check_name(&path)?;
        let form = sparse.into_form(self.limits.max_sparse_segments)?;
        let size = data_size(header, &pax, &path)?;
        let kind = match header.typeflag() {
            0 | b'0' | b'7' if path.ends_with(b"/") => TarKind::Directory,
            0 | b'0' | b'7' | b'S' => TarKind::File {
                size,
                extents: Vec::new(),
            },
            b'1' => TarKind::HardLink(target),
            b'2' => TarKind::Symlink(target),
            b'3' => header
                .device()
                .map(|(major, minor)| TarKind::CharDevice { major, minor })?,
            b'4' => header
                .device()
                .map(|(major, minor)| TarKind::BlockDevice { major, minor })?,
            b'5' => TarKind::Directory,
            b'6' => TarKind::Fifo,
            other => return Err(Fault::UnknownType(other)),
        };
        if let TarKind::HardLink(target) | TarKind::Symlink(target) = &kind {
            self.check_name(target)?;
        }
        let (mtime_seconds, mtime_nanoseconds) = match (header.mtime()?, pax.mtime) {
            (_, Some(mtime)) => mtime,
            (seconds, None) => (seconds, 0),
        };
        let (uid, gid) = (header.uid()?, header.gid()?);
        let entry = TarEntry {
            path,
            kind,
            mode: header.mode()?,
            uid: pax.uid.unwrap_or(uid),
            gid: pax.gid.unwrap_or(gid),
            mtime_seconds,
            mtime_nanoseconds,
            xattrs: pax.into_xattrs(),
        };
        self.read_data(header, entry, form, size, offset, sink)
    }

    /// Finds the entry's extents and steps over its data.
    fn read_data(
        &mut self,
        header: &Header<'_>,
        mut entry: TarEntry,
        form: SparseForm,
        data_len: u64,
        offset: u64,
        sink: &mut dyn FnMut(TarEntry),
    ) -> Result<(), Fault> {
        let data_offset = self.position;
        data_offset
            .checked_add(data_len)
            .and_then(|end| end.checked_add(BLOCK_LEN))
            .ok_or(TOO_LARGE)?;
        let padding = header::padding(data_len);
        let is_file = matches!(entry.kind, TarKind::File { .. });
        let sparse_entry = |entry, size, map| SparseEntry {
            header_offset: offset,
            map,
            entry,
            size,
            data_len,
            padding,
            numbers: PaxMapNumbers::default(),
        };
        match form {
            SparseForm::None if header.typeflag() == b'S' => {
                if !header.is_gnu() {
                    return Err(Fault::Unsupported(
                        "a sparse file that is not in GNU's format",
                    ));
                }
                let mut map = SparseMap::new(self.limits.max_sparse_segments);
                let (size, continued) = sparse::read_old_header(header.block(), &mut map)?;
                let entry = sparse_entry(entry, size, map);
                if continued {
                    self.state = State::OldSparseMap(Box::new(entry));
                    return Ok(());
                }
                self.report_sparse(entry, sink)
            }
            SparseForm::None => {
                if let TarKind::File { size, extents } = &mut entry.kind
                    && *size > 0
                {
                    extents.push(TarExtent {
                        file_offset: 0,
                        layer_offset: data_offset,
                        len: *size,
                    });
                }
                self.state = State::Skip {
                    data: data_len,
                    padding,
                };
                sink(entry);
                Ok(())
            }
            _ if !is_file || header.typeflag() == b'S' => Err(Fault::Ambiguous(
                "a PAX sparse map on what is no plain file",
            )),
            SparseForm::Map { size, map } => {
                self.report_sparse(sparse_entry(entry, size, map), sink)
            }
            SparseForm::InData { size } => {
                let map = SparseMap::new(self.limits.max_sparse_segments);
                self.state = State::PaxSparseMap(Box::new(sparse_entry(entry, size, map)));
                Ok(())
            }
        }
    }

    /// Reports a sparse file, whose data are what comes next.
    pub(super) fn report_sparse(
        &mut self,
        entry: SparseEntry,
        sink: &mut dyn FnMut(TarEntry),
    ) -> Result<(), Fault> {
        let (entry, state) = entry.finish(self.position)?;
        self.state = state;
        sink(entry);
        Ok(())
    }

    fn check_name(&self, name: &[u8]) -> Result<(), Fault> {
        if name.is_empty() {
            return Err(Fault::Malformed("an empty path or link target"));
        }
        if self.limits.max_path_bytes < name.len() {
            let max = self.limits.max_path_bytes;
            return Err(Fault::limit("bytes of a path or link target", max));
        }
        Ok(())
    }
}

/// Returns how many bytes of data follow the header, the question where readers must not differ.
///
/// What GNU tar 1.34, bsdtar 3.6, Python 3.11 and Go 1.26 do was tried: a PAX size wins for files
/// with all of them. A size in the header of a directory or hard link counts with none of them.
/// With any other entry without data, or a PAX size, some skip data and others do not.
fn data_size(header: &Header<'_>, pax: &PaxRecords, path: &[u8]) -> Result<u64, Fault> {
    let in_header = header.size()?;
    let size = pax.size.unwrap_or(in_header);
    match header.typeflag() {
        0 | b'0' | b'7' if path.ends_with(b"/") && size > 0 => Err(Fault::Ambiguous(
            "a directory by its name with data of a file",
        )),
        b'S' if path.ends_with(b"/") => Err(Fault::Ambiguous("a sparse file named as a directory")),
        b'S' if size != in_header => Err(Fault::Ambiguous("two sizes of a sparse file")),
        b'1' | b'5' if pax.size.is_none() => Ok(0),
        b'1'..=b'6' if size > 0 => Err(Fault::Ambiguous("a size on an entry that has no data")),
        _ => Ok(size),
    }
}

/// Returns the first name that is there and not empty.
fn first_name<const N: usize>(names: [Option<Vec<u8>>; N]) -> Vec<u8> {
    let mut names = names.into_iter().flatten();
    names.find(|name| !name.is_empty()).unwrap_or_default()
}
