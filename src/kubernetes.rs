//! Asks the API server of the cluster in which the process runs, as a pod: a few small requests.
//!
//! Not the kube crate: for the three requests of the driver it would bring 36 crates (its
//! kubeconfig, YAML and JSONPath parts are not optional), while HTTP, TLS and JSON are here anyway.
//! Absent on purpose: watches, discovery, typed objects, kubeconfig files.
//!
//! Invariants: every request has a deadline, every answer a bound; the token is read anew for each
//! request, because kubelet renews it, and is in no error and no log; only the cluster's own
//! authority is trusted.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use reqwest::{
    Method, StatusCode,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue},
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use serde::{Deserialize, de::DeserializeOwned};

/// Where kubelet mounts a service account (kubernetes, `plugin/pkg/admission/serviceaccount`).
const SERVICE_ACCOUNT_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// How long a request may take; the API server itself gives up on one after a minute.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest answer: etcd takes objects of 1.5 MiB, JSON may be twice as long.
const MAX_ANSWER_BYTES: usize = 4 << 20;

/// How much of what the API server says is repeated.
const MAX_SHOWN_CHARS: usize = 300;

/// Says why the API server did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The process is not in a pod, or its service account is not mounted.
    #[error("not in a pod of a cluster: {reason}")]
    NotInCluster {
        /// What is missing, and what to do.
        reason: String,
    },
    /// A file of the service account cannot be used.
    #[error("service account file {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not; never its content.
        #[source]
        source: io::Error,
    },
    /// No answer came, or not all of it.
    #[error("the API server cannot be reached: {reason}")]
    Unreachable {
        /// What was seen.
        reason: String,
    },
    /// The object changed since it was read.
    #[error("{what} was changed by somebody else meanwhile")]
    Conflict {
        /// The object.
        what: String,
    },
    /// It refuses.
    #[error("the API server answers HTTP {status} for {what}: {message}")]
    Refused {
        /// The object.
        what: String,
        /// The status code.
        status: u16,
        /// Its words.
        message: String,
    },
    /// It answers what is no such object.
    #[error("the API server's answer for {what} cannot be read: {reason}")]
    Malformed {
        /// The object.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// How the API server is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InCluster {
    /// `https://host:port`.
    pub url: String,
    /// The cluster's certificate authority (PEM); none for plain http.
    pub ca_file: Option<PathBuf>,
    /// The service account's token.
    pub token_file: PathBuf,
}

impl InCluster {
    /// Finds the API server as a pod does.
    ///
    /// # Errors
    /// [`ApiError::NotInCluster`] says what is missing.
    pub fn of_this_pod() -> Result<Self, ApiError> {
        let dir = Path::new(SERVICE_ACCOUNT_DIR);
        Self::find(|name| std::env::var(name).ok(), dir)
    }

    fn find(env: impl Fn(&str) -> Option<String>, dir: &Path) -> Result<Self, ApiError> {
        let variable = |name: &str| {
            env(name)
                .filter(|it| !it.is_empty())
                .ok_or_else(|| ApiError::NotInCluster {
                    reason: format!("{name} is not set, as kubelet does in every pod"),
                })
        };
        let host = variable("KUBERNETES_SERVICE_HOST")?;
        let port = variable("KUBERNETES_SERVICE_PORT")?;
        let host = if host.contains(':') {
            format!("[{host}]")
        } else {
            host
        };
        let (ca_file, token_file) = (dir.join("ca.crt"), dir.join("token"));
        for file in [&ca_file, &token_file] {
            if !file.exists() {
                return Err(ApiError::NotInCluster {
                    reason: format!(
                        "{} is not there: set automountServiceAccountToken for this pod",
                        file.display()
                    ),
                });
            }
        }
        Ok(Self {
            url: format!("https://{host}:{port}"),
            ca_file: Some(ca_file),
            token_file,
        })
    }
}

/// A connection to the API server.
#[derive(Debug)]
pub struct Api {
    config: InCluster,
    http: reqwest::Client,
}

/// What the API server says about a failure (`meta/v1.Status`).
#[derive(Deserialize)]
struct StatusFormat {
    #[serde(default)]
    message: String,
}

