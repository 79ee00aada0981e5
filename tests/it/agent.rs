//! The agent's answers to the node service.

use std::{mem::discriminant, sync::Arc, time::Duration};

use clip_csi::{
    digest::{DiffId, ManifestDigest},
    ipc::{Channel, Listener},
    metrics::Metrics,
    mount::{ImageRequest, PrepareError, Progress, PullCredentials},
    roles::{
        agent::{Agent, Held, Images},
        protocol::{AgentReply, AgentRequest, ReadyImage},
    },
    tier::{BoxFuture, PresentError, SourceError},
};
use tokio::runtime::Handle;

use crate::layer_fixture;

/// Longer than any pause, on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Has no image, for a reason.
#[derive(Debug)]
struct Failing(PrepareError);

impl Images for Failing {
    fn prepare<'a>(
        &'a self,
        _: &'a ImageRequest,
        _: &'a Arc<Progress>,
    ) -> BoxFuture<'a, Result<(ReadyImage, Held), PrepareError>> {
        Box::pin(async { Err(self.0.clone()) })
    }

    fn adopt<'a>(
        &'a self,
        _: ManifestDigest,
        _: &'a ImageRequest,
    ) -> BoxFuture<'a, Result<Held, PrepareError>> {
        Box::pin(std::future::pending())
    }
}

/// What a node service is told that asks an agent for an image.
fn asked(failing: Failing) -> PrepareError {
    let dir = tempfile::tempdir().unwrap();
    let store = layer_fixture::open(dir.path(), None, &Metrics::new());
    let run_dir = tempfile::tempdir().unwrap();
    let path = run_dir.path().join("agent.sock");
    let listener = Listener::bind(&path).unwrap();
    let agent = Agent::new(Arc::new(failing), store, Handle::current());
    std::thread::spawn(move || agent.serve(&listener));
    let channel = Channel::connect(&path).unwrap();
    channel.set_receive_timeout(Some(PATIENCE)).unwrap();
    let request = ImageRequest {
        image: "r.x/a".to_owned(),
        platform: None,
        index_digest: None,
        prefetch: None,
        pull_policy: None,
        insecure: false,
        credentials: PullCredentials::None,
        pod: None,
    };
    channel.send(&AgentRequest::Prepare(request), None).unwrap();
    let (reply, _) = channel
        .receive()
        .unwrap()
        .expect("the connection was closed unanswered");
    match reply {
        AgentReply::Prepared(outcome) => outcome.unwrap_err(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_error_of_any_length_arrives_as_what_it_is() {
    let reason = || "x…".repeat(100 << 10);
    let layer = DiffId::of(b"layer");
    let protocol = || SourceError::Protocol {
        registry: "r.x".to_owned(),
        reason: reason(),
    };
    for error in [
        PrepareError::Source(protocol()),
        PrepareError::Present(PresentError::Origin {
            layer,
            source: protocol(),
        }),
        PrepareError::Present(PresentError::Refused {
            layer,
            reason: reason(),
        }),
        PrepareError::Invalid {
            field: "image".into(),
            reason: reason(),
        },
        PrepareError::Refused { reason: reason() },
        PrepareError::Away { reason: reason() },
        PrepareError::Internal { reason: reason() },
    ] {
        let failing = Failing(error.clone());
        let told = tokio::task::spawn_blocking(|| asked(failing))
            .await
            .unwrap();
        assert_eq!(discriminant(&told), discriminant(&error), "{told}");
        if let (PrepareError::Source(told), PrepareError::Source(source)) = (&told, &error) {
            assert_eq!(discriminant(told), discriminant(source));
        }
        if let (PrepareError::Present(told), PrepareError::Present(present)) = (&told, &error) {
            assert_eq!(discriminant(told), discriminant(present));
        }
    }
}
