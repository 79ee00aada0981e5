//! Says where a registry's content is to be had: its mirrors, in order, and itself.

use reqwest::{Url, header::HeaderMap};

use super::{
    config::{HostConfig, RegistryConfig},
    reference::DOCKER_HUB,
    tls::{Files, Trust},
    transport::protocol,
};
use crate::tier::SourceError;

/// Where a registry's content is to be had.
#[derive(Debug, Clone)]
pub(crate) struct RegistryEndpoints {
    /// Hosts that may have the same repositories, in the order in which they are asked.
    pub(crate) mirrors: Vec<EndpointSettings>,
    /// The registry itself, which says who may pull.
    pub(crate) origin: EndpointSettings,
    /// Whether it says so for everybody, also where a mirror might.
    pub(crate) always_ask_origin: bool,
}

/// How one host is spoken to about one registry's content.
#[derive(Debug, Clone)]
pub(crate) struct EndpointSettings {
    /// What it is called in errors, and what credentials are for: `host[:port]`.
    pub(crate) host: String,
    /// Where its API begins; repositories follow. It ends with a slash. `None` if its name, which looked
    /// like one, makes no URL (`1.2.3.999`): whoever asks it is told.
    pub(crate) base: Option<Url>,
    pub(crate) trust: Trust,
    /// Sent with each request to it.
    pub(crate) headers: HeaderMap,
    pub(crate) abilities: Abilities,
}

/// What a host is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// What a tag means.
    pub(crate) resolve: bool,
    /// What a digest names.
    pub(crate) pull: bool,
}

impl Abilities {
    pub(crate) const ALL: Self = Self {
        resolve: true,
        pull: true,
    };
}

impl RegistryEndpoints {
    /// Those of a registry as `[registry.hosts]` has them.
    pub(crate) fn configured(config: &RegistryConfig, registry: &str) -> Self {
        let settings = config.host(registry);
        let mirrors = settings.mirrors.iter();
        Self {
            mirrors: mirrors
                .map(|it| EndpointSettings::of_host(it, &config.host(it)))
                .collect(),
            origin: EndpointSettings::of_host(registry, &settings),
            always_ask_origin: settings.always_ask_origin,
        }
    }
}

impl EndpointSettings {
    fn of_host(host: &str, settings: &HostConfig) -> Self {
        let scheme = if settings.plain_http { "http" } else { "https" };
        let name = if host == DOCKER_HUB {
            "registry-1.docker.io"
        } else {
            host
        };
        Self {
            host: host.to_owned(),
            base: Url::parse(&format!("{scheme}://{name}/v2/")).ok(),
            trust: settings.trust(),
            headers: HeaderMap::new(),
            abilities: Abilities::ALL,
        }
    }

    /// The URL of `path` in a repository.
    ///
    /// # Errors
    /// If they make none.
    pub(crate) fn url(&self, repository: &str, path: &str) -> Result<Url, SourceError> {
        self.base
            .as_ref()
            .and_then(|it| it.join(&format!("{repository}/{path}")).ok())
            .ok_or_else(|| protocol(&self.host, "its name makes no URL".to_owned()))
    }

    /// Whether a URL is at this host, so that what is said about it holds.
    pub(crate) fn is_at(&self, url: &Url) -> bool {
        let base = self.base.as_ref();
        base.is_some_and(|it| it.origin() == url.origin())
    }
}

impl HostConfig {
    /// Whom its connections trust.
    pub(crate) fn trust(&self) -> Trust {
        match (&self.ca_file, self.plain_http) {
            (_, true) => Trust::None,
            (None, false) => Trust::System,
            (Some(ca_file), false) => Trust::Files(Files {
                authorities: vec![ca_file.clone()],
                ..Files::default()
            }),
        }
    }
}
