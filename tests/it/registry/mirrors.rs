//! Mirrors: what they save, what they may cost, and what they must not be told or decide.

use std::{
    io::Write as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use base64::Engine as _;
use serde_json::json;

use super::{
    Image, LAYER_BYTES, amd64, config,
    http_server::{HttpServer, Reply, Request},
    image_at, read_from, resolve, user,
};
use clip_csi::{
    metrics::Metrics,
    registry::{Credentials, RegistryClient, RegistryConfig},
    tier::SourceError,
};

/// A configuration in which `mirrors` are asked before `origin`; all speak plain http.
fn mirrored(origin: &HttpServer, mirrors: &[&HttpServer]) -> RegistryConfig {
    let mirrors: Vec<_> = mirrors.iter().map(|it| it.host()).collect();
    let mut all = mirrors.clone();
    all.push(origin.host());
    let mut config = config(&all);
    config.hosts.get_mut(&origin.host()).unwrap().mirrors = mirrors;
    config
}

fn client(config: RegistryConfig) -> RegistryClient {
    RegistryClient::new(config, Metrics::new()).unwrap()
}

/// A host that has the image and serves it to everybody.
async fn open_host(image: &Image) -> HttpServer {
    let image = image.clone();
    HttpServer::start(move |request| image.reply(request)).await
}

/// A host that answers everything with `reply`.
async fn broken_host(reply: Reply) -> HttpServer {
    HttpServer::start(move |_| reply.clone()).await
}

fn basic(password: &str) -> String {
    let pair = format!("user:{password}");
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(pair)
    )
}

/// A host that serves the image to user `user` with this password.
async fn private_host(image: &Image, password: &str) -> HttpServer {
    let (image, expected) = (image.clone(), basic(password));
    HttpServer::start(move |request| {
        if request.header("authorization") == Some(expected.as_str()) {
            return image.reply(request);
        }
        Reply::new(401, "{}").with("www-authenticate", "Basic realm=\"r\"")
    })
    .await
}

/// Resolves the image and reads its layer.
async fn pull(
    client: &RegistryClient,
    origin: &HttpServer,
    credentials: &Credentials,
    image: &Image,
) -> Result<(), SourceError> {
    let resolved = resolve(client, &origin.host(), credentials).await?;
    assert_eq!(resolved, image.resolved());
    let source = client.blobs(&image_at(&origin.host()), credentials);
    assert!(read_from(&*source, image, 0).await? == image.layer);
    Ok(())
}

#[tokio::test]
async fn the_first_mirror_that_has_the_image_gives_all_of_it() {
    let image = Image::new();
    let (first, second, origin) = (
        open_host(&image).await,
        open_host(&image).await,
        open_host(&image).await,
    );
    let client = client(mirrored(&origin, &[&first, &second]));
    pull(&client, &origin, &Credentials::Anonymous, &image)
        .await
        .unwrap();
    assert_eq!(first.requests("").len(), 3);
    assert_eq!(
        (second.requests("").len(), origin.requests("").len()),
        (0, 0)
    );
    // A mirror of several registries is told which one is meant, as containerd tells it.
    let ns = format!("?ns={}", origin.host().replace(':', "%3A"));
    for request in first.requests("") {
        assert!(request.path.ends_with(&ns), "{}", request.path);
    }
}

#[tokio::test]
async fn a_mirror_that_fails_in_any_way_costs_one_question() {
    let image = Image::new();
    let other = Image::of_platform("s390x", &json!({}));
    let refusal = |status| Reply::new(status, "{}").with("www-authenticate", "Basic realm=\"r\"");
    // The status, and whether a later object may be asked for at the same mirror.
    let down = [
        Reply::new(500, ""),
        Reply::new(503, "").with("retry-after", "1"),
        Reply::new(429, ""),
        Reply::new(429, "").with("retry-after", "3600"),
        Reply::new(200, "{}").cut(1),
    ];
    let without_it = [
        Reply::new(404, "{}"),
        refusal(401),
        refusal(403),
        Reply::new(302, ""),
        Reply::new(200, "no manifest"),
        Reply::new(418, ""),
    ];
    for (reply, n_asked) in down
        .into_iter()
        .map(|it| (it, 1))
        .chain(without_it.into_iter().map(|it| (it, 3)))
    {
        let shown = format!("{reply:?}");
        let (mirror, origin) = (broken_host(reply).await, open_host(&image).await);
        let client = client(mirrored(&origin, &[&mirror]));
        let started = Instant::now();
        pull(&client, &origin, &Credentials::Anonymous, &image)
            .await
            .unwrap();
        assert!(started.elapsed() < Duration::from_secs(5), "{shown}");
        assert_eq!(mirror.requests("").len(), n_asked, "{shown}");
        assert_eq!(origin.requests("").len(), 3, "{shown}");
    }

    // By digest: what another image's mirror says is not believed.
    let (mirror, origin) = (
        broken_host(Reply::new(200, other.manifest)).await,
        open_host(&image).await,
    );
    let at = image_at(&origin.host()).at_digest(image.digest());
    let resolved = client(mirrored(&origin, &[&mirror]))
        .resolve(&at, &amd64(), &Credentials::Anonymous)
        .await;
    assert_eq!(resolved.unwrap(), image.resolved());
}

