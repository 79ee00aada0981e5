//! Makes TLS settings that trust the right certificate authorities.
//!
//! reqwest's own set-up is not used: it panics in a process without a default crypto provider, and
//! fails in one without certificate authorities, although plain http needs neither.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WantsClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
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

/// A certificate to show to servers that ask for one, and its key.
#[derive(Debug)]
pub(crate) struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Reads PEM files of a certificate, those of its issuers after it, and of its key; both may be one.
    ///
    /// # Errors
    /// Says which file is wrong, and never quotes it.
    pub(crate) fn read(certificate: &Path, key: &Path) -> Result<Self, String> {
        let wrong = |path: &Path, reason: &dyn std::fmt::Display| {
            format!("client {}: {reason}", path.display())
        };
        let pem = std::fs::read(certificate).map_err(|err| wrong(certificate, &err))?;
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<_, _>>()
            .map_err(|_| wrong(certificate, &"it is not PEM"))?;
        if chain.is_empty() {
            return Err(wrong(certificate, &"it holds no certificate"));
        }
        let pem = std::fs::read(key).map_err(|err| wrong(key, &err))?;
        let key = PrivateKeyDer::from_pem_slice(&pem)
            .map_err(|_| wrong(key, &"it holds no private key in PEM"))?;
        Ok(Self { chain, key })
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            chain: self.chain.clone(),
            key: self.key.clone_key(),
        }
    }
}

/// Makes the settings of clients that trust the machine's authorities, if asked for, and `extra`.
///
/// # Errors
/// Those of rustls, which no settings of ours cause.
pub(crate) fn client_config(
    system: SystemAuthorities,
    extra: Vec<CertificateDer<'static>>,
) -> Result<ClientConfig, String> {
    Ok(with_roots(system, extra)?.with_no_client_auth())
}

/// As [`client_config`], for servers that ask for a certificate.
///
/// # Errors
/// If certificate and key do not belong together.
pub(crate) fn client_config_as(
    system: SystemAuthorities,
    extra: Vec<CertificateDer<'static>>,
    identity: Identity,
) -> Result<ClientConfig, String> {
    with_roots(system, extra)?
        .with_client_auth_cert(identity.chain, identity.key)
        .map_err(|error| format!("the client's certificate cannot be used: {error}"))
}

fn with_roots(
    system: SystemAuthorities,
    extra: Vec<CertificateDer<'static>>,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, String> {
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
    Ok(config.with_root_certificates(roots))
}

/// Has a client take any certificate: an operator asked for it, in two places.
pub(crate) fn without_verification(mut config: ClientConfig) -> ClientConfig {
    config
        .dangerous()
        .set_certificate_verifier(Arc::new(NoVerification));
    config
}

/// Takes any certificate; the server must have its key nevertheless.
#[derive(Debug)]
struct NoVerification;

impl ServerCertVerifier for NoVerification {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &algorithms())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        algorithms().supported_schemes()
    }
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::ring::default_provider().signature_verification_algorithms
}
