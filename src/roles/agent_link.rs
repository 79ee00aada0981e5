//! The server's side of its connection to the agent: asks for chunks, and never lets a reader fail
//! because the agent is restarted.
//!
//! What was asked for and not answered is asked again at each new connection, until it is too late
//! for a reader. No FUSE thread sends or waits: they leave what they want, and one thread sends it.

use std::{
    collections::HashMap,
    io,
    ops::Range,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::protocol::{AgentReply, AgentRequest, MountKey};
use crate::{
    digest::{DiffId, ManifestDigest},
    ipc::Channel,
    layer::reader::LayerReader,
    mount::ImageRequest,
    tier::{Chunk, LendCallback, MakePresent, PresentCallback, PresentError, lent::LentChunk},
};

/// How long a reader waits for an agent that is away or does not know the layer: a restart
/// takes seconds, an upgrade with a new image to pull minutes.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often the agent is looked for while it is away.
const RECONNECT: Duration = Duration::from_millis(20);

/// How long a layer that the agent does not know yet is not asked for again.
const UNKNOWN_RETRY: Duration = Duration::from_millis(100);

/// How often the agent is told what was read from the disk: what was not for longest is evicted first.
///
/// Often enough for an order, and one small message for each layer that is read.
const READS: Duration = Duration::from_secs(5);

/// Ranges of extents in one such message, at most: it must not become too long for the socket.
const MAX_RANGES: usize = 1000;

/// Stack of the two threads.
const STACK_BYTES: usize = 128 << 10;

/// The connection to the agent. Lives as long as the process.
#[derive(Debug)]
pub(super) struct AgentLink {
    state: Mutex<State>,
    outbox: Mutex<mpsc::Sender<Outgoing>>,
    /// The layers that are being served.
    ///
    /// std Mutex: held to look or to add.
    layers: Mutex<Vec<Weak<LayerReader>>>,
}

#[derive(Debug, Default)]
struct State {
    /// The connection, while there is one.
    channel: Option<Arc<Channel>>,
    mounts: HashMap<MountKey, (ManifestDigest, ImageRequest)>,
    pending: HashMap<u64, Pending>,
    last_ticket: u64,
}

#[derive(Debug)]
struct Pending {
    since: Instant,
    agent: Agent,
    mount: MountKey,
    wanted: Wanted,
}

/// What the agent makes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Agent {
    /// There was none to ask since then.
    Away(Instant),
    /// It was told, and has bounds of its own for how long work may take that goes on.
    AtWork,
    /// It does not know the layer since then.
    Ignorant(Instant),
}

impl Pending {
    /// Since when nobody does anything for it.
    fn idle_since(&self) -> Option<Instant> {
        match self.agent {
            Agent::Away(since) | Agent::Ignorant(since) => Some(since),
            Agent::AtWork => None,
        }
    }
}

/// The agent, as the readers of one mount see it.
#[derive(Debug)]
struct OfMount {
    link: Arc<AgentLink>,
    mount: MountKey,
}

/// What is asked of the agent, and who is told.
enum Wanted {
    Present {
        layer: DiffId,
        chunks: Range<u32>,
        done: PresentCallback,
    },
    Lent {
        chunk: Chunk,
        done: LendCallback,
    },
}

impl Wanted {
    fn layer(&self) -> DiffId {
        match self {
            Self::Present { layer, .. } => *layer,
            Self::Lent { chunk, .. } => chunk.layer,
        }
    }

    fn request(&self, ticket: u64, mount: MountKey) -> AgentRequest {
        let mount = Some(mount);
        match self {
            Self::Present { layer, chunks, .. } => AgentRequest::Present {
                ticket,
                layer: *layer,
                chunks: chunks.clone(),
                mount,
            },
            Self::Lent { chunk, .. } => AgentRequest::Lend {
                ticket,
                wanted: *chunk,
                mount,
            },
        }
    }

