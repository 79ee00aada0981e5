//! Understands what a credential provider plugin answers (`CredentialProviderResponse`).

use std::{collections::BTreeMap, time::Duration};

use serde::Deserialize;

use crate::{registry::credentials::DockerConfig, secret::Secret};

/// Longest time that an answer may hold: a plugin that errs must not be believed for ever.
pub(super) const MAX_CACHE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What else an answer is for than the image that it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
pub(super) enum CacheKeyType {
    /// Nothing.
    Image,
    /// All images of the registry.
    Registry,
    /// All images that the plugin is asked for.
    Global,
}

/// An answer.
#[derive(Debug)]
pub(super) struct Response {
    pub(super) users: DockerConfig,
    pub(super) images: CacheKeyType,
    /// How long it holds, if it says.
    pub(super) cache: Option<Duration>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Format {
    kind: String,
    api_version: String,
    cache_key_type: CacheKeyType,
    cache_duration: Option<String>,
    /// By the images they are for, as keys of a docker config.
    #[serde(default)]
    auth: Option<BTreeMap<String, User>>,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// Parses an answer.
///
/// # Errors
/// Says what is wrong with it, and never quotes it.
pub(super) fn parse(output: &[u8], api_version: &str) -> Result<Response, String> {
    let answer: Format = serde_json::from_slice(output).map_err(|err| {
        format!(
            "its answer is no CredentialProviderResponse: line {}, column {}",
            err.line(),
            err.column()
        )
    })?;
    if answer.kind != "CredentialProviderResponse" || answer.api_version != api_version {
        return Err(format!(
            "its answer is no CredentialProviderResponse of {api_version}"
        ));
    }
    let cache = match &answer.cache_duration {
        None => None,
        Some(text) => Some(
            parse_duration(text)
                .ok_or("the cacheDuration of its answer is malformed")?
                .min(MAX_CACHE),
        ),
    };
    let users = answer.auth.unwrap_or_default().into_iter();
    let users = users.filter(|(_, it)| !(it.username.is_empty() && it.password.is_empty()));
    Ok(Response {
        users: DockerConfig::of_users(
            users.map(|(key, it)| (key, it.username, Secret::new(it.password))),
        ),
        images: answer.cache_key_type,
        cache,
    })
}

/// Parses a duration as Go writes it: `12h`, `1h30m0s`, `1.5h`, `0`; no negative one.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|it: char| !it.is_ascii_digit() && it != '.')?;
        let (number, after) = rest.split_at(digits);
        let unit = after
            .find(|it: char| it.is_ascii_digit() || it == '.')
            .unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let each = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * each;
        rest = after;
    }
    if text.is_empty() {
        return None;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "credentialprovider.kubelet.k8s.io/v1";

    fn answer(rest: &str) -> String {
        format!(r#"{{"kind":"CredentialProviderResponse","apiVersion":"{V1}",{rest}}}"#)
    }

    #[test]
    fn answers_are_read() {
        let text = answer(
            r#""cacheKeyType":"Registry","cacheDuration":"6h0m0s","auth":{"*.x.io":{"username":"AWS","password":"hunter2"},"r.x.io":{"username":"","password":""}}"#,
        );
        let it = parse(text.as_bytes(), V1).unwrap();
        assert_eq!(it.images, CacheKeyType::Registry);
        assert_eq!(it.cache, Some(Duration::from_secs(6 * 3600)));
        let users: Vec<_> = it.users.for_repository("r.x.io", "a").collect();
        assert_eq!(users.len(), 1);
        assert_eq!(users[0].to_string(), "user \"AWS\"");
        for none in [
            r#""cacheKeyType":"Image""#,
            r#""cacheKeyType":"Global","auth":null"#,
        ] {
            let it = parse(answer(none).as_bytes(), V1).unwrap();
            assert_eq!(it.users.for_repository("r.x.io", "a").count(), 0);
            assert_eq!(it.cache, None);
        }
    }

    #[test]
    fn wrong_answers_are_told_without_their_content() {
        for text in [
            "hunter2".to_owned(),
            String::new(),
            answer(r#""cacheKeyType":"hunter2""#),
            answer(r#""cacheKeyType":"Image","auth":{"a":"hunter2"}"#),
            answer(r#""cacheKeyType":"Image","cacheDuration":"hunter2""#),
            answer(r#""cacheKeyType":"Image""#).replace(V1, "hunter2"),
            answer(r#""cacheKeyType":"Image""#).replace("Response", "Request"),
        ] {
            let error = parse(text.as_bytes(), V1).unwrap_err();
            assert!(
                error.starts_with("its answer is no") || error.contains("cacheDuration"),
                "{error}"
            );
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn durations_are_those_of_go() {
        for (text, expected) in [
            ("0", Some(0.0)),
            ("0s", Some(0.0)),
            ("12h", Some(43200.0)),
            ("1h30m0.5s", Some(5400.5)),
            ("250ms", Some(0.25)),
            ("", None),
            ("12", None),
            ("h", None),
            ("-1h", None),
            ("1d", None),
            ("1e9h", None),
            ("99999999999999999999h", None),
        ] {
            let found = parse_duration(text).map(|it| it.as_secs_f64());
            assert_eq!(found, expected, "{text:?}");
        }
        proptest::proptest!(|(text in "[0-9.hmsnu]{0,30}")| { parse_duration(&text); });
    }
}
