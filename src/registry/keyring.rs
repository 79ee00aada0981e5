//! Finds credentials for a repository: each way to them in turn, in kubelet's order.
//!
//! 1. the secret that the volume names (`nodePublishSecretRef`);
//! 2. the image pull secrets of the pod's service account, if the operator lets the driver read them;
//! 3. the credential provider plugins of the node;
//! 4. the node's docker config file.
//!
//! A way is gone only when those before it had nothing for the registry, or what they had was refused:
//! kubelet tries all that it finds, too. Nothing at all means anonymous access, which is not tried with
//! a registry that refused somebody's credentials.

use std::{collections::VecDeque, fmt, sync::Arc};

use tokio::time::Instant;

use super::{
    credentials::Credentials,
    node_credentials::NodeCredentials,
    providers::{Freshness, Providers},
    requester::{
        Requester, ServiceAccount, ServiceAccountError, ServiceAccounts, VolumeRequester,
        VolumeSecret,
    },
    transport::unavailable,
};
use crate::tier::SourceError;

/// Credentials that one repository is shown, at most: each one costs it a request or two.
const MAX_CANDIDATES: usize = 16;

/// All that knows credentials.
#[derive(Debug, Default)]
pub(crate) struct Keyring {
    pub(crate) node: Option<NodeCredentials>,
    pub(crate) providers: Option<Providers>,
    pub(crate) service_accounts: Option<Arc<dyn ServiceAccounts>>,
}

/// Credentials, and where they are from.
#[derive(Debug, Clone)]
pub(crate) struct Candidate {
    pub(crate) credentials: Credentials,
    pub(crate) origin: Origin,
    /// When there may be others, if that is known.
    pub(crate) until: Option<Instant>,
    /// Whether whoever gave them was not asked now: there may be others by now.
    pub(crate) is_from_memory: bool,
}

/// Where credentials are from. Prints as a phrase for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Whoever asks gave them.
    Given,
    /// The secret that the volume names.
    VolumeSecret,
    /// An image pull secret of the pod's service account.
    PullSecret { name: String, account: String },
    /// A credential provider plugin.
    Provider { name: String },
    /// The node's docker config file.
    Node,
}

/// The ways, in order.
const WAYS: [Way; 4] = [
    Way::OfRequester,
    Way::ServiceAccount,
    Way::Providers,
    Way::Node,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    OfRequester,
    ServiceAccount,
    Providers,
    Node,
}

/// The ways to credentials for one repository.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) keyring: Arc<Keyring>,
    pub(crate) host: String,
    pub(crate) repository: String,
    pub(crate) requester: Requester,
}

/// How far a [`Chain`] has been gone.
#[derive(Debug)]
pub(crate) struct Cursor {
    freshness: Freshness,
    next_way: usize,
    ready: VecDeque<Candidate>,
    tried: Vec<Candidate>,
    /// What ways had to say that led to nothing.
    notes: Vec<String>,
    account: Option<ServiceAccount>,
}

impl Cursor {
    /// Stands before the first way.
    pub(crate) fn new(freshness: Freshness) -> Self {
        Self {
            freshness,
            next_way: 0,
            ready: VecDeque::new(),
            tried: Vec::new(),
            notes: Vec::new(),
            account: None,
        }
    }

    /// Leaves out what was refused.
    pub(crate) fn without(mut self, refused: impl IntoIterator<Item = Candidate>) -> Self {
        self.tried.extend(refused);
        self
    }

    /// Stands before the first way again, where nobody may answer from memory. What was tried is not
    /// tried again.
    pub(crate) fn anew(self) -> Self {
        Self::new(Freshness::Anew).without(self.tried)
    }

    /// Takes the latest credentials for untried: nobody could be asked about them.
    pub(crate) fn give_back(&mut self) {
        self.ready.extend(self.tried.pop());
        self.ready.rotate_right(1.min(self.ready.len()));
    }

    /// Whether no way has led to any credentials so far.
    pub(crate) fn is_without_any(&self) -> bool {
        self.tried.is_empty()
    }

    /// Says what was tried, and what to do.
    pub(crate) fn hint(&self) -> String {
        let tried: Vec<_> = self.tried.iter().map(Candidate::to_string).collect();
        let mut hint = if tried.is_empty() {
            "none were given; it may be private, or not exist: check the name, and give a pull secret (nodePublishSecretRef)".to_owned()
        } else {
            format!(
                "it does not take those of {}: check the pull secret, and that the image exists",
                tried.join(", nor those of ")
            )
        };
        if !self.notes.is_empty() {
            hint = format!("{hint}; {}", self.notes.join("; "));
        }
        hint
    }
}

impl Chain {
    /// Returns the next credentials that were not tried yet, `None` after the last.
    ///
    /// # Errors
    /// [`SourceError::Unavailable`] if a way cannot be gone now, and may later.
    pub(crate) async fn next(&self, cursor: &mut Cursor) -> Result<Option<Candidate>, SourceError> {
        loop {
            while let Some(found) = cursor.ready.pop_front() {
                let mut tried = cursor.tried.iter();
                if MAX_CANDIDATES <= cursor.tried.len()
                    || tried.any(|it| it.credentials == found.credentials)
                {
                    continue;
                }
                cursor.tried.push(found.clone());
                return Ok(Some(found));
            }
            let Some(way) = WAYS.get(cursor.next_way) else {
                return Ok(None);
            };
            let found = self.go(*way, cursor).await?;
            cursor.ready.extend(found);
            cursor.next_way += 1;
        }
    }

