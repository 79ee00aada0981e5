//! Reads image references by hand, and refuses the bad ones with a sentence a person can act on.
//!
//! The grammar is that of the distribution project (`reference` package), which
//! `oci_spec::distribution::Reference` follows too; that one is not used because its regular
//! expression costs 10 to 16 MiB of resident memory for good.

use std::{fmt, str::FromStr};

use crate::digest::ManifestDigest;

/// The name under which Docker Hub's images are known.
pub(crate) const DOCKER_HUB: &str = "docker.io";

/// Other names of Docker Hub.
pub(crate) const DOCKER_HUB_ALIASES: [&str; 3] = [
    "index.docker.io",
    "registry-1.docker.io",
    "registry.hub.docker.com",
];

/// Longest tag (OCI distribution-spec v1.1, "Pulling manifests").
const MAX_TAG_BYTES: usize = 128;

/// Longest `host/repository` that registries take (distribution, `NameTotalLengthMax`).
const MAX_NAME_BYTES: usize = 255;

/// Longest reference that is looked at: name, tag and digest with room to spare.
const MAX_REFERENCE_BYTES: usize = 512;

/// Names an image: a registry, a repository, and a tag or a digest.
///
/// `Display` gives the canonical form: `debian` is `docker.io/library/debian:latest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ImageRef {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<ManifestDigest>,
}

/// Says why a text is not an image reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("image reference {reference:?} is not valid: {reason}")]
pub struct ReferenceError {
    /// The text as it came, shortened if it is very long.
    pub reference: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

impl ImageRef {
    /// The registry's host, with its port if one was given, in lower case.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, `latest` if neither tag nor digest was given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, which wins over the tag.
    pub fn digest(&self) -> Option<ManifestDigest> {
        self.digest
    }

    /// Returns the same repository at `digest`.
    pub fn at_digest(&self, digest: ManifestDigest) -> Self {
        Self {
            digest: Some(digest),
            ..self.clone()
        }
    }

    /// What to ask the registry's manifest endpoint for.
    pub(crate) fn manifest_selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for ImageRef {
    type Err = ReferenceError;

    /// Parses `[host[:port]/]repository[:tag][@sha256:…]`.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        parse(text).map_err(|reason| ReferenceError {
            reference: text.chars().take(MAX_NAME_BYTES).collect(),
            reason,
        })
    }
}

fn parse(text: &str) -> Result<ImageRef, String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    if MAX_REFERENCE_BYTES < text.len() {
        return Err(format!(
            "it has {} characters, at most {MAX_REFERENCE_BYTES} are taken",
            text.len()
        ));
    }
    if text.contains("://") {
        return Err("it must not start with a scheme such as https://".to_owned());
    }
    let (named, digest) = match text.split_once('@') {
        Some((named, digest)) => (named, Some(digest.parse().map_err(display)?)),
        None => (text, None),
    };
    // A colon after the last slash starts a tag; one before it belongs to the host's port.
    let tag_at = named
        .rfind(':')
        .filter(|colon| named.rfind('/').is_none_or(|slash| slash < *colon));
    let (name, tag) = match tag_at {
        Some(colon) => (&named[..colon], Some(&named[colon + 1..])),
        None => (named, None),
    };
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    let (registry, path) = split_registry(name)?;
    let repository = match (registry.as_str(), path.contains('/')) {
        (DOCKER_HUB, false) => format!("library/{path}"),
        _ => path.to_owned(),
    };
    check_repository(&repository)?;
    if MAX_NAME_BYTES < registry.len() + 1 + repository.len() {
        return Err(format!(
            "host and repository together have more than {MAX_NAME_BYTES} characters"
        ));
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, None) => Some("latest".to_owned()),
        (None, Some(_)) => None,
    };
    Ok(ImageRef {
        registry,
        repository,
        tag,
        digest,
    })
}

fn display(error: impl fmt::Display) -> String {
    error.to_string()
}

