//! Layers that are read by their blobs' tables of contents: at once, and empty; their chunks follow as they
//! are read, or in the background.
//!
//! Such a layer has a name of its own (`tier::Toc`), by which all else here treats it as any other: its
//! files, locks and keys are its own. Three things differ. Its index has no digests of chunks: they are
//! learned when pieces come and match their SHA-256 (`disk::learned`). Its blob's stream is not the layer:
//! there is no other way to its chunks than by pieces (`pieces`), and the remote content cache. And nobody
//! could verify it as a whole, as one is by its DiffId: so it is neither taken from nor given to a remote
//! content cache without a key.
//!
//! Once one node has all of it, the remote has it as any other layer, digests included.

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use futures_util::StreamExt as _;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{
    CacheConfig,
    access::Access,
    disk::{ACCESS, DIGESTS, INDEX, LayerFile, Staging},
    feed::{self, FeedReader, Hashing},
    origins::Origin,
    random::{MAX_PAUSE, Window},
    scratch::{NewFile, ScratchFile},
    store::{Inner, Layer, RefillState, crashed},
};
use crate::{
    chunk,
    codec::{
        Compression, Subject,
        piece_map::{Piece, PieceMapWriter},
    },
    digest::ChunkDigest,
    disk,
    index::{IndexError, layer_index::LayerIndexBuilder},
    sys,
    tar::TarEntry,
    telemetry::error_chain,
    tier::{BlobSource, LayerDesc, PresentError, SourceError, Toc, TocKind},
    toc::{self, TocError, TocLimits, TocSink, footer},
};

/// Bytes of a table at most, as it is in the blob: some two million files.
const MAX_TOC_BYTES: u64 = 128 << 20;

/// Chunks that are fetched at once to complete a layer, at most.
const RUN_CHUNKS: u32 = 8;

/// Why a layer is not read by its table.
#[derive(Debug)]
enum Failed {
    /// The table is not one that can be used; it says why.
    Unusable(String),
    /// There is nothing to be read by it.
    NoContent,
    /// It could not be had, and neither could the layer.
    Present(PresentError),
}

impl From<PresentError> for Failed {
    fn from(err: PresentError) -> Self {
        match err {
            PresentError::Origin { source, .. } if !concerns_all(&source) => {
                Self::Unusable(error_chain(&source))
            }
            err => Self::Present(err),
        }
    }
}

/// Whether who streams the blob would be told the same.
fn concerns_all(err: &SourceError) -> bool {
    match err {
        SourceError::NotFound { .. }
        | SourceError::Unauthorized { .. }
        | SourceError::Forbidden { .. }
        | SourceError::RateLimited { .. }
        | SourceError::Unavailable { .. } => true,
        // A server that knows no ranges.
        SourceError::Protocol { .. }
        | SourceError::WrongPlatform { .. }
        | SourceError::Unsupported { .. } => false,
    }
}

/// What becomes of a table that is read.
struct Building {
    /// Not if the layer has one.
    index: Option<LayerIndexBuilder<ScratchFile>>,
    map: PieceMapWriter<BufWriter<File>>,
    max_bytes: u64,
}

/// Why what a table says cannot be kept.
enum BuildError {
    Disk(io::Error),
    Refused(String),
}

impl From<IndexError> for BuildError {
    fn from(err: IndexError) -> Self {
        match err {
            IndexError::Scratch { kind, reason } => Self::Disk(io::Error::new(kind, reason)),
            err => Self::Refused(err.to_string()),
        }
    }
}

impl From<io::Error> for BuildError {
    fn from(err: io::Error) -> Self {
        match err.kind() {
            io::ErrorKind::InvalidInput => Self::Refused(err.to_string()),
            _ => Self::Disk(err),
        }
    }
}

impl Building {
    fn check_size(&self) -> Result<(), BuildError> {
        let index_bytes = self
            .index
            .as_ref()
            .map_or(0, LayerIndexBuilder::index_bytes);
        if self.max_bytes < index_bytes.max(self.map.map_bytes()) {
            let max = self.max_bytes;
            let reason = format!("its index exceeds cache.max_layer_index_bytes = {max}");
            return Err(BuildError::Refused(reason));
        }
        Ok(())
    }
}

