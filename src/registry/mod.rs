//! Reads images from OCI registries.
