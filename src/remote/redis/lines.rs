//! Connections on which values pass without a copy, and other commands do not wait behind them.
//!
//! Each carries the requests of one caller at a time. Several values are asked for before the first has
//! come (pipelining), so that together they cost one round trip; what was not read yet waits in the
//! kernel's buffers and in the server's.
//!
//! # Cancellation
//! Safe: a connection in the middle of an answer is dropped with who waited for it.

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use ::redis::{Client, ConnectionAddr};
use tokio::time::timeout;

use super::{
    RedisOptions,
    values::{Line, Refused, command},
};
use crate::{
    remote::gate::time_for,
    tier::{GETS_AHEAD, TierError},
};

/// Idle connections that are kept: as many as there are values at a time.
const MAX_IDLE: usize = 2;

/// Which connection a request goes over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// One that is idle, if there is one.
    Any,
    /// One that is made for it: another one has stalled, and those that are idle may have as well.
    New,
}

/// The connections to one server.
pub(super) struct Lines {
    client: Client,
    options: RedisOptions,
    /// std Mutex: held to take or put one, never across an await.
    idle: Mutex<Vec<Line>>,
}

impl Lines {
    /// Does no I/O.
    pub(super) fn new(client: Client, options: RedisOptions) -> Self {
        Self {
            client,
            options,
            idle: Mutex::default(),
        }
    }

    fn address(&self) -> &ConnectionAddr {
        self.client.get_connection_info().addr()
    }

    /// Runs a command that has a value of `bytes` in it and answers with a word.
    ///
    /// # Errors
    /// [`TierError::Timeout`] and [`TierError::Unavailable`].
    pub(super) async fn put(
        &self,
        words: &[&[u8]],
        bytes: usize,
    ) -> Result<Result<(), Refused>, TierError> {
        let after = time_for(self.options.request_timeout, bytes);
        let mut caller = Caller::new(self, Way::Any);
        loop {
            let mut line = caller.line().await?;
            match timeout(after, line.call(words)).await {
                Ok(Ok(answer)) => {
                    self.keep(line);
                    return Ok(answer);
                }
                Ok(Err(error)) => caller.failed(&error)?,
                Err(_) => return Err(TierError::Timeout { after }),
            }
        }
    }

    /// Asks for the first `max_bytes` of each of the values of `names`, which come in this order.
    pub(super) fn values(&self, names: Vec<String>, max_bytes: usize, way: Way) -> Values<'_> {
        Values {
            caller: Caller::new(self, way),
            line: None,
            names,
            max_bytes,
            n_asked: 0,
            n_got: 0,
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Line>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, line: Line) {
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE {
            idle.push(line);
        }
    }

    async fn connect(&self) -> Result<Line, TierError> {
        let after = self.options.connect_timeout;
        let unavailable = |what: String| TierError::Unavailable {
            reason: format!("{}: {what}", self.address()),
        };
        match timeout(after, Line::connect(self.client.get_connection_info())).await {
            Ok(Ok(Ok(line))) => Ok(line),
            Ok(Ok(Err(Refused(reason)))) => Err(unavailable(format!(
                "{reason} (check the user and the password file)"
            ))),
            Ok(Err(error)) => Err(unavailable(error.to_string())),
            Err(_) => Err(TierError::Timeout { after }),
        }
    }
}

/// Somebody with a request.
///
/// A connection that turns out to be broken is replaced once, because the server may have closed it long
/// ago (idle timeout, restart): that is no failure of this request. All commands here may be repeated.
struct Caller<'a> {
    lines: &'a Lines,
    way: Way,
    /// Whether the connection in use was not closed long ago: it is new, or it has answered.
    is_fresh: bool,
}

impl<'a> Caller<'a> {
    fn new(lines: &'a Lines, way: Way) -> Self {
        Self {
            lines,
            way,
            is_fresh: false,
        }
    }

    /// Takes a connection that is idle, or makes one.
    async fn line(&mut self) -> Result<Line, TierError> {
        if self.way == Way::New {
            self.lines.idle().clear();
        }
        let idle = self.lines.idle().pop();
        self.is_fresh = idle.is_none();
        match idle {
            Some(line) => Ok(line),
            None => self.lines.connect().await,
        }
    }

    /// Hears that the connection is broken, and whether another one is to be taken.
    fn failed(&self, error: &io::Error) -> Result<(), TierError> {
        if self.is_fresh {
            let reason = format!("{}: {error}", self.lines.address());
            return Err(TierError::Unavailable { reason });
        }
        // The others are as old: the next one is made.
        self.lines.idle().clear();
        Ok(())
    }
}

/// Values that were asked for, or will be.
pub(super) struct Values<'a> {
    caller: Caller<'a>,
    /// Between two values, with those on their way that were asked for and did not come yet.
    line: Option<Line>,
    names: Vec<String>,
    max_bytes: usize,
    n_asked: usize,
    n_got: usize,
}

impl Values<'_> {
    /// Waits for the next value; an empty one may also be none. `None` after the last.
    ///
    /// # Errors
    /// [`TierError::Timeout`] and [`TierError::Unavailable`]; what is asked for afterwards is asked for on
    /// another connection.
    pub(super) async fn next(&mut self) -> Option<Result<Result<Vec<u8>, Refused>, TierError>> {
        if self.n_got == self.names.len() {
            return None;
        }
        let value = self.try_next().await;
        self.n_got += 1;
        if self.n_asked == self.n_got
            && let Some(line) = self.line.take()
        {
            self.caller.lines.keep(line);
        }
        Some(value)
    }

    async fn try_next(&mut self) -> Result<Result<Vec<u8>, Refused>, TierError> {
        let after = time_for(self.caller.lines.options.request_timeout, self.max_bytes);
        loop {
            // Whatever ends this early leaves no line in the middle of an answer.
            let mut line = match self.line.take() {
                Some(line) => line,
                None => {
                    self.n_asked = self.n_got;
                    self.caller.line().await?
                }
            };
            let ask_until = self.names.len().min(self.n_got + GETS_AHEAD);
            let asked: Vec<u8> = self.names[self.n_asked..ask_until]
                .iter()
                .flat_map(|name| get_range(name, self.max_bytes))
                .collect();
            let got = timeout(after, async {
                line.write(&asked).await?;
                line.value(self.max_bytes).await
            });
            match got.await {
                Ok(Ok(value)) => {
                    self.caller.is_fresh = true;
                    self.n_asked = ask_until;
                    self.line = Some(line);
                    return Ok(value);
                }
                Ok(Err(error)) => self.caller.failed(&error)?,
                Err(_) => return Err(TierError::Timeout { after }),
            }
        }
    }
}

/// Asks for so many bytes from the start of a value on, at most: no longer value ever crosses the network,
/// whatever the server holds.
fn get_range(name: &str, max_bytes: usize) -> Vec<u8> {
    // The last byte's number, which is included.
    let last = max_bytes.saturating_sub(1).to_string();
    command(&[b"GETRANGE", name.as_bytes(), b"0", last.as_bytes()])
}