impl TocSink for Building {
    type Error = BuildError;

    fn entry(&mut self, entry: &TarEntry) -> Result<(), BuildError> {
        if let Some(index) = &mut self.index {
            index.push_entry(entry)?;
        }
        self.check_size()
    }

    fn piece(&mut self, piece: &Piece) -> Result<(), BuildError> {
        self.map.push(piece)?;
        self.check_size()
    }
}

impl Inner {
    /// Gives the layer that the table of contents of `desc`'s blob describes; `None` if it has none that can
    /// be used, or if the layer of its DiffId is nearer.
    pub(super) async fn layer_by_toc(
        self: &Arc<Self>,
        desc: &LayerDesc,
        source: &Arc<dyn BlobSource>,
    ) -> Result<Option<Arc<Layer>>, PresentError> {
        let Some(by_toc) = desc.by_toc() else {
            return Ok(None);
        };
        let origin = Origin::new(&by_toc, Arc::clone(source));
        // Also where none is to be made any more: mounts may have it.
        if let Some(layer) = self.open_layer(&origin)? {
            return Ok(Some(layer));
        }
        let is_near = !desc.is_by_toc() && self.paths.layer(desc.diff_id).exists();
        if is_near || !self.config.layers_by_toc || source.pins_index() {
            return Ok(None);
        }
        let flight = self.layer_flights.join(by_toc.diff_id).await;
        if flight.followed {
            self.metrics.single_flight_followers.inc();
        }
        let lock = self.lock(by_toc.diff_id).await?;
        if let Some(layer) = self.open_layer(&origin)? {
            return Ok(Some(layer));
        }
        if !self.make_by_toc(desc, &origin).await? {
            return Ok(None);
        }
        let layer = self
            .open_layer(&origin)?
            .ok_or_else(|| PresentError::Disk {
                reason: format!("layer {} vanished while it was made", by_toc.diff_id),
            })?;
        drop((lock, flight));
        self.metrics.layer_cache_layers.inc();
        self.room.sweep_soon();
        Ok(Some(layer))
    }

    /// Makes the layer `origin` from the remote content cache, or from its table; `false` if that is not
    /// to be used, or the remote has the layer of the DiffId.
    async fn make_by_toc(
        self: &Arc<Self>,
        desc: &LayerDesc,
        origin: &Origin,
    ) -> Result<bool, PresentError> {
        if let Some(remote) = self.remote.as_ref().filter(|it| it.cache.authenticates()) {
            if !desc.is_by_toc() && remote.cache.manifest(&desc.diff_id).await.is_some() {
                return Ok(false);
            }
            if let Some(manifest) = remote.cache.manifest(&origin.desc.diff_id).await
                && self.adopt_remote_index(remote, &manifest).await?
            {
                return Ok(true);
            }
        }
        let mut made = self.make_from_toc(origin).await;
        if let Err(Failed::Unusable(_)) = &made
            && origin.source.distrust(&origin.desc.blob)
        {
            made = self.make_from_toc(origin).await;
        }
        let count = |outcome| {
            let counter = self.metrics.toc_lookups.with_label_values(&[outcome]);
            counter.inc();
        };
        match made {
            Ok(()) => {
                count("hit");
                Ok(true)
            }
            Err(Failed::Unusable(reason)) => {
                count("unusable");
                warn!(layer.diff_id = %desc.diff_id, layer.blob = %desc.blob, reason,
                    "table of contents of a layer cannot be used, streaming the layer whole");
                Ok(false)
            }
            Err(Failed::NoContent) => {
                count("empty");
                Ok(false)
            }
            Err(Failed::Present(err)) => {
                count("error");
                Err(err)
            }
        }
    }

