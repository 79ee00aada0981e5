//! Image pull secrets of service accounts, from an API server that knows, refuses, or is down.

use std::sync::{Arc, Mutex};

use base64::Engine as _;
use clip_csi::{
    registry::{
        Credentials, ServiceAccount, ServiceAccountError, ServiceAccountName, ServiceAccounts as _,
    },
    service_accounts::ClusterServiceAccounts,
};
use serde_json::{Value, json};

use crate::http_server::{HttpServer, Reply};

const DRIVER: &str = "/apis/storage.k8s.io/v1/csidrivers/csi.clip-csi.dev";
const ACCOUNT: &str = "/api/v1/namespaces/team/serviceaccounts/app";
const SECRETS: &str = "/api/v1/namespaces/team/secrets/";

/// Objects by path; a number is the status to refuse with.
type Objects = Vec<(String, Value)>;

fn driver(pod_info: bool) -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver",
        "metadata": {"name": "csi.clip-csi.dev"}, "spec": {"podInfoOnMount": pod_info},
    })
}

fn account(secrets: &[&str]) -> Value {
    let secrets: Vec<_> = secrets.iter().map(|it| json!({"name": it})).collect();
    json!({
        "apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": "app", "namespace": "team", "annotations": {"example/role": "r"}},
        "imagePullSecrets": secrets,
    })
}

fn secret(kind: &str, key: &str, content: &str) -> Value {
    let data = base64::engine::general_purpose::STANDARD.encode(content);
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "team"},
        "type": kind, "data": {key: data},
    })
}

async fn read(objects: Objects) -> (Result<ServiceAccount, ServiceAccountError>, Vec<String>) {
    let objects = Arc::new(Mutex::new(objects));
    let server = HttpServer::start(move |request| {
        let path = request.path.trim_end_matches(['?', '&']);
        let objects = objects.lock().unwrap();
        let found = objects.iter().find(|(it, _)| it == path);
        let refuse = |code: u64| {
            let status = json!({
                "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code,
                "message": "hunter2", "reason": "",
            });
            Reply::new(u16::try_from(code).unwrap(), status.to_string())
        };
        match found.map(|(_, it)| it) {
            Some(Value::Number(code)) => refuse(code.as_u64().unwrap()),
            Some(object) => Reply::new(200, object.to_string()),
            None => refuse(404),
        }
    })
    .await;
    let config = kube::Config::new(format!("http://{}", server.host()).parse().unwrap());
    let accounts = ClusterServiceAccounts::new(config, "csi.clip-csi.dev").unwrap();
    let name = ServiceAccountName {
        namespace: "team".to_owned(),
        name: "app".to_owned(),
    };
    let outcome = accounts.read(&name).await;
    let asked = server.requests("/");
    let asked = asked.iter().map(|it| {
        assert_eq!(it.method, "GET");
        it.path.trim_end_matches(['?', '&']).to_owned()
    });
    (outcome, asked.collect())
}

