//! Chooses among the platforms of a multi-platform image.

use std::{fmt, str::FromStr};

/// What an image runs on: `os/architecture[/variant]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    /// The operating system, as Go names it: `linux`.
    pub os: String,
    /// The processor architecture, as Go names it: `amd64`, `arm64`.
    pub architecture: String,
    /// The architecture's variant: `v7` for 32-bit ARM.
    pub variant: Option<String>,
}

/// Says why a text is not a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("platform {text:?} is not valid: write os/architecture[/variant], such as linux/arm64")]
pub struct PlatformError {
    /// The text as it came.
    pub text: String,
}

/// How well an image's platform serves the wanted one, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fit {
    /// The same variant, or none on both sides.
    Exact,
    /// One side names a variant and the other does not.
    Variant,
}

impl Platform {
    /// The platform this process runs on.
    pub fn host() -> Self {
        Self::new("linux", std::env::consts::ARCH, None)
    }

    /// Makes a platform of its parts, in the names that image indexes use.
    pub(crate) fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let architecture = match architecture {
            "x86_64" | "x86-64" => "amd64",
            "aarch64" => "arm64",
            "x86" | "i386" | "i686" => "386",
            "armhf" => "arm",
            "powerpc64" => "ppc64le",
            other => other,
        };
        let variant = match (architecture, variant) {
            // Go's and the OCI specification's only variants of these: the same as none.
            ("arm64", Some("v8" | "8")) | ("amd64", Some("v1")) | (_, Some("") | None) => None,
            ("arm", Some("7")) => Some("v7"),
            ("arm", Some("6")) => Some("v6"),
            (_, other) => other,
        };
        Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// Whether this is the place holder of an attestation, which is no image.
    pub(crate) fn is_unknown(&self) -> bool {
        self.os == "unknown" || self.architecture == "unknown"
    }

    /// How well `available` serves, or `None` if it does not.
    pub(crate) fn fit(&self, available: &Self) -> Option<Fit> {
        if self.os != available.os || self.architecture != available.architecture {
            return None;
        }
        match (&self.variant, &available.variant) {
            (wanted, available) if wanted == available => Some(Fit::Exact),
            (Some(_), Some(_)) => None,
            (None, _) | (_, None) => Some(Fit::Variant),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    /// Parses `os/architecture[/variant]`.
    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let is_word = |it: &&str| {
            (1..=32).contains(&it.len())
                && it
                    .bytes()
                    .all(|it| it.is_ascii_alphanumeric() || b"._-".contains(&it))
        };
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [os, architecture] if parts.iter().all(&is_word) => {
                Ok(Self::new(os, architecture, None))
            }
            [os, architecture, variant] if parts.iter().all(&is_word) => {
                Ok(Self::new(os, architecture, Some(variant)))
            }
            _ => Err(PlatformError {
                text: text.chars().take(100).collect(),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_and_printed() {
        for (text, printed) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm/v7", "linux/arm/v7"),
            ("linux/arm/7", "linux/arm/v7"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), printed);
        }
        for text in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "a/b/c/d",
            "linux/am d",
            "linux/amd64/",
        ] {
            assert!(text.parse::<Platform>().is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn a_variant_may_be_left_out_but_not_differ() {
        for (wanted, available, fit) in [
            ("linux/amd64", "linux/amd64", Some(Fit::Exact)),
            ("linux/arm64/v8", "linux/arm64", Some(Fit::Exact)),
            ("linux/arm64", "linux/arm64/v8", Some(Fit::Exact)),
            ("linux/arm/v7", "linux/arm/v7", Some(Fit::Exact)),
            ("linux/arm/v7", "linux/arm", Some(Fit::Variant)),
            ("linux/amd64", "linux/amd64/v3", Some(Fit::Variant)),
            ("linux/arm/v7", "linux/arm/v6", None),
            ("linux/amd64", "linux/arm64", None),
            ("linux/amd64", "windows/amd64", None),
            ("linux/amd64", "unknown/unknown", None),
        ] {
            let [wanted, available] = [wanted, available].map(|it| it.parse::<Platform>().unwrap());
            assert_eq!(wanted.fit(&available), fit, "{wanted} for {available}");
        }
    }
}
