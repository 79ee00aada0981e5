//! Carries a layer's bytes from the network, where code is async, to the threads that decompress.
//!
//! The sending end counts what passes, and hashes it where nothing else says that it is right: its thread
//! mostly waits for the network, while the one that decompresses decides how long a layer takes.

use std::{
    io::{self, BufRead, Read},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::sync::{Notify, mpsc};

use crate::{digest::BlobDigest, tier::SourceError};

/// With so many bytes on their way to the decompressing thread, those that it reads included, no more are
/// asked of the network, unless they are one piece: over TLS they come in 16 KiB, without it in up to 400 KiB.
///
/// This bridges a pause of a millisecond at a hundred megabytes per second, which is what one thread
/// decompresses. The piece after the one that is read is there already, however large they are: nobody waits
/// for it until who sends and then who reads has woken.
const IN_FLIGHT_BYTES: usize = 128 << 10;

/// What came at once.
#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    /// Its place in what is on its way.
    _place: Place,
}

/// What is on its way.
#[derive(Debug, Default)]
struct Way {
    /// std Mutex: held to count, never across an await.
    load: Mutex<Load>,
    /// There is less of it.
    eased: Notify,
}

#[derive(Debug, Default)]
struct Load {
    n_pieces: usize,
    n_bytes: usize,
}

/// The place of a piece on its way: free when this is dropped.
#[derive(Debug)]
struct Place {
    way: Arc<Way>,
    n_bytes: usize,
}

impl Way {
    fn load(&self) -> MutexGuard<'_, Load> {
        self.load.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there is room for a piece more.
    async fn room(&self) {
        loop {
            let eased = self.eased.notified();
            let has_room = {
                let load = self.load();
                load.n_pieces <= 1 || load.n_bytes < IN_FLIGHT_BYTES
            };
            if has_room {
                return;
            }
            eased.await;
        }
    }

    fn place(self: &Arc<Self>, n_bytes: usize) -> Place {
        let mut load = self.load();
        load.n_pieces += 1;
        load.n_bytes += n_bytes;
        drop(load);
        Place {
            way: Arc::clone(self),
            n_bytes,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut load = self.way.load();
        load.n_pieces -= 1;
        load.n_bytes -= self.n_bytes;
        drop(load);
        // There is one who waits, and if it does not wait yet, it will look again.
        self.way.eased.notify_one();
    }
}

/// How the stream ended.
#[derive(Debug)]
enum End {
    /// All of it was sent: so many bytes, with this digest if they were hashed.
    Whole(u64, Option<BlobDigest>),
    /// The source failed.
    Failed(SourceError),
}

/// Where the sending end leaves word; empty as long as it sends.
///
/// std Mutex: held to store or to copy, never across an await.
type SharedEnd = Arc<Mutex<Option<End>>>;

/// Whether what passes is hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hashing {
    /// For what is checked as a whole.
    Yes,
    /// For what is checked chunk by chunk as it comes out: two cores that decompress have no time to spare.
    No,
}

/// The sending end: lives on the runtime.
#[derive(Debug)]
pub(super) struct Feed {
    sender: mpsc::UnboundedSender<Piece>,
    way: Arc<Way>,
    hasher: Option<Sha256>,
    end: SharedEnd,
}

/// The receiving end: a blocking reader.
#[derive(Debug)]
pub(super) struct FeedReader {
    receiver: mpsc::UnboundedReceiver<Piece>,
    end: SharedEnd,
    current: Option<Piece>,
}

/// Makes both ends.
pub(super) fn feed(hashing: Hashing) -> (Feed, FeedReader) {
    // Whoever sends waits for room.
    let (sender, receiver) = mpsc::unbounded_channel();
    let end = SharedEnd::default();
    let reader = FeedReader {
        receiver,
        end: Arc::clone(&end),
        current: None,
    };
    let hasher = (hashing == Hashing::Yes).then(Sha256::new);
    let feed = Feed {
        sender,
        way: Arc::default(),
        hasher,
        end,
    };
    (feed, reader)
}

