//! Steps through zstd: frames one after the other, skippable ones skipped, checksums verified.
//!
//! Anything but another frame after a frame is corrupt, as for `zstd -d`.
//!
//! # References
//! RFC 8878, section 3.1; section 3.1.1.1.2 recommends to support windows of 8 MiB.

use std::{fmt, io};

use zstd::{
    stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer},
    zstd_safe::zstd_sys::ZSTD_ErrorCode,
};

use super::{Fault, Progress, Step, checkpoint::Boundary};
use crate::sys::inflate::StopAt;

/// log2 of the largest window a frame may ask for, which is memory allocated for it: 8 MiB.
///
/// RFC 8878's recommendation, and what every level of `zstd` stays within without `--ultra` or
/// `--long`.
const MAX_WINDOW_LOG: u32 = 23;

/// The decompressor of zstd.
pub(super) struct ZstdSteps {
    decoder: Decoder<'static>,
    /// Whether the input so far ends with a whole frame.
    between_frames: bool,
}

impl ZstdSteps {
    pub(super) fn new() -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
        Ok(Self {
            decoder,
            between_frames: false,
        })
    }
}

impl Step for ZstdSteps {
    fn step(&mut self, input: &[u8], output: &mut [u8], _: StopAt) -> Result<Progress, Fault> {
        let mut from = InBuffer::around(input);
        let mut to = OutBuffer::around(output);
        let hint = self.decoder.run(&mut from, &mut to).map_err(fault)?;
        let progress = Progress {
            consumed: from.pos(),
            produced: to.pos(),
        };
        self.between_frames = hint == 0;
        Ok(progress)
    }

    fn may_end(&self) -> bool {
        self.between_frames
    }

    fn boundary(&self) -> Option<Boundary> {
        self.between_frames.then_some(Boundary::Fresh)
    }
}

fn fault(error: io::Error) -> Fault {
    let too_large = ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge;
    let code = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<zstd::Error>());
    match code {
        Some(code) if code.is(too_large) => Fault::WindowTooLarge {
            max_bytes: 1 << MAX_WINDOW_LOG,
        },
        _ => Fault::Corrupt(error.to_string()),
    }
}

impl fmt::Debug for ZstdSteps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ZstdSteps")
            .field("between_frames", &self.between_frames)
            .finish_non_exhaustive()
    }
}
