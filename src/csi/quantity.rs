//! Reads sizes as Kubernetes writes them: `512Mi`, `1G`, `1048576`.

/// The suffixes that a size may have, and what they stand for.
const SUFFIXES: &[(&str, u64)] = &[
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];

/// Parses a size in bytes; `None` for what is no whole number with at most one of the suffixes.
pub(super) fn parse_bytes(text: &str) -> Option<u64> {
    let suffix = SUFFIXES.iter().find(|(it, _)| text.ends_with(it));
    let (digits, unit) = match suffix {
        Some((suffix, unit)) => (text.strip_suffix(suffix)?, *unit),
        None => (text, 1),
    };
    // `parse` would take a sign.
    if !digits.bytes().all(|it| it.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_kubernetes_writes_them() {
        for (text, want) in [
            ("0", Some(0)),
            ("1048576", Some(1 << 20)),
            ("64Mi", Some(64 << 20)),
            ("1Gi", Some(1 << 30)),
            ("3k", Some(3000)),
            ("2T", Some(2_000_000_000_000)),
            ("", None),
            ("Mi", None),
            ("+1", None),
            ("-1", None),
            ("1.5Gi", None),
            ("1 Gi", None),
            ("1GiB", None),
            ("99999999999999999999", None),
            ("99999999999Ti", None),
        ] {
            assert_eq!(parse_bytes(text), want, "{text:?}");
        }
    }
}
