//! Readers that wait for a layer's stream: for their sake it does not wait its turn as one that nobody wants yet.
//! And what they are told while it waits.

use std::{
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use tokio::sync::{Notify, watch};

use super::store::RefillState;
use crate::tier::PresentError;

/// How often those who wait for bytes hear that these wait for their turn: less than a stall may last, which is
/// in seconds.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Those of one layer.
#[derive(Debug, Default)]
pub(super) struct Riders {
    n: AtomicUsize,
    came: Notify,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Riding<'a>(&'a Riders);

impl Riders {
    pub(super) fn enter(&self) -> Riding<'_> {
        self.n.fetch_add(1, Ordering::SeqCst);
        self.came.notify_one();
        Riding(self)
    }

    /// Waits until there is one.
    ///
    /// # Cancellation
    /// Safe.
    pub(super) async fn some(&self) {
        // One that has gone may have left its word.
        while self.n.load(Ordering::SeqCst) == 0 {
            self.came.notified().await;
        }
    }
}

/// Waits for `turn`, and tells those who wait for what comes of it that nothing has stalled: whoever holds the
/// turn has deadlines of their own.
///
/// # Cancellation
/// As for `turn`.
pub(super) async fn telling<T>(
    progress: &watch::Sender<RefillState>,
    turn: impl Future<Output = T>,
) -> T {
    let mut turn = pin!(turn);
    loop {
        match tokio::time::timeout(TELL_EVERY, turn.as_mut()).await {
            Ok(turn) => return turn,
            Err(_) => progress.send_replace(RefillState::Running),
        };
    }
}

/// Waits until a refill has ended.
pub(super) async fn streamed(
    mut progress: watch::Receiver<RefillState>,
) -> Result<(), PresentError> {
    loop {
        match progress.borrow_and_update().clone() {
            RefillState::Running => {}
            RefillState::Done => return Ok(()),
            RefillState::Failed(err) => return Err(err),
        }
        if progress.changed().await.is_err() {
            return Ok(());
        }
    }
}

impl Drop for Riding<'_> {
    fn drop(&mut self) {
        self.0.n.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn who_has_gone_is_waited_for_no_more() {
        let riders = Riders::default();
        drop(riders.enter());
        let mut waiting = Box::pin(riders.some());
        assert_eq!(waiting.as_mut().now_or_never(), None);
        let _rider = riders.enter();
        assert_eq!(waiting.as_mut().now_or_never(), Some(()));
        assert_eq!(riders.some().now_or_never(), Some(()));
    }
}
