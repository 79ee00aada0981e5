//! Checks how a volume is wanted against what an image can be: a read-only file system.

use super::attributes::{invalid, shown};
use crate::{
    mount::{MountError, Sharing},
    pb::v1::{
        VolumeCapability,
        volume_capability::{AccessMode, AccessType, MountVolume, access_mode::Mode},
    },
};

/// Mount options that say what is so anyway.
const KNOWN_MOUNT_FLAGS: &[&str] = &["ro"];

/// Checks that the volume is wanted as a file system that nobody else writes to, without options that
/// it cannot have.
///
/// A single writer is accepted, and `readonly: false` too: inline volumes are always asked for so, and
/// the mount is read-only whatever the mode says.
///
/// # Errors
/// [`MountError::Invalid`], naming the field.
pub(super) fn check(capability: Option<&VolumeCapability>) -> Result<Sharing, MountError> {
    let Some(capability) = capability else {
        return Err(invalid("volume_capability", "is required"));
    };
    match &capability.access_type {
        Some(AccessType::Mount(mount)) => check_mount(mount)?,
        Some(AccessType::Block(_)) => {
            return Err(invalid(
                "volume_capability",
                "an image cannot be a block device: use volumeMode: Filesystem",
            ));
        }
        None => {
            return Err(invalid("volume_capability", "the access type is required"));
        }
    }
    let mode = capability.access_mode.as_ref().map(AccessMode::mode);
    match mode.unwrap_or(Mode::Unknown) {
        Mode::Unknown => Err(invalid("access_mode", "is required")),
        Mode::SingleNodeWriter
        | Mode::SingleNodeReaderOnly
        | Mode::MultiNodeReaderOnly
        | Mode::SingleNodeMultiWriter => Ok(Sharing::Many),
        Mode::SingleNodeSingleWriter => Ok(Sharing::One),
        mode @ (Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) => Err(invalid(
            "access_mode",
            format!(
                "{}: an image is read-only, no node writes for others to see: use ReadOnlyMany",
                mode.as_str_name()
            ),
        )),
    }
}

fn check_mount(mount: &MountVolume) -> Result<(), MountError> {
    if !mount.fs_type.is_empty() {
        return Err(invalid(
            "fsType",
            format!(
                "an image has no {:?}: leave it empty",
                shown(&mount.fs_type)
            ),
        ));
    }
    if !mount.volume_mount_group.is_empty() {
        return Err(invalid(
            "volume_mount_group",
            "owners are those of the image: set fsGroupPolicy: None in the CSIDriver",
        ));
    }
    match mount
        .mount_flags
        .iter()
        .find(|it| !KNOWN_MOUNT_FLAGS.contains(&it.as_str()))
    {
        None => Ok(()),
        Some(flag) => Err(invalid(
            "mountOptions",
            format!(
                "{:?} is not supported: the known ones are {}",
                shown(flag),
                KNOWN_MOUNT_FLAGS.join(", ")
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::v1::volume_capability::BlockVolume;

    fn wanted(access_type: Option<AccessType>, mode: Mode) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(AccessMode { mode: mode.into() }),
            access_type,
        }
    }

    fn mount(mount: MountVolume) -> VolumeCapability {
        wanted(Some(AccessType::Mount(mount)), Mode::SingleNodeWriter)
    }

    #[test]
    fn only_a_plain_file_system_can_be_had() {
        let ok = MountVolume {
            mount_flags: vec!["ro".to_owned()],
            ..MountVolume::default()
        };
        check(Some(&mount(ok))).unwrap();
        for (capability, want) in [
            (None, "volume_capability: is required"),
            (
                Some(wanted(None, Mode::SingleNodeWriter)),
                "volume_capability: the access type is required",
            ),
            (
                Some(wanted(
                    Some(AccessType::Block(BlockVolume {})),
                    Mode::SingleNodeWriter,
                )),
                "volume_capability: an image cannot be a block device: use volumeMode: Filesystem",
            ),
            (
                Some(mount(MountVolume {
                    fs_type: "ext4".to_owned(),
                    ..MountVolume::default()
                })),
                "fsType: an image has no \"ext4\": leave it empty",
            ),
            (
                Some(mount(MountVolume {
                    mount_flags: vec!["ro".to_owned(), "suid".to_owned()],
                    ..MountVolume::default()
                })),
                "mountOptions: \"suid\" is not supported: the known ones are ro",
            ),
            (
                Some(mount(MountVolume {
                    volume_mount_group: "1000".to_owned(),
                    ..MountVolume::default()
                })),
                "volume_mount_group: owners are those of the image: set fsGroupPolicy: None in the CSIDriver",
            ),
        ] {
            let err = check(capability.as_ref()).unwrap_err();
            assert_eq!(err.to_string(), want);
        }
    }

    #[test]
    fn every_mode_but_writing_from_several_nodes_can_be_had() {
        let plain = || Some(AccessType::Mount(MountVolume::default()));
        for (mode, want) in [
            (Mode::SingleNodeWriter, Some(Sharing::Many)),
            (Mode::SingleNodeReaderOnly, Some(Sharing::Many)),
            (Mode::MultiNodeReaderOnly, Some(Sharing::Many)),
            (Mode::SingleNodeMultiWriter, Some(Sharing::Many)),
            (Mode::SingleNodeSingleWriter, Some(Sharing::One)),
            (Mode::MultiNodeSingleWriter, None),
            (Mode::MultiNodeMultiWriter, None),
            (Mode::Unknown, None),
        ] {
            let outcome = check(Some(&wanted(plain(), mode)));
            assert_eq!(outcome.as_ref().ok(), want.as_ref(), "{mode:?}");
            if let Err(err) = outcome {
                assert!(err.to_string().starts_with("access_mode: "), "{err}");
            }
        }
        let missing = VolumeCapability {
            access_mode: None,
            access_type: plain(),
        };
        let err = check(Some(&missing)).unwrap_err();
        assert_eq!(err.to_string(), "access_mode: is required");
        // A mode of a later specification.
        let later = VolumeCapability {
            access_mode: Some(AccessMode { mode: 99 }),
            access_type: plain(),
        };
        let err = check(Some(&later)).unwrap_err();
        assert_eq!(err.to_string(), "access_mode: is required");
    }
}
