//! One operation in flight per volume and per target.
//!
//! CSI spec v1.12, "Concurrency": "The Plugin SHOULD handle this as gracefully as possible, and
//! MAY return this error code [ABORTED] to reject secondary calls."

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use super::{MountError, TargetPath, VolumeId, lock};

/// What an operation holds. Two volumes may not meet at one target either.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Key {
    Volume(VolumeId),
    Target(TargetPath),
}

/// The operations in flight.
#[derive(Debug, Default)]
pub(super) struct Operations {
    /// std Mutex: held for a set lookup, never across an await.
    held: Mutex<HashSet<Key>>,
}

/// An operation in flight: its volume and target are free again when it is dropped.
#[derive(Debug)]
#[must_use = "the volume is free again when this is dropped"]
pub(super) struct Operation {
    operations: Arc<Operations>,
    keys: [Key; 2],
}

impl Operations {
    /// Begins an operation, or says what another one holds.
    pub(super) fn begin(
        self: &Arc<Self>,
        volume: &VolumeId,
        target: &TargetPath,
    ) -> Result<Operation, MountError> {
        let keys = [Key::Volume(volume.clone()), Key::Target(target.clone())];
        let mut held = lock(&self.held);
        if let Some(busy) = keys.iter().find(|it| held.contains(it)) {
            let what = match busy {
                Key::Volume(volume) => format!("volume {volume}"),
                Key::Target(target) => format!("target path {target}"),
            };
            return Err(MountError::Busy { what });
        }
        held.extend(keys.iter().cloned());
        Ok(Operation {
            operations: Arc::clone(self),
            keys,
        })
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let mut held = lock(&self.operations.held);
        for key in &self.keys {
            held.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volume_and_target_are_held_until_the_operation_is_dropped() {
        let operations = Arc::new(Operations::default());
        let begin = |volume: &str, target: &str| {
            operations.begin(
                &VolumeId::parse(volume).unwrap(),
                &TargetPath::parse(target).unwrap(),
            )
        };
        let busy = |outcome: Result<Operation, MountError>| match outcome {
            Err(MountError::Busy { what }) => what,
            other => panic!("{other:?}"),
        };
        let first = begin("v", "/a").unwrap();
        assert_eq!(busy(begin("v", "/b")), "volume v");
        assert_eq!(busy(begin("w", "/a")), "target path /a");
        let other = begin("w", "/b").unwrap();
        drop(first);
        assert_eq!(busy(begin("v", "/b")), "target path /b");
        drop(other);
        drop(begin("v", "/b").unwrap());
        assert!(lock(&operations.held).is_empty());
    }
}
