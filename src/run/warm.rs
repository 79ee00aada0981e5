//! `clip-csi warm`: for people, and for pipelines that push images.

use std::{
    convert::Infallible,
    io::{self, IsTerminal as _, Write},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;

use super::{
    BadConfig,
    engine::{Engine, Wanted},
    index,
};
use crate::{
    cli::{WarmArgs, WarmWhatArg},
    config::Config,
    metrics::Metrics,
    warm::{
        FillLimits, FillRequest, Filled, LocalCopy, Origin, Pace, Phase, SeedRequest, Seeded,
        WarmError, WarmProgress, WarmSnapshot, WarmWhat,
    },
};

/// Exit code of what may come right by itself (sysexits.h, `EX_TEMPFAIL`).
const EXIT_TRY_AGAIN: u8 = 75;

/// How long another node is waited for that makes a layer: its upload included, longer than most take.
const LEASE_WAIT_SECONDS: u64 = 600;

/// How often a terminal is shown how far it is, and how often a log.
const REDRAW: Duration = Duration::from_millis(200);
const TELL: Duration = Duration::from_secs(5);

/// Carriage return, and erase to the end of the line (ECMA-48, EL).
const WIPE: &str = "\r\x1b[K";

/// Cells of the bar.
const BAR_CELLS: u64 = 30;

/// Seeds the image, or fills the cache with it.
pub(super) async fn run(args: WarmArgs, mut config: Config) -> anyhow::Result<ExitCode> {
    let wanted = Wanted::from_args(&args.image, &mut config)?;
    let lease_wait = &mut config.remote.lease_wait_seconds;
    *lease_wait = LEASE_WAIT_SECONDS.max(*lease_wait);
    // What is pushed is made of the layers.
    config.registry.use_pushed_indexes &= !args.push_index;
    let mut engine = Engine::start(&config, Metrics::new())?;
    if args.push_index {
        engine.indexer.use_no_toc();
    }
    let progress = Arc::new(WarmProgress::default());
    let warming = async {
        match args.local {
            false => seed(&engine, &wanted, &args, &progress).await,
            true => fill(&engine, &wanted, &args, &progress).await,
        }
    };
    let warmed = tokio::select! {
        warmed = warming => warmed,
        never = show(&progress) => match never {},
    };
    let lines = match warmed {
        Ok(lines) => lines,
        Err(err @ WarmError::NoRemote) => return Err(BadConfig::new(err).into()),
        Err(err) => {
            let is_transient = err.is_transient();
            let reason = err.reason();
            let error =
                anyhow::Error::new(err).context(format!("{reason}: image {}", wanted.image));
            return match is_transient {
                true => Ok(super::fail(&error, EXIT_TRY_AGAIN)),
                false => Err(error),
            };
        }
    };
    let mut out = io::stdout();
    out.write_all(lines.as_bytes())?;
    if args.push_index {
        index::push_with(&engine, &wanted, &config).await?;
    }
    out.flush().context("writing what was done")?;
    let drain = Duration::from_secs(config.node.drain_seconds);
    engine.stop(drain).await;
    Ok(ExitCode::SUCCESS)
}

async fn seed(
    engine: &Engine,
    wanted: &Wanted,
    args: &WarmArgs,
    progress: &Arc<WarmProgress>,
) -> Result<String, WarmError> {
    let request = SeedRequest {
        image: wanted.image.clone(),
        platform: wanted.platform.clone(),
        requester: wanted.requester.clone(),
        what: what(args.what),
        // The cache is a person's, or has its bounds.
        local: LocalCopy::Keep,
        pace: Arc::new(Pace::new(args.bytes_per_second)),
    };
    let Seeded {
        manifest,
        n_layers,
        n_layers_present,
        layer_bytes,
        bytes_from_registry,
        bytes_to_remote,
        ..
    } = engine.warmer().seed(&request, progress).await?;
    let image = wanted.image.at_digest(manifest);
    Ok(format!(
        "image    {image}\n\
         layers   {n_layers}, of which {n_layers_present} were there, {layer_bytes} bytes\n\
         registry {bytes_from_registry} bytes\n\
         remote   {bytes_to_remote} bytes\n"
    ))
}

async fn fill(
    engine: &Engine,
    wanted: &Wanted,
    args: &WarmArgs,
    progress: &Arc<WarmProgress>,
) -> Result<String, WarmError> {
    let Wanted {
        image,
        platform,
        requester,
        ..
    } = wanted;
    let manifest = match (image.digest(), engine.store.remote()) {
        (Some(manifest), Some(_)) => manifest,
        (_, _) => {
            let resolved = engine.registry.resolve(image, platform, requester).await;
            resolved.map_err(WarmError::Registry)?.manifest
        }
    };
    let origin = match engine.store.remote() {
        Some(_) => Origin::Remote,
        None => Origin::Registry {
            image: image.clone(),
            platform: platform.clone(),
            requester: requester.clone(),
        },
    };
    let request = FillRequest {
        manifest,
        what: what(args.what),
        origin,
        limits: FillLimits {
            pace: Arc::new(Pace::new(args.bytes_per_second)),
            max_new_bytes: None,
            evict_unused_for: None,
        },
    };
    let Filled {
        n_layers,
        bytes_wanted,
        bytes_present,
        bytes_from_remote,
        bytes_from_registry,
    } = engine.warmer().fill(&request, progress).await?;
    let image = image.at_digest(manifest);
    Ok(format!(
        "image    {image}\n\
         layers   {n_layers}, {bytes_wanted} bytes wanted, of which {bytes_present} were there\n\
         registry {bytes_from_registry} bytes\n\
         remote   {bytes_from_remote} bytes\n"
    ))
}

fn what(arg: WarmWhatArg) -> WarmWhat {
    match arg {
        WarmWhatArg::Index => WarmWhat::Index,
        WarmWhatArg::Recorded => WarmWhat::Recorded,
        WarmWhatArg::All => WarmWhat::All,
    }
}

/// Shows on standard error how far it is, for ever: as a bar to a person, as lines to a log.
async fn show(progress: &WarmProgress) -> Infallible {
    let mut err = io::stderr();
    let is_terminal = err.is_terminal();
    let _wiped = is_terminal.then(WipeLine::default);
    loop {
        tokio::time::sleep(if is_terminal { REDRAW } else { TELL }).await;
        let at = progress.snapshot();
        // Who does not look is not told.
        let _ = match is_terminal {
            true => write!(err, "{WIPE}{} {}", bar(&at), line(&at)),
            false => writeln!(err, "{}", line(&at)),
        };
        let _ = err.flush();
    }
}

/// Leaves a terminal's line empty in the end.
#[derive(Debug, Default)]
struct WipeLine;

impl Drop for WipeLine {
    fn drop(&mut self) {
        // As above.
        let _ = write!(io::stderr(), "{WIPE}");
    }
}

fn bar(at: &WarmSnapshot) -> String {
    let cells = BAR_CELLS * at.bytes_done.min(at.bytes_total);
    let full = cells.checked_div(at.bytes_total).unwrap_or(0);
    let cells = (0..BAR_CELLS).map(|it| if it < full { '#' } else { '.' });
    format!("[{}]", cells.collect::<String>())
}

/// How far it is, in one line.
fn line(at: &WarmSnapshot) -> String {
    let doing = match at.phase {
        Phase::Resolving => "looking for what is missing",
        Phase::Moving => "fetching",
        Phase::Verifying => "checking that all is there",
        Phase::Done => "done",
    };
    let megabytes = |bytes: u64| bytes.div_ceil(1_000_000);
    match at.layers_total {
        0 => doing.to_owned(),
        _ => format!(
            "{doing}: {} of {} layers, {} of {} MB",
            at.layers_done,
            at.layers_total,
            megabytes(at.bytes_done),
            megabytes(at.bytes_total)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_a_line_and_a_bar() {
        let mut at = WarmSnapshot {
            phase: Phase::Resolving,
            layers_total: 0,
            layers_done: 0,
            bytes_total: 0,
            bytes_done: 0,
        };
        assert_eq!(line(&at), "looking for what is missing");
        assert_eq!(bar(&at), format!("[{}]", ".".repeat(30)));
        at.phase = Phase::Moving;
        (at.layers_done, at.layers_total) = (1, 3);
        (at.bytes_done, at.bytes_total) = (10_000_000, 30_000_000);
        assert_eq!(line(&at), "fetching: 1 of 3 layers, 10 of 30 MB");
        let third = format!("[{}{}]", "#".repeat(10), ".".repeat(20));
        assert_eq!(bar(&at), third);
    }
}