    async fn make_from_toc(self: &Arc<Self>, origin: &Origin) -> Result<(), Failed> {
        let desc = &origin.desc;
        let failed = |err| Failed::Present(self.blame(desc.diff_id).disk(err));
        let _turn = self.tables.acquire().await;
        let table = self.table(origin).await?;
        self.make_room(desc.diff_id, table.end - table.start)
            .await?;
        let staging = Staging::new(&self.paths, desc.diff_id).map_err(failed)?;
        let map = staging.create(ACCESS).map_err(failed)?;
        let entries = ScratchFile::new(staging.dir(), Arc::clone(&self.room));
        let index = LayerIndexBuilder::new(entries);
        let inner = Arc::clone(self);
        let of = desc.clone();
        let finish = move |index: Option<LayerIndexBuilder<ScratchFile>>, layer_bytes| {
            let mut index = index.expect("it was given one");
            let n_chunks = chunk::n_chunks(layer_bytes);
            let unknown = ChunkDigest::from_bytes([0; 32]);
            (0..n_chunks).for_each(|_| index.push_chunk(&unknown));
            let file = staging.create(INDEX)?;
            index.finish_in(
                &mut NewFile::new(&file, &inner.room),
                of.diff_id,
                layer_bytes,
            )?;
            // Written, because a page of a mapped hole cannot be had where the disk is full.
            let unknown = unknown
                .as_bytes()
                .repeat(usize::try_from(n_chunks).map_err(io::Error::other)?);
            staging.write(DIGESTS, &unknown)?;
            staging.publish_empty(&inner.paths, of.diff_id, layer_bytes)?;
            Ok(layer_bytes)
        };
        let layer_bytes = self
            .read_table(origin, table, Some(index), map, finish)
            .await?;
        sys::trim_allocator();
        info!(layer.diff_id = %desc.diff_id, layer.blob = %desc.blob, bytes = layer_bytes,
            "layer is read by its table of contents");
        Ok(())
    }

    /// Where in the blob the table is.
    async fn table(&self, origin: &Origin) -> Result<Range<u64>, Failed> {
        let blob_bytes = origin.desc.blob_bytes;
        let unusable = |reason: &str| Failed::Unusable(reason.to_owned());
        let toc = origin.desc.toc.ok_or_else(|| unusable("there is none"))?;
        let table = match toc.kind {
            TocKind::ZstdChunked {
                offset,
                compressed_bytes,
            } => offset..offset.saturating_add(compressed_bytes),
            TocKind::Estargz => {
                let end = blob_bytes.checked_sub(footer::FOOTER_BYTES);
                let end = end.ok_or_else(|| unusable("the blob is too short to be eStargz"))?;
                let mut stream = origin.open(end..blob_bytes).await?;
                let mut footer = Vec::new();
                while let Some(part) = stream.next().await {
                    let part = part.map_err(|source| PresentError::Origin {
                        layer: origin.desc.diff_id,
                        source,
                    })?;
                    footer.extend_from_slice(&part);
                    if footer::FOOTER_BYTES < footer.len() as u64 {
                        break;
                    }
                }
                let start = footer::table_offset(&footer, blob_bytes);
                start.ok_or_else(|| unusable("the blob has no footer of eStargz"))?..end
            }
        };
        if table.is_empty() || blob_bytes < table.end {
            return Err(unusable("it lies outside of the blob"));
        }
        if MAX_TOC_BYTES < table.end - table.start {
            let reason = format!("it is longer than {MAX_TOC_BYTES} bytes in the blob");
            return Err(Failed::Unusable(reason));
        }
        Ok(table)
    }

