//! Which credentials a registry is shown, in which order, and what follows when it refuses them.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use base64::Engine as _;
use clip_csi::{
    metrics::Metrics,
    registry::{
        DockerConfig, PullSecret, RegistryClient, RegistryConfig, Requester, ServiceAccount,
        ServiceAccountError, ServiceAccountName, ServiceAccountTokens, ServiceAccounts,
        VolumeRequester, VolumeSecret,
    },
    tier::{BoxFuture, SourceError},
};
use serde_json::json;

use super::{
    Image, amd64, config,
    http_server::{HttpServer, Reply, Request},
    image_at, read_from,
};

/// A registry that lets in whoever's name is on its list, and a note of who knocked.
struct Guarded {
    registry: HttpServer,
    tokens: HttpServer,
    /// Name and password of those who may pull.
    lets_in: Arc<Mutex<Vec<String>>>,
    /// Names in the order they asked for a token.
    knocked: Arc<Mutex<Vec<String>>>,
}

/// How a registry says no.
#[derive(Clone, Copy, PartialEq)]
enum No {
    /// The token server does (401).
    Token,
    /// The registry takes the token and says that there is no such image.
    NotFound,
}

impl Guarded {
    async fn start(lets_in: &[&str], no: No) -> Self {
        let lets_in: Vec<_> = lets_in.iter().map(|it| (*it).to_owned()).collect();
        let lets_in = Arc::new(Mutex::new(lets_in));
        let knocked = Arc::new(Mutex::new(Vec::new()));
        let (list, seen) = (Arc::clone(&lets_in), Arc::clone(&knocked));
        let tokens = HttpServer::start(move |request| {
            let user = user_of(request);
            seen.lock().unwrap().push(user.clone());
            if no == No::Token && !list.lock().unwrap().contains(&user) {
                return Reply::new(401, "{}");
            }
            Reply::new(200, json!({"token": format!("for-{user}")}).to_string())
        })
        .await;
        let realm = format!("http://{}/token", tokens.host());
        let (image, list) = (Image::new(), Arc::clone(&lets_in));
        let registry = HttpServer::start(move |request| {
            let bearer = request.header("authorization");
            let bearer = bearer.and_then(|it| it.strip_prefix("Bearer for-"));
            match bearer {
                Some(user) if list.lock().unwrap().iter().any(|it| it == user) => {
                    image.reply(request)
                }
                Some(_) if no == No::NotFound => Reply::new(404, "{}"),
                _ => Reply::new(401, "{}").with(
                    "www-authenticate",
                    format!("Bearer realm=\"{realm}\",service=\"s\""),
                ),
            }
        })
        .await;
        Self {
            registry,
            tokens,
            lets_in,
            knocked,
        }
    }

    fn host(&self) -> String {
        self.registry.host()
    }

    fn config(&self) -> RegistryConfig {
        config(&[self.registry.host(), self.tokens.host()])
    }

    fn knocked(&self) -> Vec<String> {
        std::mem::take(&mut *self.knocked.lock().unwrap())
    }
}

fn user_of(request: &Request) -> String {
    let basic = request.header("authorization");
    let basic = basic.and_then(|it| it.strip_prefix("Basic "));
    basic.map_or_else(
        || "nobody".to_owned(),
        |it| {
            let decoded = base64::engine::general_purpose::STANDARD
                .decode(it)
                .unwrap();
            String::from_utf8(decoded).unwrap()
        },
    )
}

fn docker_config(host: &str, user: &str) -> String {
    json!({"auths": {host: {"username": user, "password": "pw"}}}).to_string()
}

fn parsed(host: &str, user: &str) -> DockerConfig {
    DockerConfig::parse(docker_config(host, user).as_bytes()).unwrap()
}

fn account() -> ServiceAccountName {
    ServiceAccountName {
        namespace: "team".to_owned(),
        name: "app".to_owned(),
    }
}

/// A volume of a pod that runs as `team/app`.
fn volume(secret: Option<VolumeSecret>) -> VolumeRequester {
    VolumeRequester {
        secret,
        pod: Some(account()),
        tokens: ServiceAccountTokens::default(),
    }
}

/// The seam's other side: what a cluster says, in memory.
#[derive(Debug)]
struct Cluster(Result<ServiceAccount, ServiceAccountError>);

