//! What the link does when the agent dies, works, or knows nothing.

use std::os::fd::AsFd;

use super::*;
use crate::ipc::Listener;

/// Longer than anything here takes, on any machine.
const DEADLINE: Duration = Duration::from_secs(20);

fn request(image: String) -> ImageRequest {
    ImageRequest {
        image,
        platform: None,
        index_digest: None,
        prefetch: None,
        pull_policy: None,
        insecure: false,
        credentials: crate::mount::PullCredentials::None,
        pod: None,
    }
}

fn received(agent: &Channel) -> AgentRequest {
    agent.receive().unwrap().unwrap().0
}

#[test]
fn what_was_not_answered_is_asked_of_the_next_agent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let link = AgentLink::start(path.clone()).unwrap();
    let (layer, manifest) = (DiffId::of(b"layer"), ManifestDigest::of(b"image"));
    link.adopt((0, 7), manifest, request("r.x/app".to_owned()));
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

/// A link, an agent that it is connected to, and where that listens.
fn connected() -> (Arc<AgentLink>, Channel, (Listener, tempfile::TempDir)) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let listener = Listener::bind(&path).unwrap();
    let link = AgentLink::start(path).unwrap();
    let agent = listener.accept().unwrap();
    agent.set_receive_timeout(Some(DEADLINE)).unwrap();
    (link, agent, (listener, dir))
}

/// Has the agent asked for two chunks: with which ticket, and where it is told what came of it.
fn asked(
    link: &Arc<AgentLink>,
    agent: &Channel,
) -> (u64, mpsc::Receiver<Result<(), PresentError>>) {
    let (sender, outcome) = mpsc::channel();
    let done = Box::new(move |it| sender.send(it).unwrap());
    let layer = DiffId::of(b"layer");
    link.of_mount((0, 7)).make_present(layer, 2..4, done);
    let AgentRequest::Present { ticket, .. } = received(agent) else {
        panic!("chunks are asked for");
    };
    (ticket, outcome)
}

#[test]
fn an_agent_that_works_is_waited_for_and_no_other() {
    let (link, agent, place) = connected();
    let too_late = || Instant::now() + 2 * PATIENCE;
    let is_given_up = |outcome: &mpsc::Receiver<_>| {
        matches!(
            outcome.recv_timeout(DEADLINE),
            Ok(Err(PresentError::Timeout { .. }))
        )
    };
    let (_, of_working) = asked(&link, &agent);
    let (ticket, of_ignorant) = asked(&link, &agent);
    let layer = DiffId::of(b"layer");
    let outcome = Err(PresentError::Unknown { layer });
    agent
        .send(&AgentReply::Present { ticket, outcome }, None)
        .unwrap();
    // It is asked again.
    assert!(matches!(received(&agent), AgentRequest::Present { ticket: it, .. } if it == ticket));
    link.give_up(too_late());
    assert!(is_given_up(&of_ignorant));
    assert!(of_working.try_recv().is_err(), "it is waited for");
    // Nobody listens any more.
    drop((place, agent));
    while link.state().channel.is_some() {
        thread::yield_now();
    }
    link.give_up(too_late());
    assert!(is_given_up(&of_working));
}

#[test]
fn a_request_that_is_too_long_harms_no_other() {
    let (link, agent, _place) = connected();
    for (device, image) in [
        ((0, 1), "x".repeat(1 << 20)),
        ((0, 2), "r.x/app".to_owned()),
    ] {
        link.adopt(device, ManifestDigest::of(b"image"), request(image));
    }
    assert!(matches!(
        received(&agent),
        AgentRequest::Adopt { device: (0, 2), .. }
    ));
    asked(&link, &agent);
}

#[test]
fn what_the_agent_lends_is_taken_only_if_it_is_the_chunk_and_sealed() {
    let (link, agent, _place) = connected();
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
