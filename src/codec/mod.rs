//! Decompresses layers: gzip, zstd and plain tar, told apart by their first bytes.
//!
//! [`Decoder`] is a [`Read`] over a [`BufRead`]. It ends only where its input ends, so that a hash
//! beside the input has seen the whole blob. It holds no input of its own: give it a buffer of
//! 64 KiB.
//!
//! A failure of the input passes through unchanged; what is wrong with the data comes as an
//! [`io::Error`] around a [`CodecError`], see [`CodecError::of`]. Both codecs are pure state machines
//! (`Step`) that never see the input.
//!
//! For random access, [`Decoder::with_checkpoints`] notes places at which [`Decoder::resume`] can
//! begin later, and [`access_map`] keeps them; [`piece_map`] keeps those of blobs that say themselves where.

pub mod access_map;
pub mod checkpoint;
pub mod piece_map;

mod gzip;
mod map_frame;
mod trim;
mod zstd;

use std::{
    fmt,
    io::{self, BufRead, Chain, Cursor, Read},
};

pub use map_frame::Subject;

use checkpoint::{Boundary, Checkpoint, Picker};
use gzip::GzipSteps;
use zstd::ZstdSteps;

use crate::sys::inflate::{StopAt, WINDOW_BYTES};

/// The longest of the magic numbers.
const MAGIC_BYTES: usize = 4;

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// gzip, of one or several members (RFC 1952).
    Gzip,
    /// Zstandard, of one or several frames (RFC 8878).
    Zstd,
    /// Plain tar.
    None,
}

impl Compression {
    /// Returns the compression of a blob that starts with `first_bytes`.
    ///
    /// Four bytes suffice; with fewer it may be [`Compression::None`] for want of evidence. Media
    /// types are not asked, because registries hold layers whose media type is wrong.
    pub fn sniff(first_bytes: &[u8]) -> Self {
        match first_bytes {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame: zstd:chunked and pzstd may start with one.
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::None,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::None => "no compression",
        })
    }
}

