//! Serves the Container Storage Interface: Identity and Node.
