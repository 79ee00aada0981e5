//! Puts the parts together for each run mode.
//!
//! The start has stages: logging, configuration (exit code 64 on a bad value, nothing bound yet),
//! parts, and only then work. `engine` is what all modes share: registry, cache, indexer.

mod agent;
mod cache;
mod counted;
mod engine;
mod index;
mod mount;
mod mounter;
mod node;
mod opener;
mod own;
mod serve;
mod status;

use std::process::ExitCode;

use anyhow::Context;
use tracing::error;

use engine::BadConfig;

use crate::{
    cli::{CacheCommand, Cli, Command, Common, IndexCommand, LogFormat},
    config::Config,
    telemetry,
};

/// Exit code of a bad command line or configuration (sysexits.h, `EX_USAGE`).
const EXIT_USAGE: u8 = 64;

/// Threads that wait for disks or decompress: two per decompression, some for the rest.
const MAX_BLOCKING_THREADS: usize = 16;

/// Stack of a blocking thread: the deepest user is zstd, with some tens of KiB.
const THREAD_STACK_BYTES: usize = 512 << 10;

/// Runs what the command line says; what goes wrong is printed once, with its causes.
pub fn run(cli: Cli) -> ExitCode {
    if let Err(err) = start_logging(&cli) {
        return fail(&err, EXIT_USAGE);
    }
    let config = match read_config(&cli.common) {
        Ok(config) => config,
        Err(err) => return fail(&err, EXIT_USAGE),
    };
    match execute(cli, config) {
        Ok(code) => code,
        Err(err) if err.is::<BadConfig>() => fail(&err, EXIT_USAGE),
        Err(err) => fail(&err, 1),
    }
}

fn execute(cli: Cli, config: Config) -> anyhow::Result<ExitCode> {
    match cli.command {
        Command::Node(args) => in_runtime(node::run(args, config)),
        Command::Agent(args) => in_runtime(agent::run(args, config)),
        Command::Serve(args) => serve::run(&args, &config),
        Command::Own(args) => own::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Mount(args) if args.foreground => in_runtime(mount::serve(args, config)),
        Command::Mount(args) => mount::in_background(&args),
        Command::Unmount { dir } => mount::unmount(&dir),
        Command::Index(IndexCommand::Build { image, output }) => {
            in_runtime(index::build(image, output, config))
        }
        Command::Index(IndexCommand::Inspect { file, tree }) => index::inspect(&file, tree),
        Command::Cache(CacheCommand::Ls) => cache::list(&config.cache),
        Command::Cache(CacheCommand::Verify) => cache::verify(&config.cache),
        Command::Cache(CacheCommand::Rm { layers, all }) => {
            cache::remove(&config.cache, &layers, all)
        }
    }
}

/// Runs `work` on one thread: the work is I/O, and what is not has threads of its own.
fn in_runtime(work: impl Future<Output = anyhow::Result<ExitCode>>) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .thread_stack_size(THREAD_STACK_BYTES)
        .build()
        .context("starting the runtime")?;
    runtime.block_on(work)
}

fn start_logging(cli: &Cli) -> anyhow::Result<()> {
    let format = match cli.common.log_format {
        LogFormat::Text => telemetry::LogFormat::Text,
        LogFormat::Json => telemetry::LogFormat::Json,
    };
    // A daemon tells what it does; a person wants to hear of trouble only.
    let quiet = match &cli.command {
        Command::Node(_) | Command::Agent(_) | Command::Serve(_) => "info",
        _ => "warn",
    };
    let level = cli.common.log_level.as_deref().unwrap_or(quiet);
    telemetry::init(format, level.parse()?)?;
    Ok(())
}

fn read_config(common: &Common) -> anyhow::Result<Config> {
    let mut config = match &common.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    if let Some(dir) = &common.cache_dir {
        config.cache.dir.clone_from(dir);
    }
    Ok(config)
}

fn fail(err: &anyhow::Error, code: u8) -> ExitCode {
    error!(error = format!("{err:#}"), "clip-csi ends");
    eprintln!("clip-csi: {err:#}");
    ExitCode::from(code)
}
