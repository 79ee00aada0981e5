//! The node service's side of its connection to the server: makes mounts and gives them to it, and
//! holds a copy of each connection, so that a server may die and its successor goes on.
//!
//! A connection that nobody serves is given up after a deadline: an error is better for its readers,
//! and for kubelet, than to wait for ever.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use rustix::mount::UnmountFlags;
use tracing::{error, info, warn};

use super::{
    notices::Notices,
    protocol::{MountKey, ServeReply, ServeRequest, ServedMount},
    server,
};
use crate::{
    digest::ManifestDigest,
    failpoint,
    fuse::{
        session::{make_mount, set_read_ahead},
        takeover,
    },
    ipc::{Channel, RunDir},
    metrics::Metrics,
    mount::{Device, ImageRequest, SOURCE_NAME, SourceMount, Survivor},
};

/// How long a server may take to answer. It opens an index and some files.
const ANSWER: Duration = Duration::from_secs(20);

/// How long a start waits for a server whose process lives.
const SURVIVORS: Duration = Duration::from_secs(20);

/// How long a mount waits for a server that is being restarted: who asked for it, asks again.
const MOUNT_PATIENCE: Duration = Duration::from_secs(5);

/// How often a server is looked for while there is none: each time is a part of what readers wait.
const RECONNECT: Duration = Duration::from_millis(2);

/// How often it is looked for when it has been away for longer than a restart takes.
const RECONNECT_LATER: Duration = Duration::from_millis(100);

/// How long it is looked for often.
const OFTEN: Duration = Duration::from_secs(5);

/// How often connections that have ended are let go.
const TICK: Duration = Duration::from_secs(1);

/// How long an unmount waits for the connection to end.
const UNMOUNT: Duration = Duration::from_secs(2);

/// Holds a copy of each connection. Lives as long as the process.
#[derive(Debug)]
pub struct Escrow {
    socket: PathBuf,
    run: RunDir,
    deadline: Duration,
    metrics: Metrics,
    notices: Arc<Notices>,
    /// std Mutex: held for map operations, never while anything is sent.
    held: Mutex<HashMap<MountKey, Held>>,
}

#[derive(Debug, Clone)]
struct Held {
    mount: ServedMount,
    fuse: Arc<OwnedFd>,
}

impl Escrow {
    /// Asks the server for the connections it has, and keeps the server supplied from now on.
    ///
    /// # Errors
    /// If the system gives no thread.
    ///
    /// # Blocking
    /// Waits for a server whose process lives, up to twenty seconds: a mount that is taken for dead
    /// is lost.
    pub fn start(
        run: &RunDir,
        deadline: Duration,
        metrics: Metrics,
        notices: Arc<Notices>,
    ) -> io::Result<Arc<Self>> {
        let escrow = Arc::new(Self {
            socket: run.serve(),
            run: run.clone(),
            deadline,
            metrics,
            notices,
            held: Mutex::default(),
        });
        escrow.ask_survivors();
        let supplier = Arc::clone(&escrow);
        thread::Builder::new()
            .name("clip-escrow".to_owned())
            .spawn(move || supplier.supply_for_ever())?;
        Ok(escrow)
    }

    fn ask_survivors(&self) {
        let give_up = Instant::now() + SURVIVORS;
        loop {
            let asked = Channel::connect(&self.socket).and_then(|it| self.list(&it));
            let err = match asked {
                Ok(listed) => {
                    self.held().extend(listed);
                    return;
                }
                Err(err) => err,
            };
            // Between two servers there is a process that has the lock, or soon will.
            let is_alive = server::is_alive(&self.run).unwrap_or(false);
            if !is_alive {
                return info!("no server lives: no mount has survived");
            }
            if give_up < Instant::now() {
                return error!(error = %err, "the server does not say what it serves: its mounts are taken for dead");
            }
            thread::sleep(RECONNECT);
        }
    }

    /// What the server serves.
    fn list(&self, channel: &Channel) -> io::Result<HashMap<MountKey, Held>> {
        channel.set_receive_timeout(Some(ANSWER))?;
        channel.send(&ServeRequest::List, None)?;
        let mut listed = HashMap::new();
        loop {
            match channel.receive()? {
                Some((ServeReply::Mount(mount), Some(fuse))) => {
                    let fuse = Arc::new(fuse);
                    listed.insert(mount.device, Held { mount, fuse });
                }
                Some((ServeReply::End, _)) => return Ok(listed),
                Some(_) => return Err(io::Error::other("the server answered something else")),
                None => return Err(io::ErrorKind::ConnectionReset.into()),
            }
        }
    }

