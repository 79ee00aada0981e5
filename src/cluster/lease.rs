//! Has one of several replicas lead, by a Lease of `coordination.k8s.io`.
//!
//! As client-go's leader election does it: who leads renews the Lease; another one takes it when it has seen no
//! renewal for as long as the Lease says, by its own clock, so that no two clocks are ever compared. A leader that
//! could not renew stops leading before anybody else may begin. A lease is no fence: a leader that is suspended and
//! wakes may write once more, so what leads must be right with two of its kind for a moment.
//!
//! Of our own, because what there is on crates.io brings a second version of the client or the whole of kube's runtime
//! for what is one object and four rules.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, Client, api::PostParams};
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info, warn};

use crate::telemetry::error_chain;

/// How long a lease is good without a renewal (client-go's default).
const DURATION: Duration = Duration::from_secs(15);

/// How often it is renewed: twice may fail.
const RENEW_EVERY: Duration = Duration::from_secs(4);

/// How old a renewal may be before the leader stops: before another one may begin, with room for what it stops.
const RENEW_DEADLINE: Duration = Duration::from_secs(11);

/// How often one that waits looks.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the lease is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Stands for election.
pub struct Elector {
    leases: Api<Lease>,
    name: String,
    identity: String,
    seen: Option<Sighting>,
}

impl std::fmt::Debug for Elector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Elector")
            .field("name", &self.name)
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

/// A lease as it was seen, and when it was first seen to be so.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sighting {
    version: String,
    at: Instant,
}

/// What to do about a lease.
#[derive(Debug, PartialEq)]
enum Step {
    /// Nobody has made it.
    Create,
    /// It is free, or ours, or was not renewed in time.
    Take,
    /// Somebody has it.
    Wait,
}

/// Decides what to do about a lease that is like this now, and notes when it was first seen so.
fn decide(
    lease: Option<&Lease>,
    identity: &str,
    seen: &mut Option<Sighting>,
    now: Instant,
) -> Step {
    let Some(lease) = lease else {
        return Step::Create;
    };
    let version = lease.metadata.resource_version.clone().unwrap_or_default();
    let first_seen = match seen {
        Some(before) if before.version == version => before.at,
        _ => {
            *seen = Some(Sighting { version, at: now });
            now
        }
    };
    let spec = lease.spec.as_ref();
    let holder = spec.and_then(|it| it.holder_identity.as_deref());
    let seconds = spec.and_then(|it| it.lease_duration_seconds);
    let seconds = seconds.and_then(|it| u64::try_from(it).ok());
    let duration = seconds.map_or(DURATION, Duration::from_secs);
    match holder {
        None | Some("") => Step::Take,
        Some(holder) if holder == identity => Step::Take,
        Some(_) if duration <= now.duration_since(first_seen) => Step::Take,
        Some(_) => Step::Wait,
    }
}

/// The lease as `identity` has it now.
fn taken(lease: Option<Lease>, name: &str, identity: &str, now: Timestamp) -> Lease {
    let before = lease
        .as_ref()
        .and_then(|it| it.spec.clone())
        .unwrap_or_default();
    let is_ours = before.holder_identity.as_deref() == Some(identity);
    let metadata = match lease {
        Some(lease) => lease.metadata,
        None => ObjectMeta {
            name: Some(name.to_owned()),
            ..ObjectMeta::default()
        },
    };
    let transitions = before.lease_transitions.unwrap_or(0);
    Lease {
        metadata,
        spec: Some(LeaseSpec {
            holder_identity: Some(identity.to_owned()),
            lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
            renew_time: Some(MicroTime(now)),
            acquire_time: if is_ours {
                before.acquire_time
            } else {
                Some(MicroTime(now))
            },
            lease_transitions: Some(transitions.saturating_add(i32::from(!is_ours))),
            ..before
        }),
    }
}

impl Elector {
    /// Makes one that is not elected yet. `identity` is this replica's alone, such as its pod's name.
    pub fn new(client: Client, lease: &LeaseName, identity: &str) -> Self {
        Self {
            leases: Api::namespaced(client, &lease.namespace),
            name: lease.name.clone(),
            identity: identity.to_owned(),
            seen: None,
        }
    }

