//! Checks the parser as a whole.
