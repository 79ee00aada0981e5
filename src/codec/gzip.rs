//! Steps through gzip: members one after the other, checksums and lengths verified.
//!
//! What follows a member decides: another member; zero bytes up to the end, which are padding, as
//! for `gzip -d` and pigz (Go's reader refuses them, but they cannot hide anything: the blob's
//! digest covers them); anything else is corrupt, as for Go (`gzip -d` only warns).
//!
//! A member that is entered in the middle is the exception: its checksum and length cover bytes that
//! nobody saw, and are skipped.
//!
//! # References
//! RFC 1952, section 2.2.

use std::{fmt, io};

use flate2::{Decompress, FlushDecompress, Status};

use super::{Fault, Progress, Step, checkpoint::Boundary};
use crate::sys::inflate::{Inflated, Inflater, StopAt, Wrapping};

/// log2 of deflate's window, the only one that RFC 1951 has.
const WINDOW_BITS: u8 = 15;

/// CRC-32 and ISIZE, which follow a member's data.
const TRAILER_BYTES: usize = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before the first member.
    Start,
    /// In a member: its header, its data or its trailer.
    Member,
    /// Before a block of a member, so many bits into the next byte.
    Entrance { bit_offset: u8 },
    /// In the data of a member that was entered.
    Entered,
    /// In the trailer of a member that was entered, so many bytes before its end.
    Trailer { left: usize },
    /// After a member.
    Between,
    /// In zero bytes after the last member.
    Padding,
}

/// The decompressor of gzip.
pub(super) struct GzipSteps {
    engine: Engine,
    place: Place,
}

impl GzipSteps {
    /// Starts before a member.
    pub(super) fn new() -> Self {
        Self {
            engine: Engine::Members(Decompress::new_gzip(WINDOW_BITS)),
            place: Place::Start,
        }
    }

    /// Starts before a member, and can stop between blocks.
    pub(super) fn with_boundaries() -> io::Result<Self> {
        Ok(Self {
            engine: Engine::Blocks(Inflater::new(Wrapping::Gzip)?),
            place: Place::Start,
        })
    }

    /// Starts between two blocks, the first of which ended `bit_offset` bits into the next byte,
    /// and with `window` as its last output.
    pub(super) fn enter(bit_offset: u8, window: &[u8]) -> io::Result<Self> {
        let mut inflater = Inflater::new(Wrapping::Raw)?;
        inflater.set_window(window);
        Ok(Self {
            engine: Engine::Blocks(inflater),
            place: Place::Entrance { bit_offset },
        })
    }

    fn inflate(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        stop: StopAt,
    ) -> Result<Progress, Fault> {
        let inflated = self.engine.inflate(input, output, stop)?;
        let progress = Progress {
            consumed: inflated.consumed,
            produced: inflated.produced,
        };
        if inflated.ended {
            self.place = match self.place {
                Place::Entered => Place::Trailer {
                    left: TRAILER_BYTES,
                },
                _ => Place::Between,
            };
        } else if progress.consumed == 0 && progress.produced == 0 && !input.is_empty() {
            return Err(Fault::Corrupt("no progress".to_owned()));
        }
        Ok(progress)
    }
}

impl Step for GzipSteps {
    fn step(&mut self, input: &[u8], output: &mut [u8], stop: StopAt) -> Result<Progress, Fault> {
        let took = |consumed| Progress {
            consumed,
            produced: 0,
        };
        match (self.place, input.first()) {
            (Place::Entrance { bit_offset: 0 }, _) => self.place = Place::Entered,
            (Place::Entrance { bit_offset }, Some(first)) => {
                self.engine.prime(8 - bit_offset, first >> bit_offset);
                self.place = Place::Entered;
                return Ok(took(1));
            }
            (Place::Entrance { .. }, None) => return Ok(took(0)),
            (Place::Trailer { left }, _) => {
                let consumed = left.min(input.len());
                self.place = match left - consumed {
                    0 => Place::Between,
                    left => Place::Trailer { left },
                };
                return Ok(took(consumed));
            }
            (Place::Between, Some(0)) => self.place = Place::Padding,
            (Place::Between, Some(_)) => {
                self.engine.reset();
                self.place = Place::Member;
            }
            (Place::Start, _) => self.place = Place::Member,
            _ => {}
        }
        if self.place != Place::Padding {
            return self.inflate(input, output, stop);
        }
        if input.iter().any(|byte| *byte != 0) {
            return Err(Fault::Corrupt("foreign data after the end".to_owned()));
        }
        Ok(took(input.len()))
    }

    fn may_end(&self) -> bool {
        matches!(self.place, Place::Between | Place::Padding)
    }

    fn boundary(&self) -> Option<Boundary> {
        match (self.place, &self.engine) {
            (Place::Between, _) => Some(Boundary::Fresh),
            (Place::Member, Engine::Blocks(inflater)) => inflater
                .unused_bits_at_block()
                .map(|unused_bits| Boundary::Block { unused_bits }),
            _ => None,
        }
    }

    fn window(&self, window: &mut Vec<u8>) {
        if let Engine::Blocks(inflater) = &self.engine {
            inflater.window(window);
        }
    }
}

/// Inflates: flate2 whole members, the inflater beside it where blocks matter.
enum Engine {
    /// In gzip mode: reads header and trailer too, and verifies CRC-32 and ISIZE.
    Members(Decompress),
    /// Likewise, except in the member that was entered.
    Blocks(Inflater),
}

impl Engine {
    /// Expects a member's header.
    fn reset(&mut self) {
        match self {
            // Gzip mode survives this only with flate2's `true`: "expect a header".
            Self::Members(inflater) => inflater.reset(true),
            Self::Blocks(inflater) => inflater.reset(Wrapping::Gzip),
        }
    }

    fn prime(&mut self, n_bits: u8, bits: u8) {
        match self {
            Self::Members(_) => unreachable!("members are not entered with flate2"),
            Self::Blocks(inflater) => inflater.prime(n_bits, bits),
        }
    }

    fn inflate(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        stop: StopAt,
    ) -> Result<Inflated, Fault> {
        let inflater = match self {
            Self::Members(inflater) => inflater,
            Self::Blocks(inflater) => {
                return inflater
                    .inflate(input, output, stop)
                    .map_err(Fault::Corrupt);
            }
        };
        let before = (inflater.total_in(), inflater.total_out());
        let status = inflater
            .decompress(input, output, FlushDecompress::None)
            .map_err(|error| Fault::Corrupt(error.message().unwrap_or("bad data").to_owned()))?;
        let delta = |after: u64, before: u64| {
            usize::try_from(after - before).expect("no more than the slices hold")
        };
        Ok(Inflated {
            consumed: delta(inflater.total_in(), before.0),
            produced: delta(inflater.total_out(), before.1),
            ended: status == Status::StreamEnd,
        })
    }
}

impl fmt::Debug for GzipSteps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GzipSteps")
            .field("place", &self.place)
            .finish_non_exhaustive()
    }
}