    /// Tells who waits how it ended; `fd` is what came with the answer.
    fn answer(self, outcome: Result<(), PresentError>, fd: Option<OwnedFd>) {
        match self {
            Self::Present { done, .. } => done(outcome),
            Self::Lent { chunk, done } => done(outcome.and_then(|()| accept(chunk, fd))),
        }
    }
}

impl std::fmt::Debug for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.request(0, (0, 0)).fmt(f)
    }
}

/// Takes what the agent lends, if it is that.
fn accept(chunk: Chunk, fd: Option<OwnedFd>) -> Result<LentChunk, PresentError> {
    let Chunk {
        layer,
        number,
        bytes,
    } = chunk;
    let refused = |reason: String| PresentError::Refused {
        layer,
        reason: format!("what the agent lends as chunk {number} is none: {reason}"),
    };
    let fd = fd.ok_or_else(|| refused("no descriptor came".to_owned()))?;
    LentChunk::accept(layer, number, bytes, fd).map_err(|err| refused(err.to_string()))
}

/// What the sending thread is told.
#[derive(Debug)]
enum Outgoing {
    Adopt(MountKey),
    Release(MountKey),
    /// What was asked for with this ticket.
    Present(u64),
    /// Not before this.
    PresentLater(u64, Instant),
}

impl AgentLink {
    /// Starts to connect to the agent at `path`, for ever.
    ///
    /// # Errors
    /// If the system gives no threads.
    pub(super) fn start(path: PathBuf) -> io::Result<Arc<Self>> {
        let (outbox, outgoing) = mpsc::channel();
        let link = Arc::new(Self {
            state: Mutex::default(),
            outbox: Mutex::new(outbox),
            layers: Mutex::default(),
        });
        let named = |name: &str| {
            thread::Builder::new()
                .name(name.to_owned())
                .stack_size(STACK_BYTES)
        };
        let receiving = Arc::clone(&link);
        named("clip-agent-in").spawn(move || receiving.receive_for_ever(path))?;
        let sending = Arc::clone(&link);
        named("clip-agent-out").spawn(move || sending.send_for_ever(outgoing))?;
        Ok(link)
    }

    /// Gives the agent to the readers of one mount, whose turns are their own there.
    pub(super) fn of_mount(self: &Arc<Self>, mount: MountKey) -> Arc<dyn MakePresent> {
        let link = Arc::clone(self);
        Arc::new(OfMount { link, mount })
    }

    /// Has the agent be ready for the mount's layers, now and after each of its restarts.
    pub(super) fn adopt(&self, device: MountKey, manifest: ManifestDigest, request: ImageRequest) {
        let mut state = self.state();
        state.mounts.insert(device, (manifest, request));
        self.tell_if_connected(state, Outgoing::Adopt(device));
    }

    /// Has the agent told what is read of the layer from now on, for as long as it is open.
    pub(super) fn watch(&self, layer: &Arc<LayerReader>) {
        let layers = self.layers.lock();
        let mut layers = layers.unwrap_or_else(PoisonError::into_inner);
        layers.retain(|it| 0 < it.strong_count());
        layers.push(Arc::downgrade(layer));
    }

    /// Tells the agent what was read since it was told last.
    fn tell_reads(&self) {
        let Some(channel) = self.state().channel.clone() else {
            return;
        };
        let layers = self.layers.lock();
        let layers: Vec<_> = {
            let layers = layers.unwrap_or_else(PoisonError::into_inner);
            layers.iter().filter_map(Weak::upgrade).collect()
        };
        for layer in layers {
            for extents in layer.take_read().chunks(MAX_RANGES) {
                let request = AgentRequest::Read {
                    layer: layer.diff_id(),
                    extents: extents.to_vec(),
                };
                if channel.send(&request, None).is_err() {
                    // It is gone, or hangs, and so is what it should have known.
                    return channel.close();
                }
            }
        }
    }

