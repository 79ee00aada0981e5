//! Ends the process at a named step, as `kill -9` would, for tests of what a crash leaves behind.
//!
//! `CLIP_CSI_FAILPOINT=step` names one; without it, nothing happens. It is read once, at the start.

use std::sync::OnceLock;

use rustix::process::{Signal, getpid, kill_process};

/// Ends the process if this is the step to end at.
pub(crate) fn reached(step: &str) {
    static CHOSEN: OnceLock<Option<String>> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| std::env::var("CLIP_CSI_FAILPOINT").ok());
    if chosen.as_deref() == Some(step) {
        // It cannot fail; and if it did, the test would say so.
        let _ = kill_process(getpid(), Signal::KILL);
    }
}