/// Splits the registry from the repository: the first component is a host if it looks like one.
fn split_registry(name: &str) -> Result<(String, &str), String> {
    let Some((first, rest)) = name.split_once('/') else {
        let is_bare_id = name.len() == 64 && name.bytes().all(|it| it.is_ascii_hexdigit());
        if is_bare_id {
            return Err("it looks like an image id: give repository@sha256:<id>".to_owned());
        }
        return Ok((DOCKER_HUB.to_owned(), name));
    };
    let is_host = first.contains(['.', ':', '['])
        || first == "localhost"
        || first.bytes().any(|it| it.is_ascii_uppercase());
    if !is_host {
        return Ok((DOCKER_HUB.to_owned(), name));
    }
    check_host(first)?;
    Ok((canonical_host(first), rest))
}

/// Returns the one name this driver uses for a registry's host.
pub(crate) fn canonical_host(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    if DOCKER_HUB_ALIASES.contains(&host.as_str()) {
        return DOCKER_HUB.to_owned();
    }
    host
}

/// Refuses what is not `host[:port]`, where the host is a DNS name, an IPv4 address or an IPv6
/// address in brackets.
pub(crate) fn check_host(text: &str) -> Result<(), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest
                .split_once(']')
                .ok_or_else(|| format!("host {text:?} has no closing bracket"))?;
            address
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| format!("{address:?} is not an IPv6 address"))?;
            let port = match port.strip_prefix(':') {
                Some(port) => Some(port),
                None if port.is_empty() => None,
                None => return Err(format!("host {text:?} has text after the bracket")),
            };
            ("", port)
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|it| it.is_ascii_alphanumeric() || it == b'-')
    };
    if !text.starts_with('[') && !host.split('.').all(is_label) {
        return Err(format!("{host:?} is not a host name"));
    }
    match port {
        Some(port) if !is_port(port) => Err(format!("{port:?} is not a port number")),
        Some(_) | None => Ok(()),
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|it| it.is_ascii_digit()) && text.parse::<u16>().is_ok_and(|it| it != 0)
}

fn check_tag(tag: &str) -> Result<(), String> {
    let is_word = |it: u8| it.is_ascii_alphanumeric() || it == b'_';
    let Some(first) = tag.bytes().next() else {
        return Err("the tag after the colon is empty".to_owned());
    };
    if MAX_TAG_BYTES < tag.len() {
        return Err(format!("its tag has more than {MAX_TAG_BYTES} characters"));
    }
    if !is_word(first) || !tag.bytes().all(|it| is_word(it) || b".-".contains(&it)) {
        return Err(format!(
            "tag {tag:?} must be of letters, digits, '_', '.' and '-', and not start with '.' or '-'"
        ));
    }
    Ok(())
}