    /// Tells the agent that the mount is gone.
    pub(super) fn release(&self, device: MountKey) {
        let mut state = self.state();
        state.mounts.remove(&device);
        self.tell_if_connected(state, Outgoing::Release(device));
    }

    fn receive_for_ever(&self, path: PathBuf) {
        let mut is_missed = false;
        loop {
            match Channel::connect(&path) {
                Ok(channel) => {
                    info!(path = %path.display(), "connected to the agent");
                    is_missed = false;
                    let channel = Arc::new(channel);
                    self.greet(&channel);
                    let ended = self.receive_all(&channel);
                    self.disconnected();
                    warn!(reason = %ended, "the agent is gone: what is not on disk has to wait for it");
                }
                Err(err) if !is_missed => {
                    is_missed = true;
                    warn!(path = %path.display(), error = %err, "no agent yet: what is not on disk has to wait for it");
                }
                Err(_) => {}
            }
            thread::sleep(RECONNECT);
        }
    }

    fn disconnected(&self) {
        let mut state = self.state();
        state.channel = None;
        for it in state.pending.values_mut() {
            if it.agent == Agent::AtWork {
                it.agent = Agent::Away(Instant::now());
            }
        }
    }

    /// Has all that the agent has to know sent to it anew.
    fn greet(&self, channel: &Arc<Channel>) {
        let mut state = self.state();
        state.channel = Some(Arc::clone(channel));
        let mounts: Vec<_> = state.mounts.keys().copied().collect();
        let tickets: Vec<_> = state.pending.keys().copied().collect();
        drop(state);
        mounts
            .into_iter()
            .for_each(|it| self.tell(Outgoing::Adopt(it)));
        tickets
            .into_iter()
            .for_each(|it| self.tell(Outgoing::Present(it)));
    }

    fn receive_all(&self, channel: &Channel) -> String {
        loop {
            match channel.receive() {
                Ok(Some((AgentReply::Present { ticket, outcome }, _))) => {
                    self.answer(ticket, outcome, None);
                }
                Ok(Some((AgentReply::Lent { ticket, outcome }, fd))) => {
                    self.answer(ticket, outcome, fd);
                }
                Ok(Some(_)) => {}
                Ok(None) => return "it closed the connection".to_owned(),
                Err(err) => return err.to_string(),
            }
        }
    }

    fn answer(&self, ticket: u64, outcome: Result<(), PresentError>, fd: Option<OwnedFd>) {
        // It has just been restarted, and is not that far.
        if matches!(outcome, Err(PresentError::Unknown { .. })) {
            let now = Instant::now();
            if let Some(it) = self.state().pending.get_mut(&ticket)
                && !matches!(it.agent, Agent::Ignorant(_))
            {
                it.agent = Agent::Ignorant(now);
            }
            return self.tell(Outgoing::PresentLater(ticket, now + UNKNOWN_RETRY));
        }
        let pending = self.state().pending.remove(&ticket);
        if let Some(pending) = pending {
            pending.wanted.answer(outcome, fd);
        }
    }

