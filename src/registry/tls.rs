//! Makes HTTP clients for registries, and explains TLS faults.

use std::{
    error::Error as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustls::pki_types::CertificateDer;

use super::{
    config::RegistryConfigError,
    transport::{root_cause, unavailable},
};
use crate::{
    tier::SourceError,
    tls::{self, SystemAuthorities},
};

/// Idle connections per host: a stream and the next one.
const MAX_IDLE_CONNECTIONS: usize = 2;

/// How long an idle connection is kept; each costs its buffers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

/// Whom a connection trusts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trust {
    /// Nobody: for plain http.
    None,
    /// The machine's certificate authorities.
    System,
    /// The machine's and those of a file.
    SystemAnd(PathBuf),
}

/// Reads a PEM file of certificate authorities, at least one.
pub(crate) fn read_authorities(
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, RegistryConfigError> {
    tls::read_authorities(path).map_err(|reason| RegistryConfigError::CaFile {
        path: path.to_owned(),
        reason,
    })
}

/// Makes a client that trusts `trust`, where `extra` are the authorities of its file.
pub(crate) fn build_client(
    trust: &Trust,
    extra: Vec<CertificateDer<'static>>,
    connect_timeout: Duration,
) -> Result<reqwest::Client, RegistryConfigError> {
    let wrong = |reason: String| RegistryConfigError::Client { reason };
    let system = match trust {
        Trust::None => SystemAuthorities::Ignored,
        Trust::System | Trust::SystemAnd(_) => SystemAuthorities::Trusted,
    };
    let tls = tls::client_config(system, extra).map_err(wrong)?;
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .connect_timeout(connect_timeout)
        .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .user_agent(concat!("clip-csi/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| wrong(root_cause(&error)))
}

/// Turns a failure to get any answer into an error that may pass. TLS faults need a person, but once
/// the configuration is mended, or the certificate renewed, the volumes that wait recover.
pub(crate) fn send_error(host: &str, error: reqwest::Error) -> SourceError {
    match find_tls_error(&error) {
        Some(rustls::Error::InvalidCertificate(why)) => unavailable(
            host,
            format!(
                "its TLS certificate is not trusted ({why}): if it is right, name its CA in ca_file for this host"
            ),
        ),
        Some(rustls::Error::InvalidMessage(_)) => unavailable(
            host,
            "it does not speak TLS: set plain_http for this host if this is meant".to_owned(),
        ),
        Some(other) => unavailable(host, format!("TLS failed: {other}")),
        None if error.is_connect() => {
            unavailable(host, format!("cannot connect: {}", root_cause(&error)))
        }
        None => unavailable(host, format!("no answer: {}", root_cause(&error))),
    }
}

fn find_tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(it) = cause {
        if let Some(found) = it.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        // io::Error hides what it wraps from source().
        let wrapped = it
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        cause = match wrapped {
            Some(inner) => Some(inner),
            None => it.source(),
        };
    }
    None
}