    /// Gives each new server what it lacks, and gives up when there is none for too long.
    fn supply_for_ever(&self) {
        let mut lost = Instant::now();
        let mut is_given_up = false;
        loop {
            let supplied = Channel::connect(&self.socket).and_then(|channel| {
                self.supply(&channel)?;
                Ok(channel)
            });
            match supplied {
                Ok(channel) => {
                    self.metrics.serve_up.set(1);
                    is_given_up = false;
                    self.wait_for_end(&channel);
                    self.metrics.serve_up.set(0);
                    lost = Instant::now();
                    warn!("the server is gone: reads that need it wait for its successor");
                }
                Err(err) => {
                    let away = lost.elapsed();
                    if self.deadline < away && !is_given_up {
                        is_given_up = true;
                        self.give_up(&err);
                    }
                    thread::sleep(if away < OFTEN {
                        RECONNECT
                    } else {
                        RECONNECT_LATER
                    });
                }
            }
        }
    }

    /// Gives a server what it lacks.
    fn supply(&self, channel: &Channel) -> io::Result<()> {
        self.let_go();
        let has = self.list(channel)?;
        // Of a former life of this process, whose records say nothing of them: they end by themselves.
        let held: Vec<Held> = {
            let mut held = self.held();
            for (device, it) in &has {
                held.entry(*device).or_insert_with(|| it.clone());
            }
            held.values().cloned().collect()
        };
        let mut n_given = 0;
        for it in held.iter().filter(|it| !has.contains_key(&it.mount.device)) {
            match self.give(channel, it) {
                Ok(_) => n_given += 1,
                Err(err) if err.kind() == io::ErrorKind::InvalidInput => {
                    error!(image.manifest = %it.mount.manifest, error = %err, "the server cannot go on with a mount, giving it up");
                    self.metrics.mounts_aborted.inc();
                    self.held().remove(&it.mount.device);
                }
                Err(err) => return Err(err),
            }
        }
        info!(
            mounts = held.len(),
            given = n_given,
            "connected to the server"
        );
        Ok(())
    }

