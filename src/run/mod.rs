//! Puts the parts together for each run mode.
//!
//! The start has stages: logging, configuration (exit code 64 on a bad value, nothing bound yet),
//! parts, and only then work. `engine` is what all modes share: registry, cache, indexer.

mod agent;
mod budget;
mod cache;
mod controller;
mod counted;
mod engine;
mod in_process;
mod index;
mod mount;
mod mounter;
pub mod node;
mod opener;
mod own;
mod prewarm;
pub mod program;
mod references;
pub mod serve;
mod status;
mod warm;

use std::process::ExitCode;

use anyhow::Context;
use tracing::error;

use self::{
    node::NodeSettings,
    program::{LogSettings, become_program},
    serve::ServeSettings,
};
use crate::{
    cli::{CacheCommand, Cli, Command, Common, IndexCommand, LogFormat},
    config::Config,
    sys, telemetry,
};

/// Exit code of a bad command line or configuration (sysexits.h, `EX_USAGE`).
const EXIT_USAGE: u8 = 64;

/// Threads that wait for disks or decompress: two per decompression, some for the rest.
const MAX_BLOCKING_THREADS: usize = 16;

/// Stack of a blocking thread: the deepest user is zstd, with some tens of KiB.
const THREAD_STACK_BYTES: usize = 512 << 10;

/// A setting that cannot work, found when it was first used.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(super) struct BadConfig(Box<dyn std::error::Error + Send + Sync>);

impl BadConfig {
    pub(super) fn new(cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Box::new(cause))
    }
}

/// Runs what the command line says; what goes wrong is printed once, with its causes.
pub fn run(cli: Cli) -> ExitCode {
    if let Err(err) = start_logging(&cli) {
        return fail(&err, EXIT_USAGE);
    }
    let config = match read_config(&cli.common) {
        Ok(config) => config,
        Err(err) => return fail(&err, EXIT_USAGE),
    };
    sys::drop_code();
    match execute(cli, config) {
        Ok(code) => code,
        Err(err) => fail(&err, exit_code(&err)),
    }
}

fn exit_code(err: &anyhow::Error) -> u8 {
    if err.is::<BadConfig>() { EXIT_USAGE } else { 1 }
}

fn execute(cli: Cli, config: Config) -> anyhow::Result<ExitCode> {
    let log = LogSettings {
        is_json: cli.common.log_format == LogFormat::Json,
        level: log_level(&cli).to_owned(),
    };
    match cli.command {
        Command::Node(args) => {
            let settings = NodeSettings {
                log,
                run_dir: args.run.run_dir.clone(),
                endpoint: args.endpoint.clone(),
                node_id: args.node_id.clone(),
                driver_name: args.driver_name.clone(),
                state_dir: args.state_dir.clone(),
                registration_dir: args.registration_dir.clone(),
                node: config.node.clone(),
                read_ahead_kib: config.fuse.read_ahead_kib,
            };
            settings.check()?;
            if args.in_process {
                return in_runtime(in_process::run(args, settings, config));
            }
            if args.metrics_addr.is_some() || args.startup_taint.is_some() {
                let reason = "--metrics-addr and --startup-taint are for `clip-csi agent`, or for --in-process";
                return Err(BadConfig::new(std::io::Error::other(reason)).into());
            }
            Err(become_program("clip-csi-node", &settings))
        }
        Command::Agent(args) => in_runtime(agent::run(args, config)),
        Command::Controller(args) => in_runtime(controller::run(args)),
        Command::PrewarmController(args) => in_runtime(prewarm::control(args, config)),
        Command::Serve(args) => {
            let settings = ServeSettings {
                log,
                run_dir: args.run.run_dir,
                cache_dir: config.cache.dir,
                read_threads: config.fuse.read_threads,
                threads_per_mount: config.fuse.threads_per_mount,
                is_child: false,
            };
            Err(become_program("clip-csi-serve", &settings))
        }
        Command::Own(args) => own::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Mount(args) if args.foreground => in_runtime(mount::serve(args, config)),
        Command::Mount(args) => mount::in_background(&args),
        Command::Unmount { dir } => mount::unmount(&dir),
        Command::Warm(args) => in_runtime(warm::run(args, config)),
        Command::Index(IndexCommand::Build { image, output }) => {
            in_runtime(index::build(image, output, config))
        }
        Command::Index(IndexCommand::Push { image }) => in_runtime(index::push(image, config)),
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
    telemetry::init(format, log_level(cli).parse()?)?;
    Ok(())
}

/// A daemon tells what it does; a person wants to hear of trouble only.
fn log_level(cli: &Cli) -> &str {
    let quiet = match &cli.command {
        Command::Node(_)
        | Command::Agent(_)
        | Command::Serve(_)
        | Command::Controller(_)
        | Command::PrewarmController(_) => "info",
        _ => "warn",
    };
    cli.common.log_level.as_deref().unwrap_or(quiet)
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
