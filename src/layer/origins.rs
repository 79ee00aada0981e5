//! Where a layer's bytes come from: the origins of those who have it open, and the order in which they
//! are asked.
//!
//! Images share layers, and each comes with a registry and credentials of its own. A token may have ended
//! meanwhile, a registry may be away, and nobody has compared the blob that an image's manifest names
//! with the DiffID that its configuration names beside it. So what one origin cannot give is asked of
//! the next ([`Inner::try_origins`]), and what comes is verified whoever it comes from.
//!
//! First come those that worked, the last one before the others; then those that nobody has asked yet,
//! the newest first; then those that failed. That somebody mounts an image puts no origin before one that
//! works: who adopts a mount asks no registry. Those whose blob is not the one that the layer's access map
//! is of come after all others: they may be right, but nobody has seen it.
//!
//! They are dropped with the layer, when nobody has it open any more.

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::{
    access::Access,
    reach::{Answered, Reach},
    store::{Inner, Layer},
};
use crate::{
    digest::BlobDigest,
    fair::Claimant,
    telemetry::error_chain,
    tier::{BlobSource, BlobStream, LayerDesc, PresentError, SourceIdentity},
};

/// Origins that are kept of a layer: each keeps a session with its credentials, some kilobytes.
const MAX_ORIGINS: usize = 8;

/// Where a layer comes from: its blob, and a source with the credentials of somebody who opened it.
#[derive(Debug, Clone)]
pub(super) struct Origin {
    pub(super) desc: LayerDesc,
    pub(super) source: Arc<dyn BlobSource>,
    identity: Option<SourceIdentity>,
    /// Whether it answers.
    pub(super) reach: Arc<Reach>,
}

impl Origin {
    pub(super) fn new(desc: &LayerDesc, source: Arc<dyn BlobSource>) -> Self {
        Self {
            desc: desc.clone(),
            identity: source.identity(),
            source,
            reach: Arc::default(),
        }
    }

    /// Those who want the image that the source is of.
    pub(super) fn claimant(&self) -> Claimant {
        // No other source has its address as long as this one waits for a turn.
        Claimant::Image(Arc::as_ptr(&self.source).addr() as u64)
    }

    /// Opens a part of the blob.
    pub(super) async fn open(&self, range: Range<u64>) -> Result<BlobStream, PresentError> {
        let LayerDesc {
            diff_id,
            blob,
            blob_bytes,
            ..
        } = &self.desc;
        let opened = self.source.open(blob, *blob_bytes, range).await;
        let answer = match &opened {
            Ok(_) => Answered::Yes,
            Err(_) => Answered::No,
        };
        self.reach.note(answer, Instant::now());
        opened.map_err(|source| PresentError::Origin {
            layer: *diff_id,
            source,
        })
    }

    /// Opens all of the blob.
    pub(super) async fn open_all(&self) -> Result<BlobStream, PresentError> {
        self.open(0..self.desc.blob_bytes).await
    }

    /// Whether a fill that failed with `err` is worth another attempt at once: the bytes were
    /// wrong, and may have been a mirror's.
    pub(super) fn distrusts(&self, err: &PresentError) -> bool {
        let is_wrong = matches!(
            err,
            PresentError::Refused { .. } | PresentError::Limit { .. }
        );
        let again = is_wrong && self.source.distrust(&self.desc.blob);
        if again {
            warn!(layer.diff_id = %self.desc.diff_id, layer.blob = %self.desc.blob,
                error = %err, "layer came wrong, reading it from its registry and no mirror");
        }
        again
    }

    /// Whether one of the two is enough.
    fn is_like(&self, other: &Self) -> bool {
        let is_same_source = match (&self.identity, &other.identity) {
            (Some(own), Some(others)) => own == others,
            (None, _) | (_, None) => Arc::ptr_eq(&self.source, &other.source),
        };
        is_same_source && self.blob() == other.blob()
    }

    fn blob(&self) -> (BlobDigest, u64) {
        (self.desc.blob, self.desc.blob_bytes)
    }
}

/// What came of an origin so far; the earlier ones are asked first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Standing {
    Worked,
    Untried,
    Failed,
}

/// The origins of an open layer.
#[derive(Debug)]
pub(super) struct Origins(
    /// std Mutex: held to copy or to reorder a short list, never across an await.
    Mutex<State>,
);

#[derive(Debug)]
struct State {
    /// By their standing; never none.
    known: Vec<(Origin, Standing)>,
    /// The blob that the layer's access map is of, which was seen to be the layer.
    mapped: Option<(BlobDigest, u64)>,
}

impl Origins {
    pub(super) fn new(origin: &Origin) -> Self {
        Self(Mutex::new(State {
            known: vec![(origin.clone(), Standing::Untried)],
            mapped: None,
        }))
    }

