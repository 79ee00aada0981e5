//! Readers that wait for a layer's stream: for their sake it does not wait its turn as one that nobody wants yet.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

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
