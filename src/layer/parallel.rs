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
    access::{Checkpoints, Span, strides},
    disk::usize_of,
    feed::FeedReader,
    span::SpanError,
};

/// Threads that decompress: more would hold more of the layer in memory at once.
const N_THREADS: usize = 2;

/// Takes a span and the bytes that it is decompressed from.
pub(super) trait SpanSink: Sync {
    /// Decompresses and writes it; says whether to go on. `buffer` is for a chunk, the same one each time.
    ///
    /// # Errors
    /// [`SpanError`].
    fn take(
        &self,
        span: &Span,
        bytes: &[u8],
        buffer: &mut Vec<u8>,
    ) -> Result<ControlFlow<()>, SpanError>;

    /// Whether all of the span is there already.
    fn is_there(&self, span: &Span) -> bool;

    /// Hears that all before `span` was handed out.
    fn comes_to(&self, span: &Span);
}

/// How a run ended that did not fail.
#[derive(Debug)]
pub(super) enum Ran {
    /// All of the blob passed: its size, and whether every span came out.
    Whole(u64, bool),
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
    access: &Checkpoints,
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
        let (blob_bytes, _) = reader.finish().map_err(SpanError::Corrupt)?;
        Ok(Ran::Whole(blob_bytes, is_whole))
    })
}

/// Takes spans until there are no more; says whether all of them came out whole.
fn work(
    to_take: &Mutex<mpsc::Receiver<(Span, Vec<u8>)>>,
    emptied: &mpsc::Sender<Vec<u8>>,
    sink: &dyn SpanSink,
) -> Result<(ControlFlow<()>, bool), SpanError> {
    let (mut is_whole, mut buffer) = (true, Vec::new());
    loop {
        let next = to_take
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .recv();
        let Ok((span, bytes)) = next else {
            return Ok((ControlFlow::Continue(()), is_whole));
        };
        match sink.take(&span, &bytes, &mut buffer) {
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
    access: &Checkpoints,
    layer_bytes: u64,
    sink: &dyn SpanSink,
    empty: &mpsc::Receiver<Vec<u8>>,
    filled: mpsc::SyncSender<(Span, Vec<u8>)>,
) -> io::Result<()> {
    let mut spans = strides(layer_bytes)
        .map_while(|it| access.span(it))
        .peekable();
    // How far the stream was read, and the last bytes of that, which belong to the next span as well.
    let (mut at, mut shared) = (0, Vec::new());
    while let Some(span) = spans.next() {
        sink.comes_to(&span);
        if sink.is_there(&span) {
            continue;
        }
        let mut bytes = empty.try_recv().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(last(&shared, at, span.blob.start));
        at += skip(reader, span.blob.start.saturating_sub(at))?;
        at += read_up_to(
            reader,
            &mut bytes,
            usize_of(span.blob.end - span.blob.start),
        )?;
        shared.clear();
        if let Some(next) = spans.peek() {
            shared.extend_from_slice(last(&bytes, at, next.blob.start));
        }
        if filled.send((span, bytes)).is_err() {
            break;
        }
    }
    Ok(())
}

/// The end of `bytes` from offset `from` on, if they end at offset `at`.
fn last(bytes: &[u8], at: u64, from: u64) -> &[u8] {
    let len = usize_of(at.saturating_sub(from)).min(bytes.len());
    &bytes[bytes.len() - len..]
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

/// Reads until `bytes` has `wanted` bytes, or the stream ends; returns how many came.
fn read_up_to(reader: &mut FeedReader, bytes: &mut Vec<u8>, wanted: usize) -> io::Result<u64> {
    let had = bytes.len();
    while bytes.len() < wanted {
        let available = reader.fill_buf()?;
        if available.is_empty() {
            break;
        }
        let now = available.len().min(wanted - bytes.len());
        bytes.extend_from_slice(&available[..now]);
        reader.consume(now);
    }
    Ok((bytes.len() - had) as u64)
}
