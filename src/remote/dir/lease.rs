//! Keeps leases as files, on file systems where nothing but `link` and `rename` can be relied on.
//!
//! A lease is made by a link, which only one of many makes. What has ended is taken away by a rename;
//! whoever finds that it took away a live one puts it back. In between a third one may make its own:
//! then two work, and the next renewal tells the first one so.

use std::{
    fs, io,
    path::Path,
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use super::{link_if_absent, open, read, tier_error, write_beside};
use crate::{
    disk::temporary_beside,
    remote::format::LeaseRecord,
    tier::{CacheKey, LeaseHolder, TierError},
};

/// Takes or renews the lease at `path`; whether `holder` has it now.
pub(super) fn take(
    path: &Path,
    key: CacheKey,
    holder: LeaseHolder,
    ttl: Duration,
) -> Result<bool, TierError> {
    let now = SystemTime::now();
    let value = LeaseRecord::new(holder, now, ttl).encode();
    let seen = stored(path, key)?;
    let record = seen.as_deref().and_then(LeaseRecord::decode);
    let taken = match (record, seen) {
        (Some(record), _) if record.holder == holder => replace(path, &value).map(|()| true),
        (Some(record), _) if !record.is_over(now, ttl) => Ok(false),
        (_, Some(ended)) => take_away(path, key, &ended).and_then(|()| place(path, &value)),
        (_, None) => place(path, &value),
    };
    taken.map_err(|error| tier_error("leasing", path, &error))
}

/// Removes the lease at `path` if `holder` has it.
pub(super) fn release(path: &Path, key: CacheKey, holder: LeaseHolder) -> Result<(), TierError> {
    let record = stored(path, key)?.as_deref().and_then(LeaseRecord::decode);
    if record.is_none_or(|it| it.holder != holder) {
        return Ok(());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(tier_error("releasing", path, &error))
        }
        _ => Ok(()),
    }
}

fn stored(path: &Path, key: CacheKey) -> Result<Option<Bytes>, TierError> {
    match open(path, key, LeaseRecord::MAX_BYTES)? {
        Some((file, len)) => read(&file, key, len).map(Some),
        None => Ok(None),
    }
}

/// Writes the lease unless there is one; whether it was written.
fn place(path: &Path, value: &str) -> io::Result<bool> {
    let temporary = write_beside(path, value.as_bytes())?;
    let placed = link_if_absent(&temporary, path);
    // A link leaves the first name; a rename does not.
    let _ = fs::remove_file(&temporary);
    placed
}

fn replace(path: &Path, value: &str) -> io::Result<()> {
    let temporary = write_beside(path, value.as_bytes())?;
    fs::rename(&temporary, path)
}

/// Takes away the lease that is `ended`, and no other one.
fn take_away(path: &Path, key: CacheKey, ended: &[u8]) -> io::Result<()> {
    let away = temporary_beside(path);
    match fs::rename(path, &away) {
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        moved => moved?,
    }
    let is_ended = matches!(stored(&away, key), Ok(Some(value)) if value == ended);
    let put_back = match is_ended {
        true => Ok(true),
        // Somebody else had taken the ended one away before, and this is theirs.
        false => link_if_absent(&away, path),
    };
    // A rename in place of the link has removed it.
    let _ = fs::remove_file(&away);
    put_back.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::DiffId;

    const TTL: Duration = Duration::from_secs(15);

    #[test]
    fn a_live_lease_that_was_taken_away_is_put_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease");
        let key = CacheKey::Lease(DiffId::of(b"x"));
        let (first, second) = (LeaseHolder::random(), LeaseHolder::random());
        assert!(take(&path, key, first, TTL).unwrap());
        take_away(&path, key, b"what somebody saw before").unwrap();
        assert!(!take(&path, key, second, TTL).unwrap());
        assert!(take(&path, key, first, TTL).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn one_of_many_has_what_had_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lease");
        let key = CacheKey::Lease(DiffId::of(b"x"));
        for ended in ["garbage", "00000000000000000000000000000001 5\n"] {
            replace(&path, ended).unwrap();
            let holders: Vec<_> = (0..8).map(|_| LeaseHolder::random()).collect();
            let n_taken = std::thread::scope(|scope| {
                let takers: Vec<_> = holders
                    .iter()
                    .map(|it| scope.spawn(|| take(&path, key, *it, TTL)))
                    .collect();
                let taken = takers.into_iter().map(|it| it.join().unwrap().unwrap());
                taken.filter(|is_taken| *is_taken).count()
            });
            assert_ne!(n_taken, 0, "{ended}");
            // Whatever the race was, one of them has it.
            let renewed = holders.iter().map(|it| take(&path, key, *it, TTL).unwrap());
            assert_eq!(renewed.filter(|it| *it).count(), 1, "{ended}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }
}
