//! Generated gRPC code of the Container Storage Interface.
