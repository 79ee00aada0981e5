//! The `clip-csi` program.

use std::process::ExitCode;

use clap::Parser;
use clip_csi::{cli::Cli, run, sys};

fn main() -> ExitCode {
    sys::tune_allocator();
    let cli = Cli::parse();
    // Reading the command line runs a lot of code, once.
    sys::drop_code();
    run::run(cli)
}
