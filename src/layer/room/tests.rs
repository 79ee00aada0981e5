use std::fs::{self, File};

use super::*;
use crate::digest::ManifestDigest;

const MIB: u64 = 1 << 20;

/// A cache that has nothing but the index of an image, of a megabyte.
struct World {
    room: Room,
    index: File,
    dir: tempfile::TempDir,
}

impl World {
    fn new(max_bytes: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = CachePaths::new(dir.path());
        let path = paths.image(ManifestDigest::of(b"image"));
        fs::create_dir_all(paths.images()).unwrap();
        disk::publish(&path, &vec![7; 1 << 20]).unwrap();
        let config = CacheConfig {
            dir: dir.path().to_owned(),
            max_bytes,
            min_free_bytes: 0,
            min_free_inodes: 0,
            ..CacheConfig::default()
        };
        let metrics = Metrics::new();
        let room = Room::new(paths, &config, metrics, Handle::current()).unwrap();
        let index = File::open(path).unwrap();
        Self { room, index, dir }
    }

    /// As who has the image open.
    fn pin(&self) {
        assert!(crate::layer::lock::try_pin(&self.index).unwrap());
    }

    fn unpin(&self) {
        rustix::fs::flock(&self.index, rustix::fs::FlockOperation::Unlock).unwrap();
    }

    /// What the cache is taken to have, and how many indexes it has.
    fn found(&self) -> (u64, usize) {
        let n_images = fs::read_dir(self.dir.path().join("images"))
            .unwrap()
            .count();
        (self.room.used_bytes(), n_images)
    }
}

#[tokio::test]
async fn the_index_of_an_image_in_use_takes_its_room_still() {
    // What comes would fit if it went.
    let world = World::new(MIB + MIB / 2);
    let used_bytes = world.room.used_bytes();
    assert!(MIB <= used_bytes);
    let claim = Claim::Publish { coming_bytes: MIB };
    world.pin();
    assert_eq!(world.room.make(claim), Err(Bound::Capacity));
    assert_eq!(world.found(), (used_bytes, 1));
    assert!(world.room.was_in_vain());
    world.unpin();
    assert_eq!(world.room.make(claim), Ok(()));
    assert_eq!(world.found(), (0, 0));
}

#[tokio::test]
async fn the_index_of_an_image_in_use_makes_no_room_for_nobody_yet() {
    let world = World::new(2 * MIB);
    let (used_bytes, spare_bytes) = (world.room.used_bytes(), world.room.spare_bytes());
    let make_spare = || world.room.make_spare(MIB + MIB / 2, Some(Duration::ZERO));
    world.pin();
    assert_eq!(make_spare(), spare_bytes);
    assert_eq!(world.found(), (used_bytes, 1));
    world.unpin();
    assert_eq!(make_spare(), spare_bytes + used_bytes);
    assert_eq!(world.found(), (0, 0));
}

#[tokio::test]
async fn the_index_of_an_image_in_use_gives_back_no_inode() {
    let world = World::new(0);
    let reclaim = || world.room.reclaim_inodes(world.room.look().unwrap(), 1);
    world.pin();
    assert_eq!(reclaim(), 1);
    world.unpin();
    assert_eq!(reclaim(), 0);
    assert_eq!(world.found(), (0, 0));
}