    /// Gives the server one connection. A refusal is `InvalidInput`.
    fn give(&self, channel: &Channel, held: &Held) -> io::Result<takeover::KernelOffer> {
        channel.set_receive_timeout(Some(ANSWER))?;
        let request = ServeRequest::Serve(held.mount.clone());
        channel.send(&request, Some(held.fuse.as_fd()))?;
        match channel.receive()? {
            Some((ServeReply::Serving(offer), _)) => Ok(offer),
            Some((ServeReply::Refused(reason), _)) => {
                Err(io::Error::new(io::ErrorKind::InvalidInput, reason))
            }
            Some(_) => Err(io::Error::other("the server answered something else")),
            None => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }

    /// Waits until the server closes the connection, on which it says nothing any more, and lets go
    /// what has ended meanwhile.
    fn wait_for_end(&self, channel: &Channel) {
        if channel.set_receive_timeout(Some(TICK)).is_err() {
            return;
        }
        loop {
            match channel.receive::<ServeReply>() {
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => self.let_go(),
                Err(_) => return,
            }
        }
    }

    /// Lets the connections go that have ended.
    fn let_go(&self) {
        self.held().retain(|_, it| !takeover::has_ended(&it.fuse));
    }

    /// Closes all connections, which aborts them: nobody else has them.
    fn give_up(&self, err: &io::Error) {
        self.let_go();
        let given_up = std::mem::take(&mut *self.held());
        if given_up.is_empty() {
            return;
        }
        self.metrics.mounts_aborted.inc_by(given_up.len() as u64);
        self.notices.add(
            "MountsGivenUp",
            format!(
                "no server of FUSE mounts for {} s: {} images that pods have mounted are given up, and their reads fail; \
                 see that the pods of the fuse DaemonSet run, and delete the pods that use the images",
                self.deadline.as_secs(),
                given_up.len()
            ),
        );
        error!(mounts = given_up.len(), deadline_seconds = self.deadline.as_secs(), error = %err,
            "no server for too long: giving its mounts up, which fails their readers; start clip-csi serve");
    }

    /// Mounts the image at `dir`, and has the server serve it.
    ///
    /// # Errors
    /// Those of the system; or there is no server, or it refuses. Nothing is mounted then.
    ///
    /// # Blocking
    /// Waits for the server.
    pub(super) fn mount(
        self: &Arc<Self>,
        manifest: ManifestDigest,
        request: &ImageRequest,
        dir: &Path,
        read_ahead_kib: u32,
    ) -> io::Result<HeldMount> {
        let give_up = Instant::now() + MOUNT_PATIENCE;
        loop {
            let (dir, fuse, device) = make_mount(dir, SOURCE_NAME).map_err(io::Error::other)?;
            failpoint::reached("source:mounted");
            let mut held = Held {
                mount: ServedMount {
                    device,
                    manifest,
                    request: request.clone(),
                    offer: None,
                },
                fuse: Arc::new(fuse),
            };
            match self.hand_in(&mut held) {
                Ok(()) => {
                    failpoint::reached("source:served");
                    set_read_ahead(device, read_ahead_kib);
                    return Ok(HeldMount {
                        escrow: Arc::clone(self),
                        fuse: Arc::downgrade(&held.fuse),
                    });
                }
                // A mount that was given to a server which died may be half initialised.
                Err(err) => {
                    // While the number is still this one's.
                    self.held().remove(&device);
                    if let Err(left) = detach(&dir) {
                        warn!(path = %dir.display(), error = %left, "a mount that nobody serves stays");
                    }
                    if err.kind() == io::ErrorKind::InvalidInput || give_up < Instant::now() {
                        return Err(err);
                    }
                    thread::sleep(RECONNECT_LATER);
                }
            }
        }
    }

    /// Has what the image lacks on disk be fetched with the rights of `request` from now on, whoever
    /// serves it.
    ///
    /// # Errors
    /// There is no server. Its successor is told.
    ///
    /// # Blocking
    /// Waits for the socket.
    pub(super) fn renew(&self, manifest: ManifestDigest, request: &ImageRequest) -> io::Result<()> {
        let devices: Vec<_> = {
            let mut held = self.held();
            let of_image = held.values_mut();
            let of_image =
                of_image.filter(|it| it.mount.manifest == manifest && it.mount.request != *request);
            of_image
                .map(|it| {
                    it.mount.request = request.clone();
                    it.mount.device
                })
                .collect()
        };
        if devices.is_empty() {
            return Ok(());
        }
        let channel = Channel::connect(&self.socket)?;
        for device in devices {
            let request = request.clone();
            channel.send(&ServeRequest::Renew { device, request }, None)?;
        }
        Ok(())
    }

    /// Has the server serve a new connection, and makes sure that it, or its successor, does.
    fn hand_in(&self, held: &mut Held) -> io::Result<()> {
        let no_server = |err: io::Error| {
            let reason = format!(
                "no server of FUSE mounts at {}: {err}: it is tried again; is clip-csi serve running?",
                self.socket.display()
            );
            io::Error::new(io::ErrorKind::NotConnected, reason)
        };
        let channel = Channel::connect(&self.socket).map_err(no_server)?;
        let given = self.give(&channel, held);
        held.mount.offer = Some(given.map_err(|err| match err.kind() {
            io::ErrorKind::InvalidInput => err,
            _ => no_server(err),
        })?);
        self.held().insert(held.mount.device, held.clone());
        // Had the server died just before that, its successor would not have been given this one.
        let asked = Channel::connect(&self.socket).and_then(|it| self.give(&it, held));
        match asked {
            Ok(_) => Ok(()),
            Err(err) if err.kind() == io::ErrorKind::InvalidInput => Err(err),
            // Whoever comes next is given it.
            Err(_) => Ok(()),
        }
    }

    /// The mounts that a server serves, as it said at the start.
    pub(super) fn survivors(self: &Arc<Self>) -> Vec<Survivor> {
        let held = self.held();
        let survivors = held.values().map(|it| {
            let (major, minor) = it.mount.device;
            Survivor {
                manifest: it.mount.manifest,
                device: Device { major, minor },
                session: Box::new(HeldMount {
                    escrow: Arc::clone(self),
                    fuse: Arc::downgrade(&it.fuse),
                }),
            }
        });
        survivors.collect()
    }

    fn held(&self) -> MutexGuard<'_, HashMap<MountKey, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A source mount that the server serves.
#[derive(Debug)]
pub(super) struct HeldMount {
    escrow: Arc<Escrow>,
    /// The copy in escrow is the one that counts: closed, the connection is aborted.
    fuse: Weak<OwnedFd>,
}

impl SourceMount for HeldMount {
    fn is_alive(&self) -> bool {
        self.fuse
            .upgrade()
            .is_some_and(|it| !takeover::has_ended(&it))
    }

    fn unmount(self: Box<Self>, dir: &Path) -> io::Result<()> {
        detach(dir)?;
        let deadline = Instant::now() + UNMOUNT;
        while self.is_alive() && Instant::now() < deadline {
            thread::sleep(RECONNECT);
        }
        // Still bound elsewhere, or with open files: it is held, and served, until that ends.
        self.escrow.let_go();
        Ok(())
    }
}

fn detach(dir: &Path) -> io::Result<()> {
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    Ok(rustix::mount::unmount(dir, flags)?)
}
