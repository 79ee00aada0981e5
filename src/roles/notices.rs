//! What the node service wants operators to see, kept until the agent, which has the network, takes it.

use std::sync::{Mutex, PoisonError};

use super::protocol::Notice;

/// Notices that are kept; of more, the latest are of no use.
const MAX_NOTICES: usize = 32;

/// The notices that nobody has taken yet.
#[derive(Debug, Default)]
pub struct Notices(Mutex<Vec<Notice>>);

impl Notices {
    /// Adds one.
    pub fn add(&self, reason: &str, message: String) {
        // std Mutex: held to push or take.
        let mut notices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.len() < MAX_NOTICES {
            notices.push(Notice {
                reason: reason.to_owned(),
                message,
            });
        }
    }

    /// Takes all.
    pub fn take(&self) -> Vec<Notice> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