    fn send_for_ever(&self, outgoing: mpsc::Receiver<Outgoing>) {
        const TICK: Duration = Duration::from_secs(1);
        let mut later: Vec<(u64, Instant)> = Vec::new();
        let mut reads_told = Instant::now();
        loop {
            let wait = if later.is_empty() {
                TICK
            } else {
                UNKNOWN_RETRY
            };
            match outgoing.recv_timeout(wait) {
                Ok(Outgoing::PresentLater(ticket, when)) => later.push((ticket, when)),
                Ok(message) => self.send(&message),
                Err(RecvTimeoutError::Timeout) => {}
                // The link lives as long as the process.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let now = Instant::now();
            later.retain(|(ticket, when)| {
                let is_early = now < *when;
                if !is_early {
                    self.send(&Outgoing::Present(*ticket));
                }
                is_early
            });
            self.give_up(now);
            if READS <= now.duration_since(reads_told) {
                reads_told = now;
                self.tell_reads();
            }
        }
    }

    /// Sends what is still wanted; what cannot be sent is sent at the next connection.
    fn send(&self, message: &Outgoing) {
        let (channel, request) = {
            let mut state = self.state();
            let Some(channel) = state.channel.clone() else {
                return;
            };
            let request = match message {
                Outgoing::Adopt(device) => {
                    state
                        .mounts
                        .get(device)
                        .map(|(manifest, request)| AgentRequest::Adopt {
                            device: *device,
                            manifest: *manifest,
                            request: request.clone(),
                        })
                }
                Outgoing::Release(device) => Some(AgentRequest::Release { device: *device }),
                Outgoing::Present(ticket) | Outgoing::PresentLater(ticket, _) => {
                    let pending = state.pending.get_mut(ticket);
                    pending.map(|it| {
                        if let Agent::Away(_) = it.agent {
                            it.agent = Agent::AtWork;
                        }
                        it.wanted.request(*ticket, it.mount)
                    })
                }
            };
            (channel, request)
        };
        match request.map_or(Ok(()), |it| channel.send(&it, None)) {
            Ok(()) => {}
            // What a new connection would not have either; others have their turn.
            Err(err) if err.kind() == io::ErrorKind::ArgumentListTooLong => {
                warn!(error = %err, "the agent is not told of a mount");
            }
            // It is gone, or hangs: then it is asked by a new connection.
            Err(_) => channel.close(),
        }
    }

    /// Fails the readers for whom nobody did anything for too long.
    fn give_up(&self, now: Instant) {
        let mut state = self.state();
        let is_late = |it: &Pending| {
            it.idle_since()
                .is_some_and(|since| PATIENCE < now.duration_since(since))
        };
        let late: Vec<u64> = state
            .pending
            .iter()
            .filter_map(|(ticket, it)| is_late(it).then_some(*ticket))
            .collect();
        let late: Vec<_> = late
            .iter()
            .filter_map(|it| state.pending.remove(it))
            .collect();
        drop(state);
        for Pending { since, wanted, .. } in late {
            let err = PresentError::Timeout {
                layer: wanted.layer(),
                waited: now.duration_since(since),
            };
            wanted.answer(Err(err), None);
        }
    }

    fn ask(&self, mount: MountKey, wanted: Wanted) {
        let mut state = self.state();
        state.last_ticket += 1;
        let ticket = state.last_ticket;
        let since = Instant::now();
        let pending = Pending {
            since,
            agent: Agent::Away(since),
            mount,
            wanted,
        };
        state.pending.insert(ticket, pending);
        self.tell_if_connected(state, Outgoing::Present(ticket));
    }

    /// Has it sent, unless there is no agent: the next one is told all that `state` has, once.
    fn tell_if_connected(&self, state: MutexGuard<'_, State>, message: Outgoing) {
        let is_connected = state.channel.is_some();
        drop(state);
        if is_connected {
            self.tell(message);
        }
    }

    fn tell(&self, message: Outgoing) {
        let outbox = self.outbox.lock().unwrap_or_else(PoisonError::into_inner);
        // The receiver lives as long as the process.
        let _ = outbox.send(message);
    }

    /// std Mutex: held for map operations, never while something is sent or called back.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MakePresent for OfMount {
    fn make_present(&self, layer: DiffId, chunks: Range<u32>, done: PresentCallback) {
        let wanted = Wanted::Present {
            layer,
            chunks,
            done,
        };
        self.link.ask(self.mount, wanted);
    }

    fn lend(&self, wanted: Chunk, done: LendCallback) {
        let wanted = Wanted::Lent {
            chunk: wanted,
            done,
        };
        self.link.ask(self.mount, wanted);
    }
}

#[cfg(test)]
mod tests;
