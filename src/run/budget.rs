//! Says how many volumes a node can have, by what the node service may use.

use std::fs;

use rustix::process::{Resource, getrlimit};

/// File descriptors of the node service besides those of volumes: sockets, the log, files for a moment.
const OTHER_DESCRIPTORS: u64 = 128;

/// Memory of the node service besides that of volumes: ten times what it has without any.
const OTHER_BYTES: u64 = 64 << 20;

/// Memory that a volume of an image of its own takes at most. On Linux 6.18, with 60 images of one layer, it
/// was 5 KiB here and 4 KiB in the kernel; the server, whose limits are not known here, took 46 KiB. So this
/// bounds both where they have the same limit.
const BYTES_PER_VOLUME: u64 = 64 << 10;

/// Where a container finds its limit (cgroup v2).
const MEMORY_LIMIT: &str = "/sys/fs/cgroup/memory.max";

/// How many volumes are allowed: what is configured, or else as many as this process can have. 0 stands for
/// any number.
pub(super) fn max_volumes(configured: u32) -> u32 {
    if 0 < configured {
        return configured;
    }
    let memory = fs::read_to_string(MEMORY_LIMIT).ok();
    let memory = memory.and_then(|it| it.trim().parse().ok());
    fitting(getrlimit(Resource::Nofile).current, memory)
}

/// How many volumes fit into a number of file descriptors and of bytes; `None` is no limit.
fn fitting(descriptors: Option<u64>, memory_bytes: Option<u64>) -> u32 {
    // Each volume may have an image of its own, whose connection is held by one descriptor.
    let by_descriptors = descriptors.map(|it| it.saturating_sub(OTHER_DESCRIPTORS));
    let by_memory = memory_bytes.map(|it| it.saturating_sub(OTHER_BYTES) / BYTES_PER_VOLUME);
    let fitting = [by_descriptors, by_memory].into_iter().flatten().min();
    // 0 would mean any number: a node service that has nothing left can still have one.
    fitting.map_or(0, |it| u32::try_from(it.max(1)).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_scarcer_decides() {
        for (descriptors, memory_bytes, want) in [
            (None, None, 0),
            (Some(1024), None, 896),
            (Some(1024), Some(1 << 30), 896),
            (Some(1 << 20), Some(128 << 20), 1024),
            (Some(1 << 20), Some(32 << 20), 1),
            (Some(64), None, 1),
            (Some(u64::MAX), None, u32::MAX),
        ] {
            assert_eq!(fitting(descriptors, memory_bytes), want);
        }
        assert_eq!(max_volumes(7), 7);
    }
}
