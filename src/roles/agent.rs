//! The agent: owns network and cache, makes images ready for the node service, and chunks present
//! for the server.
//!
//! A thread per connection: there are three, and as many more as images are being prepared.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use tokio::{runtime::Handle, time::MissedTickBehavior};
use tracing::{debug, info, warn};

use super::protocol::{AgentReply, AgentRequest, ImageFile, MountKey, ReadyImage};
use crate::{
    digest::ManifestDigest,
    fair::Claimant,
    ipc::{Channel, Listener},
    layer::{
        images::ImageUse,
        store::{Layer, LayerStore},
    },
    mount::{ImageRequest, PrepareError, Progress},
    telemetry::error_chain,
    tier::{BoxFuture, PresentError, lent::LentChunk},
};

/// How often who waits for an image hears how far it is.
const PROGRESS: Duration = Duration::from_millis(500);

/// How long it takes until a mount is tried again whose image could not be opened; longer each time.
const ADOPT_RETRY: Duration = Duration::from_millis(500);
const ADOPT_RETRY_MOST: Duration = Duration::from_secs(30);

/// Stack of a connection's thread, which also runs the start of a preparation.
const STACK_BYTES: usize = 256 << 10;

/// How long to wait when no connection can be accepted: usually all file descriptors are in use.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// What keeps an image's layers and index in the cache, and its fetching ahead going: dropped, they may be
/// evicted, and it ends.
#[derive(Debug, Default)]
pub struct Held {
    /// The layers.
    pub layers: Vec<Arc<Layer>>,
    /// The file of its index.
    pub index: Option<File>,
    /// Says that the image is in use.
    pub image: Option<ImageUse>,
}

/// Opens images: the seam to registry and index.
pub trait Images: Send + Sync + fmt::Debug {
    /// Makes the image ready: see [`ImageMounter::prepare`](crate::mount::ImageMounter::prepare).
    ///
    /// # Errors
    /// Those of [`PrepareError`].
    fn prepare<'a>(
        &'a self,
        request: &'a ImageRequest,
        progress: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<(ReadyImage, Held), PrepareError>>;

    /// Opens the layers of an image that was made ready before, by this process or another one,
    /// and is mounted. Asks no registry, unless a layer is damaged.
    ///
    /// # Errors
    /// Those of [`PrepareError`].
    fn adopt<'a>(
        &'a self,
        manifest: ManifestDigest,
        request: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<Held, PrepareError>>;
}

/// What all connections share.
#[derive(Debug, Clone)]
pub struct Agent {
    images: Arc<dyn Images>,
    store: LayerStore,
    runtime: Handle,
    connections: Arc<Connections>,
}

/// The connections, to be closed in the end.
#[derive(Debug, Default)]
struct Connections {
    is_stopping: AtomicBool,
    /// std Mutex: held to push or to look.
    open: Mutex<Vec<Weak<Channel>>>,
}

/// The mounts of one connection, whose layers are kept.
type Adopted = Arc<Mutex<Adoptions>>;

/// What is held for mounts, and which adoption of one has the last word: they end in any order, and the
/// key of a mount that is gone is given to another one.
#[derive(Debug, Default)]
struct Adoptions {
    n_begun: u64,
    mounts: HashMap<MountKey, Place>,
}

/// What is held for a mount.
#[derive(Debug)]
struct Place {
    /// The last adoption that has nothing to say here any more.
    outdated: u64,
    /// The last one that was begun.
    newest: u64,
    held: Held,
}

impl Adoptions {
    /// Makes a place for what an adoption will hold, unless there is one, and gives the adoption its number.
    ///
    /// What is held of a mount that is adopted again, with other rights, is so until those have been
    /// found good.
    fn begin(&mut self, device: MountKey) -> u64 {
        let outdated = self.n_begun;
        self.n_begun += 1;
        let place = self.mounts.entry(device).or_insert_with(|| Place {
            outdated,
            newest: 0,
            held: Held::default(),
        });
        place.newest = self.n_begun;
        self.n_begun
    }

    /// Puts there what an adoption holds; returns what is not held any more: that of an older one, or its own if
    /// the mount was released since, or a newer one has ended already.
    fn end(&mut self, device: MountKey, number: u64, held: Held) -> Held {
        match self.mounts.get_mut(&device) {
            Some(place) if place.outdated < number => {
                place.outdated = number;
                std::mem::replace(&mut place.held, held)
            }
            Some(_) | None => held,
        }
    }