    /// Reads the table at `table` of the blob, compares its digest, and gives what was made of it to `finish`,
    /// whose map is in `map` then.
    async fn read_table<T: Send + 'static>(
        &self,
        origin: &Origin,
        table: Range<u64>,
        index: Option<LayerIndexBuilder<ScratchFile>>,
        map: File,
        finish: impl FnOnce(Option<LayerIndexBuilder<ScratchFile>>, u64) -> Result<T, BuildError>
        + Send
        + 'static,
    ) -> Result<T, Failed> {
        let desc = &origin.desc;
        let toc = desc
            .toc
            .ok_or_else(|| Failed::Unusable("there is none".to_owned()))?;
        let stream = origin.open(table.clone()).await?;
        let (feed, mut reader) = feed::feed(Hashing::Yes);
        let (config, of) = (self.config.clone(), desc.clone());
        let work = self.runtime.spawn_blocking(move || {
            let built = build(&config, &of, &toc, table.start, &mut reader, index, map);
            // Whatever else went wrong came of that.
            if let Some(source) = reader.failure() {
                let layer = of.diff_id;
                return Err(Built::Failed(PresentError::Origin { layer, source }));
            }
            let (index, layer_bytes) = built.map_err(Built::Wrong)?;
            finish(index, layer_bytes).map_err(|err| Built::Wrong(TocError::Sink(err)))
        });
        let ((), outcome) = tokio::join!(feed.run(stream), work);
        match outcome {
            Ok(Ok(finished)) => Ok(finished),
            Ok(Err(Built::Failed(err))) => Err(err.into()),
            Ok(Err(Built::Wrong(TocError::Sink(BuildError::Disk(err))))) => {
                Err(Failed::Present(self.blame(desc.diff_id).disk(err)))
            }
            Ok(Err(Built::Wrong(
                TocError::Sink(BuildError::Refused(reason)) | TocError::Unusable(reason),
            ))) => Err(Failed::Unusable(reason)),
            Ok(Err(Built::Wrong(TocError::NoContent))) => Err(Failed::NoContent),
            Ok(Err(Built::Wrong(TocError::Input(err)))) => Err(Failed::Unusable(err.to_string())),
            Err(err) => Err(Failed::Present(crashed(desc.diff_id, &err))),
        }
    }

    /// Makes the map of the layer's pieces anew, from the table; whether there is one now.
    pub(super) async fn renew_pieces(&self, layer: &Layer) -> bool {
        if !layer.origins.first().desc.is_by_toc() {
            return false;
        }
        let renewal = |origin| self.renew_pieces_from(layer, origin);
        let renewed = self.try_origins(layer, None, renewal).await;
        if let Err(err) = &renewed {
            warn!(layer.diff_id = %layer.file.diff_id(), error = error_chain(err),
                "table of contents of a layer cannot be had any more");
        }
        renewed.is_ok()
    }

    async fn renew_pieces_from(&self, layer: &Layer, origin: Origin) -> Result<(), PresentError> {
        let file = Arc::clone(&layer.file);
        let diff_id = file.diff_id();
        let renewed = async {
            let failed = |err| Failed::Present(self.blame(diff_id).disk(err));
            let new = disk::Unpublished::create(&file.dir().join(ACCESS)).map_err(failed)?;
            let map = new.file().try_clone().map_err(failed)?;
            let table = self.table(&origin).await?;
            let finish = move |_, layer_bytes| match layer_bytes == file.layer_bytes() {
                true => Ok(new.publish()?),
                false => Err(BuildError::Refused("it is of another layer".to_owned())),
            };
            self.read_table(&origin, table, None, map, finish).await
        };
        let reason = match renewed.await {
            Ok(()) => return Ok(()),
            Err(Failed::Present(err)) => return Err(err),
            Err(Failed::Unusable(reason)) => reason,
            Err(Failed::NoContent) => "there is nothing to be read by it".to_owned(),
        };
        Err(PresentError::Refused {
            layer: diff_id,
            reason: format!("its blob's table of contents cannot be used: {reason}"),
        })
    }

    /// Brings what is missing of a layer that is read by pieces, making way for readers; `false` if it is
    /// one that can be streamed, as far as is known.
    pub(super) async fn fill_by_pieces(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        progress: &watch::Sender<RefillState>,
    ) -> Result<bool, PresentError> {
        let access = self.access(layer).await.filter(|it| it.is_by_pieces());
        let file = &layer.file;
        let Some(access) = access else {
            // Its stream would be compared with digests that are none.
            return match file.learns() {
                true => Err(PresentError::Refused {
                    layer: file.diff_id(),
                    reason: "its blob's table of contents cannot be had any more".to_owned(),
                }),
                false => Ok(false),
            };
        };
        // Nobody waits for a stream: who wants a chunk fetches it, or joins who does.
        layer.refill_at.store(u32::MAX, Ordering::Relaxed);
        let is_absent = |it: u32| !file.has(it..it + 1);
        let (mut at, mut refused) = (0, None);
        while let Some(first) = (at..file.n_chunks()).find(|it| is_absent(*it)) {
            self.demand.let_pass(MAX_PAUSE).await;
            // The one who is at it here.
            if Arc::strong_count(layer) <= 1 {
                debug!(layer.diff_id = %file.diff_id(), "nobody has the layer open any more, no need for the rest");
                return Ok(true);
            }
            let window = Window::Exactly(run(&access, file, first));
            at = match self.read_random(layer, &access, first, window).await {
                Ok(true) => first + 1,
                // They are perhaps not the layer's.
                Ok(false) => return Ok(false),
                // It keeps none but those of its own piece away.
                Err(err @ PresentError::Refused { .. }) => {
                    refused = Some(err);
                    access.whole(first..first + 1).end
                }
                Err(err) => return Err(err),
            };
            progress.send_replace(RefillState::Running);
        }
        if file.is_complete() {
            self.completed(layer);
        }
        refused.map_or(Ok(true), Err)
    }

    /// Whether the remote content cache is to have the layer once it is complete.
    pub(super) fn is_shared(&self, file: &LayerFile) -> bool {
        let remote = self.remote.as_ref();
        !file.learns() || remote.is_some_and(|it| it.cache.authenticates())
    }
}

