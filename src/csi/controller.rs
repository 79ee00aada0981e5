//! The Controller service: makes volumes out of a StorageClass's parameters, and keeps nothing.
//!
//! A volume is its attributes: they are the parameters, they come back with every publish as the volume
//! context, which Kubernetes keeps in the PersistentVolume, and nothing of a volume is anywhere else. So any
//! process can serve this, on any node, and there is nothing to delete. The image is not looked for: that
//! needs the rights of whoever mounts it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

use super::{
    attributes::{Attributes, invalid, is_kubernetes},
    capability,
    made::Made,
    observe::Observer,
};
use crate::{
    digest::to_hex,
    mount::{MountError, VolumeId},
    pb::v1::{
        CapacityRange, ControllerExpandVolumeRequest, ControllerExpandVolumeResponse,
        ControllerGetCapabilitiesRequest, ControllerGetCapabilitiesResponse,
        ControllerGetVolumeRequest, ControllerGetVolumeResponse, ControllerModifyVolumeRequest,
        ControllerModifyVolumeResponse, ControllerPublishVolumeRequest,
        ControllerPublishVolumeResponse, ControllerServiceCapability,
        ControllerUnpublishVolumeRequest, ControllerUnpublishVolumeResponse, CreateSnapshotRequest,
        CreateSnapshotResponse, CreateVolumeRequest, CreateVolumeResponse, DeleteSnapshotRequest,
        DeleteSnapshotResponse, DeleteVolumeRequest, DeleteVolumeResponse, GetCapacityRequest,
        GetCapacityResponse, GetSnapshotRequest, GetSnapshotResponse, ListSnapshotsRequest,
        ListSnapshotsResponse, ListVolumesRequest, ListVolumesResponse,
        ValidateVolumeCapabilitiesRequest, ValidateVolumeCapabilitiesResponse, Volume,
        VolumeCapability,
        controller_server::Controller,
        controller_service_capability::{Rpc, Type, rpc},
        validate_volume_capabilities_response::Confirmed,
    },
};

/// What the id of every volume that is made here begins with; the number is that of its form.
const ID_PREFIX: &str = "clip1-";

/// Longest name of a volume (CSI spec v1.12, "Size Limits").
const MAX_NAME_BYTES: usize = 128;

/// A volume that is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) name: String,
    pub(super) attributes: BTreeMap<String, String>,
    pub(super) capacity: Capacity,
}

/// How large a volume is to be. An image has the size that it has: this is repeated, and means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capacity {
    /// At least; 0 says nothing.
    pub(super) required_bytes: i64,
    /// At most; 0 says nothing.
    pub(super) limit_bytes: i64,
}

impl Capacity {
    fn parse(range: Option<&CapacityRange>) -> Result<Self, MountError> {
        let Some(range) = range else {
            return Ok(Self {
                required_bytes: 0,
                limit_bytes: 0,
            });
        };
        let (required_bytes, limit_bytes) = (range.required_bytes, range.limit_bytes);
        if required_bytes < 0 || limit_bytes < 0 {
            return Err(invalid("capacity_range", "is negative"));
        }
        if 0 < limit_bytes && limit_bytes < required_bytes {
            return Err(invalid(
                "capacity_range",
                format!("requires {required_bytes} bytes, and at most {limit_bytes}"),
            ));
        }
        Ok(Self {
            required_bytes,
            limit_bytes,
        })
    }

    /// What the volume is said to have.
    pub(super) fn granted(self) -> i64 {
        self.required_bytes
    }

    /// Whether a volume that is said to have `bytes` will do.
    pub(super) fn holds(self, bytes: i64) -> bool {
        self.required_bytes <= bytes && (self.limit_bytes == 0 || bytes <= self.limit_bytes)
    }
}

