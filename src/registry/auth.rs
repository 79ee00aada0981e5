//! Answers a registry's challenge: keeps the `Authorization` header of one repository.
//!
//! Follows the distribution project's "Token Authentication Specification". Nothing is sent before
//! a registry asks for it. A token is renewed when most of its life is over, as measured here from
//! when it came, and whenever the registry refuses it: its 401 is what counts.
//!
//! Which credentials are shown is a `keyring` chain's matter. Those that the registry refuses are
//! followed by the next; if they were taken before, they have expired, and the chain is gone from its
//! beginning once more, where nobody may answer from memory.
//!
//! oci-client's own negotiation is not used. It asks `/v2/` instead of answering the challenge of
//! the request that failed, sends passwords to any realm over plain http, reads an answer of any
//! length, and gives the token server's 429 and 503 the same error as a wrong password, so that no
//! retry policy can tell them apart.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::Engine as _;
use reqwest::{Response, StatusCode, Url, header::HeaderValue};
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    challenge::Challenge,
    credentials::Credentials,
    endpoint::EndpointSettings,
    keyring::{Candidate, Chain, Cursor},
    providers::Freshness,
    requester::Requester,
    retry::Failure,
    transport::{Ask, Op, Transport, Verb, protocol, retry_after, unavailable},
};
use crate::tier::SourceError;

/// Longest answer of a token server; a token of ECR has 4 KiB, one with many scopes 16.
const MAX_TOKEN_BYTES: usize = 256 << 10;

/// What is to be done in a repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Pull,
    Push,
}

/// Tells one answer to a challenge from the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generation(u64);

/// Why a registry is to be answered anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// What was sent, if anything, may only have been too old.
    Stale,
    /// What was sent had just been made: these credentials do not do.
    Refused,
}

/// Shortest life of a token that is renewed before its end: to ask about as often as there are
/// requests costs more than a refusal now and then.
const MIN_RENEWED_LIFE: Duration = Duration::from_secs(2);

/// Longest life that a token server is believed.
const MAX_TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);

/// How long nothing is renewed ahead after that has failed: what there is may do still.
const RENEWAL_PAUSE: Duration = Duration::from_secs(30);

/// The credentials for one repository, and what the registry made of them.
#[derive(Debug)]
pub(crate) struct Authorizer {
    chain: Chain,
    /// Whom the credentials are for.
    at: Arc<EndpointSettings>,
    access: Access,
    /// std Mutex: held for a copy, never across an await.
    state: Mutex<State>,
    /// One renewal at a time: layers that open together share a token.
    ///
    /// How far the chain has been gone; `None` before its begin, and after its end.
    renewal: tokio::sync::Mutex<Option<Cursor>>,
}

#[derive(Debug, Default)]
struct State {
    header: Option<HeaderValue>,
    challenge: Option<Challenge>,
    candidate: Option<Candidate>,
    generation: u64,
    /// Whether the registry has taken the credentials, or nobody's word from before may count.
    was_taken: bool,
    /// When the header is better made anew.
    renew_at: Option<Instant>,
    /// What to do about credentials that are missing or wrong, once that is known.
    hint: Option<String>,
}

/// A header, and how long it is good.
struct Made {
    header: Option<HeaderValue>,
    life: Option<Duration>,
}

