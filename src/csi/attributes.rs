//! Parses what a pod's author writes: volume attributes and secrets.
//!
//! ```yaml
//! csi:
//!   driver: csi.clip-csi.dev
//!   volumeAttributes:
//!     image: registry.example/team/app:1.2   # required
//!     platform: linux/arm64                  # the node's own if absent
//!     indexDigest: sha256:…                  # the pushed index to use; any that is trusted if absent
//!     path: usr/share/models                 # the directory that is seen; all of it if absent
//!   nodePublishSecretRef:
//!     name: pull-secret   # of type kubernetes.io/basic-auth or kubernetes.io/dockerconfigjson
//! ```
//!
//! docs/VOLUMES.md has all of them. An unknown key is refused by name, because a misspelt one that is ignored is found late. A
//! secret's value is never part of a message.

use std::collections::BTreeMap;

use super::quantity;
use crate::{
    digest::ManifestDigest,
    mount::{MountError, PullCredentials, PullPolicy, SubPath, Writable},
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

/// The attribute that says whether the registry is asked what a tag means.
const PULL_POLICY: &str = "pullPolicy";

/// The attribute that names the directory of the image that is seen.
const PATH: &str = "path";

/// The attribute that has the registry spoken to without TLS.
const INSECURE: &str = "insecure";

/// The attribute that lays a layer over the image that can be written.
const WRITABLE: &str = "writable";

/// The attribute that says how large that layer may become.
const WRITABLE_SIZE: &str = "writableSize";

/// The attributes that a volume may have, which are also the parameters of a StorageClass.
pub const ATTRIBUTES: &[&str] = &[
    IMAGE,
    PLATFORM,
    INDEX_DIGEST,
    PREFETCH,
    PULL_POLICY,
    PATH,
    INSECURE,
    WRITABLE,
    WRITABLE_SIZE,
];

/// What kubelet says of an inline volume.
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";

/// What Kubernetes adds on its own: kubelet (`podInfoOnMount`, service account tokens), and external-provisioner,
/// which leaves its identity in every PersistentVolume that it makes.
const KUBERNETES_PREFIXES: &[&str] = &["csi.storage.k8s.io/", "storage.kubernetes.io/"];

/// Keys of a secret of type `kubernetes.io/basic-auth`.
const USERNAME: &str = "username";
const PASSWORD: &str = "password";

/// Key of a secret of type `kubernetes.io/dockerconfigjson`.
const DOCKER_CONFIG: &str = ".dockerconfigjson";

/// The keys that a secret may have.
pub const SECRET_KEYS: &[&str] = &[DOCKER_CONFIG, USERNAME, PASSWORD];

/// Longest image reference: host and name of 255 bytes each, tag of 128, digest of 71, rounded up.
const MAX_IMAGE_BYTES: usize = 1024;

/// Most bytes of all attributes and their values (CSI spec v1.12, "Size Limits"), less what kubelet adds.
const MAX_ATTRIBUTES_BYTES: usize = 4096;

/// Longest size; 20 digits and a suffix.
const MAX_SIZE_BYTES: usize = 32;

/// Longest platform; `linux/ppc64le` is usual, variants and versions are a few bytes more.
const MAX_PLATFORM_BYTES: usize = 128;

/// Longest digest: `sha256:` and 64 digits; a longer one of another algorithm is not supported anyway.
const MAX_DIGEST_BYTES: usize = 256;

/// Most bytes of all secret values, as JSON has them: half of a message between the roles of a node, in which they
/// go on. Kubernetes takes secrets up to 1 MiB; who logs in to one registry has some hundred bytes.
const MAX_SECRETS_BYTES: usize = 64 << 10;

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
    /// Who says what a tag means; the registry if absent.
    pub pull_policy: Option<PullPolicy>,
    /// The directory of the image that is seen; all of it if absent.
    pub path: Option<SubPath>,
    /// Whether the registry is to be spoken to without TLS.
    pub insecure: bool,
    /// Whether the volume is to be written to.
    pub writable: bool,
    /// How many bytes may be written; as many as the node allows if absent.
    pub writable_size_bytes: Option<u64>,
    /// Whether the volume is part of a pod, and ends with it.
    is_ephemeral: bool,
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
        let mut pull_policy = None;
        let mut path = None;
        let (mut insecure, mut writable) = (false, false);
        let mut writable_size_bytes = None;
        check_size(volume_context)?;
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
                PULL_POLICY => {
                    let wanted = value.parse::<PullPolicy>();
                    pull_policy =
                        Some(wanted.map_err(|err| invalid(PULL_POLICY, err.to_string()))?);
                }
                PATH => path = Some(SubPath::parse(value)?),
                INSECURE => insecure = parse_bool(INSECURE, value)?,
                WRITABLE => writable = parse_bool(WRITABLE, value)?,
                WRITABLE_SIZE => {
                    let text = bounded(WRITABLE_SIZE, value, MAX_SIZE_BYTES)?;
                    let bytes = quantity::parse_bytes(&text).filter(|it| 0 < *it);
                    writable_size_bytes = Some(bytes.ok_or_else(|| {
                        invalid(
                            WRITABLE_SIZE,
                            format!("{text:?} is no size, such as 64Mi or 1G"),
                        )
                    })?);
                }
                key if is_kubernetes(key) => {}
                key => {
                    return Err(invalid(
                        "volumeAttributes",
                        format!(
                            "unknown attribute {:?}: the known ones are {}",
                            shown(key),
                            ATTRIBUTES.join(", ")
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
        if writable_size_bytes.is_some() && !writable {
            return Err(invalid(
                WRITABLE_SIZE,
                "says nothing without writable: \"true\"",
            ));
        }
        Ok(Self {
            image,
            platform,
            index_digest,
            prefetch,
            pull_policy,
            path,
            insecure,
            writable,
            writable_size_bytes,
            is_ephemeral: volume_context.get(EPHEMERAL).is_some_and(|it| it == "true"),
        })
    }

    /// What may be written over the image on a node that allows `max_bytes`, which a volume that is there
    /// already may exceed; `None` if the volume is read-only.
    ///
    /// # Errors
    /// [`MountError::Invalid`] if it cannot be written to on any node.
    pub fn written_over(&self, max_bytes: u64) -> Result<Option<Writable>, MountError> {
        if !self.writable {
            return Ok(None);
        }
        if !self.is_ephemeral {
            return Err(invalid(
                WRITABLE,
                "is for inline volumes of pods, because what is written ends with the pod",
            ));
        }
        Ok(Some(Writable {
            size_bytes: self.writable_size_bytes,
            max_bytes,
        }))
    }

    /// Checks that a volume with these attributes may outlive the pods that use it.
    ///
    /// # Errors
    /// [`MountError::Invalid`] if not.
    pub(super) fn check_persistent(&self) -> Result<(), MountError> {
        // Whatever nodes allow.
        self.written_over(u64::MAX).map(drop)
    }
}

/// Whether a key is Kubernetes' own, and says nothing to the driver.
pub(super) fn is_kubernetes(key: &str) -> bool {
    KUBERNETES_PREFIXES.iter().any(|it| key.starts_with(it))
}

/// Refuses more than the specification lets a map hold.
fn check_size(attributes: &BTreeMap<String, String>) -> Result<(), MountError> {
    let own = attributes.iter().filter(|(key, _)| !is_kubernetes(key));
    let n_bytes: usize = own.map(|(key, value)| key.len() + value.len()).sum();
    if MAX_ATTRIBUTES_BYTES < n_bytes {
        return Err(invalid(
            "volumeAttributes",
            format!("have {n_bytes} bytes in all, {MAX_ATTRIBUTES_BYTES} are allowed"),
        ));
    }
    Ok(())
}

fn parse_bool(field: &'static str, value: &str) -> Result<bool, MountError> {
    match value {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err(invalid(field, "must be \"true\" or \"false\"")),
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
    let encoded = serde_json::to_vec(&secrets.values().collect::<Vec<_>>()).unwrap_or_default();
    if MAX_SECRETS_BYTES < encoded.len() {
        return Err(invalid(
            "secrets",
            format!(
                "have {} bytes, {MAX_SECRETS_BYTES} are allowed: leave out the registries that the image does not come from",
                encoded.len()
            ),
        ));
    }
    for (key, value) in secrets {
        match key.as_str() {
            USERNAME => username = Some(value),
            PASSWORD => password = Some(value),
            DOCKER_CONFIG => docker_config = Some(value),
            key if is_kubernetes(key) => {}
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
        (None, None, Some(config)) => {
            Ok(PullCredentials::DockerConfig(Secret::new(config.clone())))
        }
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

/// What of a text that somebody made up is repeated in a message.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN_CHARS).collect()
}

pub(super) fn invalid(field: &'static str, reason: impl Into<String>) -> MountError {
    MountError::Invalid {
        field: field.into(),
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            ("pullPolicy", "Never"),
            ("path", "usr/share"),
            ("insecure", "true"),
            ("writable", "true"),
            ("writableSize", "64Mi"),
            ("csi.storage.k8s.io/ephemeral", "true"),
            ("csi.storage.k8s.io/pod.name", "web-0"),
            ("csi.storage.k8s.io/serviceAccount.tokens", "{}"),
            ("storage.kubernetes.io/csiProvisionerIdentity", "1-2-csi"),
        ]));
        let want = Attributes {
            image: "registry.example/app:1".to_owned(),
            platform: Some("linux/arm64".to_owned()),
            index_digest: Some(ManifestDigest::of(b"")),
            prefetch: Some(Prefetch::All),
            pull_policy: Some(PullPolicy::Never),
            path: Some(SubPath::parse("usr/share").unwrap()),
            insecure: true,
            writable: true,
            writable_size_bytes: Some(64 << 20),
            is_ephemeral: true,
        };
        assert_eq!(parsed.unwrap(), want);
        let parsed = Attributes::parse(&map(&[("image", "app")])).unwrap();
        assert_eq!((parsed.platform, parsed.index_digest), (None, None));
        assert_eq!(parsed.prefetch, None);
        assert_eq!((parsed.pull_policy, parsed.path), (None, None));
        assert!(!parsed.insecure && !parsed.writable && !parsed.is_ephemeral);
    }

    #[test]
    fn wrong_attributes_are_named() {
        let long = "a".repeat(1025);
        let many = "a".repeat(4096);
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
                &[("image", "a"), ("pullPolicy", "always")],
                "pullPolicy: must be Always, IfNotPresent or Never",
            ),
            (
                &[("image", "a"), ("path", "/usr")],
                "path: must be relative to the image's root and have neither \".\" nor \"..\", such as usr/share",
            ),
            (
                &[("image", "a"), ("insecure", "yes")],
                "insecure: must be \"true\" or \"false\"",
            ),
            (
                &[("image", "a"), ("writable", "1")],
                "writable: must be \"true\" or \"false\"",
            ),
            (
                &[
                    ("image", "a"),
                    ("writable", "true"),
                    ("writableSize", "1.5Gi"),
                ],
                "writableSize: \"1.5Gi\" is no size, such as 64Mi or 1G",
            ),
            (
                &[("image", "a"), ("writable", "true"), ("writableSize", "0")],
                "writableSize: \"0\" is no size, such as 64Mi or 1G",
            ),
            (
                &[("image", "a"), ("writableSize", "1")],
                "writableSize: says nothing without writable: \"true\"",
            ),
            (
                &[("image", "a"), (&many, "b")],
                "volumeAttributes: have 4103 bytes in all, 4096 are allowed",
            ),
            (
                &[("image", "a"), ("Image", "b")],
                "volumeAttributes: unknown attribute \"Image\": the known ones are image, platform, indexDigest, prefetch, pullPolicy, path, insecure, writable, writableSize",
            ),
            (
                &[("image", "a"), ("x\n", "b")],
                "volumeAttributes: unknown attribute \"x\\n\": the known ones are image, platform, indexDigest, prefetch, pullPolicy, path, insecure, writable, writableSize",
            ),
        ] {
            let err = Attributes::parse(&map(pairs)).unwrap_err();
            assert_eq!(err.to_string(), want);
        }
        let err = Attributes::parse(&map(&[(&long, "a")])).unwrap_err();
        assert!(err.to_string().len() < 300, "{err}");
    }

    #[test]
    fn only_volumes_of_a_pod_are_written_to_and_only_as_far_as_the_node_allows() {
        let inline = ("csi.storage.k8s.io/ephemeral", "true");
        let bytes = |pairs: &[(&str, &str)], max_bytes| {
            let all: Vec<_> = [&[("image", "a")], pairs].concat();
            let parsed = Attributes::parse(&map(&all)).unwrap();
            let writable = parsed.written_over(max_bytes);
            writable
                .and_then(|it| it.map(Writable::bytes).transpose())
                .map_err(|err| err.to_string())
        };
        assert_eq!(bytes(&[], 0), Ok(None));
        assert_eq!(bytes(&[("writable", "false"), inline], 5), Ok(None));
        assert_eq!(bytes(&[("writable", "true"), inline], 5), Ok(Some(5)));
        let four = [("writable", "true"), ("writableSize", "4"), inline];
        assert_eq!(bytes(&four, 5), Ok(Some(4)));
        assert_eq!(bytes(&four, 4), Ok(Some(4)));
        assert_eq!(
            bytes(&four, 3).unwrap_err(),
            "writableSize: is 4 bytes, this node allows 3 (node.max_writable_bytes)"
        );
        assert_eq!(
            bytes(&four, 0).unwrap_err(),
            "writable: is not allowed on this node: its operator sets node.max_writable_bytes"
        );
        // Whether it was allowed when it was made is for whoever knows if it is there.
        let all = [("image", "a"), four[0], four[1], inline];
        let parsed = Attributes::parse(&map(&all)).unwrap();
        let want = Writable {
            size_bytes: Some(4),
            max_bytes: 0,
        };
        assert_eq!(parsed.written_over(0).unwrap(), Some(want));
        for persistent in [
            &[("writable", "true")][..],
            &[
                ("writable", "true"),
                ("csi.storage.k8s.io/ephemeral", "false"),
            ],
        ] {
            assert_eq!(
                bytes(persistent, 5).unwrap_err(),
                "writable: is for inline volumes of pods, because what is written ends with the pod"
            );
        }
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
            PullCredentials::DockerConfig(Secret::new("{}".to_owned()))
        );
    }

    #[test]
    fn wrong_secrets_are_named_without_their_values() {
        let long = "hunter2".repeat(MAX_SECRETS_BYTES / 7 + 1);
        // Six bytes of a message each.
        let escaped = "\u{1}".repeat(MAX_SECRETS_BYTES / 6 + 1);
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
            (&[("password", &long)], "bytes, 65536 are allowed"),
            (&[("password", &escaped)], "bytes, 65536 are allowed"),
        ] {
            let err = credentials(&map(pairs)).unwrap_err();
            let debug = format!("{err:?} {err}");
            assert!(debug.contains(want), "{debug} lacks {want}");
            assert!(!debug.contains("hunter2"), "{debug}");
        }
    }
}