    /// Whether an adoption that failed is to be tried again: the mount is there, and no later one is under way.
    fn is_wanted(&self, device: MountKey, number: u64) -> bool {
        self.mounts
            .get(&device)
            .is_some_and(|it| it.newest == number)
    }

    fn release(&mut self, device: MountKey) -> Option<Held> {
        self.mounts.remove(&device).map(|it| it.held)
    }
}

impl Agent {
    /// Makes an agent that works on `runtime`.
    pub fn new(images: Arc<dyn Images>, store: LayerStore, runtime: Handle) -> Self {
        Self {
            images,
            store,
            runtime,
            connections: Arc::default(),
        }
    }

    /// Closes all connections: what was asked for and not answered is asked of the next agent. Call it
    /// before the store is shut down, whose last words are no answers.
    pub fn stop(&self) {
        self.connections.is_stopping.store(true, Ordering::SeqCst);
        let open = self.connections.open.lock();
        for channel in open.unwrap_or_else(PoisonError::into_inner).iter() {
            if let Some(channel) = channel.upgrade() {
                channel.close();
            }
        }
    }

    /// Answers all who connect, for ever.
    ///
    /// # Blocking
    /// For ever: give it a thread.
    pub fn serve(&self, listener: &Listener) {
        loop {
            let channel = match listener.accept() {
                Ok(channel) => Arc::new(channel),
                Err(err) => {
                    warn!(error = %err, "accepting a connection failed");
                    thread::sleep(ACCEPT_BACKOFF);
                    continue;
                }
            };
            {
                let open = self.connections.open.lock();
                let mut open = open.unwrap_or_else(PoisonError::into_inner);
                open.retain(|it| 0 < it.strong_count());
                open.push(Arc::downgrade(&channel));
            }
            let agent = self.clone();
            let started = thread::Builder::new()
                .name("clip-agent".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || agent.converse(&channel));
            if let Err(err) = started {
                // The connection is closed: who made it tries again.
                warn!(error = %err, "no thread for a connection");
            }
        }
    }

    fn converse(&self, channel: &Arc<Channel>) {
        let adopted = Adopted::default();
        // Kept until the connection ends: nothing of it is evicted meanwhile.
        let mut prepared = Vec::new();
        loop {
            match channel.receive() {
                Ok(Some((AgentRequest::Prepare(request), _))) => {
                    match self.prepare(channel, request) {
                        Some(held) => prepared.push(held),
                        None => return,
                    }
                }
                Ok(Some((AgentRequest::Files, _))) => {
                    let given = match prepared.last() {
                        Some(held) => give_files(channel, held),
                        None => Err("no image was made ready".to_owned()),
                    };
                    // If nobody listens, nobody mounts it.
                    let _ = channel.send(&AgentReply::FilesEnd(given), None);
                }
                Ok(Some((request, _))) => self.obey(request, channel, &adopted),
                Ok(None) => return debug!("a connection ended"),
                Err(err) => return warn!(error = %err, "a connection broke"),
            }
        }
    }

    /// Makes the image ready, and tells how far it is and how it ended. `None` if nobody listens.
    fn prepare(&self, channel: &Arc<Channel>, request: ImageRequest) -> Option<Held> {
        let (images, listener) = (Arc::clone(&self.images), Arc::clone(channel));
        let (sender, outcome) = mpsc::channel();
        self.runtime.spawn(async move {
            let progress = Arc::new(Progress::default());
            let mut work = images.prepare(&request, &progress);
            let mut ticks = tokio::time::interval(PROGRESS);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            // The first one is at once.
            ticks.tick().await;
            loop {
                tokio::select! {
                    // It is waited for below.
                    outcome = &mut work => return drop(sender.send(outcome)),
                    _ = ticks.tick() => {
                        // If nobody listens, the work is for who asks next.
                        let _ = listener.send(&AgentReply::Progress(progress.to_string()), None);
                    }
                }
            }
        });
        // The process ends if the work does not answer: its task was dropped.
        let (held, answer) = match outcome.recv().ok()? {
            Ok((ready, held)) => (held, Ok(ready)),
            // One that is too long to be sent would be an agent that is away, which is asked again.
            Err(err) => (Held::default(), Err(err.shortened())),
        };
        channel.send(&AgentReply::Prepared(answer), None).ok()?;
        Some(held)
    }

