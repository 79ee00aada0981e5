//! Challenges, tokens, and where they must not go.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use super::{
    Image, LAYER_BYTES, client,
    http_server::{HttpServer, Reply, Request},
    image_at, read_from, resolve, user,
};
use base64::Engine as _;
use clip_csi::{registry::Credentials, tier::SourceError};

/// A registry that wants tokens, and its token server.
struct Guarded {
    registry: HttpServer,
    tokens: HttpServer,
    /// The token that is taken now.
    valid: Arc<Mutex<String>>,
}

impl Guarded {
    /// Starts a registry that answers requests with a valid token by `script`.
    async fn start(script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::refusing_with(401, script).await
    }

    async fn refusing_with(
        status_when_stale: u16,
        script: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let valid = Arc::new(Mutex::new("t1".to_owned()));
        let given = Arc::clone(&valid);
        let tokens = HttpServer::start(move |_| {
            Reply::new(
                200,
                format!(r#"{{"access_token":"{}"}}"#, given.lock().unwrap()),
            )
        })
        .await;
        let realm = format!("http://{}/token", tokens.host());
        let taken = Arc::clone(&valid);
        let registry = HttpServer::start(move |request| {
            let expected = format!("Bearer {}", taken.lock().unwrap());
            match request.header("authorization") {
                Some(given) if given == expected => script(request),
                Some(_) if status_when_stale == 403 => Reply::new(403, "{}"),
                _ => Reply::new(401, "{}").with(
                    "www-authenticate",
                    format!(
                        r#"Bearer realm="{realm}",service="r",scope="repository:team/app:pull""#
                    ),
                ),
            }
        })
        .await;
        Self {
            registry,
            tokens,
            valid,
        }
    }

    fn hosts(&self) -> [String; 2] {
        [self.registry.host(), self.tokens.host()]
    }
}

fn basic(password: &str) -> String {
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("user:{password}"));
    format!("Basic {encoded}")
}

#[tokio::test]
async fn a_token_is_fetched_once_and_used_for_the_blobs_too() {
    let image = Image::new();
    let whole = image.clone();
    let guarded = Guarded::start(move |request| whole.reply(request)).await;
    let client = client(&guarded.hosts());
    let host = guarded.registry.host();
    let resolved = resolve(&client, &host, &user("hunter2")).await;
    assert_eq!(resolved.unwrap(), image.resolved());
    let source = client.blobs(&image_at(&host), &user("hunter2"));
    assert!(read_from(&*source, &image, 0).await.unwrap() == image.layer);

    let asked = guarded.tokens.requests("");
    assert_eq!(asked.len(), 1);
    assert_eq!(
        asked[0].path,
        "/token?service=r&scope=repository%3Ateam%2Fapp%3Apull"
    );
    assert_eq!(
        asked[0].header("authorization"),
        Some(basic("hunter2").as_str())
    );
    // The password goes to the token server only.
    for request in guarded.registry.requests("") {
        let authorization = request.header("authorization").unwrap_or("none");
        assert!(!authorization.contains("Basic"), "{authorization}");
    }
    // Resolving again asks anew: a token from before proves no right to pull.
    resolve(&client, &host, &user("hunter2")).await.unwrap();
    assert_eq!(guarded.tokens.requests("").len(), 2);
}

#[tokio::test]
async fn a_token_is_not_shared_between_credentials() {
    let image = Image::new();
    let whole = image.clone();
    let guarded = Guarded::start(move |request| whole.reply(request)).await;
    let client = client(&guarded.hosts());
    let host = guarded.registry.host();
    resolve(&client, &host, &user("right")).await.unwrap();
    let source = client.blobs(&image_at(&host), &Credentials::Anonymous);
    read_from(&*source, &image, 0).await.unwrap();
    let asked = guarded.tokens.requests("");
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[1].header("authorization"), None);
}

#[tokio::test]
async fn layers_that_open_together_share_a_token() {
    let image = Image::new();
    let whole = image.clone();
    let guarded = Guarded::start(move |request| whole.reply(request)).await;
    let source = client(&guarded.hosts()).blobs(&image_at(&guarded.registry.host()), &user("x"));
    let (a, b, c) = tokio::join!(
        read_from(&*source, &image, 1),
        read_from(&*source, &image, 2),
        read_from(&*source, &image, 3)
    );
    for (offset, bytes) in [(1, a), (2, b), (3, c)] {
        assert!(bytes.unwrap() == image.layer[offset..], "{offset}");
    }
    assert_eq!(guarded.tokens.requests("").len(), 1);
}

