//! Inflates a layer's blob to nothing with the driver's own decoder, alone on one thread: what
//! `make bench` compares a cold layer with, because nothing that decompresses it can be faster.
//!
//! `cargo bench --bench inflate -- BLOB [UNTIL]` prints seconds, bytes of the blob and bytes of the
//! layer that were passed; with UNTIL it ends after as many bytes of the layer.

use std::{
    env,
    error::Error,
    fs::File,
    io::{self, BufReader, Read, Write},
    time::Instant,
};

use clip_csi::codec::Decoder;

/// As the driver's own fill gives to the decoder and takes from it.
const INPUT_BYTES: usize = 64 << 10;
const OUTPUT_BYTES: usize = 256 << 10;

fn main() -> Result<(), Box<dyn Error>> {
    // `cargo bench` adds an option of its own.
    let mut words = env::args().skip(1).filter(|it| !it.starts_with("--"));
    let Some(blob) = words.next() else {
        writeln!(
            io::stderr(),
            "inflate: nothing to measure: name a blob, and `make bench` does"
        )?;
        return Ok(());
    };
    let until = words.next().map_or(Ok(u64::MAX), |it| it.parse())?;

    let begin = Instant::now();
    let mut decoder = Decoder::new(BufReader::with_capacity(INPUT_BYTES, File::open(blob)?))?;
    let mut buffer = vec![0; OUTPUT_BYTES];
    let mut layer_bytes: u64 = 0;
    while layer_bytes < until {
        let n = decoder.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        layer_bytes += u64::try_from(n)?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    writeln!(
        io::stdout(),
        "{seconds} {} {layer_bytes}",
        decoder.compressed_offset()
    )?;
    Ok(())
}
