//! Takes what is on disk and not marked, after an unclean stop: most of it is right, and reading it is cheaper than
//! fetching it.

use std::sync::Arc;

use tokio::sync::watch;
use tracing::debug;

use super::{
    riders,
    store::{Inner, Layer, RefillState, crashed},
};
use crate::tier::PresentError;

impl Inner {
    /// Takes the chunk that is on disk if it is right.
    pub(super) async fn adopt(&self, layer: &Arc<Layer>, chunk: u32) -> Result<bool, PresentError> {
        let file = Arc::clone(&layer.file);
        let diff_id = file.diff_id();
        let adopted = self
            .runtime
            .spawn_blocking(move || file.adopt_chunk(chunk))
            .await;
        match adopted {
            Ok(Ok(is_adopted)) => Ok(is_adopted),
            // What cannot be read can be fetched.
            Ok(Err(err)) => {
                debug!(layer.diff_id = %diff_id, chunk, error = %err, "chunk on disk cannot be read");
                Ok(false)
            }
            Err(err) => Err(crashed(diff_id, &err)),
        }
    }

    /// Takes all chunks that are right, until one cannot be read, and tells who waits for one of them.
    pub(super) async fn adopt_all(
        &self,
        layer: &Arc<Layer>,
        progress: &watch::Sender<RefillState>,
    ) -> Result<(), PresentError> {
        let turn = Arc::clone(&self.pool.adoptions).acquire_owned();
        let turn = riders::telling(progress, turn).await;
        let (file, progress) = (Arc::clone(&layer.file), progress.clone());
        let adopted = self.runtime.spawn_blocking(move || {
            let _turn = turn;
            // What cannot be read can be fetched.
            let _ = (0..file.n_chunks()).try_for_each(|it| {
                progress.send_replace(RefillState::Running);
                file.adopt_chunk(it).map(|_| ())
            });
        });
        let diff_id = layer.file.diff_id();
        adopted.await.map_err(|err| crashed(diff_id, &err))
    }
}
