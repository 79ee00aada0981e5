//! A registry that breaks, stalls, lies and is busy.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde_json::json;

use super::{
    Image, LAYER_BYTES, amd64, client, config,
    http_server::{HttpServer, Reply, Request},
    image_at, read, read_from, resolve,
};
use clip_csi::{
    digest::{BlobDigest, ManifestDigest},
    metrics::Metrics,
    registry::{Credentials, RegistryClient},
    tier::SourceError,
};

/// Starts a registry where `fault` may answer the nth (from 0) request for something in its stead.
async fn registry(
    image: &Image,
    part: &str,
    fault: impl Fn(usize, &Request) -> Option<Reply> + Send + Sync + 'static,
) -> HttpServer {
    let (image, part) = (image.clone(), part.to_owned());
    let n_seen = AtomicUsize::new(0);
    HttpServer::start(move |request| {
        if !request.path.contains(&part) {
            return image.reply(request);
        }
        let nth = n_seen.fetch_add(1, Ordering::SeqCst);
        fault(nth, request).unwrap_or_else(|| image.reply(request))
    })
    .await
}

#[tokio::test]
async fn an_image_is_resolved_and_its_layer_read() {
    let image = Image::new();
    let server = registry(&image, "none", |_, _| None).await;
    let metrics = Metrics::new();
    let client = RegistryClient::new(config(&[server.host()]), metrics.clone()).unwrap();
    let resolved = resolve(&client, &server.host(), &Credentials::Anonymous).await;
    assert_eq!(resolved.unwrap(), image.resolved());
    assert!(read(&client, &server.host(), &image).await.unwrap() == image.layer);
    let accept = server.requests("manifests")[0]
        .header("accept")
        .unwrap()
        .to_owned();
    for part in [
        "oci.image.manifest",
        "oci.image.index",
        "docker.distribution.manifest.v2",
        "manifest.list",
    ] {
        assert!(accept.contains(part), "{accept}");
    }
    for op in ["manifest", "config", "blob"] {
        let count = metrics
            .registry_requests
            .with_label_values(&[op, "2xx"])
            .get();
        assert_eq!(count, 1, "{op}");
    }
    assert_eq!(metrics.registry_read_bytes.get(), LAYER_BYTES as u64);
}

#[tokio::test]
async fn a_read_may_start_anywhere() {
    let image = Image::new();
    let server = registry(&image, "none", |_, _| None).await;
    let client = client(&[server.host()]);
    let source = client.blobs(&image_at(&server.host()), &Credentials::Anonymous);
    for offset in [1, LAYER_BYTES / 2, LAYER_BYTES - 1, LAYER_BYTES] {
        let bytes = read_from(&*source, &image, offset).await.unwrap();
        assert!(bytes == image.layer[offset..], "{offset}");
    }
    // At the end there is nothing to ask for.
    assert_eq!(server.requests("blobs").len(), 3);
    let error = read_from(&*source, &image, LAYER_BYTES + 1)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn a_broken_stream_is_resumed_where_it_broke() {
    let image = Image::new();
    let whole = image.clone();
    let server = registry(&image, "blobs", move |nth, request| match nth {
        0 => Some(whole.layer_reply(request).cut(100_000)),
        1 => Some(whole.layer_reply(request).cut(50_000)),
        _ => None,
    })
    .await;
    let client = client(&[server.host()]);
    assert!(read(&client, &server.host(), &image).await.unwrap() == image.layer);
    let starts: Vec<_> = server
        .requests("blobs")
        .iter()
        .map(Request::range_start)
        .collect();
    assert_eq!(starts, [None, Some(100_000), Some(150_000)]);
}

#[tokio::test]
async fn a_server_that_ignores_range_is_read_past() {
    let image = Image::new();
    let whole = image.clone();
    let server = registry(&image, "blobs", move |nth, _| {
        let reply = Reply::new(200, whole.layer.clone());
        Some(if nth == 0 { reply.cut(100_000) } else { reply })
    })
    .await;
    let client = client(&[server.host()]);
    assert!(read(&client, &server.host(), &image).await.unwrap() == image.layer);
    assert_eq!(server.requests("blobs")[1].range_start(), Some(100_000));
}

#[tokio::test]
async fn a_stream_that_breaks_each_time_ends_with_an_error() {
    let image = Image::new();
    let whole = image.clone();
    // Without a new byte: the retries in a row end it.
    let server = registry(&image, "blobs", move |_, _| {
        Some(Reply::new(200, whole.layer.clone()).cut(100_000))
    })
    .await;
    let error = read(&client(&[server.host()]), &server.host(), &image)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("is unavailable"), "{error}");
    assert_eq!(server.requests("blobs").len(), 4);

    // One byte per connection: the sum ends it.
    let whole = image.clone();
    let drip = registry(&image, "blobs", move |_, request| {
        Some(whole.layer_reply(request).cut(1))
    })
    .await;
    let error = read(&client(&[drip.host()]), &drip.host(), &image)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    assert_eq!(drip.requests("blobs").len(), 65);
}

