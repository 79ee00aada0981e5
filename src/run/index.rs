//! `clip-csi index build` and `clip-csi index inspect`.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;

use super::engine::{Engine, Wanted};
use crate::{
    cli::ImageArgs,
    config::Config,
    disk,
    index::image::{FileType, ImageIndex, Ino, Node},
    metrics::Metrics,
    sys::MappedFile,
};

/// Builds an image's index and prints what it found.
pub(super) async fn build(
    args: ImageArgs,
    output: Option<PathBuf>,
    mut config: Config,
) -> anyhow::Result<ExitCode> {
    let wanted = Wanted::from_args(&args, &mut config)?;
    let engine = Engine::start(&config, Metrics::new())?;
    let (resolved, opened) = engine.open(&wanted).await?;
    if let Some(path) = output {
        disk::publish(&path, opened.index.source())
            .with_context(|| format!("writing {}", path.display()))?;
    }
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "image    {}",
        wanted.image.at_digest(resolved.manifest)
    )?;
    summary(&mut out, &opened.index)?;
    out.flush()?;
    drop(out);
    engine
        .stop(Duration::from_secs(config.node.drain_seconds))
        .await;
    Ok(ExitCode::SUCCESS)
}

/// Prints what an index file contains, after checking it.
pub(super) fn inspect(path: &Path, tree: bool) -> anyhow::Result<ExitCode> {
    let read = || format!("reading {}", path.display());
    let file = File::open(path).with_context(read)?;
    let index = ImageIndex::open(MappedFile::new(&file).with_context(read)?).with_context(read)?;
    index.verify().with_context(read)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    writeln!(out, "manifest {}", index.manifest())?;
    summary(&mut out, &index)?;
    if tree {
        let root = index.node(Ino::ROOT).context("the index has no root")?;
        print_tree(&mut out, &index, &root, "")?;
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

fn summary(out: &mut impl Write, index: &ImageIndex<MappedFile>) -> anyhow::Result<()> {
    writeln!(out, "inodes   {}", index.n_nodes())?;
    writeln!(out, "content  {} bytes", index.content_bytes())?;
    writeln!(out, "index    {} bytes", index.source().len())?;
    for at in 0..index.n_layers() {
        let layer = index.layer(at).context("the index is damaged")?;
        writeln!(
            out,
            "layer    {} {} bytes, blob {} {} bytes",
            layer.diff_id, layer.layer_bytes, layer.blob, layer.blob_bytes
        )?;
    }
    Ok(())
}

/// Prints each path with its mode, owner and size, depth first.
fn print_tree(
    out: &mut impl Write,
    index: &ImageIndex<MappedFile>,
    directory: &Node,
    path: &str,
) -> anyhow::Result<()> {
    for at in 0..index.n_names(directory) {
        let (name, ino) = index.name(directory, at).context("the index is damaged")?;
        let node = index.node(ino).context("the index is damaged")?;
        // A name need not be text, and may hold a line's end.
        let path = format!("{path}/{}", name.escape_ascii());
        let kind = match node.file_type {
            FileType::Directory => 'd',
            FileType::Regular => '-',
            FileType::Symlink => 'l',
            FileType::CharDevice => 'c',
            FileType::BlockDevice => 'b',
            FileType::Fifo => 'p',
        };
        let (uid, gid, size) = (node.uid, node.gid, node.size);
        write!(
            out,
            "{kind}{:04o} {uid}:{gid} {size} {path}",
            node.permissions
        )?;
        if let Some(target) = index.symlink_target(&node) {
            write!(out, " -> {}", target.escape_ascii())?;
        }
        writeln!(out)?;
        if node.file_type == FileType::Directory {
            print_tree(out, index, &node, &path)?;
        }
    }
    Ok(())
}
