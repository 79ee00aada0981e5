//! The remote content cache: engines against one conformance kit, and all of it against a store
//! that lies, dies or fills up.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in #[test] only, not in helpers"
)]

mod ahead;
mod conformance;
mod content;
mod documents;
mod fairness;
mod fixture;
mod hedge;
mod lease;
mod proxy;
mod reading;
mod redis_cluster;
mod redis_engine;
mod s3_engine;
mod servers;
mod upload;
