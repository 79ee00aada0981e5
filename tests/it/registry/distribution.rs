//! The registry client against Debian's docker-registry: plain, TLS with a CA of one's own, and
//! tokens. Skipped, with a word, where the programs are missing.

use std::{
    fmt::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use serde_json::json;

use super::{
    Image, client, config,
    http_server::{HttpServer, Reply},
    image_at, read, read_from, resolve, user,
};
use clip_csi::{
    digest::BlobDigest,
    metrics::Metrics,
    registry::{Credentials, HostConfig, RegistryClient},
    tier::SourceError,
};

/// A docker-registry; killed when dropped.
struct Distribution {
    child: Child,
    host: String,
}

impl Distribution {
    /// Starts one that stores below `directory`, with more lines of configuration.
    async fn start(directory: &Path, http: &str, auth: &str) -> Self {
        let port = {
            let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            listener.local_addr().unwrap().port()
        };
        let host = format!("127.0.0.1:{port}");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}/store}}}}\n\
             http: {{addr: '{host}'{http}}}\nhealth: {{storagedriver: {{enabled: false}}}}\n{auth}\n",
            directory.display()
        );
        let file = directory.join(format!("{port}.yml"));
        write(&file, text.as_bytes());
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while tokio::net::TcpStream::connect(&host).await.is_err() {
            assert!(
                started.elapsed() < Duration::from_secs(15),
                "docker-registry did not start"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Self { child, host }
    }
}

impl Drop for Distribution {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has seen by then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether `programs` are there; says which is not.
fn has(test: &str, programs: &[(&str, &str)]) -> bool {
    let missing = programs.iter().find(|(program, argument)| {
        let mut command = Command::new(program);
        command
            .arg(argument)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.status().is_err()
    });
    if let Some((program, _)) = missing {
        eprintln!("SKIP {test}: {program} is not installed");
    }
    missing.is_none()
}

const REGISTRY: (&str, &str) = ("docker-registry", "--version");
const OPENSSL: (&str, &str) = ("openssl", "version");
const HTPASSWD: (&str, &str) = ("htpasswd", "-?");

fn write(path: &Path, bytes: &[u8]) {
    use std::io::Write as _;
    std::fs::File::create(path)
        .unwrap()
        .write_all(bytes)
        .unwrap();
}

/// Runs a program with words in one line and returns what it prints.
fn run(directory: &Path, line: &str) -> Vec<u8> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().unwrap())
        .args(words)
        .current_dir(directory)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {stderr}");
    output.stdout
}

/// Makes a CA (`ca.crt`) and a certificate for 127.0.0.1 (`srv.crt`, `srv.key`).
fn make_certificates(directory: &Path) {
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    run(
        directory,
        &format!("openssl req -x509 {key} -keyout ca.key -out ca.crt -subj /CN=test-ca"),
    );
    run(
        directory,
        &format!(
            "openssl req -x509 {key} -CA ca.crt -CAkey ca.key -keyout srv.key -out srv.crt -subj /CN=srv \
             -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE"
        ),
    );
}

/// Pushes an image to a registry that speaks plain http.
async fn push(host: &str, image: &Image) {
    // No process-wide crypto provider and no certificate authorities: the driver needs neither.
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let tls = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let http = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .build()
        .unwrap();
    for blob in [&image.layer, &image.config] {
        let start = format!("http://{host}/v2/team/app/blobs/uploads/");
        let started = http.post(start).send().await.unwrap();
        let mut location = started.headers()["location"].to_str().unwrap().to_owned();
        let separator = if location.contains('?') { '&' } else { '?' };
        write!(location, "{separator}digest={}", BlobDigest::of(blob)).unwrap();
        let pushed = http.put(location).body(blob.clone()).send().await.unwrap();
        assert_eq!(pushed.status(), 201);
    }
    let url = format!("http://{host}/v2/team/app/manifests/latest");
    let request = http
        .put(url)
        .header("content-type", "application/vnd.oci.image.manifest.v1+json");
    let pushed = request.body(image.manifest.clone()).send().await.unwrap();
    assert_eq!(pushed.status(), 201, "{}", pushed.text().await.unwrap());
}

#[tokio::test]
async fn images_are_read_from_a_plain_registry() {
    if !has("images_are_read_from_a_plain_registry", &[REGISTRY]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let registry = Distribution::start(directory.path(), "", "").await;
    let client = client(std::slice::from_ref(&registry.host));
    let error = resolve(&client, &registry.host, &Credentials::Anonymous)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error}");

    // The layer's type is OCI's, the manifest names none at its top, as umoci writes them.
    let image = Image::of_platform("amd64", &json!({}));
    push(&registry.host, &image).await;
    let resolved = resolve(&client, &registry.host, &Credentials::Anonymous).await;
    assert_eq!(resolved.unwrap(), image.resolved());
    assert!(read(&client, &registry.host, &image).await.unwrap() == image.layer);
    let source = client.blobs(&image_at(&registry.host), &Credentials::Anonymous);
    assert!(read_from(&*source, &image, 99_999).await.unwrap() == image.layer[99_999..]);
}