#[tokio::test]
async fn a_token_that_expires_in_the_middle_of_a_stream_is_renewed() {
    let image = Image::new();
    for status_when_stale in [401, 403] {
        let whole = image.clone();
        let expire = Arc::new(AtomicBool::new(true));
        let valid: Arc<Mutex<Option<Arc<Mutex<String>>>>> = Arc::default();
        let handle = Arc::clone(&valid);
        let guarded = Guarded::refusing_with(status_when_stale, move |request| {
            if request.path.contains("blobs") && expire.swap(false, Ordering::SeqCst) {
                let valid = handle.lock().unwrap().clone().unwrap();
                *valid.lock().unwrap() = "t2".to_owned();
                return whole.reply(request).cut(100_000);
            }
            whole.reply(request)
        })
        .await;
        *valid.lock().unwrap() = Some(Arc::clone(&guarded.valid));
        let source =
            client(&guarded.hosts()).blobs(&image_at(&guarded.registry.host()), &user("x"));
        assert!(read_from(&*source, &image, 0).await.unwrap() == image.layer);
        let sent: Vec<_> = guarded
            .registry
            .requests("blobs")
            .iter()
            .map(|it| {
                (
                    it.range_start(),
                    it.header("authorization").map(str::to_owned),
                )
            })
            .collect();
        let bearer = |token: &str| Some(format!("Bearer {token}"));
        assert_eq!(
            sent,
            [
                (None, None),
                (None, bearer("t1")),
                (Some(100_000), bearer("t1")),
                (Some(100_000), bearer("t2")),
            ]
        );
    }
}

