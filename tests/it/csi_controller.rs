//! The Controller service through its socket: volumes are made of parameters, and nothing is kept.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use clip_csi::{
    csi::{DEFAULT_PLUGIN_NAME, Server, bind_private},
    metrics::Metrics,
    pb::v1::{
        CapacityRange, ControllerExpandVolumeRequest, ControllerGetCapabilitiesRequest,
        ControllerGetVolumeRequest, ControllerModifyVolumeRequest, ControllerPublishVolumeRequest,
        ControllerUnpublishVolumeRequest, CreateSnapshotRequest, CreateVolumeRequest,
        DeleteSnapshotRequest, DeleteVolumeRequest, GetCapacityRequest, GetSnapshotRequest,
        ListSnapshotsRequest, ListVolumesRequest, NodeGetInfoRequest, ProbeRequest,
        ValidateVolumeCapabilitiesRequest, Volume, VolumeCapability, VolumeContentSource,
        controller_client::ControllerClient,
        controller_service_capability::{Type, rpc},
        identity_client::IdentityClient,
        node_client::NodeClient,
        volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume, access_mode::Mode},
    },
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

use crate::{
    csi::{World, map, publish_request},
    mount_fixture::skip_without_mounts,
};

fn capability(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume::default())),
    }
}

/// What the provisioner sends for a claim.
fn create_request(name: &str, image: &str) -> CreateVolumeRequest {
    CreateVolumeRequest {
        name: name.to_owned(),
        capacity_range: Some(CapacityRange {
            required_bytes: 1 << 30,
            limit_bytes: 0,
        }),
        volume_capabilities: vec![capability(Mode::MultiNodeReaderOnly)],
        parameters: map(&[
            ("image", image),
            ("csi.storage.k8s.io/pvc/name", "claim"),
            ("csi.storage.k8s.io/pvc/namespace", "default"),
        ]),
        ..CreateVolumeRequest::default()
    }
}

struct Client(ControllerClient<Channel>);

impl Client {
    fn new(channel: &Channel) -> Self {
        Self(ControllerClient::new(channel.clone()))
    }

    async fn create(&mut self, request: CreateVolumeRequest) -> Result<Volume, Status> {
        let answer = self.0.create_volume(request).await?;
        Ok(answer.into_inner().volume.unwrap())
    }

    async fn delete(&mut self, id: &str) -> Result<(), Status> {
        let request = DeleteVolumeRequest {
            volume_id: id.to_owned(),
            ..DeleteVolumeRequest::default()
        };
        self.0.delete_volume(request).await.map(drop)
    }
}

#[tokio::test]
async fn a_volume_is_its_parameters_and_can_be_published() {
    skip_without_mounts!("csi: a volume that was made");
    let world = World::new().await;
    let mut client = Client::new(&world.channel);
    let volume = client.create(create_request("pvc-1", "app")).await.unwrap();
    // What Kubernetes adds is no attribute.
    assert_eq!(volume.volume_context, map(&[("image", "app")]));
    assert_eq!(volume.capacity_bytes, 1 << 30);
    assert!(volume.volume_id.len() <= 128, "{}", volume.volume_id);
    let target = world.scratch.target("pod");
    let mut publish = publish_request(&target);
    publish.volume_id.clone_from(&volume.volume_id);
    publish.volume_context = volume.volume_context;
    publish.volume_capability = Some(capability(Mode::MultiNodeReaderOnly));
    world.publish(publish).await.unwrap();
    assert_eq!(
        std::fs::read_to_string(target.join("image")).unwrap(),
        "app"
    );
    world.unpublish(&volume.volume_id, &target).await.unwrap();
    for _ in 0..3 {
        client.delete(&volume.volume_id).await.unwrap();
    }
    client.delete("never-made").await.unwrap();
    assert_eq!(world.calls("DeleteVolume", "OK"), 4);
}

#[tokio::test]
async fn a_static_volume_of_any_handle_is_published() {
    skip_without_mounts!("csi: a static volume");
    let world = World::new().await;
    let target = world.scratch.target("pod");
    let mut publish = publish_request(&target);
    publish.volume_id = "models-llama".to_owned();
    publish.volume_context = map(&[("image", "app")]);
    publish.volume_capability = Some(capability(Mode::MultiNodeReaderOnly));
    publish.readonly = true;
    world.publish(publish).await.unwrap();
    assert!(target.join("image").exists());
    world.unpublish("models-llama", &target).await.unwrap();
}

