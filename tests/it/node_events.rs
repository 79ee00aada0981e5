//! Events as the API server gets them.

use clip_csi::node_events::NodeEvents;
use serde_json::{Value, json};

use crate::http_server::{HttpServer, Reply};

#[tokio::test]
async fn an_event_is_about_the_node_or_a_pod_where_kubectl_describe_looks() {
    let server = HttpServer::start(|request| Reply::new(201, request.body.clone())).await;
    let config = kube::Config::new(format!("http://{}", server.host()).parse().unwrap());
    let events = NodeEvents::new(config, "n1", "csi.clip-csi.dev").unwrap();
    events.warn("MountsGivenUp", "gone").await;
    events
        .warn_of_pod("team", "web-0", "uid-1", "VolumeDead", &"x".repeat(2000))
        .await;
    let asked = server.requests("/");
    let paths: Vec<_> = asked
        .iter()
        .map(|it| it.path.trim_end_matches(['?', '&']))
        .collect();
    assert_eq!(
        paths,
        [
            "/api/v1/namespaces/default/events",
            "/api/v1/namespaces/team/events"
        ]
    );
    let bodies: Vec<Value> = asked
        .iter()
        .map(|it| serde_json::from_slice(&it.body).unwrap())
        .collect();
    let about = [
        json!({"kind": "Node", "name": "n1", "uid": "n1"}),
        json!({
            "apiVersion": "v1", "kind": "Pod", "namespace": "team", "name": "web-0", "uid": "uid-1",
        }),
    ];
    for (body, about) in bodies.iter().zip(about) {
        assert_eq!(body["involvedObject"], about);
        assert_eq!(body["type"], "Warning");
        assert_eq!(
            body["source"],
            json!({"component": "csi.clip-csi.dev", "host": "n1"})
        );
    }
    assert_eq!(bodies[0]["reason"], "MountsGivenUp");
    assert_eq!(bodies[1]["metadata"]["namespace"], "team");
    assert_eq!(bodies[1]["message"].as_str().unwrap().len(), 1024);
}
