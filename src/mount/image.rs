//! The seam to who knows images: what is asked of [`ImageMounter`], and what it gives.

use std::{
    any::Any,
    fmt, io,
    path::Path,
    str::FromStr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Device, PrepareError, View, lock};
use crate::{
    digest::ManifestDigest,
    secret::{Secret, exposed},
    tier::{BoxFuture, Prefetch},
};

/// Makes images ready and mounts them.
pub trait ImageMounter: Send + Sync + fmt::Debug {
    /// Resolves the reference with the request's credentials, and gets or builds the index.
    ///
    /// The registry is asked each time, whatever is cached: this is the check of the right to
    /// pull. `progress` is told how far the work is, for whoever runs out of patience.
    ///
    /// # Errors
    /// Those of [`PrepareError`], after the retries; nothing of the image is mounted then.
    fn prepare<'a>(
        &'a self,
        request: &'a ImageRequest,
        progress: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<PreparedImage, PrepareError>>;

    /// Mounts the prepared image read-only at `dir`, with [`super::SOURCE_NAME`] as its `fsname`.
    ///
    /// # Errors
    /// Those of the system; then nothing is mounted.
    ///
    /// # Blocking
    /// Runs on the blocking pool, inside the runtime's context.
    fn mount(&self, image: &PreparedImage, dir: &Path) -> io::Result<Box<dyn SourceMount>>;

    /// Mounts a prepared image that is whole on disk at `dir`, read-only, with a file system of the kernel's
    /// own ([`erofs`](crate::erofs)), so that it is served as long as it is there.
    ///
    /// # Errors
    /// `Unsupported` if there are no such mounts here, or those of the system; then nothing is mounted.
    ///
    /// # Blocking
    /// Runs on the blocking pool. Takes as long as the image has inodes.
    fn mount_in_kernel(&self, image: &PreparedImage, dir: &Path) -> io::Result<()>;

    /// Has what is read of a mounted image from now on be read with the rights of `request`: those it
    /// was mounted with may end. Nothing is mounted, and what fails changes nothing.
    ///
    /// # Errors
    /// Those of [`PrepareError`].
    fn renew<'a>(
        &'a self,
        manifest: ManifestDigest,
        request: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<(), PrepareError>>;

    /// Has what a mount lacks be fetched with the rights of another volume that uses it, too: those were found good
    /// when `image` was prepared, and whose it was may be gone.
    ///
    /// # Blocking
    /// Waits for the socket.
    fn share(&self, image: &PreparedImage);

    /// The source mounts that outlived the process that mounted them, because another one serves
    /// them. Asked once, at start.
    ///
    /// # Blocking
    /// Waits for who serves them, for a bounded time.
    fn survivors(&self) -> Vec<Survivor>;
}

/// Which images the kernel serves by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelMounts {
    /// None.
    Never,
    /// Those of which all is on disk when they are mounted, if the kernel is known to be sound.
    Whole,
    /// The same, and whoever says so knows of the kernel that it is.
    WholeOnAnyKernel,
}

/// A source mount that outlived the process that mounted it.
#[derive(Debug)]
pub struct Survivor {
    /// The image.
    pub manifest: ManifestDigest,
    /// Its file system, by which mountinfo shows where it is mounted.
    pub device: Device,
    /// What keeps it.
    pub session: Box<dyn SourceMount>,
}

/// A source mount that is being served.
///
/// Dropped, it is given up: where this process serves it, it is unmounted; where another one does,
/// it goes on, for a successor of this process.
pub trait SourceMount: Send + fmt::Debug {
    /// Whether it is still served: somebody may have aborted the connection behind our back.
    fn is_alive(&self) -> bool;

    /// Unmounts it lazily from `dir`, where it is, and stops serving it when its last user is gone.
    ///
    /// # Errors
    /// Those of the system. The table detaches what is left.
    ///
    /// # Blocking
    /// Runs on the blocking pool.
    fn unmount(self: Box<Self>, dir: &Path) -> io::Result<()>;
}

/// Says which image is wanted, and with which rights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRequest {
    /// The reference as the user wrote it.
    pub image: String,
    /// `os/arch[/variant]`; the node's own if absent.
    pub platform: Option<String>,
    /// The index to use of those that were pushed beside the image; any that is trusted if absent.
    ///
    /// Left out if absent: a process of another release may read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index_digest: Option<ManifestDigest>,
    /// What is fetched of it ahead; what is configured if absent.
    ///
    /// Left out if absent: a process of another release may read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefetch: Option<Prefetch>,
    /// Whether the registry says what a tag means; [`PullPolicy::Always`] if absent.
    ///
    /// Left out if absent: a process of another release may read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pull_policy: Option<PullPolicy>,
    /// Whether the registry is to be spoken to without TLS, which the configuration must allow.
    ///
    /// Left out if false: a process of another release may read it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub insecure: bool,
    /// How to authenticate to the registry.
    pub credentials: PullCredentials,
    /// Which pod it is for, if that is known.
    ///
    /// Left out if absent: a process of another release may read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Box<PodInfo>>,
}

