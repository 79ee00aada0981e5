//! The `clip-csi` program.

fn main() {
    clip_csi::sys::tune_allocator();
}
