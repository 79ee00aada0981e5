//! Reads how a registry wants to be convinced, out of the headers of its refusal.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// How a registry wants to be convinced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

/// Reads the challenges of a 401; a token server is preferred to passwords.
pub(crate) fn parse_challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut found = None;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        let Some(challenges) = value
            .to_str()
            .ok()
            .and_then(|it| http_auth::parse_challenges(it).ok())
        else {
            continue;
        };
        for challenge in challenges {
            let param = |name: &str| {
                challenge
                    .params
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name))
                    .map(|(_, value)| value.to_unescaped())
                    .filter(|it| !it.is_empty())
            };
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                found = found.or(Some(Challenge::Basic));
            }
            if challenge.scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = param("realm")
            {
                return Some(Challenge::Bearer {
                    realm,
                    service: param("service"),
                    scope: param("scope"),
                });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        parse_challenge(&headers)
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Option<Challenge> {
        Some(Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        })
    }

    #[test]
    fn challenges_are_read() {
        let basic = "Basic realm=\"r\"";
        for (values, expected) in [
            (&[basic][..], Some(Challenge::Basic)),
            (
                &["Bearer realm=\"https://t/x\""],
                bearer("https://t/x", None, None),
            ),
            (
                &["bearer Realm=\"https://t/x\",service=\"s, s\",scope=\"repository:a/b:pull\""],
                bearer("https://t/x", Some("s, s"), Some("repository:a/b:pull")),
            ),
            (
                &[basic, "Bearer realm=\"https://t\""],
                bearer("https://t", None, None),
            ),
            (
                &["Basic realm=\"r\", Bearer realm=\"https://t\""],
                bearer("https://t", None, None),
            ),
            (&["Bearer service=\"s\""], None),
            (&["Negotiate"], None),
            (&["Bearer realm=\"unclosed"], None),
            (&["", ",,,", basic], Some(Challenge::Basic)),
            (&[], None),
        ] {
            assert_eq!(challenge(values), expected, "{values:?}");
        }
    }

    #[test]
    fn no_challenge_makes_the_parser_panic() {
        proptest::proptest!(|(text in "[ -~]{0,80}")| {
            challenge(&[&text]);
            challenge(&[&format!("Bearer {text}")]);
        });
    }
}