#[tokio::test]
async fn a_mirror_that_is_not_there_or_silent_is_passed_over_in_time() {
    let image = Image::new();
    let origin = open_host(&image).await;
    let silent = broken_host(Reply::silence()).await;
    let gone = {
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        unused.local_addr().unwrap().to_string()
    };
    let mut config = mirrored(&origin, &[&silent]);
    let settings = config.hosts.get_mut(&origin.host()).unwrap();
    settings.mirrors.push(gone.clone());
    let plain = config.hosts[&silent.host()].clone();
    config.hosts.insert(gone, plain);
    let client = client(config);
    let started = Instant::now();
    for _ in 0..3 {
        pull(&client, &origin, &Credentials::Anonymous, &image)
            .await
            .unwrap();
    }
    // Once: connecting and reading may take a second each here.
    assert!(
        started.elapsed() < Duration::from_secs(8),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(silent.requests("").len(), 1);
}

#[tokio::test]
async fn a_mirror_that_asks_for_a_short_wait_gets_it() {
    let image = Image::new();
    let (whole, n_seen) = (image.clone(), AtomicUsize::new(0));
    let mirror = HttpServer::start(move |request| match n_seen.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::new(429, "").with("retry-after", "1"),
        _ => whole.reply(request),
    })
    .await;
    let origin = open_host(&image).await;
    let client = client(mirrored(&origin, &[&mirror]));
    pull(&client, &origin, &Credentials::Anonymous, &image)
        .await
        .unwrap();
    assert_eq!(origin.requests("").len(), 0);
}

#[tokio::test]
async fn a_stream_that_a_mirror_breaks_goes_on_at_the_next_host() {
    let image = Image::new();
    let cutting = |bytes: usize| {
        let image = image.clone();
        HttpServer::start(move |request: &Request| {
            if request.path.contains(&image.blob().to_string()) {
                return image.layer_reply(request).cut(bytes);
            }
            image.reply(request)
        })
    };
    let (first, second) = (cutting(100_000).await, cutting(50_000).await);
    let longer = {
        let image = image.clone();
        HttpServer::start(move |request: &Request| match request.range_start() {
            Some(start) => {
                let rest = [&image.layer[start..], b"more"].concat();
                let range = format!("bytes {start}-{}/{LAYER_BYTES}", LAYER_BYTES - 1);
                Reply::new(206, rest)
                    .with("content-range", range)
                    .without_length()
            }
            None => image.reply(request),
        })
        .await
    };
    let origin = open_host(&image).await;
    let config = mirrored(&origin, &[&first, &second, &longer]);
    let client = client(config);
    pull(&client, &origin, &Credentials::Anonymous, &image)
        .await
        .unwrap();
    let starts = |host: &HttpServer| -> Vec<_> {
        let requests = host.requests(&image.blob().to_string());
        requests.iter().map(Request::range_start).collect()
    };
    assert_eq!(starts(&first), [None]);
    assert_eq!(starts(&second), [Some(100_000)]);
    assert_eq!(starts(&longer), [Some(150_000)]);
    // How much the third one gave before it gave too much is a matter of buffers.
    let at_origin = starts(&origin);
    assert!(at_origin.len() <= 1, "{at_origin:?}");
    assert!(
        at_origin.iter().all(|it| Some(150_000) <= *it),
        "{at_origin:?}"
    );
}

#[tokio::test]
async fn a_blob_that_came_wrong_is_asked_for_at_the_registry_alone() {
    let image = Image::new();
    let mut wrong = image.clone();
    wrong.layer[1] ^= 1;
    let blob = image.blob().to_string();
    let mirror = HttpServer::start(move |request: &Request| {
        if request.path.contains(&blob) {
            return wrong.layer_reply(request);
        }
        wrong.reply(request)
    })
    .await;
    let origin = open_host(&image).await;
    let client = client(mirrored(&origin, &[&mirror]));
    let source = client.blobs(&image_at(&origin.host()), &Credentials::Anonymous);
    assert!(read_from(&*source, &image, 0).await.unwrap() != image.layer);
    assert!(source.distrust(&image.blob()));
    assert!(read_from(&*source, &image, 0).await.unwrap() == image.layer);
    assert_eq!(mirror.requests("").len(), 1);
    // Nobody is left to be at fault.
    assert!(!source.distrust(&image.blob()));
    let alone = client.blobs(&image_at(&mirror.host()), &Credentials::Anonymous);
    assert!(!alone.distrust(&image.blob()));
}