/// Chunks that are fetched together, from `first` on, which is absent.
fn run(access: &Access, file: &LayerFile, first: u32) -> Range<u32> {
    let mut run = access.whole(first..first + 1);
    while run.end < file.n_chunks() && run.len() < RUN_CHUNKS as usize {
        let next = access.whole(run.end..run.end + 1);
        if file.has(next.clone()) || access.span(run.start..next.end).is_none() {
            break;
        }
        run.end = next.end;
    }
    run
}

/// What went wrong with a table.
enum Built {
    Failed(PresentError),
    Wrong(TocError<BuildError>),
}

/// Reads a table out of `reader`, and compares its digest; returns the index, without digests of chunks, and
/// how long the layer is. The data end where the table begins.
fn build(
    config: &CacheConfig,
    desc: &LayerDesc,
    toc: &Toc,
    data_end: u64,
    reader: &mut FeedReader,
    index: Option<LayerIndexBuilder<ScratchFile>>,
    map: File,
) -> Result<(Option<LayerIndexBuilder<ScratchFile>>, u64), TocError<BuildError>> {
    let of_disk = |err: io::Error| TocError::Sink(err.into());
    let mut building = Building {
        index,
        map: PieceMapWriter::new(BufWriter::new(map)).map_err(of_disk)?,
        max_bytes: config.max_layer_index_bytes,
    };
    let limits = TocLimits {
        max_entries: config.max_layer_entries,
        max_layer_bytes: config.max_layer_bytes,
        ..TocLimits::default()
    };
    let contents = toc::read(&mut *reader, toc.kind, data_end, &limits, &mut building)?;
    let (_, compressed) = reader.finish().map_err(TocError::Input)?;
    let (compression, digest) = match toc.kind {
        TocKind::Estargz => (Compression::Gzip, Some(contents.digest)),
        TocKind::ZstdChunked { .. } => (Compression::Zstd, compressed),
    };
    if digest != Some(toc.digest) {
        return Err(TocError::Unusable(
            "it does not have the digest that the manifest names".to_owned(),
        ));
    }
    let subject = Subject {
        compression,
        blob: desc.blob,
        blob_bytes: desc.blob_bytes,
        diff_id: desc.diff_id,
        layer_bytes: contents.layer_bytes,
    };
    let mut map = building.map.finish(&subject).map_err(of_disk)?;
    map.flush().map_err(of_disk)?;
    Ok((building.index, contents.layer_bytes))
}
