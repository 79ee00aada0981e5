//! The merged tree of an image, as data: no I/O, no runtime.
