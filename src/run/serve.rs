//! `clip-csi serve`: serves the mounts of a node.
//!
//! A small parent starts the process that serves, and starts it again at once when it is killed:
//! kubelet would take a second, and after some times minutes. When a successor in another container
//! has taken the mounts over, the parent waits until that is gone.

use std::{
    io,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::PathBuf,
    process::{Child, Command, ExitCode},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use signal_hook::{
    consts::{SIGCHLD, SIGINT, SIGTERM},
    iterator::Signals,
};
use tracing::{info, warn};

use super::{
    BadConfig,
    program::{LogSettings, this_program},
};
use crate::{
    fuse::pool::{PoolConfig, ReadPool},
    ipc::RunDir,
    layer::disk::CachePaths,
    metrics::{Metrics, Role},
    roles::server::{self, HANDED_OVER, Server},
    sys,
};

/// Deaths within [`CALM`] after which the child is not started at once, but later each time.
const MAX_DEATHS: u32 = 5;

/// How long the parent remembers a death.
const CALM: Duration = Duration::from_secs(10);

/// How long it waits then: at first, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// How often the parent looks whether the successor is gone, and how long it leaves the mounts to a
/// new successor then.
const SUCCESSOR_POLL: Duration = Duration::from_millis(200);
const SUCCESSOR_GRACE: Duration = Duration::from_secs(2);

/// What the server is to do, as its own program is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServeSettings {
    pub(super) log: LogSettings,
    pub(super) run_dir: PathBuf,
    pub(super) cache_dir: PathBuf,
    pub(super) read_threads: usize,
    pub(super) threads_per_mount: usize,
    /// Whether this is the process that serves, or the one that watches over it.
    pub(super) is_child: bool,
}

/// Serves, or watches over who does.
///
/// # Errors
/// What keeps it from starting or going on.
pub fn run(settings: ServeSettings) -> anyhow::Result<ExitCode> {
    settings.log.start()?;
    sys::unix_sockets_only().context("giving up the network")?;
    if settings.is_child {
        return serve(&settings);
    }
    watch(settings)
}

fn serve(settings: &ServeSettings) -> anyhow::Result<ExitCode> {
    let run_dir = RunDir::new(&settings.run_dir);
    let metrics = Metrics::of(Role::Serve);
    let pool = ReadPool::new(PoolConfig {
        n_threads: settings.read_threads,
        ..PoolConfig::default()
    })?;
    let paths = CachePaths::new(&settings.cache_dir);
    let server = Server::start(paths, &run_dir, pool, metrics, settings.threads_per_mount)?;
    sys::drop_code();
    server.serve(&run_dir).map_err(BadConfig::new)?;
    Ok(ExitCode::SUCCESS)
}

/// Keeps a child that serves, until a signal asks for the end.
fn watch(mut settings: ServeSettings) -> anyhow::Result<ExitCode> {
    let run_dir = RunDir::new(&settings.run_dir);
    settings.is_child = true;
    let settings = serde_json::to_string(&settings)?;
    info!(version = env!("CARGO_PKG_VERSION"), "clip-csi serve starts");
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGCHLD]).context("listening for signals")?;
    let mut deaths: Vec<Instant> = Vec::new();
    loop {
        let mut child = start(&settings)?;
        sys::drop_code();
        let Some(status) = wait(&mut child, &mut signals)? else {
            info!("stopping: the mounts wait for the next server");
            return Ok(ExitCode::SUCCESS);
        };
        if status.code() == Some(HANDED_OVER) {
            info!("a successor serves the mounts, waiting until it is gone");
            if is_told_to_end_before_successor(&run_dir, &mut signals)? {
                return Ok(ExitCode::SUCCESS);
            }
            continue;
        }
        let Some(signal) = status.signal() else {
            bail!("the process that serves ended with {status}");
        };
        warn!(
            signal,
            "the process that serves was killed, starting it again"
        );
        deaths.retain(|it| it.elapsed() < CALM);
        deaths.push(Instant::now());
        let n_deaths = u32::try_from(deaths.len()).unwrap_or(u32::MAX);
        if let Some(n_more @ 1..) = n_deaths.checked_sub(MAX_DEATHS) {
            let factor = 2u32.saturating_pow(n_more - 1);
            thread::sleep(FIRST_PAUSE.saturating_mul(factor).min(MAX_PAUSE));
        }
    }
}

fn start(settings: &str) -> anyhow::Result<Child> {
    Command::new(this_program())
        .arg0("clip-csi-serve")
        .arg(settings)
        .spawn()
        .context("starting the process that serves")
}

/// Waits until the child has ended; `None` if it was told to end.
fn wait(child: &mut Child, signals: &mut Signals) -> io::Result<Option<std::process::ExitStatus>> {
    // It may have ended before anybody listened.
    if let Some(status) = child.try_wait()? {
        return Ok(Some(status));
    }
    for signal in signals.forever() {
        if signal != SIGCHLD {
            if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                kill_process(pid, Signal::TERM)?;
            }
            child.wait()?;
            return Ok(None);
        }
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
    }
    Ok(None)
}

/// Waits until no server lives any more, and nobody else has become one.
fn is_told_to_end_before_successor(run_dir: &RunDir, signals: &mut Signals) -> io::Result<bool> {
    let mut alone_since = None;
    loop {
        if signals.pending().any(|it| it != SIGCHLD) {
            return Ok(true);
        }
        if server::is_alive(run_dir)? {
            alone_since = None;
        } else if SUCCESSOR_GRACE < alone_since.get_or_insert_with(Instant::now).elapsed() {
            return Ok(false);
        }
        thread::sleep(SUCCESSOR_POLL);
    }
}
