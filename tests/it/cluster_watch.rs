//! What a watch tells of, with an API server that pages, breaks off and forgets.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use clip_csi::cluster::{Seen, Selector, watch};
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::http_server::{HttpServer, Reply};

fn node(name: &str, version: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "resourceVersion": version.to_string()}})
}

fn page(nodes: &[Value], version: u32, token: &str) -> Reply {
    let metadata = json!({"resourceVersion": version.to_string(), "continue": token});
    let list =
        json!({"apiVersion": "v1", "kind": "NodeList", "metadata": metadata, "items": nodes});
    Reply::new(200, list.to_string())
}

fn events(events: &[(&str, Value)]) -> Reply {
    let lines = events
        .iter()
        .map(|(kind, object)| json!({"type": kind, "object": object}).to_string() + "\n");
    Reply::new(200, lines.collect::<String>())
}

fn status(code: u16) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "reason": "Expired",
        "message": "too old", "metadata": {},
    })
}

/// What `n` tellings of a watch are, in short, and what it asked for.
async fn told(n: usize, replies: Vec<Reply>) -> (Vec<String>, Vec<String>) {
    let next = Arc::new(AtomicUsize::new(0));
    let server = HttpServer::start(move |_| {
        let at = next.fetch_add(1, Ordering::SeqCst);
        replies.get(at).cloned().unwrap_or_else(Reply::silence)
    })
    .await;
    let config = kube::Config::new(format!("http://{}", server.host()).parse().unwrap());
    let api: Api<Node> = Api::all(Client::try_from(config).unwrap());
    let (sender, mut seen) = mpsc::unbounded_channel();
    let watching = watch(api, Selector::default(), async |it| {
        let name = |node: &Node| node.metadata.name.clone().unwrap();
        let text = match it {
            Seen::Listing => "listing".to_owned(),
            Seen::Listed => "listed".to_owned(),
            Seen::Is(node) => format!("is {}", name(&node)),
            Seen::Gone(node) => format!("gone {}", name(&node)),
        };
        sender.send(text).unwrap();
    });
    let mut told = Vec::new();
    tokio::select! {
        () = watching => {}
        () = async {
            while told.len() < n {
                told.push(seen.recv().await.unwrap());
            }
        } => {}
    }
    let asked = server.requests("/").into_iter();
    (told, asked.map(|it| it.path).collect())
}

#[tokio::test]
async fn a_listing_comes_in_pages_and_the_watch_goes_on_from_its_version() {
    let (told, asked) = told(
        7,
        vec![
            page(&[node("a", 1)], 10, "more"),
            page(&[node("b", 2)], 10, ""),
            events(&[
                ("ADDED", node("c", 11)),
                ("MODIFIED", node("a", 12)),
                ("DELETED", node("b", 13)),
            ]),
        ],
    )
    .await;
    assert_eq!(
        told,
        [
            "listing", "is a", "is b", "listed", "is c", "is a", "gone b"
        ]
    );
    assert!(
        asked[0].contains("limit=50") && !asked[0].contains("continue"),
        "{asked:?}"
    );
    assert!(asked[1].contains("continue=more"), "{asked:?}");
    assert!(
        asked[2].contains("watch=true") && asked[2].contains("resourceVersion=10"),
        "{asked:?}"
    );
    assert!(asked[2].contains("allowWatchBookmarks=true"), "{asked:?}");
}

#[tokio::test]
async fn a_watch_that_ends_is_taken_up_where_it_was_told_to_be_last() {
    let bookmark =
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"resourceVersion": "30"}});
    let (told, asked) = told(
        4,
        vec![
            page(&[], 10, ""),
            events(&[("ADDED", node("a", 20))]),
            events(&[("BOOKMARK", bookmark)]),
            events(&[("ADDED", node("b", 31))]),
        ],
    )
    .await;
    assert_eq!(told, ["listing", "listed", "is a", "is b"]);
    assert!(asked[2].contains("resourceVersion=20"), "{asked:?}");
    assert!(asked[3].contains("resourceVersion=30"), "{asked:?}");
}

#[tokio::test]
async fn a_version_that_was_forgotten_begins_with_a_listing_again() {
    for forgotten in [
        Reply::new(410, status(410).to_string()),
        events(&[("ERROR", status(410))]),
    ] {
        let (told, _) = told(
            6,
            vec![
                page(&[node("a", 1)], 10, ""),
                forgotten,
                page(&[node("b", 2)], 20, ""),
            ],
        )
        .await;
        assert_eq!(
            told,
            ["listing", "is a", "listed", "listing", "is b", "listed"]
        );
    }
}

#[tokio::test]
async fn a_page_that_was_forgotten_begins_the_listing_again() {
    let (told, _) = told(
        5,
        vec![
            page(&[node("a", 1)], 10, "more"),
            Reply::new(410, status(410).to_string()),
            page(&[node("b", 2)], 20, ""),
        ],
    )
    .await;
    assert_eq!(told, ["listing", "is a", "listing", "is b", "listed"]);
}

#[tokio::test]
async fn a_failure_is_tried_again() {
    let (told, _) = told(
        3,
        vec![Reply::new(403, status(403).to_string()), page(&[], 10, "")],
    )
    .await;
    assert_eq!(told, ["listing", "listing", "listed"]);
}