#[tokio::test]
async fn a_fresh_token_that_is_refused_is_final() {
    for (status, is_forbidden) in [(401, false), (403, true)] {
        let guarded = Guarded::start(move |_| {
            Reply::new(status, "{}").with("www-authenticate", "Bearer realm=\"http://x\"")
        })
        .await;
        let client = client(&guarded.hosts());
        let error = resolve(&client, &guarded.registry.host(), &user("hunter2"))
            .await
            .unwrap_err();
        assert_eq!(
            matches!(error, SourceError::Forbidden { .. }),
            is_forbidden,
            "{error}"
        );
        assert_eq!(
            matches!(error, SourceError::Unauthorized { .. }),
            !is_forbidden,
            "{error}"
        );
        assert_eq!(guarded.registry.requests("").len(), 2);
        assert_eq!(guarded.tokens.requests("").len(), 1);
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}

#[tokio::test]
async fn a_token_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not() {
    let image = Image::new();
    for (status, is_taken, n_asked) in [
        (503, true, 2),
        (429, true, 2),
        (401, false, 1),
        (403, false, 1),
    ] {
        let n_seen = AtomicUsize::new(0);
        let tokens = HttpServer::start(move |_| match n_seen.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::new(status, "{}"),
            _ => Reply::new(200, r#"{"token":"t"}"#),
        })
        .await;
        let (whole, realm) = (image.clone(), format!("http://{}/t", tokens.host()));
        let registry = HttpServer::start(move |request| match request.header("authorization") {
            Some("Bearer t") => whole.reply(request),
            _ => Reply::new(401, "").with("www-authenticate", format!("Bearer realm=\"{realm}\"")),
        })
        .await;
        let client = client(&[registry.host(), tokens.host()]);
        let resolved = resolve(&client, &registry.host(), &user("hunter2")).await;
        assert_eq!(resolved.is_ok(), is_taken, "{status}: {resolved:?}");
        assert_eq!(tokens.requests("").len(), n_asked, "{status}");
        assert_eq!(
            tokens.requests("")[0].path,
            "/t?scope=repository%3Ateam%2Fapp%3Apull"
        );
        if let Err(error) = resolved {
            assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
        }
    }
}

#[tokio::test]
async fn wrong_tokens_and_realms_are_refused() {
    let image = Image::new();
    let other = HttpServer::start(|_| Reply::new(200, r#"{"token":"t"}"#)).await;
    let not_configured = format!("http://{}/t", other.host());
    for (realm, token, expected) in [
        (not_configured.as_str(), "", "it leads to plain http"),
        ("nonsense", "", "names no token server"),
        ("", "{}", "gave no token"),
        ("", "not json", "gave no token"),
        ("", r#"{"token":""}"#, "gave no token"),
        ("", r#"{"token":"a\nb"}"#, "gave no token"),
    ] {
        let tokens = HttpServer::start(move |_| Reply::new(200, token)).await;
        let realm = if realm.is_empty() {
            format!("http://{}/", tokens.host())
        } else {
            realm.to_owned()
        };
        let whole = image.clone();
        let registry = HttpServer::start(move |request| match request.header("authorization") {
            Some(_) => whole.reply(request),
            None => {
                Reply::new(401, "").with("www-authenticate", format!("Bearer realm=\"{realm}\""))
            }
        })
        .await;
        let client = client(&[registry.host(), tokens.host()]);
        let error = resolve(&client, &registry.host(), &user("hunter2"))
            .await
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert_eq!(other.requests("").len(), 0);
}

#[tokio::test]
async fn basic_credentials_are_sent_only_when_asked_for() {
    let image = Image::new();
    let whole = image.clone();
    let registry = HttpServer::start(move |request| {
        if request.header("authorization") == Some(basic("right").as_str()) {
            return whole.reply(request);
        }
        Reply::new(401, "").with("www-authenticate", "Basic realm=\"r\"")
    })
    .await;
    let client = client(&[registry.host()]);
    let resolved = resolve(&client, &registry.host(), &user("right")).await;
    assert_eq!(resolved.unwrap(), image.resolved());
    assert_eq!(registry.requests("")[0].header("authorization"), None);

    for (credentials, n_requests, hint) in [
        (user("wrong"), 2, "it does not take those of user \"user\""),
        (Credentials::Anonymous, 1, "give a pull secret"),
    ] {
        let before = registry.requests("").len();
        let error = resolve(&client, &registry.host(), &credentials)
            .await
            .unwrap_err();
        assert!(error.to_string().contains(hint), "{error}");
        assert_eq!(registry.requests("").len() - before, n_requests);
    }
}

#[tokio::test]
async fn a_redirect_to_another_host_carries_no_authorization() {
    let image = Image::new();
    let whole = image.clone();
    let storage = HttpServer::start(move |request| whole.layer_reply(request)).await;
    let target = storage.host();
    let whole = image.clone();
    let guarded = Guarded::start(move |request| {
        let path = format!("/stored?sig=x&from={}", request.path.len());
        match request.path.as_str() {
            // First within the host, where the header stays, then away from it.
            it if it.contains("blobs") => {
                Reply::new(307, "").with("location", format!("/moved{path}"))
            }
            it if it.starts_with("/moved") => {
                Reply::new(307, "").with("location", format!("http://{target}{path}"))
            }
            _ => whole.reply(request),
        }
    })
    .await;
    let [registry, tokens] = guarded.hosts();
    let source =
        client(&[registry.clone(), tokens, storage.host()]).blobs(&image_at(&registry), &user("x"));
    assert!(read_from(&*source, &image, 7).await.unwrap() == image.layer[7..]);
    let moved = &guarded.registry.requests("/moved")[0];
    assert_eq!(moved.header("authorization"), Some("Bearer t1"));
    let stored = &storage.requests("/stored")[0];
    assert_eq!(stored.header("authorization"), None);
    assert_eq!(
        stored.header("range"),
        Some(format!("bytes=7-{}", LAYER_BYTES - 1).as_str())
    );
}

#[tokio::test]
async fn a_presigned_url_that_expired_is_replaced() {
    let image = Image::new();
    let whole = image.clone();
    let storage = HttpServer::start(move |request| {
        if request.path == "/new" {
            whole.layer_reply(request)
        } else {
            Reply::new(403, "expired")
        }
    })
    .await;
    let target = storage.host();
    let n_seen = AtomicUsize::new(0);
    let registry = HttpServer::start(move |_| {
        let path = if n_seen.fetch_add(1, Ordering::SeqCst) == 0 {
            "old"
        } else {
            "new"
        };
        Reply::new(307, "").with("location", format!("http://{target}/{path}"))
    })
    .await;
    let source = client(&[registry.host(), storage.host()])
        .blobs(&image_at(&registry.host()), &Credentials::Anonymous);
    assert!(read_from(&*source, &image, 0).await.unwrap() == image.layer);
    assert_eq!(registry.requests("").len(), 2);
}

#[tokio::test]
async fn a_token_is_renewed_before_its_end() {
    let image = Image::new();
    let n_given = Arc::new(AtomicUsize::new(0));
    let given = Arc::clone(&n_given);
    let tokens = HttpServer::start(move |_| {
        let nth = given.fetch_add(1, Ordering::SeqCst);
        Reply::new(200, format!(r#"{{"token":"t{nth}","expires_in":2}}"#))
    })
    .await;
    let realm = format!("http://{}/t", tokens.host());
    let registry = HttpServer::start(move |request| match request.header("authorization") {
        Some(_) => image.reply(request),
        None => Reply::new(401, "").with("www-authenticate", format!("Bearer realm=\"{realm}\"")),
    })
    .await;
    let image = Image::new();
    let client = client(&[registry.host(), tokens.host()]);
    let source = client.blobs(&image_at(&registry.host()), &Credentials::Anonymous);
    for (n_tokens, wait_ms) in [(1, 0), (1, 0), (2, 1900)] {
        tokio::time::sleep(std::time::Duration::from_millis(wait_ms)).await;
        read_from(&*source, &image, 0).await.unwrap();
        assert_eq!(n_given.load(Ordering::SeqCst), n_tokens, "{wait_ms}");
    }
    let sent = registry.requests("blobs");
    let sent: Vec<_> = sent.iter().map(|it| it.header("authorization")).collect();
    let (t0, t1) = (Some("Bearer t0"), Some("Bearer t1"));
    assert_eq!(sent, [None, t0, t0, t1]);
}
