//! The command line: what a user may type.
