//! Registries that say more than an error can hold: errors cross processes, and end in front of people.

use clip_csi::{
    digest::BlobDigest,
    mount::PrepareError,
    registry::{Credentials, RegistryClient},
    tier::SourceError,
};
use serde_json::{Value, json};

use super::{Image, client, resolve};
use crate::http_server::{HttpServer, Reply};

/// Longer than a message between the roles of a node.
fn long() -> String {
    "ä".repeat(100 << 10)
}

async fn error_of(client: &RegistryClient, server: &HttpServer) -> SourceError {
    let resolved = resolve(client, &server.host(), &Credentials::Anonymous).await;
    resolved.unwrap_err()
}

fn assert_short(error: &SourceError, about: &str) {
    // As it goes to the node service.
    let sent = serde_json::to_string(&PrepareError::Source(error.clone())).unwrap();
    assert!(sent.len() < 4096, "{about}: {} bytes", sent.len());
    assert!(sent.contains('…'), "{about}: nothing is cut: {sent}");
}

/// An image whose configuration is `config`.
fn with_config(config: &Value) -> Image {
    let mut image = Image::new();
    image.config = config.to_string().into_bytes();
    let mut manifest: Value = serde_json::from_slice(&image.manifest).unwrap();
    manifest["config"]["size"] = image.config.len().into();
    manifest["config"]["digest"] = BlobDigest::of(&image.config).to_string().into();
    image.manifest = manifest.to_string().into_bytes();
    image
}

fn with_manifest(manifest: &Value) -> Image {
    let mut image = Image::new();
    image.manifest = manifest.to_string().into_bytes();
    image
}

#[tokio::test]
async fn no_document_makes_an_error_that_cannot_be_passed_on() {
    let layers = |diff_id: &str| json!({"type": "layers", "diff_ids": [diff_id]});
    let platform = json!({"os": long(), "architecture": "amd64"});
    let entry = json!({"mediaType": "", "digest": "", "size": 1, "platform": platform});
    for (about, image, is_expected) in [
        (
            "diff_id",
            with_config(&json!({"rootfs": layers(&long())})),
            (|it| matches!(it, SourceError::Protocol { .. })) as fn(&SourceError) -> bool,
        ),
        (
            "diff_id of the known algorithm",
            with_config(&json!({"rootfs": layers(&format!("sha256:{}", long()))})),
            |it| matches!(it, SourceError::Protocol { .. }),
        ),
        (
            "a string for a list",
            with_config(&json!({"rootfs": long()})),
            |it| matches!(it, SourceError::Protocol { .. }),
        ),
        (
            "os",
            with_config(&json!({"os": long(), "architecture": "amd64"})),
            |it| matches!(it, SourceError::WrongPlatform { .. }),
        ),
        (
            "a string for a number",
            with_manifest(&json!({"schemaVersion": long()})),
            |it| matches!(it, SourceError::Protocol { .. }),
        ),
        (
            "platforms of an index",
            with_manifest(&json!({"schemaVersion": 2, "manifests": [entry]})),
            |it| matches!(it, SourceError::WrongPlatform { .. }),
        ),
    ] {
        let server = HttpServer::start(move |request| image.reply(request)).await;
        let client = client(&[server.host()]);
        let error = error_of(&client, &server).await;
        assert!(is_expected(&error), "{about}: {error:.300}");
        assert_short(&error, about);
    }
}

#[tokio::test]
async fn no_header_makes_an_error_that_cannot_be_passed_on() {
    // As long as a client reads headers.
    let host = format!("{}x", "long.".repeat(10 << 10));
    let redirects = Reply::new(307, "").with("location", format!("http://{host}/x"));
    let realm = format!("Bearer realm=\"http://{host}/x\"");
    let wants_token = Reply::new(401, "").with("www-authenticate", realm);
    for (about, reply) in [("redirect", redirects), ("realm", wants_token)] {
        let server = HttpServer::start(move |_| reply.clone()).await;
        let client = client(&[server.host()]);
        let error = error_of(&client, &server).await;
        assert!(matches!(error, SourceError::Protocol { .. }), "{about}");
        assert_short(&error, about);
    }
}
