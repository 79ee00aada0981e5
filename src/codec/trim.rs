//! Leaves of a window what is referred to: a tenth, as a rule.
//!
//! What follows is inflated twice, each time with a dictionary in the window's place in which every
//! byte tells half of its own position. Output that differs came from the window, and from where.

use std::io;

use crate::sys::inflate::{Inflater, StopAt, WINDOW_BYTES, Wrapping};

/// Returns `window` with zeros where nothing refers to, and without them at its start.
///
/// `tail` is the compressed data that follows, from the byte on that has `bit_offset` bits of what
/// precedes. `None`: it does not reach [`WINDOW_BYTES`] of output, behind which nothing can refer to
/// the window, nor the end of the data.
pub(super) fn trim(window: &[u8], bit_offset: u8, tail: &[u8]) -> Option<Vec<u8>> {
    // The highest bits are opposite, so that the two differ at every position.
    let low = |position: usize| position.to_le_bytes()[0];
    let high = |position: usize| position.to_le_bytes()[1] | !low(position) & 0x80;
    let lows: Vec<u8> = (0..window.len()).map(low).collect();
    let highs: Vec<u8> = (0..window.len()).map(high).collect();
    let lows = inflate(&lows, bit_offset, tail).ok()??;
    let highs = inflate(&highs, bit_offset, tail).ok()??;
    let mut trimmed = vec![0; window.len()];
    // One byte stays at least: without any it would be the start of a member.
    let mut start = window.len().checked_sub(1)?;
    for (low, high) in lows.into_iter().zip(highs) {
        if low != high {
            let position = usize::from(high & 0x7f) << 8 | usize::from(low);
            *trimmed.get_mut(position)? = *window.get(position)?;
            start = start.min(position);
        }
    }
    Some(trimmed.split_off(start))
}

/// Inflates up to [`WINDOW_BYTES`], or returns `None` if there are fewer in `tail`.
fn inflate(dictionary: &[u8], bit_offset: u8, mut tail: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut inflater = Inflater::new(Wrapping::Raw)?;
    inflater.set_window(dictionary);
    if let (1.., Some((first, rest))) = (bit_offset, tail.split_first()) {
        inflater.prime(8 - bit_offset, first >> bit_offset);
        tail = rest;
    }
    let mut output = vec![0; WINDOW_BYTES];
    let mut len = 0;
    while len < output.len() {
        let inflated = inflater
            .inflate(tail, &mut output[len..], StopAt::End)
            .map_err(io::Error::other)?;
        tail = &tail[inflated.consumed..];
        len += inflated.produced;
        if inflated.ended {
            output.truncate(len);
            break;
        }
        if inflated.consumed == 0 && inflated.produced == 0 {
            return Ok(None);
        }
    }
    Ok(Some(output))
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    /// Bytes in which no three follow each other twice.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let next = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_be_bytes()[0]
        };
        (0..len).map(next).collect()
    }

    /// Raw deflate data that may refer to `window`.
    fn deflate(window: &[u8], content: &[u8]) -> Vec<u8> {
        let mut compress = Compress::new(Compression::new(6), false);
        compress.set_dictionary(window).unwrap();
        let mut data = Vec::with_capacity(content.len() + 1000);
        compress
            .compress_vec(content, &mut data, FlushCompress::Finish)
            .unwrap();
        data
    }

    #[test]
    fn what_is_referred_to_stays() {
        let mut window = noise(WINDOW_BYTES);
        // A zero that is needed is no zero to drop.
        window[9000] = 0;
        let content = [&window[9000..9100], b"other", &window[20_000..20_300]].concat();
        let trimmed = trim(&window, 0, &deflate(&window, &content)).unwrap();
        assert_eq!(trimmed.len(), WINDOW_BYTES - 9000);
        let mut expected = vec![0; WINDOW_BYTES - 9000];
        expected[..100].copy_from_slice(&window[9000..9100]);
        expected[11_000..11_300].copy_from_slice(&window[20_000..20_300]);
        let differing = expected.iter().zip(&trimmed).filter(|(a, b)| a != b);
        // The literals between might have been found in the noise.
        assert!(differing.count() <= 5);
        let mut inflated = inflate(&trimmed, 0, &deflate(&window, &content));
        assert_eq!(inflated.as_mut().unwrap().take().unwrap(), content);
    }

    #[test]
    fn a_byte_stays_where_nothing_is_referred_to() {
        let window = noise(1000);
        let trimmed = trim(&window, 0, &deflate(b"unknown", &[7; 10])).unwrap();
        assert_eq!(trimmed, [0]);
    }

    #[test]
    fn what_is_too_short_or_damaged_trims_nothing() {
        let window = noise(WINDOW_BYTES);
        let data = deflate(&window, &[&window[100..5000], &noise(40_000)].concat());
        assert!(trim(&window, 0, &data).is_some());
        assert_eq!(trim(&window, 0, &data[..data.len() / 2]), None);
        assert_eq!(trim(&window, 0, b""), None);
        assert_eq!(trim(&window, 3, b""), None);
        assert_eq!(trim(&window, 0, &[0xff; 100]), None);
    }
}
