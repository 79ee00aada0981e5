//! Measures what checkpoints cost while a layer is inflated, and what they give.
//!
//! `cargo bench --bench codec [-- BLOB.gz]`: of a gzip layer, or else of 96 MB of this machine's
//! `/usr`. Samples are interleaved, and of processor time, so that a noisy neighbour hits all alike:
//! compare ratios.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program whose output is its result, and which may give up"
)]

use std::{
    env, fs,
    io::{self, Read, Write},
    path::Path,
    time::{Duration, Instant},
};

use clip_csi::{
    codec::{
        Compression, Decoder, Subject,
        access_map::{AccessMap, AccessMapWriter},
    },
    digest::{BlobDigest, DiffId},
};
use flate2::write::GzEncoder;

/// Two chunks.
const STRIDE_BYTES: u64 = 2 * 1_044_480;

/// What the pipeline reads at once.
const BUFFER_BYTES: usize = 256 << 10;

/// Of each measurement.
const N_SAMPLES: usize = 9;

/// Bytes of `/usr`, if no blob is given.
const SAMPLE_BYTES: usize = 96 << 20;

fn main() {
    // Cargo adds `--bench`.
    let path = env::args().skip(1).find(|it| !it.starts_with("--"));
    let blob = match path {
        Some(path) => fs::read(path).unwrap(),
        None => {
            let mut bytes = Vec::new();
            collect(Path::new("/usr"), &mut bytes);
            let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(&bytes).unwrap();
            encoder.finish().unwrap()
        }
    };
    let mut plain = Vec::new();
    let mut with_checkpoints = Vec::new();
    let mut with_map = Vec::new();
    for _ in 0..N_SAMPLES {
        plain.push(processor_time(|| {
            drain(&mut Decoder::new(&blob[..]).unwrap())
        }));
        with_checkpoints.push(processor_time(|| {
            drain(&mut Decoder::with_checkpoints(&blob[..], STRIDE_BYTES).unwrap());
        }));
        with_map.push(processor_time(|| drop(map(&blob))));
    }
    let layer_bytes = io::copy(&mut Decoder::new(&blob[..]).unwrap(), &mut io::sink()).unwrap();
    let mb = |bytes: usize| bytes as f64 / 1e6;
    println!(
        "{} MB of gzip, {} MB of layer, {N_SAMPLES} samples each",
        mb(blob.len()).round(),
        (layer_bytes as f64 / 1e6).round()
    );
    let (base, ..) = spread(&mut plain);
    for (what, samples) in [
        ("inflate", &mut plain),
        ("with checkpoints", &mut with_checkpoints),
        ("and their map", &mut with_map),
    ] {
        let (median, p90) = spread(samples);
        println!(
            "{what:20} median {:7.1} ms, p90 {:7.1} ms, {:5.3} of inflate, {:4.0} MB/s",
            median * 1e3,
            p90 * 1e3,
            median / base,
            layer_bytes as f64 / 1e6 / median
        );
    }

    let map = AccessMap::decode(map(&blob)).unwrap();
    let n_checkpoints = map.n_checkpoints();
    println!(
        "map                  {} bytes, {n_checkpoints} checkpoints, {:.0} bytes each, {:.3} % of the layer",
        map.as_bytes().len(),
        map.as_bytes().len() as f64 / f64::from(n_checkpoints),
        100.0 * map.as_bytes().len() as f64 / layer_bytes as f64
    );
    let mut resumes: Vec<_> = (0..N_SAMPLES)
        .flat_map(|_| 0..n_checkpoints)
        .map(|index| timed(|| resume(&blob, &map, index)))
        .collect();
    let (median, p90) = spread(&mut resumes);
    println!(
        "resume and inflate to the next checkpoint: p50 {:.2} ms, p90 {:.2} ms",
        median * 1e3,
        p90 * 1e3
    );
}

/// Appends files below `dir` until there are enough bytes.
fn collect(dir: &Path, bytes: &mut Vec<u8>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut paths: Vec<_> = entries.flatten().map(|it| it.path()).collect();
    paths.sort();
    for path in paths {
        if SAMPLE_BYTES <= bytes.len() {
            return;
        }
        match path.symlink_metadata() {
            Ok(it) if it.is_dir() => collect(&path, bytes),
            Ok(it) if it.is_file() && it.len() < 4 << 20 => {
                bytes.extend(fs::read(&path).unwrap_or_default());
            }
            _ => {}
        }
    }
}

/// Reads to the end as the pipeline does.
fn drain(decoder: &mut Decoder<&[u8]>) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while decoder.read(&mut buffer).unwrap() != 0 {
        drop(decoder.take_checkpoints());
    }
}

fn map(blob: &[u8]) -> Vec<u8> {
    let mut decoder = Decoder::with_checkpoints(blob, STRIDE_BYTES).unwrap();
    let mut writer = AccessMapWriter::new(Vec::new()).unwrap();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut layer_bytes = 0;
    loop {
        let read = decoder.read(&mut buffer).unwrap();
        for checkpoint in decoder.take_checkpoints() {
            writer.push(&checkpoint).unwrap();
        }
        layer_bytes += read as u64;
        if read == 0 {
            break;
        }
    }
    let subject = Subject {
        compression: Compression::Gzip,
        blob: BlobDigest::from_bytes([0; 32]),
        blob_bytes: blob.len() as u64,
        diff_id: DiffId::from_bytes([0; 32]),
        layer_bytes,
    };
    writer.finish(&subject).unwrap()
}

/// Inflates from one checkpoint to the next, windows from the map.
fn resume(blob: &[u8], map: &AccessMap<Vec<u8>>, index: u32) {
    let checkpoint = map.checkpoint(index).unwrap();
    let at = |offset: u64| usize::try_from(offset).unwrap();
    let piece = &blob[at(map.blob_offset(index))..at(map.blob_end(index))];
    let end = match index + 1 == map.n_checkpoints() {
        true => map.layer_bytes(),
        false => map.layer_offset(index + 1),
    };
    let decoder = Decoder::resume(piece, map.compression(), &checkpoint).unwrap();
    let mut input = decoder.take(end - checkpoint.layer_offset);
    io::copy(&mut input, &mut io::sink()).unwrap();
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// Processor time of a longer piece of work: others on the machine do not count.
fn processor_time(work: impl FnOnce()) -> Duration {
    let so_far = || {
        let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        let nanoseconds = stat.split(' ').next().unwrap().parse().unwrap();
        Duration::from_nanos(nanoseconds)
    };
    let start = so_far();
    work();
    so_far() - start
}

/// Median and p90, in seconds.
fn spread(samples: &mut [Duration]) -> (f64, f64) {
    samples.sort_unstable();
    let at = |percent: usize| samples[(samples.len() - 1) * percent / 100].as_secs_f64();
    (at(50), at(90))
}
