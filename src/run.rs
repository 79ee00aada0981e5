//! Puts the parts together for each run mode.
