//! Lets kubelet call a gRPC server on a Unix socket: mends the `:authority` that grpc-go makes.
//!
//! Where grpc-go dials a path, and nobody says what the authority is, it sends the path,
//! percent-encoded: `%2Fvar%2Flib%2Fkubelet%2F…`. That is a legal host (RFC 3986, 3.2.2), but the
//! `h2` crate takes it for malformed and ends the stream with `PROTOCOL_ERROR`. Kubelet's plugin
//! manager dials so, up to 1.36 at least (`pkg/kubelet/pluginmanager/operationexecutor`, `dial`).
//!
//! So the bytes that come are looked through, and the value of each literal `:authority` is replaced
//! by `localhost` (RFC 9113, 4.1 and 6.2; RFC 7541, 6). Everything else passes as it is. The two
//! ends' tables of headers then differ in that value, and in its length: their indexes agree as long
//! as no table is full, which the two calls of a registration are far from.

use std::{
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tonic::transport::server::Connected;

/// Bytes of the client's preface (RFC 9113, 3.4).
const PREFACE_BYTES: usize = 24;

/// Bytes of a frame's head: length, type, flags, stream.
const HEAD_BYTES: usize = 9;

/// The type of a frame that opens a stream.
const HEADERS: u8 = 1;

/// Flags of such a frame.
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Longest frame that is looked into: what a client may send without having asked (RFC 9113, 4.2).
const MAX_FRAME_BYTES: usize = 16 << 10;

/// `:authority` in the static table (RFC 7541, appendix A).
const AUTHORITY: usize = 1;

/// What stands there instead: a literal of nine bytes, not compressed.
const LOCALHOST: &[u8] = b"\x09localhost";

/// Bytes that are read at once.
const READ_BYTES: usize = 4 << 10;

/// A connection whose `:authority` is mended.
#[derive(Debug)]
pub(super) struct MendedStream {
    inner: UnixStream,
    filter: Filter,
    /// Mended bytes, and how many of them were handed out.
    ready: Vec<u8>,
    n_taken: usize,
}

impl MendedStream {
    pub(super) fn new(inner: UnixStream) -> Self {
        Self {
            inner,
            filter: Filter::default(),
            ready: Vec::new(),
            n_taken: 0,
        }
    }
}

impl AsyncRead for MendedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.n_taken == this.ready.len() {
            let mut bytes = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut read))?;
            this.ready.clear();
            this.n_taken = 0;
            if read.filled().is_empty() {
                // The end: a frame that was begun stays unfinished, as it came.
                return Poll::Ready(Ok(()));
            }
            this.filter.push(read.filled(), &mut this.ready);
        }
        let rest = &this.ready[this.n_taken..];
        let len = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..len]);
        this.n_taken += len;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for MendedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

impl Connected for MendedStream {
    type ConnectInfo = <UnixStream as Connected>::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.inner.connect_info()
    }
}

/// Mends the bytes of one direction of one connection, in pieces of any size.
#[derive(Debug)]
struct Filter {
    /// Bytes that pass before the next frame's head.
    n_passing: usize,
    /// A head, or a head and a payload to look into, as far as it has come.
    held: Vec<u8>,
}

impl Default for Filter {
    fn default() -> Self {
        Self {
            n_passing: PREFACE_BYTES,
            held: Vec::new(),
        }
    }
}