impl Feed {
    /// Sends all of `stream`; returns when it ended, failed, or nobody reads any more.
    pub(super) async fn run(mut self, stream: impl Stream<Item = Result<Bytes, SourceError>>) {
        let mut stream = std::pin::pin!(stream);
        let mut n_bytes = 0;
        loop {
            // Before it is asked for, so that what waits is on its way, and nothing beside it.
            self.way.room().await;
            let Some(item) = stream.next().await else {
                break;
            };
            match item {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => {
                    if let Some(hasher) = &mut self.hasher {
                        // A network buffer takes a tenth of a millisecond.
                        hasher.update(&bytes);
                    }
                    n_bytes += bytes.len() as u64;
                    if self.send(bytes).is_err() {
                        return;
                    }
                }
                Err(err) => return self.end(End::Failed(err)),
            }
        }
        let hasher = self.hasher.take();
        let digest = hasher.map(|it| BlobDigest::from_bytes(it.finalize().into()));
        self.end(End::Whole(n_bytes, digest));
    }

    /// Sends a piece; fails if nobody reads any more.
    fn send(&self, bytes: Bytes) -> Result<(), ()> {
        let piece = Piece {
            _place: self.way.place(bytes.len()),
            bytes,
        };
        self.sender.send(piece).map_err(|_| ())
    }

    fn end(&self, end: End) {
        *self.end.lock().unwrap_or_else(PoisonError::into_inner) = Some(end);
    }
}

impl FeedReader {
    /// What the source failed with, if it did: then no other error is the cause.
    pub(super) fn failure(&self) -> Option<SourceError> {
        match &*self.end.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(End::Failed(err)) => Some(err.clone()),
            Some(End::Whole(..)) | None => None,
        }
    }

    /// Reads what is left, and returns how many bytes there were in all, and their digest if they were hashed.
    ///
    /// # Errors
    /// If the source failed, or the sending end went away in the middle.
    pub(super) fn finish(&mut self) -> io::Result<(u64, Option<BlobDigest>)> {
        loop {
            let len = self.fill_buf()?.len();
            if len == 0 {
                break;
            }
            self.consume(len);
        }
        match &*self.end.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(End::Whole(n_bytes, digest)) => Ok((*n_bytes, *digest)),
            Some(End::Failed(err)) => Err(io::Error::other(err.clone())),
            None => Err(interrupted()),
        }
    }
}

/// The error of a stream that neither ended nor failed: whoever sent it was stopped.
fn interrupted() -> io::Error {
    io::Error::other("the download was stopped")
}

impl BufRead for FeedReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.current.is_none() {
            self.current = self.receiver.blocking_recv();
        }
        if let Some(piece) = &self.current {
            return Ok(&piece.bytes);
        }
        match &*self.end.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(End::Whole(..)) => Ok(&[]),
            Some(End::Failed(err)) => Err(io::Error::other(err.clone())),
            None => Err(interrupted()),
        }
    }

    fn consume(&mut self, len: usize) {
        if let Some(piece) = &mut self.current {
            piece.bytes.advance(len);
            // Its place is free then, and one more comes while the next is worked at.
            if piece.bytes.is_empty() {
                self.current = None;
            }
        }
    }
}

