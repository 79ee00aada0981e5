//! Parses tar archives as they stream by: one parser for every layer, pure, no I/O.
