use std::{
    collections::VecDeque,
    io::{Read, Seek, Write},
};

use tokio::sync::oneshot;

use super::*;
use crate::{layer::CacheConfig, metrics::Metrics, mount::PullCredentials};

const DEVICE: MountKey = (0, 7);

/// Where it is said that an image is opened, or is not.
type Gate = oneshot::Receiver<Result<(), PrepareError>>;

/// Opens an image when it is told to, by the name that it was asked for with.
#[derive(Debug, Default)]
struct Gated {
    gates: Mutex<HashMap<String, VecDeque<Gate>>>,
}

impl Gated {
    /// Has the image opened once more, when the result says so.
    fn gate(&self, image: &str) -> oneshot::Sender<Result<(), PrepareError>> {
        let (sender, gate) = oneshot::channel();
        let mut gates = self.gates.lock().unwrap();
        gates.entry(image.to_owned()).or_default().push_back(gate);
        sender
    }
}

impl Images for Gated {
    fn prepare<'a>(
        &'a self,
        _: &'a ImageRequest,
        _: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<(ReadyImage, Held), PrepareError>> {
        Box::pin(std::future::pending())
    }

    fn adopt<'a>(
        &'a self,
        _: ManifestDigest,
        request: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<Held, PrepareError>> {
        let mut gates = self.gates.lock().unwrap();
        let gate = gates.get_mut(&request.image).unwrap().pop_front().unwrap();
        Box::pin(async move {
            gate.await.unwrap()?;
            let mut index = tempfile::tempfile().unwrap();
            index.write_all(request.image.as_bytes()).unwrap();
            Ok(Held {
                index: Some(index),
                ..Held::default()
            })
        })
    }
}

/// An agent, and one connection to it.
struct World {
    images: Arc<Gated>,
    agent: Agent,
    channel: Arc<Channel>,
    adopted: Adopted,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = CacheConfig {
            dir: dir.path().join("cache"),
            ..CacheConfig::default()
        };
        let runtime = Handle::current();
        let store = LayerStore::open(config, None, Metrics::new(), runtime.clone()).unwrap();
        let images = Arc::<Gated>::default();
        let path = dir.path().join("agent.sock");
        let _listener = Listener::bind(&path).unwrap();
        Self {
            agent: Agent::new(Arc::clone(&images) as _, store, runtime),
            images,
            channel: Arc::new(Channel::connect(&path).unwrap()),
            adopted: Adopted::default(),
            _dir: dir,
        }
    }

    fn ask(&self, request: AgentRequest) {
        self.agent.obey(request, &self.channel, &self.adopted);
    }

    /// Has the image adopted, which lasts until the result says how it ends.
    fn adopt(&self, image: &str) -> oneshot::Sender<Result<(), PrepareError>> {
        let sender = self.images.gate(image);
        self.ask(AgentRequest::Adopt {
            device: DEVICE,
            manifest: ManifestDigest::of(image.as_bytes()),
            request: ImageRequest {
                image: image.to_owned(),
                platform: None,
                index_digest: None,
                prefetch: None,
                pull_policy: None,
                insecure: false,
                credentials: PullCredentials::None,
                pod: None,
            },
        });
        sender
    }

    /// Ends an adoption, and waits until it has: of as many there are `n_left` then.
    async fn end(
        &self,
        one: oneshot::Sender<Result<(), PrepareError>>,
        how: Result<(), PrepareError>,
        n_left: usize,
    ) {
        one.send(how).unwrap();
        while 1 + n_left < Arc::strong_count(&self.adopted) {
            tokio::task::yield_now().await;
        }
    }

    /// The image that is held for the mount.
    fn held(&self) -> Option<String> {
        let adoptions = lock(&self.adopted);
        let mut index = adoptions.mounts.get(&DEVICE)?.held.index.as_ref()?;
        let mut text = String::new();
        index.rewind().unwrap();
        index.read_to_string(&mut text).unwrap();
        Some(text)
    }
}

fn refused() -> PrepareError {
    PrepareError::NotPresent
}

#[tokio::test]
async fn a_late_adoption_is_not_for_the_next_mount_with_its_number() {
    let world = World::new();
    let former = world.adopt("former");
    world.ask(AgentRequest::Release { device: DEVICE });
    let now = world.adopt("now");
    world.end(now, Ok(()), 1).await;
    assert_eq!(world.held().as_deref(), Some("now"));
    world.end(former, Ok(()), 0).await;
    assert_eq!(world.held().as_deref(), Some("now"));
    // Nor if it ends before the next one's, which fails.
    world.ask(AgentRequest::Release { device: DEVICE });
    let former = world.adopt("former");
    world.ask(AgentRequest::Release { device: DEVICE });
    let now = world.adopt("now");
    world.end(former, Ok(()), 1).await;
    assert_eq!(world.held(), None);
    world.end(now, Err(refused()), 0).await;
    assert_eq!(world.held(), None);
}

#[tokio::test]
async fn what_may_succeed_later_is_tried_again_while_the_mount_is_there() {
    let away = || PrepareError::Away {
        reason: String::new(),
    };
    let world = World::new();
    let first = world.adopt("app");
    let again = world.images.gate("app");
    first.send(Err(away())).unwrap();
    again.send(Ok(())).unwrap();
    while world.held().as_deref() != Some("app") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Once it is gone, nobody does: there is nothing to be opened with that name.
    let last = world.adopt("gone");
    world.ask(AgentRequest::Release { device: DEVICE });
    world.end(last, Err(away()), 0).await;
    // Nor with rights that others have taken the place of.
    let (old, new) = (world.adopt("old"), world.adopt("new"));
    world.end(old, Err(away()), 1).await;
    world.end(new, Ok(()), 0).await;
    assert_eq!(world.held().as_deref(), Some("new"));
}

#[tokio::test]
async fn of_two_adoptions_of_a_mount_the_newer_one_counts_that_is_found_good() {
    let world = World::new();
    let (old, new) = (world.adopt("old"), world.adopt("new"));
    world.end(new, Ok(()), 1).await;
    world.end(old, Ok(()), 0).await;
    assert_eq!(world.held().as_deref(), Some("new"));
    let (old, new) = (world.adopt("newer"), world.adopt("newest"));
    world.end(new, Err(refused()), 1).await;
    assert_eq!(world.held().as_deref(), Some("new"));
    world.end(old, Ok(()), 0).await;
    assert_eq!(world.held().as_deref(), Some("newer"));
    world.ask(AgentRequest::Release { device: DEVICE });
    assert_eq!(world.held(), None);
}
