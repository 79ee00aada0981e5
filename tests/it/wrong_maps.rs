//! Access maps in the remote content cache that somebody has forged: the layers can be read even so, and the maps
//! go.

use std::path::{Path, PathBuf};

use clip_csi::{
    chunk::{self, CHUNK_BYTES},
    codec::{
        Compression, Subject,
        access_map::{AccessMap, AccessMapWriter},
        piece_map::{Piece, PieceMapWriter},
    },
    digest::BlobDigest,
    metrics::Metrics,
};

use crate::{
    by_toc::eventually,
    layer_fixture::{Fixture, files_below, key_file, open, present, remote_in},
};

/// A map that enters the blob where nothing begins.
fn shifted(map: &[u8], subject: &Subject) -> Vec<u8> {
    let map = AccessMap::decode(map.to_vec()).unwrap();
    let mut writer = AccessMapWriter::new(Vec::new()).unwrap();
    for n in 0..map.n_checkpoints() {
        let mut checkpoint = map.checkpoint(n).unwrap();
        if n != 0 {
            checkpoint.blob_offset += 1;
        }
        writer.push(&checkpoint).unwrap();
    }
    writer.finish(subject).unwrap()
}

/// A map that knows a layer by pieces that it does not have.
fn in_pieces(subject: &Subject) -> Vec<u8> {
    let mut writer = PieceMapWriter::new(Vec::new()).unwrap();
    for n in (0..).take_while(|it| it * CHUNK_BYTES < subject.layer_bytes) {
        let range = chunk::byte_range(u32::try_from(n).unwrap(), subject.layer_bytes);
        let piece = Piece {
            layer_offset: range.start,
            len: range.end - range.start,
            blob: 0..1000,
            skipped: 0,
            digest: BlobDigest::of(b"a piece"),
        };
        writer.push(&piece).unwrap();
    }
    writer.finish(subject).unwrap()
}

/// The one access map in the remote.
fn stored_map(remote: &Path) -> Option<PathBuf> {
    let is_map = |it: &PathBuf| {
        let name = it.file_name().unwrap().to_str().unwrap();
        name.starts_with("access-")
    };
    files_below(remote).into_iter().find(is_map)
}

/// Reads a layer whose map in the remote is `forged` out of the true one.
async fn read_with(seed: u64, forged: impl FnOnce(&[u8], &Subject) -> Vec<u8>) {
    let (dir, metrics) = (tempfile::tempdir().unwrap(), Metrics::new());
    let fixture = Fixture::sized(seed, 13 << 20);
    let (shared, key) = (dir.path().join("remote"), key_file(dir.path()));
    let node = |name: &str| {
        let remote = remote_in(&shared, Some(&key), &metrics);
        open(&dir.path().join(name), remote, &metrics)
    };
    let source = fixture.source();
    let first = node("a");
    let layer = first.layer(&fixture.desc, source.clone()).await.unwrap();
    let uploading = layer.file().dir().join("upload");
    eventually(|| !uploading.exists()).await;
    let map = std::fs::read(layer.file().dir().join("access")).unwrap();
    let subject = Subject {
        compression: Compression::Gzip,
        blob: fixture.desc.blob,
        blob_bytes: fixture.desc.blob_bytes,
        diff_id: fixture.desc.diff_id,
        layer_bytes: fixture.tar.len() as u64,
    };
    let forged = forged(&map, &subject);
    let value = [&(forged.len() as u64).to_le_bytes()[..], &forged].concat();
    clip_csi::disk::publish(&stored_map(&shared).unwrap(), &value).unwrap();
    // Chunks come from the registry.
    for path in files_below(&shared) {
        if path
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .starts_with("o-")
        {
            std::fs::remove_file(path).unwrap();
        }
    }
    let second = node("b");
    let layer = second.layer(&fixture.desc, source.clone()).await.unwrap();
    present(&second, fixture.desc.diff_id, 9..10).await.unwrap();
    fixture.expect_chunk(&layer, 9);
    eventually(|| layer.file().is_complete()).await;
    fixture.expect_all(&second, &layer).await;
    let here = layer.file().dir().join("access");
    eventually(|| std::fs::read(&here).map_or(true, |it| it == map)).await;
    let is_there = || stored_map(&shared).is_some_and(|it| std::fs::read(it).unwrap() == value);
    eventually(|| !is_there()).await;
}

#[tokio::test]
async fn one_that_enters_the_blob_elsewhere() {
    read_with(780, shifted).await;
}

#[tokio::test]
async fn one_of_pieces_for_a_layer_that_has_none() {
    read_with(781, |_, subject| in_pieces(subject)).await;
}
