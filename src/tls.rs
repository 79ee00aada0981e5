//! Makes TLS settings that trust the right certificate authorities.
//!
//! reqwest's own set-up is not used: it panics in a process without a default crypto provider, and
//! fails in one without certificate authorities, although plain http needs neither.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};

/// Whether the machine's certificate authorities are trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SystemAuthorities {
    /// Beside those that are named.
    Trusted,
    /// Not even looked for: for plain http.
    Ignored,
}

/// Reads a PEM file of certificate authorities, at least one.
///
/// # Errors
/// Says what is wrong with the file.
pub(crate) fn read_authorities(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = std::fs::read(path).map_err(|error| error.to_string())?;
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("it is not PEM: {error}"))?;
    if certificates.is_empty() {
        return Err("it holds no certificate".to_owned());
    }
    let mut roots = RootCertStore::empty();
    for certificate in &certificates {
        roots
            .add(certificate.clone())
            .map_err(|error| format!("a certificate in it is not usable: {error}"))?;
    }
    Ok(certificates)
}

/// Makes the settings of clients that trust the machine's authorities, if asked for, and `extra`.
///
/// # Errors
/// Those of rustls, which no settings of ours cause.
pub(crate) fn client_config(
    system: SystemAuthorities,
    extra: Vec<CertificateDer<'static>>,
) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    if system == SystemAuthorities::Trusted {
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
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}
