//! Says how registries are reached, and what is taken from them at most.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;

use super::reference::{canonical_host, check_host};

/// How registries are reached.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistryConfig {
    /// Settings by host, written as in image references: `host[:port]`.
    ///
    /// They hold for registries, for token servers, and for hosts that a registry redirects to.
    pub hosts: BTreeMap<String, HostConfig>,
    /// Directory of `hosts.toml` files, as containerd's `certs.d`, for registries that are not in `hosts`.
    pub hosts_dir: Option<PathBuf>,
    /// Let `skip_verify` stand in those files: whoever is on the way can then read passwords, and say
    /// what an image is.
    pub allow_skip_verify: bool,
    /// Docker config file with the node's credentials, for volumes that bring none.
    pub docker_config_file: Option<PathBuf>,
    /// Kubelet's `CredentialProviderConfig`, whose plugins are asked for who has no secret.
    pub credential_provider_config: Option<PathBuf>,
    /// Directory of the plugins.
    pub credential_provider_bin_dir: Option<PathBuf>,
    /// Use the image pull secrets of the pods' service accounts, read through the Kubernetes API.
    pub service_account_pull_secrets: bool,
    /// Time to connect, TLS included.
    pub connect_timeout_seconds: u64,
    /// Time without progress after which an answer counts as stalled.
    pub read_timeout_seconds: u64,
    /// Failures in a row, without a new byte between them, after which a request is given up.
    pub retries: u32,
    /// Longest wait between two attempts that the registry did not ask for.
    pub max_backoff_seconds: u64,
    /// Longest sum of waits without a new byte between them, `Retry-After` included.
    pub max_wait_seconds: u64,
    /// Largest manifest, index or image configuration.
    pub max_manifest_bytes: u64,
    /// Most layers of one image.
    pub max_layers: usize,
    /// Look in the registry for an index that was pushed beside an image before its layers are read.
    pub use_pushed_indexes: bool,
    /// Believe an index that a volume pins although the installation's key does not vouch for it.
    ///
    /// Layers are shared by all volumes of a node, and so is what such an index says of them.
    pub trust_pinned_indexes: bool,
    /// Hosts to which plain http is spoken for volumes that say so: `host[:port]`.
    pub insecure_hosts: Vec<String>,
    /// Do not ask the registry for volumes that say `pullPolicy: Never`, not even for the right to pull.
    pub trust_pull_policy_never: bool,
}

/// How one host is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostConfig {
    /// Speak plain http to this host: no encryption, and whoever is on the way can read passwords.
    pub plain_http: bool,
    /// PEM file with certificate authorities to trust for this host, beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Hosts that may have the same repositories, asked before this one, in order: `host[:port]`.
    pub mirrors: Vec<String>,
    /// Ask this host itself for every volume's right to pull, also of those without credentials;
    /// mirrors then give only what a digest names.
    pub always_ask_origin: bool,
}

/// Says what is wrong with a [`RegistryConfig`].
#[derive(Debug, thiserror::Error)]
pub enum RegistryConfigError {
    /// A host's name cannot be one.
    #[error("registry hosts: {host:?} must be written host[:port]: {reason}")]
    Host {
        /// The key as it came.
        host: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A mirror's name cannot be one.
    #[error("registry hosts: mirror {mirror:?} of {host} must be written host[:port]: {reason}")]
    Mirror {
        /// The host that it is a mirror of.
        host: String,
        /// The mirror as it came.
        mirror: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A value is out of range.
    #[error("registry {field} must be {demand}")]
    Value {
        /// The field's name.
        field: &'static str,
        /// What it must be.
        demand: &'static str,
    },
    /// A file of certificate authorities cannot be used.
    #[error("registry ca_file {path}: {reason}")]
    CaFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the directory of hosts cannot be used.
    #[error("registry hosts_dir {path}: {reason}")]
    HostsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file with the node's credentials cannot be used.
    #[error("registry docker_config_file {path}: {reason}")]
    DockerConfigFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never its content.
        reason: String,
    },
    /// The credential provider plugins cannot be used.
    #[error("registry credential_provider_config {path}: {reason}")]
    Providers {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, or with a plugin.
        reason: String,
    },
    /// A plugin needs to know annotations, and nobody knows them.
    #[error(
        "registry: credential provider {provider:?} wants annotations of service accounts: set service_account_pull_secrets, so that they may be read"
    )]
    Annotations {
        /// Its name.
        provider: String,
    },
    /// The HTTP client could not be made.
    #[error("making the HTTP client: {reason}")]
    Client {
        /// What was seen.
        reason: String,
    },
}

impl Default for RegistryConfig {
    fn default() -> Self {
        Self {
            hosts: BTreeMap::new(),
            hosts_dir: None,
            allow_skip_verify: false,
            docker_config_file: None,
            credential_provider_config: None,
            credential_provider_bin_dir: None,
            service_account_pull_secrets: false,
            // A SYN is sent again after 1, 3 and 7 s: three losses are still survived.
            connect_timeout_seconds: 10,
            // Registries on object stores were seen to pause for 10 to 20 s; kubelet waits 120 s.
            read_timeout_seconds: 30,
            retries: 5,
            max_backoff_seconds: 10,
            // One wait of the longest Retry-After that is honoured, and as much again.
            max_wait_seconds: 120,
            // What the OCI distribution-spec v1.1 ("Pushing manifests") asks registries to take.
            max_manifest_bytes: 4 << 20,
            // Docker's overlay driver stops at 128; nothing that is sold builds more.
            max_layers: 256,
            use_pushed_indexes: true,
            trust_pinned_indexes: false,
            insecure_hosts: Vec::new(),
            trust_pull_policy_never: false,
        }
    }
}

