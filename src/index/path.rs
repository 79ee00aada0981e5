//! Cleans the paths of tar entries, so that none can leave the tree.

use super::IndexError;

/// Longest name of one path component, in bytes (`NAME_MAX` of Linux).
pub const MAX_NAME_BYTES: usize = 255;

/// Longest path, in bytes (`PATH_MAX` of Linux, less the closing NUL).
pub const MAX_PATH_BYTES: usize = 4095;

/// Prefix of whiteout names (OCI image-spec v1.1, layer.md, "Whiteouts").
const WHITEOUT_PREFIX: &[u8] = b".wh.";

/// Name of the marker that makes its directory opaque (ibid., "Opaque Whiteout").
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";

/// Prefix of the names that aufs keeps for itself; they are no content.
const AUFS_PREFIX: &[u8] = b".wh..wh.";

/// Splits a path into clean components: `.`, empty ones and slashes dropped, `..` resolved
/// lexically and stopped at the root, as if the path began with a slash.
///
/// # Errors
/// If the path or a component is too long for Linux, or holds a NUL. A whiteout, which is no file, may have
/// a name longer by its prefix: what it hides may have the longest one.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>, IndexError> {
    if MAX_PATH_BYTES < path.len() {
        return Err(entry_error(path, "the path is longer than 4095 bytes"));
    }
    let mut clean = Vec::new();
    for component in path.split(|it| *it == b'/') {
        match component {
            b"" | b"." => {}
            b".." => {
                clean.pop();
            }
            name if name.contains(&0) => return Err(entry_error(path, "a name holds a NUL byte")),
            name => clean.push(name),
        }
    }
    for (at, name) in clean.iter().enumerate() {
        let is_last = at + 1 == clean.len();
        let hidden = name.strip_prefix(WHITEOUT_PREFIX).filter(|_| is_last);
        if MAX_NAME_BYTES < hidden.unwrap_or(name).len() {
            return Err(entry_error(path, "a name is longer than 255 bytes"));
        }
    }
    Ok(clean)
}

/// Makes the error for an entry at `path`.
pub(super) fn entry_error(path: &[u8], reason: &'static str) -> IndexError {
    IndexError::Entry {
        path: String::from_utf8_lossy(path).into_owned(),
        reason,
    }
}

/// What the last component of an entry's path means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameKind<'a> {
    /// A file of the layer.
    Plain,
    /// Hides the named sibling in the layers below.
    Whiteout(&'a [u8]),
    /// Hides everything that the layers below have in the same directory.
    Opaque,
    /// Means nothing: a leftover of aufs.
    Ignored,
}

/// Tells whiteouts from files by the name.
pub fn name_kind(name: &[u8]) -> NameKind<'_> {
    if name == OPAQUE_MARKER {
        return NameKind::Opaque;
    }
    if name.starts_with(AUFS_PREFIX) {
        return NameKind::Ignored;
    }
    match name.strip_prefix(WHITEOUT_PREFIX) {
        None => NameKind::Plain,
        Some(b"" | b"." | b"..") => NameKind::Ignored,
        Some(hidden) => NameKind::Whiteout(hidden),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_path_leaves_the_root() {
        for (path, clean) in [
            ("./a/b", "a/b"),
            ("/a//b/", "a/b"),
            ("../../etc/passwd", "etc/passwd"),
            ("a/../../b", "b"),
            ("./", ""),
            ("", ""),
            ("a/./b/..", "a"),
        ] {
            let joined = components(path.as_bytes()).unwrap().join(&b'/');
            assert_eq!(String::from_utf8(joined).unwrap(), clean, "{path:?}");
        }
    }

    #[test]
    fn names_that_linux_cannot_hold_are_refused() {
        assert!(components(&[b'a'; 256]).is_err());
        assert!(components(&[b'a'; 255]).is_ok());
        // Of a whiteout the name that it hides counts, which is the file's.
        let whiteout = |len| [&b"d/.wh."[..], &b"a".repeat(len)].concat();
        assert_eq!(components(&whiteout(255)).unwrap()[1].len(), 259);
        assert!(components(&whiteout(256)).is_err());
        assert!(components(&[&whiteout(255)[..], b"/./"].concat()).is_ok());
        assert!(components(&[&whiteout(255)[..], b"/a"].concat()).is_err());
        assert!(components(&b"a/".repeat(2048)).is_err());
        assert!(components(b"a\0b").is_err());
    }

    #[test]
    fn whiteouts_are_told_by_name() {
        assert_eq!(name_kind(b"a"), NameKind::Plain);
        assert_eq!(name_kind(b".wh.a"), NameKind::Whiteout(b"a"));
        assert_eq!(name_kind(b".wh..wh..opq"), NameKind::Opaque);
        assert_eq!(name_kind(b".wh..wh.plnk"), NameKind::Ignored);
        assert_eq!(name_kind(b".wh.."), NameKind::Ignored);
        assert_eq!(name_kind(b".wh..."), NameKind::Ignored);
        assert_eq!(name_kind(b".wh..a"), NameKind::Whiteout(b".a"));
        assert_eq!(name_kind(b".whx"), NameKind::Plain);
    }
}
