//! Fetches values that are wanted together: asked for together, each admitted and let through in its turn.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};

use super::{Gate, Got, Op, Refusal};
use crate::{
    fair::Claimant,
    remote::format::FormatError,
    tier::{BoxStream, CacheKey},
};

/// How long what was asked for ahead may wait until it is read.
const STALE: Duration = Duration::from_secs(2);

/// Values that are asked for together.
pub(in crate::remote) struct Run<'a> {
    gate: &'a Gate,
    who: Claimant,
    values: BoxStream<'a, Got>,
    /// Of those that did not come yet.
    keys: VecDeque<CacheKey>,
    max_bytes: usize,
}

impl Gate {
    /// Fetches the values of `keys` in their order; each waits for its turn, so that others have theirs
    /// between two of them.
    pub(in crate::remote) fn get_each(
        &self,
        who: Claimant,
        keys: Vec<CacheKey>,
        max_bytes: usize,
    ) -> Run<'_> {
        Run {
            gate: self,
            who,
            values: self.backend.get_each(keys.clone(), max_bytes),
            keys: keys.into(),
            max_bytes,
        }
    }
}

impl Run<'_> {
    /// Fetches the next value, and returns what `verify` makes of it, on the blocking pool. `None` after the
    /// last.
    pub(in crate::remote) async fn next<T: Send + 'static>(
        &mut self,
        verify: impl FnOnce(Bytes) -> Result<T, FormatError> + Send + 'static,
    ) -> Option<Result<Option<T>, Refusal>> {
        let gate = self.gate;
        self.keys.front()?;
        let asked = Instant::now();
        let turn = gate.payloads.take(self.who).await;
        if STALE <= asked.elapsed() {
            // What was asked for ahead has waited with it, and servers do not wait for ever.
            self.ask_again();
        }
        let key = self.keys.pop_front()?;
        let ticket = match gate.admit(Op::Get) {
            Ok(ticket) => ticket,
            Err(refusal) => return Some(Err(refusal)),
        };
        let started = ticket.started;
        let wait = gate.hedges(self.who, &ticket);
        let got = {
            let mut values = self.values.next().map(|it| it.unwrap_or(Ok(None)));
            match wait {
                None => (values.await, false),
                Some(wait) => {
                    gate.hedged(&mut values, wait, self.who, key, self.max_bytes)
                        .await
                }
            }
        };
        let (got, is_second) = got;
        if is_second {
            // What is behind the value that does not come does not come either.
            self.ask_again();
        }
        if wait.is_some() {
            gate.note(started, &got);
        }
        Some(gate.received(ticket, started, got, turn, verify).await)
    }

    /// Asks for what did not come yet, on another connection.
    fn ask_again(&mut self) {
        let keys = self.keys.iter().copied().collect();
        self.values = self.gate.backend.get_each(keys, self.max_bytes);
    }
}
