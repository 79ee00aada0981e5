//! Makes HTTP clients that trust the right certificate authorities, and explains TLS faults.
//!
//! reqwest's own set-up is not used: it panics in a process without a default crypto provider, and
//! fails in one without certificate authorities, although plain http needs neither.

use std::{
    error::Error as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

use super::{
    config::RegistryConfigError,
    transport::{root_cause, unavailable},
};
use crate::tier::SourceError;

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
    let wrong = |reason: String| RegistryConfigError::CaFile {
        path: path.to_owned(),
        reason,
    };
    let pem = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| wrong(format!("it is not PEM: {error}")))?;
    if certificates.is_empty() {
        return Err(wrong("it holds no certificate".to_owned()));
    }
    let mut roots = RootCertStore::empty();
    for certificate in &certificates {
        roots
            .add(certificate.clone())
            .map_err(|error| wrong(format!("a certificate in it is not usable: {error}")))?;
    }
    Ok(certificates)
}

/// Makes a client that trusts `trust`, where `extra` are the authorities of its file.
pub(crate) fn build_client(
    trust: &Trust,
    extra: Vec<CertificateDer<'static>>,
    connect_timeout: Duration,
) -> Result<reqwest::Client, RegistryConfigError> {
    let wrong = |reason: String| RegistryConfigError::Client { reason };
    let mut roots = RootCertStore::empty();
    if *trust != Trust::None {
        let system = rustls_native_certs::load_native_certs();
        let (n_added, _) = roots.add_parsable_certificates(system.certs);
        if n_added == 0 {
            tracing::warn!(
                "this machine has no certificate authorities: only those of ca_file are trusted"
            );
        }
    }
    roots.add_parsable_certificates(extra);
    // The provider is passed, not the process's default: a library must not depend on `main`.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
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
