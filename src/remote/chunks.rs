//! Fetches chunks of a layer that are wanted together, so that they cost the time of one request, and gives
//! each as soon as it has come and is verified.

use std::vec;

use bytes::Bytes;
use tracing::debug;

use super::{
    content::ContentCache,
    format,
    gate::{Refusal, Run},
};
use crate::{
    digest::{ChunkDigest, DiffId},
    fair::Claimant,
    tier::CacheKey,
};

/// One chunk of a layer that is to be fetched.
#[derive(Debug, Clone, Copy)]
pub struct WantedChunk {
    /// Which one.
    pub number: u32,
    /// How many bytes it has.
    pub len: usize,
    /// What they are to match.
    pub digest: ChunkDigest,
}

/// Chunks that are on their way.
pub struct ChunkRun<'a> {
    cache: &'a ContentCache,
    layer: DiffId,
    wanted: vec::IntoIter<WantedChunk>,
    /// `None` once the remote has failed.
    run: Option<Run<'a>>,
}

impl std::fmt::Debug for ChunkRun<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkRun")
            .field("layer", &self.layer)
            .field("wanted", &self.wanted)
            .finish_non_exhaustive()
    }
}

impl ContentCache {
    /// Asks for chunks of a layer for `who`, which come in this order.
    pub fn chunks(&self, who: Claimant, layer: &DiffId, wanted: Vec<WantedChunk>) -> ChunkRun<'_> {
        let keys = wanted.iter().map(|it| CacheKey::Chunk(*layer, it.number));
        // No writer stores more than the raw chunk and its codec.
        let longest = wanted.iter().map(|it| it.len).max().unwrap_or(0);
        let run = self
            .gate()
            .get_each(who, keys.collect(), longest.saturating_add(1));
        ChunkRun {
            cache: self,
            layer: *layer,
            wanted: wanted.into_iter(),
            run: Some(run),
        }
    }
}

impl ChunkRun<'_> {
    /// Waits for the next chunk: its number, and its bytes if the store has the right ones. `None` after the
    /// last, or when the remote does not answer.
    ///
    /// A chunk that is anything else than what is wanted is deleted from the store.
    ///
    /// # Cancellation
    /// The run is of use no more after a call that was given up.
    pub async fn next(&mut self) -> Option<(u32, Option<Bytes>)> {
        let run = self.run.as_mut()?;
        let WantedChunk {
            number,
            len,
            digest,
        } = self.wanted.next()?;
        let decode = move |value| format::decode_chunk(value, len, &digest);
        match run.next(decode).await? {
            Ok(Some(content)) => {
                debug!(layer.diff_id = %self.layer, chunk = number, bytes = len, "remote cache hit");
                Some((number, Some(content)))
            }
            Ok(None) => Some((number, None)),
            Err(refusal @ Refusal::Wrong(_)) => {
                let key = CacheKey::Chunk(self.layer, number);
                self.cache.missed_for_good(key, refusal).await;
                Some((number, None))
            }
            Err(Refusal::Skipped(_) | Refusal::Failed(_)) => {
                self.run = None;
                None
            }
        }
    }
}