fn check_repository(repository: &str) -> Result<(), String> {
    if repository.bytes().any(|it| it.is_ascii_uppercase()) {
        return Err(format!("repository {repository:?} must be in lower case"));
    }
    match repository.split('/').find(|it| !is_path_component(it)) {
        Some("") => Err("a part of the repository is empty".to_owned()),
        Some(bad) => Err(format!(
            "repository part {bad:?} must be of lower-case letters and digits, separated by '.', '_', '__' or dashes"
        )),
        None => Ok(()),
    }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_path_component(text: &str) -> bool {
    let is_alphanumeric = |it: char| it.is_ascii_lowercase() || it.is_ascii_digit();
    let starts_and_ends_well = text.starts_with(is_alphanumeric) && text.ends_with(is_alphanumeric);
    starts_and_ends_well
        && text
            .split(is_alphanumeric)
            .all(|it| matches!(it, "" | "." | "_" | "__") || it.bytes().all(|c| c == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn references_print_in_canonical_form() {
        let at = format!("@sha256:{HEX}");
        for (text, canonical) in [
            ("debian", "docker.io/library/debian:latest".to_owned()),
            ("debian:12", "docker.io/library/debian:12".to_owned()),
            ("me/app", "docker.io/me/app:latest".to_owned()),
            (
                "docker.io/debian",
                "docker.io/library/debian:latest".to_owned(),
            ),
            ("index.docker.io/me/a:b", "docker.io/me/a:b".to_owned()),
            ("localhost/app", "localhost/app:latest".to_owned()),
            ("localhost:5000/app:v1", "localhost:5000/app:v1".to_owned()),
            (
                "127.0.0.1:5000/a/b/c",
                "127.0.0.1:5000/a/b/c:latest".to_owned(),
            ),
            ("[::1]:5000/app", "[::1]:5000/app:latest".to_owned()),
            ("GHCR.io/o/r:V1.0-x_y", "ghcr.io/o/r:V1.0-x_y".to_owned()),
            (
                "quay.io/a__b/c---d/e.f_g",
                "quay.io/a__b/c---d/e.f_g:latest".to_owned(),
            ),
            (
                &format!("debian{at}"),
                format!("docker.io/library/debian{at}"),
            ),
            (&format!("h.x/a:t{at}"), format!("h.x/a:t{at}")),
        ] {
            let parsed: ImageRef = text.parse().unwrap();
            assert_eq!(parsed.to_string(), canonical, "{text}");
            assert_eq!(parsed.to_string().parse(), Ok(parsed), "{text} twice");
        }
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let image: ImageRef = format!("h.x/a:t@sha256:{HEX}").parse().unwrap();
        assert_eq!(image.manifest_selector(), format!("sha256:{HEX}"));
        assert_eq!(image.tag(), Some("t"));
    }

    #[test]
    fn bad_references_are_refused_with_a_reason() {
        for (text, reason) in [
            ("", "it is empty"),
            ("https://h.x/a", "must not start with a scheme"),
            ("h.x/A", "must be in lower case"),
            ("h.x/", "a part of the repository is empty"),
            ("h.x//a", "a part of the repository is empty"),
            ("h.x/a/", "a part of the repository is empty"),
            ("h.x/../a", "repository part \"..\""),
            ("h.x/a..b", "repository part \"a..b\""),
            ("h.x/a___b", "repository part \"a___b\""),
            ("h.x/-a", "repository part \"-a\""),
            ("h.x/a b", "repository part \"a b\""),
            ("h.x/a?b", "repository part \"a?b\""),
            ("h.x/a%2e", "repository part"),
            ("h.x/ä", "repository part"),
            ("h.x/a:", "the tag after the colon is empty"),
            ("h.x/a:.b", "tag \".b\""),
            ("h.x/a:b/c", "repository part \"a:b\""),
            ("h.x/a:b\n", "tag \"b\\n\""),
            ("h.x:0/a", "\"0\" is not a port"),
            ("h.x:65536/a", "\"65536\" is not a port"),
            ("h.x:+1/a", "\"+1\" is not a port"),
            ("-h.x/a", "\"-h.x\" is not a host name"),
            ("h..x/a", "\"h..x\" is not a host name"),
            ("user@h.x/a", "only sha256 digests are"),
            ("h.x/a@sha512:00", "only sha256 digests are"),
            ("h.x/a@sha256:00", "64 lower-case hexadecimal digits"),
            ("[::1/a", "no closing bracket"),
            ("[zz]/a", "is not an IPv6 address"),
            ("[::1]x/a", "text after the bracket"),
            (HEX, "it looks like an image id"),
            (&"a".repeat(300), "more than 255 characters"),
            (
                &format!("h.x/a:{}", "t".repeat(129)),
                "more than 128 characters",
            ),
            (&"a".repeat(600), "at most 512"),
        ] {
            let error = text.parse::<ImageRef>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic() {
        proptest::proptest!(|(text in ".{0,80}")| {
            if let Ok(image) = text.parse::<ImageRef>() {
                assert_eq!(image.to_string().parse(), Ok(image));
            }
        });
    }
}