#[tokio::test]
async fn answers_to_a_range_that_do_not_fit_are_refused() {
    let image = Image::new();
    for (status, content_range) in [
        (206, "bytes 99999-599999/600000"),
        (206, "bytes 100000-600000/600001"),
        (206, "bytes 100000-599999/700000"),
        (206, "nonsense"),
        (416, "bytes */600000"),
    ] {
        let whole = image.clone();
        let server = registry(&image, "blobs", move |nth, request| match nth {
            0 => Some(whole.layer_reply(request).cut(100_000)),
            _ => Some(
                Reply::new(status, &whole.layer[100_000..]).with("content-range", content_range),
            ),
        })
        .await;
        let error = read(&client(&[server.host()]), &server.host(), &image)
            .await
            .unwrap_err();
        assert!(
            matches!(error, SourceError::Protocol { .. }),
            "{content_range}: {error}"
        );
        assert_eq!(server.requests("blobs").len(), 2, "{content_range}");
    }
}

#[tokio::test]
async fn a_blob_of_another_length_is_refused() {
    let image = Image::new();
    let longer = [&image.layer[..], b"x"].concat();
    let shorter = image.layer[..LAYER_BYTES - 1].to_vec();
    for (reply, n_requests) in [
        (Reply::new(200, longer.clone()), 1),
        (Reply::new(200, longer).without_length(), 1),
        // What is missing is asked for once, and is not there.
        (Reply::new(200, shorter.clone()), 2),
        (Reply::new(200, shorter).without_length(), 2),
    ] {
        let server = registry(&image, "blobs", move |nth, _| {
            Some(if nth == 0 {
                reply.clone()
            } else {
                Reply::new(416, "")
            })
        })
        .await;
        let error = read(&client(&[server.host()]), &server.host(), &image)
            .await
            .unwrap_err();
        assert!(matches!(error, SourceError::Protocol { .. }), "{error}");
        assert_eq!(server.requests("blobs").len(), n_requests, "{error}");
    }
    // Without a length, the right bytes are taken.
    let whole = image.clone();
    let server = registry(&image, "blobs", move |_, _| {
        Some(Reply::new(200, whole.layer.clone()).without_length())
    })
    .await;
    assert!(
        read(&client(&[server.host()]), &server.host(), &image)
            .await
            .unwrap()
            == image.layer
    );
}

#[tokio::test]
async fn a_busy_registry_is_asked_again() {
    let image = Image::new();
    for part in ["manifests", "blobs"] {
        for reply in [
            Reply::new(503, "busy"),
            Reply::new(500, ""),
            Reply::new(502, "").cut(0),
            Reply::new(429, ""),
            Reply::new(429, "").with("retry-after", "0"),
            Reply::new(200, "{}").cut(1),
        ] {
            let server =
                registry(&image, part, move |nth, _| (nth < 2).then(|| reply.clone())).await;
            let client = client(&[server.host()]);
            let resolved = resolve(&client, &server.host(), &Credentials::Anonymous).await;
            assert_eq!(resolved.unwrap(), image.resolved(), "{part}");
            assert!(read(&client, &server.host(), &image).await.unwrap() == image.layer);
        }
    }
}

#[tokio::test]
async fn retry_after_is_waited_for_unless_it_is_too_long() {
    let image = Image::new();
    let server = registry(&image, "manifests", |nth, _| {
        (nth == 0).then(|| Reply::new(429, "").with("retry-after", "1"))
    })
    .await;
    let started = Instant::now();
    let resolved = resolve(
        &client(&[server.host()]),
        &server.host(),
        &Credentials::Anonymous,
    )
    .await;
    assert_eq!(resolved.unwrap(), image.resolved());
    assert!(Duration::from_secs(1) <= started.elapsed());

    let server = registry(&image, "manifests", |_, _| {
        Some(Reply::new(429, "").with("retry-after", "3600"))
    })
    .await;
    let error = resolve(
        &client(&[server.host()]),
        &server.host(),
        &Credentials::Anonymous,
    )
    .await
    .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("HTTP 429") && text.contains("3600 s"),
        "{text}"
    );
    assert_eq!(server.requests("manifests").len(), 1);
}