impl ServiceAccounts for Cluster {
    fn read<'a>(
        &'a self,
        name: &'a ServiceAccountName,
    ) -> BoxFuture<'a, Result<ServiceAccount, ServiceAccountError>> {
        assert_eq!(*name, account());
        Box::pin(async { self.0.clone() })
    }
}

fn client_of(config: RegistryConfig, cluster: Cluster) -> RegistryClient {
    let mut client = RegistryClient::new(config, Metrics::new()).unwrap();
    client
        .use_service_accounts(Some(Arc::new(cluster)))
        .unwrap();
    client
}

/// A directory with a plugin and its configuration.
struct Plugin {
    dir: tempfile::TempDir,
}

impl Plugin {
    /// Makes one that runs `script`, beside which it finds `answer` and leaves `asked`.
    fn new(host: &str, cache: &str, token: Option<serde_json::Value>, script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut provider = json!({
            "name": "plugin", "matchImages": [host], "defaultCacheDuration": cache,
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "env": [{"name": "DIR", "value": dir.path()}],
        });
        if let Some(token) = token {
            provider["tokenAttributes"] = token;
        }
        let file = json!({
            "apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig",
            "providers": [provider],
        });
        put(&dir.path().join("config.yaml"), &file.to_string());
        let program = dir.path().join("plugin");
        put(&program, &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    /// One that says what is in `answer`.
    fn answering(host: &str, cache: &str, user: &str) -> Self {
        let plugin = Self::new(
            host,
            cache,
            None,
            r#"cat >> "$DIR/asked"; echo >> "$DIR/asked"; cat "$DIR/answer""#,
        );
        plugin.says(host, user);
        plugin
    }

    fn says(&self, host: &str, user: &str) {
        let answer = json!({
            "kind": "CredentialProviderResponse",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "cacheKeyType": "Registry",
            "auth": {host: {"username": user, "password": "pw"}},
        });
        put(&self.path("answer"), &answer.to_string());
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What it was asked since the last look.
    fn asked(&self) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.path("asked")).unwrap_or_default();
        let _ = fs::remove_file(self.path("asked"));
        text.lines()
            .map(|it| serde_json::from_str(it).unwrap())
            .collect()
    }

    fn configure(&self, config: &mut RegistryConfig) {
        config.credential_provider_config = Some(self.path("config.yaml"));
        config.credential_provider_bin_dir = Some(self.dir.path().to_owned());
    }
}

fn put(path: &Path, text: &str) {
    use std::io::Write as _;
    fs::File::create(path)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
}

async fn pull(
    client: &RegistryClient,
    host: &str,
    volume: VolumeRequester,
) -> Result<(), SourceError> {
    let requester = Requester::Volume(volume);
    let resolved = client
        .resolve(&image_at(host), &amd64(), &requester)
        .await?;
    assert_eq!(resolved, Image::new().resolved());
    Ok(())
}

#[tokio::test]
async fn each_way_is_gone_when_those_before_led_to_nothing_or_were_refused() {
    let guarded = Guarded::start(&[], No::Token).await;
    let host = guarded.host();
    let node = tempfile::NamedTempFile::new().unwrap();
    put(node.path(), &docker_config(&host, "node"));
    let plugin = Plugin::answering(&host, "1h", "provided");
    let mut config = guarded.config();
    config.docker_config_file = Some(node.path().to_owned());
    plugin.configure(&mut config);
    let found = ServiceAccount {
        annotations: BTreeMap::new(),
        pull_secrets: vec![
            PullSecret {
                name: "gone".to_owned(),
                config: Err("it does not exist".to_owned()),
            },
            PullSecret {
                name: "regcred".to_owned(),
                config: Ok(parsed(&host, "account")),
            },
        ],
    };
    let client = client_of(config, Cluster(Ok(found)));
    let own = || Some(VolumeSecret::DockerConfig(parsed(&host, "own")));
    let elsewhere = Some(VolumeSecret::DockerConfig(parsed("other.x", "own")));
    for (secret, lets_in, knocked) in [
        (own(), "own:pw", &["own:pw"][..]),
        (own(), "account:pw", &["own:pw", "account:pw"]),
        (
            own(),
            "provided:pw",
            &["own:pw", "account:pw", "provided:pw"],
        ),
        (
            own(),
            "node:pw",
            &["own:pw", "account:pw", "provided:pw", "node:pw"],
        ),
        // A secret that has nothing for the registry is as good as none.
        (elsewhere, "account:pw", &["account:pw"]),
        (None, "node:pw", &["account:pw", "provided:pw", "node:pw"]),
    ] {
        *guarded.lets_in.lock().unwrap() = vec![lets_in.to_owned()];
        pull(&client, &host, volume(secret)).await.unwrap();
        assert_eq!(guarded.knocked(), knocked, "{lets_in}");
    }
    // Its answer would hold for an hour, but was refused twice.
    assert_eq!(plugin.asked().len(), 3);
    // Who has credentials is not let in as nobody.
    *guarded.lets_in.lock().unwrap() = vec!["nobody".to_owned()];
    let error = pull(&client, &host, volume(own())).await.unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
    assert_eq!(
        guarded.knocked(),
        ["own:pw", "account:pw", "provided:pw", "node:pw"]
    );
    let told = error.to_string();
    for part in [
        "user \"own\" (nodePublishSecretRef)",
        "user \"account\" (pull secret \"regcred\" of service account team/app)",
        "user \"provided\" (credential provider \"plugin\")",
        "user \"node\" (the node's docker config)",
        "pull secret \"gone\" of service account team/app: it does not exist",
    ] {
        assert!(told.contains(part), "{told} lacks {part}");
    }
    assert!(!told.contains("pw"), "{told}");
}

#[tokio::test]
async fn nobody_is_tried_where_there_are_no_credentials() {
    let guarded = Guarded::start(&["nobody"], No::Token).await;
    let client = RegistryClient::new(guarded.config(), Metrics::new()).unwrap();
    pull(&client, &guarded.host(), volume(None)).await.unwrap();
    assert_eq!(guarded.knocked(), ["nobody"]);
}

#[tokio::test]
async fn a_registry_that_hides_what_it_protects_is_shown_the_next_credentials() {
    let guarded = Guarded::start(&["node:pw"], No::NotFound).await;
    let host = guarded.host();
    let node = tempfile::NamedTempFile::new().unwrap();
    put(node.path(), &docker_config(&host, "node"));
    let mut config = guarded.config();
    config.docker_config_file = Some(node.path().to_owned());
    let client = RegistryClient::new(config, Metrics::new()).unwrap();
    let own = Some(VolumeSecret::DockerConfig(parsed(&host, "own")));
    pull(&client, &host, volume(own.clone())).await.unwrap();
    assert_eq!(guarded.knocked(), ["own:pw", "node:pw"]);
    guarded.lets_in.lock().unwrap().clear();
    let error = pull(&client, &host, volume(own)).await.unwrap_err();
    assert!(matches!(error, SourceError::NotFound { .. }), "{error}");
}

#[tokio::test]
async fn a_cluster_that_does_not_answer_is_asked_again_and_one_that_refuses_is_told_of() {
    let guarded = Guarded::start(&[], No::Token).await;
    for (said, is_transient, expected) in [
        (
            ServiceAccountError::Unavailable("timed out".to_owned()),
            true,
            "reading the pull secrets of service account team/app: the Kubernetes API does not answer: timed out",
        ),
        (
            ServiceAccountError::Refused("the driver may not read it".to_owned()),
            false,
            "pull secrets of service account team/app: the driver may not read it",
        ),
    ] {
        let client = client_of(guarded.config(), Cluster(Err(said.clone())));
        let error = pull(&client, &guarded.host(), volume(None))
            .await
            .unwrap_err();
        assert_eq!(error.is_transient(), is_transient, "{error}");
        assert!(
            error.to_string().contains(expected) || error.to_string().contains("timed out"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn credentials_that_expire_in_the_middle_of_a_read_are_asked_for_anew() {
    let guarded = Guarded::start(&["first:pw"], No::Token).await;
    let host = guarded.host();
    let plugin = Plugin::answering(&host, "1h", "first");
    let mut config = guarded.config();
    plugin.configure(&mut config);
    let client = RegistryClient::new(config, Metrics::new()).unwrap();
    let requester = Requester::Volume(volume(None));
    let (at, image) = (image_at(&host), Image::new());
    client.resolve(&at, &amd64(), &requester).await.unwrap();
    let source = client.blobs(&at, &requester);
    assert!(read_from(&*source, &image, 0).await.unwrap() == image.layer);
    assert_eq!(guarded.knocked(), ["first:pw"]);
    // The registry takes them no more, though the plugin's answer would hold for an hour still.
    *guarded.lets_in.lock().unwrap() = vec!["second:pw".to_owned()];
    plugin.says(&host, "second");
    assert!(read_from(&*source, &image, 7).await.unwrap() == image.layer[7..]);
    // The token's renewal is tried with the old ones first.
    assert_eq!(guarded.knocked(), ["first:pw", "second:pw"]);
    assert_eq!(plugin.asked().len(), 2);
    // And again, however often.
    *guarded.lets_in.lock().unwrap() = vec!["third:pw".to_owned()];
    let error = read_from(&*source, &image, 7).await.unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
    plugin.says(&host, "third");
    assert!(read_from(&*source, &image, 7).await.unwrap() == image.layer[7..]);
}

#[tokio::test]
async fn a_plugin_whose_last_answer_is_refused_is_asked_again() {
    let guarded = Guarded::start(&["first:pw"], No::Token).await;
    let host = guarded.host();
    let plugin = Plugin::answering(&host, "1h", "first");
    let mut config = guarded.config();
    plugin.configure(&mut config);
    let client = RegistryClient::new(config, Metrics::new()).unwrap();
    pull(&client, &host, volume(None)).await.unwrap();
    *guarded.lets_in.lock().unwrap() = vec!["second:pw".to_owned()];
    plugin.says(&host, "second");
    let own = Some(VolumeSecret::DockerConfig(parsed(&host, "own")));
    pull(&client, &host, volume(own)).await.unwrap();
    assert_eq!(
        guarded.knocked(),
        ["first:pw", "own:pw", "first:pw", "second:pw"]
    );
    // Once: what it says anew counts.
    guarded.lets_in.lock().unwrap().clear();
    let error = pull(&client, &host, volume(None)).await.unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
    assert_eq!(guarded.knocked(), ["second:pw"]);
    assert_eq!(plugin.asked().len(), 3);
}

#[tokio::test]
async fn what_a_plugin_says_is_kept_as_it_wishes() {
    for (cache, n_asked) in [("1h", 1), ("0", 3)] {
        let guarded = Guarded::start(&["provided:pw"], No::Token).await;
        let host = guarded.host();
        let plugin = Plugin::answering(&host, cache, "provided");
        let mut config = guarded.config();
        plugin.configure(&mut config);
        let client = RegistryClient::new(config, Metrics::new()).unwrap();
        for _ in 0..3 {
            pull(&client, &host, volume(None)).await.unwrap();
        }
        let asked = plugin.asked();
        assert_eq!(asked.len(), n_asked, "{cache}");
        let expected = json!({
            "kind": "CredentialProviderRequest",
            "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
            "image": format!("{host}/team/app"),
        });
        assert_eq!(asked[0], expected);
    }
}

#[tokio::test]
async fn a_plugin_is_given_the_token_of_the_pods_service_account() {
    // The user is the token, as registries with workload identity have it.
    let guarded = Guarded::start(&["jwt-of-app:pw"], No::Token).await;
    let host = guarded.host();
    let wanted = json!({
        "serviceAccountTokenAudience": "registry.example", "cacheType": "ServiceAccount",
        "requireServiceAccount": true, "requiredServiceAccountAnnotationKeys": ["example/role"],
    });
    let script = r#"token=$(sed 's/.*"serviceAccountToken":"\([^"]*\)".*/\1/' | tee -a "$DIR/asked"); echo >> "$DIR/asked"
printf '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Global","auth":{"%s":{"username":"%s","password":"pw"}}}' "$HOST" "$token""#;
    let script = format!("HOST={host}\n{script}");
    let plugin = Plugin::new(&host, "1h", Some(wanted), &script);
    let mut config = guarded.config();
    plugin.configure(&mut config);
    // Annotations are the cluster's to tell.
    let mut alone = RegistryClient::new(config.clone(), Metrics::new()).unwrap();
    let error = alone.use_service_accounts(None).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("set service_account_pull_secrets"),
        "{error}"
    );
    let found = |annotations: &[(&str, &str)]| ServiceAccount {
        annotations: annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect(),
        pull_secrets: Vec::new(),
    };
    let client = |account| client_of(config.clone(), Cluster(Ok(account)));
    let with_token = || VolumeRequester {
        tokens: ServiceAccountTokens::parse(r#"{"registry.example": {"token": "jwt-of-app"}}"#)
            .unwrap(),
        ..volume(None)
    };
    let whole = client(found(&[("example/role", "r")]));
    pull(&whole, &host, with_token()).await.unwrap();
    pull(&whole, &host, with_token()).await.unwrap();
    let asked = fs::read_to_string(plugin.path("asked")).unwrap();
    assert_eq!(asked, "jwt-of-app\n", "once for the service account");
    // One that has no token is not given what came of another's.
    let error = pull(&whole, &host, volume(None))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("wants a token"), "{error}");
    let error = pull(&client(found(&[])), &host, with_token())
        .await
        .unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("service account team/app to have the annotation \"example/role\""),
        "{error}"
    );
    assert!(!error.contains("jwt"), "{error}");
}

#[tokio::test]
async fn what_a_plugin_says_of_one_token_is_for_nobody_with_another() {
    let guarded = Guarded::start(&["mine:pw"], No::Token).await;
    let host = guarded.host();
    let wanted = json!({
        "serviceAccountTokenAudience": "a", "cacheType": "Token", "requireServiceAccount": true,
    });
    let script = r#"token=$(sed 's/.*"serviceAccountToken":"\([^"]*\)".*/\1/')
printf '{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"Global","auth":{"%s":{"username":"%s","password":"pw"}}}' "$HOST" "$token""#;
    let plugin = Plugin::new(&host, "1h", Some(wanted), &format!("HOST={host}\n{script}"));
    let mut config = guarded.config();
    plugin.configure(&mut config);
    let client = RegistryClient::new(config, Metrics::new()).unwrap();
    let with_token = |token: &str| VolumeRequester {
        tokens: ServiceAccountTokens::parse(&json!({"a": {"token": token}}).to_string()).unwrap(),
        ..volume(None)
    };
    pull(&client, &host, with_token("mine")).await.unwrap();
    let error = pull(&client, &host, with_token("theirs"))
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
    assert_eq!(guarded.knocked(), ["mine:pw", "theirs:pw"]);
}

#[tokio::test]
async fn the_right_to_a_digest_counts_for_a_moment_and_for_nobody_else() {
    let guarded = Guarded::start(&["own:pw"], No::Token).await;
    let host = guarded.host();
    let client = RegistryClient::new(guarded.config(), Metrics::new()).unwrap();
    let own = volume(Some(VolumeSecret::DockerConfig(parsed(&host, "own"))));
    let by_tag = image_at(&host);
    let by_digest = by_tag.at_digest(Image::new().resolved().manifest);
    let resolve = |image: clip_csi::registry::ImageRef, volume: VolumeRequester| {
        let client = &client;
        async move {
            client
                .resolve(&image, &amd64(), &Requester::Volume(volume))
                .await
        }
    };
    for _ in 0..2 {
        resolve(by_digest.clone(), own.clone()).await.unwrap();
    }
    assert_eq!(guarded.knocked(), ["own:pw"], "the second was known");
    resolve(by_tag, own.clone()).await.unwrap();
    assert_eq!(guarded.knocked(), ["own:pw"], "a tag is asked for");
    // The same secret, in a pod of another service account; another secret; none.
    let mut other = own.clone();
    other.pod = None;
    resolve(by_digest.clone(), other).await.unwrap();
    assert_eq!(guarded.knocked(), ["own:pw"]);
    let stranger = volume(Some(VolumeSecret::DockerConfig(parsed(&host, "stranger"))));
    for refused in [stranger, volume(None)] {
        let error = resolve(by_digest.clone(), refused).await.unwrap_err();
        assert!(matches!(error, SourceError::Unauthorized { .. }), "{error}");
    }
}

#[tokio::test]
async fn sources_are_alike_that_ask_the_same_with_the_same_rights() {
    let client = RegistryClient::new(config(&[]), Metrics::new()).unwrap();
    let identity = |host: &str, user: &str| {
        let secret = VolumeSecret::DockerConfig(parsed("r.x", user));
        let requester = Requester::Volume(volume(Some(secret)));
        let source = client.blobs(&image_at(host), requester);
        source.identity().unwrap()
    };
    let own = identity("r.x", "own");
    assert_eq!(identity("r.x", "own"), own);
    assert_ne!(identity("r.x", "other"), own, "who asks");
    assert_ne!(identity("s.x", "own"), own, "who is asked");
    assert_eq!(own.repository, "r.x/team/app");
}
