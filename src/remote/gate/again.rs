//! Asks for a value again that a reader waits for unusually long: `hedge` says when, and how often.

use std::{
    sync::{MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::{Either, select};
use tracing::debug;

use super::{Gate, Got, Ticket};
use crate::{
    fair::Claimant,
    remote::{breaker::Admission, hedge::Hedging},
    tier::CacheKey,
};

impl Gate {
    /// Whether a read is asked for a second time if it takes long, and how long it is waited for until then:
    /// only what a reader waits for, of a remote that is up.
    pub(super) fn hedges(&self, who: Claimant, ticket: &Ticket<'_>) -> Option<Duration> {
        let is_reader = matches!(who, Claimant::Mount(_));
        if !is_reader || ticket.reach != Admission::Pass {
            return None;
        }
        Some(self.hedging().wait().unwrap_or(Duration::MAX))
    }

    /// Waits for a value that was `asked` for, and asks for it again if it does not come for too long; says
    /// whether the second request has answered.
    pub(super) async fn hedged(
        &self,
        mut asked: impl Future<Output = Got> + Unpin,
        wait: Duration,
        who: Claimant,
        key: CacheKey,
        max_bytes: usize,
    ) -> (Got, bool) {
        let second = async {
            tokio::time::sleep(wait).await;
            // Not one of the turns for values: who holds those may all wait here.
            let turn = self.again.take(who).await;
            let is_up = self.health().reach.is_up();
            let again = self.backend.get_again(key, max_bytes)?;
            (is_up && self.hedging().spend()).then_some((turn, again))
        };
        let second = tokio::select! {
            biased;
            got = &mut asked => return (got, false),
            second = second => second,
        };
        let Some((_turn, again)) = second else {
            return (asked.await, false);
        };
        debug!(%key, ?wait, engine = self.engine(), "remote cache takes long, asking again");
        let (got, is_second) = match select(asked, again).await {
            Either::Left((Err(_), again)) => (again.await, true),
            Either::Left((got, _)) => (got, false),
            Either::Right((Err(_), asked)) => (asked.await, false),
            Either::Right((got, _)) => (got, true),
        };
        let outcome = if is_second { "won" } else { "lost" };
        let counter = self.metrics.remote_hedges.with_label_values(&[outcome]);
        counter.inc();
        (got, is_second)
    }

    /// Notes how long a read took that may be hedged.
    pub(super) fn note(&self, started: Duration, got: &Got) {
        if let Ok(Some(_)) = got {
            let took = self.clock.now().saturating_sub(started);
            self.hedging().note(took);
        }
    }

    fn hedging(&self) -> MutexGuard<'_, Hedging> {
        // Nothing panics with the lock held.
        self.hedging.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
