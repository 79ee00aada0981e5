//! Reads of a disk that takes or gives nothing: they are answered past it, a few chunks at a time.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::{Arc, atomic::Ordering},
};

use clip_csi::tier::lent::MAX_LENT;

use super::{BIG, errno};
use crate::fuse_fakes::{DEADLINE, LayerText, Mode, mount_image, noise, within_deadline};

/// A layer with a file `big` whose chunks do not end where its pages do, as in most: then a read of 1 MiB
/// can need three of them.
fn big_file(seed: u64) -> (LayerText, Vec<u8>) {
    let content = noise(BIG, seed);
    let mut layer = LayerText::default();
    layer.file("small", &content[..100]);
    layer.file("big", &content);
    (layer, content)
}

#[test]
fn a_full_disk_fails_no_read() {
    let (layer, content) = big_file(1);
    let Some(mounted) = mount_image("a_full_disk_fails_no_read", vec![layer]) else {
        return;
    };
    let layer = &mounted.layers[0];
    layer.set_mode(Mode::Full);
    // What is cached is read beside what is not, also by one read: 1 MiB from the end of chunk 0 on.
    layer.fill(1);
    let direct = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(mounted.path("big"))
        .unwrap();
    let (offset, mut space) = (1_040_384, vec![0; (1 << 20) + 4096]);
    // A buffer that begins within a page would make two reads of it.
    let at = space.as_ptr().align_offset(4096);
    let buf = &mut space[at..at + (1 << 20)];
    assert_eq!(direct.read_at(buf, offset as u64).unwrap(), buf.len());
    assert!(*buf == content[offset..offset + (1 << 20)]);
    assert_eq!(layer.lendings.lock().unwrap().n, 2, "chunks 0 and 2");
    assert!(fs::read(mounted.path("big")).unwrap() == content);
    assert_eq!(mounted.n_requests("read", "error"), 0);
    assert_eq!(layer.n_present(), 1, "nothing was written");
    // There is room again.
    layer.set_mode(Mode::Fill);
    let n = layer.lendings.lock().unwrap().n;
    let mut buf = vec![0; 4096];
    direct.read_at(&mut buf, 0).unwrap();
    assert!(buf == content[..4096] && layer.n_present() == 2);
    assert_eq!(layer.lendings.lock().unwrap().n, n);
}

#[test]
fn readers_of_a_full_disk_take_turns() {
    let (layer, content) = big_file(2);
    let Some(mounted) = mount_image("readers_of_a_full_disk_take_turns", vec![layer]) else {
        return;
    };
    let layer = &mounted.layers[0];
    layer.set_mode(Mode::Full);
    let content = Arc::new(content);
    let readers: Vec<_> = (0..16)
        .map(|at| {
            let (path, content) = (mounted.path("big"), content.clone());
            within_deadline(move || {
                let direct = File::options()
                    .read(true)
                    .custom_flags(libc::O_DIRECT)
                    .open(path)
                    .unwrap();
                // Reads of up to three chunks, in another order for each.
                (0..8).all(|n| {
                    let offset = (n * 5 + at * 3) % 9 * 512_000;
                    let mut buf = vec![0; 1 << 20];
                    let len = direct.read_at(&mut buf, offset as u64).unwrap();
                    let end = (offset + buf.len()).min(BIG);
                    buf[..len] == content[offset..end]
                })
            })
        })
        .collect();
    for reader in readers {
        assert!(reader.recv_timeout(DEADLINE).unwrap());
    }
    let n_at_once = layer.lendings.lock().unwrap().n_at_once;
    assert_eq!(n_at_once as usize, MAX_LENT, "all turns were used, no more");
    assert_eq!(mounted.n_requests("read", "error"), 0);
}

#[test]
fn what_the_disk_cannot_give_back_is_lent_and_fetched_anew() {
    let (layer, content) = big_file(3);
    let Some(mounted) = mount_image("what_the_disk_cannot_give_back_is_lent", vec![layer]) else {
        return;
    };
    let layer = &mounted.layers[0];
    layer.fill_all();
    layer.is_broken.store(true, Ordering::Relaxed);
    assert!(fs::read(mounted.path("big")).unwrap() == content);
    assert_eq!(mounted.n_requests("read", "error"), 0);
    assert!(0 < mounted.n_disk_reads("error"));
    assert!(0 < layer.lendings.lock().unwrap().n);
}

#[test]
fn what_nobody_can_lend_is_an_error_and_holds_no_turn() {
    let (layer, content) = big_file(4);
    let Some(mounted) = mount_image("what_nobody_can_lend_is_an_error", vec![layer]) else {
        return;
    };
    let layer = &mounted.layers[0];
    layer.fill_all();
    layer.is_broken.store(true, Ordering::Relaxed);
    layer.set_mode(Mode::Fail);
    let file = File::open(mounted.path("big")).unwrap();
    let mut buf = [0; 100];
    // More often than there are turns.
    for _ in 0..2 * MAX_LENT {
        assert_eq!(errno(file.read_at(&mut buf, 10)), Some(libc::EIO));
    }
    layer.set_mode(Mode::Full);
    assert_eq!(file.read_at(&mut buf, 10).unwrap(), 100);
    assert_eq!(buf, content[10..110]);
}
