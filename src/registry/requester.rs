//! Says on whose behalf a registry is asked, and what they brought.

use std::{collections::BTreeMap, fmt};

use serde::Deserialize;

use super::credentials::{Credentials, DockerConfig};
use crate::{secret::Secret, tier::BoxFuture};

/// On whose behalf a registry is asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Requester {
    /// Somebody who shows these credentials, and no others.
    Exactly(Credentials),
    /// A volume of a pod: each way to credentials is tried, its own first.
    Volume(VolumeRequester),
    /// The node itself.
    Node,
}

/// What a volume brought.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct VolumeRequester {
    /// The secret that the volume names (`nodePublishSecretRef`).
    pub secret: Option<VolumeSecret>,
    /// The pod's service account, as kubelet says.
    pub pod: Option<ServiceAccountName>,
    /// Tokens of that service account, as kubelet gives them.
    pub tokens: ServiceAccountTokens,
}

/// The secret of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum VolumeSecret {
    /// For whichever registry the image is at.
    Basic(Credentials),
    /// By registry.
    DockerConfig(DockerConfig),
}

/// Names a service account. Prints as `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ServiceAccountName {
    /// Its namespace.
    pub namespace: String,
    /// Its name in there.
    pub name: String,
}

impl fmt::Display for ServiceAccountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Tokens of a service account by audience.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ServiceAccountTokens(BTreeMap<String, Secret<String>>);

/// A token as kubelet passes it (kubernetes, `pkg/volume/csi`, `podServiceAccountTokenAttrs`).
#[derive(Deserialize)]
struct TokenFormat {
    token: String,
}

impl ServiceAccountTokens {
    /// Parses the value of `csi.storage.k8s.io/serviceAccount.tokens`.
    ///
    /// # Errors
    /// Says that it is malformed, and never quotes it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let tokens: BTreeMap<String, TokenFormat> = serde_json::from_str(text).map_err(|err| {
            format!(
                "the tokens of the service account are malformed at line {}, column {}",
                err.line(),
                err.column()
            )
        })?;
        let tokens = tokens.into_iter();
        Ok(Self(
            tokens
                .map(|(audience, it)| (audience, Secret::new(it.token)))
                .collect(),
        ))
    }

    /// The token for an audience.
    pub(crate) fn get(&self, audience: &str) -> Option<&Secret<String>> {
        self.0.get(audience)
    }
}

/// What the cluster says of a service account.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its image pull secrets, in its order.
    pub pull_secrets: Vec<PullSecret>,
}

/// An image pull secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullSecret {
    /// Its name.
    pub name: String,
    /// What it holds, or why that cannot be used.
    pub config: Result<DockerConfig, String>,
}

/// Says why the cluster does not tell of a service account.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ServiceAccountError {
    /// It does not answer: to be asked again.
    #[error("the Kubernetes API does not answer: {0}")]
    Unavailable(String),
    /// It will not tell, however often it is asked.
    #[error("{0}")]
    Refused(String),
}

/// Who knows service accounts: the seam to the Kubernetes API.
pub trait ServiceAccounts: Send + Sync + fmt::Debug {
    /// Reads a service account and its image pull secrets.
    ///
    /// # Errors
    /// [`ServiceAccountError`], which quotes no secret.
    fn read<'a>(
        &'a self,
        name: &'a ServiceAccountName,
    ) -> BoxFuture<'a, Result<ServiceAccount, ServiceAccountError>>;
}

impl From<&Credentials> for Requester {
    fn from(credentials: &Credentials) -> Self {
        Self::Exactly(credentials.clone())
    }
}

impl From<&Self> for Requester {
    fn from(requester: &Self) -> Self {
        requester.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_found_by_audience_and_never_printed() {
        let text = r#"{"sts.example": {"token": "hunter2", "expirationTimestamp": "2030-01-01T00:00:00Z"}, "": {"token": "t"}}"#;
        let tokens = ServiceAccountTokens::parse(text).unwrap();
        let token = |audience| tokens.get(audience).map(|it| it.expose().as_str());
        assert_eq!(token("sts.example"), Some("hunter2"));
        assert_eq!(token(""), Some("t"));
        assert_eq!(token("other"), None);
        assert!(!format!("{tokens:?}").contains("hunter2"));
        let error = ServiceAccountTokens::parse(r#"{"a": "hunter2"}"#).unwrap_err();
        assert!(error.contains("malformed at line 1"), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
