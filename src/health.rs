//! Judges how well the volumes of a node are, by what its processes have counted.
//!
//! The states are those of Kubernetes' volume health (KEP-1432, as designed anew): they are shown as a
//! metric and as Events of the node until there is an interface to report them by.

use std::collections::BTreeMap;

/// A way in which volumes can be unwell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Pods have volumes that give nothing but errors, or that nobody serves.
    Inaccessible,
    /// Bytes that the origin gave are not those that images name: what was asked for cannot be had.
    DataLoss,
    /// The cache's disk is full or fails: reads go past it.
    Degraded,
    /// No registry has answered for a while: what is not on the node waits.
    StorageUnreachable,
    /// The remote content cache is away, or a registry limits requests or fails some: new data is slow.
    StorageDegraded,
}

impl State {
    /// All states.
    pub const ALL: [Self; 5] = [
        Self::Inaccessible,
        Self::DataLoss,
        Self::Degraded,
        Self::StorageUnreachable,
        Self::StorageDegraded,
    ];

    /// The value of the label `state`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Inaccessible => "inaccessible",
            Self::DataLoss => "data_loss",
            Self::Degraded => "degraded",
            Self::StorageUnreachable => "storage_unreachable",
            Self::StorageDegraded => "storage_degraded",
        }
    }

    /// The reason of an event about it.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Inaccessible => "VolumesInaccessible",
            Self::DataLoss => "VolumesDataLoss",
            Self::Degraded => "VolumesDegraded",
            Self::StorageUnreachable => "VolumesStorageUnreachable",
            Self::StorageDegraded => "VolumesStorageDegraded",
        }
    }

    /// What it means, and what to do.
    pub const fn message(self) -> &'static str {
        match self {
            Self::Inaccessible => {
                "volumes of this node are dead, or nobody serves them: see that the pods of the fuse DaemonSet run, and delete the pods that use dead volumes"
            }
            Self::DataLoss => {
                "a registry or mirror gives bytes that are not those that an image names, so that what needs them fails: push the image again, or mend the mirror"
            }
            Self::Degraded => {
                "the disk of the cache is full or fails, so that reads go past it and are slow: free space, or replace the disk"
            }
            Self::StorageUnreachable => {
                "no registry answers, so that images that are not on this node cannot be read: see the registries, and the way to them"
            }
            Self::StorageDegraded => {
                "the remote content cache does not answer, or a registry fails or limits requests, so that what is not on this node is slow to read"
            }
        }
    }
}

/// What was counted up to a moment: series of a metrics page, as they are written there.
#[derive(Debug, Clone, Default)]
pub struct Counted(BTreeMap<String, f64>);

impl Counted {
    /// Reads a page in Prometheus' text format; what is not of this driver, or no number, is left out.
    pub fn parse(page: &str) -> Self {
        let series = page.lines().filter(|it| it.starts_with("clip_csi_"));
        let series = series.filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Self(series.collect())
    }

    /// The sum of a metric's series that have all of these labels.
    fn sum(&self, metric: &str, labels: &[&str]) -> Option<f64> {
        let found: Vec<f64> = self
            .0
            .iter()
            .filter(|(series, _)| {
                let rest = series.strip_prefix("clip_csi_");
                let rest = rest.and_then(|it| it.strip_prefix(metric));
                rest.is_some_and(|it| {
                    (it.is_empty() || it.starts_with('{'))
                        && labels.iter().all(|label| it.contains(label))
                })
            })
            .map(|(_, value)| *value)
            .collect();
        (!found.is_empty()).then(|| found.iter().sum())
    }
}

