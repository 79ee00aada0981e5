//! Turns the outcome of a call into a gRPC code: the one place that does.
//!
//! What kubelet does with a failed NodePublishVolume depends on the code
//! (kubernetes/pkg/volume/csi/csi_client.go, `isFinalError`):
//!
//! - `CANCELLED`, `DEADLINE_EXCEEDED`, `UNAVAILABLE`, `RESOURCE_EXHAUSTED` and `ABORTED` are *not
//!   final*: the volume may be there or be coming. Kubelet calls again, and will unpublish.
//! - Any other code is *final*: the volume is not there. Kubelet removes the directory, calls again
//!   with back-off while the pod exists, and may never unpublish. So everything is undone before.

use tonic::{Code, Status};

use crate::{mount::MountError, telemetry::error_chain};

/// Longest message: it travels percent-encoded in an HTTP/2 header, where 8 KiB are a common limit
/// in all, and ends in a pod's event, which shows 1 KiB.
const MAX_MESSAGE_BYTES: usize = 2048;

/// The gRPC code of an error.
pub(super) fn code(err: &MountError) -> Code {
    match err {
        // Final: the pod's author, or the orchestrator, has to change the call.
        MountError::Invalid { .. } => Code::InvalidArgument,
        // Not final: another call is at work on the volume.
        MountError::Busy { .. } => Code::Aborted,
        // Not final: the work goes on, and the next call joins it.
        MountError::Preparing { .. } => Code::Aborted,
        // Not final: there is room again when other images are ready.
        MountError::Overloaded { .. } => Code::ResourceExhausted,
        // Not final: there is room again in a moment.
        MountError::RateLimited { .. } => Code::ResourceExhausted,
        // Final: the volume is there, as something else.
        MountError::AlreadyExists { .. } | MountError::NameTaken { .. } => Code::AlreadyExists,
        // Final: nothing of that name is here.
        MountError::VolumeNotFound { .. } => Code::NotFound,
        // Final, as the specification has it (NodePublishVolume, "Exceeds capabilities").
        MountError::InUse { .. } => Code::FailedPrecondition,
        // Final: somebody has to push the image, for this platform, or correct the name.
        MountError::ImageNotFound { .. } => Code::NotFound,
        // Final: somebody has to give credentials, or right ones.
        MountError::Unauthorized { .. } => Code::Unauthenticated,
        // Final: somebody has to give the right to pull.
        MountError::Forbidden { .. } => Code::PermissionDenied,
        // Not final: the registry may be back at the next call.
        MountError::Unavailable { .. } => Code::Unavailable,
        // Not final: the server may be back at the next call.
        MountError::NoServer { .. } => Code::Unavailable,
        // Not final: eviction or the node's operator makes room.
        MountError::NoSpace { .. } => Code::ResourceExhausted,
        // Not final: there is room again when other images are unmounted.
        MountError::CacheFull { .. } => Code::ResourceExhausted,
        // Final: something at the target path is not the driver's to remove.
        MountError::Foreign { .. } => Code::FailedPrecondition,
        // Final: the bytes are not what their digests say; they will not be at the next call.
        MountError::Refused { .. } => Code::DataLoss,
        // Final: a limit has to be raised.
        MountError::Limit { .. } => Code::FailedPrecondition,
        // Final, as everything was undone: the node's operator finds the cause in the log.
        MountError::System { .. } => Code::Internal,
    }
}

/// The status that answers a failed call: the code, and one sentence with all causes.
///
/// Without details: kubelet does not show them, and they have no place for secrets to leak.
pub(super) fn status(err: &MountError) -> Status {
    Status::new(code(err), message(err))
}

/// The code's name, as a label and in logs.
pub(super) fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The error and its causes, joined.
fn message(err: &MountError) -> String {
    let mut message = error_chain(err);
    if MAX_MESSAGE_BYTES < message.len() {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE_BYTES));
        message.push('…');
    }
    message
}

#[cfg(test)]
mod tests {
    use std::{io, path::PathBuf, time::Duration};

