//! Finds one chunk in a stream of the whole blob: slow, and the only way where nothing is known of where
//! the blob can be entered.

use std::ops::Range;

use super::{
    disk::{LayerFile, usize_of},
    feed::FeedReader,
    pipeline::{self, Encoding, PipelineError, Sink},
};
use crate::{chunk, tier::PresentError};

/// Reads the bytes of `chunk` of `file`, as they come; they are not verified yet.
///
/// # Errors
/// [`PresentError::Origin`], or [`PresentError::Refused`] if the stream is not the layer's.
///
/// # Blocking
/// For as long as the source delivers.
pub(super) fn chunk(
    file: &LayerFile,
    chunk: u32,
    reader: FeedReader,
) -> Result<Vec<u8>, PresentError> {
    let layer = file.diff_id();
    let mut seek = Seek {
        at: 0,
        wanted: chunk::byte_range(chunk, file.layer_bytes()),
        found: Vec::with_capacity(usize_of(file.chunk_bytes(chunk))),
    };
    let refused = |reason: String| PresentError::Refused { layer, reason };
    match pipeline::run(reader, Encoding::Blob, &mut seek, None) {
        Ok(_) | Err(PipelineError::Sink(Found)) => {}
        Err(PipelineError::Source(source)) => return Err(PresentError::Origin { layer, source }),
        Err(PipelineError::Corrupt(reason)) => {
            return Err(refused(format!(
                "it cannot be decompressed: {reason}; push the image again"
            )));
        }
    }
    if (seek.found.len() as u64) < file.chunk_bytes(chunk) {
        return Err(refused(
            "its blob is shorter than its index says; push the image again".to_owned(),
        ));
    }
    Ok(seek.found)
}

/// Keeps one part of what passes.
#[derive(Debug)]
struct Seek {
    /// How many bytes of the layer have passed.
    at: u64,
    wanted: Range<u64>,
    found: Vec<u8>,
}

/// The stream is wanted no more.
#[derive(Debug)]
struct Found;

impl Sink for Seek {
    type Error = Found;

    fn take(&mut self, bytes: &[u8]) -> Result<(), Found> {
        let start = self.at;
        self.at += bytes.len() as u64;
        // Both are at most the length of `bytes`.
        let inside = |offset: u64| usize_of(offset.clamp(start, self.at) - start);
        let (from, to) = (inside(self.wanted.start), inside(self.wanted.end));
        self.found.extend_from_slice(&bytes[from..to]);
        if self.wanted.end <= self.at {
            return Err(Found);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wanted_part_is_kept_however_the_stream_is_cut() {
        let content: Vec<u8> = (0..200).collect();
        for (wanted, cut) in [(0..10, 3), (50..60, 7), (50..60, 100), (190..200, 64)] {
            let mut seek = Seek {
                at: 0,
                wanted: wanted.clone(),
                found: Vec::new(),
            };
            let ended = content.chunks(cut).position(|it| seek.take(it).is_err());
            let expected = usize_of(wanted.start)..usize_of(wanted.end);
            assert_eq!(seek.found, content[expected], "{wanted:?} by {cut}");
            assert_eq!(ended, Some((usize_of(wanted.end) - 1) / cut));
        }
    }
}
