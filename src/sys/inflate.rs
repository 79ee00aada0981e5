//! Inflates with what flate2 does not offer: it stops between deflate blocks, and starts there.
//!
//! The same zlib-rs as behind flate2, by its zlib interface, of which no symbol is exported.
//!
//! # References
//! zlib's manual (zlib.h): `inflate` for `data_type`, `inflatePrime`, `inflateSetDictionary`.

use std::{
    ffi::{CStr, c_int, c_uint},
    fmt, io, ptr,
};

use libz_rs_sys::{
    Z_BLOCK, Z_BUF_ERROR, Z_NO_FLUSH, Z_OK, Z_STREAM_END, inflate, inflateEnd,
    inflateGetDictionary, inflateInit2_, inflatePrime, inflateReset2, inflateSetDictionary,
    z_stream, zlibVersion,
};

/// How far back deflate can refer (RFC 1951, section 2): what a start between blocks needs.
pub const WINDOW_BYTES: usize = 32 << 10;

/// What is around the deflate data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrapping {
    /// A gzip member: header and trailer are read, CRC-32 and ISIZE verified.
    Gzip,
    /// Nothing.
    Raw,
}

impl Wrapping {
    /// zlib's `windowBits` for deflate's one window size.
    fn window_bits(self) -> c_int {
        match self {
            Self::Gzip => 15 + 16,
            Self::Raw => -15,
        }
    }
}

/// Where [`Inflater::inflate`] stops before it runs out of input or output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopAt {
    /// At the end of the data.
    End,
    /// There, and after each block.
    Blocks,
}

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inflated {
    /// Bytes of input used up.
    pub consumed: usize,
    /// Bytes of output written.
    pub produced: usize,
    /// Whether the data has ended, its trailer included.
    pub ended: bool,
}

/// An inflater that knows the blocks.
pub struct Inflater {
    /// Boxed, because zlib's contract lets the library remember the address.
    stream: Box<z_stream>,
}

// SAFETY: the stream owns what it points to, between calls none of it is anybody else's, and the
// library's allocator (Rust's global one) frees on any thread.
unsafe impl Send for Inflater {}

