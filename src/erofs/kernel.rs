//! Says which kernels can be trusted with files below EROFS.
//!
//! Before the fix of March 2026 ("erofs: set fileio bio failed in short read case", Linux 7.0), a process
//! that was killed while it read left zeros in the page cache where it had not come to, and all others who
//! read the file were given those. Other series of kernels have the fix from the versions below on.

use std::fs;

/// From which patch level on a series of kernels has the fix.
const FIXED: [((u32, u32), u32); 3] = [((6, 12), 80), ((6, 18), 21), ((6, 19), 11)];

/// The first series that has it from its start.
const FIXED_SINCE: (u32, u32) = (7, 0);

/// Why images are not mounted in the kernel on this machine; `None` as far as it is known before one is tried.
///
/// With `trusts_any`, whatever version the kernel is of: distributions mend kernels and keep their numbers.
/// With SELinux, what has no label of its own could not be read by pods.
pub fn unavailable(trusts_any: bool) -> Option<String> {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.split_whitespace().any(|it| it == "selinuxfs") {
        return Some(
            "this machine has SELinux, by whose policy pods could not read them".to_owned(),
        );
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    (!trusts_any && !is_fixed(release)).then(|| {
        format!(
            "Linux {release} is not known to have the fix without which a killed reader leaves zeros to others: \
             6.12.80, 6.18.21, 6.19.11 and 7.0 have it, and those that follow each; if this one has it too, set \
             node.kernel_mounts = \"whole-on-any-kernel\""
        )
    })
}

/// Whether the kernel of this release has the fix, as far as its number says.
fn is_fixed(release: &str) -> bool {
    let mut numbers = release
        .split(|it: char| !it.is_ascii_digit())
        .map_while(|it| it.parse().ok());
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        return false;
    };
    let series = (major, minor);
    let patch: u32 = numbers.next().unwrap_or(0);
    FIXED_SINCE <= series
        || FIXED
            .iter()
            .any(|(of, since)| *of == series && *since <= patch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_says_whether_a_kernel_is_trusted() {
        for release in [
            "6.12.80",
            "6.12.117+deb13-amd64",
            "6.18.21-talos",
            "6.19.11-200.fc43.x86_64",
            "7.0.0-29-generic",
            "7.3-rc1",
            "10.0.1",
        ] {
            assert!(is_fixed(release), "{release}");
        }
        for release in [
            "6.12.79",
            "6.12.0-211.el10_1.x86_64",
            "6.14.11-300.fc42.x86_64",
            "6.17.0-35-generic",
            "6.18.20",
            "6.18",
            "6.19.9",
            "5.15.200",
            "7",
            "",
            "unknown",
            "99999999999.1.1",
        ] {
            assert!(!is_fixed(release), "{release}");
        }
    }
}
