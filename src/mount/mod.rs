//! Knows what is mounted where, and binds sources to targets.
//!
//! [`MountTable`] is what the rest uses. It holds one *source mount* per image, below its state
//! directory, and binds it read-only to each *target path*, or lays a layer over it there that can be
//! written; a source without targets is kept for a while, then unmounted.
//!
//! ```text
//! <state-dir>/lock                       held while a process uses the directory
//! <state-dir>/sources/<manifest>/mnt     a source mount that a process serves
//! <state-dir>/sources/<manifest>/kernel  one that the kernel serves, of an image that was whole on disk
//! <state-dir>/sources/<manifest>/clip-csi  its metadata, for the moment in which it is mounted
//! <state-dir>/writable/<publication>     a layer to be written, for the moment in which it is mounted
//! <state-dir>/volumes/<publication>.json what is published: one record per volume and target
//! <state-dir>/volumes/<publication>.json.bad   a record that could not be read, put aside
//! ```
//!
//! What holds here:
//!
//! - Every operation may be repeated, also after a crash in its middle. A record is written before
//!   its bind and removed after it, so that a bind without a record cannot be.
//! - Before an error that is final for kubelet ([`MountError::is_transient`] is false), everything
//!   is undone.
//! - Unpublish of anything, dead or unknown, succeeds.
//! - No mount is ever `stat`ed, because a dead one blocks or fails: what is mounted is read from
//!   `/proc/self/mountinfo`. Nothing is deleted recursively: directories go by rmdir(2).
//! - One operation is in flight per volume and per target. The work on a mount runs to its end on
//!   the blocking pool, whether the caller still listens or not.
//!
//! Lock order: a source's slot, then the map of slots; the other locks are taken alone. All are
//! std mutexes, and none is held across an await.
//!
//! Absent on purpose: what an image is. [`ImageMounter`] is the seam to who knows.

mod bind;
mod dead;
mod error;
mod image;
mod leave;
mod mountinfo;
mod operations;
mod pod_notices;
mod preparations;
mod published;
mod record;
mod recover;
mod sources;
mod stats;
mod table;
mod target;
mod view;
mod writable;

pub use error::{MountError, PrepareError};
pub use image::{
    ImageMounter, ImageRequest, KernelMounts, PodInfo, PreparedImage, Progress, PullCredentials,
    PullPolicy, SourceMount, Survivor, Usage,
};
pub use mountinfo::{Device, MountEntry, MountInfo, MountInfoError};
pub use pod_notices::{PodNotice, PodRef};
pub use record::{RecordError, VolumeRecord, WrittenOver};
pub use recover::Recovered;
pub use stats::{Space, VolumeStats};
pub use table::{MountTable, MountTableConfig, PublishRequest, UnpublishRequest};
pub use target::{TargetPath, VolumeId};
pub use view::{Sharing, SubPath, View, Writable};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The `fsname` that source mounts carry: how a mount is known as the driver's without a record.
pub const SOURCE_NAME: &str = "clip-csi";

/// Locks, also after another holder panicked: every critical section here leaves a whole state.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
