//! Answers file system questions about an image, without a kernel.