impl Filter {
    fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let (taken, after) = rest.split_at(self.wanted_bytes().min(rest.len()));
            rest = after;
            if 0 < self.n_passing {
                self.n_passing -= taken.len();
                out.extend_from_slice(taken);
            } else {
                self.held.extend_from_slice(taken);
                self.decide(out);
            }
        }
    }

    /// How many bytes belong to what is passing, or to what is held.
    fn wanted_bytes(&self) -> usize {
        if 0 < self.n_passing {
            self.n_passing
        } else if self.held.len() < HEAD_BYTES {
            HEAD_BYTES - self.held.len()
        } else {
            HEAD_BYTES + payload_bytes(&self.held) - self.held.len()
        }
    }

    /// Passes on what is held as soon as it is known how.
    fn decide(&mut self, out: &mut Vec<u8>) {
        if self.held.len() < HEAD_BYTES {
            return;
        }
        let payload_bytes = payload_bytes(&self.held);
        if self.held[3] != HEADERS || MAX_FRAME_BYTES < payload_bytes {
            self.n_passing = payload_bytes;
            out.append(&mut self.held);
        } else if self.held.len() == HEAD_BYTES + payload_bytes {
            match mended(&self.held) {
                Some(frame) => out.extend(frame),
                None => out.extend_from_slice(&self.held),
            }
            self.held.clear();
        }
    }
}

/// What a frame's head says of the length of the rest.
fn payload_bytes(frame: &[u8]) -> usize {
    usize::from(frame[0]) << 16 | usize::from(frame[1]) << 8 | usize::from(frame[2])
}

/// The frame with another authority; `None` if it spells none, or is malformed.
fn mended(frame: &[u8]) -> Option<Vec<u8>> {
    let value = authority(frame)?;
    let mut mended = [&frame[..value.start], LOCALHOST, &frame[value.end..]].concat();
    let len = u32::try_from(mended.len() - HEAD_BYTES).ok()?;
    mended[..3].copy_from_slice(&len.to_be_bytes()[1..]);
    (mended.len() - HEAD_BYTES <= MAX_FRAME_BYTES).then_some(mended)
}

/// Where a frame spells its authority, with the length before it (RFC 7541, 6).
fn authority(frame: &[u8]) -> Option<Range<usize>> {
    let flags = frame[4];
    let mut block = Block {
        bytes: frame,
        at: HEAD_BYTES,
    };
    if flags & PADDED != 0 {
        let padding = usize::from(*frame.get(HEAD_BYTES)?);
        block.bytes = frame.get(..frame.len().checked_sub(padding)?)?;
        block.at += 1;
    }
    if flags & PRIORITY != 0 {
        block.at += 5;
    }
    while let Some(first) = block.bytes.get(block.at) {
        match first {
            // A field of the tables; a change of their size.
            0x80.. => block.integer(7).map(drop)?,
            0x20..0x40 => block.integer(5).map(drop)?,
            // A literal, to be kept in the table or not.
            _ => {
                let name = block.integer(if 0x40 <= *first { 6 } else { 4 })?;
                if name == 0 {
                    block.string()?;
                }
                let value = block.string()?;
                if name == AUTHORITY {
                    return Some(value);
                }
            }
        }
    }
    None
}

