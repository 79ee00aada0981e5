//! Carries a layer's bytes from the network, where code is async, to the threads that decompress.
//!
//! The sending end counts what passes, and hashes it where nothing else says that it is right: its thread
//! mostly waits for the network, while the one that decompresses decides how long a layer takes.

use std::{
    io::{self, BufRead, Read},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::{digest::BlobDigest, tier::SourceError};

/// Bytes on their way between the network and the decompressing thread, that which it reads included.
///
/// A larger piece is on its way alone: over TLS they come in 16 KiB, without it in up to 400 KiB. This bridges
/// a pause of a millisecond at a hundred megabytes per second, which is what one thread decompresses.
const IN_FLIGHT_BYTES: usize = 128 << 10;

/// What came at once.
#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    /// Its share of what may be on its way.
    _share: OwnedSemaphorePermit,
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
    shares: Arc<Semaphore>,
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
    // Shares bound it.
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
        shares: Arc::new(Semaphore::new(IN_FLIGHT_BYTES)),
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
        while let Some(item) = stream.next().await {
            match item {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => {
                    if let Some(hasher) = &mut self.hasher {
                        // A network buffer takes a tenth of a millisecond.
                        hasher.update(&bytes);
                    }
                    n_bytes += bytes.len() as u64;
                    if self.send(bytes).await.is_err() {
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

    /// Sends a piece once there is room for it; fails if nobody reads any more.
    async fn send(&self, bytes: Bytes) -> Result<(), ()> {
        let n_shares = u32::try_from(bytes.len().min(IN_FLIGHT_BYTES)).map_err(|_| ())?;
        let shares = Arc::clone(&self.shares).acquire_many_owned(n_shares);
        let piece = Piece {
            bytes,
            _share: shares.await.map_err(|_| ())?,
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
            // Its share is free then, and the next one comes while what was read is worked at.
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
        feed.send(Bytes::from_static(b"ab")).await.unwrap();
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
            [(16 << 10, 8), (48 << 10, 2), (128 << 10, 1), (400 << 10, 1)]
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
                    // One is made, and waits until there is room.
                    let n_ahead = n_made.load(Ordering::SeqCst) - n_whole;
                    assert!(n_ahead <= most_pieces + 1, "{n_ahead} of {piece_bytes}");
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
