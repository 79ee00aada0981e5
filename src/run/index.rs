//! `clip-csi index build`, `push` and `inspect`.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use tokio::sync::oneshot;
use tracing::warn;

use super::{
    BadConfig,
    engine::{Engine, Wanted},
};
use crate::{
    cli::ImageArgs,
    config::Config,
    disk,
    fair::Claimant,
    index::image::{FileType, ImageIndex, Ino, Node},
    indexer::rebuild,
    layer::store::Layer,
    metrics::Metrics,
    registry::LayerPush,
    sys::MappedFile,
    tier::LayerDesc,
};

/// Builds an image's index and prints what it found.
pub(super) async fn build(
    args: ImageArgs,
    output: Option<PathBuf>,
    mut config: Config,
) -> anyhow::Result<ExitCode> {
    // What is built here is built from the layers.
    config.registry.use_pushed_indexes = false;
    let wanted = Wanted::from_args(&args, &mut config)?;
    let mut engine = Engine::start(&config, Metrics::new())?;
    engine.indexer.use_no_toc();
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

/// Pushes an image's index beside it and prints what a volume may pin.
///
/// Whoever pushes vouches with the installation's key, so that the indexes are made of bytes that
/// were compared with the layers' DiffIDs just now, whatever the cache has.
pub(super) async fn push(args: ImageArgs, mut config: Config) -> anyhow::Result<ExitCode> {
    config.registry.use_pushed_indexes = false;
    let wanted = Wanted::from_args(&args, &mut config)?;
    let mut engine = Engine::start(&config, Metrics::new())?;
    engine.indexer.use_no_toc();
    push_with(&engine, &wanted, &config).await?;
    engine
        .stop(Duration::from_secs(config.node.drain_seconds))
        .await;
    Ok(ExitCode::SUCCESS)
}

/// As [`push`], with an engine that uses no pushed index itself.
pub(super) async fn push_with(
    engine: &Engine,
    wanted: &Wanted,
    config: &Config,
) -> anyhow::Result<()> {
    let key = config.remote.integrity_key().map_err(BadConfig::new)?;
    if key.is_none() {
        warn!(
            "remote.hmac_key_file is not set: nodes use this index only for volumes that pin it, \
             and only if registry.trust_pinned_indexes is set there"
        );
    }
    let (resolved, opened) = engine.open(wanted).await?;
    let mut out = io::stdout();
    writeln!(
        out,
        "image    {}",
        wanted.image.at_digest(resolved.manifest)
    )?;
    let mut layers = Vec::with_capacity(opened.layers.len());
    for (layer, desc) in opened.layers.iter().zip(&resolved.layers) {
        let pushed = layer_push(engine, layer, desc).await?;
        let map_bytes = pushed.access_map.as_ref().map_or(0, Bytes::len);
        writeln!(
            out,
            "layer    {} verified, index {} bytes, access map {map_bytes} bytes",
            pushed.diff_id,
            pushed.index.len()
        )?;
        layers.push(pushed);
    }
    let (image, requester) = (&wanted.image, &wanted.requester);
    let pushed = engine
        .registry
        .push_index(image, requester, resolved.manifest, &layers, key.as_ref())
        .await
        .with_context(|| format!("pushing the index of image {image}"))?;
    writeln!(out, "pushed   {} bytes", pushed.blob_bytes)?;
    writeln!(out, "index    {}", pushed.artifact)?;
    out.flush()?;
    Ok(())
}

/// Makes the whole layer present, and its index anew.
async fn layer_push(
    engine: &Engine,
    layer: &Arc<Layer>,
    desc: &LayerDesc,
) -> anyhow::Result<LayerPush> {
    let (diff_id, n_chunks) = (desc.diff_id, layer.file().n_chunks());
    let kept = layer.file().keep_whole();
    let _kept = kept.with_context(|| format!("keeping layer {diff_id} in the cache"))?;
    if 0 < n_chunks {
        let (sender, outcome) = oneshot::channel();
        let done = Box::new(move |outcome| {
            // The receiver is in this function.
            let _ = sender.send(outcome);
        });
        engine
            .store
            .make_present_for(Claimant::Publish, diff_id, 0..n_chunks, done);
        outcome.await.context("the layer store has stopped")??;
    }
    let file = Arc::clone(layer.file());
    let index = tokio::task::spawn_blocking(move || rebuild::layer_index(&file)).await?;
    let index = index.with_context(|| format!("layer {diff_id}"))?;
    Ok(LayerPush {
        diff_id,
        blob: desc.blob,
        index: index.into(),
        access_map: access_map(&engine.store.paths().access_map(diff_id))?,
    })
}

/// Reads a layer's access map, if it has one.
fn access_map(path: &Path) -> anyhow::Result<Option<Bytes>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes.into())),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err).with_context(|| format!("reading {}", path.display())),
    }
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
