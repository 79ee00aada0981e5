//! Configurations that are kept where they are nearer than at the registry.

use std::sync::Arc;

use bytes::Bytes;
use clip_csi::{
    digest::BlobDigest,
    registry::{Credentials, KeptConfigs},
    tier::BoxFuture,
};

use super::{Image, client, http_server::HttpServer, resolve};

/// Says the same to every question.
#[derive(Debug)]
struct Says(Option<Bytes>);

impl KeptConfigs for Says {
    fn config<'a>(&'a self, _: &'a BlobDigest, max_bytes: usize) -> BoxFuture<'a, Option<Bytes>> {
        // A manifest that lies about the size must not have it refused for that.
        assert!(1 << 20 <= max_bytes, "{max_bytes}");
        Box::pin(async { self.0.clone() })
    }
}

#[tokio::test]
async fn a_configuration_is_taken_from_where_it_is_kept_if_it_is_the_right_one() {
    let image = Image::new();
    let other = Image::of_platform("arm64", &serde_json::json!({}));
    for (kept, n_asked) in [
        (Some(image.config.clone()), 0),
        (Some(other.config), 1),
        (Some(b"{".to_vec()), 1),
        (None, 1),
    ] {
        let answering = image.clone();
        let server = HttpServer::start(move |request| answering.reply(request)).await;
        let client =
            client(&[server.host()]).with_kept_configs(Some(Arc::new(Says(kept.map(Bytes::from)))));
        let resolved = resolve(&client, &server.host(), &Credentials::Anonymous).await;
        assert_eq!(resolved.unwrap(), image.resolved());
        // The right to pull is proven by the registry in any case.
        let asked = |what: &str| server.requests(what).len();
        assert_eq!((asked("manifests"), asked("blobs")), (1, n_asked));
    }
}
