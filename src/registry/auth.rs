//! Answers a registry's challenge: keeps the `Authorization` header of one repository.
//!
//! Follows the distribution project's "Token Authentication Specification". Nothing is sent before
//! a registry asks for it, and a token is used until the registry refuses it: its 401 is what
//! counts, not a clock that may differ from the registry's.
//!
//! oci-client's own negotiation is not used. It asks `/v2/` instead of answering the challenge of
//! the request that failed, sends passwords to any realm over plain http, reads an answer of any
//! length, and gives the token server's 429 and 503 the same error as a wrong password, so that no
//! retry policy can tell them apart.

use std::sync::Mutex;

use base64::Engine as _;
use reqwest::{
    Response, StatusCode, Url,
    header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::{
    credentials::Credentials,
    retry::Failure,
    transport::{Ask, Op, Transport, Verb, protocol, retry_after, unavailable},
};
use crate::tier::SourceError;

/// Longest answer of a token server; a token of ECR has 4 KiB, one with many scopes 16.
const MAX_TOKEN_BYTES: usize = 256 << 10;

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

/// What is to be done in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Pull,
    Push,
}

/// Tells one answer to a challenge from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation(u64);

/// The credentials for one repository, and what the registry made of them.
#[derive(Debug)]
pub(crate) struct Authorizer {
    registry: String,
    repository: String,
    credentials: Credentials,
    access: Access,
    /// std Mutex: held for a copy, never across an await.
    state: Mutex<State>,
    /// One renewal at a time: layers that open together share a token.
    renewal: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    header: Option<HeaderValue>,
    challenge: Option<Challenge>,
    generation: u64,
}

#[derive(Deserialize)]
struct TokenFormat {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
}

impl Authorizer {
    pub(crate) fn new(
        registry: &str,
        repository: &str,
        credentials: Credentials,
        access: Access,
    ) -> Self {
        Self {
            access,
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            credentials,
            state: Mutex::default(),
            renewal: Semaphore::new(1),
        }
    }

    pub(crate) fn is_for(
        &self,
        registry: &str,
        repository: &str,
        credentials: &Credentials,
    ) -> bool {
        self.registry == registry
            && self.repository == repository
            && self.credentials == *credentials
    }

    /// The header to send, and which one it is.
    pub(crate) fn current(&self) -> (Option<HeaderValue>, Generation) {
        let state = self.state.lock().expect("no panic while it is held");
        (state.header.clone(), Generation(state.generation))
    }

    /// Makes a new header after the registry refused the one of generation `refused`.
    ///
    /// `challenge` is what came with the refusal; without one, the former is answered again.
    ///
    /// # Errors
    /// [`SourceError::Unauthorized`] if there is nothing new to say.
    pub(crate) async fn renew(
        &self,
        transport: &Transport,
        challenge: Option<Challenge>,
        refused: Generation,
        what: &str,
    ) -> Result<(), Failure> {
        let _one_at_a_time = self
            .renewal
            .acquire()
            .await
            .map_err(|_| unavailable(&self.registry, "the process is stopping".to_owned()))?;
        let challenge = {
            let state = self.state.lock().expect("no panic while it is held");
            if state.generation != refused.0 {
                return Ok(());
            }
            challenge.or_else(|| state.challenge.clone())
        };
        let header = match (&challenge, &self.credentials) {
            (None, _) => {
                return Err(self.unauthorized(what).into());
            }
            (Some(Challenge::Basic), Credentials::Anonymous) => {
                return Err(self.unauthorized(what).into());
            }
            (Some(Challenge::Basic), Credentials::Basic { .. }) if self.has_header() => {
                return Err(self.unauthorized(what).into());
            }
            (Some(Challenge::Basic), Credentials::Basic { .. }) => self.basic_header(),
            (
                Some(Challenge::Bearer {
                    realm,
                    service,
                    scope,
                }),
                _,
            ) => {
                let url = self.token_url(realm, service.as_deref(), scope.as_deref())?;
                Some(self.fetch_token(transport, url, what).await?)
            }
        };
        let mut state = self.state.lock().expect("no panic while it is held");
        state.header = header;
        state.challenge = challenge;
        state.generation += 1;
        Ok(())
    }

    fn has_header(&self) -> bool {
        self.current().0.is_some()
    }

