//! The server: serves FUSE on connections that it is given, and asks the agent for what is not on
//! disk. It has no network, no privileges, and no event loop.
//!
//! A predecessor that is alive hands its connections over when this one starts; after a crash the
//! node service, which holds each of them too, gives them again. Either way the kernel is asked to
//! send again what the predecessor had read, once that is dead: its lock says so.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io, mem,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
    path::Path,
    process,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread,
    time::{Duration, Instant},
};

use rustix::fs::{FlockOperation, flock};
use tracing::{info, warn};

use super::{
    agent_link::AgentLink,
    protocol::{MountKey, ServeReply, ServeRequest, ServedMount, Status},
};
use crate::{
    failpoint,
    fs::{ClipFs, LayerData},
    fuse::{
        pool::ReadPool,
        session::{self, FuseSession},
        takeover,
    },
    index::image::ImageIndex,
    ipc::{self, Channel, Listener, RunDir},
    layer::{disk::CachePaths, reader::LayerReader},
    metrics::Metrics,
    mount::ImageRequest,
    sys::MappedFile,
};

/// Exit code of a server whose mounts a successor serves.
pub const HANDED_OVER: i32 = 75;

/// How long a predecessor may take to hand over, and then to die.
const PREDECESSOR: Duration = Duration::from_secs(30);

/// How long one takes to die of which nothing is heard any more.
const DYING: Duration = Duration::from_secs(2);

/// How often the lock of a dying predecessor is tried.
const LOCK_POLL: Duration = Duration::from_millis(1);

/// How long a layer of a mount may not be there: the agent may be making it anew.
const LAYER_WAIT: Duration = Duration::from_secs(5);

/// Stack of a connection's thread, which opens indexes.
const STACK_BYTES: usize = 256 << 10;

/// How long to wait when no connection can be accepted.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Serves mounts until the process ends.
#[derive(Debug)]
pub struct Server {
    paths: CachePaths,
    pool: Arc<ReadPool>,
    agent: Arc<AgentLink>,
    metrics: Metrics,
    n_threads_per_mount: usize,
    mounts: Mutex<Mounts>,
    /// Held while a mount is begun, so that two who give the same one do not begin it twice.
    beginning: Mutex<()>,
    /// Signalled when a hand-over has failed.
    resumed: Condvar,
    /// Where sessions say that they have ended.
    ended: Mutex<mpsc::Sender<MountKey>>,
}

#[derive(Debug, Default)]
struct Mounts {
    served: HashMap<MountKey, Served>,
    is_handing_over: bool,
}

#[derive(Debug)]
struct Served {
    mount: ServedMount,
    fuse: Arc<OwnedFd>,
    session: FuseSession,
    /// Keeps the index from being removed: a successor opens it again.
    _pin: File,
}