#[tokio::test]
async fn a_stalled_registry_is_given_up_in_time() {
    let image = Image::new();
    let whole = image.clone();
    let stalls_in_body = registry(&image, "blobs", move |_, request| {
        Some(whole.layer_reply(request).stall(1000))
    })
    .await;
    let stalls_at_once = registry(&image, "blobs", |_, _| Some(Reply::silence())).await;
    let hosts = [stalls_in_body.host(), stalls_at_once.host()];
    let mut config = config(&hosts);
    config.retries = 0;
    let client = RegistryClient::new(config, Metrics::new()).unwrap();
    let started = Instant::now();
    let (in_body, at_once) = tokio::join!(
        read(&client, &hosts[0], &image),
        read(&client, &hosts[1], &image)
    );
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    let (in_body, at_once) = (
        in_body.unwrap_err().to_string(),
        at_once.unwrap_err().to_string(),
    );
    assert!(in_body.contains("no progress for 1 s"), "{in_body}");
    assert!(at_once.contains("no answer within 2 s"), "{at_once}");
}

#[tokio::test]
async fn a_registry_that_is_down_is_unavailable() {
    // A port that nothing listens on any more.
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = unused.local_addr().unwrap().to_string();
    drop(unused);
    let error = resolve(
        &client(std::slice::from_ref(&address)),
        &address,
        &Credentials::Anonymous,
    )
    .await
    .unwrap_err();
    assert!(error.is_transient(), "{error}");
    assert!(error.to_string().contains("cannot connect"), "{error}");
}

#[tokio::test]
async fn content_that_is_not_what_its_digest_names_is_refused() {
    let image = Image::new();
    // By digest: the registry sends another manifest.
    let other = Image::of_platform("amd64", &json!({})).manifest;
    let server = registry(&image, "manifests", move |_, _| {
        Some(Reply::new(200, other.clone()))
    })
    .await;
    let at = image_at(&server.host()).at_digest(image.digest());
    let by_digest = client(&[server.host()])
        .resolve(&at, &amd64(), &Credentials::Anonymous)
        .await;
    // By tag: the registry contradicts itself.
    let bytes = image.manifest.clone();
    let server = registry(&image, "manifests", move |_, _| {
        let wrong = ManifestDigest::of(b"other").to_string();
        Some(Reply::new(200, bytes.clone()).with("Docker-Content-Digest", wrong))
    })
    .await;
    let by_header = resolve(
        &client(&[server.host()]),
        &server.host(),
        &Credentials::Anonymous,
    )
    .await;
    // The configuration, of the right length.
    let config_path = BlobDigest::of(&image.config).to_string();
    let config = String::from_utf8(image.config.clone())
        .unwrap()
        .replace("linux", "LINUX");
    let server = registry(&image, &config_path, move |_, _| {
        Some(Reply::new(200, config.clone()))
    })
    .await;
    let config = resolve(
        &client(&[server.host()]),
        &server.host(),
        &Credentials::Anonymous,
    )
    .await;
    for result in [by_digest, by_header, config] {
        let error = result.unwrap_err();
        assert!(matches!(error, SourceError::Protocol { .. }), "{error}");
        assert!(error.to_string().contains("has digest sha256:"), "{error}");
    }
}

