//! Keeps leases as objects, on servers that put on a condition: `If-None-Match` and `If-Match`.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use object_store::{Error, ObjectStoreExt as _, PutMode, UpdateVersion, path::Path};
use tracing::info;

use super::{Fault, S3Cache};
use crate::{
    remote::format::LeaseRecord,
    tier::{CacheKey, LeaseHolder, TierError},
};

/// HTTP's "not implemented": the server knows the condition and does not support it.
const NOT_IMPLEMENTED: u16 = 501;

impl S3Cache {
    /// Takes or renews a lease; granted to everybody where the server knows no conditions.
    pub(super) async fn take_lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
        ttl: Duration,
    ) -> Result<bool, TierError> {
        if !self.honours_conditions().await? {
            return Ok(true);
        }
        let now = SystemTime::now();
        let value = LeaseRecord::new(holder, now, ttl).encode();
        let mode = match self.stored_lease(key).await? {
            None => PutMode::Create,
            Some((Some(record), _)) if record.holder != holder && !record.is_over(now, ttl) => {
                return Ok(false);
            }
            Some((_, version)) => PutMode::Update(version),
        };
        let path = self.path(key);
        let put = self.put_opts(&path, value.into(), mode);
        match self.timed(0, put).await? {
            Ok(_) => Ok(true),
            // Somebody else was faster.
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(false),
            Err(error) => Err(self.tier_error(&error)),
        }
    }

    /// Deletes a lease if `holder` has it.
    pub(super) async fn release_lease(
        &self,
        key: CacheKey,
        holder: LeaseHolder,
    ) -> Result<(), TierError> {
        match self.stored_lease(key).await? {
            // Deleting knows no condition; the lease may have ended and be somebody else's by now,
            // who then learns it from the renewal.
            Some((Some(record), _)) if record.holder == holder => self.delete_value(key).await,
            _ => Ok(()),
        }
    }

    /// The lease, if it can be read, and its version.
    async fn stored_lease(
        &self,
        key: CacheKey,
    ) -> Result<Option<(Option<LeaseRecord>, UpdateVersion)>, TierError> {
        let Some((value, version)) = self.fetch(key, LeaseRecord::MAX_BYTES).await? else {
            return Ok(None);
        };
        Ok(Some((LeaseRecord::decode(&value), version)))
    }

    /// Whether the server puts on a condition: found out once, at a name that nobody uses.
    ///
    /// There are servers that ignore the condition, and put.
    pub(super) async fn honours_conditions(&self) -> Result<bool, TierError> {
        let probed = self.honours_conditions.get_or_try_init(|| async {
            let path = self.probe_path();
            let honours = self.probe(&path).await;
            // A probe that is left behind is some bytes for the bucket's lifecycle rule.
            let _ = self.timed(0, self.store.delete(&path)).await;
            if let Ok(honours) = honours {
                info!(
                    bucket = self.bucket(),
                    honours, "asked whether S3 puts on a condition"
                );
            }
            honours
        });
        probed.await.copied()
    }

    async fn probe(&self, path: &Path) -> Result<bool, TierError> {
        let put = async |mode| {
            let value = Bytes::from_static(b"probe");
            self.timed(0, self.put_opts(path, value, mode)).await
        };
        if let Err(error) = put(PutMode::Create).await? {
            return self.unless_unsupported(&error);
        }
        let is_refused = |error: &Error| {
            matches!(
                error,
                Error::AlreadyExists { .. } | Error::Precondition { .. }
            )
        };
        let other = UpdateVersion {
            e_tag: Some("\"00000000000000000000000000000000\"".to_owned()),
            version: None,
        };
        for mode in [PutMode::Create, PutMode::Update(other)] {
            match put(mode).await? {
                Err(error) if is_refused(&error) => {}
                Err(error) => return self.unless_unsupported(&error),
                Ok(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    fn unless_unsupported(&self, error: &Error) -> Result<bool, TierError> {
        match Fault::of(error) {
            Some(Fault::Refused { status, .. }) if *status == NOT_IMPLEMENTED => Ok(false),
            _ => Err(self.tier_error(error)),
        }
    }
}
