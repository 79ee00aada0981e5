//! `clip-csi cache ls`, `verify` and `rm`. They work beside a running driver.

use std::{
    io::{self, Write},
    process::ExitCode,
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

/// Lists the layers with their bytes present and in all.
pub(super) fn list(config: &CacheConfig) -> anyhow::Result<ExitCode> {
    let paths = CachePaths::new(&config.dir);
    let mut out = io::stdout().lock();
    let mut code = ExitCode::SUCCESS;
    for layer in catalog::layers(&paths).with_context(|| in_dir(config))? {
        match layer.file {
            Ok(file) => {
                let (present, all) = (file.present_bytes(), file.layer_bytes());
                writeln!(out, "{} {present} of {all} bytes", layer.diff_id)?;
            }
            Err(err) => {
                writeln!(
                    out,
                    "{} unusable: {err}; it is made anew on next use",
                    layer.diff_id
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
    for layer in catalog::layers(&paths).with_context(|| in_dir(config))? {
        let diff_id = layer.diff_id;
        let file = match layer.file {
            Ok(file) => file,
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
        }
    }
    Ok(code)
}

/// Removes the named layers, or everything.
pub(super) fn remove(
    config: &CacheConfig,
    layers: &[String],
    all: bool,
) -> anyhow::Result<ExitCode> {
    let paths = CachePaths::new(&config.dir);
    let wanted: Vec<DiffId> = if all {
        let layers = catalog::layers(&paths).with_context(|| in_dir(config))?;
        layers.iter().map(|it| it.diff_id).collect()
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
    for diff_id in wanted {
        let removed = catalog::remove(&paths, diff_id)
            .with_context(|| format!("removing layer {diff_id}"))?;
        let what = match removed {
            Removed::Yes => "removed",
            Removed::Absent => "is not in the cache",
            Removed::Busy => "is being filled right now: try again",
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