#[tokio::test]
async fn documents_are_bounded() {
    let image = Image::new();
    for reply in [
        Reply::new(200, vec![b' '; 2000]),
        Reply::new(200, vec![b' '; 2000]).without_length(),
    ] {
        let server = registry(&image, "manifests", move |_, _| Some(reply.clone())).await;
        let mut config = config(&[server.host()]);
        config.max_manifest_bytes = 1024;
        let client = RegistryClient::new(config, Metrics::new()).unwrap();
        let error = resolve(&client, &server.host(), &Credentials::Anonymous)
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("longer than 1024 bytes"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn manifests_without_media_type_and_indexes_are_resolved() {
    let bare = Image::of_platform("amd64", &json!({}));
    let server = registry(&bare, "none", |_, _| None).await;
    let resolved = resolve(
        &client(&[server.host()]),
        &server.host(),
        &Credentials::Anonymous,
    )
    .await;
    assert_eq!(resolved.unwrap(), bare.resolved());

    let index_type = "application/vnd.oci.image.index.v1+json";
    let entry = |media_type: &str, digest: String, platform: Option<&str>| {
        let mut entry = json!({"mediaType": media_type, "digest": digest, "size": 1});
        if let Some(platform) = platform {
            entry["platform"] = json!({"os": "linux", "architecture": platform});
        }
        entry
    };
    let index = |entries: &[serde_json::Value]| {
        json!({"schemaVersion": 2, "mediaType": index_type, "manifests": entries}).to_string()
    };
    let image = Image::new();
    let image_type = "application/vnd.oci.image.manifest.v1+json";
    let here = |platform| entry(image_type, image.digest().to_string(), Some(platform));
    let inner = index(&[here("amd64")]);
    let nested = entry(
        index_type,
        ManifestDigest::of(inner.as_bytes()).to_string(),
        None,
    );
    for (top, expected) in [
        (index(&[here("amd64")]), Ok(image.resolved())),
        (index(&[nested]), Ok(image.resolved())),
        (
            index(&[here("s390x")]),
            Err("no manifest for platform linux/amd64; it has: linux/s390x"),
        ),
        (index(&[]), Err("it has: none")),
    ] {
        let (top, inner) = (top.clone(), inner.clone());
        let inner_path = ManifestDigest::of(inner.as_bytes()).to_string();
        let server = registry(&image, "manifests", move |_, request| {
            if request.path.ends_with("/latest") {
                return Some(Reply::new(200, top.clone()));
            }
            request
                .path
                .ends_with(&inner_path)
                .then(|| Reply::new(200, inner.clone()))
        })
        .await;
        let resolved = resolve(
            &client(&[server.host()]),
            &server.host(),
            &Credentials::Anonymous,
        )
        .await;
        match expected {
            Ok(expected) => assert_eq!(resolved.unwrap(), expected),
            Err(text) => assert!(resolved.unwrap_err().to_string().contains(text)),
        }
    }

    let arm = Image::of_platform("arm64", &json!({}));
    let server = registry(&arm, "none", |_, _| None).await;
    let error = resolve(
        &client(&[server.host()]),
        &server.host(),
        &Credentials::Anonymous,
    )
    .await
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("linux/amd64; it has: linux/arm64"),
        "{error}"
    );
}

#[tokio::test]
async fn what_does_not_exist_is_asked_for_once() {
    let image = Image::new();
    let server = registry(&image, "/", |_, _| Some(Reply::new(404, "{}"))).await;
    let client = client(&[server.host()]);
    let error = resolve(&client, &server.host(), &Credentials::Anonymous)
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "image {0}/team/app:latest was not found at {0}: check the name, and that it was pushed",
            server.host()
        )
    );
    let error = read(&client, &server.host(), &image).await.unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
    assert_eq!(server.requests("").len(), 2);
}

#[tokio::test]
async fn plain_http_is_spoken_only_where_the_configuration_says_so() {
    let image = Image::new();
    let server = registry(&image, "none", |_, _| None).await;
    let error = resolve(&client(&[]), &server.host(), &Credentials::Anonymous)
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("set plain_http for this host"),
        "{error}"
    );
    assert_eq!(server.requests("").len(), 0);

    let target = server.host();
    let redirecting = registry(&image, "/", move |_, request| {
        Some(Reply::new(307, "").with("location", format!("http://{target}{}", request.path)))
    })
    .await;
    let error = resolve(
        &client(&[redirecting.host()]),
        &redirecting.host(),
        &Credentials::Anonymous,
    )
    .await
    .unwrap_err();
    assert!(
        error.to_string().contains("it leads to plain http"),
        "{error}"
    );
    assert_eq!(server.requests("").len(), 0);
}

#[tokio::test]
async fn redirects_end_and_do_not_tell_their_secrets() {
    let image = Image::new();
    let storage = HttpServer::start(|_| Reply::new(500, "")).await;
    let target = storage.host();
    let to_storage = registry(&image, "blobs", move |_, _| {
        Some(Reply::new(307, "").with("location", format!("http://{target}/x?sig=hunter2")))
    })
    .await;
    let looping = registry(&image, "blobs", |_, request| {
        Some(Reply::new(302, "").with("location", format!("{}?sig=hunter2", request.path)))
    })
    .await;
    let nowhere = registry(&image, "blobs", |_, _| Some(Reply::new(302, ""))).await;
    let script = registry(&image, "blobs", |_, _| {
        Some(Reply::new(302, "").with("location", "file:///x?sig=hunter2"))
    })
    .await;
    let hosts = [&storage, &to_storage, &looping, &nowhere, &script].map(HttpServer::host);
    let client = Arc::new(client(&hosts));
    for (host, expected) in hosts[1..].iter().zip([
        "HTTP 500",
        "more than 5 times",
        "to nowhere",
        "redirects to nowhere",
    ]) {
        let error = read(&client, host, &image).await.unwrap_err();
        let text = format!("{error} {error:?}");
        assert!(text.contains(expected), "{text}");
        assert!(
            !text.contains("hunter2") && !text.contains("sig="),
            "{text}"
        );
    }
}
