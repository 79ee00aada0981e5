//! Makes HTTP clients for registries, and explains TLS faults.

use std::{
    error::Error as _,
    path::{Path, PathBuf},
    time::Duration,
};

use rustls::{AlertDescription, pki_types::CertificateDer};

use super::{
    config::RegistryConfigError,
    transport::{root_cause, unavailable},
};
use crate::{
    tier::SourceError,
    tls::{self, Identity, SystemAuthorities},
};

/// Idle connections per host: a stream and the next one.
const MAX_IDLE_CONNECTIONS: usize = 2;

/// How long an idle connection is kept; each costs its buffers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);

/// Whom a connection trusts, and what it shows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trust {
    /// Nobody: for plain http.
    None,
    /// The machine's certificate authorities.
    System,
    /// The machine's, and what is in files.
    Files(Files),
}

/// Files about TLS with a host.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Files {
    /// Certificate authorities, beside the machine's.
    pub(crate) authorities: Vec<PathBuf>,
    /// The certificate that is shown, and its key.
    pub(crate) client: Option<(PathBuf, PathBuf)>,
    /// Whether any certificate of the host is taken.
    pub(crate) skip_verify: bool,
}

/// What is in [`Files`].
#[derive(Debug, Clone, Default)]
pub(crate) struct Loaded {
    authorities: Vec<CertificateDer<'static>>,
    identity: Option<Identity>,
}

impl Loaded {
    /// Reads the files.
    ///
    /// # Errors
    /// [`RegistryConfigError::CaFile`] names the file.
    pub(crate) fn read(files: &Files) -> Result<Self, RegistryConfigError> {
        let wrong = |path: &Path, reason: String| RegistryConfigError::CaFile {
            path: path.to_owned(),
            reason,
        };
        let mut loaded = Self::default();
        for path in &files.authorities {
            let found = tls::read_authorities(path).map_err(|reason| wrong(path, reason))?;
            loaded.authorities.extend(found);
        }
        if let Some((certificate, key)) = &files.client {
            let found = Identity::read(certificate, key);
            loaded.identity = Some(found.map_err(|reason| wrong(certificate, reason))?);
        }
        Ok(loaded)
    }
}

/// Makes a client that trusts `trust`, where `loaded` is what is in its files.
pub(crate) fn build_client(
    trust: &Trust,
    loaded: Loaded,
    connect_timeout: Duration,
) -> Result<reqwest::Client, RegistryConfigError> {
    let wrong = |reason: String| RegistryConfigError::Client { reason };
    let system = match trust {
        Trust::None => SystemAuthorities::Ignored,
        Trust::System | Trust::Files(_) => SystemAuthorities::Trusted,
    };
    let tls = match loaded.identity {
        None => tls::client_config(system, loaded.authorities),
        Some(identity) => tls::client_config_as(system, loaded.authorities, identity),
    };
    let mut tls = tls.map_err(wrong)?;
    if matches!(trust, Trust::Files(files) if files.skip_verify) {
        tls = tls::without_verification(tls);
    }
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
        // Some servers say of a certificate that is missing what others say of one that they do not know.
        Some(rustls::Error::AlertReceived(
            alert @ (AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRequired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::UnsupportedCertificate),
        )) => unavailable(
            host,
            format!(
                "it wants to be shown a certificate that it trusts ({alert:?}): name one as client in its hosts.toml"
            ),
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
