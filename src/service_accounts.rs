//! Reads service accounts and their image pull secrets from the Kubernetes API: `get` alone, by name.
//!
//! Whose service account it is, kubelet says in the volume context, and only where the driver's
//! CSIDriver object asks for that (`podInfoOnMount`): without, it would be the word of the pod's author.
//! So the object is looked at first. Nothing is kept but that: a secret that is changed or taken away
//! counts at the next publish.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use k8s_openapi::api::{
    core::v1::{Secret as ClusterSecret, ServiceAccount as ClusterServiceAccount},
    storage::v1::CSIDriver,
};
use kube::{Api, Client, Config};

use crate::{
    registry::{
        DockerConfig, PullSecret, ServiceAccount, ServiceAccountError, ServiceAccountName,
        ServiceAccounts,
    },
    secret::Secret,
    telemetry::error_chain,
    tier::BoxFuture,
};

/// How long a connection or an answer may take: a pod waits for it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it is known that kubelet says which pod a volume is for.
const POD_INFO_KNOWN: Duration = Duration::from_secs(60);

/// Secrets of one service account that are read, at most.
const MAX_SECRETS: usize = 16;

/// Types of secrets with credentials of registries, and the key that holds them.
const KINDS: [(&str, &str); 2] = [
    ("kubernetes.io/dockerconfigjson", ".dockerconfigjson"),
    ("kubernetes.io/dockercfg", ".dockercfg"),
];

/// Reads from one cluster.
pub struct ClusterServiceAccounts {
    client: Client,
    driver: String,
    /// std Mutex: held for a copy, never across an await.
    pod_info_known: Mutex<Option<Instant>>,
}

impl fmt::Debug for ClusterServiceAccounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterServiceAccounts")
            .field("driver", &self.driver)
            .finish_non_exhaustive()
    }
}

impl ClusterServiceAccounts {
    /// Makes a reader for the driver of that name.
    ///
    /// # Errors
    /// If no client can be made of the configuration.
    pub fn new(mut cluster: Config, driver: &str) -> kube::Result<Self> {
        cluster.connect_timeout = Some(REQUEST_TIMEOUT);
        cluster.read_timeout = Some(REQUEST_TIMEOUT);
        cluster.write_timeout = Some(REQUEST_TIMEOUT);
        // What waits is a publish, which is tried again anyway.
        cluster.default_retry = false;
        Ok(Self {
            client: Client::try_from(cluster)?,
            driver: driver.to_owned(),
            pod_info_known: Mutex::default(),
        })
    }

    async fn read_all(
        &self,
        name: &ServiceAccountName,
    ) -> Result<ServiceAccount, ServiceAccountError> {
        self.check_pod_info().await?;
        let accounts: Api<ClusterServiceAccount> =
            Api::namespaced(self.client.clone(), &name.namespace);
        let account = match accounts.get(&name.name).await {
            Ok(account) => account,
            Err(err) => return Err(explain(&err, "serviceaccounts")),
        };
        let secrets: Api<ClusterSecret> = Api::namespaced(self.client.clone(), &name.namespace);
        let mut pull_secrets = Vec::new();
        let named = account.image_pull_secrets.unwrap_or_default();
        // As kubelet: an entry without a name, which the API allows, is none.
        let named = named.into_iter().filter(|it| !it.name.is_empty());
        for secret in named.take(MAX_SECRETS) {
            let config = match secrets.get(&secret.name).await {
                Ok(found) => docker_config(&found),
                // As kubelet: one that is missing is passed over.
                Err(err) => match explain(&err, "secrets") {
                    ServiceAccountError::Refused(reason) => Err(reason),
                    unavailable @ ServiceAccountError::Unavailable(_) => return Err(unavailable),
                },
            };
            pull_secrets.push(PullSecret {
                name: secret.name,
                config,
            });
        }
        let annotations: BTreeMap<_, _> = account.metadata.annotations.unwrap_or_default();
        Ok(ServiceAccount {
            annotations,
            pull_secrets,
        })
    }

    /// Refuses to believe who a pod is if kubelet does not vouch for it.
    async fn check_pod_info(&self) -> Result<(), ServiceAccountError> {
        let known = *self
            .pod_info_known
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if known.is_some_and(|it| it.elapsed() < POD_INFO_KNOWN) {
            return Ok(());
        }
        let drivers: Api<CSIDriver> = Api::all(self.client.clone());
        let driver = match drivers.get(&self.driver).await {
            Ok(driver) => driver,
            Err(err) => return Err(explain(&err, "csidrivers")),
        };
        if driver.spec.pod_info_on_mount != Some(true) {
            return Err(ServiceAccountError::Refused(format!(
                "the CSIDriver {} has not podInfoOnMount: true, so nobody vouches for whose pod it is: set it",
                self.driver
            )));
        }
        *self
            .pod_info_known
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Ok(())
    }
}

impl ServiceAccounts for ClusterServiceAccounts {
    fn read<'a>(
        &'a self,
        name: &'a ServiceAccountName,
    ) -> BoxFuture<'a, Result<ServiceAccount, ServiceAccountError>> {
        Box::pin(self.read_all(name))
    }
}

