//! Mounts take turns at the remote content cache, however many readers each has.

use std::sync::Arc;

use clip_csi::tier::CacheKey;
use tokio::sync::Semaphore;

use super::{
    fixture::{Call, Fault},
    reading::{ask, reading, uploaded},
};
use crate::layer_fixture::{Fixture, let_go_on};

#[tokio::test]
async fn many_readers_of_one_mount_keep_another_waiting_for_one() {
    let chunk_bytes = clip_csi::chunk::CHUNK_BYTES as usize;
    let (large, small) = (Fixture::sized(61, 20 * chunk_bytes), Fixture::new(62));
    let dir = uploaded(&[&large, &small]).await;
    let (store, engine) = reading(&dir, 0);
    let mut layers = Vec::new();
    for fixture in [&large, &small] {
        let layer = store.layer(&fixture.desc, fixture.source()).await;
        layers.push(layer.unwrap());
    }
    let go_on = Arc::new(Semaphore::new(0));
    engine.always(Some(Fault::Hold(Arc::clone(&go_on))));
    let from = engine.n_calls();
    let (many, few) = (store.of_mount(1), store.of_mount(2));
    (0..20).rev().for_each(|it| ask(&*many, &large, it));
    let_go_on().await;
    assert_eq!(engine.n_calls() - from, 2, "so many values at once");
    ask(&*few, &small, 1);
    let_go_on().await;
    go_on.add_permits(1000);
    let wanted = Call::Get(CacheKey::Chunk(small.desc.diff_id, 1));
    let place = loop {
        let_go_on().await;
        let calls = engine.calls();
        if let Some(place) = calls[from..].iter().position(|it| *it == wanted) {
            break place;
        }
    };
    // Behind the two that were under way, and one that had its turn.
    assert!(place <= 3, "it came as number {place}");
}