/// A block of header fields being read.
struct Block<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Block<'_> {
    /// Reads an integer whose first byte has `n_bits` of it (RFC 7541, 5.1).
    fn integer(&mut self, n_bits: u32) -> Option<usize> {
        let mask = (1 << n_bits) - 1;
        let mut value = usize::from(*self.bytes.get(self.at)?) & mask;
        self.at += 1;
        if value < mask {
            return Some(value);
        }
        // No index and no length here needs more than 28 bits.
        for shift in [0, 7, 14, 21] {
            let byte = usize::from(*self.bytes.get(self.at)?);
            self.at += 1;
            value += (byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// Skips a string, compressed or not, and says where it is (RFC 7541, 5.2).
    fn string(&mut self) -> Option<Range<usize>> {
        let start = self.at;
        let len = self.integer(7)?;
        self.at = self.at.checked_add(len)?;
        (self.at <= self.bytes.len()).then_some(start..self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame with a head that fits.
    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&len[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn filtered(pieces: &[&[u8]]) -> Vec<u8> {
        let (mut filter, mut out) = (Filter::default(), Vec::new());
        for piece in pieces {
            filter.push(piece, &mut out);
        }
        out
    }

    /// What a client sends: preface, settings, a call, its message.
    fn call(flags: u8, before: &[u8], authority: &[u8], after: &[u8]) -> Vec<u8> {
        // POST, http, and a path that is kept in the table.
        let fields = [
            &[0x83, 0x86, 0x44, 2][..],
            b"/x",
            authority,
            &[0x5f, 1],
            b"a",
        ];
        let block = [before, &fields.concat(), after].concat();
        [
            &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
            &frame(4, 0, &[0, 3, 0, 0, 0, 100]),
            &frame(1, flags, &block),
            &frame(0, 1, &[0; 5]),
        ]
        .concat()
    }

    #[test]
    fn an_authority_that_is_spelt_out_becomes_localhost_and_nothing_else_changes() {
        let good = b"\x41\x09localhost";
        for (flags, before, after) in [
            (4, &b""[..], &b""[..]),
            (4 | PADDED, &[3], &[0; 3]),
            (4 | PRIORITY, &[0; 5], &[]),
            (4 | PADDED | PRIORITY, &[2, 0, 0, 0, 0, 0], &[0; 2]),
            // A change of the table's size comes first.
            (4, &[0x3f, 0xe1, 0x1f], &[]),
        ] {
            let expected = call(flags, before, good, after);
            for authority in [
                &b"\x41\x0c%2Fa%2Fb%2Fc"[..],
                // Compressed: the bytes do not matter, their number does.
                b"\x41\x84\xff\x01\x41\x80",
                b"\x41\x00",
                good,
            ] {
                let sent = call(flags, before, authority, after);
                assert_eq!(filtered(&[&sent]), expected, "{flags} {authority:?}");
            }
            // Not kept in the table, or never to be.
            for (kind, kept) in [(1, b"\x01\x01a"), (0x11, b"\x11\x01a")] {
                let expected = [&[kind][..], LOCALHOST].concat();
                let (sent, expected) = (
                    call(flags, before, kept, after),
                    call(flags, before, &expected, after),
                );
                assert_eq!(filtered(&[&sent]), expected);
            }
        }
        // From the table, absent, or a name spelt out: nothing to mend.
        for other in [&b"\xbe"[..], b"", b"\x40\x02te\x01x", b"\x41\x7f"] {
            let sent = call(4, b"", other, b"");
            assert_eq!(filtered(&[&sent]), sent, "{other:?}");
        }
    }

    #[test]
    fn a_frame_that_is_too_long_passes_as_it_is() {
        let long = [&b"\x41\x01a"[..], &vec![0x86; MAX_FRAME_BYTES]].concat();
        for payload in [&long[..], &long[..MAX_FRAME_BYTES]] {
            let sent = [&[0; PREFACE_BYTES][..], &frame(HEADERS, 4, payload)].concat();
            assert_eq!(filtered(&[&sent]), sent);
        }
    }

    proptest::proptest! {
        #[test]
        fn pieces_of_any_size_give_the_same_bytes(cuts in proptest::collection::vec(1..40_usize, 1..12)) {
            let sent = call(4, b"", b"\x41\x0c%2Fa%2Fb%2Fc", b"");
            let mut rest = &sent[..];
            let mut pieces = Vec::new();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = after;
            }
            pieces.push(rest);
            proptest::prop_assert_eq!(filtered(&pieces), call(4, b"", b"\x41\x09localhost", b""));
        }

        #[test]
        fn errors_are_fine_and_panics_are_bugs(
            flags: u8,
            block in proptest::collection::vec(proptest::num::u8::ANY, 0..60),
        ) {
            let sent = [&[0; PREFACE_BYTES][..], &frame(HEADERS, flags, &block)].concat();
            // Only that it returns, and loses no other frame.
            let mut both = sent.clone();
            both.extend(frame(0, 1, b"tail"));
            proptest::prop_assert!(filtered(&[&both]).ends_with(&frame(0, 1, b"tail")));
        }
    }
}
