//! Checks the parser as a whole, on archives written by hand: one table per subject.

mod archive;
mod layout;
mod metadata;
mod properties;
mod sparse_files;

use super::*;

/// Parses an archive in one piece.
fn parse(bytes: &[u8]) -> Result<Vec<TarEntry>, TarError> {
    parse_limited(bytes, TarLimits::default())
}

fn parse_limited(bytes: &[u8], limits: TarLimits) -> Result<Vec<TarEntry>, TarError> {
    parse_pieces([bytes], limits).1
}

/// Parses an archive in pieces: the entries before the end or error, and the outcome.
fn parse_pieces<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
    limits: TarLimits,
) -> (Vec<TarEntry>, Result<Vec<TarEntry>, TarError>) {
    let mut entries = Vec::new();
    let mut parser = Parser::new(limits);
    for piece in pieces {
        // An error stays, so `finish` returns it too; that is part of the contract.
        let pushed = parser.push(piece, &mut |entry| entries.push(entry));
        if let Err(error) = pushed {
            assert_eq!(
                parser.push(b"more", &mut |_| panic!("no entry")),
                Err(error)
            );
        }
    }
    let outcome = parser.finish().map(|()| entries.clone());
    (entries, outcome)
}

/// Returns the paths of an archive's entries as text.
fn paths(bytes: &[u8]) -> Result<Vec<String>, TarError> {
    let text = |entry: TarEntry| entry.path.escape_ascii().to_string();
    Ok(parse(bytes)?.into_iter().map(text).collect())
}

/// Returns the only entry.
fn only(bytes: &[u8]) -> TarEntry {
    let mut entries = parse(bytes).unwrap();
    assert_eq!(entries.len(), 1);
    entries.remove(0)
}

/// Tells which way an archive was refused: "ambiguous", …, with the offset.
fn refusal(bytes: &[u8]) -> (&'static str, u64) {
    match parse(bytes).expect_err("an archive that must be refused") {
        TarError::Truncated { offset, .. } => ("truncated", offset),
        TarError::Malformed { offset, .. } => ("malformed", offset),
        TarError::Ambiguous { offset, .. } => ("ambiguous", offset),
        TarError::Unsupported { offset, .. } => ("unsupported", offset),
        TarError::UnknownType { offset, .. } => ("unknown type", offset),
        TarError::Limit { offset, .. } => ("limit", offset),
    }
}
