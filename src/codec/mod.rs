//! Decompresses layers: gzip, zstd and plain tar, told apart by their first bytes.
//!
//! [`Decoder`] is a [`Read`] over a [`BufRead`]. It ends only where its input ends, so that a hash
//! beside the input has seen the whole blob. It holds no input of its own: give it a buffer of
//! 64 KiB.
//!
//! A failure of the input passes through unchanged; what is wrong with the data comes as an
//! [`io::Error`] around a [`CodecError`], see [`CodecError::of`]. Both codecs are pure state machines
//! (`Step`) that never see the input.

mod gzip;
mod zstd;

use std::{
    fmt,
    io::{self, BufRead, Chain, Cursor, Read},
};

use gzip::GzipSteps;
use zstd::ZstdSteps;

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
            CodecError::Corrupt { .. } => io::ErrorKind::InvalidData,
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
    /// An empty `input` asks for output that is still inside.
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress, Fault>;

    /// Returns whether the input may end here.
    fn may_end(&self) -> bool;
}

/// A layer's uncompressed bytes.
pub struct Decoder<R> {
    input: Chain<Cursor<Vec<u8>>, R>,
    compression: Compression,
    steps: Box<dyn Step + Send>,
    /// Bytes of the blob consumed.
    at: u64,
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
    pub fn new(mut input: R) -> Result<Self, CodecError> {
        let first_bytes = read_magic(&mut input).map_err(CodecError::Source)?;
        if first_bytes.is_empty() {
            return Err(CodecError::Empty);
        }
        let compression = Compression::sniff(&first_bytes);
        let steps: Box<dyn Step + Send> = match compression {
            Compression::Gzip => Box::new(GzipSteps::new()),
            Compression::Zstd => Box::new(ZstdSteps::new().map_err(CodecError::Source)?),
            Compression::None => Box::new(PlainSteps),
        };
        Ok(Self {
            input: Cursor::new(first_bytes).chain(input),
            compression,
            steps,
            at: 0,
            failed: None,
        })
    }

    /// Returns how the layer is compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Returns how many bytes of the blob have been consumed.
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
            let outcome = self.steps.step(input, output);
            let consumed = outcome.as_ref().map_or(0, |progress| progress.consumed);
            self.input.consume(consumed);
            self.at += u64::try_from(consumed).expect("a slice is not longer than 2^64 bytes");
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
    fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Progress, Fault> {
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
