//! Parses what a pod's author writes: volume attributes and secrets.
//!
//! ```yaml
//! csi:
//!   driver: csi.clip-csi.dev
//!   volumeAttributes:
//!     image: registry.example/team/app:1.2   # required
//!     platform: linux/arm64                  # the node's own if absent
//!     indexDigest: sha256:…                  # the pushed index to use; any that is trusted if absent
//!   nodePublishSecretRef:
//!     name: pull-secret   # of type kubernetes.io/basic-auth or kubernetes.io/dockerconfigjson
//! ```
//!
//! An unknown key is refused by name, because a misspelt one that is ignored is found late. A
//! secret's value is never part of a message.

use std::collections::BTreeMap;

use crate::{
    digest::ManifestDigest,
    mount::{MountError, PullCredentials},
    pb::v1::{VolumeCapability, volume_capability::AccessType},
    secret::Secret,
    tier::Prefetch,
};

/// The attribute that names the image.
const IMAGE: &str = "image";

/// The attribute that picks one image of a multi-platform one.
const PLATFORM: &str = "platform";

/// The attribute that pins the index that was pushed beside the image.
const INDEX_DIGEST: &str = "indexDigest";

/// The attribute that says what is fetched of the image before anybody asks.
const PREFETCH: &str = "prefetch";

/// The attributes, as messages list them.
const KNOWN_ATTRIBUTES: &str = "image, platform, indexDigest, prefetch";

/// What kubelet adds on its own: `podInfoOnMount`, service account tokens.
const KUBERNETES_PREFIX: &str = "csi.storage.k8s.io/";

/// Keys of a secret of type `kubernetes.io/basic-auth`.
const USERNAME: &str = "username";
const PASSWORD: &str = "password";

/// Key of a secret of type `kubernetes.io/dockerconfigjson`.
const DOCKER_CONFIG: &str = ".dockerconfigjson";

/// Longest image reference: host and name of 255 bytes each, tag of 128, digest of 71, rounded up.
const MAX_IMAGE_BYTES: usize = 1024;

/// Longest platform; `linux/ppc64le` is usual, variants and versions are a few bytes more.
const MAX_PLATFORM_BYTES: usize = 128;

/// Longest digest: `sha256:` and 64 digits; a longer one of another algorithm is not supported anyway.
const MAX_DIGEST_BYTES: usize = 256;

/// Longest secret value: Kubernetes takes secrets up to 1 MiB.
const MAX_SECRET_BYTES: usize = 1 << 20;

/// Mount options that say what is so anyway.
const KNOWN_MOUNT_FLAGS: &[&str] = &["ro"];

/// How much of a key that somebody made up is repeated in a message.
const MAX_SHOWN_CHARS: usize = 64;

/// The volume attributes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attributes {
    /// The image reference, not parsed yet: the registry's module knows how.
    pub image: String,
    /// The platform, likewise.
    pub platform: Option<String>,
    /// The pushed index that is to be used.
    pub index_digest: Option<ManifestDigest>,
    /// What is fetched ahead; as the node is configured if absent.
    pub prefetch: Option<Prefetch>,
}

impl Attributes {
    /// Parses the volume context of a publish.
    ///
    /// # Errors
    /// [`MountError::Invalid`], naming the attribute.
    pub fn parse(volume_context: &BTreeMap<String, String>) -> Result<Self, MountError> {
        let mut image = None;
        let mut platform = None;
        let mut index_digest = None;
        let mut prefetch = None;
        for (key, value) in volume_context {
            match key.as_str() {
                IMAGE => image = Some(bounded(IMAGE, value, MAX_IMAGE_BYTES)?),
                PLATFORM => platform = Some(bounded(PLATFORM, value, MAX_PLATFORM_BYTES)?),
                INDEX_DIGEST => {
                    // A digest's error quotes it, so it is bounded first.
                    let text = bounded(INDEX_DIGEST, value, MAX_DIGEST_BYTES)?;
                    let digest = text.parse();
                    index_digest =
                        Some(digest.map_err(|err| invalid(INDEX_DIGEST, format!("{err}")))?);
                }
                PREFETCH => {
                    let wanted = value.parse::<Prefetch>();
                    prefetch = Some(wanted.map_err(|err| invalid(PREFETCH, format!("{err}")))?);
                }
                key if key.starts_with(KUBERNETES_PREFIX) => {}
                key => {
                    return Err(invalid(
                        "volumeAttributes",
                        format!(
                            "unknown attribute {:?}: the known ones are {KNOWN_ATTRIBUTES}",
                            shown(key)
                        ),
                    ));
                }
            }
        }
        let image = image.ok_or_else(|| {
            invalid(
                IMAGE,
                "the attribute is required, such as image: registry.example/team/app:1.2",
            )
        })?;
        Ok(Self {
            image,
            platform,
            index_digest,
            prefetch,
        })
    }
}

