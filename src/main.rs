//! The `clip-csi` program.

use std::process::ExitCode;

use clap::Parser;
use clip_csi::{cli::Cli, run, sys};

fn main() -> ExitCode {
    sys::tune_allocator();
    run::run(Cli::parse())
}