impl Wanted {
    fn parse(request: CreateVolumeRequest) -> Result<Self, MountError> {
        let name = request.name;
        if name.is_empty() {
            return Err(invalid("name", "is required"));
        }
        if MAX_NAME_BYTES < name.len() {
            return Err(invalid(
                "name",
                format!("has {} bytes, {MAX_NAME_BYTES} are allowed", name.len()),
            ));
        }
        check_capabilities(&request.volume_capabilities)?;
        if request.volume_content_source.is_some() {
            return Err(invalid(
                "volume_content_source",
                "a volume's content is its image's: leave dataSource out of the claim",
            ));
        }
        if !request.mutable_parameters.is_empty() {
            return Err(invalid(
                "mutable_parameters",
                "an image volume cannot be changed: leave volumeAttributesClassName out of the claim",
            ));
        }
        Ok(Self {
            name,
            attributes: parse_parameters(request.parameters)?,
            capacity: Capacity::parse(request.capacity_range.as_ref())?,
        })
    }

    /// Names the volume: the same for the same name and attributes, whichever process is asked.
    pub(super) fn id(&self) -> String {
        let mut hash = Sha256::new();
        let attributes = self.attributes.iter().flat_map(|(key, value)| [key, value]);
        for field in [&self.name].into_iter().chain(attributes) {
            hash.update((field.len() as u64).to_le_bytes());
            hash.update(field);
        }
        format!("{ID_PREFIX}{}", to_hex(&hash.finalize()))
    }

    fn into_volume(self) -> Volume {
        Volume {
            volume_id: self.id(),
            capacity_bytes: self.capacity.granted(),
            volume_context: self.attributes,
            content_source: None,
            accessible_topology: Vec::new(),
        }
    }
}