/// A pod, as kubelet says (`podInfoOnMount`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInfo {
    /// Its namespace.
    pub namespace: String,
    /// Its name in there.
    pub name: String,
    /// What no other pod has, of the same name or not.
    pub uid: String,
    /// The service account that it runs as.
    pub service_account: String,
    /// Tokens of that, as kubelet gives them; empty if it gives none.
    #[serde(with = "exposed")]
    pub tokens: Secret<String>,
}

/// Whether the registry says what a tag means, or the node, where the image was mounted before.
///
/// As kubelet has it for containers, `imagePullPolicy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullPolicy {
    /// The registry.
    Always,
    /// The node, if it knows the image.
    IfNotPresent,
    /// The node, and an image that it does not know is refused.
    Never,
}

impl PullPolicy {
    /// Its name in volume attributes.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// Says that a text is no [`PullPolicy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be Always, IfNotPresent or Never")]
pub struct NoPullPolicy;

impl FromStr for PullPolicy {
    type Err = NoPullPolicy;

    fn from_str(text: &str) -> Result<Self, NoPullPolicy> {
        let all = [Self::Always, Self::IfNotPresent, Self::Never];
        all.into_iter()
            .find(|it| it.label() == text)
            .ok_or(NoPullPolicy)
    }
}

/// How to authenticate to a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullCredentials {
    /// With the node's own credentials, or anonymously where it has none.
    None,
    /// With a name and a password.
    Basic {
        /// The name.
        username: String,
        /// The password.
        #[serde(with = "exposed")]
        password: Secret<String>,
    },
    /// With what a docker `config.json` says for the image.
    DockerConfig(#[serde(with = "exposed")] Secret<String>),
}

impl ImageRequest {
    /// Names what is mounted: equal for two requests that want the same, whoever asks.
    ///
    /// Credentials are no part of it, since they may be renewed while a volume is published, nor is
    /// how it is fetched, which changes nothing of what is seen.
    pub(super) fn attributes(&self, view: &View) -> [u8; 32] {
        let mut hash = Sha256::new();
        field(&mut hash, self.image.as_bytes());
        // No platform is the empty one: what cannot be written is no third case.
        field(&mut hash, self.platform.as_deref().unwrap_or("").as_bytes());
        // Records of releases that knew no such attribute stay right.
        if let Some(index_digest) = &self.index_digest {
            field(&mut hash, index_digest.as_bytes());
        }
        view.hash(&mut hash);
        hash.finalize().into()
    }

    /// Names the work of preparing: equal for two requests that may share it.
    ///
    /// Credentials are part of it: work that was done with one's rights is nothing that another
    /// may have.
    pub(super) fn work(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.attributes(&View::default()));
        // Whoever asks for an image that is mounted already may want more of it.
        field(
            &mut hash,
            self.prefetch.map_or("", Prefetch::label).as_bytes(),
        );
        let policy = self.pull_policy.unwrap_or(PullPolicy::Always);
        field(&mut hash, policy.label().as_bytes());
        field(&mut hash, &[u8::from(self.insecure)]);
        match &self.credentials {
            PullCredentials::None => field(&mut hash, b"none"),
            PullCredentials::Basic { username, password } => {
                field(&mut hash, b"basic");
                field(&mut hash, username.as_bytes());
                field(&mut hash, password.expose().as_bytes());
            }
            PullCredentials::DockerConfig(config) => {
                field(&mut hash, b"docker");
                field(&mut hash, config.expose().as_bytes());
            }
        }
        // Its rights are those of its service account, whichever pod it is.
        if let Some(pod) = &self.pod {
            field(&mut hash, pod.namespace.as_bytes());
            field(&mut hash, pod.service_account.as_bytes());
            field(&mut hash, pod.tokens.expose().as_bytes());
        }
        hash.finalize().into()
    }
}

/// Hashes a field with its length, so that no two sequences of fields hash the same bytes.
pub(super) fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

/// How much an image holds, as its index says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// Of all files.
    pub bytes: u64,
    /// Files, directories and links.
    pub inodes: u64,
}

/// An image that can be mounted.
#[derive(Clone)]
pub struct PreparedImage {
    /// The manifest that the reference meant when it was resolved.
    pub manifest: ManifestDigest,
    /// How much it holds.
    pub usage: Usage,
    /// Whether all of it is on disk, so that the kernel can be tried alone.
    pub is_whole: bool,
    /// What the [`ImageMounter`] needs to mount it; opaque here.
    pub token: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for PreparedImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreparedImage")
            .field("manifest", &self.manifest)
            .finish_non_exhaustive()
    }
}