#[tokio::test]
async fn a_name_is_one_volume_on_every_process() {
    let world = World::new().await;
    let mut client = Client::new(&world.channel);
    let first = client.create(create_request("pvc-1", "app")).await.unwrap();
    let again = client.create(create_request("pvc-1", "app")).await.unwrap();
    assert_eq!(first, again);
    let other = client.create(create_request("pvc-2", "app")).await.unwrap();
    assert_ne!(first.volume_id, other.volume_id);
    let mut larger = create_request("pvc-1", "app");
    larger.capacity_range.as_mut().unwrap().required_bytes *= 2;
    for contradiction in [larger, create_request("pvc-1", "app:2")] {
        let err = client.create(contradiction).await.unwrap_err();
        assert_eq!(err.code(), Code::AlreadyExists);
        assert_eq!(
            err.message(),
            "volume pvc-1 was made with other parameters or another size: delete it first"
        );
    }
    // Another replica knows nothing of this, and says the same.
    let elsewhere = World::new().await;
    let mut client = Client::new(&elsewhere.channel);
    assert_eq!(
        client.create(create_request("pvc-1", "app")).await.unwrap(),
        first
    );
}

#[tokio::test]
async fn what_cannot_be_made_is_refused_and_named() {
    let world = World::new().await;
    let mut client = Client::new(&world.channel);
    type Spoil = fn(&mut CreateVolumeRequest);
    let cases: [(&str, Spoil); 13] = [
        ("name: is required", |it| it.name.clear()),
        ("name: has 129 bytes", |it| it.name = "n".repeat(129)),
        ("volume_capabilities: are required", |it| {
            it.volume_capabilities.clear();
        }),
        ("access_mode: MULTI_NODE_MULTI_WRITER", |it| {
            it.volume_capabilities
                .push(capability(Mode::MultiNodeMultiWriter));
        }),
        ("block device", |it| {
            it.volume_capabilities[0].access_type = Some(AccessType::Block(BlockVolume {}));
        }),
        ("image: the attribute is required", |it| {
            it.parameters.clear()
        }),
        ("unknown attribute \"imagee\"", |it| {
            it.parameters.extend(map(&[("imagee", "a")]));
        }),
        ("writable: is for inline volumes", |it| {
            it.parameters.extend(map(&[("writable", "true")]));
        }),
        // Who may write parameters may not say what kubelet says.
        ("writable: is for inline volumes", |it| {
            it.parameters.extend(map(&[
                ("writable", "true"),
                ("csi.storage.k8s.io/ephemeral", "true"),
            ]));
        }),
        ("volume_content_source: ", |it| {
            it.volume_content_source = Some(VolumeContentSource::default());
        }),
        ("mutable_parameters: ", |it| {
            it.mutable_parameters = map(&[("a", "b")]);
        }),
        ("capacity_range: is negative", |it| {
            it.capacity_range.as_mut().unwrap().limit_bytes = -1;
        }),
        (
            "capacity_range: requires 1073741824 bytes, and at most 1",
            |it| {
                it.capacity_range.as_mut().unwrap().limit_bytes = 1;
            },
        ),
    ];
    for (want, spoil) in cases {
        let mut request = create_request("pvc-1", "app");
        spoil(&mut request);
        let err = client.create(request).await.unwrap_err();
        assert_eq!(err.code(), Code::InvalidArgument, "{want}");
        assert!(
            err.message().contains(want),
            "{} lacks {want}",
            err.message()
        );
    }
    let err = client.delete("").await.unwrap_err();
    assert_eq!(err.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn capabilities_are_confirmed_for_volumes_that_were_made() {
    let world = World::new().await;
    let mut client = Client::new(&world.channel);
    let volume = client.create(create_request("pvc-1", "app")).await.unwrap();
    let request = |id: &str, modes: &[Mode]| ValidateVolumeCapabilitiesRequest {
        volume_id: id.to_owned(),
        volume_context: volume.volume_context.clone(),
        volume_capabilities: modes.iter().map(|it| capability(*it)).collect(),
        ..ValidateVolumeCapabilitiesRequest::default()
    };
    let good = request(&volume.volume_id, &[Mode::MultiNodeReaderOnly]);
    let answer = client.0.validate_volume_capabilities(good.clone()).await;
    let confirmed = answer.unwrap().into_inner().confirmed.unwrap();
    assert_eq!(confirmed.volume_capabilities, good.volume_capabilities);
    assert_eq!(confirmed.volume_context, volume.volume_context);
    let modes = [Mode::MultiNodeReaderOnly, Mode::MultiNodeMultiWriter];
    let bad = request(&volume.volume_id, &modes);
    let answer = client.0.validate_volume_capabilities(bad).await.unwrap();
    let answer = answer.into_inner();
    assert_eq!(answer.confirmed, None);
    assert!(answer.message.contains("access_mode"), "{}", answer.message);
    for (id, modes, want) in [
        ("", &[Mode::SingleNodeWriter][..], Code::InvalidArgument),
        (&volume.volume_id, &[], Code::InvalidArgument),
        ("models", &[Mode::SingleNodeWriter], Code::NotFound),
        ("clip1-12", &[Mode::SingleNodeWriter], Code::NotFound),
    ] {
        let answer = client.0.validate_volume_capabilities(request(id, modes));
        assert_eq!(answer.await.unwrap_err().code(), want, "{id:?}");
    }
}

#[tokio::test]
async fn the_controller_advertises_what_it_serves_and_nothing_else() {
    let world = World::new().await;
    let client = Client::new(&world.channel).0;
    let capabilities = client
        .clone()
        .controller_get_capabilities(ControllerGetCapabilitiesRequest {})
        .await
        .unwrap()
        .into_inner()
        .capabilities;
    let types: Vec<_> = capabilities
        .into_iter()
        .map(|it| match it.r#type {
            Some(Type::Rpc(rpc)) => rpc.r#type(),
            None => rpc::Type::Unknown,
        })
        .collect();
    assert_eq!(
        types,
        [
            rpc::Type::CreateDeleteVolume,
            rpc::Type::SingleNodeMultiWriter
        ]
    );
    macro_rules! unimplemented {
        ($($call:ident($request:ident) = $rpc:literal,)*) => {$(
            let outcome = client.clone().$call($request::default()).await.map(drop);
            assert_eq!(outcome.unwrap_err().code(), Code::Unimplemented, $rpc);
            assert_eq!(world.calls($rpc, "UNIMPLEMENTED"), 1, $rpc);
        )*};
    }
    unimplemented! {
        controller_publish_volume(ControllerPublishVolumeRequest) = "ControllerPublishVolume",
        controller_unpublish_volume(ControllerUnpublishVolumeRequest) = "ControllerUnpublishVolume",
        list_volumes(ListVolumesRequest) = "ListVolumes",
        get_capacity(GetCapacityRequest) = "GetCapacity",
        create_snapshot(CreateSnapshotRequest) = "CreateSnapshot",
        delete_snapshot(DeleteSnapshotRequest) = "DeleteSnapshot",
        list_snapshots(ListSnapshotsRequest) = "ListSnapshots",
        get_snapshot(GetSnapshotRequest) = "GetSnapshot",
        controller_expand_volume(ControllerExpandVolumeRequest) = "ControllerExpandVolume",
        controller_get_volume(ControllerGetVolumeRequest) = "ControllerGetVolume",
        controller_modify_volume(ControllerModifyVolumeRequest) = "ControllerModifyVolume",
    }
}

#[tokio::test]
async fn a_controller_serves_no_node() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("csi.sock");
    let listener = bind_private(&socket).unwrap();
    let server = Server::controller(DEFAULT_PLUGIN_NAME.parse().unwrap(), &Metrics::new());
    let serving = tokio::spawn(server.serve(listener, std::future::pending()));
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    let channel = endpoint.connect().await.unwrap();
    let mut identity = IdentityClient::new(channel.clone());
    let probe = identity.probe(ProbeRequest {}).await;
    assert_eq!(probe.unwrap().into_inner().ready, Some(true));
    let mut client = Client::new(&channel);
    client.create(create_request("pvc-1", "app")).await.unwrap();
    let info = NodeClient::new(channel)
        .node_get_info(NodeGetInfoRequest {})
        .await;
    assert_eq!(info.unwrap_err().code(), Code::Unimplemented);
    serving.abort();
}
