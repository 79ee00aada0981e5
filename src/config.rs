//! The configuration: defaults, file, command line, in this order.
