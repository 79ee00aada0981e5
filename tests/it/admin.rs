//! The admin endpoints over plain TCP.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use clip_csi::{
    admin::{self, Ready},
    metrics::Metrics,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};

struct World {
    address: SocketAddr,
    metrics: Metrics,
    ready: Arc<Ready>,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl World {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Metrics::new();
        let ready = Arc::new(Ready::not_yet("recovering mounts"));
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(admin::serve(
            listener,
            metrics.clone(),
            Arc::clone(&ready),
            async { drop(stopped.await) },
        ));
        Self {
            address,
            metrics,
            ready,
            stop,
            serving,
        }
    }

    /// Sends a request line, and returns the status line and the body.
    async fn ask(&self, request: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{request} HTTP/1.1\r\nHost: node\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.lines().next().unwrap();
        (status.to_owned(), body.to_owned())
    }
}

#[tokio::test]
async fn metrics_are_in_the_text_format() {
    let world = World::new().await;
    world
        .metrics
        .csi_requests
        .with_label_values(&["Probe", "OK"])
        .inc();
    let (status, body) = world.ask("GET /metrics").await;
    assert_eq!(status, "HTTP/1.1 200 OK");
    let line = "clip_csi_csi_requests_total{code=\"OK\",rpc=\"Probe\"} 1";
    assert!(body.lines().any(|it| it == line), "{body}");
}

#[tokio::test]
async fn readiness_says_what_is_missing_and_liveness_does_not_care() {
    let world = World::new().await;
    let ok = ("HTTP/1.1 200 OK".to_owned(), "ok\n".to_owned());
    let unready = |reason: &str| {
        let status = "HTTP/1.1 503 Service Unavailable".to_owned();
        (status, format!("{reason}\n"))
    };
    assert_eq!(world.ask("GET /healthz").await, ok);
    assert_eq!(world.ask("GET /readyz").await, unready("recovering mounts"));
    world.ready.set();
    assert_eq!(world.ask("GET /readyz").await, ok);
    world.ready.unset("shutting down");
    assert_eq!(world.ask("GET /readyz").await, unready("shutting down"));
    assert_eq!(world.ask("GET /healthz").await, ok);
}

#[tokio::test]
async fn anything_else_is_not_found() {
    let world = World::new().await;
    for request in ["GET /", "GET /metrics/", "POST /metrics", "DELETE /healthz"] {
        let (status, _) = world.ask(request).await;
        assert_eq!(status, "HTTP/1.1 404 Not Found", "{request}");
    }
}

#[tokio::test]
async fn a_connection_carries_one_request() {
    let world = World::new().await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let request = "GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n".repeat(2);
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answers = Vec::new();
    // The end may come as a reset, as the second request is never read.
    let _ = stream.read_to_end(&mut answers).await;
    let answers = String::from_utf8(answers).unwrap();
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 1, "{answers}");
}

#[tokio::test]
async fn idle_connections_wait_for_a_slot_and_do_not_outlive_the_server() {
    let world = World::new().await;
    let mut idle = Vec::new();
    // All slots but one: the seventeenth connection would wait for a timeout.
    for _ in 0..15 {
        idle.push(TcpStream::connect(world.address).await.unwrap());
    }
    let answer = timeout(Duration::from_secs(20), world.ask("GET /healthz"));
    assert_eq!(answer.await.unwrap().0, "HTTP/1.1 200 OK");
    idle.push(TcpStream::connect(world.address).await.unwrap());
    let refused = timeout(Duration::from_millis(300), world.ask("GET /healthz"));
    assert!(
        refused.await.is_err(),
        "a seventeenth connection was served"
    );
    world.stop.send(()).unwrap();
    timeout(Duration::from_secs(20), world.serving)
        .await
        .unwrap()
        .unwrap();
    for mut stream in idle {
        let mut rest = [0; 1];
        let end = timeout(Duration::from_secs(20), stream.read(&mut rest)).await;
        assert!(matches!(end.unwrap(), Ok(0) | Err(_)));
    }
}
