//! Carries a layer's bytes from the network, where code is async, to the threads that decompress.
//!
//! The sending end counts and hashes what passes: its thread mostly waits for the network, while
//! the one that decompresses decides how long a layer takes.

use std::{
    io::{self, BufRead, Read},
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{Buf, Bytes};
use futures_util::{Stream, StreamExt};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;

use crate::{digest::BlobDigest, tier::SourceError};

/// Network buffers in flight between the network and the decompressing thread.
///
/// At up to 64 KiB each this bridges a pause of a millisecond at a gigabyte per second.
const BUFFERS_IN_FLIGHT: usize = 2;

/// How the stream ended.
#[derive(Debug)]
enum End {
    /// All of it was sent: so many bytes, with this digest.
    Whole(u64, BlobDigest),
    /// The source failed.
    Failed(SourceError),
}

/// Where the sending end leaves word; empty as long as it sends.
///
/// std Mutex: held to store or to copy, never across an await.
type SharedEnd = Arc<Mutex<Option<End>>>;

/// The sending end: lives on the runtime.
#[derive(Debug)]
pub(super) struct Feed {
    sender: mpsc::Sender<Bytes>,
    end: SharedEnd,
}

/// The receiving end: a blocking reader.
#[derive(Debug)]
pub(super) struct FeedReader {
    receiver: mpsc::Receiver<Bytes>,
    end: SharedEnd,
    current: Bytes,
}

/// Makes both ends.
pub(super) fn feed() -> (Feed, FeedReader) {
    let (sender, receiver) = mpsc::channel(BUFFERS_IN_FLIGHT);
    let end = SharedEnd::default();
    let reader = FeedReader {
        receiver,
        end: Arc::clone(&end),
        current: Bytes::new(),
    };
    (Feed { sender, end }, reader)
}

impl Feed {
    /// Sends all of `stream`; returns when it ended, failed, or nobody reads any more.
    pub(super) async fn run(self, stream: impl Stream<Item = Result<Bytes, SourceError>>) {
        let mut stream = std::pin::pin!(stream);
        let (mut hasher, mut n_bytes) = (Sha256::new(), 0);
        while let Some(item) = stream.next().await {
            match item {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => {
                    // A network buffer takes a tenth of a millisecond.
                    hasher.update(&bytes);
                    n_bytes += bytes.len() as u64;
                    if self.sender.send(bytes).await.is_err() {
                        return;
                    }
                }
                Err(err) => return self.end(End::Failed(err)),
            }
        }
        let digest = BlobDigest::from_bytes(hasher.finalize().into());
        self.end(End::Whole(n_bytes, digest));
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

    /// Reads what is left, and returns how many bytes there were in all, and their digest.
    ///
    /// # Errors
    /// If the source failed, or the sending end went away in the middle.
    pub(super) fn finish(&mut self) -> io::Result<(u64, BlobDigest)> {
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
        if self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(bytes) => self.current = bytes,
                None => match &*self.end.lock().unwrap_or_else(PoisonError::into_inner) {
                    Some(End::Whole(..)) => {}
                    Some(End::Failed(err)) => return Err(io::Error::other(err.clone())),
                    None => return Err(interrupted()),
                },
            }
        }
        Ok(&self.current)
    }

    fn consume(&mut self, len: usize) {
        self.current.advance(len);
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
    use futures_util::stream;

    use super::*;

    #[tokio::test]
    async fn bytes_arrive_counted_and_hashed() {
        let (feed, mut reader) = feed();
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
        assert_eq!(read.await.unwrap(), (*b"a", (3, BlobDigest::of(b"abc"))));
    }

    #[tokio::test]
    async fn a_failed_source_is_no_end() {
        let (feed, mut reader) = feed();
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
        let (feed, mut reader) = feed();
        feed.sender.send(Bytes::from_static(b"ab")).await.unwrap();
        drop(feed);
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            let outcome = reader.read_to_end(&mut all).map_err(|it| it.to_string());
            (all, outcome)
        });
        let stopped = Err("the download was stopped".to_owned());
        assert_eq!(read.await.unwrap(), (b"ab".to_vec(), stopped));
    }
}