    /// Adds the origin of somebody who opens the layer, or takes it for the one that is like it; says
    /// whether its blob is another than all so far.
    ///
    /// One that gives way comes in nobody's place, and goes when another comes.
    pub(super) fn renew(&self, origin: &Origin) -> bool {
        if origin.source.gives_way() {
            return false;
        }
        let mut state = self.state();
        let mut origin = origin.clone();
        let of_blob = |it: &&mut (Origin, Standing)| it.0.blob() == origin.blob();
        let same_blob: Vec<_> = state.known.iter_mut().filter(of_blob).collect();
        let is_new_blob = same_blob.is_empty();
        // What is known of the blob's table stays known: who adopts a mount does not know it.
        let toc = origin.desc.toc;
        let toc = toc.or_else(|| same_blob.iter().find_map(|it| it.0.desc.toc));
        same_blob.into_iter().for_each(|it| it.0.desc.toc = toc);
        origin.desc.toc = toc;
        state.known.retain(|it| !it.0.source.gives_way());
        let mut known = state.known.iter();
        let standing = match known.position(|it| it.0.is_like(&origin)) {
            // A new session may be let in where the former one was not.
            Some(at) => state.known.remove(at).1.min(Standing::Untried),
            None => Standing::Untried,
        };
        state.make_room();
        state.place(origin, standing);
        is_new_blob
    }

    /// Whether they name several blobs, and it is not known yet which one is the layer.
    pub(super) fn differ(&self) -> bool {
        let state = self.state();
        let mut blobs = state.known.iter().map(|it| it.0.blob());
        let first = blobs.next();
        state.mapped.is_none() && blobs.any(|it| Some(it) != first)
    }

    /// Hears that the layer's access map is of `access`' blob.
    pub(super) fn is_mapped(&self, access: &Access) {
        self.state().mapped = Some(access.blob());
    }

    /// The one that is asked first.
    pub(super) fn first(&self) -> Origin {
        let state = self.state();
        let mut known = state.known.iter().map(|it| &it.0);
        let fits = known.find(|it| state.fits(it));
        fits.unwrap_or(&state.known[0].0).clone()
    }

    /// All of them, in the order in which they are asked.
    pub(super) fn in_order(&self) -> Vec<Origin> {
        let state = self.state();
        let mut origins: Vec<_> = state.known.iter().map(|it| it.0.clone()).collect();
        origins.sort_by_key(|it| !state.fits(it));
        origins
    }

    /// Those whose blob is the layer, as far as that is known; all, if it is known of none.
    pub(super) fn trusted(&self) -> Vec<Origin> {
        let mut origins = self.in_order();
        let state = self.state();
        if origins.first().is_some_and(|it| state.fits(it)) {
            origins.retain(|it| state.fits(it));
        }
        origins
    }

    /// Whether `access` is of a blob that can be asked for.
    pub(super) fn have(&self, access: &Access) -> bool {
        let state = self.state();
        state.known.iter().any(|it| access.is_of(&it.0.desc))
    }

    /// Hears that `origin` gave the layer when it was made.
    pub(super) fn worked(&self, origin: &Origin) {
        self.note(origin, Standing::Worked);
    }