    use super::*;
    use crate::{
        digest::DiffId,
        mount::PrepareError,
        tier::{PresentError, SourceError},
    };

    const LAYER: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    /// What kubelet does not take for final (see the module's doc).
    const NOT_FINAL: &[Code] = &[
        Code::Cancelled,
        Code::DeadlineExceeded,
        Code::Unavailable,
        Code::ResourceExhausted,
        Code::Aborted,
    ];

    fn sources() -> Vec<(SourceError, Code, &'static str)> {
        let (what, registry) = ("r.example/app:1".to_owned(), "r.example".to_owned());
        let (what, registry) = (|| what.clone(), || registry.clone());
        vec![
            (
                SourceError::NotFound {
                    what: what(),
                    registry: registry(),
                },
                Code::NotFound,
                "cannot mount image app: r.example/app:1 was not found at r.example: check the name, and that it was pushed",
            ),
            (
                SourceError::WrongPlatform {
                    image: what(),
                    wanted: "linux/arm64".to_owned(),
                    available: "linux/amd64".to_owned(),
                },
                Code::NotFound,
                "cannot mount image app: r.example/app:1 has no manifest for platform linux/arm64; it has: linux/amd64; push it for linux/arm64, or set the platform attribute",
            ),
            (
                SourceError::Unauthorized {
                    what: what(),
                    registry: registry(),
                    hint: "give a nodePublishSecretRef".to_owned(),
                },
                Code::Unauthenticated,
                "cannot mount image app: r.example wants credentials for r.example/app:1: give a nodePublishSecretRef",
            ),
            (
                SourceError::Forbidden {
                    what: what(),
                    registry: registry(),
                },
                Code::PermissionDenied,
                "cannot mount image app: r.example refuses access to r.example/app:1: the credentials lack the right to pull it: have it granted, or give others",
            ),
            (
                SourceError::RateLimited {
                    registry: registry(),
                    retry_after: Some(Duration::from_secs(30)),
                },
                Code::Unavailable,
                "cannot mount image app now: r.example limits requests (HTTP 429); it asks to wait 30 s",
            ),
            (
                SourceError::Unavailable {
                    registry: registry(),
                    reason: "refused".to_owned(),
                },
                Code::Unavailable,
                "cannot mount image app now: r.example is unavailable: refused",
            ),
            (
                SourceError::Protocol {
                    registry: registry(),
                    reason: "wrong digest".to_owned(),
                },
                Code::DataLoss,
                "image app is refused: r.example answered wrongly: wrong digest",
            ),
            (
                SourceError::Unsupported {
                    what: what(),
                    reason: "is a Helm chart".to_owned(),
                },
                Code::InvalidArgument,
                "image: r.example/app:1: is a Helm chart",
            ),
        ]
    }

    #[test]
    fn each_answer_of_a_registry_has_its_code_and_its_sentence() {
        for (source, want, sentence) in sources() {
            let status = status(&MountError::of_image("app", source.clone().into()));
            assert_eq!((status.code(), status.message()), (want, sentence));
            // The same for a layer of the image.
            let layer = PresentError::Origin {
                layer: LAYER.parse::<DiffId>().unwrap(),
                source,
            };
            assert_eq!(code(&MountError::of_image("app", layer.into())), want);
        }
    }