#[derive(Deserialize)]
struct TokenFormat {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

impl Authorizer {
    pub(crate) fn new(chain: Chain, at: Arc<EndpointSettings>, access: Access) -> Self {
        Self {
            chain,
            at,
            access,
            state: Mutex::default(),
            renewal: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) fn is_for(&self, registry: &str, repository: &str, requester: &Requester) -> bool {
        self.chain.host == registry
            && self.chain.repository == repository
            && self.chain.requester == *requester
    }

    /// The header to send, and which one it is.
    pub(crate) fn current(&self) -> (Option<HeaderValue>, Generation) {
        let state = self.state();
        (state.header.clone(), Generation(state.generation))
    }

    /// Takes note that the registry has let in who sent the header of a generation.
    pub(crate) fn taken(&self, sent: Generation) {
        let mut state = self.state();
        if state.generation == sent.0 && state.header.is_some() {
            state.was_taken = true;
        }
    }

    /// The credentials that are shown first, if there are any.
    ///
    /// # Errors
    /// If that cannot be found out now.
    pub(crate) async fn credentials(&self) -> Result<Option<Credentials>, SourceError> {
        let mut cursor = self.renewal.lock().await;
        let known = self.state().candidate.clone();
        let candidate = match known {
            Some(it) => Some(it),
            None => self.next(&mut cursor).await?,
        };
        self.state().candidate.clone_from(&candidate);
        Ok(candidate.map(|it| it.credentials))
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
        verdict: Verdict,
        what: &str,
    ) -> Result<(), Failure> {
        let mut cursor = self.renewal.lock().await;
        let (challenge, mut candidate, had_header) = {
            let state = self.state();
            if state.generation != refused.0 {
                return Ok(());
            }
            let challenge = challenge.or_else(|| state.challenge.clone());
            (challenge, state.candidate.clone(), state.header.is_some())
        };
        let Some(challenge) = challenge else {
            return Err(self.unauthorized(what).into());
        };
        // A password that was sent as it is cannot have been too old: another one is needed.
        let is_spent = verdict == Verdict::Refused || (had_header && challenge == Challenge::Basic);
        if is_spent {
            candidate = self.after(&mut cursor, candidate).await?;
        } else if candidate.is_none() {
            candidate = self.next(&mut cursor).await?;
        }
        // Anonymous access is tried where nobody has credentials, and then once.
        if candidate.is_none() && (is_spent || !may_be_anonymous(&cursor, &challenge)) {
            return Err(self.exhausted(&mut cursor, what).into());
        }
        loop {
            // Chosen from now on: if no token can be had now, it is asked for with the same again.
            self.state().candidate.clone_from(&candidate);
            match self
                .make(transport, &challenge, candidate.as_ref(), what)
                .await
            {
                Ok(made) => {
                    self.put(Some(challenge), candidate, made);
                    return Ok(());
                }
                Err(failure) => match failure.error {
                    SourceError::Unauthorized { .. } if candidate.is_some() => {
                        candidate = self.after(&mut cursor, candidate).await?;
                        if candidate.is_none() {
                            return Err(self.exhausted(&mut cursor, what).into());
                        }
                    }
                    SourceError::Unauthorized { .. } => {
                        return Err(self.exhausted(&mut cursor, what).into());
                    }
                    _ => return Err(failure),
                },
            }
        }
    }

    /// Shows other credentials, if there are any that were not tried: for who is told that what they
    /// want is not there, as some registries say instead of "not for you".
    ///
    /// # Errors
    /// Those of [`Self::renew`].
    pub(crate) async fn show_others(
        &self,
        transport: &Transport,
        refused: Generation,
        what: &str,
    ) -> Result<bool, Failure> {
        let mut cursor = self.renewal.lock().await;
        let challenge = {
            let state = self.state();
            if state.generation != refused.0 {
                return Ok(true);
            }
            state.challenge.clone()
        };
        let Some(challenge) = challenge else {
            return Ok(false);
        };
        while let Some(candidate) = self.next(&mut cursor).await? {
            match self
                .make(transport, &challenge, Some(&candidate), what)
                .await
            {
                Ok(made) => {
                    self.put(Some(challenge), Some(candidate), made);
                    return Ok(true);
                }
                Err(failure) if matches!(failure.error, SourceError::Unauthorized { .. }) => {}
                Err(failure) => {
                    if let Some(cursor) = cursor.as_mut() {
                        cursor.give_back();
                    }
                    return Err(failure);
                }
            }
        }
        Ok(false)
    }

    /// Makes the header anew if it is time. What fails is left to the registry's next refusal.
    pub(crate) async fn renew_if_due(&self, transport: &Transport, what: &str) {
        let is_due = |state: &State| state.renew_at.is_some_and(|it| it <= Instant::now());
        if !is_due(&self.state()) {
            return;
        }
        let mut cursor = self.renewal.lock().await;
        let (challenge, candidate) = {
            let mut state = self.state();
            if !is_due(&state) {
                return;
            }
            state.renew_at = Some(Instant::now() + RENEWAL_PAUSE);
            (state.challenge.clone(), state.candidate.clone())
        };
        let Some(challenge) = challenge else { return };
        let has_ended = |it: &Candidate| it.until.is_some_and(|it| it <= Instant::now());
        let candidate = match candidate {
            Some(old) if has_ended(&old) => {
                // From the beginning, up to where the old ones were from.
                let mut anew = Cursor::new(Freshness::Cached);
                let found = loop {
                    match self.chain.next(&mut anew).await {
                        Ok(Some(it)) if it.origin == old.origin => break it,
                        Ok(Some(_)) => {}
                        Ok(None) | Err(_) => return,
                    }
                };
                *cursor = Some(anew);
                Some(found)
            }
            other => other,
        };
        match self
            .make(transport, &challenge, candidate.as_ref(), what)
            .await
        {
            Ok(made) => self.put(Some(challenge), candidate, made),
            Err(failure) => {
                tracing::debug!(registry = self.chain.host, error = %failure.error, "what authorizes cannot be renewed yet");
            }
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic while it is held")
    }

    /// The next credentials of the chain.
    async fn next(&self, cursor: &mut Option<Cursor>) -> Result<Option<Candidate>, SourceError> {
        let cursor = cursor.get_or_insert_with(|| {
            Cursor::new(if self.state().was_taken {
                Freshness::Anew
            } else {
                Freshness::Cached
            })
        });
        self.chain.next(cursor).await
    }

    /// The credentials to show after `refused`.
    async fn after(
        &self,
        cursor: &mut Option<Cursor>,
        refused: Option<Candidate>,
    ) -> Result<Option<Candidate>, SourceError> {
        let had_been_taken = std::mem::take(&mut self.state().was_taken);
        if had_been_taken {
            *cursor = Some(Cursor::new(Freshness::Anew).without(refused));
        } else if refused.is_some_and(|it| it.is_from_memory) {
            *cursor = cursor.take().map(Cursor::anew);
        }
        self.next(cursor).await
    }

    /// Says that there is nothing more to try, and stands at the beginning again.
    fn exhausted(&self, cursor: &mut Option<Cursor>, what: &str) -> SourceError {
        let hint = cursor.take().map(|it| it.hint());
        {
            let mut state = self.state();
            let generation = state.generation + 1;
            *state = State {
                challenge: state.challenge.take(),
                generation,
                was_taken: true,
                hint,
                ..State::default()
            };
        }
        self.unauthorized(what)
    }

    fn put(&self, challenge: Option<Challenge>, candidate: Option<Candidate>, made: Made) {
        let now = Instant::now();
        let token_ends = made.life.map(|it| now + it);
        let credentials_end = candidate.as_ref().and_then(|it| it.until);
        let mut state = self.state();
        state.header = made.header;
        state.challenge = challenge;
        state.candidate = candidate;
        state.generation += 1;
        state.renew_at = token_ends.into_iter().chain(credentials_end).min();
    }

    /// Says that credentials are missing or wrong.
    pub(crate) fn unauthorized(&self, what: &str) -> SourceError {
        let state = self.state();
        let candidate = state.candidate.clone();
        let hint = state.hint.clone();
        let hint = hint.unwrap_or_else(|| Cursor::new(Freshness::Cached).without(candidate).hint());
        SourceError::Unauthorized {
            what: what.to_owned(),
            registry: self.chain.host.clone(),
            hint,
        }
        .shortened()
    }

    /// Makes a header of credentials, or of nobody's.
    async fn make(
        &self,
        transport: &Transport,
        challenge: &Challenge,
        candidate: Option<&Candidate>,
        what: &str,
    ) -> Result<Made, Failure> {
        let basic = candidate.and_then(|it| basic_header(&it.credentials));
        match challenge {
            Challenge::Basic => Ok(Made {
                header: basic,
                life: None,
            }),
            Challenge::Bearer {
                realm,
                service,
                scope,
            } => {
                let url = self.token_url(realm, service.as_deref(), scope.as_deref())?;
                self.fetch_token(transport, url, basic, what).await
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
                    &self.chain.host,
                    "its challenge names no token server".to_owned(),
                )
            })?;
        let pull = format!("repository:{}:pull", self.chain.repository);
        let push = format!("repository:{}:pull,push", self.chain.repository);
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
        basic: Option<HeaderValue>,
        what: &str,
    ) -> Result<Made, Failure> {
        let answer = transport
            .send(Ask {
                op: Op::Token,
                verb: Verb::Get,
                url,
                accept: Some("application/json"),
                range: None,
                authorization: basic,
                at: Arc::clone(&self.at),
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
        let life = tokens.expires_in.map(Duration::from_secs);
        let token = tokens
            .token
            .filter(|it| !it.is_empty())
            .or(tokens.access_token)
            .filter(|it| !it.is_empty())
            .ok_or_else(wrong)?;
        let header = sensitive(&format!("Bearer {token}")).ok_or_else(wrong)?;
        Ok(Made {
            header: Some(header),
            // A tenth is left for what is under way.
            life: life
                .filter(|it| MIN_RENEWED_LIFE <= *it)
                .map(|it| it.min(MAX_TOKEN_LIFE) * 9 / 10),
        })
    }
}

/// Whether nobody's access is worth a try: there are no credentials, and it can be asked for.
fn may_be_anonymous(cursor: &Option<Cursor>, challenge: &Challenge) -> bool {
    let has_none = cursor.as_ref().is_none_or(Cursor::is_without_any);
    has_none && *challenge != Challenge::Basic
}

fn basic_header(credentials: &Credentials) -> Option<HeaderValue> {
    match credentials {
        Credentials::Anonymous => None,
        Credentials::Basic { username, password } => {
            let pair = format!("{username}:{}", password.expose());
            let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
            sensitive(&format!("Basic {encoded}"))
        }
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
    Failure {
        // It may be a host that was redirected to.
        error: error.shortened(),
        retry_after,
    }
}

fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{RegistryConfig, endpoint::RegistryEndpoints};

    #[test]
    fn nothing_printed_holds_the_password() {
        let credentials = Credentials::Basic {
            username: "me".to_owned(),
            password: crate::secret::Secret::new("hunter2".to_owned()),
        };
        let header = basic_header(&credentials);
        let chain = Chain {
            keyring: std::sync::Arc::default(),
            host: "h.x".to_owned(),
            repository: "a".to_owned(),
            requester: Requester::Exactly(credentials.clone()),
        };
        let endpoints = RegistryEndpoints::configured(&RegistryConfig::default(), "h.x");
        let at = Arc::new(endpoints.origin);
        let authorizer = Authorizer::new(chain, at, Access::Pull);
        let candidate = Candidate {
            credentials,
            origin: crate::registry::keyring::Origin::Given,
            until: None,
            is_from_memory: false,
        };
        authorizer.put(None, Some(candidate), Made { header, life: None });
        let printed = format!("{authorizer:?} {}", authorizer.unauthorized("image a"));
        for secret in ["hunter2", "bWU6aHVudGVyMg=="] {
            assert!(!printed.contains(secret), "{printed}");
        }
        assert!(printed.contains("\"me\""), "{printed}");
    }
}
