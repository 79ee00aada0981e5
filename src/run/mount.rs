//! `clip-csi mount` and `clip-csi unmount`: for a person, without Kubernetes.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use rustix::mount::UnmountFlags;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    engine::{Engine, Wanted},
    mounter::InProcess,
};
use crate::{
    cli::MountArgs, config::Config, fuse::session::FS_TYPE, metrics::Metrics, mount::MountInfo,
};

/// What the serving process says on its standard output once the mount is up.
const READY: &str = "mounted";

/// Mounts the image and serves it until it is unmounted, or until a signal asks for the end.
pub(super) async fn serve(args: MountArgs, mut config: Config) -> anyhow::Result<ExitCode> {
    let dir = args
        .dir
        .canonicalize()
        .with_context(|| format!("directory {}", args.dir.display()))?;
    let mut wanted = Wanted::from_args(&args.image, &mut config)?;
    if let Some(text) = &args.index_digest {
        wanted.index_digest = Some(text.parse().context("--index-digest")?);
        // Who names it vouches for it, and the cache is theirs.
        config.registry.trust_pinned_indexes = true;
    }
    let prefetch = args.prefetch.as_deref().map(str::parse).transpose();
    let prefetch = prefetch.context("--prefetch")?;
    let engine = Engine::start(&config, Metrics::new())?;
    let (resolved, opened) = engine.open(&wanted).await?;
    let image = engine
        .store
        .use_image(resolved.manifest, &opened.layers, prefetch);
    let mounter = InProcess::new(engine, config.fuse.clone())?;
    let fs = mounter.file_system(opened)?;
    let mount = Arc::new(mounter.serve(&fs, &dir)?);
    let mut out = io::stdout().lock();
    // Nobody may be listening, which is no reason to unmount.
    let _ = writeln!(out, "{READY} {} at {}", wanted.image, dir.display());
    let _ = out.flush();
    drop(out);
    let ended = {
        let mount = Arc::clone(&mount);
        tokio::task::spawn_blocking(move || mount.wait())
    };
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    tokio::select! {
        ended = ended => ended.context("waiting for the mount's end")??,
        _ = terminate.recv() => detach(&dir)?,
        _ = interrupt.recv() => detach(&dir)?,
    }
    drop(image);
    let drain = Duration::from_secs(config.node.drain_seconds);
    mounter.engine().stop(drain).await;
    Ok(ExitCode::SUCCESS)
}

/// Starts a process that serves the mount, and returns when the mount is up.
pub(super) fn in_background(args: &MountArgs) -> anyhow::Result<ExitCode> {
    if is_ours(&args.dir)? {
        bail!(
            "{} is mounted already: unmount it first",
            args.dir.display()
        );
    }
    let mut child = Command::new("/proc/self/exe")
        .arg0("clip-csi")
        .args(std::env::args_os().skip(1))
        .arg("--foreground")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // Not in the shell's foreground group: Ctrl-C there is not for the mount.
        .process_group(0)
        .spawn()
        .context("starting the process that serves the mount")?;
    // What it says until the mount is up is for the person; after that nobody listens, which a log
    // survives. Who wants to listen runs it with --foreground.
    let errors = child.stderr.take().map(|mut it| {
        thread::spawn(move || {
            let mut text = String::new();
            // Broken text is no reason to hide what went wrong.
            let _ = it.read_to_string(&mut text);
            text
        })
    });
    let mut line = String::new();
    if let Some(out) = child.stdout.take() {
        BufReader::new(out)
            .read_line(&mut line)
            .context("waiting for the mount")?;
    }
    if line.starts_with(READY) {
        writeln!(io::stdout(), "{}", line.trim_end())?;
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait().context("waiting for the mount")?;
    if let Some(text) = errors.and_then(|it| it.join().ok()) {
        eprint!("{text}");
    }
    let code = status
        .code()
        .and_then(|it| u8::try_from(it).ok())
        .filter(|it| *it != 0);
    Ok(ExitCode::from(code.unwrap_or(1)))
}

/// Unmounts what `mount` mounted; the process that serves it then ends by itself.
pub(super) fn unmount(dir: &Path) -> anyhow::Result<ExitCode> {
    if !is_ours(dir)? {
        bail!("{} is not mounted by clip-csi", dir.display());
    }
    detach(dir)?;
    Ok(ExitCode::SUCCESS)
}

/// Whether the topmost mount at `dir` is one of ours. Never touches the mount: it may be dead.
fn is_ours(dir: &Path) -> anyhow::Result<bool> {
    // The parent can be resolved without touching the mount.
    let name = dir
        .file_name()
        .with_context(|| format!("{} has no name", dir.display()))?;
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let parent = parent
        .canonicalize()
        .with_context(|| format!("directory {}", parent.display()))?;
    let mounts = MountInfo::read().context("reading /proc/self/mountinfo")?;
    let topmost = mounts
        .at(&parent.join(name))
        .last()
        .map(|it| it.fs_type == FS_TYPE);
    Ok(topmost.unwrap_or(false))
}

fn detach(dir: &Path) -> anyhow::Result<()> {
    rustix::mount::unmount(dir, UnmountFlags::DETACH)
        .with_context(|| format!("unmounting {}", dir.display()))
}