/// How far the preparation of an image has come. Prints as a phrase for a person.
#[derive(Debug, Default)]
pub struct Progress {
    /// std Mutex: held to copy a short text.
    phase: Mutex<String>,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Progress {
    /// Says what is being done now.
    pub fn set_phase(&self, phase: impl Into<String>) {
        *lock(&self.phase) = phase.into();
    }

    /// Says how many bytes there are to do.
    pub fn set_total(&self, bytes: u64) {
        self.total_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Says that so many bytes more are done.
    pub fn add_done(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MEGABYTE: u64 = 1_000_000;
        let phase = lock(&self.phase).clone();
        f.write_str(if phase.is_empty() { "starting" } else { &phase })?;
        let total = self.total_bytes.load(Ordering::Relaxed);
        // A layer that came wrong is read twice.
        let done = self.done_bytes.load(Ordering::Relaxed).min(total);
        if total < MEGABYTE {
            return Ok(());
        }
        write!(f, ", {} of {} MB", done / MEGABYTE, total / MEGABYTE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(image: &str, platform: Option<&str>, credentials: PullCredentials) -> ImageRequest {
        ImageRequest {
            image: image.to_owned(),
            platform: platform.map(str::to_owned),
            index_digest: None,
            prefetch: None,
            pull_policy: None,
            insecure: false,
            credentials,
            pod: None,
        }
    }

    fn of_pod(namespace: &str, service_account: &str, tokens: &str) -> ImageRequest {
        ImageRequest {
            pod: Some(Box::new(PodInfo {
                namespace: namespace.to_owned(),
                name: "web-0".to_owned(),
                uid: "1".to_owned(),
                service_account: service_account.to_owned(),
                tokens: Secret::new(tokens.to_owned()),
            })),
            ..request("a", None, PullCredentials::None)
        }
    }

    fn pinned(image: &str) -> ImageRequest {
        ImageRequest {
            index_digest: Some(ManifestDigest::of(b"index")),
            ..request(image, None, PullCredentials::None)
        }
    }

    fn ahead(image: &str, prefetch: Prefetch) -> ImageRequest {
        ImageRequest {
            prefetch: Some(prefetch),
            ..request(image, None, PullCredentials::None)
        }
    }

    fn insecure(image: &str) -> ImageRequest {
        ImageRequest {
            insecure: true,
            ..request(image, None, PullCredentials::None)
        }
    }

    fn never(image: &str) -> ImageRequest {
        ImageRequest {
            pull_policy: Some(PullPolicy::Never),
            ..request(image, None, PullCredentials::None)
        }
    }

    fn basic(username: &str, password: &str) -> PullCredentials {
        PullCredentials::Basic {
            username: username.to_owned(),
            password: Secret::new(password.to_owned()),
        }
    }

    #[test]
    fn work_is_shared_only_with_the_same_rights() {
        let requests = [
            request("a", None, PullCredentials::None),
            request("a", Some("linux/arm64"), PullCredentials::None),
            request("b", None, PullCredentials::None),
            pinned("a"),
            ahead("a", Prefetch::None),
            ahead("a", Prefetch::All),
            insecure("a"),
            never("a"),
            request("a", None, basic("u", "p")),
            request("a", None, basic("up", "")),
            request("a", None, basic("u", "q")),
            request(
                "a",
                None,
                PullCredentials::DockerConfig(Secret::new("{}".to_owned())),
            ),
            of_pod("n", "s", ""),
            of_pod("m", "s", ""),
            of_pod("n", "t", ""),
            of_pod("n", "s", "{}"),
        ];
        for (at, one) in requests.iter().enumerate() {
            for (other_at, other) in requests.iter().enumerate() {
                assert_eq!(
                    one.work() == other.work(),
                    at == other_at,
                    "{at} {other_at}"
                );
            }
        }
        // Pods of one service account share it.
        let mut other = of_pod("n", "s", "");
        other.pod.as_mut().unwrap().uid = "2".to_owned();
        assert_eq!(other.work(), of_pod("n", "s", "").work());
        // The same volume, whatever is fetched ahead, and whoever asks.
        let attributes = |at: usize| requests[at].attributes(&View::default());
        for same in 4..9 {
            assert_eq!(attributes(0), attributes(same), "{same}");
        }
        assert_ne!(attributes(0), attributes(1));
        assert_ne!(attributes(0), attributes(3));
    }

    #[test]
    fn a_release_that_knows_less_reads_requests_and_writes_them() {
        let plain = request("a", None, PullCredentials::None);
        let json = r#"{"image":"a","platform":null,"credentials":"None"}"#;
        assert_eq!(serde_json::to_string(&plain).unwrap(), json);
        assert_eq!(serde_json::from_str::<ImageRequest>(json).unwrap(), plain);
        for more in [
            pinned("a"),
            ahead("a", Prefetch::Recorded),
            insecure("a"),
            never("a"),
            of_pod("n", "s", "{}"),
        ] {
            let json = serde_json::to_string(&more).unwrap();
            assert_eq!(serde_json::from_str::<ImageRequest>(&json).unwrap(), more);
        }
    }

    #[test]
    fn progress_reads_as_a_phrase() {
        let progress = Progress::default();
        assert_eq!(progress.to_string(), "starting");
        progress.set_phase("streaming layer 2 of 5");
        assert_eq!(progress.to_string(), "streaming layer 2 of 5");
        progress.set_total(150_000_000);
        progress.add_done(12_345_678);
        assert_eq!(progress.to_string(), "streaming layer 2 of 5, 12 of 150 MB");
        progress.add_done(150_000_000);
        assert_eq!(
            progress.to_string(),
            "streaming layer 2 of 5, 150 of 150 MB"
        );
    }
}
