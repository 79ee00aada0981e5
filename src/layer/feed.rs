//! Carries a layer's bytes from the network, where code is async, to the threads that decompress.

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

/// The sending end: lives on the runtime.
#[derive(Debug)]
pub(super) struct Feed {
    sender: mpsc::Sender<Bytes>,
    failure: Arc<Mutex<Option<SourceError>>>,
}

/// The receiving end: a blocking reader that counts and hashes what passes.
#[derive(Debug)]
pub(super) struct FeedReader {
    receiver: mpsc::Receiver<Bytes>,
    failure: Arc<Mutex<Option<SourceError>>>,
    current: Bytes,
    hasher: Sha256,
    n_bytes: u64,
}

/// Makes both ends.
pub(super) fn feed() -> (Feed, FeedReader) {
    let (sender, receiver) = mpsc::channel(BUFFERS_IN_FLIGHT);
    let failure = Arc::new(Mutex::new(None));
    let reader = FeedReader {
        receiver,
        failure: Arc::clone(&failure),
        current: Bytes::new(),
        hasher: Sha256::new(),
        n_bytes: 0,
    };
    (Feed { sender, failure }, reader)
}

impl Feed {
    /// Sends all of `stream`; returns when it ended, failed, or nobody reads any more.
    pub(super) async fn run(self, stream: impl Stream<Item = Result<Bytes, SourceError>>) {
        let mut stream = std::pin::pin!(stream);
        while let Some(item) = stream.next().await {
            match item {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => {
                    if self.sender.send(bytes).await.is_err() {
                        return;
                    }
                }
                Err(err) => {
                    self.fail(err);
                    return;
                }
            }
        }
    }

    /// Makes the reader fail with `err`.
    pub(super) fn fail(&self, err: SourceError) {
        *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(err);
    }
}

impl FeedReader {
    /// What the source failed with, if it did: then no other error is the cause.
    pub(super) fn failure(&self) -> Option<SourceError> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Reads what is left, and returns how many bytes there were in all, and their digest.
    ///
    /// # Errors
    /// If the source failed.
    pub(super) fn finish(&mut self) -> io::Result<(u64, BlobDigest)> {
        loop {
            let len = self.fill_buf()?.len();
            if len == 0 {
                break;
            }
            self.consume(len);
        }
        let digest = std::mem::take(&mut self.hasher).finalize();
        Ok((self.n_bytes, BlobDigest::from_bytes(digest.into())))
    }
}

impl BufRead for FeedReader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(bytes) => {
                    self.hasher.update(&bytes);
                    self.n_bytes += bytes.len() as u64;
                    self.current = bytes;
                }
                None => {
                    if let Some(err) = self.failure() {
                        return Err(io::Error::other(err));
                    }
                }
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
}
