//! What this process has published, and the credentials of a publish that is repeated.

use std::{collections::HashMap, path::PathBuf, sync::Mutex, time::Duration};

use tokio::time::timeout;
use tracing::{info, warn};

use super::{
    ImageRequest, PodRef, PrepareError, VolumeId, VolumeRecord, lock, preparations::Preparations,
    target::PublicationId,
};
use crate::digest::ManifestDigest;

/// How long a repeated publish waits until its credentials are taken: it is asked for every minute.
const RENEWAL_WAIT: Duration = Duration::from_secs(10);

/// A volume at a target.
#[derive(Debug, Clone)]
pub(super) struct Published {
    pub(super) volume: VolumeId,
    pub(super) manifest: ManifestDigest,
    pub(super) path: PathBuf,
    /// Whether what is at the path is a layer over the source, and not the source itself.
    pub(super) is_written_over: bool,
    pub(super) asked: Asked,
}

/// What a publication was asked for with, as far as this process knows.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    /// Its rights ([`ImageRequest::work`]); not those of one that a former process made.
    pub(super) work: Option<[u8; 32]>,
    /// Whose it is.
    pub(super) pod: Option<PodRef>,
}

impl Published {
    pub(super) fn of(record: &VolumeRecord, path: PathBuf, asked: Asked) -> Self {
        Self {
            volume: record.volume.clone(),
            manifest: record.manifest,
            path,
            is_written_over: record.written_over.is_some(),
            asked,
        }
    }
}

/// Takes the credentials of a publish that found its volume: kubelet repeats them with new tokens,
/// where the CSIDriver asks for it (`requiresRepublish`).
///
/// Whatever comes of it, the volume is published: kubelet before 1.37 takes a volume from its pod
/// when this fails.
pub(super) async fn renew(
    published: &Mutex<HashMap<PublicationId, Published>>,
    preparations: &Preparations,
    record: &VolumeRecord,
    image: &ImageRequest,
) {
    let work = image.work();
    let manifest = {
        let mut published = lock(published);
        match published.get_mut(&record.id()) {
            Some(it) if it.asked.work != Some(work) => {
                it.asked.work = Some(work);
                it.manifest
            }
            Some(_) | None => return,
        }
    };
    let renewal = preparations.renew(manifest, image);
    let renewed = timeout(RENEWAL_WAIT, renewal).await.unwrap_or_else(|_| {
        Err(PrepareError::Away {
            reason: format!("no answer within {} s", RENEWAL_WAIT.as_secs()),
        })
    });
    match renewed {
        Ok(()) => {
            info!(volume.id = %record.volume, "took the credentials of a repeated publish")
        }
        Err(err) => warn!(
            volume.id = %record.volume,
            error = &err as &dyn std::error::Error,
            "the credentials of a repeated publish are not used"
        ),
    }
}
