//! The CSI server through its socket: what is advertised works, what is not is `UNIMPLEMENTED`.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clip_csi::{
    csi::{CsiConfig, DEFAULT_PLUGIN_NAME, Server, VolumeLimits, bind_private},
    metrics::Metrics,
    mount::{PrepareError, PullCredentials},
    pb::v1::{
        GetPluginCapabilitiesRequest, GetPluginInfoRequest, NodeExpandVolumeRequest,
        NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodePublishVolumeRequest,
        NodeStageVolumeRequest, NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest, ProbeRequest,
        VolumeCapability,
        identity_client::IdentityClient,
        node_client::NodeClient,
        node_service_capability::{self, rpc},
        plugin_capability,
        volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode},
    },
    secret::Secret,
    tier::SourceError,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::mount_fixture::{FakeMounter, Scratch, skip_without_mounts};

/// A server in the background, and a client.
pub(crate) struct World {
    pub(crate) channel: Channel,
    pub(crate) mounter: Arc<FakeMounter>,
    metrics: Metrics,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
    pub(crate) scratch: Scratch,
}

impl World {
    pub(crate) async fn new() -> Self {
        let scratch = Scratch::new();
        let mounter = FakeMounter::new();
        let metrics = Metrics::new();
        let (table, _) = scratch.recover(&mounter, &metrics);
        let config = CsiConfig {
            plugin_name: DEFAULT_PLUGIN_NAME.parse().unwrap(),
            node_id: "node-1".to_owned(),
            limits: VolumeLimits {
                max_writable_bytes: 1 << 20,
                max_volumes: 110,
                publishes_per_second: 1,
            },
        };
        let socket = scratch.path().join("csi.sock");
        let listener = bind_private(&socket).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = Server::new(config, table, &metrics);
        let serving = tokio::spawn(async move {
            let shutdown = async { drop(stopped.await) };
            server.serve(listener, shutdown).await.unwrap();
        });
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Self {
            channel,
            mounter,
            metrics,
            stop,
            serving,
            scratch,
        }
    }

    pub(crate) fn node(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel.clone())
    }

    fn identity(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.channel.clone())
    }

    pub(crate) async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        self.node().node_publish_volume(request).await.map(drop)
    }

    pub(crate) async fn unpublish(&self, volume: &str, target: &Path) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume.to_owned(),
            target_path: target.to_str().unwrap().to_owned(),
        };
        self.node().node_unpublish_volume(request).await.map(drop)
    }

    fn socket(&self) -> PathBuf {
        self.scratch.path().join("csi.sock")
    }

    pub(crate) fn calls(&self, rpc: &str, code: &str) -> u64 {
        self.metrics
            .csi_requests
            .with_label_values(&[rpc, code])
            .get()
    }
}

/// What kubelet sends for an ephemeral inline volume.
pub(crate) fn publish_request(target: &Path) -> NodePublishVolumeRequest {
    NodePublishVolumeRequest {
        volume_id: "csi-1".to_owned(),
        target_path: target.to_str().unwrap().to_owned(),
        volume_capability: Some(VolumeCapability {
            access_mode: Some(AccessMode {
                mode: Mode::SingleNodeWriter.into(),
            }),
            access_type: Some(AccessType::Mount(MountVolume::default())),
        }),
        volume_context: map(&[
            ("image", "app"),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.name", "web-0"),
        ]),
        ..NodePublishVolumeRequest::default()
    }
}

pub(crate) fn set_mode(request: &mut NodePublishVolumeRequest, mode: Mode) {
    let capability = request.volume_capability.as_mut().unwrap();
    capability.access_mode = Some(AccessMode { mode: mode.into() });
}

pub(crate) fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

