//! Lets nodes that want the same layer at once have it made by one of them.
//!
//! The one that holds the layer's lease makes it from the registry and uploads it; the others look
//! every now and then whether its manifest has come. They also try the lease each time, because the
//! holder may have died or given up.
//!
//! A lease spares work and decides nothing: a node that waited too long, or whose remote is broken,
//! makes the layer itself, and two that do so at once store the same values.

use std::{convert::Infallible, sync::Arc, time::Duration};

use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, info};

use super::{
    content::{ContentCache, hit},
    format::RemoteManifest,
    gate::random,
};
use crate::{
    digest::DiffId,
    tier::{CacheKey, LeaseHolder},
};

/// The first pause between two looks at the manifest: a small layer is made and uploaded by then.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest: 100 nodes that wait then ask for some 270 leases and as many manifests a second.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Renewals in a lease's time to live: two may fail before it ends.
const RENEWALS_PER_TTL: u32 = 3;

/// What became of the attempt to take a layer's lease.
#[derive(Debug)]
pub enum LeaseOutcome {
    /// This node has it, until the guard is dropped.
    Held(LeaseGuard),
    /// Another one has it.
    Elsewhere,
    /// The remote cannot say: go on without.
    Unavailable,
}

/// Who makes a layer that the remote did not have.
#[derive(Debug)]
pub enum Turn {
    /// Another node has made it meanwhile.
    Made(Arc<RemoteManifest>),
    /// This one, and others wait until the guard is dropped: hand it to the upload.
    Ours(LeaseGuard),
    /// This one, and nobody waits for it.
    Alone,
}

/// A layer's lease: renewed until this is dropped, then released.
#[derive(Debug)]
pub struct LeaseGuard {
    /// Dropped with the guard, which tells the task that renews.
    _held: oneshot::Sender<Infallible>,
}

impl ContentCache {
    /// Tries to take the layer's lease. Must be called inside a tokio runtime.
    ///
    /// # Cancellation
    /// Safe: what an abandoned call has taken ends by itself, after `lease_ttl`.
    pub async fn lease(&self, diff_id: &DiffId) -> LeaseOutcome {
        self.lease_as(LeaseHolder::random(), diff_id).await
    }

    async fn lease_as(&self, holder: LeaseHolder, diff_id: &DiffId) -> LeaseOutcome {
        let key = CacheKey::Lease(*diff_id);
        let ttl = self.options().lease_ttl;
        match self.gate().lease(key, holder, ttl).await {
            Ok(true) => {
                let (held, ended) = oneshot::channel();
                // Nobody awaits it: it ends by itself, a request's time after the guard at most.
                tokio::spawn(keep(self.clone(), *diff_id, holder, ended));
                LeaseOutcome::Held(LeaseGuard { _held: held })
            }
            Ok(false) => LeaseOutcome::Elsewhere,
            Err(refusal) => {
                debug!(layer.diff_id = %diff_id, ?refusal, "remote cache gives no lease");
                LeaseOutcome::Unavailable
            }
        }
    }

    /// Takes the layer's lease, or waits for the node that has it, `lease_wait` at most.
    ///
    /// Ask after [`manifest`](Self::manifest) found none. If it found one that is of no use, name it
    /// as `useless`: then another one is waited for.
    ///
    /// # Cancellation
    /// Safe, as for [`lease`](Self::lease).
    pub async fn turn(&self, diff_id: &DiffId, useless: Option<&RemoteManifest>) -> Turn {
        let lease_wait = self.options().lease_wait;
        if lease_wait.is_zero() {
            return Turn::Alone;
        }
        let started = Instant::now();
        let holder = LeaseHolder::random();
        let mut pause = FIRST_PAUSE;
        let mut has_waited = false;
        let (turn, outcome) = loop {
            match self.lease_as(holder, diff_id).await {
                // Its holder before may have ended between our look and our lease.
                LeaseOutcome::Held(lease) => match self.new_manifest(diff_id, useless).await {
                    Some(manifest) => break (Turn::Made(manifest), "made"),
                    None => break (Turn::Ours(lease), "taken"),
                },
                LeaseOutcome::Elsewhere => {}
                LeaseOutcome::Unavailable => break (Turn::Alone, "error"),
            }
            if !has_waited {
                info!(layer.diff_id = %diff_id, "another node makes the layer, waiting for it");
                has_waited = true;
            }
            let next = jittered(pause);
            if lease_wait < started.elapsed() + next {
                break (Turn::Alone, "timeout");
            }
            sleep(next).await;
            pause = (pause * 3 / 2).min(LONGEST_PAUSE);
            if let Some(manifest) = self.new_manifest(diff_id, useless).await {
                break (Turn::Made(manifest), "made");
            }
        };
        if has_waited {
            let waits = &self.metrics().remote_lease_waits;
            waits.with_label_values(&[outcome]).inc();
            let waited_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            info!(layer.diff_id = %diff_id, outcome, duration_ms = waited_ms,
                "waited for another node to make the layer");
        }
        turn
    }

    /// The manifest, if there is one that is not `useless`.
    async fn new_manifest(
        &self,
        diff_id: &DiffId,
        useless: Option<&RemoteManifest>,
    ) -> Option<Arc<RemoteManifest>> {
        match self.stored_manifest(diff_id).await {
            Ok(Some(manifest)) if useless != Some(&manifest) => Some(hit(manifest)),
            // What is wrong was counted and logged when it was found first.
            Ok(_) | Err(_) => None,
        }
    }
}

/// Renews a lease until its guard is dropped, then releases it.
async fn keep(
    cache: ContentCache,
    diff_id: DiffId,
    holder: LeaseHolder,
    mut ended: oneshot::Receiver<Infallible>,
) {
    let key = CacheKey::Lease(diff_id);
    let ttl = cache.options().lease_ttl;
    while timeout(ttl / RENEWALS_PER_TTL, &mut ended).await.is_err() {
        match cache.gate().lease(key, holder, ttl).await {
            Ok(true) => {}
            Ok(false) => {
                debug!(layer.diff_id = %diff_id, "lease was lost, another node makes the layer, too");
                return;
            }
            // The next one may succeed; if none does, it ends by itself.
            Err(refusal) => debug!(layer.diff_id = %diff_id, ?refusal, "lease was not renewed"),
        }
    }
    if let Err(refusal) = cache.gate().release(key, holder).await {
        debug!(layer.diff_id = %diff_id, ?refusal, "lease was not released, it ends by itself");
    }
}

/// Between half of `pause` and all of it, so that nodes that began at once do not ask at once.
fn jittered(pause: Duration) -> Duration {
    let share = u32::try_from(random() % 1000).unwrap_or(0);
    pause / 2 + pause / 2000 * share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_jittered_within_half() {
        for _ in 0..1000 {
            let pause = jittered(FIRST_PAUSE);
            assert!(
                (FIRST_PAUSE / 2..=FIRST_PAUSE).contains(&pause),
                "{pause:?}"
            );
        }
    }
}
