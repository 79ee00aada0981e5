//! Registration with kubelet, as kubelet does it: through the socket in the directory it watches.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use clip_csi::{
    csi::{Registration, RegistrationConfig, RegistrationOutcome},
    metrics::Metrics,
    pb::{
        registration::{InfoRequest, RegistrationStatus, registration_client::RegistrationClient},
        v1::{
            NodeGetInfoRequest, ProbeRequest, identity_client::IdentityClient,
            node_client::NodeClient,
        },
    },
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    time::timeout,
};
use tonic::transport::{Channel, Endpoint};

use crate::csi::first_answer;

const DRIVER: &str = "csi.clip-csi.dev";

async fn connect(socket: &Path) -> Channel {
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    endpoint.connect().await.unwrap()
}

fn status(error: &str) -> RegistrationStatus {
    RegistrationStatus {
        plugin_registered: error.is_empty(),
        error: error.to_owned(),
    }
}

fn config(dir: &Path) -> RegistrationConfig {
    RegistrationConfig {
        plugin_name: DRIVER.parse().unwrap(),
        csi_socket: "/kubelet/plugins/x/csi.sock".into(),
        dir: dir.to_owned(),
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|it| it.unwrap().file_name().into_string().unwrap())
        .collect()
}

#[tokio::test]
async fn kubelet_is_told_who_it_is_and_tells_what_became_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = Metrics::new();
    // Of a process that was killed.
    drop(std::os::unix::net::UnixListener::bind(config(dir.path()).socket()).unwrap());
    let (registration, mut seen) = Registration::bind(&config(dir.path()), &metrics).unwrap();
    assert_eq!(names(dir.path()), ["csi.clip-csi.dev-reg.sock"]);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(async move {
        let shutdown = async { drop(stopped.await) };
        registration.serve(shutdown).await.unwrap();
    });
    let mut kubelet = RegistrationClient::new(connect(&config(dir.path()).socket()).await);
    let info = kubelet.get_info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!(
        (info.r#type.as_str(), info.name.as_str()),
        ("CSIPlugin", DRIVER)
    );
    assert_eq!(info.endpoint, "/kubelet/plugins/x/csi.sock");
    assert_eq!(info.supported_versions, ["1.0.0"]);
    assert_eq!(*seen.borrow_and_update(), RegistrationOutcome::Pending);
    assert_eq!(metrics.registered.get(), 0);

    for (error, outcome, registered) in [
        ("", RegistrationOutcome::Registered, 1),
        (
            "no CSINode",
            RegistrationOutcome::Refused {
                reason: "no CSINode".to_owned(),
            },
            0,
        ),
    ] {
        kubelet
            .notify_registration_status(status(error))
            .await
            .unwrap();
        assert_eq!(*seen.borrow_and_update(), outcome);
        assert_eq!(metrics.registered.get(), registered);
    }

    // Kubelet dials the path of the socket, and grpc-go makes an authority of it.
    const HEADERS: u8 = 1;
    for authority in ["localhost", "%2Fkubelet%2Fplugins_registry%2Fx-reg.sock"] {
        let path = "/pluginregistration.Registration/GetInfo";
        let (kind, _) = first_answer(&config(dir.path()).socket(), path, authority).await;
        assert_eq!(kind, HEADERS, "{authority}");
    }

    // Gone at once, also while kubelet is connected: it sends no volumes from then on.
    stop.send(()).unwrap();
    timeout(Duration::from_secs(20), serving)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(names(dir.path()), [""; 0]);
}

#[tokio::test]
async fn a_socket_that_somebody_serves_or_that_is_none_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = Metrics::new();
    let (first, _seen) = Registration::bind(&config(dir.path()), &metrics).unwrap();
    let err = Registration::bind(&config(dir.path()), &metrics).unwrap_err();
    assert!(
        err.to_string().starts_with("another process serves"),
        "{err}"
    );
    drop(first);
    std::fs::File::create(config(dir.path()).socket()).unwrap();
    let err = Registration::bind(&config(dir.path()), &metrics).unwrap_err();
    assert!(
        err.to_string().ends_with("is not a socket: remove it"),
        "{err}"
    );
    let err = Registration::bind(&config(&dir.path().join("none")), &metrics).unwrap_err();
    assert_eq!(err.kind(), std::io::ErrorKind::NotFound);
}

/// A `clip-csi node` of its own; killed when dropped.
struct Process {
    child: Child,
    admin: String,
    dir: tempfile::TempDir,
}

impl Process {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("registry")).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_clip-csi"))
            .args(["node", "--in-process"])
            .args(["--node-id", "n1", "--metrics-addr", "127.0.0.1:0"])
            .arg("--endpoint")
            .arg(format!("unix://{}/csi.sock", dir.path().display()))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .arg("--cache-dir")
            .arg(dir.path().join("cache"))
            .arg("--registration-dir")
            .arg(dir.path().join("registry"))
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut admin = String::new();
        for line in lines.by_ref() {
            let line = line.unwrap();
            if let Some((_, address)) = line.split_once("/readyz address=") {
                admin = address.trim().to_owned();
            }
            if line.contains("waiting for kubelet") {
                break;
            }
        }
        // What follows is read by nobody, which a pipe holds.
        std::mem::forget(lines);
        Self { child, admin, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Status line and body of an answer of the admin server.
    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(&self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself, which the test has seen by then.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn the_driver_is_ready_once_it_is_registered_and_leaves_no_socket() {
    let mut process = Process::start();
    let socket = process.path("registry/csi.clip-csi.dev-reg.sock");
    let mut kubelet = RegistrationClient::new(connect(&socket).await);
    let ready = process.get("/readyz").await;
    assert!(ready.contains(" 503 "), "{ready}");
    assert!(
        ready.contains("kubelet has not registered the driver yet"),
        "{ready}"
    );

    let info = kubelet.get_info(InfoRequest {}).await.unwrap().into_inner();
    let csi = connect(Path::new(&info.endpoint)).await;
    // Liveness is not a matter of registration.
    let probe = IdentityClient::new(csi.clone())
        .probe(ProbeRequest {})
        .await;
    assert_eq!(probe.unwrap().into_inner().ready, Some(true));
    assert!(
        process
            .get("/metrics")
            .await
            .contains("clip_csi_registered 0")
    );
    let node = NodeClient::new(csi)
        .node_get_info(NodeGetInfoRequest {})
        .await;
    assert_eq!(node.unwrap().into_inner().node_id, "n1");
    assert!(
        process
            .get("/metrics")
            .await
            .contains("clip_csi_registered 1")
    );

    let refused = status("the API server says no");
    kubelet.notify_registration_status(refused).await.unwrap();
    let ready = process.get("/readyz").await;
    assert!(
        ready.contains("kubelet refused to register the driver: the API server says no"),
        "{ready}"
    );
    kubelet
        .notify_registration_status(status(""))
        .await
        .unwrap();
    let ready = process.get("/readyz").await;
    assert!(ready.contains(" 200 "), "{ready}");

    let pid = Pid::from_child(&process.child);
    kill_process(pid, Signal::TERM).unwrap();
    let ended = tokio::task::spawn_blocking(move || {
        let status = process.child.wait().unwrap();
        (status, process)
    });
    let (status, process) = timeout(Duration::from_secs(20), ended)
        .await
        .unwrap()
        .unwrap();
    assert!(status.success(), "{status}");
    assert!(!socket.exists());
    assert!(!process.path("csi.sock").exists());
}
