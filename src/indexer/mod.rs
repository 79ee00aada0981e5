//! Builds an image's index from its layers.
