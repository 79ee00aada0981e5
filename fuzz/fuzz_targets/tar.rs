//! Fuzzes the tar parser: `cargo +nightly fuzz run tar`.

#![no_main]

mod tar_body;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // As it is, and with the checksums that a fuzzer can hardly find by itself.
    tar_body::run(bytes);
    let mut sealed = bytes.to_vec();
    for block in sealed.chunks_exact_mut(512) {
        if block[257..].starts_with(b"ustar") {
            tar_body::seal(block);
        }
    }
    tar_body::run(&sealed);
});