    async fn go(&self, way: Way, cursor: &mut Cursor) -> Result<Vec<Candidate>, SourceError> {
        let volume = match (&self.requester, way) {
            (Requester::Exactly(credentials), Way::OfRequester) => {
                return Ok(candidates(Origin::Given, [credentials.clone()]));
            }
            (Requester::Exactly(_), _) => return Ok(Vec::new()),
            (Requester::Volume(volume), _) => Some(volume),
            (Requester::Node, _) => None,
        };
        match way {
            Way::OfRequester => Ok(self.of_volume(volume)),
            Way::ServiceAccount => match volume {
                Some(volume) => self.of_service_account(volume, cursor).await,
                None => Ok(Vec::new()),
            },
            Way::Providers => Ok(self.of_providers(volume, cursor).await),
            Way::Node => {
                let config = self.keyring.node.as_ref().map(NodeCredentials::current);
                let found = config.iter().flat_map(|it| self.of_config(it));
                Ok(candidates(Origin::Node, found))
            }
        }
    }

    fn of_volume(&self, volume: Option<&VolumeRequester>) -> Vec<Candidate> {
        match volume.and_then(|it| it.secret.as_ref()) {
            None => Vec::new(),
            Some(VolumeSecret::Basic(it)) => candidates(Origin::VolumeSecret, [it.clone()]),
            Some(VolumeSecret::DockerConfig(it)) => {
                candidates(Origin::VolumeSecret, self.of_config(it))
            }
        }
    }

    async fn of_service_account(
        &self,
        volume: &VolumeRequester,
        cursor: &mut Cursor,
    ) -> Result<Vec<Candidate>, SourceError> {
        let (Some(cluster), Some(name)) = (&self.keyring.service_accounts, &volume.pod) else {
            return Ok(Vec::new());
        };
        let account = match cluster.read(name).await {
            Ok(account) => account,
            Err(ServiceAccountError::Unavailable(reason)) => {
                let reason =
                    format!("reading the pull secrets of service account {name}: {reason}");
                return Err(unavailable("the Kubernetes API", reason));
            }
            Err(ServiceAccountError::Refused(reason)) => {
                cursor
                    .notes
                    .push(format!("pull secrets of service account {name}: {reason}"));
                return Ok(Vec::new());
            }
        };
        let mut found = Vec::new();
        for secret in &account.pull_secrets {
            match &secret.config {
                Ok(config) => {
                    let origin = Origin::PullSecret {
                        name: secret.name.clone(),
                        account: name.to_string(),
                    };
                    found.extend(candidates(origin, self.of_config(config)));
                }
                Err(reason) => cursor.notes.push(format!(
                    "pull secret {:?} of service account {name}: {reason}",
                    secret.name
                )),
            }
        }
        cursor.account = Some(account);
        Ok(found)
    }

    async fn of_providers(
        &self,
        volume: Option<&VolumeRequester>,
        cursor: &mut Cursor,
    ) -> Vec<Candidate> {
        let Some(providers) = &self.keyring.providers else {
            return Vec::new();
        };
        let (host, repository) = (&self.host, &self.repository);
        let account = cursor.account.as_ref();
        let asked = providers
            .ask(host, repository, volume, account, cursor.freshness)
            .await;
        let mut found = Vec::new();
        for it in asked {
            match it.outcome {
                Ok(said) => {
                    let origin = Origin::Provider { name: it.provider };
                    let users = candidates(origin, said.users).into_iter();
                    found.extend(users.map(|it| Candidate {
                        until: said.until,
                        is_from_memory: said.is_from_memory,
                        ..it
                    }));
                }
                Err(reason) => cursor
                    .notes
                    .push(format!("credential provider {:?}: {reason}", it.provider)),
            }
        }
        found
    }

    fn of_config(&self, config: &super::credentials::DockerConfig) -> Vec<Credentials> {
        config
            .for_repository(&self.host, &self.repository)
            .collect()
    }
}

/// Those of `found` that are any.
fn candidates(origin: Origin, found: impl IntoIterator<Item = Credentials>) -> Vec<Candidate> {
    let found = found.into_iter();
    found
        .filter(|it| *it != Credentials::Anonymous)
        .map(|credentials| Candidate {
            credentials,
            origin: origin.clone(),
            until: None,
            is_from_memory: false,
        })
        .collect()
}

impl fmt::Display for Candidate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Given => write!(f, "{}", self.credentials),
            origin => write!(f, "{} ({origin})", self.credentials),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Given => f.write_str("given"),
            Self::VolumeSecret => f.write_str("nodePublishSecretRef"),
            Self::PullSecret { name, account } => {
                write!(f, "pull secret {name:?} of service account {account}")
            }
            Self::Provider { name } => write!(f, "credential provider {name:?}"),
            Self::Node => f.write_str("the node's docker config"),
        }
    }
}