impl Read for FeedReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let len = available.len().min(buf.len());
        buf[..len].copy_from_slice(&available[..len]);
        self.consume(len);
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use futures_util::stream;

    use super::*;

    #[tokio::test]
    async fn bytes_arrive_counted_and_hashed() {
        let (feed, mut reader) = feed(Hashing::Yes);
        let items = [
            Ok(Bytes::from_static(b"ab")),
            Ok(Bytes::new()),
            Ok(Bytes::from_static(b"c")),
        ];
        let read = tokio::task::spawn_blocking(move || {
            let mut first = [0; 1];
            reader.read_exact(&mut first).unwrap();
            (first, reader.finish().unwrap())
        });
        feed.run(stream::iter(items)).await;
        assert_eq!(
            read.await.unwrap(),
            (*b"a", (3, Some(BlobDigest::of(b"abc"))))
        );
    }

    #[tokio::test]
    async fn a_failed_source_is_no_end() {
        let (feed, mut reader) = feed(Hashing::No);
        let error = SourceError::Unavailable {
            registry: "r".into(),
            reason: "gone".into(),
        };
        let read = tokio::task::spawn_blocking(move || {
            let outcome = reader.finish().map_err(|it| it.to_string());
            (outcome, reader.failure().is_some())
        });
        feed.run(stream::iter([Ok(Bytes::from_static(b"ab")), Err(error)]))
            .await;
        let (outcome, failed) = read.await.unwrap();
        assert_eq!(outcome, Err("r is unavailable: gone".to_owned()));
        assert!(failed);
    }

    #[tokio::test]
    async fn a_sender_that_is_stopped_is_no_end() {
        let (feed, mut reader) = feed(Hashing::No);
        feed.send(Bytes::from_static(b"ab")).unwrap();
        drop(feed);
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            let outcome = reader.read_to_end(&mut all).map_err(|it| it.to_string());
            (all, outcome)
        });
        let stopped = Err("the download was stopped".to_owned());
        assert_eq!(read.await.unwrap(), (b"ab".to_vec(), stopped));
    }

    /// However large the pieces are, and however many.
    #[tokio::test]
    async fn no_more_is_on_its_way_than_there_is_room_for() {
        for (piece_bytes, most_pieces) in
            [(16 << 10, 8), (48 << 10, 3), (128 << 10, 2), (400 << 10, 2)]
        {
            let (feed, mut reader) = feed(Hashing::No);
            let n_made = Arc::new(AtomicUsize::new(0));
            let made = Arc::clone(&n_made);
            let pieces = stream::iter(0..20).map(move |_| {
                made.fetch_add(1, Ordering::SeqCst);
                Ok(Bytes::from(vec![7; piece_bytes]))
            });
            let sending = tokio::spawn(feed.run(pieces));
            let read = tokio::task::spawn_blocking(move || {
                let mut n_read = 0;
                for n_whole in 0..20 {
                    assert_eq!(reader.fill_buf().unwrap().len(), piece_bytes);
                    std::thread::sleep(Duration::from_millis(2));
                    let n_ahead = n_made.load(Ordering::SeqCst) - n_whole;
                    assert!(n_ahead <= most_pieces, "{n_ahead} of {piece_bytes}");
                    // Not all of it at once.
                    reader.consume(piece_bytes - 1);
                    n_read += piece_bytes;
                    reader.consume(1);
                }
                assert_eq!(reader.finish().unwrap().0, n_read as u64);
            });
            read.await.unwrap();
            sending.await.unwrap();
        }
    }

    /// So that whoever reads need not wait until somebody else has woken.
    #[tokio::test]
    async fn the_next_piece_is_there_before_the_last_was_read() {
        let (feed, mut reader) = feed(Hashing::No);
        let pieces = (0..3).map(|it| Ok(Bytes::from(vec![it; 400 << 10])));
        let sending = tokio::spawn(feed.run(stream::iter(pieces)));
        let read = tokio::task::spawn_blocking(move || {
            for number in 0..2 {
                assert_eq!(reader.fill_buf().unwrap()[0], number);
                let since = std::time::Instant::now();
                while reader.receiver.is_empty() {
                    assert!(since.elapsed() < Duration::from_secs(20), "nothing came");
                    std::thread::sleep(Duration::from_millis(1));
                }
                reader.consume(400 << 10);
            }
            assert_eq!(reader.finish().unwrap().0, 3 * (400 << 10));
        });
        read.await.unwrap();
        sending.await.unwrap();
    }

    #[tokio::test]
    async fn who_sends_hears_that_nobody_reads() {
        let (feed, reader) = feed(Hashing::No);
        let endless = stream::repeat_with(|| Ok(Bytes::from_static(&[7; 100_000])));
        let sending = tokio::spawn(feed.run(endless));
        drop(reader);
        let soon = Duration::from_secs(20);
        tokio::time::timeout(soon, sending).await.unwrap().unwrap();
    }
}