#[tokio::test]
async fn identity_says_who_it_is_and_that_it_is_ready() {
    let world = World::new().await;
    let mut identity = world.identity();
    let info = identity
        .get_plugin_info(GetPluginInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.name, "csi.clip-csi.dev");
    assert_eq!(info.vendor_version, env!("CARGO_PKG_VERSION"));
    let capabilities = identity
        .get_plugin_capabilities(GetPluginCapabilitiesRequest {})
        .await
        .unwrap()
        .into_inner()
        .capabilities;
    let services: Vec<_> = capabilities.into_iter().map(|it| it.r#type).collect();
    let controller = plugin_capability::Service {
        r#type: plugin_capability::service::Type::ControllerService.into(),
    };
    assert_eq!(
        services,
        [Some(plugin_capability::Type::Service(controller))]
    );
    let ready = identity.probe(ProbeRequest {}).await.unwrap().into_inner();
    assert_eq!(ready.ready, Some(true));
    assert_eq!(world.calls("Probe", "OK"), 1);
}

#[tokio::test]
async fn node_says_which_one_it_is_and_what_it_can_do() {
    let world = World::new().await;
    let mut node = world.node();
    let info = node
        .node_get_info(NodeGetInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.node_id, "node-1");
    assert_eq!(
        (info.max_volumes_per_node, info.accessible_topology),
        (110, None)
    );
    let capabilities = node
        .node_get_capabilities(NodeGetCapabilitiesRequest {})
        .await
        .unwrap()
        .into_inner()
        .capabilities;
    let types: Vec<_> = capabilities
        .into_iter()
        .map(|it| match it.r#type {
            Some(node_service_capability::Type::Rpc(rpc)) => rpc.r#type(),
            None => rpc::Type::Unknown,
        })
        .collect();
    assert_eq!(
        types,
        [rpc::Type::GetVolumeStats, rpc::Type::SingleNodeMultiWriter]
    );
}

#[tokio::test]
async fn what_is_not_advertised_is_unimplemented() {
    let world = World::new().await;
    let mut node = world.node();
    let unimplemented = [
        (
            "NodeStageVolume",
            node.node_stage_volume(NodeStageVolumeRequest::default())
                .await
                .map(drop),
        ),
        (
            "NodeUnstageVolume",
            node.node_unstage_volume(NodeUnstageVolumeRequest::default())
                .await
                .map(drop),
        ),
        (
            "NodeExpandVolume",
            node.node_expand_volume(NodeExpandVolumeRequest::default())
                .await
                .map(drop),
        ),
    ];
    for (rpc, outcome) in unimplemented {
        assert_eq!(outcome.unwrap_err().code(), Code::Unimplemented, "{rpc}");
        assert_eq!(world.calls(rpc, "UNIMPLEMENTED"), 1, "{rpc}");
    }
}

#[tokio::test]
async fn a_volume_is_published_ten_times_and_taken_back_ten_times() {
    skip_without_mounts!("csi: publish");
    let world = World::new().await;
    let target = world.scratch.target("pod");
    for _ in 0..10 {
        world.publish(publish_request(&target)).await.unwrap();
    }
    assert_eq!(
        std::fs::read_to_string(target.join("image")).unwrap(),
        "app"
    );
    for _ in 0..10 {
        world.unpublish("csi-1", &target).await.unwrap();
    }
    assert!(!target.exists());
    assert_eq!(world.scratch.mounted(), Vec::<PathBuf>::new());
    for rpc in ["NodePublishVolume", "NodeUnpublishVolume"] {
        assert_eq!(world.calls(rpc, "OK"), 10);
        let durations = world.metrics.csi_request_duration.with_label_values(&[rpc]);
        assert_eq!(durations.get_sample_count(), 10);
    }
}