    fn obey(&self, request: AgentRequest, channel: &Arc<Channel>, adopted: &Adopted) {
        match request {
            AgentRequest::Prepare(_) | AgentRequest::Files => {}
            AgentRequest::Adopt {
                device,
                manifest,
                request,
            } => {
                let (images, adopted) = (Arc::clone(&self.images), Arc::clone(adopted));
                // Known from now on, so that a release is not overtaken.
                let number = lock(&adopted).begin(device);
                self.runtime.spawn(async move {
                    let mut pause = ADOPT_RETRY;
                    loop {
                        let err = match images.adopt(manifest, &request).await {
                            Ok(held) => {
                                info!(image.manifest = %manifest, layers = held.layers.len(), "ready for the chunks of a mount");
                                let outdated = lock(&adopted).end(device, number, held);
                                return drop(outdated);
                            }
                            Err(err) => err,
                        };
                        warn!(image.manifest = %manifest, error = error_chain(&err),
                            "what a mount lacks on disk cannot be fetched");
                        if !err.is_transient() {
                            return;
                        }
                        tokio::time::sleep(pause).await;
                        pause = (2 * pause).min(ADOPT_RETRY_MOST);
                        if !lock(&adopted).is_wanted(device, number) {
                            return;
                        }
                    }
                });
            }
            AgentRequest::Release { device } => {
                let held = lock(adopted).release(device);
                drop(held);
            }
            AgentRequest::Present {
                ticket,
                layer,
                chunks,
                mount,
            } => {
                let (channel, connections) = (Arc::clone(channel), Arc::clone(&self.connections));
                let done = move |outcome: Result<(), PresentError>| {
                    if connections.is_stopping.load(Ordering::SeqCst) {
                        return;
                    }
                    let outcome = outcome.map_err(PresentError::shortened);
                    let reply = AgentReply::Present { ticket, outcome };
                    answer(&channel, &reply, None);
                };
                let done = Box::new(done);
                self.store
                    .make_present_for(claimant(mount), layer, chunks, done);
            }
            AgentRequest::Read { layer, extents } => self.store.note_extents(layer, &extents),
            AgentRequest::Lend {
                ticket,
                wanted,
                mount,
            } => {
                let (channel, connections) = (Arc::clone(channel), Arc::clone(&self.connections));
                let done = move |outcome: Result<LentChunk, PresentError>| {
                    if connections.is_stopping.load(Ordering::SeqCst) {
                        return;
                    }
                    let (lent, outcome) = match outcome {
                        Ok(lent) => (Some(lent), Ok(())),
                        Err(err) => (None, Err(err.shortened())),
                    };
                    let fd = lent.as_ref().map(AsFd::as_fd);
                    answer(&channel, &AgentReply::Lent { ticket, outcome }, fd);
                };
                self.store.lend_to(claimant(mount), wanted, Box::new(done));
            }
        }
    }
}

/// Gives the files of an image, each layer locked until whoever mounts it has closed them.
fn give_files(channel: &Channel, held: &Held) -> Result<(), String> {
    let give = |what, file: &File| {
        let given = channel.send(&AgentReply::File(what), Some(file.as_fd()));
        given.map_err(|err| err.to_string())
    };
    let index = held.index.as_ref().ok_or("the image has no index")?;
    give(ImageFile::Index, index)?;
    for layer in &held.layers {
        let whole = layer.give_whole().map_err(|err| err.to_string())?;
        let whole = whole.ok_or("a layer is not whole any more")?;
        give(ImageFile::Data, &whole.data)?;
        give(ImageFile::Mounted, &whole.mounted)?;
    }
    Ok(())
}

/// Whose turn it takes; mounts of a server that does not tell them apart share one.
/// Answers the server. One that cannot be told asks anew, by another connection, and so does its successor if it
/// is gone.
fn answer(channel: &Channel, reply: &AgentReply, fd: Option<BorrowedFd<'_>>) {
    if channel.send(reply, fd).is_err() {
        channel.close();
    }
}

fn claimant(mount: Option<MountKey>) -> Claimant {
    let (major, minor) = mount.unwrap_or_default();
    Claimant::Mount(u64::from(major) << 32 | u64::from(minor))
}

/// std Mutex: held for a map operation, never across an await.
fn lock(adopted: &Adopted) -> std::sync::MutexGuard<'_, Adoptions> {
    adopted.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
