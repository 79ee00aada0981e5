//! Runs the fuzz target's body on mutated archives of real tools, for a moment, on stable.
//!
//! `cargo +nightly fuzz run tar` in `fuzz/` goes on from here; see `fuzz/README.md`.

#[path = "../../fuzz/fuzz_targets/tar_body.rs"]
mod tar_body;

use std::{fs::File, io::Write, process::Command};

use crate::{tar::compare_with_go, tar_tools::skipped};

/// xorshift64*: repeatable, and good enough to choose bytes.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let limit = u64::try_from(limit).expect("a length");
        let value = (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 20) % limit;
        usize::try_from(value).expect("below the limit")
    }
}

/// Archives a sparse file, a directory, a link with long names, and a link on a file's way, by GNU tar, in a new
/// directory.
const SCRIPT: &str = "set -e; mkdir \"$1\"; cd \"$1\"; mkdir d; cd d; shift; \
    truncate -s 200k s; for at in 1 5 9 13 17 21 25; do \
        dd if=/dev/zero bs=4k count=1 status=none | tr '\\0' x | \
            dd of=s bs=4k seek=$at conv=notrunc status=none; done; \
    echo text > $(printf n%.0s $(seq 150)); ln -s $(printf t%.0s $(seq 150)) l; touch -d 1960-01-01 e; \
    ln -s d/./../d ../via; cd ..; tar -cS -b 1 \"$@\" d via via/e";

/// The shell's exit code for it.
const COMMAND_NOT_FOUND: i32 = 127;

#[test]
fn mutated_archives_of_gnu_tar_are_survived() {
    let seed: u64 = 0x5eed_0123_4567_89ab;
    eprintln!("seed {seed:#x}");
    let mut random = Random(seed);
    let dir = tempfile::tempdir().expect("a directory");
    let mut accepted = Vec::new();
    for args in [
        "--format=gnu",
        "--format=pax --sparse-version=0.0",
        "--format=pax --sparse-version=0.1",
        "--format=pax --sparse-version=1.0",
    ] {
        let mut command = Command::new("bash");
        let output = command
            .args(["-c", SCRIPT, "bash"])
            .arg(dir.path().join(args))
            .args(args.split(' '))
            .output();
        let output = match output {
            Err(error) => return skipped("mutated archives", &error.to_string()),
            Ok(output) if output.status.code() == Some(COMMAND_NOT_FOUND) => {
                return skipped("mutated archives", "no GNU tar");
            }
            Ok(output) => output,
        };
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args}: {complaint}");
        let archive = &output.stdout;
        assert_eq!(tar_body::run(archive), Some(7), "{args}");
        for n in 0..2500 {
            let mutant = mutate(archive, &mut random);
            if tar_body::run(&mutant).is_some() && n % 4 == 0 {
                let path = dir.path().join(format!("{}-{n}.tar", accepted.len()));
                let mut file = File::create(&path).expect("a file");
                file.write_all(&mutant).expect("space");
                accepted.push(path);
            }
        }
    }
    // What is accepted means the same to the container runtimes, if they accept it: Go refuses
    // more, such as bad numbers in fields that nobody uses.
    assert!(100 < accepted.len(), "{}", accepted.len());
    let n_refused = compare_with_go(dir.path(), &accepted);
    assert!(3 * n_refused < accepted.len(), "{n_refused}");
}

/// Changes some bytes, mostly of headers, and repairs the checksums of those.
fn mutate(archive: &[u8], random: &mut Random) -> Vec<u8> {
    let mut archive = archive.to_vec();
    let headers: Vec<usize> = (0..archive.len() / 512)
        .map(|block| block * 512)
        .filter(|at| archive[at + 257..].starts_with(b"ustar"))
        .collect();
    for _ in 0..=random.below(6) {
        let header = headers[random.below(headers.len())];
        // A block further may be a sparse map or PAX records.
        let at = header + random.below(1024).min(archive.len() - header - 1);
        archive[at] = match random.below(4) {
            0 => b"\0\x80\xff 079xgLKS=\n,"[random.below(15)],
            1 => archive[at].wrapping_add(1),
            2 => b'0' + u8::try_from(random.below(10)).expect("a digit"),
            _ => u8::try_from(random.below(256)).expect("a byte"),
        };
    }
    for header in headers {
        tar_body::seal(&mut archive[header..header + 512]);
    }
    let len = archive.len();
    match random.below(8) {
        0 => archive.truncate(random.below(len)),
        1 => archive.rotate_left(512 * random.below(len / 512)),
        _ => {}
    }
    archive
}
