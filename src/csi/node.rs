//! The Node service: publishes volumes on this node, measures them, and takes them back.

use std::time::Instant;

use prometheus::IntGauge;
use tonic::{Request, Response, Status};

use super::{
    attributes::{Attributes, credentials, invalid},
    capability,
    observe::Observer,
    pod_info,
    rate::Rate,
};
use crate::{
    metrics::Metrics,
    mount::{
        ImageRequest, MountError, MountTable, PublishRequest, Space, TargetPath, UnpublishRequest,
        View, VolumeId,
    },
    pb::v1::{
        NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest,
        NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
        NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
        NodePublishVolumeResponse, NodeServiceCapability, NodeStageVolumeRequest,
        NodeStageVolumeResponse, NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse,
        NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, VolumeUsage, node_server,
        node_service_capability::{Rpc, Type, rpc},
        volume_usage::Unit,
    },
};

/// The Node service.
#[derive(Debug)]
pub(super) struct NodeService {
    node_id: String,
    limits: VolumeLimits,
    table: MountTable,
    rate: Rate,
    registered: IntGauge,
    observer: Observer,
}

/// What volumes may be on this node, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeLimits {
    /// How many bytes may be written to one volume; 0 if none may be written to.
    pub max_writable_bytes: u64,
    /// How many volumes Kubernetes is to place here; 0 for any number.
    pub max_volumes: u32,
    /// How many may be published in a second; 0 for any number.
    pub publishes_per_second: u32,
}

impl NodeService {
    pub(super) fn new(
        node_id: String,
        limits: VolumeLimits,
        table: MountTable,
        metrics: &Metrics,
    ) -> Self {
        Self {
            node_id,
            limits,
            table,
            rate: Rate::new(limits.publishes_per_second, Instant::now()),
            registered: metrics.registered.clone(),
            observer: Observer::new(metrics.clone()),
        }
    }

    /// Takes note that kubelet knows the driver: nobody else calls the Node service.
    ///
    /// NodeGetInfo is asked once per registration; the other calls count as well, because a
    /// registration by the sidecar outlives this process.
    fn note_registered(&self) {
        self.registered.set(1);
    }
}

/// Reads a publish. `publish_context` and `staging_target_path` say nothing here: there is neither attaching
/// nor staging.
fn parse_publish(
    request: &NodePublishVolumeRequest,
    limits: VolumeLimits,
) -> Result<PublishRequest, MountError> {
    let volume = VolumeId::parse(&request.volume_id)?;
    let target = TargetPath::parse(&request.target_path)?;
    let sharing = capability::check(request.volume_capability.as_ref())?;
    let attributes = Attributes::parse(&request.volume_context)?;
    let writable = attributes.written_over(limits.max_writable_bytes)?;
    if writable.is_some() && request.readonly {
        return Err(invalid(
            "writable",
            "the pod says readOnly: true: leave one of the two out",
        ));
    }
    let Attributes {
        image,
        platform,
        index_digest,
        prefetch,
        pull_policy,
        path,
        insecure,
        ..
    } = attributes;
    let credentials = credentials(&request.secrets)?;
    let pod = pod_info::pod(&request.secrets, &request.volume_context)?;
    Ok(PublishRequest {
        volume,
        target,
        image: ImageRequest {
            image,
            platform,
            index_digest,
            prefetch,
            pull_policy,
            insecure,
            credentials,
            pod: pod.map(Box::new),
        },
        view: View { path, writable },
        sharing,
    })
}

fn usage(unit: Unit, space: Space) -> VolumeUsage {
    let signed = |it| i64::try_from(it).unwrap_or(i64::MAX);
    VolumeUsage {
        total: signed(space.total),
        used: signed(space.used),
        available: signed(space.available),
        unit: unit.into(),
    }
}

#[tonic::async_trait]
impl node_server::Node for NodeService {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        self.note_registered();
        let request = request.into_inner();
        let work = async {
            let publish = parse_publish(&request, self.limits)?;
            self.rate
                .take(Instant::now())
                .map_err(|per_second| MountError::RateLimited { per_second })?;
            self.table.publish(publish).await?;
            Ok(NodePublishVolumeResponse {})
        };
        self.observer
            .call("NodePublishVolume", &request.volume_id, work)
            .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        self.note_registered();
        let request = request.into_inner();
        let work = async {
            let volume = VolumeId::parse(&request.volume_id)?;
            let target = TargetPath::parse(&request.target_path)?;
            let unpublish = UnpublishRequest { volume, target };
            self.table.unpublish(unpublish).await?;
            Ok(NodeUnpublishVolumeResponse {})
        };
        self.observer
            .call("NodeUnpublishVolume", &request.volume_id, work)
            .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        self.note_registered();
        // The second one: a volume that is for one pod is given to one pod.
        let types = [rpc::Type::GetVolumeStats, rpc::Type::SingleNodeMultiWriter];
        let answer = NodeGetCapabilitiesResponse {
            capabilities: types
                .map(|it| NodeServiceCapability {
                    r#type: Some(Type::Rpc(Rpc { r#type: it.into() })),
                })
                .into(),
        };
        self.observer.quiet("NodeGetCapabilities", answer)
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        self.note_registered();
        let answer = NodeGetInfoResponse {
            node_id: self.node_id.clone(),
            max_volumes_per_node: self.limits.max_volumes.into(),
            // Images are reachable from everywhere.
            accessible_topology: None,
        };
        self.observer.quiet("NodeGetInfo", answer)
    }

    async fn node_stage_volume(
        &self,
        _: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        self.observer.unimplemented("NodeStageVolume")
    }

    async fn node_unstage_volume(
        &self,
        _: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        self.observer.unimplemented("NodeUnstageVolume")
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        self.note_registered();
        let request = request.into_inner();
        let work = async {
            let (volume, path) = (&request.volume_id, &request.volume_path);
            let stats = self.table.stats(volume, path).await?;
            Ok(NodeGetVolumeStatsResponse {
                usage: vec![
                    usage(Unit::Bytes, stats.bytes),
                    usage(Unit::Inodes, stats.inodes),
                ],
                // On its way out of the specification; /metrics and Events tell of dead mounts.
                volume_condition: None,
            })
        };
        self.observer
            .call_often("NodeGetVolumeStats", &request.volume_id, work)
            .await
    }

    async fn node_expand_volume(
        &self,
        _: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        self.observer.unimplemented("NodeExpandVolume")
    }
}