impl Server {
    /// Makes a server of the images in the cache `paths`, which connects to the agent of `run`.
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn start(
        paths: CachePaths,
        run: &RunDir,
        pool: Arc<ReadPool>,
        metrics: Metrics,
        n_threads_per_mount: usize,
    ) -> io::Result<Arc<Self>> {
        let (sender, ended) = mpsc::channel();
        let server = Arc::new(Self {
            paths,
            pool,
            agent: AgentLink::start(run.agent())?,
            metrics,
            n_threads_per_mount,
            mounts: Mutex::default(),
            beginning: Mutex::default(),
            resumed: Condvar::new(),
            ended: Mutex::new(sender),
        });
        let reaper = Arc::clone(&server);
        thread::Builder::new()
            .name("clip-reap".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                for device in ended {
                    reaper.forget_if_ended(device);
                }
            })?;
        Ok(server)
    }

    /// Takes over from a predecessor, if there is one, then answers all who connect, for ever.
    ///
    /// # Errors
    /// If the predecessor does not die, one of its mounts cannot be taken over, or the socket cannot
    /// be bound. The predecessor goes on then.
    ///
    /// # Blocking
    /// For ever.
    pub fn serve(self: &Arc<Self>, run: &RunDir) -> io::Result<()> {
        let lock = open_lock(&run.serve_lock())?;
        // A process that waits for its end, or one that is gone and left its socket: no predecessor.
        if let Ok(predecessor) = Channel::connect(&run.serve()) {
            let taken = self.take_over(&predecessor, &lock);
            // Open until this process is gone, and with it all threads that could still read requests: only then
            // are those sent again that it has read.
            mem::forget(predecessor);
            taken?;
        } else {
            wait_for_lock(&lock, PREDECESSOR)?;
        }
        // Nobody else answers what was read before any more.
        let n_taken = self.resend_all();
        if 0 < n_taken {
            failpoint::reached("handover:resumed");
            info!(mounts = n_taken, "took the mounts over");
        }
        let listener = Listener::bind(&run.serve())?;
        info!(path = %run.serve().display(), "serving FUSE mounts");
        loop {
            let channel = match listener.accept() {
                Ok(channel) => channel,
                Err(err) => {
                    warn!(error = %err, "accepting a connection failed");
                    thread::sleep(ACCEPT_BACKOFF);
                    continue;
                }
            };
            let server = Arc::clone(self);
            let started = thread::Builder::new()
                .name("clip-serve".to_owned())
                .stack_size(STACK_BYTES)
                .spawn(move || match server.converse(&channel) {
                    Ok(()) => {}
                    Err(err) => warn!(error = %err, "a connection broke"),
                });
            if let Err(err) = started {
                warn!(error = %err, "no thread for a connection");
            }
        }
    }

    /// Serves what a living predecessor serves, beside it, and waits for its end.
    fn take_over(self: &Arc<Self>, predecessor: &Channel, lock: &File) -> io::Result<()> {
        predecessor.set_receive_timeout(Some(PREDECESSOR))?;
        if predecessor.send(&ServeRequest::HandOver, None).is_err() {
            // It died meanwhile: the node service gives what it had.
            return wait_for_lock(lock, PREDECESSOR);
        }
        let mut n_mounts = 0;
        loop {
            match predecessor.receive()? {
                Some((ServeReply::Mount(mount), Some(fuse))) => {
                    self.begin(mount, fuse)?;
                    n_mounts += 1;
                }
                Some((ServeReply::End, _)) => break,
                // It died: what it has not given, the node service gives.
                None => return wait_for_lock(lock, DYING),
                Some(_) => return Err(io::Error::other("a predecessor that speaks otherwise")),
            }
        }
        info!(
            mounts = n_mounts,
            "serving beside the predecessor, which is to end now"
        );
        let patience = match predecessor.send(&ServeRequest::Quit, None) {
            Ok(()) => PREDECESSOR,
            // It has died meanwhile, which is as good, or has given up waiting and serves: then not both.
            Err(_) => DYING,
        };
        wait_for_lock(lock, patience)
    }

    fn converse(self: &Arc<Self>, channel: &Channel) -> io::Result<()> {
        while let Some((request, fuse)) = channel.receive()? {
            match (request, fuse) {
                (ServeRequest::Serve(mount), Some(fuse)) => {
                    failpoint::reached("serve:received");
                    let reply = match self.serve_one(mount, fuse) {
                        Ok(offer) => ServeReply::Serving(offer),
                        Err(err) => {
                            warn!(error = %err, "cannot serve a mount");
                            ServeReply::Refused(err.to_string())
                        }
                    };
                    channel.send(&reply, None)?;
                }
                (ServeRequest::Serve(_), None) => {
                    let reason = "no connection came with the mount".to_owned();
                    channel.send(&ServeReply::Refused(reason), None)?;
                }
                (ServeRequest::Renew { device, request }, _) => self.renew(device, request),
                (ServeRequest::List, _) => self.list(channel)?,
                (ServeRequest::HandOver, _) => return self.hand_over(channel),
                (ServeRequest::Quit, _) => {}
                (ServeRequest::Status, _) => {
                    let status = Status {
                        metrics: self.metrics.encode().unwrap_or_default(),
                        missing: None,
                    };
                    channel.send(&ServeReply::Status(status), None)?;
                }
            }
        }
        Ok(())
    }

    /// Serves a new connection, or one that somebody else began; one that is served is left alone.
    fn serve_one(
        self: &Arc<Self>,
        mount: ServedMount,
        fuse: OwnedFd,
    ) -> io::Result<takeover::KernelOffer> {
        let is_resumed = mount.offer.is_some();
        let _beginning = self
            .beginning
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        {
            let mut mounts = self.mounts();
            while mounts.is_handing_over {
                mounts = self
                    .resumed
                    .wait(mounts)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if let Some(served) = mounts.served.get(&mount.device)
                && !takeover::has_ended(&served.fuse)
                && let Some(offer) = served.mount.offer
            {
                return Ok(offer);
            }
            // The kernel gives the number of a mount that has ended to the next one before its session has noticed.
            self.forget(&mut mounts, mount.device);
        }
        let (offer, fuse) = self.begin(mount, fuse)?;
        if is_resumed {
            resend(&fuse);
        }
        failpoint::reached("serve:initialised");
        Ok(offer)
    }

    /// Opens the image and starts to serve it.
    fn begin(
        self: &Arc<Self>,
        mut mount: ServedMount,
        fuse: OwnedFd,
    ) -> io::Result<(takeover::KernelOffer, Arc<OwnedFd>)> {
        let about = |what: &str, err: &dyn std::fmt::Display| {
            io::Error::other(format!("image {}: {what}: {err}", mount.manifest))
        };
        // First, because it may have to make a layer anew.
        self.agent
            .adopt(mount.device, mount.manifest, mount.request.clone());
        let opened = self.open(&mount);
        let (fs, pin) = match opened {
            Ok(opened) => opened,
            Err(err) => {
                self.agent.release(mount.device);
                return Err(about("cannot be served", &err));
            }
        };
        let copy = fuse.try_clone()?;
        let device = mount.device;
        let ended = self
            .ended
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let on_end = Box::new(move || {
            // The reaper lives as long as the process.
            let _ = ended.send(device);
        });
        let started = session::serve(
            Arc::new(fs),
            self.agent.of_mount(device),
            Arc::clone(&self.pool),
            copy,
            mount.offer,
            self.n_threads_per_mount,
            on_end,
        );
        let session = match started {
            Ok(session) => session,
            Err(err) => {
                self.agent.release(device);
                return Err(about("starting its FUSE session", &err));
            }
        };
        let offer = session.offer();
        if mount.offer.is_some() {
            self.metrics.serve_takeovers.inc();
        }
        info!(image.manifest = %mount.manifest, device.minor = device.1, resumed = mount.offer.is_some(),
            "serving a mount");
        mount.offer = Some(offer);
        let fuse = Arc::new(fuse);
        let served = Served {
            mount,
            fuse: Arc::clone(&fuse),
            session,
            _pin: pin,
        };
        self.mounts().served.insert(device, served);
        // It may have ended before it was in the map.
        self.forget_if_ended(device);
        Ok((offer, fuse))
    }

    /// Opens the image's index and layers.
    fn open(&self, mount: &ServedMount) -> io::Result<(ClipFs<MappedFile>, File)> {
        let pin = self.paths.pin_image(mount.manifest)?;
        let index = ImageIndex::open(MappedFile::new(&pin)?).map_err(io::Error::other)?;
        if index.manifest() != mount.manifest {
            return Err(io::Error::other("its index is of another image"));
        }
        let mut layers: Vec<Arc<dyn LayerData>> = Vec::new();
        for at in 0..index.n_layers() {
            let desc = index
                .layer(at)
                .ok_or_else(|| io::Error::other("its index is damaged"))?;
            let dir = self.paths.layer(desc.diff_id);
            let deadline = Instant::now() + LAYER_WAIT;
            let reader = loop {
                match LayerReader::open(&dir, desc.diff_id) {
                    Ok(reader) => break reader,
                    Err(_) if Instant::now() < deadline => thread::sleep(ACCEPT_BACKOFF),
                    Err(err) => {
                        return Err(io::Error::other(format!("layer {}: {err}", desc.diff_id)));
                    }
                }
            };
            let reader = Arc::new(reader);
            self.agent.watch(&reader);
            layers.push(reader);
        }
        let fs = ClipFs::new(index, layers, self.metrics.clone()).map_err(io::Error::other)?;
        Ok((fs, pin))
    }

    /// Has the agent, and each one after it, fetch with the rights of `request`.
    fn renew(&self, device: MountKey, request: ImageRequest) {
        let manifest = {
            let mut mounts = self.mounts();
            let Some(served) = mounts.served.get_mut(&device) else {
                return;
            };
            served.mount.request = request.clone();
            served.mount.manifest
        };
        self.agent.adopt(device, manifest, request);
    }

    fn list(&self, channel: &Channel) -> io::Result<()> {
        let listed: Vec<_> = {
            let mounts = self.mounts();
            let served = mounts.served.values();
            served
                .map(|it| (it.mount.clone(), Arc::clone(&it.fuse)))
                .collect()
        };
        for (mount, fuse) in listed {
            channel.send(&ServeReply::Mount(mount), Some(fuse.as_fd()))?;
        }
        channel.send(&ServeReply::End, None)
    }

    /// Gives a successor all connections. Ends the process when that serves them; goes on if it
    /// does not come to that.
    fn hand_over(&self, channel: &Channel) -> io::Result<()> {
        {
            let mut mounts = self.mounts();
            if mounts.is_handing_over {
                return Err(io::Error::other(
                    "two successors at once: the second one has to wait",
                ));
            }
            mounts.is_handing_over = true;
        }
        info!("a successor asks for the mounts");
        let outcome = self.list(channel).and_then(|()| {
            failpoint::reached("handover:sent");
            channel.set_receive_timeout(Some(PREDECESSOR))?;
            channel.receive::<ServeRequest>()
        });
        if let Ok(Some((ServeRequest::Quit, _))) = outcome {
            info!("the successor serves all mounts");
            // Not a step more: each request that is read from here on would have to be sent again.
            process::exit(HANDED_OVER);
        }
        warn!("the successor gave up: going on");
        self.mounts().is_handing_over = false;
        self.resumed.notify_all();
        // It may have read some requests,
        self.resend_all();
        // and may read more until it is gone, which closes the connection.
        if outcome.is_err() {
            channel.set_receive_timeout(None)?;
            while let Ok(Some(_)) = channel.receive::<ServeRequest>() {}
            self.resend_all();
        }
        outcome.map(|_| ())
    }

    /// Has the kernel send again what others have read; returns of how many mounts.
    fn resend_all(&self) -> usize {
        let served: Vec<_> = {
            let mounts = self.mounts();
            let served = mounts.served.values();
            served.map(|it| Arc::clone(&it.fuse)).collect()
        };
        served.iter().for_each(|it| resend(it));
        served.len()
    }

    /// A new mount may have the device number of one that has ended: that one stays.
    fn forget_if_ended(&self, device: MountKey) {
        let mut mounts = self.mounts();
        let has_ended = |it: &Served| it.session.has_ended();
        if mounts.served.get(&device).is_some_and(has_ended) {
            self.forget(&mut mounts, device);
        }
    }

    /// Forgets a mount that has ended, and has the agent forget it before it is told of another one of that number.
    fn forget(&self, mounts: &mut Mounts, device: MountKey) {
        if let Some(gone) = mounts.served.remove(&device) {
            info!(image.manifest = %gone.mount.manifest, device.minor = device.1, "a mount ended");
            self.agent.release(device);
        }
    }

    /// std Mutex: held for map operations, and while a session is started, which asks nobody but
    /// the kernel.
    fn mounts(&self) -> MutexGuard<'_, Mounts> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn resend(fuse: &OwnedFd) {
    if let Err(err) = takeover::resend(fuse) {
        warn!(error = %err, "the kernel does not send again what a former server had read (it needs Linux 6.9): those readers hang until the mount is aborted");
    }
}