#[tokio::test]
async fn wrong_arguments_are_refused_and_named() {
    let world = World::new().await;
    let good = publish_request(&world.scratch.target("pod"));
    type Spoil = fn(&mut NodePublishVolumeRequest);
    let cases: [(&str, Spoil); 17] = [
        ("volume_id: is required", |it| it.volume_id.clear()),
        ("volume_id: has 129 bytes", |it| {
            it.volume_id = "v".repeat(129)
        }),
        ("target_path: is required", |it| it.target_path.clear()),
        ("is not an absolute path", |it| {
            it.target_path = "pod/mount".to_owned()
        }),
        ("the parent directory of", |it| {
            it.target_path = "/none/mount".to_owned()
        }),
        ("volume_capability: is required", |it| {
            it.volume_capability = None
        }),
        ("block device", |it| {
            it.volume_capability.as_mut().unwrap().access_type =
                Some(AccessType::Block(BlockVolume {}));
        }),
        ("image: the attribute is required", |it| {
            it.volume_context.clear()
        }),
        ("unknown attribute \"imagee\"", |it| {
            it.volume_context = map(&[("image", "a"), ("imagee", "b")]);
        }),
        ("unknown key \"token\"", |it| {
            it.secrets = map(&[("token", "hunter2")])
        }),
        ("access_mode: is required", |it| {
            it.volume_capability.as_mut().unwrap().access_mode = None;
        }),
        (
            "access_mode: MULTI_NODE_MULTI_WRITER: an image is read-only",
            |it| {
                set_mode(it, Mode::MultiNodeMultiWriter);
            },
        ),
        ("path: must be relative", |it| {
            it.volume_context = map(&[("image", "a"), ("path", "../etc")]);
        }),
        ("writable: is for inline volumes", |it| {
            it.volume_context = map(&[("image", "a"), ("writable", "true")]);
        }),
        (
            "writableSize: is 1048577 bytes, this node allows 1048576",
            |it| {
                it.volume_context
                    .extend(map(&[("writable", "true"), ("writableSize", "1048577")]));
            },
        ),
        ("writable: the pod says readOnly: true", |it| {
            it.readonly = true;
            it.volume_context.extend(map(&[("writable", "true")]));
        }),
        ("fsType", |it| {
            it.volume_capability.as_mut().unwrap().access_type =
                Some(AccessType::Mount(MountVolume {
                    fs_type: "ext4".to_owned(),
                    ..MountVolume::default()
                }));
        }),
    ];
    for (want, spoil) in cases {
        let mut request = good.clone();
        spoil(&mut request);
        let err = world.publish(request).await.unwrap_err();
        assert_eq!(err.code(), Code::InvalidArgument, "{want}");
        assert!(
            err.message().contains(want),
            "{} lacks {want}",
            err.message()
        );
        assert!(!err.message().contains("hunter2"));
        assert_eq!(err.details(), b"");
    }
    for (volume, target) in [("", Path::new("/a")), ("v", Path::new(""))] {
        let err = world.unpublish(volume, target).await.unwrap_err();
        assert_eq!(err.code(), Code::InvalidArgument);
    }
    assert_eq!(world.mounter.n_prepared(), 0);
    assert_eq!(world.calls("NodePublishVolume", "INVALID_ARGUMENT"), 17);
    assert_eq!(world.calls("NodeUnpublishVolume", "INVALID_ARGUMENT"), 2);
}

#[tokio::test]
async fn publishes_beyond_the_burst_have_to_wait() {
    let world = World::new().await;
    let request = publish_request(Path::new("/none/mount"));
    // The rate is one in a second, and each call takes less.
    let mut n_let_through = 0;
    let code = loop {
        let code = world.publish(request.clone()).await.unwrap_err().code();
        if code != Code::InvalidArgument || 4096 < n_let_through {
            break code;
        }
        n_let_through += 1;
    };
    assert_eq!(code, Code::ResourceExhausted);
    assert!(512 <= n_let_through, "{n_let_through}");
}

#[tokio::test]
async fn attributes_and_secrets_reach_the_mounter() {
    let world = World::new().await;
    let failure = PrepareError::Source(SourceError::Unauthorized {
        what: "app".to_owned(),
        registry: "r".to_owned(),
        hint: "give a nodePublishSecretRef".to_owned(),
    });
    world.mounter.fail("app", failure);
    let target = world.scratch.target("pod");
    let mut request = publish_request(&target);
    let platform = ("platform".to_owned(), "linux/arm64".to_owned());
    request.volume_context.extend([platform]);
    request.secrets = map(&[("username", "u"), ("password", "p")]);
    let err = world.publish(request).await.unwrap_err();
    assert_eq!(err.code(), Code::Unauthenticated);
    assert_eq!(
        err.message(),
        "cannot mount image app: r wants credentials for app: give a nodePublishSecretRef"
    );
    assert!(!target.exists());
    let prepared = world.mounter.prepared.lock().unwrap();
    assert_eq!(prepared[0].image, "app");
    assert_eq!(prepared[0].platform.as_deref(), Some("linux/arm64"));
    assert_eq!(
        prepared[0].credentials,
        PullCredentials::Basic {
            username: "u".to_owned(),
            password: Secret::new("p".to_owned()),
        }
    );
}

