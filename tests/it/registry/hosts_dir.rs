//! Registries as a directory of `hosts.toml` files has them.

use std::{fs, path::Path};

use clip_csi::{
    metrics::Metrics,
    registry::{Credentials, RegistryClient, RegistryConfig},
    tier::SourceError,
};

use super::{
    Image, config,
    http_server::{HttpServer, Reply},
    image_at, read_from, resolve, user,
};

fn write(dir: &Path, host: &str, text: &str) {
    fs::create_dir_all(dir.join(host)).unwrap();
    let mut file = fs::File::create(dir.join(host).join("hosts.toml")).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
}

fn reading(dir: &Path) -> RegistryConfig {
    RegistryConfig {
        hosts_dir: Some(dir.to_owned()),
        ..config(&[])
    }
}

fn paths(server: &HttpServer) -> Vec<String> {
    let requests = server.requests("/");
    requests.iter().map(|it| it.path.clone()).collect()
}

#[tokio::test]
async fn a_mirror_is_asked_below_its_path_for_what_it_is_able_to_with_its_headers() {
    let (image, whole) = (Image::new(), Image::new());
    let mirror = HttpServer::start(move |request| {
        if request.header("x-tenant") != Some("blue") {
            return Reply::new(400, "no tenant");
        }
        match request.path.strip_prefix("/proxy/hub/v2/library") {
            Some(_) => whole.reply(request),
            None => Reply::new(404, "{}"),
        }
    })
    .await;
    let whole = image.clone();
    let origin = HttpServer::start(move |request| whole.reply(request)).await;
    let dir = tempfile::tempdir().unwrap();
    let host = origin.host();
    let about = |capabilities: &str| {
        format!(
            "server = \"http://{host}\"\n[host.\"http://{}/proxy/hub/v2/library\"]\n\
             capabilities = {capabilities}\noverride_path = true\nheader = {{x-tenant = \"blue\"}}\n",
            mirror.host()
        )
    };
    let digest = image.resolved().manifest;
    for (capabilities, of_mirror, of_origin) in [
        (r#"["pull"]"#, 2, 1),
        (r#"["pull", "resolve"]"#, 3, 0),
        (r#"["resolve"]"#, 1, 2),
    ] {
        write(dir.path(), &host, &about(capabilities));
        let client = RegistryClient::new(reading(dir.path()), Metrics::new()).unwrap();
        let (before_mirror, before_origin) = (paths(&mirror).len(), paths(&origin).len());
        let resolved = resolve(&client, &host, &Credentials::Anonymous).await;
        assert_eq!(resolved.unwrap().manifest, digest);
        let source = client.blobs(&image_at(&host), &Credentials::Anonymous);
        assert!(read_from(&*source, &image, 0).await.unwrap() == image.layer);
        assert_eq!(
            paths(&mirror).len() - before_mirror,
            of_mirror,
            "{capabilities}"
        );
        assert_eq!(
            paths(&origin).len() - before_origin,
            of_origin,
            "{capabilities}"
        );
    }
    for path in paths(&mirror) {
        let ns = format!("?ns={}", host.replace(':', "%3A"));
        assert!(
            path.starts_with("/proxy/hub/v2/library/team/app/"),
            "{path}"
        );
        assert!(path.ends_with(&ns), "{path}");
    }
    for path in paths(&origin) {
        assert!(
            path.starts_with("/v2/team/app/") && !path.contains("ns="),
            "{path}"
        );
    }
}

#[tokio::test]
async fn the_default_holds_for_registries_without_a_file_and_the_configuration_before_both() {
    let image = Image::new();
    let whole = image.clone();
    let mirror = HttpServer::start(move |request| whole.reply(request)).await;
    let dir = tempfile::tempdir().unwrap();
    write(
        dir.path(),
        "_default",
        &format!("[host.\"http://{}\"]\n", mirror.host()),
    );
    let client = RegistryClient::new(reading(dir.path()), Metrics::new()).unwrap();
    let resolved = resolve(&client, "nowhere.invalid", &Credentials::Anonymous).await;
    assert_eq!(resolved.unwrap(), image.resolved());
    // Whoever has credentials is the registry's to let in.
    let error = resolve(&client, "nowhere.invalid", &user("x"))
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }), "{error}");
    let asked = paths(&mirror).len();
    let mut config = reading(dir.path());
    config
        .hosts
        .insert("nowhere.invalid".to_owned(), Default::default());
    let client = RegistryClient::new(config, Metrics::new()).unwrap();
    let error = resolve(&client, "nowhere.invalid", &Credentials::Anonymous).await;
    assert!(error.is_err());
    assert_eq!(paths(&mirror).len(), asked, "the mirror was asked");
}

#[tokio::test]
async fn headers_go_to_no_other_host() {
    let image = Image::new();
    let whole = image.clone();
    let storage = HttpServer::start(move |request| whole.layer_reply(request)).await;
    let (whole, target) = (image.clone(), storage.host());
    let registry = HttpServer::start(move |request| match &request.path {
        path if path.contains("blobs") => {
            Reply::new(307, "").with("location", format!("http://{target}/stored"))
        }
        _ => whole.reply(request),
    })
    .await;
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "server = \"http://{}\"\n[header]\nx-secret = \"hunter2\"\n",
        registry.host()
    );
    write(dir.path(), &registry.host(), &text);
    let mut config = reading(dir.path());
    config.hosts = super::config(&[storage.host()]).hosts;
    let client = RegistryClient::new(config, Metrics::new()).unwrap();
    let source = client.blobs(&image_at(&registry.host()), &Credentials::Anonymous);
    assert!(read_from(&*source, &image, 0).await.unwrap() == image.layer);
    assert_eq!(
        registry.requests("blobs")[0].header("x-secret"),
        Some("hunter2")
    );
    assert_eq!(storage.requests("stored")[0].header("x-secret"), None);
}

#[test]
fn a_file_that_cannot_be_used_is_named_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    for (text, expected) in [
        (
            "ca = \"missing.crt\"\nserver = \"https://r.x\"",
            "missing.crt",
        ),
        (
            "client = \"missing.pem\"\nserver = \"https://r.x\"",
            "client",
        ),
        ("ca = \"missing.crt\"", "missing.crt"),
        ("client = \"missing.pem\"", "missing.pem"),
        ("[header]\nx = \"hunter2\"\nserver 5", "line 3"),
    ] {
        write(dir.path(), "r.x", text);
        let error = RegistryClient::new(reading(dir.path()), Metrics::new()).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(expected), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
