//! The node service's view of images: the agent prepares them, the server serves them.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tokio::{sync::oneshot, time::sleep};
use tracing::info;

use super::{
    escrow::Escrow,
    protocol::{AgentReply, AgentRequest, ReadyImage},
    whole,
};
use crate::{
    digest::ManifestDigest,
    erofs, failpoint,
    ipc::{Channel, RunDir},
    mount::{
        ImageMounter, ImageRequest, KernelMounts, PrepareError, PreparedImage, Progress,
        SourceMount, Survivor,
    },
    tier::BoxFuture,
};

/// How long a preparation waits for an agent that is being restarted.
const AGENT_PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked for.
const RECONNECT: Duration = Duration::from_millis(100);

/// Stack of a thread that listens to the agent.
const STACK_BYTES: usize = 128 << 10;

/// Prepares images through the agent and mounts them for the server.
#[derive(Debug)]
pub struct NodeMounter {
    agent: PathBuf,
    escrow: Arc<Escrow>,
    read_ahead_kib: u32,
    /// Whether images that are whole are mounted in the kernel, as far as that is known to be possible.
    mounts_in_kernel: AtomicBool,
}

/// What a mount needs of a preparation.
#[derive(Debug)]
struct Prepared {
    request: ImageRequest,
    /// To the agent: open for as long as the layers are to be kept.
    lease: Channel,
}

impl NodeMounter {
    /// Makes a mounter that meets the others in `run`.
    pub fn new(
        run: &RunDir,
        escrow: Arc<Escrow>,
        read_ahead_kib: u32,
        kernel_mounts: KernelMounts,
    ) -> Self {
        let refused = match kernel_mounts {
            KernelMounts::Never => Some("they are switched off".to_owned()),
            KernelMounts::Whole => erofs::unavailable(false),
            KernelMounts::WholeOnAnyKernel => erofs::unavailable(true),
        };
        if let Some(reason) = &refused {
            info!(reason, "no image is mounted in the kernel");
        }
        Self {
            agent: run.agent(),
            escrow,
            read_ahead_kib,
            mounts_in_kernel: AtomicBool::new(refused.is_none()),
        }
    }

    fn mounts_in_kernel(&self) -> bool {
        self.mounts_in_kernel.load(Ordering::Relaxed)
    }

    async fn ask(
        &self,
        request: &ImageRequest,
        progress: &Arc<Progress>,
    ) -> Result<PreparedImage, PrepareError> {
        let mut gone_since = None;
        loop {
            let err = match self.ask_once(request, progress).await {
                Ok((ready, lease)) => {
                    failpoint::reached("node:prepared");
                    let ready = ready?;
                    return Ok(PreparedImage {
                        manifest: ready.manifest,
                        usage: ready.usage,
                        is_whole: ready.is_whole && self.mounts_in_kernel(),
                        token: Arc::new(Prepared {
                            request: request.clone(),
                            lease,
                        }),
                    });
                }
                Err(err) => err,
            };
            let since = *gone_since.get_or_insert_with(Instant::now);
            if AGENT_PATIENCE < since.elapsed() || err.kind() == io::ErrorKind::ArgumentListTooLong
            {
                return Err(PrepareError::Away {
                    reason: format!(
                        "no agent at {}: {err}: it is asked again; is clip-csi agent running?",
                        self.agent.display()
                    ),
                });
            }
            progress.set_phase("waiting for clip-csi agent, which is being started");
            sleep(RECONNECT).await;
        }
    }

    /// Asks a living agent, on a thread of its own. The outer error is that there is none.
    async fn ask_once(
        &self,
        request: &ImageRequest,
        progress: &Arc<Progress>,
    ) -> io::Result<(Result<ReadyImage, PrepareError>, Channel)> {
        let (sender, answer) = oneshot::channel();
        let (agent, request) = (self.agent.clone(), request.clone());
        let progress = Arc::clone(progress);
        thread::Builder::new()
            .name("clip-prepare".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                // If nobody listens any more, the agent's work is for who asks next.
                let _ = sender.send(converse(&agent, request, &progress));
            })?;
        answer.await.map_err(io::Error::other)?
    }
}

/// Asks the agent for the image, and listens until it is ready, or is not.
fn converse(
    agent: &Path,
    request: ImageRequest,
    progress: &Progress,
) -> io::Result<(Result<ReadyImage, PrepareError>, Channel)> {
    let channel = Channel::connect(agent)?;
    channel.send(&AgentRequest::Prepare(request), None)?;
    loop {
        match channel.receive()? {
            Some((AgentReply::Progress(phrase), _)) => progress.set_phase(phrase),
            Some((AgentReply::Prepared(outcome), _)) => return Ok((outcome, channel)),
            Some(_) => {}
            None => return Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

/// What [`NodeMounter`] has prepared.
fn prepared(image: &PreparedImage) -> io::Result<&Prepared> {
    let prepared = image.token.downcast_ref();
    prepared.ok_or_else(|| io::Error::other("the image was prepared by somebody else"))
}

impl ImageMounter for NodeMounter {
    fn prepare<'a>(
        &'a self,
        request: &'a ImageRequest,
        progress: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<PreparedImage, PrepareError>> {
        Box::pin(self.ask(request, progress))
    }

    fn mount(&self, image: &PreparedImage, dir: &Path) -> io::Result<Box<dyn SourceMount>> {
        let (request, ahead) = (&prepared(image)?.request, self.read_ahead_kib);
        let mount = self.escrow.mount(image.manifest, request, dir, ahead)?;
        Ok(Box::new(mount))
    }

    fn mount_in_kernel(&self, image: &PreparedImage, dir: &Path) -> io::Result<()> {
        let mounted = whole::mount(&prepared(image)?.lease, dir);
        if let Err(err) = &mounted
            && err.kind() == io::ErrorKind::Unsupported
        {
            self.mounts_in_kernel.store(false, Ordering::Relaxed);
            info!(reason = %err, "no image is mounted in the kernel from now on");
        }
        mounted
    }

    fn renew<'a>(
        &'a self,
        manifest: ManifestDigest,
        request: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<(), PrepareError>> {
        let (escrow, request) = (Arc::clone(&self.escrow), request.clone());
        Box::pin(async move {
            let told = tokio::task::spawn_blocking(move || escrow.renew(manifest, &request)).await;
            let told = told.map_err(io::Error::other).and_then(|it| it);
            told.map_err(|err| PrepareError::Away {
                reason: format!("clip-csi serve was not told of renewed credentials: {err}"),
            })
        })
    }

    fn share(&self, image: &PreparedImage) {
        let shared = prepared(image).and_then(|it| self.escrow.renew(image.manifest, &it.request));
        if let Err(err) = shared {
            // Those of the volumes before hold, and the next server is told.
            info!(image.manifest = %image.manifest, error = %err, "clip-csi serve was not told of another volume's credentials");
        }
    }

    fn survivors(&self) -> Vec<Survivor> {
        self.escrow.survivors()
    }
}
