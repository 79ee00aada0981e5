//! The Identity service: who this is, and that it is alive.

use std::{collections::BTreeMap, fmt, str::FromStr};

use tonic::{Request, Response, Status};

use super::observe::Observer;
use crate::pb::v1::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, PluginCapability, ProbeRequest, ProbeResponse, identity_server,
    plugin_capability::{self, Service, service},
};

/// The name under which pods know the driver, if the configuration says nothing else.
pub const DEFAULT_PLUGIN_NAME: &str = "csi.clip-csi.dev";

/// Says why a text is not a plugin name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "driver name {text:?} is malformed: use 2 to 63 letters, digits, \"-\" and \".\", \
     the first and the last one a letter"
)]
pub struct PluginNameError {
    /// The text as it came.
    pub text: String,
}

/// The driver's name: that of its `CSIDriver` object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginName(String);

impl PluginName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PluginName {
    type Err = PluginNameError;

    /// Parses what both the CSI spec (GetPluginInfoResponse, `name`) and csi-sanity
    /// (`^[a-zA-Z][A-Za-z0-9-.\_]{0,61}[a-zA-Z]$`) accept, less the underscore, which no
    /// `CSIDriver` object can have.
    fn from_str(text: &str) -> Result<Self, PluginNameError> {
        let ends = [text.chars().next(), text.chars().last()];
        let good = (2..=63).contains(&text.len())
            && ends.iter().flatten().all(char::is_ascii_alphabetic)
            && text
                .chars()
                .all(|it| it.is_ascii_alphanumeric() || it == '-' || it == '.');
        if good {
            Ok(Self(text.to_owned()))
        } else {
            Err(PluginNameError {
                text: text.to_owned(),
            })
        }
    }
}

impl fmt::Display for PluginName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The Identity service.
#[derive(Debug)]
pub(super) struct IdentityService {
    pub(super) name: PluginName,
    pub(super) observer: Observer,
}

#[tonic::async_trait]
impl identity_server::Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        let answer = GetPluginInfoResponse {
            name: self.name.to_string(),
            vendor_version: env!("CARGO_PKG_VERSION").to_owned(),
            manifest: BTreeMap::new(),
        };
        self.observer.quiet("GetPluginInfo", answer)
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let controller = Service {
            r#type: service::Type::ControllerService.into(),
        };
        let answer = GetPluginCapabilitiesResponse {
            capabilities: vec![PluginCapability {
                r#type: Some(plugin_capability::Type::Service(controller)),
            }],
        };
        self.observer.quiet("GetPluginCapabilities", answer)
    }

    /// Answers without looking at anything: the liveness sidecar has kubelet kill the driver, and
    /// with it all mounts, if this takes long. It is served once the state is recovered, hence
    /// always ready.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        self.observer
            .quiet("Probe", ProbeResponse { ready: Some(true) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_kubernetes_and_csi_sanity_refuse_are_refused() {
        let longest = "a".repeat(63);
        for good in [DEFAULT_PLUGIN_NAME, "ab", "a.b-c9.dev", longest.as_str()] {
            assert_eq!(good.parse::<PluginName>().unwrap().as_str(), good);
        }
        let long = "a".repeat(64);
        for bad in [
            "", "a", "9a", "a9", ".a", "a.", "a_b", "a b", "ä.dev", &long,
        ] {
            assert!(bad.parse::<PluginName>().is_err(), "{bad:?} was taken");
        }
    }
}
