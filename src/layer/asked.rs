//! Answers who asks for chunks: each request is a task of the store, and is answered in any case.

use std::{ops::Range, sync::Arc};

use super::store::{Inner, Layer, LayerStore};
use crate::{
    digest::DiffId,
    fair::Claimant,
    tier::{Chunk, LendCallback, MakePresent, PresentCallback, PresentError},
};

/// The store, as the readers of one mount see it.
#[derive(Debug)]
struct OfMount {
    store: LayerStore,
    who: Claimant,
}

impl LayerStore {
    /// Gives the store to the readers of one mount, whose turns are their own. The number is no other
    /// mount's.
    pub fn of_mount(&self, number: u64) -> Arc<dyn MakePresent> {
        Arc::new(OfMount {
            store: self.clone(),
            who: Claimant::Mount(number),
        })
    }

    /// Makes chunks present for `who`: see [`MakePresent::make_present`].
    pub fn make_present_for(
        &self,
        who: Claimant,
        layer: DiffId,
        chunks: Range<u32>,
        done: PresentCallback,
    ) {
        self.answer(layer, done, move |inner, layer| async move {
            inner.present(&layer, chunks, who).await
        });
    }

    /// Lends a chunk to `who`: see [`MakePresent::lend`].
    pub fn lend_to(&self, who: Claimant, wanted: Chunk, done: LendCallback) {
        self.answer(wanted.layer, done, move |inner, layer| async move {
            inner.lend(&layer, wanted, who).await
        });
    }

    /// Has a task do the work on an open layer, and calls `done` with what comes of it.
    fn answer<T: Send + 'static, F>(
        &self,
        layer: DiffId,
        done: Callback<T>,
        work: impl FnOnce(Arc<Inner>, Arc<Layer>) -> F,
    ) where
        F: Future<Output = Result<T, PresentError>> + Send + 'static,
    {
        let mut answer = Answer {
            done: Some(done),
            layer,
        };
        let Some(layer) = self.inner().opened(layer) else {
            return answer.give(Err(PresentError::Unknown { layer }));
        };
        let work = work(Arc::clone(self.inner()), layer);
        self.inner().spawn(async move { answer.give(work.await) });
    }
}

impl MakePresent for OfMount {
    fn make_present(&self, layer: DiffId, chunks: Range<u32>, done: PresentCallback) {
        self.store.make_present_for(self.who, layer, chunks, done);
    }

    fn lend(&self, wanted: Chunk, done: LendCallback) {
        self.store.lend_to(self.who, wanted, done);
    }
}

/// Calls back in any case, also when the task that holds it is aborted.
struct Answer<T> {
    done: Option<Callback<T>>,
    layer: DiffId,
}

type Callback<T> = Box<dyn FnOnce(Result<T, PresentError>) + Send>;

impl<T> Answer<T> {
    fn give(&mut self, outcome: Result<T, PresentError>) {
        if let Some(done) = self.done.take() {
            done(outcome);
        }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        self.give(Err(PresentError::Unknown { layer: self.layer }));
    }
}
