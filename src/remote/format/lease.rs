//! The value of a lease in stores that know no expiry: who has it, and until when.
//!
//! Times are of the nodes' clocks. Clocks that differ by more than a lease's time to live make
//! leases useless, never wrong: see [`LeaseRecord::is_over`].

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::tier::LeaseHolder;

/// Who has a lease, until when: `<holder, 32 hex digits> <milliseconds since 1970>\n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::remote) struct LeaseRecord {
    pub(in crate::remote) holder: LeaseHolder,
    /// Since 1970.
    ends: Duration,
}

impl LeaseRecord {
    /// Bytes of a record at most.
    pub(in crate::remote) const MAX_BYTES: usize = 64;

    /// A lease of `holder` from `now` on.
    pub(in crate::remote) fn new(holder: LeaseHolder, now: SystemTime, ttl: Duration) -> Self {
        let ends = since_1970(now).saturating_add(ttl);
        Self { holder, ends }
    }

    pub(in crate::remote) fn encode(&self) -> String {
        format!("{} {}\n", self.holder, self.ends.as_millis())
    }

    /// Reads a record; `None` for what is none, which nobody holds.
    pub(in crate::remote) fn decode(value: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?;
        let (holder, ends) = text.trim_end().split_once(' ')?;
        Some(Self {
            holder: holder.parse().ok()?,
            ends: Duration::from_millis(ends.parse().ok()?),
        })
    }

    /// Whether the lease has ended by `now`, or ends so late that no holder can have meant it:
    /// nobody is to wait for ever because a clock was wrong once.
    pub(in crate::remote) fn is_over(&self, now: SystemTime, ttl: Duration) -> bool {
        let now = since_1970(now);
        self.ends <= now || now.saturating_add(ttl.saturating_mul(2)) < self.ends
    }
}

fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(15);

    #[test]
    fn records_are_written_as_documented_and_read_back() {
        let holder: LeaseHolder = "00000000000000000000000000000abc".parse().unwrap();
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let record = LeaseRecord::new(holder, now, TTL);
        let text = "00000000000000000000000000000abc 1000015000\n";
        assert_eq!(record.encode(), text);
        assert_eq!(LeaseRecord::decode(text.as_bytes()), Some(record));
        assert!(text.len() <= LeaseRecord::MAX_BYTES);
    }

    #[test]
    fn what_is_no_record_is_held_by_nobody() {
        for value in [
            "",
            " ",
            "abc",
            "abc -1",
            "xyz 1",
            "abc 1 2",
            "abc 99999999999999999999999",
        ] {
            assert_eq!(LeaseRecord::decode(value.as_bytes()), None, "{value:?}");
        }
        assert_eq!(LeaseRecord::decode(&[0xff; 40]), None);
    }

    #[test]
    fn leases_end_and_wrong_clocks_hold_none_for_ever() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let record = LeaseRecord::new(LeaseHolder::random(), now, TTL);
        for (later, is_over) in [(0, false), (14, false), (15, true), (1000, true)] {
            let then = now + Duration::from_secs(later);
            assert_eq!(record.is_over(then, TTL), is_over, "{later}");
        }
        for (earlier, is_over) in [(15, false), (16, true), (1000, true)] {
            let then = now - Duration::from_secs(earlier);
            assert_eq!(record.is_over(then, TTL), is_over, "-{earlier}");
        }
    }
}