    /// Waits until this replica leads.
    ///
    /// # Cancellation
    /// Safe: a lease that was just taken runs out.
    pub async fn acquire(&mut self) {
        let mut last_error = String::new();
        loop {
            match self.attempt().await {
                Ok(true) => {
                    info!(lease = self.name, identity = self.identity, "leading");
                    return;
                }
                Ok(false) => last_error.clear(),
                Err(reason) => {
                    if reason != last_error {
                        warn!(
                            lease = self.name,
                            error = reason,
                            "no election for now, trying again"
                        );
                        last_error = reason;
                    }
                }
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Renews, and returns when this replica leads no more.
    ///
    /// # Cancellation
    /// Safe.
    pub async fn keep(&mut self) {
        let mut renewed = Instant::now();
        let mut wait = RENEW_EVERY;
        loop {
            sleep(wait).await;
            let began = Instant::now();
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            match timeout(left, self.attempt()).await {
                // Since the request was sent, not since it was answered: that is when others begin to count.
                Ok(Ok(true)) => {
                    renewed = began;
                    wait = RENEW_EVERY;
                    continue;
                }
                Ok(Ok(false)) => {
                    warn!(lease = self.name, "another replica leads");
                    return;
                }
                Ok(Err(reason)) => {
                    debug!(lease = self.name, error = reason, "a renewal failed");
                    wait = LOOK_EVERY;
                }
                Err(_) => {}
            }
            if RENEW_DEADLINE <= renewed.elapsed() + wait {
                warn!(lease = self.name, "no renewal succeeds: leading no more");
                return;
            }
        }
    }

    /// Lets another replica lead at once.
    pub async fn release(&mut self) {
        let release = async {
            let lease = self.leases.get(&self.name).await?;
            let holder = lease
                .spec
                .as_ref()
                .and_then(|it| it.holder_identity.as_ref());
            if holder != Some(&self.identity) {
                return Ok(());
            }
            let mut lease = lease;
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = None;
            }
            let params = PostParams::default();
            let replaced = self.leases.replace(&self.name, &params, &lease).await;
            replaced.map(drop)
        };
        match timeout(ANSWER_TIMEOUT, release).await {
            Ok(Ok(())) => {}
            Ok(Err(err)) => debug!(error = error_chain(&err), "the lease runs out by itself"),
            Err(_) => debug!("the lease runs out by itself"),
        }
    }

    /// Whether this replica has the lease now.
    async fn attempt(&mut self) -> Result<bool, String> {
        let attempt = async {
            let lease = self.leases.get_opt(&self.name).await?;
            let step = decide(
                lease.as_ref(),
                &self.identity,
                &mut self.seen,
                Instant::now(),
            );
            let ours = |lease| taken(lease, &self.name, &self.identity, Timestamp::now());
            let params = PostParams::default();
            let done = match step {
                Step::Wait => return Ok(false),
                Step::Create => self.leases.create(&params, &ours(None)).await,
                Step::Take => self.leases.replace(&self.name, &params, &ours(lease)).await,
            };
            match done {
                Ok(_) => Ok(true),
                // Another one was faster: of two, one has the version that was read.
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
                Err(err) => Err(err),
            }
        };
        match timeout(ANSWER_TIMEOUT, attempt).await {
            Ok(Ok(has_it)) => Ok(has_it),
            Ok(Err(err)) => Err(error_chain(&err).to_string()),
            Err(_) => Err("the Kubernetes API does not answer".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(version: &str, holder: Option<&str>) -> Lease {
        Lease {
            metadata: ObjectMeta {
                resource_version: Some(version.to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: holder.map(str::to_owned),
                lease_duration_seconds: Some(15),
                lease_transitions: Some(3),
                ..LeaseSpec::default()
            }),
        }
    }

    #[test]
    fn a_lease_is_taken_only_if_it_is_free_ours_or_has_stood_still_for_its_duration() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut seen = None;
        let mut step = |lease: Option<&Lease>, seconds| decide(lease, "me", &mut seen, at(seconds));
        assert_eq!(step(None, 0), Step::Create);
        assert_eq!(step(Some(&lease("1", None)), 0), Step::Take);
        assert_eq!(step(Some(&lease("2", Some("me"))), 0), Step::Take);
        let theirs = lease("3", Some("other"));
        assert_eq!(step(Some(&theirs), 100), Step::Wait);
        assert_eq!(step(Some(&theirs), 114), Step::Wait);
        // Renewed: its time begins anew.
        let renewed = lease("4", Some("other"));
        assert_eq!(step(Some(&renewed), 115), Step::Wait);
        assert_eq!(step(Some(&renewed), 129), Step::Wait);
        assert_eq!(step(Some(&renewed), 130), Step::Take);
    }

    #[test]
    fn a_change_of_holder_is_counted_and_a_renewal_is_not() {
        let now = Timestamp::UNIX_EPOCH;
        let taken_over = taken(Some(lease("1", Some("other"))), "l", "me", now);
        let spec = taken_over.spec.clone().unwrap();
        assert_eq!(spec.lease_transitions, Some(4));
        assert_eq!(spec.acquire_time, Some(MicroTime(now)));
        // The version that was read makes the write fail if somebody else was faster.
        assert_eq!(taken_over.metadata.resource_version.as_deref(), Some("1"));
        let later = Timestamp::from_second(60).unwrap();
        let spec = taken(Some(taken_over), "l", "me", later).spec.unwrap();
        assert_eq!(spec.lease_transitions, Some(4));
        assert_eq!(spec.acquire_time, Some(MicroTime(now)));
        assert_eq!(spec.renew_time, Some(MicroTime(later)));
    }

    #[test]
    fn a_leader_stops_before_another_one_may_begin() {
        assert!(RENEW_DEADLINE + LOOK_EVERY < DURATION);
        assert!(RENEW_EVERY * 2 < RENEW_DEADLINE);
    }
}
