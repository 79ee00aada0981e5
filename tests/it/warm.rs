//! An image is put into the remote content cache once, and every node takes it from there.

mod fill;
mod readers;
mod seed;
mod world;
