//! Decompresses an index that was pushed, piece by piece: no I/O, and the input is hostile.

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// log2 of the largest zstd window that is taken: 8 MiB, as for layers. It is memory while an index is read;
/// what this release pushes wants [`PUSHED_WINDOW_LOG`](super::push::PUSHED_WINDOW_LOG).
const MAX_WINDOW_LOG: u32 = 23;

/// Bytes that come out at once.
const BUFFER_BYTES: usize = 32 << 10;

/// An index being decompressed.
pub(super) struct Unpack {
    /// Made with the first bytes, because it is some hundred KiB.
    decoder: Option<Decoder<'static>>,
    buffer: Vec<u8>,
    /// Whether what came so far ends with a whole frame.
    between_frames: bool,
    /// Whether the buffer was filled to its end, in the middle of a frame: there may be more without more input.
    has_more: bool,
    max_bytes: u64,
    left_bytes: u64,
}

impl Unpack {
    /// One of at most `max_bytes`, decompressed.
    pub(super) fn new(max_bytes: u64) -> Self {
        Self {
            decoder: None,
            buffer: Vec::new(),
            between_frames: false,
            has_more: false,
            max_bytes,
            left_bytes: max_bytes,
        }
    }

    /// Takes from `input` and returns what comes next, `None` if more is needed for that.
    ///
    /// # Errors
    /// What is wrong with it, to be said behind its name.
    pub(super) fn next(&mut self, input: &mut &[u8]) -> Result<Option<&[u8]>, String> {
        let broken = |error: std::io::Error| format!("cannot be decompressed: {error}");
        if self.decoder.is_none() {
            let mut decoder = Decoder::new().map_err(broken)?;
            let window = DParameter::WindowLogMax(MAX_WINDOW_LOG);
            decoder.set_parameter(window).map_err(broken)?;
            self.buffer = vec![0; BUFFER_BYTES];
            self.decoder = Some(decoder);
        }
        let Some(decoder) = &mut self.decoder else {
            return Ok(None);
        };
        let mut produced = 0;
        while produced == 0 && (!input.is_empty() || self.has_more) {
            let mut from = InBuffer::around(input);
            let mut to = OutBuffer::around(&mut self.buffer[..]);
            let hint = decoder.run(&mut from, &mut to).map_err(broken)?;
            let consumed = from.pos();
            produced = to.pos();
            *input = &input[consumed..];
            self.between_frames = hint == 0;
            self.has_more = produced == BUFFER_BYTES && hint != 0;
        }
        let n_bytes = u64::try_from(produced).unwrap_or(u64::MAX);
        let left_bytes = self.left_bytes.checked_sub(n_bytes);
        self.left_bytes = left_bytes.ok_or_else(|| {
            let max_bytes = self.max_bytes;
            format!("is longer than cache.max_layer_index_bytes = {max_bytes}")
        })?;
        Ok((0 < produced).then_some(&self.buffer[..produced]))
    }

    /// Hears that no more comes.
    ///
    /// # Errors
    /// If there should be more.
    pub(super) fn finish(self) -> Result<(), String> {
        match self.between_frames {
            true => Ok(()),
            false => Err("cannot be decompressed: it ends too early".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decompresses what comes in pieces of `n`.
    fn unpacked(packed: &[u8], n: usize, max_bytes: u64) -> Result<Vec<u8>, String> {
        let (mut unpack, mut out) = (Unpack::new(max_bytes), Vec::new());
        for mut piece in packed.chunks(n) {
            while let Some(bytes) = unpack.next(&mut piece)? {
                out.extend(bytes);
            }
            assert!(piece.is_empty());
        }
        unpack.finish()?;
        Ok(out)
    }

    #[test]
    fn it_may_come_in_pieces_of_any_size_and_in_frames() {
        let mut plain = vec![7; 1 << 20];
        plain.extend((0..99_999_u32).flat_map(u32::to_le_bytes));
        let (first, second) = plain.split_at(777_777);
        let frames = [first, second].map(|it| zstd::bulk::compress(it, 3).unwrap());
        for n in [1, 7, 4096, usize::MAX] {
            let len = plain.len() as u64;
            assert_eq!(unpacked(&frames.concat(), n, len).unwrap(), plain, "{n}");
        }
    }

    #[test]
    fn a_bomb_is_refused_and_what_is_broken_told() {
        let plain = vec![7; 1 << 20];
        let packed = zstd::bulk::compress(&plain, 3).unwrap();
        assert_eq!(unpacked(&packed, 100, 1 << 20).unwrap(), plain);
        let error = unpacked(&packed, 100, (1 << 20) - 1).unwrap_err();
        assert_eq!(
            error,
            "is longer than cache.max_layer_index_bytes = 1048575"
        );
        for broken in [
            &packed[..packed.len() - 1],
            &b"no zstd"[..],
            &packed[1..],
            b"",
        ] {
            let error = unpacked(broken, 100, 1 << 20).unwrap_err();
            assert!(error.starts_with("cannot be decompressed"), "{error}");
        }
    }
}
