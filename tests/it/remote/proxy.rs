//! A TCP proxy that sees what is asked for, and holds answers back.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::Notify,
    task::JoinSet,
};

/// Passes connections on to a port of this machine, until it is dropped.
pub(super) struct Proxy {
    pub(super) port: u16,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct State {
    /// All that clients have said.
    asked: Mutex<Vec<u8>>,
    n_connections: AtomicUsize,
    /// No answer passes on the first ones.
    n_held: AtomicUsize,
    changed: Notify,
}

impl Proxy {
    pub(super) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (own_port, state) = (
            listener.local_addr().unwrap().port(),
            Arc::<State>::default(),
        );
        let mut tasks = JoinSet::new();
        let shared = Arc::clone(&state);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let far = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let number = shared.n_connections.fetch_add(1, Ordering::SeqCst);
                let (near_in, near_out) = near.into_split();
                let (far_in, far_out) = far.into_split();
                connections.spawn(Arc::clone(&shared).ask(near_in, far_out));
                connections.spawn(Arc::clone(&shared).answer(number, far_in, near_out));
            }
        });
        Self {
            port: own_port,
            state,
            _tasks: tasks,
        }
    }

    /// Has no answer pass from now on, or all that wait and come.
    pub(super) fn hold(&self, holds: bool) {
        self.hold_first(if holds { usize::MAX } else { 0 });
    }

    /// Has no answer pass on the connections that there are and on so many that are made next, but on all
    /// others.
    pub(super) fn stall(&self, n_more: usize) {
        self.hold_first(self.n_connections() + n_more);
    }

    fn hold_first(&self, n: usize) {
        self.state.n_held.store(n, Ordering::SeqCst);
        self.state.changed.notify_waiters();
    }

    /// How often clients have said `word`.
    pub(super) fn n_asked(&self, word: &str) -> usize {
        let asked = self.state.asked.lock().unwrap();
        let windows = asked.windows(word.len());
        windows.filter(|it| *it == word.as_bytes()).count()
    }

    pub(super) fn n_connections(&self) -> usize {
        self.state.n_connections.load(Ordering::SeqCst)
    }
}

impl State {
    async fn ask(self: Arc<Self>, mut from: tcp::OwnedReadHalf, mut to: tcp::OwnedWriteHalf) {
        let mut piece = vec![0; 1 << 16];
        while let Ok(len @ 1..) = from.read(&mut piece).await {
            self.asked.lock().unwrap().extend(&piece[..len]);
            if to.write_all(&piece[..len]).await.is_err() {
                return;
            }
        }
    }

    async fn answer(
        self: Arc<Self>,
        number: usize,
        mut from: tcp::OwnedReadHalf,
        mut to: tcp::OwnedWriteHalf,
    ) {
        let mut piece = vec![0; 1 << 16];
        while let Ok(len @ 1..) = from.read(&mut piece).await {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if self.n_held.load(Ordering::SeqCst) <= number {
                    break;
                }
                changed.await;
            }
            if to.write_all(&piece[..len]).await.is_err() {
                return;
            }
        }
    }
}