impl Api {
    /// Makes a client; nothing is sent yet.
    ///
    /// # Errors
    /// [`ApiError::File`] if the authority's file cannot be used.
    pub fn new(config: InCluster) -> Result<Self, ApiError> {
        let mut roots = RootCertStore::empty();
        if let Some(path) = &config.ca_file {
            let wrong = |source| ApiError::File {
                path: path.clone(),
                source,
            };
            let pem = std::fs::read(path).map_err(wrong)?;
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let certificate = certificate.map_err(|err| wrong(io::Error::other(err)))?;
                roots
                    .add(certificate)
                    .map_err(|err| wrong(io::Error::other(err)))?;
            }
        }
        let unusable = |reason: String| ApiError::Unreachable { reason };
        // The provider is passed, not the process's default: a library must not depend on `main`.
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|err| unusable(err.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            // The API server is reached without a proxy, whatever the environment says.
            .no_proxy()
            .timeout(REQUEST_TIMEOUT)
            .pool_max_idle_per_host(1)
            .user_agent(concat!("clip-csi/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|err| unusable(err.to_string()))?;
        Ok(Self { config, http })
    }

    /// Gets the object at `path`, such as `/api/v1/nodes/n1`, which errors call `what`.
    ///
    /// # Errors
    /// Those of [`ApiError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str, what: &str) -> Result<T, ApiError> {
        let answer = self.send(Method::GET, path, what, None).await?;
        serde_json::from_slice(&answer).map_err(|err| ApiError::Malformed {
            what: what.to_owned(),
            reason: err.to_string(),
        })
    }

    /// Applies a JSON patch (RFC 6902) to the object at `path`.
    ///
    /// # Errors
    /// [`ApiError::Conflict`] if a `test` of the patch failed, or the object changed meanwhile.
    pub async fn patch(
        &self,
        path: &str,
        what: &str,
        patch: &serde_json::Value,
    ) -> Result<(), ApiError> {
        let body = patch.to_string();
        self.send(Method::PATCH, path, what, Some(body)).await?;
        Ok(())
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        what: &str,
        patch: Option<String>,
    ) -> Result<Vec<u8>, ApiError> {
        let mut request = self
            .http
            .request(method, format!("{}{path}", self.config.url))
            .header(ACCEPT, "application/json")
            .header(AUTHORIZATION, self.bearer()?);
        if let Some(patch) = patch {
            request = request
                .header(CONTENT_TYPE, "application/json-patch+json")
                .body(patch);
        }
        let unreachable = |err: reqwest::Error| ApiError::Unreachable {
            reason: innermost(&err),
        };
        let mut response = request.send().await.map_err(unreachable)?;
        let status = response.status();
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(unreachable)? {
            if MAX_ANSWER_BYTES < body.len() + bytes.len() {
                return Err(ApiError::Malformed {
                    what: what.to_owned(),
                    reason: format!("it is longer than {MAX_ANSWER_BYTES} bytes"),
                });
            }
            body.extend_from_slice(&bytes);
        }
        match status {
            status if status.is_success() => Ok(body),
            // 422 is what a failed `test` of a patch answers (apiserver, handlers/patch.go).
            StatusCode::CONFLICT | StatusCode::UNPROCESSABLE_ENTITY => Err(ApiError::Conflict {
                what: what.to_owned(),
            }),
            status => Err(ApiError::Refused {
                what: what.to_owned(),
                status: status.as_u16(),
                message: words(&body),
            }),
        }
    }

    /// Reads the token: kubelet renews it within the hour.
    fn bearer(&self) -> Result<HeaderValue, ApiError> {
        let path = &self.config.token_file;
        let wrong = |source| ApiError::File {
            path: path.clone(),
            source,
        };
        let token = std::fs::read_to_string(path).map_err(wrong)?;
        let mut value = HeaderValue::from_str(&format!("Bearer {}", token.trim()))
            .map_err(|_| wrong(io::Error::other("it holds no token")))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// What a failure's body says, for a person.
fn words(body: &[u8]) -> String {
    let message = match serde_json::from_slice::<StatusFormat>(body) {
        Ok(status) if !status.message.is_empty() => status.message,
        Ok(_) | Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    message.chars().take(MAX_SHOWN_CHARS).collect()
}

/// The innermost cause, which says what happened.
fn innermost(err: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = err;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_finds_its_api_server_and_others_hear_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let env = |host: &'static str| {
            move |name: &str| match name {
                "KUBERNETES_SERVICE_HOST" => Some(host.to_owned()),
                "KUBERNETES_SERVICE_PORT" => Some("443".to_owned()),
                _ => None,
            }
        };
        let err = InCluster::find(|_| None, dir.path())
            .unwrap_err()
            .to_string();
        assert!(err.contains("KUBERNETES_SERVICE_HOST is not set"), "{err}");
        let err = InCluster::find(env("10.0.0.1"), dir.path()).unwrap_err();
        assert!(
            err.to_string().contains("automountServiceAccountToken"),
            "{err}"
        );
        for name in ["ca.crt", "token"] {
            std::fs::File::create(dir.path().join(name)).unwrap();
        }
        for (host, url) in [
            ("10.0.0.1", "https://10.0.0.1:443"),
            ("fd00::1", "https://[fd00::1]:443"),
        ] {
            assert_eq!(InCluster::find(env(host), dir.path()).unwrap().url, url);
        }
    }

    #[test]
    fn the_words_of_a_refusal_are_found_and_bounded() {
        let status = br#"{"kind":"Status","message":"nodes \"n\" is forbidden"}"#;
        assert_eq!(words(status), "nodes \"n\" is forbidden");
        assert_eq!(words(b"proxy says no"), "proxy says no");
        assert_eq!(words("ä".repeat(1000).as_bytes()).chars().count(), 300);
    }
}