#[tokio::test]
async fn pull_secrets_are_read_by_name_in_their_order() {
    let new = r#"{"auths": {"r.x": {"username": "new", "password": "hunter2"}}}"#;
    let old = r#"{"r.x": {"username": "old", "password": "hunter2"}}"#;
    let objects = vec![
        (DRIVER.to_owned(), driver(true)),
        (
            ACCOUNT.to_owned(),
            account(&["new", "gone", "old", "other", "bad", "secret"]),
        ),
        (
            format!("{SECRETS}new"),
            secret("kubernetes.io/dockerconfigjson", ".dockerconfigjson", new),
        ),
        (
            format!("{SECRETS}old"),
            secret("kubernetes.io/dockercfg", ".dockercfg", old),
        ),
        (format!("{SECRETS}other"), secret("Opaque", "k", "hunter2")),
        (
            format!("{SECRETS}bad"),
            secret(
                "kubernetes.io/dockerconfigjson",
                ".dockerconfigjson",
                "hunter2",
            ),
        ),
        (format!("{SECRETS}secret"), json!(403)),
    ];
    let (found, asked) = read(objects).await;
    let found = found.unwrap();
    assert_eq!(found.annotations["example/role"], "r");
    let told: Vec<_> = found
        .pull_secrets
        .iter()
        .map(|it| match &it.config {
            Ok(config) => match config.for_image(&"r.x/a".parse().unwrap()) {
                Credentials::Basic { username, .. } => format!("{}: {username}", it.name),
                Credentials::Anonymous => format!("{}: nobody", it.name),
            },
            Err(reason) => format!("{}: {reason}", it.name),
        })
        .collect();
    assert_eq!(told[..2], ["new: new", "gone: it does not exist"]);
    assert_eq!(told[2], "old: old");
    assert_eq!(
        told[3],
        "other: it is of type \"Opaque\", not kubernetes.io/dockerconfigjson"
    );
    assert!(
        told[4].starts_with("bad: it is not a .dockerconfigjson"),
        "{told:?}"
    );
    assert!(
        told[5].starts_with("secret: the driver may not get secrets there"),
        "{told:?}"
    );
    assert!(!format!("{found:?} {told:?}").contains("hunter2"));
    let expected = ["new", "gone", "old", "other", "bad", "secret"];
    let expected = expected.iter().map(|it| format!("{SECRETS}{it}"));
    let expected: Vec<_> = [DRIVER.to_owned(), ACCOUNT.to_owned()]
        .into_iter()
        .chain(expected)
        .collect();
    assert_eq!(asked, expected);
}

#[tokio::test]
async fn a_pull_secret_whose_name_is_none_does_not_keep_the_others_from_being_read() {
    let config = r#"{"auths": {"r.x": {"username": "me", "password": "hunter2"}}}"#;
    let good = secret(
        "kubernetes.io/dockerconfigjson",
        ".dockerconfigjson",
        config,
    );
    // More without a name than secrets are read of one account.
    let names = [&[""; 20][..], &["a b", "good"]].concat();
    let objects = vec![
        (DRIVER.to_owned(), driver(true)),
        (ACCOUNT.to_owned(), account(&names)),
        (format!("{SECRETS}good"), good),
    ];
    let (found, asked) = read(objects).await;
    let found = found.unwrap().pull_secrets;
    let told: Vec<_> = found.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(told, ["a b", "good"]);
    assert_eq!(
        found[0].config,
        Err("its name is not one that can be asked for".to_owned())
    );
    assert!(found[1].config.is_ok(), "{found:?}");
    assert_eq!(asked[2..], [format!("{SECRETS}good")]);
}

#[tokio::test]
async fn nobody_is_believed_to_be_whose_pod_they_say_unless_kubelet_vouches() {
    for pod_info in [driver(false), json!(403), json!(404)] {
        let objects = vec![
            (DRIVER.to_owned(), pod_info),
            (ACCOUNT.to_owned(), account(&["s"])),
        ];
        let (outcome, asked) = read(objects).await;
        assert!(
            matches!(outcome, Err(ServiceAccountError::Refused(_))),
            "{outcome:?}"
        );
        assert_eq!(asked, [DRIVER], "nothing else is read");
    }
}

#[tokio::test]
async fn what_is_down_is_told_from_what_refuses() {
    let known = || (DRIVER.to_owned(), driver(true));
    for (objects, is_down) in [
        (vec![(DRIVER.to_owned(), json!(503))], true),
        (vec![known(), (ACCOUNT.to_owned(), json!(500))], true),
        (vec![known(), (ACCOUNT.to_owned(), json!(429))], true),
        (vec![known(), (ACCOUNT.to_owned(), json!(403))], false),
        (vec![known()], false),
        (
            vec![
                known(),
                (ACCOUNT.to_owned(), account(&["s"])),
                (format!("{SECRETS}s"), json!(503)),
            ],
            true,
        ),
    ] {
        let (outcome, _) = read(objects).await;
        let error = outcome.unwrap_err();
        let found = matches!(error, ServiceAccountError::Unavailable(_));
        assert_eq!(found, is_down, "{error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