/// Parses the secrets of a publish.
///
/// # Errors
/// [`MountError::Invalid`], naming the key, never a value.
pub fn credentials(secrets: &BTreeMap<String, String>) -> Result<PullCredentials, MountError> {
    let mut username = None;
    let mut password = None;
    let mut docker_config = None;
    for (key, value) in secrets {
        if MAX_SECRET_BYTES < value.len() {
            return Err(invalid(
                "secrets",
                format!("the value of {:?} is too long", shown(key)),
            ));
        }
        match key.as_str() {
            USERNAME => username = Some(value),
            PASSWORD => password = Some(value),
            DOCKER_CONFIG => docker_config = Some(value),
            key if key.starts_with(KUBERNETES_PREFIX) => {}
            key => {
                return Err(invalid(
                    "secrets",
                    format!(
                        "unknown key {:?}: give {USERNAME} and {PASSWORD}, or {DOCKER_CONFIG}",
                        shown(key)
                    ),
                ));
            }
        }
    }
    match (username, password, docker_config) {
        (None, None, None) => Ok(PullCredentials::None),
        (Some(username), Some(password), None) => Ok(PullCredentials::Basic {
            username: username.clone(),
            password: Secret::new(password.clone()),
        }),
        (None, None, Some(config)) => Ok(PullCredentials::DockerConfig(Secret::new(
            config.clone().into_bytes(),
        ))),
        (Some(_), None, None) | (None, Some(_), None) => Err(invalid(
            "secrets",
            format!("{USERNAME} and {PASSWORD} belong together: give both"),
        )),
        (_, _, Some(_)) => Err(invalid(
            "secrets",
            format!("give either {USERNAME} and {PASSWORD}, or {DOCKER_CONFIG}, not both"),
        )),
    }
}

/// Checks that the volume is wanted as a file system, without options that it cannot have.
///
/// All access modes are accepted, and `readonly: false` too: kubelet passes on what the pod says,
/// and the mount is read-only in any case.
///
/// # Errors
/// [`MountError::Invalid`], naming the field.
pub(super) fn check_capability(capability: Option<&VolumeCapability>) -> Result<(), MountError> {
    let Some(capability) = capability else {
        return Err(invalid("volume_capability", "is required"));
    };
    let mount = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => {
            return Err(invalid(
                "volume_capability",
                "an image cannot be a block device: use volumeMode: Filesystem",
            ));
        }
        None => {
            return Err(invalid("volume_capability", "the access type is required"));
        }
    };
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

fn bounded(field: &'static str, value: &str, max: usize) -> Result<String, MountError> {
    if value.is_empty() {
        Err(invalid(field, "is empty"))
    } else if max < value.len() {
        Err(invalid(
            field,
            format!("has {} bytes, {max} are allowed", value.len()),
        ))
    } else {
        Ok(value.to_owned())
    }
}

fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN_CHARS).collect()
}