/// What is wrong with a compressed layer; `at` is the offset in the blob.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// There are no bytes at all. Even an empty layer has some.
    #[error("the layer's blob is empty")]
    Empty,
    /// The blob ends in the middle.
    #[error("the {compression} layer is cut short: it ends at byte {at} of the blob")]
    Truncated {
        /// What it was.
        compression: Compression,
        /// The blob's length.
        at: u64,
    },
    /// The bytes are not what a compressor writes: damage, a wrong checksum, foreign data.
    #[error("the {compression} layer is corrupt near byte {at} of the blob: {reason}")]
    Corrupt {
        /// What it was.
        compression: Compression,
        /// How far it had been read.
        at: u64,
        /// What the decompressor says.
        reason: String,
    },
    /// The layer needs more memory to decompress than a node gives it.
    #[error(
        "the zstd layer needs a window of more than {max_bytes} bytes, near byte {at} of the blob: \
         recompress it without --ultra and --long (zstd -19 or lower)"
    )]
    WindowTooLarge {
        /// How far it had been read.
        at: u64,
        /// The largest window allowed.
        max_bytes: u64,
    },
    /// The checkpoint is none, whatever the layer is.
    #[error("no {compression} layer can be read from a checkpoint at byte {at} with {reason}")]
    Checkpoint {
        /// What the layer is said to be.
        compression: Compression,
        /// The checkpoint's offset in the blob.
        at: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The input failed before the compression was known, which says nothing about the layer; or
    /// there was no memory for a decompressor.
    #[error("starting to decompress the layer")]
    Source(#[source] io::Error),
}

impl CodecError {
    /// Returns the codec's part in an error of [`Decoder::read`].
    ///
    /// `None`: the input failed, which says nothing about the data and may pass on retry.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

impl From<CodecError> for io::Error {
    fn from(error: CodecError) -> Self {
        let kind = match &error {
            CodecError::Source(source) => source.kind(),
            CodecError::Truncated { .. } | CodecError::Empty => io::ErrorKind::UnexpectedEof,
            CodecError::Corrupt { .. } | CodecError::Checkpoint { .. } => {
                io::ErrorKind::InvalidData
            }
            CodecError::WindowTooLarge { .. } => io::ErrorKind::Unsupported,
        };
        Self::new(kind, error)
    }
}

/// What one step of a codec did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Progress {
    consumed: usize,
    produced: usize,
}

/// Why decompression cannot go on.
#[derive(Debug, Clone)]
enum Fault {
    Truncated,
    Corrupt(String),
    WindowTooLarge { max_bytes: u64 },
}

/// A decompressor without I/O.
trait Step {
    /// Turns some of `input` into some of `output`, which is not empty.
    ///
    /// An empty `input` asks for output that is still inside. Members and frames are always stopped
    /// at, the blocks inside as `stop` says.
    fn step(&mut self, input: &[u8], output: &mut [u8], stop: StopAt) -> Result<Progress, Fault>;

    /// Returns whether the input may end here.
    fn may_end(&self) -> bool;

    /// Returns what kind of boundary the last step stopped at, if at any.
    fn boundary(&self) -> Option<Boundary>;

    /// Copies the output before a [`Boundary::Block`] that what follows can refer to.
    fn window(&self, _window: &mut Vec<u8>) {}
}

/// A layer's uncompressed bytes.
pub struct Decoder<R> {
    input: Chain<Cursor<Vec<u8>>, R>,
    compression: Compression,
    steps: Box<dyn Step + Send>,
    /// Bytes of the blob consumed; those before a checkpoint count.
    at: u64,
    /// Bytes of the layer produced, likewise.
    layer_at: u64,
    /// Notes checkpoints, if it is to.
    picker: Option<Picker>,
    /// What was wrong with the data, once something was; `at` stays where it was found.
    failed: Option<Fault>,
}

impl<R: BufRead> Decoder<R> {
    /// Reads the blob's first bytes and prepares to decompress it.
    ///
    /// # Errors
    /// [`CodecError::Empty`]; [`CodecError::Source`] if the input fails.
    ///
    /// # Blocking
    /// As the input does.
    pub fn new(input: R) -> Result<Self, CodecError> {
        Self::start(input, None)
    }

    /// Likewise, and notes checkpoints on the way: the start, and for every multiple of
    /// `stride_bytes` of the layer one of the last places before it at which one can begin.
    ///
    /// There are fewer where the compressor wrote larger pieces: a zstd layer of one frame has only
    /// the start, and so has a gzip layer that zlib-ng or zlib-rs wrote in one block (level 1). Plain
    /// tar can be entered anywhere, which needs no list. [`Self::take_checkpoints`] after each read
    /// keeps no more than two windows in memory.
    ///
    /// # Errors
    /// As of [`Self::new`].
    ///
    /// # Panics
    /// If `stride_bytes` is 0.
    pub fn with_checkpoints(input: R, stride_bytes: u64) -> Result<Self, CodecError> {
        Self::start(input, Some(Picker::new(stride_bytes)))
    }

    fn start(mut input: R, picker: Option<Picker>) -> Result<Self, CodecError> {
        let first_bytes = read_magic(&mut input).map_err(CodecError::Source)?;
        if first_bytes.is_empty() {
            return Err(CodecError::Empty);
        }
        let compression = Compression::sniff(&first_bytes);
        let steps: Box<dyn Step + Send> = match (compression, &picker) {
            (Compression::Gzip, None) => Box::new(GzipSteps::new()),
            (Compression::Gzip, Some(_)) => {
                Box::new(GzipSteps::with_boundaries().map_err(CodecError::Source)?)
            }
            (Compression::Zstd, _) => Box::new(ZstdSteps::new().map_err(CodecError::Source)?),
            (Compression::None, _) => Box::new(PlainSteps),
        };
        Ok(Self {
            input: Cursor::new(first_bytes).chain(input),
            compression,
            steps,
            at: 0,
            layer_at: 0,
            picker,
            failed: None,
        })
    }

    /// Decompresses a layer from `checkpoint` on, where `input` begins.
    ///
    /// Reads to the end of the blob, so cut the input where no more is wanted. The checksum of a gzip
    /// member that is entered in the middle cannot be verified, and neither can the checkpoint: wrong
    /// ones give errors or wrong bytes, and the caller checks the bytes.
    ///
    /// # Errors
    /// [`CodecError::Checkpoint`]; [`CodecError::Source`] if there is no memory for a decompressor.
    pub fn resume(
        input: R,
        compression: Compression,
        checkpoint: &Checkpoint,
    ) -> Result<Self, CodecError> {
        let refused = |reason| CodecError::Checkpoint {
            compression,
            at: checkpoint.blob_offset,
            reason,
        };
        if 8 <= checkpoint.bit_offset {
            return Err(refused("a bit offset beyond 7"));
        }
        if WINDOW_BYTES < checkpoint.window.len() {
            return Err(refused("a window of more than 32 KiB"));
        }
        let steps: Box<dyn Step + Send> = match (compression, checkpoint.is_fresh()) {
            (Compression::Gzip, true) => Box::new(GzipSteps::new()),
            (Compression::Gzip, false) => {
                let steps = GzipSteps::enter(checkpoint.bit_offset, &checkpoint.window);
                Box::new(steps.map_err(CodecError::Source)?)
            }
            (Compression::Zstd, true) => Box::new(ZstdSteps::new().map_err(CodecError::Source)?),
            (Compression::None, true) => Box::new(PlainSteps),
            (Compression::Zstd | Compression::None, false) => {
                return Err(refused("a window or a bit offset"));
            }
        };
        Ok(Self {
            input: Cursor::new(Vec::new()).chain(input),
            compression,
            steps,
            at: checkpoint.blob_offset,
            layer_at: checkpoint.layer_offset,
            picker: None,
            failed: None,
        })
    }

    /// Takes the checkpoints noted since the last call, in order, each once; the start comes first.
    pub fn take_checkpoints(&mut self) -> Vec<Checkpoint> {
        self.picker.as_mut().map(Picker::take).unwrap_or_default()
    }

    /// Returns how the layer is compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Returns how many bytes of the blob have been consumed, those before a checkpoint included.
    pub fn compressed_offset(&self) -> u64 {
        self.at
    }

    /// Returns the input, of which four bytes have been read even if none is consumed.
    pub fn into_inner(self) -> R {
        self.input.into_inner().1
    }

    fn error(&self, fault: &Fault) -> io::Error {
        let (at, compression) = (self.at, self.compression);
        io::Error::from(match fault.clone() {
            Fault::Truncated => CodecError::Truncated { compression, at },
            Fault::Corrupt(reason) => CodecError::Corrupt {
                compression,
                at,
                reason,
            },
            Fault::WindowTooLarge { max_bytes } => CodecError::WindowTooLarge { at, max_bytes },
        })
    }
}

impl<R: BufRead> Read for Decoder<R> {
    /// Reads uncompressed bytes; returns 0 only at the end of the blob.
    ///
    /// # Errors
    /// Those of the input, unchanged, after which reading may go on; or a [`CodecError`], which
    /// every later call repeats.
    fn read(&mut self, output: &mut [u8]) -> io::Result<usize> {
        if let Some(fault) = &self.failed {
            return Err(self.error(fault));
        }
        if output.is_empty() {
            return Ok(0);
        }
        loop {
            let input = self.input.fill_buf()?;
            let at_end = input.is_empty();
            if at_end && self.steps.may_end() {
                return Ok(0);
            }
            let (stop, len) = match self
                .picker
                .as_ref()
                .map(|it| it.unwanted_bytes(self.layer_at))
            {
                None => (StopAt::End, output.len()),
                Some(0) => (StopAt::Blocks, output.len()),
                Some(len) => (StopAt::End, output.len().min(len)),
            };
            let outcome = self.steps.step(input, &mut output[..len], stop);
            if let Ok(Progress { consumed, produced }) = outcome {
                // A checkpoint's offsets may be any, and wrap; a blob does not.
                self.at = self.at.wrapping_add(consumed as u64);
                self.layer_at = self.layer_at.wrapping_add(produced as u64);
                if let Some(picker) = &mut self.picker {
                    let (offsets, boundary) = ((self.at, self.layer_at), self.steps.boundary());
                    let copy_window = |window: &mut Vec<u8>| self.steps.window(window);
                    picker.pass(&input[..consumed], offsets, boundary, copy_window);
                }
                self.input.consume(consumed);
            }
            let fault = match outcome {
                Ok(Progress { produced, .. }) if produced > 0 => return Ok(produced),
                Ok(_) if at_end => Fault::Truncated,
                Ok(_) => continue,
                Err(fault) => fault,
            };
            let error = self.error(&fault);
            self.failed = Some(fault);
            return Err(error);
        }
    }
}

impl<R> fmt::Debug for Decoder<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("compression", &self.compression)
            .field("at", &self.at)
            .field("failed", &self.failed)
            .finish_non_exhaustive()
    }
}

/// Copies: the codec of plain tar.
#[derive(Debug)]
struct PlainSteps;

impl Step for PlainSteps {
    fn step(&mut self, input: &[u8], output: &mut [u8], _: StopAt) -> Result<Progress, Fault> {
        let len = input.len().min(output.len());
        output[..len].copy_from_slice(&input[..len]);
        Ok(Progress {
            consumed: len,
            produced: len,
        })
    }

    fn may_end(&self) -> bool {
        true
    }

    fn boundary(&self) -> Option<Boundary> {
        None
    }
}

/// Reads as many bytes as a magic number has, fewer only at the end of the input.
fn read_magic(input: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut magic = Vec::with_capacity(MAGIC_BYTES);
    let limit = u64::try_from(MAGIC_BYTES).expect("four fits");
    // Retries when interrupted, and does not lose what came before a failure: the caller drops
    // the input then.
    input.take(limit).read_to_end(&mut magic)?;
    Ok(magic)
}