#[tokio::test]
async fn images_are_read_over_tls_with_a_ca_and_a_password() {
    let programs = [REGISTRY, OPENSSL, HTPASSWD];
    if !has(
        "images_are_read_over_tls_with_a_ca_and_a_password",
        &programs,
    ) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    make_certificates(path);
    write(
        &path.join("htpasswd"),
        &run(path, "htpasswd -Bbn user hunter2"),
    );
    let image = Image::new();
    {
        let plain = Distribution::start(path, "", "").await;
        push(&plain.host, &image).await;
    }
    let at = path.display();
    let registry = Distribution::start(
        path,
        &format!(", tls: {{certificate: {at}/srv.crt, key: {at}/srv.key}}"),
        &format!("auth: {{htpasswd: {{realm: r, path: {at}/htpasswd}}}}"),
    )
    .await;
    let mut trusting = config(&[]);
    let settings = HostConfig {
        ca_file: Some(path.join("ca.crt")),
        ..HostConfig::default()
    };
    trusting.hosts.insert(registry.host.clone(), settings);
    trusting.connect_timeout_seconds = 5;
    let client = RegistryClient::new(trusting, Metrics::new()).unwrap();
    let resolved = resolve(&client, &registry.host, &user("hunter2")).await;
    assert_eq!(resolved.unwrap(), image.resolved());
    let source = client.blobs(&image_at(&registry.host), &user("hunter2"));
    assert!(read_from(&*source, &image, 0).await.unwrap() == image.layer);

    for (credentials, expected) in [
        (user("wrong"), "does not take those of user \"user\""),
        (Credentials::Anonymous, "give a pull secret"),
    ] {
        let error = resolve(&client, &registry.host, &credentials)
            .await
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let mut stranger = config(&[]);
    stranger.connect_timeout_seconds = 5;
    let stranger = RegistryClient::new(stranger, Metrics::new()).unwrap();
    let error = resolve(&stranger, &registry.host, &user("hunter2"))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("name its CA in ca_file"),
        "{error}"
    );
    // Once ca_file is set, what waits for the image recovers.
    assert!(error.is_transient());
}

#[tokio::test]
async fn a_ca_at_the_top_of_a_hosts_toml_is_trusted_also_without_server() {
    let name = "a_ca_at_the_top_of_a_hosts_toml_is_trusted_also_without_server";
    if !has(name, &[REGISTRY, OPENSSL]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    make_certificates(path);
    let image = Image::new();
    {
        let plain = Distribution::start(path, "", "").await;
        push(&plain.host, &image).await;
    }
    let at = path.display();
    let tls = format!(", tls: {{certificate: {at}/srv.crt, key: {at}/srv.key}}");
    let registry = Distribution::start(path, &tls, "").await;
    let hosts = path.join("certs.d");
    std::fs::create_dir_all(hosts.join(&registry.host)).unwrap();
    let file = hosts.join(&registry.host).join("hosts.toml");
    write(&file, b"ca = \"../../ca.crt\"\n");
    let mut trusting = config(&[]);
    trusting.hosts_dir = Some(hosts);
    trusting.connect_timeout_seconds = 5;
    let client = RegistryClient::new(trusting, Metrics::new()).unwrap();
    let resolved = resolve(&client, &registry.host, &Credentials::Anonymous).await;
    assert_eq!(resolved.unwrap(), image.resolved());
}

#[tokio::test]
async fn images_are_read_with_a_token_that_docker_registry_verifies() {
    let name = "images_are_read_with_a_token_that_docker_registry_verifies";
    if !has(name, &[REGISTRY, OPENSSL]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_owned();
    run(
        &path,
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout t.key -out t.crt -subj /CN=t",
    );
    let certificate = STANDARD.encode(run(&path, "openssl x509 -in t.crt -outform der"));
    let image = Image::new();
    {
        let plain = Distribution::start(&path, "", "").await;
        push(&plain.host, &image).await;
    }
    let signing = path.clone();
    let tokens = HttpServer::start(move |request| {
        let pair = request
            .header("authorization")
            .and_then(|it| it.strip_prefix("Basic "));
        let is_known = pair == Some(STANDARD.encode("user:hunter2").as_str());
        let actions = if is_known { json!(["pull"]) } else { json!([]) };
        Reply::new(
            200,
            json!({"token": sign(&signing, &certificate, &actions)}).to_string(),
        )
    })
    .await;
    let auth = format!(
        "auth: {{token: {{realm: 'http://{}/token', service: s, issuer: i, rootcertbundle: {}/t.crt}}}}",
        tokens.host(),
        path.display()
    );
    let registry = Distribution::start(&path, "", &auth).await;
    let client = client(&[registry.host.clone(), tokens.host()]);
    let resolved = resolve(&client, &registry.host, &user("hunter2")).await;
    assert_eq!(resolved.unwrap(), image.resolved());
    let source = client.blobs(&image_at(&registry.host), &user("hunter2"));
    assert!(read_from(&*source, &image, 1).await.unwrap() == image.layer[1..]);
    assert_eq!(
        tokens
            .requests("scope=repository%3Ateam%2Fapp%3Apull")
            .len(),
        1
    );

    let error = resolve(&client, &registry.host, &Credentials::Anonymous)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
}

/// Signs a token as docker-registry 2.8 verifies it (RS256, the certificate in `x5c`).
fn sign(directory: &Path, certificate: &str, actions: &serde_json::Value) -> String {
    let encode = |it: &serde_json::Value| URL_SAFE_NO_PAD.encode(it.to_string());
    let now = std::time::SystemTime::UNIX_EPOCH
        .elapsed()
        .unwrap()
        .as_secs();
    let head = encode(&json!({"typ": "JWT", "alg": "RS256", "x5c": [certificate]}));
    let claims = encode(&json!({
        "iss": "i", "sub": "user", "aud": "s", "jti": "1",
        "exp": now + 300, "nbf": now - 10, "iat": now - 10,
        "access": [{"type": "repository", "name": "team/app", "actions": actions}],
    }));
    let signed = tempfile::NamedTempFile::new().unwrap();
    write(signed.path(), format!("{head}.{claims}").as_bytes());
    let line = format!(
        "openssl dgst -sha256 -sign t.key {}",
        signed.path().display()
    );
    let signature = URL_SAFE_NO_PAD.encode(run(directory, &line));
    format!("{head}.{claims}.{signature}")
}
