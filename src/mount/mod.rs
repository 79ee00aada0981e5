//! Knows what is mounted where, and binds sources to targets.