    /// Puts an origin where it belongs after it worked or failed, and says what it was taken for before:
    /// `None` if it was dropped or replaced meanwhile.
    fn note(&self, origin: &Origin, standing: Standing) -> Option<Standing> {
        let mut state = self.state();
        let mut known = state.known.iter();
        let at = known.position(|it| Arc::ptr_eq(&it.0.reach, &origin.reach))?;
        let (origin, before) = state.known.remove(at);
        state.place(origin, standing);
        Some(before)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn fits(&self, origin: &Origin) -> bool {
        self.mapped.is_none_or(|it| it == origin.blob())
    }

    /// Drops one of too many: one that does not fit, or else the last.
    fn make_room(&mut self) {
        if self.known.len() < MAX_ORIGINS {
            return;
        }
        let unfit = self.known.iter().rposition(|it| !self.fits(&it.0));
        self.known.remove(unfit.unwrap_or(MAX_ORIGINS - 1));
    }

    /// Puts one before all others of its standing; behind them, if it failed.
    fn place(&mut self, origin: Origin, standing: Standing) {
        let at = match standing {
            Standing::Worked | Standing::Untried => {
                self.known.partition_point(|it| it.1 < standing)
            }
            Standing::Failed => self.known.len(),
        };
        self.known.insert(at, (origin, standing));
    }
}

/// How long origins are asked one after the other: as long as whoever waits for the layer bears that
/// nothing comes.
#[derive(Debug)]
struct Patience {
    limit: Duration,
    since: Instant,
    absent_bytes: u64,
}

impl Patience {
    /// Whether another origin is to be asked, now that so much of the layer is absent.
    fn lasts(&mut self, absent_bytes: u64, now: Instant) -> bool {
        if absent_bytes < self.absent_bytes {
            self.since = now;
        }
        self.absent_bytes = absent_bytes;
        now.saturating_duration_since(self.since) < self.limit
    }
}

impl Inner {
    /// Has `attempt` made with one origin of `layer` after the other, until one gives what is wanted; of
    /// those alone whose blob `access` is of, if that is how it is read.
    ///
    /// Each is asked once, or twice if its mirror may be at fault, and none any more when nothing has come
    /// for as long as a reader waits.
    ///
    /// # Errors
    /// That of the first that was asked: the others were in its place. At once, what is not an origin's fault.
    pub(super) async fn try_origins<T, F>(
        &self,
        layer: &Layer,
        access: Option<&Access>,
        mut attempt: impl FnMut(Origin) -> F,
    ) -> Result<T, PresentError>
    where
        F: Future<Output = Result<T, PresentError>>,
    {
        let mut patience = Patience {
            limit: Duration::from_secs(self.config.stall_timeout_seconds),
            since: Instant::now(),
            absent_bytes: layer.file.absent_bytes(),
        };
        let mut origins = layer.origins.in_order();
        origins.retain(|it| access.is_none_or(|access| access.is_of(&it.desc)));
        let mut origins = origins.into_iter();
        let mut first_failure = None;
        while let Some(origin) = origins.next() {
            let err = loop {
                match attempt(origin.clone()).await {
                    Ok(given) => {
                        layer.origins.note(&origin, Standing::Worked);
                        return Ok(given);
                    }
                    Err(err) if origin.distrusts(&err) => {}
                    Err(err) => break err,
                }
            };
            if !is_of_origin(&err) {
                return Err(err);
            }
            let before = layer.origins.note(&origin, Standing::Failed);
            let goes_on =
                0 < origins.len() && patience.lasts(layer.file.absent_bytes(), Instant::now());
            if goes_on {
                origin.left(&err, before);
            }
            first_failure.get_or_insert(err);
            if !goes_on {
                break;
            }
        }
        Err(first_failure.unwrap_or_else(|| PresentError::Refused {
            layer: layer.file.diff_id(),
            reason: "no image in use names the blob of its access map any more".to_owned(),
        }))
    }
}

impl Origin {
    /// Logs that the next one is asked in its place: once, and again when it has worked meanwhile.
    fn left(&self, err: &PresentError, before: Option<Standing>) {
        let origin = self.identity.as_ref().map(|it| it.repository.as_str());
        let desc = &self.desc;
        match before {
            Some(Standing::Worked | Standing::Untried) => {
                warn!(layer.diff_id = %desc.diff_id, layer.blob = %desc.blob, origin, error = error_chain(err),
                    "an origin of a layer failed, asking that of another image");
            }
            Some(Standing::Failed) | None => {
                debug!(layer.diff_id = %desc.diff_id, layer.blob = %desc.blob, origin, error = error_chain(err),
                    "an origin of a layer failed again");
            }
        }
    }
}

/// Whether another origin may do better: it has other credentials, another registry, or another blob.
fn is_of_origin(err: &PresentError) -> bool {
    match err {
        PresentError::Origin { .. } | PresentError::Refused { .. } | PresentError::Limit { .. } => {
            true
        }
        PresentError::NoSpace { .. }
        | PresentError::CacheFull { .. }
        | PresentError::Disk { .. }
        | PresentError::Timeout { .. }
        | PresentError::Unknown { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        digest::DiffId,
        tier::{BoxFuture, SourceError, Toc, TocKind},
    };

    /// Gives nothing.
    #[derive(Debug)]
    struct Source {
        gives_way: bool,
    }

    impl BlobSource for Source {
        fn open<'a>(
            &'a self,
            _: &'a BlobDigest,
            _: u64,
            _: Range<u64>,
        ) -> BoxFuture<'a, Result<BlobStream, SourceError>> {
            Box::pin(std::future::pending())
        }

        fn gives_way(&self) -> bool {
            self.gives_way
        }
    }

    #[test]
    fn who_warms_makes_way_and_what_is_known_of_a_table_stays() {
        let toc = Toc {
            kind: TocKind::Estargz,
            digest: BlobDigest::of(b"table"),
        };
        let origin = |gives_way, toc| {
            let desc = LayerDesc {
                diff_id: DiffId::of(b"tar"),
                blob: BlobDigest::of(b"blob"),
                blob_bytes: 4,
                toc,
            };
            Origin::new(&desc, Arc::new(Source { gives_way }))
        };
        let origins = Origins::new(&origin(true, Some(toc)));
        let seen = || {
            let known = origins.in_order().into_iter();
            let seen = known.map(|it| (it.source.gives_way(), it.desc.toc));
            seen.collect::<Vec<_>>()
        };
        assert_eq!(seen(), [(true, Some(toc))]);
        assert!(!origins.renew(&origin(false, None)), "the same blob");
        assert_eq!(seen(), [(false, Some(toc))]);
        origins.renew(&origin(true, None));
        assert_eq!(seen(), [(false, Some(toc))]);
        origins.renew(&origin(false, None));
        assert_eq!(seen(), [(false, Some(toc)); 2]);
    }

    #[test]
    fn others_are_asked_as_long_as_readers_wait_for_something_to_come() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut patience = Patience {
            limit: Duration::from_secs(60),
            since: start,
            absent_bytes: 10,
        };
        assert!(patience.lasts(10, after(59)) && !patience.lasts(10, after(60)));
        // Something came: they wait anew. What is evicted meanwhile is nothing that came.
        assert!(patience.lasts(9, after(100)) && patience.lasts(12, after(159)));
        assert!(!patience.lasts(12, after(160)));
    }
}