    #[test]
    fn each_fault_of_a_layer_has_its_code_and_its_sentence() {
        let layer: DiffId = LAYER.parse().unwrap();
        for (present, want, sentence) in [
            (
                PresentError::Refused {
                    layer,
                    reason: "it ends early".to_owned(),
                },
                Code::DataLoss,
                format!("image app is refused: layer {LAYER} is refused: it ends early"),
            ),
            (
                PresentError::NoSpace {
                    path: "/cache".into(),
                },
                Code::ResourceExhausted,
                "the disk of /cache is full: free space there, or give it a larger one".to_owned(),
            ),
            (
                PresentError::CacheFull {
                    layer,
                    path: "/cache".into(),
                    max_bytes: 7,
                },
                Code::ResourceExhausted,
                format!(
                    "cannot mount image app now: layer {LAYER} does not fit into the cache /cache: what is in use leaves too little of cache.max_bytes = 7; raise it, or unmount images of this node"
                ),
            ),
            (
                PresentError::Disk {
                    reason: "EIO on /cache/x".to_owned(),
                },
                Code::Internal,
                "preparing image app: EIO on /cache/x".to_owned(),
            ),
            (
                PresentError::Limit {
                    layer,
                    limit: "max_layer_bytes".into(),
                    max: 5,
                },
                Code::FailedPrecondition,
                format!(
                    "image app is refused: layer {LAYER} exceeds max_layer_bytes = 5: raise the limit if the image is trusted"
                ),
            ),
            (
                PresentError::Timeout {
                    layer,
                    waited: Duration::from_secs(30),
                },
                Code::Unavailable,
                format!("cannot mount image app now: layer {LAYER}: no progress for 30s"),
            ),
            (
                PresentError::Unknown { layer },
                Code::Unavailable,
                format!("cannot mount image app now: layer {LAYER} is not served by this process"),
            ),
        ] {
            let status = status(&MountError::of_image("app", present.into()));
            assert_eq!((status.code(), status.message()), (want, sentence.as_str()));
        }
    }

    #[test]
    fn each_other_fault_has_its_code() {
        let image = || "app".to_owned();
        for (err, want) in [
            (
                MountError::of_image(
                    "app",
                    PrepareError::Invalid {
                        field: "platform".into(),
                        reason: "x".to_owned(),
                    },
                ),
                Code::InvalidArgument,
            ),
            (
                MountError::of_image(
                    "app",
                    PrepareError::Limit {
                        limit: "max_layers".into(),
                        max: 1,
                    },
                ),
                Code::FailedPrecondition,
            ),
            (
                MountError::of_image(
                    "app",
                    PrepareError::Internal {
                        reason: "x".to_owned(),
                    },
                ),
                Code::Internal,
            ),
            (
                MountError::Busy {
                    what: "volume v".to_owned(),
                },
                Code::Aborted,
            ),
            (
                MountError::Preparing {
                    image: image(),
                    waited: Duration::ZERO,
                    progress: image(),
                },
                Code::Aborted,
            ),
            (MountError::Overloaded { max: 1 }, Code::ResourceExhausted),
            (
                MountError::RateLimited { per_second: 1 },
                Code::ResourceExhausted,
            ),
            (MountError::NameTaken { name: image() }, Code::AlreadyExists),
            (MountError::VolumeNotFound { what: image() }, Code::NotFound),
            (
                MountError::InUse {
                    volume: image(),
                    path: PathBuf::new(),
                },
                Code::FailedPrecondition,
            ),
            (
                MountError::of_image("app", PrepareError::NotPresent),
                Code::NotFound,
            ),
            (
                MountError::AlreadyExists {
                    volume: image(),
                    path: PathBuf::new(),
                },
                Code::AlreadyExists,
            ),
            (
                MountError::Foreign {
                    path: PathBuf::new(),
                    reason: "x",
                },
                Code::FailedPrecondition,
            ),
            (
                MountError::System {
                    doing: image(),
                    source: io::Error::other("x"),
                },
                Code::Internal,
            ),
        ] {
            assert_eq!(code(&err), want, "{err}");
            assert_eq!(err.is_transient(), NOT_FINAL.contains(&want), "{err}");
        }
    }

    #[test]
    fn what_is_transient_is_what_kubelet_does_not_take_for_final() {
        for (source, want, _) in sources() {
            let transient = source.is_transient();
            let err = MountError::of_image("app", source.into());
            assert_eq!(err.is_transient(), NOT_FINAL.contains(&want), "{err}");
            assert_eq!(err.is_transient(), transient, "{err}");
        }
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let err = MountError::Invalid {
            field: "image".into(),
            reason: "ä".repeat(4000),
        };
        let message = message(&err);
        assert!(
            message.len() <= MAX_MESSAGE_BYTES + "…".len(),
            "{}",
            message.len()
        );
        assert!(message.ends_with("ä…"), "{message}");
    }
}