#[tokio::test]
async fn credentials_go_to_the_host_they_are_for() {
    let image = Image::new();
    let (mirror, origin) = (
        private_host(&image, "mirror-pw").await,
        private_host(&image, "origin-pw").await,
    );
    let authorizations = |host: &HttpServer| -> Vec<_> {
        let requests = host.requests("");
        let values = requests.iter().map(|it| it.header("authorization"));
        values.flatten().map(str::to_owned).collect::<Vec<_>>()
    };
    // A mirror that demands credentials gets none of the registry's.
    let client = client(mirrored(&origin, &[&mirror]));
    pull(&client, &origin, &user("origin-pw"), &image)
        .await
        .unwrap();
    assert_eq!(authorizations(&mirror), [""; 0]);
    assert!(!mirror.requests("").is_empty(), "the mirror was not asked");

    // The node's credentials have an entry for the mirror: it is shown that one.
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let entry = |password: &str| json!({"username": "user", "password": password});
    let text = json!({"auths": {mirror.host(): entry("mirror-pw"), origin.host(): entry("x")}});
    file.write_all(text.to_string().as_bytes()).unwrap();
    let mut config = mirrored(&origin, &[&mirror]);
    config.docker_config_file = Some(file.path().to_owned());
    let client = RegistryClient::new(config, Metrics::new()).unwrap();
    let n_before = origin.requests("blobs").len();
    pull(&client, &origin, &user("origin-pw"), &image)
        .await
        .unwrap();
    let shown = authorizations(&mirror);
    assert!(
        shown.iter().all(|it| *it == basic("mirror-pw")),
        "{shown:?}"
    );
    assert!(!shown.is_empty());
    assert_eq!(
        origin.requests("blobs").len(),
        n_before,
        "the mirror gave the content"
    );
    let at_origin = authorizations(&origin);
    assert!(
        at_origin.iter().all(|it| *it == basic("origin-pw")),
        "{at_origin:?}"
    );
}

/// A mirror may serve to everybody what its registry protects.
#[tokio::test]
async fn who_has_credentials_is_checked_by_the_registry() {
    let image = Image::new();
    let (mirror, origin) = (open_host(&image).await, private_host(&image, "pw").await);
    let config = mirrored(&origin, &[&mirror]);
    let client = RegistryClient::new(config.clone(), Metrics::new()).unwrap();
    let error = pull(&client, &origin, &user("wrong"), &image)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
    assert!(error.to_string().contains(&origin.host()), "{error}");
    assert_eq!(mirror.requests("").len(), 0);

    // The manifest comes from the registry, what it names from the mirror.
    pull(&client, &origin, &user("pw"), &image).await.unwrap();
    assert_eq!(mirror.requests("manifests").len(), 0);
    assert_eq!(
        (
            mirror.requests("blobs").len(),
            origin.requests("blobs").len()
        ),
        (2, 0)
    );

    // Without credentials, the mirror's word counts, unless it must not.
    pull(&client, &origin, &Credentials::Anonymous, &image)
        .await
        .unwrap();
    let mut strict = config;
    let settings = strict.hosts.get_mut(&origin.host()).unwrap();
    settings.always_ask_origin = true;
    let client = RegistryClient::new(strict, Metrics::new()).unwrap();
    let error = pull(&client, &origin, &Credentials::Anonymous, &image)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
    pull(&client, &origin, &user("pw"), &image).await.unwrap();
}

#[tokio::test]
async fn a_registry_that_is_down_leaves_what_mirrors_have_to_volumes_without_credentials() {
    let image = Image::new();
    let (mirror, origin) = (
        open_host(&image).await,
        broken_host(Reply::new(503, "")).await,
    );
    let client = client(mirrored(&origin, &[&mirror]));
    pull(&client, &origin, &Credentials::Anonymous, &image)
        .await
        .unwrap();
    let error = pull(&client, &origin, &user("pw"), &image)
        .await
        .unwrap_err();
    assert!(error.is_transient(), "{error}");

    // What neither has: both say so.
    let other = format!("{}/team/app:none", origin.host()).parse().unwrap();
    let error = client
        .resolve(&other, &amd64(), &Credentials::Anonymous)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("HTTP 503"), "{text}");
    assert!(
        text.contains(&format!(
            "(and from its mirror: image {other} was not found at {}",
            mirror.host()
        )),
        "{text}"
    );
}

#[tokio::test]
async fn a_mirror_has_settings_of_its_own() {
    let image = Image::new();
    let (mirror, origin) = (open_host(&image).await, open_host(&image).await);
    let mut config = mirrored(&origin, &[&mirror]);
    // Nobody said that the mirror speaks plain http.
    config.hosts.remove(&mirror.host());
    let client = Arc::new(client(config));
    pull(&client, &origin, &Credentials::Anonymous, &image)
        .await
        .unwrap();
    assert_eq!(mirror.requests("").len(), 0);
    assert_eq!(origin.requests("").len(), 3);
}