impl Inflater {
    /// Makes an inflater.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(wrapping: Wrapping) -> io::Result<Self> {
        let mut stream = Box::new(z_stream::default());
        let size = c_int::try_from(size_of::<z_stream>()).map_err(io::Error::other)?;
        // SAFETY: `stream` is valid, with the library's own allocator in it; the version is a
        // static string.
        let code = unsafe {
            inflateInit2_(
                &raw mut *stream,
                wrapping.window_bits(),
                zlibVersion(),
                size,
            )
        };
        match code {
            Z_OK => Ok(Self { stream }),
            _ => Err(io::ErrorKind::OutOfMemory.into()),
        }
    }

    /// Forgets all, and expects `wrapping` next.
    pub fn reset(&mut self, wrapping: Wrapping) {
        // SAFETY: `stream` was initialized in `new`.
        let code = unsafe { inflateReset2(&raw mut *self.stream, wrapping.window_bits()) };
        debug_assert_eq!(code, Z_OK, "the window's size is valid");
    }

    /// Turns some of `input` into some of `output`.
    ///
    /// Every call copies its last 32 KiB of output: to stop at all blocks of usual size costs 8 %.
    ///
    /// # Errors
    /// What is wrong with the data.
    pub fn inflate(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        stop: StopAt,
    ) -> Result<Inflated, String> {
        let n_in = c_uint::try_from(input.len()).unwrap_or(c_uint::MAX);
        let n_out = c_uint::try_from(output.len()).unwrap_or(c_uint::MAX);
        let stream = &mut *self.stream;
        (stream.next_in, stream.avail_in) = (input.as_ptr(), n_in);
        (stream.next_out, stream.avail_out) = (output.as_mut_ptr(), n_out);
        let flush = match stop {
            StopAt::End => Z_NO_FLUSH,
            StopAt::Blocks => Z_BLOCK,
        };
        // SAFETY: `stream` was initialized in `new`; both pointers are to slices that are borrowed
        // for the call, of at least the lengths given.
        let code = unsafe { inflate(stream, flush) };
        let inflated = Inflated {
            consumed: (n_in - stream.avail_in) as usize,
            produced: (n_out - stream.avail_out) as usize,
            ended: code == Z_STREAM_END,
        };
        (stream.next_in, stream.avail_in) = (ptr::null(), 0);
        (stream.next_out, stream.avail_out) = (ptr::null_mut(), 0);
        match code {
            // No progress is no error: the caller has more input, or more room.
            Z_OK | Z_STREAM_END | Z_BUF_ERROR => Ok(inflated),
            _ => Err(self.message()),
        }
    }

    /// How many high bits of the last byte consumed belong to the next block, if the last call
    /// stopped between two blocks.
    pub fn unused_bits_at_block(&self) -> Option<u8> {
        const UNUSED_BITS: c_int = 0b111;
        const MORE_UNUSED_BITS: c_int = 0b11_1000;
        const AFTER_LAST_BLOCK: c_int = 64;
        const AT_BLOCK: c_int = 128;
        let state = self.stream.data_type;
        let between = state & AT_BLOCK != 0 && state & (AFTER_LAST_BLOCK | MORE_UNUSED_BITS) == 0;
        between.then(|| u8::try_from(state & UNUSED_BITS).expect("three bits"))
    }

    /// Copies the output that the next block can refer to into `window`: up to [`WINDOW_BYTES`],
    /// none of other members.
    pub fn window(&self, window: &mut Vec<u8>) {
        window.resize(WINDOW_BYTES, 0);
        let mut len: c_uint = 0;
        // SAFETY: `stream` was initialized in `new`; the buffer holds the largest window.
        let code = unsafe {
            inflateGetDictionary(&raw const *self.stream, window.as_mut_ptr(), &raw mut len)
        };
        debug_assert_eq!(code, Z_OK, "the stream is initialized");
        window.truncate(len as usize);
    }

    /// Makes `window` what precedes; of raw data only, and before the first call.
    ///
    /// # Panics
    /// If it is longer than [`WINDOW_BYTES`].
    pub fn set_window(&mut self, window: &[u8]) {
        assert!(window.len() <= WINDOW_BYTES, "a window of {}", window.len());
        let len = c_uint::try_from(window.len()).expect("32 KiB fit");
        // SAFETY: `stream` was initialized in `new`; the slice is copied from during the call only.
        let code = unsafe { inflateSetDictionary(&raw mut *self.stream, window.as_ptr(), len) };
        debug_assert_eq!(code, Z_OK, "raw data takes any dictionary");
    }

    /// Puts the low `n_bits` of `bits` before the input; of raw data only, before the first call.
    ///
    /// # Panics
    /// If they are more than 7.
    pub fn prime(&mut self, n_bits: u8, bits: u8) {
        assert!(n_bits < 8, "{n_bits} bits");
        // SAFETY: `stream` was initialized in `new`.
        let code = unsafe { inflatePrime(&raw mut *self.stream, n_bits.into(), bits.into()) };
        debug_assert_eq!(code, Z_OK, "a few bits fit");
    }

    fn message(&self) -> String {
        if self.stream.msg.is_null() {
            return "bad data".to_owned();
        }
        // SAFETY: what the library sets is a static string that ends with a zero.
        let message = unsafe { CStr::from_ptr(self.stream.msg) };
        message.to_string_lossy().into_owned()
    }
}

impl Drop for Inflater {
    fn drop(&mut self) {
        // SAFETY: `stream` was initialized in `new`, and is not used again.
        unsafe {
            inflateEnd(&raw mut *self.stream);
        }
    }
}

impl fmt::Debug for Inflater {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inflater").finish_non_exhaustive()
    }
}
