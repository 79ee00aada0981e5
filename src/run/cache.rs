//! `clip-csi cache ls`, `verify` and `rm`. They work beside a running driver.

use std::{
    io::{self, Write},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use crate::{
    digest::DiffId,
    layer::{
        CacheConfig,
        catalog::{self, Removed},
        disk::CachePaths,
    },
};

/// How long `rm` waits for layers that are in use, in all: whoever served a mount lets go of them a
/// moment after it was unmounted.
const IN_USE_WAIT: Duration = Duration::from_secs(3);

const IN_USE_POLL: Duration = Duration::from_millis(50);

/// Lists the layers with their bytes present and in all.
pub(super) fn list(config: &CacheConfig) -> anyhow::Result<ExitCode> {
    let paths = CachePaths::new(&config.dir);
    let mut out = io::stdout().lock();
    let mut code = ExitCode::SUCCESS;
    for diff_id in catalog::layers(&paths).with_context(|| in_dir(config))? {
        match catalog::open(&paths, diff_id) {
            Ok(Some(file)) => {
                let (present, all) = (file.present_bytes(), file.layer_bytes());
                let remark = match file.is_mounted() {
                    true => ", mounted in the kernel",
                    false => "",
                };
                writeln!(out, "{diff_id} {present} of {all} bytes{remark}")?;
            }
            // Evicted since it was listed.
            Ok(None) => {}
            Err(err) => {
                writeln!(
                    out,
                    "{diff_id} unusable: {err}; it is made anew on next use"
                )?;
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// Compares every chunk with its digest; fails if one was wrong.
pub(super) fn verify(config: &CacheConfig) -> anyhow::Result<ExitCode> {
    let paths = CachePaths::new(&config.dir);
    let mut out = io::stdout().lock();
    let mut code = ExitCode::SUCCESS;
    for diff_id in catalog::layers(&paths).with_context(|| in_dir(config))? {
        let file = match catalog::open(&paths, diff_id) {
            Ok(Some(file)) => file,
            // Evicted since it was listed.
            Ok(None) => continue,
            Err(err) => {
                writeln!(
                    out,
                    "{diff_id} unusable: {err}; it is made anew on next use"
                )?;
                code = ExitCode::FAILURE;
                continue;
            }
        };
        let found = catalog::verify(&file).with_context(|| format!("reading layer {diff_id}"))?;
        writeln!(
            out,
            "{diff_id} {} chunks right, {} wrong and dropped, {} absent",
            found.good, found.wrong, found.absent
        )?;
        if 0 < found.wrong {
            code = ExitCode::FAILURE;
            if file.is_mounted() {
                writeln!(
                    out,
                    "{diff_id} is mounted in the kernel, which shows what is on the disk: recreate the pods whose images have it"
                )?;
            }
        }
    }
    Ok(code)
}

/// Removes the named layers, or everything, except for what is in use.
pub(super) fn remove(
    config: &CacheConfig,
    layers: &[String],
    all: bool,
) -> anyhow::Result<ExitCode> {
    let paths = CachePaths::new(&config.dir);
    let wanted: Vec<DiffId> = if all {
        catalog::layers(&paths).with_context(|| in_dir(config))?
    } else if layers.is_empty() {
        bail!("name the layers to remove (see `clip-csi cache ls`), or give --all");
    } else {
        layers
            .iter()
            .map(|it| it.parse())
            .collect::<Result<_, _>>()?
    };
    let mut out = io::stdout().lock();
    let mut code = ExitCode::SUCCESS;
    let deadline = Instant::now() + IN_USE_WAIT;
    for diff_id in wanted {
        let removed = loop {
            let removed = catalog::remove(&paths, diff_id)
                .with_context(|| format!("removing layer {diff_id}"))?;
            if removed != Removed::InUse || deadline <= Instant::now() {
                break removed;
            }
            thread::sleep(IN_USE_POLL);
        };
        let what = match removed {
            Removed::Yes => "removed",
            Removed::Absent => "is not in the cache",
            Removed::Filling => "is being filled right now: try again",
            Removed::InUse => "is in use: unmount the images that have it first",
        };
        writeln!(out, "{diff_id} {what}")?;
        if removed != Removed::Yes {
            code = ExitCode::FAILURE;
        }
    }
    if all {
        let n_images = catalog::remove_images(&paths).with_context(|| in_dir(config))?;
        writeln!(out, "{n_images} image indexes removed")?;
    }
    Ok(code)
}

fn in_dir(config: &CacheConfig) -> String {
    format!("cache directory {}", config.dir.display())
}