/// Says why a pull secret cannot be used. Quotes nothing that was read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PullSecretError {
    /// There is none of that name.
    #[error(
        "Secret {name:?} does not exist in namespace {namespace}: make it, or name another one"
    )]
    NotFound {
        /// Where.
        namespace: String,
        /// Which.
        name: String,
    },
    /// The driver has no right to read it.
    #[error(
        "the driver may not get Secrets in namespace {namespace}: its operator adds the namespace to {value}"
    )]
    Forbidden {
        /// Where.
        namespace: String,
        /// What grants it in the chart.
        value: &'static str,
    },
    /// It holds no credentials.
    #[error("Secret {name:?} cannot be used: {reason}")]
    Invalid {
        /// Which.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The Kubernetes API does not answer: to be asked again.
    #[error("the Kubernetes API does not answer: {reason}")]
    Unavailable {
        /// What was seen.
        reason: String,
    },
}

/// Reads a pull secret by its name. `value` is what grants the right in the chart, for the error.
///
/// # Errors
/// [`PullSecretError`] says what to do.
pub async fn pull_secret(
    client: &Client,
    namespace: &str,
    name: &str,
    value: &'static str,
) -> Result<DockerConfig, PullSecretError> {
    let read = |secret: &ClusterSecret| docker_config(secret);
    read_secret(client, namespace, name, value, read).await
}

/// Reads the secret of a volume by its name: as kubelet gives it to the driver, which tells no type, for an image at
/// `registry`. `value` is what grants the right in the chart, for the error.
///
/// # Errors
/// [`PullSecretError`] says what to do.
pub async fn volume_secret(
    client: &Client,
    namespace: &str,
    name: &str,
    registry: &str,
    value: &'static str,
) -> Result<DockerConfig, PullSecretError> {
    let read = |secret: &ClusterSecret| volume_config(secret, registry);
    read_secret(client, namespace, name, value, read).await
}

async fn read_secret(
    client: &Client,
    namespace: &str,
    name: &str,
    value: &'static str,
    read: impl FnOnce(&ClusterSecret) -> Result<DockerConfig, String>,
) -> Result<DockerConfig, PullSecretError> {
    let secrets: Api<ClusterSecret> = Api::namespaced(client.clone(), namespace);
    let (namespace, name) = (namespace.to_owned(), name.to_owned());
    match secrets.get(&name).await {
        Ok(secret) => read(&secret).map_err(|reason| PullSecretError::Invalid { name, reason }),
        Err(kube::Error::Api(status)) if status.code == 404 => {
            Err(PullSecretError::NotFound { namespace, name })
        }
        Err(kube::Error::Api(status)) if matches!(status.code, 401 | 403) => {
            Err(PullSecretError::Forbidden { namespace, value })
        }
        Err(err) => Err(match explain(&err, "secrets") {
            ServiceAccountError::Unavailable(reason) => PullSecretError::Unavailable { reason },
            ServiceAccountError::Refused(reason) => PullSecretError::Invalid { name, reason },
        }),
    }
}

/// Reads the credentials out of a volume's secret: a `.dockerconfigjson`, or a user at `registry`.
fn volume_config(secret: &ClusterSecret, registry: &str) -> Result<DockerConfig, String> {
    let text = |key: &str| {
        let data = secret.data.as_ref()?.get(key)?;
        Some(String::from_utf8(data.0.clone()).map_err(|_| format!("its {key} is no text")))
    };
    let data = secret.data.as_ref();
    match data.and_then(|it| it.get(KINDS[0].1)) {
        Some(config) => DockerConfig::parse(&config.0).map_err(|err| err.to_string()),
        None => {
            let missing =
                || "it has neither .dockerconfigjson nor username and password".to_owned();
            let username = text("username").ok_or_else(missing)??;
            let password = Secret::new(text("password").ok_or_else(missing)??);
            let user = (registry.to_owned(), username, password);
            Ok(DockerConfig::of_users([user]))
        }
    }
}

/// Reads the credentials out of a secret.
fn docker_config(secret: &ClusterSecret) -> Result<DockerConfig, String> {
    let kind = secret.type_.as_deref().unwrap_or("Opaque");
    let Some((_, key)) = KINDS.iter().find(|(known, _)| *known == kind) else {
        return Err(format!("it is of type {kind:?}, not {}", KINDS[0].0));
    };
    let data = secret.data.as_ref().and_then(|it| it.get(*key));
    let data = data.ok_or_else(|| format!("it has no {key}"))?;
    let parsed = if *key == ".dockercfg" {
        // The older form: what is in `auths`, alone.
        DockerConfig::parse(&[b"{\"auths\":", data.0.as_slice(), b"}"].concat())
    } else {
        DockerConfig::parse(&data.0)
    };
    parsed.map_err(|err| err.to_string())
}

/// Says what an error means for who waits: whether to ask again. Quotes nothing that was read.
fn explain(err: &kube::Error, resource: &str) -> ServiceAccountError {
    match err {
        kube::Error::Api(status) if status.code == 404 => {
            ServiceAccountError::Refused("it does not exist".to_owned())
        }
        kube::Error::Api(status) if matches!(status.code, 401 | 403) => {
            ServiceAccountError::Refused(format!(
                "the driver may not get {resource} there: see registries.serviceAccountPullSecrets of its chart"
            ))
        }
        kube::Error::Api(status) => {
            ServiceAccountError::Unavailable(format!("HTTP {}", status.code))
        }
        // However often it is asked.
        kube::Error::BuildRequest(_) | kube::Error::HttpError(_) => {
            ServiceAccountError::Refused("its name is not one that can be asked for".to_owned())
        }
        // It may quote what it could not read.
        kube::Error::SerdeError(_) => {
            ServiceAccountError::Unavailable("its answer cannot be read".to_owned())
        }
        other => ServiceAccountError::Unavailable(error_chain(other).to_string()),
    }
}