fn invalid(field: &'static str, reason: impl Into<String>) -> MountError {
    MountError::Invalid {
        field: field.into(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::v1::volume_capability::{BlockVolume, MountVolume};

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn attributes_of_kubelet_and_of_the_user_are_told_apart() {
        let parsed = Attributes::parse(&map(&[
            ("image", "registry.example/app:1"),
            ("platform", "linux/arm64"),
            ("indexDigest", DIGEST),
            ("prefetch", "all"),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.name", "web-0"),
            ("csi.storage.k8s.io/serviceAccount.tokens", "{}"),
        ]));
        let want = Attributes {
            image: "registry.example/app:1".to_owned(),
            platform: Some("linux/arm64".to_owned()),
            index_digest: Some(ManifestDigest::of(b"")),
            prefetch: Some(Prefetch::All),
        };
        assert_eq!(parsed.unwrap(), want);
        let parsed = Attributes::parse(&map(&[("image", "app")])).unwrap();
        assert_eq!((parsed.platform, parsed.index_digest), (None, None));
        assert_eq!(parsed.prefetch, None);
    }

    #[test]
    fn wrong_attributes_are_named() {
        let long = "a".repeat(1025);
        for (pairs, want) in [
            (
                &[][..],
                "image: the attribute is required, such as image: registry.example/team/app:1.2",
            ),
            (&[("image", "")], "image: is empty"),
            (
                &[("image", long.as_str())],
                "image: has 1025 bytes, 1024 are allowed",
            ),
            (
                &[("image", "a"), ("platform", &long)],
                "platform: has 1025 bytes, 128 are allowed",
            ),
            (
                &[("image", "a"), ("indexDigest", "latest")],
                "indexDigest: digest \"latest\" is not supported: only sha256 digests are",
            ),
            (
                &[("image", "a"), ("indexDigest", &DIGEST[..70])],
                "indexDigest: digest \"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b85\" is malformed: 64 lower-case hexadecimal digits must follow \"sha256:\"",
            ),
            (
                &[("image", "a"), ("indexDigest", &long)],
                "indexDigest: has 1025 bytes, 256 are allowed",
            ),
            (
                &[("image", "a"), ("prefetch", "ALL")],
                "prefetch: must be none, recorded or all",
            ),
            (
                &[("image", "a"), ("Image", "b")],
                "volumeAttributes: unknown attribute \"Image\": the known ones are image, platform, indexDigest, prefetch",
            ),
            (
                &[("image", "a"), ("x\n", "b")],
                "volumeAttributes: unknown attribute \"x\\n\": the known ones are image, platform, indexDigest, prefetch",
            ),
        ] {
            let err = Attributes::parse(&map(pairs)).unwrap_err();
            assert_eq!(err.to_string(), want);
        }
        let err = Attributes::parse(&map(&[(&long, "a")])).unwrap_err();
        assert!(err.to_string().len() < 200, "{err}");
    }

    #[test]
    fn each_kind_of_secret_is_read() {
        assert_eq!(credentials(&map(&[])).unwrap(), PullCredentials::None);
        assert_eq!(
            credentials(&map(&[("username", "u"), ("password", "p")])).unwrap(),
            PullCredentials::Basic {
                username: "u".to_owned(),
                password: Secret::new("p".to_owned()),
            }
        );
        assert_eq!(
            credentials(&map(&[
                (".dockerconfigjson", "{}"),
                ("csi.storage.k8s.io/serviceAccount.tokens", "{}"),
            ]))
            .unwrap(),
            PullCredentials::DockerConfig(Secret::new(b"{}".to_vec()))
        );
    }

    #[test]
    fn wrong_secrets_are_named_without_their_values() {
        let long = "hunter2".repeat(MAX_SECRET_BYTES / 7 + 1);
        for (pairs, want) in [
            (&[("username", "hunter2")][..], "belong together"),
            (&[("password", "hunter2")], "belong together"),
            (
                &[("token", "hunter2")],
                "unknown key \"token\": give username and password, or .dockerconfigjson",
            ),
            (
                &[
                    ("username", "u"),
                    ("password", "hunter2"),
                    (".dockerconfigjson", "hunter2"),
                ],
                "not both",
            ),
            (
                &[("username", "hunter2"), (".dockerconfigjson", "hunter2")],
                "not both",
            ),
            (&[("password", &long)], "too long"),
        ] {
            let err = credentials(&map(pairs)).unwrap_err();
            let debug = format!("{err:?} {err}");
            assert!(debug.contains(want), "{debug} lacks {want}");
            assert!(!debug.contains("hunter2"), "{debug}");
        }
    }

    #[test]
    fn only_a_plain_file_system_can_be_had() {
        let mount = |mount: MountVolume| {
            Some(VolumeCapability {
                access_mode: None,
                access_type: Some(AccessType::Mount(mount)),
            })
        };
        let ok = MountVolume {
            mount_flags: vec!["ro".to_owned()],
            ..MountVolume::default()
        };
        check_capability(mount(ok).as_ref()).unwrap();
        for (capability, want) in [
            (None, "volume_capability: is required"),
            (
                Some(VolumeCapability::default()),
                "volume_capability: the access type is required",
            ),
            (
                Some(VolumeCapability {
                    access_mode: None,
                    access_type: Some(AccessType::Block(BlockVolume {})),
                }),
                "volume_capability: an image cannot be a block device: use volumeMode: Filesystem",
            ),
            (
                mount(MountVolume {
                    fs_type: "ext4".to_owned(),
                    ..MountVolume::default()
                }),
                "fsType: an image has no \"ext4\": leave it empty",
            ),
            (
                mount(MountVolume {
                    mount_flags: vec!["ro".to_owned(), "suid".to_owned()],
                    ..MountVolume::default()
                }),
                "mountOptions: \"suid\" is not supported: the known ones are ro",
            ),
            (
                mount(MountVolume {
                    volume_mount_group: "1000".to_owned(),
                    ..MountVolume::default()
                }),
                "volume_mount_group: owners are those of the image: set fsGroupPolicy: None in the CSIDriver",
            ),
        ] {
            let err = check_capability(capability.as_ref()).unwrap_err();
            assert_eq!(err.to_string(), want);
        }
    }
}