impl RegistryConfig {
    /// Checks what the types do not, and gives hosts their canonical names.
    pub(crate) fn checked(mut self) -> Result<Self, RegistryConfigError> {
        for (field, value) in [
            ("connect_timeout_seconds", self.connect_timeout_seconds),
            ("read_timeout_seconds", self.read_timeout_seconds),
        ] {
            if !(1..=3600).contains(&value) {
                let demand = "between 1 and 3600";
                return Err(RegistryConfigError::Value { field, demand });
            }
        }
        if !(1024..=64 << 20).contains(&self.max_manifest_bytes) {
            return Err(RegistryConfigError::Value {
                field: "max_manifest_bytes",
                demand: "between 1 KiB and 64 MiB",
            });
        }
        let mut hosts = BTreeMap::new();
        for (host, mut settings) in self.hosts {
            if let Err(reason) = check_host(&host) {
                return Err(RegistryConfigError::Host { host, reason });
            }
            settings.mirrors = checked_mirrors(&host, settings.mirrors)?;
            hosts.insert(canonical_host(&host), settings);
        }
        self.hosts = hosts;
        Ok(self)
    }

    /// The file about credential provider plugins, and their directory.
    pub(crate) fn credential_providers(
        &self,
    ) -> Result<Option<(&Path, &Path)>, RegistryConfigError> {
        let file = self.credential_provider_config.as_deref();
        match (file, self.credential_provider_bin_dir.as_deref()) {
            (Some(file), Some(bin_dir)) => Ok(Some((file, bin_dir))),
            (None, None) => Ok(None),
            (Some(_), None) => Err(RegistryConfigError::Value {
                field: "credential_provider_bin_dir",
                demand: "set beside credential_provider_config",
            }),
            (None, Some(_)) => Err(RegistryConfigError::Value {
                field: "credential_provider_config",
                demand: "set beside credential_provider_bin_dir",
            }),
        }
    }

    pub(crate) fn has_host(&self, host: &str) -> bool {
        self.hosts.contains_key(&canonical_host(host))
    }

    pub(crate) fn host(&self, host: &str) -> HostConfig {
        self.hosts
            .get(&canonical_host(host))
            .cloned()
            .unwrap_or_default()
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        Duration::from_secs(self.connect_timeout_seconds)
    }

    pub(crate) fn read_timeout(&self) -> Duration {
        Duration::from_secs(self.read_timeout_seconds)
    }

    pub(crate) fn max_manifest_len(&self) -> usize {
        usize::try_from(self.max_manifest_bytes).unwrap_or(usize::MAX)
    }
}

/// Gives mirrors their canonical names.
fn checked_mirrors(host: &str, mirrors: Vec<String>) -> Result<Vec<String>, RegistryConfigError> {
    let mut checked = Vec::with_capacity(mirrors.len());
    for mirror in mirrors {
        let canonical = canonical_host(&mirror);
        let reason = match check_host(&mirror) {
            Err(reason) => reason,
            Ok(()) if canonical == canonical_host(host) => "it is the host itself".to_owned(),
            Ok(()) if checked.contains(&canonical) => "it is named twice".to_owned(),
            Ok(()) => {
                checked.push(canonical);
                continue;
            }
        };
        return Err(RegistryConfigError::Mirror {
            host: host.to_owned(),
            mirror,
            reason,
        });
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_read_and_its_hosts_are_canonical() {
        let config: RegistryConfig = toml::from_str(
            "retries = 2\n[hosts.\"127.0.0.1:5000\"]\nplain_http = true\n[hosts.\"index.docker.io\"]\nca_file = \"/ca\"\nmirrors = [\"M.x:5000\", \"n.x\"]\n",
        )
        .unwrap();
        let config = config.checked().unwrap();
        assert_eq!(config.retries, 2);
        assert_eq!(config.max_layers, RegistryConfig::default().max_layers);
        assert!(config.host("127.0.0.1:5000").plain_http);
        assert!(!config.host("127.0.0.1:5001").plain_http);
        assert_eq!(config.host("docker.io").ca_file, Some("/ca".into()));
        assert_eq!(config.host("docker.io").mirrors, ["m.x:5000", "n.x"]);
    }

    #[test]
    fn wrong_configurations_are_refused() {
        for (text, expected) in [
            (
                "hosts.\"https://h\".plain_http = true",
                "must be written host[:port]",
            ),
            (
                "hosts.\"h\".mirrors = [\"https://m\"]",
                "mirror \"https://m\" of h must be written host[:port]",
            ),
            ("hosts.\"h\".mirrors = [\"H\"]", "it is the host itself"),
            ("hosts.\"h\".mirrors = [\"m\", \"m\"]", "it is named twice"),
            ("read_timeout_seconds = 0", "between 1 and 3600"),
            ("connect_timeout_seconds = 0", "between 1 and 3600"),
            ("max_manifest_bytes = 1", "between 1 KiB and 64 MiB"),
        ] {
            let config: RegistryConfig = toml::from_str(text).unwrap();
            let error = config.checked().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(toml::from_str::<RegistryConfig>("insecure = true").is_err());
    }
}
