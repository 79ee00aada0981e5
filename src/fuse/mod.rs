//! Binds an image's file system to the kernel through fuser; no decisions.
