//! Finds the credentials for an image in a `.dockerconfigjson`.
//!
//! Keys are matched as kubelet matches them (kubernetes, `pkg/credentialprovider/keyring.go`):
//! scheme and `/v1/`, `/v2/` are ignored, host labels may be globs (`*.example.com`), and a path is a
//! prefix of the repository's, not of its components: `r.x/team` is also for `r.x/teams/app`. All
//! keys that match count, the most specific first, which is their order backwards. Only `auths` is
//! read: credential helpers would run programs, and identity tokens are unknown to kubelet as well.

use std::{collections::BTreeMap, fmt};

use base64::Engine as _;
use serde::Deserialize;

use super::reference::{ImageRef, canonical_host};
use crate::secret::Secret;

/// What a registry is shown.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Credentials {
    /// Nothing.
    Anonymous,
    /// A user's name and password, sent to the registry or to its token server.
    Basic {
        /// The user's name.
        username: String,
        /// The password.
        password: Secret<String>,
    },
}

/// The registries and credentials of a `.dockerconfigjson`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct DockerConfig {
    /// Most specific first.
    entries: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Entry {
    key: Key,
    credentials: Credentials,
}

/// Where an entry applies. Ordered so that the more specific of two that match is the greater.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    host: String,
    path: String,
}

/// Says why a `.dockerconfigjson` cannot be read. Never quotes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DockerConfigError {
    /// It is not JSON of the right shape.
    #[error("it is not a .dockerconfigjson: line {line}, column {column}")]
    Json {
        /// The line of the fault.
        line: usize,
        /// The column of the fault.
        column: usize,
    },
    /// An entry's `auth` is not base64 of `username:password`.
    #[error("its auth for {registry:?} is not base64 of username:password")]
    Auth {
        /// The entry's key.
        registry: String,
    },
}

#[derive(Deserialize)]
struct FileFormat {
    #[serde(default)]
    auths: BTreeMap<String, AuthFormat>,
}

#[derive(Deserialize)]
struct AuthFormat {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

impl DockerConfig {
    /// Parses the text of a `.dockerconfigjson`.
    ///
    /// # Errors
    /// [`DockerConfigError`], which names the place and never the content.
    pub fn parse(text: &[u8]) -> Result<Self, DockerConfigError> {
        let file: FileFormat =
            serde_json::from_slice(text).map_err(|error| DockerConfigError::Json {
                line: error.line(),
                column: error.column(),
            })?;
        let mut entries = Vec::with_capacity(file.auths.len());
        for (registry, auth) in file.auths {
            if let Some(credentials) = credentials(&registry, auth)? {
                entries.push(Entry {
                    key: Key::parse(&registry),
                    credentials,
                });
            }
        }
        Ok(Self::of(entries))
    }

    /// Makes one of users and passwords by key.
    pub(crate) fn of_users(
        users: impl IntoIterator<Item = (String, String, Secret<String>)>,
    ) -> Self {
        let entries = users.into_iter().map(|(key, username, password)| Entry {
            key: Key::parse(&key),
            credentials: Credentials::Basic { username, password },
        });
        Self::of(entries.collect())
    }

    /// Makes one of several. Of entries for the same place, those of the first come first.
    pub fn joined(configs: impl IntoIterator<Item = Self>) -> Self {
        Self::of(configs.into_iter().flat_map(|it| it.entries).collect())
    }

    fn of(mut entries: Vec<Entry>) -> Self {
        entries.sort_by(|a, b| b.key.cmp(&a.key));
        Self { entries }
    }

    /// Returns the credentials of the most specific entry for `image`.
    pub fn for_image(&self, image: &ImageRef) -> Credentials {
        let mut all = self.for_repository(image.registry(), image.repository());
        all.next().unwrap_or(Credentials::Anonymous)
    }

    /// Returns the credentials of all entries for a repository at a host, the most specific first.
    pub(crate) fn for_repository(
        &self,
        host: &str,
        repository: &str,
    ) -> impl Iterator<Item = Credentials> {
        let found = self.entries.iter();
        found
            .filter(move |it| it.key.matches(host, repository))
            .map(|it| it.credentials.clone())
    }
}

/// Reads an entry; `None` if it names no user, as `docker login` leaves for credential helpers.
fn credentials(registry: &str, auth: AuthFormat) -> Result<Option<Credentials>, DockerConfigError> {
    let wrong = || DockerConfigError::Auth {
        registry: registry.to_owned(),
    };
    let (username, password) = if auth.auth.is_empty() {
        (auth.username, auth.password)
    } else {
        let decoded = base64::engine::general_purpose::STANDARD
            .decode(auth.auth.trim())
            .map_err(|_| wrong())?;
        let text = String::from_utf8(decoded).map_err(|_| wrong())?;
        let (username, password) = text.split_once(':').ok_or_else(wrong)?;
        // Docker pads the password with zero bytes.
        (
            username.to_owned(),
            password.trim_end_matches('\0').to_owned(),
        )
    };
    if username.is_empty() && password.is_empty() {
        return Ok(None);
    }
    Ok(Some(Credentials::Basic {
        username,
        password: Secret::new(password),
    }))
}

impl Key {
    /// Reads a key as a `.dockerconfigjson`, or `matchImages` of a credential provider, has it.
    pub(crate) fn parse(text: &str) -> Self {
        let schemeless = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"))
            .unwrap_or(text);
        let (host, path) = schemeless.split_once('/').unwrap_or((schemeless, ""));
        // "/v1/" and "/v2/" name the API, not a repository.
        let path = ["v1", "v2"]
            .iter()
            .find_map(|api| {
                let rest = path.strip_prefix(api)?;
                (rest.is_empty() || rest.starts_with('/')).then(|| rest.trim_start_matches('/'))
            })
            .unwrap_or(path);
        Self {
            host: canonical_host(host),
            path: path.trim_end_matches('/').to_owned(),
        }
    }