/// Says how the volumes are, by what has been counted `before` and `now`, a minute or so later.
///
/// `has_remote` tells a remote content cache that is away from one that is not there.
pub fn assess(before: &Counted, now: &Counted, has_remote: bool) -> Vec<State> {
    let gauge = |metric| now.sum(metric, &[]);
    let grown = |metric, labels: &[&str]| {
        let (old, new) = (before.sum(metric, labels), now.sum(metric, labels));
        // A process that was started anew counts from nothing.
        0.0 < new.unwrap_or(0.0) - old.unwrap_or(0.0)
    };
    let registry = |code: &str| grown("registry_requests_total", &[&format!("code=\"{code}\"")]);
    let answers = ["2xx", "3xx", "4xx"].into_iter().any(registry);
    let fails = registry("error") || registry("5xx");
    State::ALL
        .into_iter()
        .filter(|state| match state {
            // The node service counts volumes; without it the page says nothing of them.
            State::Inaccessible => {
                let has = |metric| gauge(metric).is_some_and(|it| 0.0 < it);
                now.sum("process_start_time_seconds", &["role=\"node\""])
                    .is_some()
                    && (has("dead_volumes") || (has("volumes") && !has("serve_up")))
            }
            State::DataLoss => grown("verify_failures_total", &["tier=\"registry\""]),
            State::Degraded => grown("chunks_served_through_total", &[]),
            State::StorageUnreachable => fails && !answers,
            State::StorageDegraded => {
                (has_remote && gauge("remote_up").is_some_and(|it| it == 0.0))
                    || registry("429")
                    || (fails && answers)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WELL: &str = "# HELP clip_csi_serve_up x\nclip_csi_serve_up 1\nclip_csi_volumes 2\n\
        clip_csi_process_start_time_seconds{role=\"node\"} 1\nclip_csi_dead_volumes 0\nclip_csi_remote_up 1\n\
        clip_csi_verify_failures_total{tier=\"registry\"} 2\nclip_csi_verify_failures_total{tier=\"disk\"} 2\n\
        clip_csi_chunks_served_through_total{reason=\"no_space\"} 5\n\
        clip_csi_registry_requests_total{code=\"2xx\",op=\"blob\"} 7\n\
        clip_csi_registry_requests_total{code=\"error\",op=\"blob\"} 3\nother_metric 1\n";

    #[test]
    fn each_state_has_its_signs() {
        let before = Counted::parse(WELL);
        for (from, to, expected) in [
            ("serve_up 1", "serve_up 1", None),
            ("serve_up 1", "serve_up 0", Some(State::Inaccessible)),
            (
                "dead_volumes 0",
                "dead_volumes 1",
                Some(State::Inaccessible),
            ),
            ("registry\"} 2", "registry\"} 3", Some(State::DataLoss)),
            // What the disk had wrong is read anew.
            ("disk\"} 2", "disk\"} 3", None),
            ("no_space\"} 5", "no_space\"} 6", Some(State::Degraded)),
            ("blob\"} 3", "blob\"} 4", Some(State::StorageUnreachable)),
            ("blob\"} 7", "blob\"} 8", None),
            ("remote_up 1", "remote_up 0", Some(State::StorageDegraded)),
        ] {
            let now = Counted::parse(&WELL.replace(from, to));
            let found = assess(&before, &now, true);
            assert_eq!(found, expected.into_iter().collect::<Vec<_>>(), "{to}");
        }
        let unpublished = WELL
            .replace("_volumes 2", "_volumes 0")
            .replace("serve_up 1", "serve_up 0");
        assert_eq!(assess(&before, &Counted::parse(&unpublished), true), []);
        let silent = WELL
            .replace("role=\"node\"", "role=\"agent\"")
            .replace("serve_up 1", "serve_up 0");
        assert_eq!(assess(&before, &Counted::parse(&silent), true), []);
        let partly = WELL
            .replace("blob\"} 3", "blob\"} 4")
            .replace("blob\"} 7", "blob\"} 8");
        let found = assess(&before, &Counted::parse(&partly), true);
        assert_eq!(found, [State::StorageDegraded]);
        let away = Counted::parse(&WELL.replace("remote_up 1", "remote_up 0"));
        assert_eq!(assess(&before, &away, false), []);
        // Nothing is known of a process that does not answer, and one that is new has lost its counts.
        assert_eq!(assess(&before, &Counted::default(), true), []);
        assert_eq!(assess(&Counted::default(), &Counted::default(), true), []);
    }
}
