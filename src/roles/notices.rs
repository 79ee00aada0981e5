//! What the node service wants operators to see, kept until the agent, which has the network, takes it.

use std::sync::{Mutex, PoisonError};

use super::protocol::Notice;
use crate::mount::PodNotice;

/// Notices that are kept; of more, the latest are of no use.
const MAX_NOTICES: usize = 64;

/// The notices that nobody has taken yet.
#[derive(Debug, Default)]
pub struct Notices(Mutex<Vec<Notice>>);

impl Notices {
    /// Adds one about the node.
    pub fn add(&self, reason: &str, message: String) {
        self.push(Notice {
            reason: reason.to_owned(),
            message,
            pod: None,
        });
    }

    /// Adds one about a pod.
    pub fn add_of_pod(&self, notice: PodNotice) {
        self.push(Notice {
            reason: notice.reason.to_owned(),
            message: notice.message,
            pod: Some(notice.pod),
        });
    }

    fn push(&self, notice: Notice) {
        // std Mutex: held to push or take.
        let mut notices = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.len() < MAX_NOTICES {
            notices.push(notice);
        }
    }

    /// Takes all.
    pub fn take(&self) -> Vec<Notice> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
