//! Brings an image's chunks: those that were recorded first, the others in an order of their own.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
};

use futures_util::{TryStreamExt as _, stream};

use super::{Filling, Origin};
use crate::{
    layer::{
        store::Layer,
        warm::{Reservation, Warmed},
    },
    warm::{WarmError, WarmWhat},
};

/// Chunks that are fetched at once: as many as a process takes from the remote at all.
const CHUNKS_AT_ONCE: usize = 2;

/// How often a chunk is asked for that the remote says it has: an answer may be lost on its way.
const ATTEMPTS: u32 = 3;

/// Names a chunk of the image: which layer, which chunk of that.
pub(super) type Place = (usize, u32);

impl Filling<'_> {
    /// What is to come, in order: the chunks that were recorded, then all others, layer by layer.
    pub(super) async fn wanted(&self, layers: &[Arc<Layer>]) -> (Vec<Place>, Vec<Vec<Place>>) {
        let what = self.request.what;
        let is_all_there = || layers.iter().all(|it| it.file().is_complete());
        let recorded = match what {
            WarmWhat::Index => Vec::new(),
            WarmWhat::All if is_all_there() => Vec::new(),
            WarmWhat::Recorded | WarmWhat::All => {
                let n_chunks: Vec<_> = layers.iter().map(|it| it.file().n_chunks()).collect();
                let store = self.warmer.store;
                store.recorded(self.request.manifest, &n_chunks).await
            }
        };
        let recorded = recorded.into_iter();
        // A profile names layers of its image.
        let recorded: Vec<Place> = recorded
            .map(|it| (usize::try_from(it.layer).unwrap_or(usize::MAX), it.chunk))
            .filter(|it| it.0 < layers.len())
            .collect();
        if what != WarmWhat::All {
            return (recorded, Vec::new());
        }
        let known: HashSet<Place> = recorded.iter().copied().collect();
        let mut seen = HashSet::new();
        let distinct = (0..layers.len()).filter(|it| seen.insert(layers[*it].file().diff_id()));
        let rest = shuffled(distinct.collect()).into_iter().map(|at| {
            let chunks = (0..layers[at].file().n_chunks()).map(|it| (at, it));
            shuffled(chunks.filter(|it| !known.contains(it)).collect())
        });
        let rest = rest.collect();
        (recorded, rest)
    }

    /// Brings the chunks at these places, some at once.
    pub(super) async fn bring(
        &self,
        layers: &[Arc<Layer>],
        places: &[Place],
        reservation: &Reservation,
    ) -> Result<(), WarmError> {
        let lacking: Mutex<Vec<Place>> = Mutex::default();
        let missing = places
            .iter()
            .filter(|it| !layers[it.0].file().has(it.1..it.1 + 1));
        stream::iter(missing.map(Ok))
            .try_for_each_concurrent(CHUNKS_AT_ONCE, |place| {
                let lacking = &lacking;
                async move {
                    let is_there = self.bring_one(&layers[place.0], place.1, reservation);
                    if !is_there.await? {
                        // Nothing panics with the lock held.
                        let mut lacking = lacking.lock().unwrap_or_else(PoisonError::into_inner);
                        lacking.push(*place);
                    }
                    Ok(())
                }
            })
            .await?;
        let lacking = lacking.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (at, chunk) in lacking {
            let (layer, store) = (&layers[at], self.warmer.store);
            let brought = match self.request.what {
                WarmWhat::All => store.stream_all(layer).await,
                WarmWhat::Index | WarmWhat::Recorded => store.bring(layer, chunk..chunk + 1).await,
            };
            brought.map_err(|err| self.failed(err, reservation.left_bytes()))?;
            self.came(layer, chunk, reservation);
        }
        Ok(())
    }

    /// Brings one chunk; `false` if the registry must be asked, and may.
    async fn bring_one(
        &self,
        layer: &Arc<Layer>,
        chunk: u32,
        reservation: &Reservation,
    ) -> Result<bool, WarmError> {
        let (store, bytes) = (self.warmer.store, layer.file().chunk_bytes(chunk));
        let diff_id = layer.file().diff_id();
        for _ in 0..ATTEMPTS {
            self.request.limits.pace.take(bytes).await;
            let warmed = store.warm_chunk(layer, chunk).await;
            let left_bytes = reservation.left_bytes();
            match warmed.map_err(|err| self.failed(err, left_bytes))? {
                Warmed::Present => {
                    self.came(layer, chunk, reservation);
                    return Ok(true);
                }
                Warmed::Fetched => {
                    self.from_remote_bytes.fetch_add(bytes, Ordering::Relaxed);
                    self.came(layer, chunk, reservation);
                    return Ok(true);
                }
                Warmed::NoRoom => return Err(self.no_space(left_bytes, store.spare_bytes())),
                Warmed::Lacking => {}
            }
            if let Origin::Registry { .. } = self.request.origin {
                return Ok(false);
            }
            let cache = store.remote().ok_or(WarmError::NoRemote)?;
            let what = format!("chunk {chunk} of layer {diff_id}");
            let has = cache.has_chunk(&diff_id, chunk).await;
            self.answered(cache, has, &what)?;
        }
        Err(WarmError::RemoteDown {
            engine: store.remote().map_or("none", |it| it.engine()),
            reason: format!("it has chunk {chunk} of layer {diff_id}, and does not give it"),
        })
    }

    fn came(&self, layer: &Layer, chunk: u32, reservation: &Reservation) {
        let bytes = layer.file().chunk_bytes(chunk);
        self.progress.bytes_done(bytes);
        reservation.spent(bytes);
    }
}

/// In an order that differs each time.
fn shuffled<T>(mut items: Vec<T>) -> Vec<T> {
    use std::hash::{BuildHasher as _, RandomState};
    // std seeds each hasher from the system's randomness.
    let random = RandomState::new();
    for last in (1..items.len()).rev() {
        let below = u64::try_from(last).unwrap_or(u64::MAX - 1) + 1;
        // Less than `below`, which came from a usize.
        let at = usize::try_from(random.hash_one(last) % below).unwrap_or(last);
        items.swap(at, last);
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shuffle_keeps_all_and_differs_each_time() {
        let sorted: Vec<u32> = (0..1000).collect();
        let [one, other] = [(); 2].map(|()| shuffled(sorted.clone()));
        assert_ne!(one, other);
        for mut shuffle in [one, other] {
            let n_in_place = (0..).zip(&shuffle).filter(|(at, it)| at == *it).count();
            assert!(n_in_place < 50, "{n_in_place} are where they were");
            shuffle.sort_unstable();
            assert_eq!(shuffle, sorted);
        }
        for short in [vec![], vec![7]] {
            assert_eq!(shuffled::<u32>(short.clone()), short);
        }
    }
}
