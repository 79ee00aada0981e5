//! Steps through gzip: members one after the other, checksums and lengths verified.
//!
//! What follows a member decides: another member; zero bytes up to the end, which are padding, as
//! for `gzip -d` and pigz (Go's reader refuses them, but they cannot hide anything: the blob's
//! digest covers them); anything else is corrupt, as for Go (`gzip -d` only warns).
//!
//! # References
//! RFC 1952, section 2.2.

use std::fmt;

use flate2::{Decompress, FlushDecompress, Status};

use super::{Fault, Progress, Step};

/// log2 of deflate's window, the only one that RFC 1951 has.
const WINDOW_BITS: u8 = 15;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before the first member.
    Start,
    /// In a member: its header, its data or its trailer.
    Member,
    /// After a member.
    Between,
    /// In zero bytes after the last member.
    Padding,
}

/// The decompressor of gzip.
pub(super) struct GzipSteps {
    /// In gzip mode: reads header and trailer too, and verifies CRC-32 and ISIZE.
    inflater: Decompress,
    place: Place,
}

impl GzipSteps {
    pub(super) fn new() -> Self {
        Self {
            inflater: Decompress::new_gzip(WINDOW_BITS),
            place: Place::Start,
        }
    }

    fn inflate(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress, Fault> {
        let before = (self.inflater.total_in(), self.inflater.total_out());
        let status = self
            .inflater
            .decompress(input, output, FlushDecompress::None)
            .map_err(|error| Fault::Corrupt(error.message().unwrap_or("bad data").to_owned()))?;
        let delta = |after: u64, before: u64| {
            usize::try_from(after - before).expect("no more than the slices hold")
        };
        let progress = Progress {
            consumed: delta(self.inflater.total_in(), before.0),
            produced: delta(self.inflater.total_out(), before.1),
        };
        match status {
            Status::StreamEnd => self.place = Place::Between,
            Status::Ok | Status::BufError => {
                let stuck = progress.consumed == 0 && progress.produced == 0;
                if stuck && !input.is_empty() {
                    return Err(Fault::Corrupt("no progress".to_owned()));
                }
            }
        }
        Ok(progress)
    }
}

impl Step for GzipSteps {
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress, Fault> {
        match (self.place, input.first()) {
            (Place::Between, Some(0)) => self.place = Place::Padding,
            (Place::Between, Some(_)) => {
                // Gzip mode survives this only with flate2's `true`: "expect a header".
                self.inflater.reset(true);
                self.place = Place::Member;
            }
            (Place::Start, _) => self.place = Place::Member,
            _ => {}
        }
        if self.place != Place::Padding {
            return self.inflate(input, output);
        }
        if input.iter().any(|byte| *byte != 0) {
            return Err(Fault::Corrupt("foreign data after the end".to_owned()));
        }
        Ok(Progress {
            consumed: input.len(),
            produced: 0,
        })
    }

    fn may_end(&self) -> bool {
        matches!(self.place, Place::Between | Place::Padding)
    }
}

impl fmt::Debug for GzipSteps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GzipSteps")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}