/// Opens the file whose lock says that a server lives. Waits until its directory is there and this
/// user's: another pod of the node makes it, which may come later.
fn open_lock(path: &Path) -> io::Result<File> {
    let mut is_missed = false;
    loop {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let opened = ipc::owner_of_dir(path).and_then(|_| {
            let opened = options.open(path);
            opened.map_err(|err| io::Error::new(err.kind(), format!("{}: {err}", path.display())))
        });
        let err = match opened {
            Ok(lock) => return Ok(lock),
            Err(err) => err,
        };
        match err.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => {}
            _ => return Err(err),
        }
        if !is_missed {
            is_missed = true;
            warn!(error = %err, "waiting until the directory is made and given to this user (clip-csi own)");
        }
        thread::sleep(ACCEPT_BACKOFF);
    }
}

/// Waits until no other server's process lives.
fn wait_for_lock(lock: &File, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    while let Err(err) = flock(lock, FlockOperation::NonBlockingLockExclusive) {
        if err != rustix::io::Errno::WOULDBLOCK {
            return Err(err.into());
        }
        if deadline < Instant::now() {
            return Err(io::Error::other(format!(
                "another server lives and does not hand over within {patience:?}: end it"
            )));
        }
        thread::sleep(LOCK_POLL);
    }
    Ok(())
}

/// Says whether a server's process lives, without waiting for it.
///
/// # Errors
/// Those of the file system.
pub fn is_alive(run: &RunDir) -> io::Result<bool> {
    let lock = match File::open(run.serve_lock()) {
        Ok(lock) => lock,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(err) => return Err(err),
    };
    match flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(true),
        Err(err) => Err(err.into()),
    }
}