    /// Whether it is for a repository at a host.
    pub(crate) fn matches(&self, host: &str, repository: &str) -> bool {
        host_matches(&self.host, host) && repository.starts_with(&self.path)
    }
}

/// Matches label by label; ports must be equal.
fn host_matches(pattern: &str, host: &str) -> bool {
    if !pattern.contains('*') {
        return pattern == host;
    }
    let split = |text: &str| match text.split_once(':') {
        Some((name, port)) => (name.to_owned(), Some(port.to_owned())),
        None => (text.to_owned(), None),
    };
    let ((pattern, pattern_port), (host, port)) = (split(pattern), split(host));
    let n_labels = pattern.split('.').count();
    pattern_port == port
        && n_labels == host.split('.').count()
        && pattern
            .split('.')
            .zip(host.split('.'))
            .all(|(pattern, label)| label_matches(pattern, label))
}

/// Matches one label against a pattern in which `*` stands for any run of characters.
fn label_matches(pattern: &str, label: &str) -> bool {
    let Some((head, mut tail)) = pattern.split_once('*') else {
        return pattern == label;
    };
    let Some(mut rest) = label.strip_prefix(head) else {
        return false;
    };
    while let Some((middle, after)) = tail.split_once('*') {
        let Some(at) = rest.find(middle) else {
            return false;
        };
        rest = &rest[at + middle.len()..];
        tail = after;
    }
    rest.ends_with(tail)
}

impl fmt::Display for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("no credentials"),
            Self::Basic { username, .. } => write!(f, "user {username:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(config: &DockerConfig, image: &str) -> String {
        match config.for_image(&image.parse().unwrap()) {
            Credentials::Anonymous => String::new(),
            Credentials::Basic { username, password } => {
                format!("{username}:{}", password.expose())
            }
        }
    }

    #[test]
    fn the_most_specific_key_wins() {
        let config = DockerConfig::parse(
            br#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "aHViOnB3"},
                "ghcr.io": {"username": "gh", "password": "p:w"},
                "ghcr.io/team": {"username": "team", "password": "pw"},
                "ghcr.io/team/app": {"username": "app", "password": "pw"},
                "http://127.0.0.1:5000": {"username": "local", "password": "pw"},
                "*.example.com": {"username": "glob", "password": "pw"},
                "a.example.com": {"username": "exact", "password": "pw"},
                "r-*.x.io:443/v2/p": {"username": "port", "password": "pw"},
                "empty.io": {"auth": "", "email": "e"}
            }, "credsStore": "x"}"#,
        )
        .unwrap();
        for (image, expected) in [
            ("debian", "hub:pw"),
            ("docker.io/me/app", "hub:pw"),
            ("registry-1.docker.io/me/app", "hub:pw"),
            ("ghcr.io/other/app", "gh:p:w"),
            // As kubelet: the path is a prefix.
            ("ghcr.io/teams/app", "team:pw"),
            ("ghcr.io/team/lib", "team:pw"),
            ("ghcr.io/team/app", "app:pw"),
            ("ghcr.io/team/app/sub", "app:pw"),
            ("127.0.0.1:5000/a", "local:pw"),
            ("127.0.0.1:5001/a", ""),
            ("a.example.com/a", "exact:pw"),
            ("b.example.com/a", "glob:pw"),
            ("a.b.example.com/a", ""),
            ("example.com/a", ""),
            ("r-7.x.io:443/p/a", "port:pw"),
            ("r-7.x.io/p/a", ""),
            ("empty.io/a", ""),
        ] {
            assert_eq!(user(&config, image), expected, "{image}");
        }
    }

    #[test]
    fn all_keys_that_match_count_the_most_specific_first() {
        let config = DockerConfig::parse(
            br#"{"auths": {
                "ghcr.io": {"username": "host", "password": "pw"},
                "*.io": {"username": "glob", "password": "pw"},
                "ghcr.io/team/": {"username": "team", "password": "pw"},
                "ghcr.io/other": {"username": "other", "password": "pw"}
            }}"#,
        )
        .unwrap();
        let users: Vec<_> = config
            .for_repository("ghcr.io", "team/app")
            .map(|it| it.to_string())
            .collect();
        assert_eq!(users, ["user \"team\"", "user \"host\"", "user \"glob\""]);
    }

    #[test]
    fn faults_are_told_without_their_content() {
        for (text, expected) in [
            (
                &b"{\"auths\": {\"h\": {\"auth\": 7}}}"[..],
                "not a .dockerconfigjson: line 1",
            ),
            (b"hunter2", "not a .dockerconfigjson: line 1"),
            (
                br#"{"auths": {"h.x": {"auth": "hunter2"}}}"#,
                "auth for \"h.x\" is not base64",
            ),
            (
                br#"{"auths": {"h.x": {"auth": "aHVudGVyMg=="}}}"#,
                "auth for \"h.x\" is not base64",
            ),
        ] {
            let error = DockerConfig::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert_eq!(user(&DockerConfig::parse(b"{}").unwrap(), "debian"), "");
    }

    #[test]
    fn credentials_do_not_print_the_password() {
        let credentials = Credentials::Basic {
            username: "me".to_owned(),
            password: Secret::new("hunter2".to_owned()),
        };
        let printed = format!("{credentials} {credentials:?}");
        assert!(
            printed.contains("me") && !printed.contains("hunter2"),
            "{printed}"
        );
    }
}