    /// Says that credentials are missing or wrong.
    pub(crate) fn unauthorized(&self, what: &str) -> SourceError {
        let hint = match &self.credentials {
            Credentials::Anonymous => {
                "none were given; it may be private, or not exist: check the name, and give a pull secret (nodePublishSecretRef)".to_owned()
            }
            Credentials::Basic { username, .. } => format!(
                "it does not take those of user {username:?}: check the pull secret, and that the image exists"
            ),
        };
        SourceError::Unauthorized {
            what: what.to_owned(),
            registry: self.registry.clone(),
            hint,
        }
    }

    fn basic_header(&self) -> Option<HeaderValue> {
        match &self.credentials {
            Credentials::Anonymous => None,
            Credentials::Basic { username, password } => {
                let pair = format!("{username}:{}", password.expose());
                let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
                sensitive(&format!("Basic {encoded}"))
            }
        }
    }

    fn token_url(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: Option<&str>,
    ) -> Result<Url, SourceError> {
        let mut url = Url::parse(realm)
            .ok()
            .filter(Url::has_host)
            .ok_or_else(|| {
                protocol(
                    &self.registry,
                    "its challenge names no token server".to_owned(),
                )
            })?;
        let pull = format!("repository:{}:pull", self.repository);
        let push = format!("repository:{}:pull,push", self.repository);
        let scope = match self.access {
            Access::Pull => scope.unwrap_or(&pull),
            // Of one's own accord: a registry that is asked to read first demands `pull` alone.
            Access::Push => &push,
        };
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = service {
                query.append_pair("service", service);
            }
            query.append_pair("scope", scope);
        }
        Ok(url)
    }

    async fn fetch_token(
        &self,
        transport: &Transport,
        url: Url,
        what: &str,
    ) -> Result<HeaderValue, Failure> {
        let answer = transport
            .send(Ask {
                op: Op::Token,
                verb: Verb::Get,
                url,
                accept: Some("application/json"),
                range: None,
                authorization: self.basic_header(),
            })
            .await?;
        let host = answer.host.clone();
        match answer.response.status() {
            StatusCode::OK => {}
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(self.unauthorized(what).into());
            }
            _ => return Err(status_failure(&host, "the token", &answer.response)),
        }
        let body = transport.read(answer, MAX_TOKEN_BYTES).await?;
        let wrong = || protocol(&host, "its token server gave no token".to_owned());
        let tokens: TokenFormat = serde_json::from_slice(&body).map_err(|_| wrong())?;
        let token = tokens
            .token
            .filter(|it| !it.is_empty())
            .or(tokens.access_token)
            .filter(|it| !it.is_empty())
            .ok_or_else(wrong)?;
        let header = sensitive(&format!("Bearer {token}")).ok_or_else(wrong)?;
        Ok(header)
    }
}

/// Returns the error for a status that is neither wanted nor about credentials.
pub(crate) fn status_failure(host: &str, what: &str, response: &Response) -> Failure {
    let status = response.status();
    let retry_after = retry_after(response);
    let error = match status.as_u16() {
        404 => SourceError::NotFound {
            what: what.to_owned(),
            registry: host.to_owned(),
        },
        429 => SourceError::RateLimited {
            registry: host.to_owned(),
            retry_after,
        },
        // 408: the server waited for us. 500 and above: its own trouble.
        408 | 425 | 500..=599 => unavailable(host, format!("HTTP {status} for {what}")),
        _ => protocol(host, format!("HTTP {status} for {what}")),
    };
    Failure { error, retry_after }
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
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

    #[test]
    fn nothing_printed_holds_the_password() {
        let authorizer = Authorizer::new(
            "h.x",
            "a",
            Credentials::Basic {
                username: "me".to_owned(),
                password: crate::secret::Secret::new("hunter2".to_owned()),
            },
            Access::Pull,
        );
        let header = authorizer.basic_header();
        authorizer.state.lock().unwrap().header = header;
        let printed = format!("{authorizer:?} {}", authorizer.unauthorized("image a"));
        for secret in ["hunter2", "bWU6aHVudGVyMg=="] {
            assert!(!printed.contains(secret), "{printed}");
        }
        assert!(printed.contains("\"me\""), "{printed}");
    }
}
