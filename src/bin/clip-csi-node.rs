//! The `clip-csi-node` program, which serves CSI on a node: `clip-csi node` becomes it.

use std::process::ExitCode;

use clip_csi::run::{node, program};

fn main() -> ExitCode {
    program::main(node::run_with_others)
}
