//! The Node service: publishes volumes on this node and takes them back.

use prometheus::IntGauge;
use tonic::{Request, Response, Status};

use super::{
    attributes::{Attributes, check_capability, credentials},
    observe::Observer,
};
use crate::{
    mount::{
        ImageRequest, MountError, MountTable, PublishRequest, TargetPath, UnpublishRequest,
        VolumeId,
    },
    pb::v1::{
        NodeExpandVolumeRequest, NodeExpandVolumeResponse, NodeGetCapabilitiesRequest,
        NodeGetCapabilitiesResponse, NodeGetInfoRequest, NodeGetInfoResponse,
        NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse, NodePublishVolumeRequest,
        NodePublishVolumeResponse, NodeStageVolumeRequest, NodeStageVolumeResponse,
        NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest,
        NodeUnstageVolumeResponse, node_server,
    },
};

/// The Node service.
#[derive(Debug)]
pub(super) struct NodeService {
    pub(super) node_id: String,
    pub(super) table: MountTable,
    pub(super) registered: IntGauge,
    pub(super) observer: Observer,
}

impl NodeService {
    /// Takes note that kubelet knows the driver: nobody else calls the Node service.
    ///
    /// NodeGetInfo is asked once per registration; the other calls count as well, because a
    /// registration by the sidecar outlives this process.
    fn note_registered(&self) {
        self.registered.set(1);
    }
}

/// Reads a publish. `publish_context`, `staging_target_path` and `readonly` say nothing here:
/// there is no controller, no stage, and no other mount than a read-only one.
fn parse_publish(request: &NodePublishVolumeRequest) -> Result<PublishRequest, MountError> {
    let volume = VolumeId::parse(&request.volume_id)?;
    let target = TargetPath::parse(&request.target_path)?;
    check_capability(request.volume_capability.as_ref())?;
    let Attributes {
        image,
        platform,
        index_digest,
        prefetch,
    } = Attributes::parse(&request.volume_context)?;
    let credentials = credentials(&request.secrets)?;
    Ok(PublishRequest {
        volume,
        target,
        image: ImageRequest {
            image,
            platform,
            index_digest,
            prefetch,
            credentials,
        },
    })
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
            self.table.publish(parse_publish(&request)?).await?;
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
        let answer = NodeGetCapabilitiesResponse {
            capabilities: Vec::new(),
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
            // No limit: a volume of an image that is mounted costs a bind.
            max_volumes_per_node: 0,
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
        _: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        self.observer.unimplemented("NodeGetVolumeStats")
    }

    async fn node_expand_volume(
        &self,
        _: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        self.observer.unimplemented("NodeExpandVolume")
    }
}
