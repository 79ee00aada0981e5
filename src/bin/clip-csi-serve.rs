//! The `clip-csi-serve` program, which serves the mounts of a node: `clip-csi serve` becomes it.

use std::process::ExitCode;

use clip_csi::run::{program, serve};

fn main() -> ExitCode {
    program::main(serve::run)
}
