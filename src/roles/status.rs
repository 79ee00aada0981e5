//! Asks the roles how they are, and answers for the node service.

use std::{io, path::Path, thread, time::Duration};

use tracing::{debug, warn};

use super::{
    notices::Notices,
    protocol::{NodeRequest, Notice, ServeReply, ServeRequest, Status},
};
use crate::ipc::{Channel, Listener};

/// How long a role may take to say how it is: less than a scrape or a probe waits.
const ANSWER: Duration = Duration::from_secs(2);

/// How long to wait when no connection can be accepted.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Asks the server.
///
/// # Errors
/// Those of the connection: it is not there, or hangs.
pub fn of_server(socket: &Path) -> io::Result<Status> {
    let channel = Channel::connect(socket)?;
    channel.set_receive_timeout(Some(ANSWER))?;
    channel.send(&ServeRequest::Status, None)?;
    match channel.receive()? {
        Some((ServeReply::Status(status), _)) => Ok(status),
        Some(_) => Err(io::Error::other("the server answered something else")),
        None => Err(io::ErrorKind::ConnectionReset.into()),
    }
}

/// Asks the node service.
///
/// # Errors
/// Those of the connection: it is not there, or hangs.
pub fn of_node(socket: &Path) -> io::Result<Status> {
    let channel = Channel::connect(socket)?;
    channel.set_receive_timeout(Some(ANSWER))?;
    channel.send(&NodeRequest::Status, None)?;
    let answer = channel.receive()?;
    answer
        .map(|(status, _)| status)
        .ok_or_else(|| io::ErrorKind::ConnectionReset.into())
}

/// Takes what the node service wants operators to see.
///
/// # Errors
/// Those of the connection: it is not there, or hangs.
pub fn take_notices(socket: &Path) -> io::Result<Vec<Notice>> {
    let channel = Channel::connect(socket)?;
    channel.set_receive_timeout(Some(ANSWER))?;
    channel.send(&NodeRequest::TakeNotices, None)?;
    let answer = channel.receive()?;
    Ok(answer.map(|(notices, _)| notices).unwrap_or_default())
}

/// Answers for the node service, for ever.
///
/// # Blocking
/// For ever: give it a thread.
pub fn serve_node(listener: &Listener, notices: &Notices, status: impl Fn() -> Status) {
    loop {
        let answered = listener.accept().and_then(|channel| {
            channel.set_receive_timeout(Some(ANSWER))?;
            while let Some((request, _)) = channel.receive()? {
                match request {
                    NodeRequest::Status => channel.send(&status(), None)?,
                    NodeRequest::TakeNotices => channel.send(&notices.take(), None)?,
                }
            }
            Ok(())
        });
        match answered {
            Ok(()) => {}
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                debug!("a connection that asked nothing was closed");
            }
            Err(err) => {
                warn!(error = %err, "a connection broke");
                thread::sleep(ACCEPT_BACKOFF);
            }
        }
    }
}
