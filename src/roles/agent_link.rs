//! The server's side of its connection to the agent: asks for chunks, and never lets a reader fail
//! because the agent is restarted.
//!
//! What was asked for and not answered is asked again at each new connection, until it is too late
//! for a reader. No FUSE thread sends or waits: they leave what they want, and one thread sends it.

use std::{
    collections::HashMap,
    io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
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
    mount::ImageRequest,
    tier::{MakePresent, PresentCallback, PresentError},
};

/// How long a reader waits for an agent that does not answer or does not know the layer: a restart
/// takes seconds, an upgrade with a new image to pull minutes.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often the agent is looked for while it is away.
const RECONNECT: Duration = Duration::from_millis(20);

/// How long a layer that the agent does not know yet is not asked for again.
const UNKNOWN_RETRY: Duration = Duration::from_millis(100);

/// Stack of the two threads.
const STACK_BYTES: usize = 128 << 10;

/// The connection to the agent. Lives as long as the process.
#[derive(Debug)]
pub(super) struct AgentLink {
    state: Mutex<State>,
    outbox: Mutex<mpsc::Sender<Outgoing>>,
}

#[derive(Debug, Default)]
struct State {
    /// The connection, while there is one.
    channel: Option<Arc<Channel>>,
    mounts: HashMap<MountKey, (ManifestDigest, ImageRequest)>,
    pending: HashMap<u64, Pending>,
    last_ticket: u64,
}

struct Pending {
    layer: DiffId,
    chunks: Range<u32>,
    since: Instant,
    done: PresentCallback,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending")
            .field("layer", &self.layer)
            .field("chunks", &self.chunks)
            .finish_non_exhaustive()
    }
}

/// What the sending thread is told.
#[derive(Debug)]
enum Outgoing {
    Adopt(MountKey),
    Release(MountKey),
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

    /// Has the agent be ready for the mount's layers, now and after each of its restarts.
    pub(super) fn adopt(&self, device: MountKey, manifest: ManifestDigest, request: ImageRequest) {
        self.state().mounts.insert(device, (manifest, request));
        self.tell(Outgoing::Adopt(device));
    }

    /// Tells the agent that the mount is gone.
    pub(super) fn release(&self, device: MountKey) {
        self.state().mounts.remove(&device);
        self.tell(Outgoing::Release(device));
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
                    self.answer(ticket, outcome);
                }
                Ok(Some((AgentReply::Progress(_) | AgentReply::Prepared(_), _))) => {}
                Ok(None) => return "it closed the connection".to_owned(),
                Err(err) => return err.to_string(),
            }
        }
    }

    fn answer(&self, ticket: u64, outcome: Result<(), PresentError>) {
        // It has just been restarted, and is not that far.
        if matches!(outcome, Err(PresentError::Unknown { .. })) {
            return self.tell(Outgoing::PresentLater(
                ticket,
                Instant::now() + UNKNOWN_RETRY,
            ));
        }
        let pending = self.state().pending.remove(&ticket);
        if let Some(pending) = pending {
            (pending.done)(outcome);
        }
    }

    fn send_for_ever(&self, outgoing: mpsc::Receiver<Outgoing>) {
        const TICK: Duration = Duration::from_secs(1);
        let mut later: Vec<(u64, Instant)> = Vec::new();
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
                    state.pending.get(ticket).map(|it| AgentRequest::Present {
                        ticket: *ticket,
                        layer: it.layer,
                        chunks: it.chunks.clone(),
                    })
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
        for Pending {
            layer, since, done, ..
        } in late
        {
            done(Err(PresentError::Timeout {
                layer,
                waited: now.duration_since(since),
            }));
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

impl MakePresent for AgentLink {
    fn make_present(&self, layer: DiffId, chunks: Range<u32>, done: PresentCallback) {
        let mut state = self.state();
        state.last_ticket += 1;
        let ticket = state.last_ticket;
        let pending = Pending {
            layer,
            chunks,
            since: Instant::now(),
            done,
        };
        state.pending.insert(ticket, pending);
        drop(state);
        self.tell(Outgoing::Present(ticket));
    }
}

#[cfg(test)]
mod tests {
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
            credentials: crate::mount::PullCredentials::None,
        };
        link.adopt((0, 7), manifest, request);
        let (sender, outcome) = mpsc::channel();
        let done = Box::new(move |it: Result<(), PresentError>| sender.send(it.is_ok()).unwrap());
        // Nobody listens yet.
        link.make_present(layer, 2..4, done);
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
            let AgentRequest::Present { ticket, chunks, .. } = received(&agent) else {
                panic!("chunks are asked for");
            };
            assert_eq!(chunks, 2..4);
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
}
