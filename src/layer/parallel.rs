//! Fills a layer whose access map is known from one stream of its blob, on two threads.
//!
//! This thread cuts the stream into spans of a stride, each with the bytes from its checkpoint on;
//! two others decompress them side by side. A span's end may lie in the next one's bytes, so that
//! neighbours overlap by a block.

use std::{
    io::{self, BufRead},
    ops::ControlFlow,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

use super::{
    access::{Access, Span, strides},
    disk::usize_of,
    feed::FeedReader,
    span::SpanError,
};
use crate::digest::BlobDigest;

/// Threads that decompress: more would hold more of the layer in memory at once.
const N_THREADS: usize = 2;

/// Takes a span and the bytes that it is decompressed from.
pub(super) trait SpanSink: Sync {
    /// Decompresses and writes it; says whether to go on.
    ///
    /// # Errors
    /// [`SpanError`].
    fn take(&self, span: &Span, bytes: &[u8]) -> Result<ControlFlow<()>, SpanError>;

    /// Whether all of the span is there already.
    fn is_there(&self, span: &Span) -> bool;

    /// Hears that all before `span` was handed out.
    fn comes_to(&self, span: &Span);
}

/// How a run ended that did not fail.
#[derive(Debug)]
pub(super) enum Ran {
    /// All of the blob passed: its size and digest, and whether every span came out.
    Whole(u64, BlobDigest, bool),
    /// The sink wanted no more.
    Unwanted,
}

/// Drives all of the blob through two decompressing threads; `access` must cover all of the layer.
///
/// # Errors
/// The first of the sink's, or the source's.
///
/// # Blocking
/// For as long as the source delivers.
pub(super) fn run(
    mut reader: FeedReader,
    access: &Access,
    layer_bytes: u64,
    sink: &dyn SpanSink,
) -> Result<Ran, SpanError> {
    let (filled, to_take) = mpsc::sync_channel::<(Span, Vec<u8>)>(0);
    // Shared by the workers alone: when all have ended, whoever cuts is told.
    let to_take = Arc::new(Mutex::new(to_take));
    let (emptied, empty) = mpsc::channel::<Vec<u8>>();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..N_THREADS)
            .map(|_| {
                let (to_take, emptied) = (Arc::clone(&to_take), emptied.clone());
                scope.spawn(move || work(&to_take, &emptied, sink))
            })
            .collect();
        drop(to_take);
        let cut = cut(&mut reader, access, layer_bytes, sink, &empty, filled);
        let mut is_whole = true;
        let mut outcome = Ok(ControlFlow::Continue(()));
        for worker in workers {
            let worked = worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            match worked {
                Ok((flow, all)) => {
                    is_whole &= all;
                    if flow.is_break() && outcome.is_ok() {
                        outcome = Ok(flow);
                    }
                }
                Err(err) => outcome = Err(err),
            }
        }
        if let Some(source) = reader.failure() {
            return Err(SpanError::Source(source));
        }
        if outcome?.is_break() {
            return Ok(Ran::Unwanted);
        }
        cut.map_err(SpanError::Corrupt)?;
        let (blob_bytes, blob) = reader.finish().map_err(SpanError::Corrupt)?;
        Ok(Ran::Whole(blob_bytes, blob, is_whole))
    })
}

/// Takes spans until there are no more; says whether all of them came out whole.
fn work(
    to_take: &Mutex<mpsc::Receiver<(Span, Vec<u8>)>>,
    emptied: &mpsc::Sender<Vec<u8>>,
    sink: &dyn SpanSink,
) -> Result<(ControlFlow<()>, bool), SpanError> {
    let mut is_whole = true;
    loop {
        let next = to_take
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok((span, bytes)) = next else {
            return Ok((ControlFlow::Continue(()), is_whole));
        };
        match sink.take(&span, &bytes) {
            Ok(ControlFlow::Continue(())) => {}
            Ok(ControlFlow::Break(())) => return Ok((ControlFlow::Break(()), is_whole)),
            // A block longer than the guess: a stream fills what is missing.
            Err(SpanError::Short) if span.is_guess => is_whole = false,
            Err(err) => return Err(err),
        }
        // Whoever cuts may have ended; then nobody needs the buffer.
        let _ = emptied.send(bytes);
    }
}

/// Cuts the stream into spans and hands them out; ends early if nobody takes them.
fn cut(
    reader: &mut FeedReader,
    access: &Access,
    layer_bytes: u64,
    sink: &dyn SpanSink,
    empty: &mpsc::Receiver<Vec<u8>>,
    filled: mpsc::SyncSender<(Span, Vec<u8>)>,
) -> io::Result<()> {
    // The bytes of the blob that are held, and the offset of the first one.
    let (mut held, mut held_at) = (Vec::new(), 0);
    for span in strides(layer_bytes).map_while(|it| access.span(it)) {
        sink.comes_to(&span);
        if sink.is_there(&span) {
            continue;
        }
        // What lies before the span is in nobody's way: it was an earlier one's.
        let passed = usize_of(span.blob.start.saturating_sub(held_at)).min(held.len());
        held.drain(..passed);
        held_at += passed as u64;
        held_at += skip(reader, span.blob.start.saturating_sub(held_at))?;
        let wanted = usize_of(span.blob.end.saturating_sub(held_at));
        read_up_to(reader, &mut held, wanted)?;
        let mut bytes = empty.try_recv().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(&held[..wanted.min(held.len())]);
        if filled.send((span, bytes)).is_err() {
            break;
        }
    }
    Ok(())
}

/// Throws `len` bytes away; returns how many there were.
fn skip(reader: &mut FeedReader, len: u64) -> io::Result<u64> {
    let mut skipped = 0;
    while skipped < len {
        let available = reader.fill_buf()?.len();
        if available == 0 {
            break;
        }
        let now = available.min(usize_of(len - skipped));
        reader.consume(now);
        skipped += now as u64;
    }
    Ok(skipped)
}

/// Reads until `held` has `wanted` bytes, or the stream ends.
fn read_up_to(reader: &mut FeedReader, held: &mut Vec<u8>, wanted: usize) -> io::Result<()> {
    while held.len() < wanted {
        let available = reader.fill_buf()?;
        if available.is_empty() {
            break;
        }
        let now = available.len().min(wanted - held.len());
        held.extend_from_slice(&available[..now]);
        reader.consume(now);
    }
    Ok(())
}
