//! Makes a layer from the index that was pushed beside its image: at once, and empty; its chunks follow
//! as they are read.

use std::{fs::File, io, sync::Arc};

use tracing::{info, warn};

use super::{
    disk::{ACCESS, CachePaths, INDEX, Staging},
    origins::Origin,
    store::Inner,
};
use crate::{
    digest::DiffId,
    disk,
    index::layer_index::LayerIndex,
    sys::MappedFile,
    tier::{KeepPushed, PresentError, PushedPart},
};

/// Files of a layer in the making, into which goes what was pushed about it.
struct Keeper<'a> {
    paths: &'a CachePaths,
    layer: DiffId,
    /// None before something comes: most images have nothing pushed beside them.
    staging: Option<Staging>,
    index: Option<File>,
    access_map: Option<File>,
    /// Which of them is coming.
    part: PushedPart,
    /// What the disk failed with: whoever sends knows only that it did.
    failure: Option<io::Error>,
}

impl<'a> Keeper<'a> {
    fn new(paths: &'a CachePaths, layer: DiffId) -> Self {
        Self {
            paths,
            layer,
            staging: None,
            index: None,
            access_map: None,
            part: PushedPart::Index,
            failure: None,
        }
    }

    fn file(&mut self) -> &mut Option<File> {
        match self.part {
            PushedPart::Index => &mut self.index,
            PushedPart::AccessMap => &mut self.access_map,
        }
    }

    fn try_begin(&mut self) -> io::Result<()> {
        let name = match self.part {
            PushedPart::Index => INDEX,
            PushedPart::AccessMap => ACCESS,
        };
        let staging = match self.staging.take() {
            Some(staging) => staging,
            None => Staging::new(self.paths, self.layer)?,
        };
        let staging = self.staging.insert(staging);
        let file = staging.create(name)?;
        *self.file() = Some(file);
        Ok(())
    }

    /// Leaves word of what the disk failed with.
    fn noted(&mut self, done: io::Result<()>) -> io::Result<()> {
        done.map_err(|err| {
            let kind = err.kind();
            self.failure = Some(err);
            kind.into()
        })
    }
}

impl KeepPushed for Keeper<'_> {
    fn begin(&mut self, part: PushedPart) -> io::Result<()> {
        self.part = part;
        let begun = self.try_begin();
        self.noted(begun)
    }

    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let taken = match self.file() {
            Some(file) => disk::write_to_map(file, bytes),
            None => Err(io::ErrorKind::InvalidInput.into()),
        };
        self.noted(taken)
    }
}

impl Inner {
    /// Takes the layer's index from its image's repository; `false` if there is none to be used.
    ///
    /// Whether the index may be believed is the source's decision. What is checked here is that it is
    /// one, of this layer, and within the limits that hold for every layer.
    pub(super) async fn make_from_pushed_index(
        self: &Arc<Self>,
        origin: &Origin,
    ) -> Result<bool, PresentError> {
        let diff_id = origin.desc.diff_id;
        let failed = |err| self.blame(diff_id).disk(err);
        let mut keeper = Keeper::new(&self.paths, diff_id);
        let found = origin.source.layer_index(&diff_id, &mut keeper).await;
        if let Some(err) = keeper.failure {
            return Err(failed(err));
        }
        let found = found.map_err(|source| PresentError::Origin {
            layer: diff_id,
            source,
        })?;
        let (true, Some(staging), Some(file)) = (found, keeper.staging, keeper.index) else {
            return Ok(false);
        };
        let index_bytes = file.metadata().map_err(failed)?.len();
        // What is empty could not be mapped.
        if index_bytes == 0 {
            warn!(layer.diff_id = %diff_id, "registry has an empty index");
            return Ok(false);
        }
        let index = match LayerIndex::decode(MappedFile::new(&file).map_err(failed)?) {
            Ok(index) if index.diff_id() == diff_id => index,
            Ok(index) => {
                warn!(layer.diff_id = %diff_id, index.diff_id = %index.diff_id(),
                    "registry has an index of another layer");
                return Ok(false);
            }
            Err(err) => {
                warn!(layer.diff_id = %diff_id, error = %err, "registry has an unusable index");
                return Ok(false);
            }
        };
        let layer_bytes = index.layer_bytes();
        for (limit, value, max) in [
            (
                "cache.max_layer_bytes",
                layer_bytes,
                self.config.max_layer_bytes,
            ),
            (
                "cache.max_layer_entries",
                index.n_entries(),
                self.config.max_layer_entries,
            ),
        ] {
            if max < value {
                return Err(PresentError::Limit {
                    layer: diff_id,
                    limit: limit.into(),
                    max,
                });
            }
        }
        self.make_room(diff_id, index_bytes).await?;
        staging
            .publish_empty(&self.paths, diff_id, layer_bytes)
            .map_err(failed)?;
        info!(layer.diff_id = %diff_id, bytes = layer_bytes, "layer index taken from the registry");
        Ok(true)
    }
}