#[tokio::test]
async fn an_image_that_takes_long_is_aborted_with_its_progress_and_mounted_later() {
    skip_without_mounts!("csi: slow image");
    let world = World::new().await;
    let target = world.scratch.target("pod");
    let mut request = publish_request(&target);
    request.volume_context = map(&[("image", "slow")]);
    let err = world.publish(request.clone()).await.unwrap_err();
    assert_eq!(err.code(), Code::Aborted);
    assert!(
        err.message()
            .contains("streaming layer 1 of 2, 20 of 60 MB"),
        "{}",
        err.message()
    );
    world.mounter.gate.add_permits(2);
    world.publish(request.clone()).await.unwrap();
    request.volume_context = map(&[("image", "other")]);
    let err = world.publish(request).await.unwrap_err();
    assert_eq!(err.code(), Code::AlreadyExists);
    world.unpublish("csi-1", &target).await.unwrap();
}

#[tokio::test]
async fn a_call_that_its_client_drops_counts_as_cancelled() {
    let world = World::new().await;
    let mut request = publish_request(&world.scratch.target("pod"));
    request.volume_context = map(&[("image", "slow")]);
    tokio::select! {
        outcome = world.publish(request) => panic!("{outcome:?}"),
        () = async { while world.mounter.n_prepared() == 0 { tokio::task::yield_now().await } } => {}
    }
    let cancelled = async {
        while world.calls("NodePublishVolume", "CANCELLED") == 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), cancelled).await.unwrap();
}

#[tokio::test]
async fn the_server_stops_when_it_is_told_to() {
    let world = World::new().await;
    world.identity().probe(ProbeRequest {}).await.unwrap();
    world.stop.send(()).unwrap();
    timeout(Duration::from_secs(20), world.serving)
        .await
        .unwrap()
        .unwrap();
    let socket = world.scratch.path().join("csi.sock");
    let refused = UnixStream::connect(&socket).await.unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::NotFound);
}

/// Records what the module's documentation says about grpc-go before 1.50. When the second half
/// fails, `h2` has become lenient: drop the sentence there, and this test.
#[tokio::test]
async fn a_socket_path_as_authority_is_a_protocol_error() {
    const HEADERS: u8 = 1;
    const RST_STREAM: u8 = 3;
    const PROTOCOL_ERROR: &[u8] = &[0, 0, 0, 1];
    let world = World::new().await;
    let probe = "/csi.v1.Identity/Probe";
    let (kind, _) = first_answer(&world.socket(), probe, "localhost").await;
    assert_eq!(kind, HEADERS);
    let (kind, payload) = first_answer(&world.socket(), probe, "%2Fcsi%2Fcsi.sock").await;
    assert_eq!((kind, payload.as_slice()), (RST_STREAM, PROTOCOL_ERROR));
}

/// Calls `path` in bare HTTP/2 (RFC 9113, RFC 7541) with this `:authority` and an empty message, and
/// returns kind and payload of the first frame on its stream.
pub(crate) async fn first_answer(socket: &Path, path: &str, authority: &str) -> (u8, Vec<u8>) {
    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let len = u8::try_from(payload.len()).unwrap();
        let mut frame = vec![0, 0, len, kind, flags, 0, 0, 0, stream];
        frame.extend(payload);
        frame
    }
    // Literal fields without indexing; a name is an index of the static table, or spelt out.
    fn field(name: &[u8], value: &str) -> Vec<u8> {
        let len = u8::try_from(value.len()).unwrap();
        [name, &[len], value.as_bytes()].concat()
    }
    let headers = [
        vec![0x83, 0x86], // POST, http
        field(&[0x04], path),
        field(&[0x01], authority),
        field(&[0x0f, 0x10], "application/grpc"),
        field(b"\x00\x02te", "trailers"),
    ];
    let call = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        frame(1, 4, 1, &headers.concat()),
        frame(0, 1, 1, &[0; 5]),
    ];
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(&call.concat()).await.unwrap();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        stream.read_exact(&mut payload).await.unwrap();
        if head[8] == 1 {
            return (head[3], payload);
        }
    }
}
