//! Makes a layer from the index that was pushed beside its image: at once, and empty; its chunks follow
//! as they are read.

use tracing::{debug, info, warn};

use super::{
    disk::LayerFile,
    store::{Inner, Origin},
};
use crate::{disk, index::layer_index::LayerIndex, tier::PresentError};

impl Inner {
    /// Takes the layer's index from its image's repository; `false` if there is none to be used.
    ///
    /// Whether the index may be believed is the source's decision. What is checked here is that it is
    /// one, of this layer, and within the limits that hold for every layer.
    pub(super) async fn make_from_pushed_index(
        &self,
        origin: &Origin,
    ) -> Result<bool, PresentError> {
        let diff_id = origin.desc.diff_id;
        let pushed = origin.source.layer_index(&diff_id).await;
        let pushed = pushed.map_err(|source| PresentError::Origin {
            layer: diff_id,
            source,
        })?;
        let Some(pushed) = pushed else {
            return Ok(false);
        };
        let index = match LayerIndex::decode(&*pushed.index) {
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
        for (limit, value, max) in [
            (
                "cache.max_layer_bytes",
                index.layer_bytes(),
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
        self.make_room(diff_id, pushed.index.len() as u64).await?;
        LayerFile::create_empty(&self.paths, diff_id, &pushed.index, index.layer_bytes())
            .map_err(|err| self.blame(diff_id).disk(err))?;
        if let Some(access_map) = &pushed.access_map {
            let path = self.paths.access_map(diff_id);
            if let Err(err) = disk::publish_unsynced(&path, access_map) {
                // The layer can be read without.
                debug!(path = %path.display(), error = %err, "keeping an access map");
            }
        }
        info!(layer.diff_id = %diff_id, bytes = index.layer_bytes(),
            "layer index taken from the registry");
        Ok(true)
    }
}
