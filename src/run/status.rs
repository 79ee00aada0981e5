//! `clip-csi status`: whether a process of this node answers, for a probe.

use std::process::ExitCode;

use anyhow::bail;

use crate::{
    cli::{StatusArgs, StatusRole},
    ipc::RunDir,
    roles::status,
};

/// Asks; fails if there is no answer.
pub(super) fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let run_dir = RunDir::new(&args.run.run_dir);
    let asked = match args.role {
        StatusRole::Node => status::of_node(&run_dir.node()),
        StatusRole::Serve => status::of_server(&run_dir.serve()),
    };
    match asked {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(err) => bail!("clip-csi {:?} does not answer: {err}", args.role),
    }
}
