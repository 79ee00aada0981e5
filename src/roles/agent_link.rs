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

/// How long a reader waits for an agent that does not answer or does not know the layer: a restart
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
    mount: MountKey,
    wanted: Wanted,
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
                    self.state().channel = None;
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
            return self.tell(Outgoing::PresentLater(
                ticket,
                Instant::now() + UNKNOWN_RETRY,
            ));
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
            let state = self.state();
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
                    let pending = state.pending.get(ticket);
                    pending.map(|it| it.wanted.request(*ticket, it.mount))
                }
            };
            (channel, request)
        };
        if let Some(request) = request
            && channel.send(&request, None).is_err()
        {
            // It is gone, or hangs: then it is asked by a new connection.
            channel.close();
        }
    }

    /// Fails the readers who have waited too long.
    fn give_up(&self, now: Instant) {
        let mut state = self.state();
        let is_late = |it: &Pending| PATIENCE < now.duration_since(it.since);
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
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::ipc::Listener;

    /// Longer than anything here takes, on any machine.
    const DEADLINE: Duration = Duration::from_secs(20);

    fn received(agent: &Channel) -> AgentRequest {
        agent.receive().unwrap().unwrap().0
    }

    #[test]
    fn what_was_not_answered_is_asked_of_the_next_agent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let link = AgentLink::start(path.clone()).unwrap();
        let (layer, manifest) = (DiffId::of(b"layer"), ManifestDigest::of(b"image"));
        let request = ImageRequest {
            image: "r.x/app".to_owned(),
            platform: None,
            index_digest: None,
            prefetch: None,
            pull_policy: None,
            insecure: false,
            credentials: crate::mount::PullCredentials::None,
            pod: None,
        };
        link.adopt((0, 7), manifest, request);
        let (sender, outcome) = mpsc::channel();
        let done = Box::new(move |it: Result<(), PresentError>| sender.send(it.is_ok()).unwrap());
        // Nobody listens yet.
        link.of_mount((0, 7)).make_present(layer, 2..4, done);
        let unknown = |ticket| AgentReply::Present {
            ticket,
            outcome: Err(PresentError::Unknown { layer }),
        };
        // The first one dies without a word, the second one does not know the layer at first.
        for is_last in [false, true] {
            let listener = Listener::bind(&path).unwrap();
            let agent = listener.accept().unwrap();
            agent.set_receive_timeout(Some(DEADLINE)).unwrap();
            let adopted = received(&agent);
            assert!(
                matches!(&adopted, AgentRequest::Adopt { device: (0, 7), manifest: it, .. } if *it == manifest),
                "{adopted:?}"
            );
            let AgentRequest::Present {
                ticket,
                chunks,
                mount,
                ..
            } = received(&agent)
            else {
                panic!("chunks are asked for");
            };
            assert_eq!((chunks, mount), (2..4, Some((0, 7))));
            if !is_last {
                continue;
            }
            agent.send(&unknown(ticket), None).unwrap();
            assert!(
                matches!(received(&agent), AgentRequest::Present { ticket: it, .. } if it == ticket)
            );
            let present = AgentReply::Present {
                ticket,
                outcome: Ok(()),
            };
            agent.send(&present, None).unwrap();
            assert!(outcome.recv_timeout(DEADLINE).unwrap());
            link.release((0, 7));
            assert!(matches!(
                received(&agent),
                AgentRequest::Release { device: (0, 7) }
            ));
        }
    }

    #[test]
    fn what_the_agent_lends_is_taken_only_if_it_is_the_chunk_and_sealed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let listener = Listener::bind(&path).unwrap();
        let link = AgentLink::start(path).unwrap();
        let agent = listener.accept().unwrap();
        agent.set_receive_timeout(Some(DEADLINE)).unwrap();
        let layer = DiffId::of(b"layer");
        let chunk = Chunk {
            layer,
            number: 7,
            bytes: 10,
        };
        let sealed = |bytes: &[u8]| {
            let lent = LentChunk::seal(layer, 7, bytes).unwrap();
            lent.as_fd().try_clone_to_owned().unwrap()
        };
        let on_disk = tempfile::tempfile().unwrap();
        on_disk.set_len(10).unwrap();
        let full = PresentError::NoSpace { path: "/c".into() };
        for (fd, outcome, expected) in [
            (Some(sealed(b"0123456789")), Ok(()), "0123456789"),
            (
                Some(sealed(b"012345678")),
                Ok(()),
                "9 bytes, the chunk has 10",
            ),
            (Some(on_disk.into()), Ok(()), "it can still be changed"),
            (None, Ok(()), "no descriptor came"),
            (None, Err(full), "cache disk /c is full"),
        ] {
            let (sender, lent) = mpsc::channel();
            let of_mount = link.of_mount((0, 8));
            of_mount.lend(chunk, Box::new(move |it| sender.send(it).unwrap()));
            let AgentRequest::Lend {
                ticket,
                wanted,
                mount,
            } = received(&agent)
            else {
                panic!("a chunk is asked for");
            };
            assert_eq!((wanted, mount), (chunk, Some((0, 8))));
            let fd: Option<OwnedFd> = fd;
            let reply = AgentReply::Lent { ticket, outcome };
            agent.send(&reply, fd.as_ref().map(AsFd::as_fd)).unwrap();
            let found = match lent.recv_timeout(DEADLINE).unwrap() {
                Ok(lent) => {
                    assert!(lent.is(layer, 7));
                    let mut bytes = [0; 10];
                    lent.read_at(&mut bytes, 0).unwrap();
                    String::from_utf8(bytes.to_vec()).unwrap()
                }
                Err(err) => err.to_string(),
            };
            assert!(found.contains(expected), "{found}");
        }
    }
}