/// The attributes of a volume out of a StorageClass's parameters: those that are not Kubernetes' own.
fn parse_parameters(
    mut parameters: BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>, MountError> {
    parameters.retain(|key, _| !is_kubernetes(key));
    Attributes::parse(&parameters)?.check_persistent()?;
    Ok(parameters)
}

fn check_capabilities(capabilities: &[VolumeCapability]) -> Result<(), MountError> {
    if capabilities.is_empty() {
        return Err(invalid("volume_capabilities", "are required"));
    }
    for it in capabilities {
        capability::check(Some(it))?;
    }
    Ok(())
}

/// Whether a volume of this id may have been made here.
fn is_ours(id: &VolumeId) -> bool {
    let hex = id.as_str().strip_prefix(ID_PREFIX);
    hex.is_some_and(|it| crate::digest::from_hex(it).is_some())
}

/// The Controller service.
#[derive(Debug)]
pub(super) struct ControllerService {
    observer: Observer,
    /// std Mutex: held for a map operation, never across an await.
    made: Mutex<Made>,
}

impl ControllerService {
    pub(super) fn new(observer: Observer) -> Self {
        Self {
            observer,
            made: Mutex::default(),
        }
    }

    fn made(&self) -> std::sync::MutexGuard<'_, Made> {
        // Every operation on it leaves a whole state.
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create(&self, request: CreateVolumeRequest) -> Result<CreateVolumeResponse, MountError> {
        let wanted = Wanted::parse(request)?;
        let name = wanted.name.clone();
        match self.made().make(wanted) {
            Some(made) => Ok(CreateVolumeResponse {
                volume: Some(made.into_volume()),
            }),
            None => Err(MountError::NameTaken { name }),
        }
    }
}

/// Whether the volume can be used as the request says, and if not, why.
///
/// # Errors
/// If the request is incomplete, or about a volume that was never made.
fn validate(
    request: ValidateVolumeCapabilitiesRequest,
) -> Result<ValidateVolumeCapabilitiesResponse, MountError> {
    let volume = VolumeId::parse(&request.volume_id)?;
    if request.volume_capabilities.is_empty() {
        return Err(invalid("volume_capabilities", "are required"));
    }
    if !is_ours(&volume) {
        return Err(MountError::VolumeNotFound {
            what: format!("volume {volume}"),
        });
    }
    let checked = check_capabilities(&request.volume_capabilities).and_then(|()| {
        for attributes in [&request.volume_context, &request.parameters] {
            if !attributes.is_empty() {
                parse_parameters(attributes.clone())?;
            }
        }
        Ok(())
    });
    Ok(match checked {
        Ok(()) => ValidateVolumeCapabilitiesResponse {
            confirmed: Some(Confirmed {
                volume_context: request.volume_context,
                volume_capabilities: request.volume_capabilities,
                parameters: request.parameters,
                mutable_parameters: BTreeMap::new(),
            }),
            message: String::new(),
        },
        Err(err) => ValidateVolumeCapabilitiesResponse {
            confirmed: None,
            message: err.to_string(),
        },
    })
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<CreateVolumeRequest>,
    ) -> Result<Response<CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        let name = request.name.clone();
        let work = async { self.create(request) };
        self.observer.call("CreateVolume", &name, work).await
    }

    async fn delete_volume(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let id = request.into_inner().volume_id;
        let work = async {
            if id.is_empty() {
                return Err(invalid("volume_id", "is required"));
            }
            self.made().forget(&id);
            Ok(DeleteVolumeResponse {})
        };
        self.observer.call("DeleteVolume", &id, work).await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        let id = request.volume_id.clone();
        let work = async { validate(request) };
        self.observer
            .call("ValidateVolumeCapabilities", &id, work)
            .await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<ControllerGetCapabilitiesResponse>, Status> {
        // The second one makes Kubernetes tell ReadWriteOncePod from ReadWriteOnce.
        let types = [
            rpc::Type::CreateDeleteVolume,
            rpc::Type::SingleNodeMultiWriter,
        ];
        let answer = ControllerGetCapabilitiesResponse {
            capabilities: types
                .map(|it| ControllerServiceCapability {
                    r#type: Some(Type::Rpc(Rpc { r#type: it.into() })),
                })
                .into(),
        };
        self.observer.quiet("ControllerGetCapabilities", answer)
    }

    async fn controller_publish_volume(
        &self,
        _: Request<ControllerPublishVolumeRequest>,
    ) -> Result<Response<ControllerPublishVolumeResponse>, Status> {
        self.observer.unimplemented("ControllerPublishVolume")
    }

    async fn controller_unpublish_volume(
        &self,
        _: Request<ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<ControllerUnpublishVolumeResponse>, Status> {
        self.observer.unimplemented("ControllerUnpublishVolume")
    }

    async fn list_volumes(
        &self,
        _: Request<ListVolumesRequest>,
    ) -> Result<Response<ListVolumesResponse>, Status> {
        self.observer.unimplemented("ListVolumes")
    }

    async fn get_capacity(
        &self,
        _: Request<GetCapacityRequest>,
    ) -> Result<Response<GetCapacityResponse>, Status> {
        self.observer.unimplemented("GetCapacity")
    }

    async fn create_snapshot(
        &self,
        _: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotResponse>, Status> {
        self.observer.unimplemented("CreateSnapshot")
    }

    async fn delete_snapshot(
        &self,
        _: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotResponse>, Status> {
        self.observer.unimplemented("DeleteSnapshot")
    }

    async fn list_snapshots(
        &self,
        _: Request<ListSnapshotsRequest>,
    ) -> Result<Response<ListSnapshotsResponse>, Status> {
        self.observer.unimplemented("ListSnapshots")
    }

    async fn get_snapshot(
        &self,
        _: Request<GetSnapshotRequest>,
    ) -> Result<Response<GetSnapshotResponse>, Status> {
        self.observer.unimplemented("GetSnapshot")
    }

    async fn controller_expand_volume(
        &self,
        _: Request<ControllerExpandVolumeRequest>,
    ) -> Result<Response<ControllerExpandVolumeResponse>, Status> {
        self.observer.unimplemented("ControllerExpandVolume")
    }

    async fn controller_get_volume(
        &self,
        _: Request<ControllerGetVolumeRequest>,
    ) -> Result<Response<ControllerGetVolumeResponse>, Status> {
        self.observer.unimplemented("ControllerGetVolume")
    }

    async fn controller_modify_volume(
        &self,
        _: Request<ControllerModifyVolumeRequest>,
    ) -> Result<Response<ControllerModifyVolumeResponse>, Status> {
        self.observer.unimplemented("ControllerModifyVolume")
    }
}
