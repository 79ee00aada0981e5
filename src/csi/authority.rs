//! Makes kubelet's call of the Registration service legible to our HTTP/2 server.
//!
//! Kubelet calls a plugin's registration socket with the socket's path, percent-encoded, as the
//! `:authority` (kubernetes, `pkg/kubelet/pluginmanager/operationexecutor`; gRPC for Go puts it
//! there). RFC 3986 has no such authority where `http::uri` looks for one, so that the server
//! (h2) would end the stream with PROTOCOL_ERROR. Nobody here asks for the authority: its value is
//! overwritten in the first HEADERS frame of a connection, by one of equal length, so that no other
//! byte changes. Later requests refer to it through the connection's HPACK table.
//!
//! Kubelet names an authority when it calls CSI itself, so that only this socket needs it.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tonic::transport::server::Connected;

/// What a client says first (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Length, type, flags and stream of a frame (RFC 9113, 4.1).
const FRAME_HEADER_BYTES: usize = 9;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x08;
const PRIORITY: u8 = 0x20;
/// Longest frame that a client may send before it has our settings (RFC 9113, 6.5.2).
const MAX_FRAME_BYTES: usize = 16_384;
/// `:authority` in HPACK's static table (RFC 7541, appendix A).
const AUTHORITY: usize = 1;

/// A connection whose first HEADERS frame names an authority that every parser takes.
#[derive(Debug)]
pub(super) struct Legible {
    inner: UnixStream,
    /// Read and not yet looked at: a part of the preface or of a frame.
    unseen: Vec<u8>,
    /// Looked at, for the next reads; what is before `given` has been read.
    seen: Vec<u8>,
    given: usize,
    /// The HEADERS frame has passed: nothing is looked at any more.
    done: bool,
    preface: bool,
}

impl Legible {
    pub(super) fn new(inner: UnixStream) -> Self {
        Self {
            inner,
            unseen: Vec::new(),
            seen: Vec::new(),
            given: 0,
            done: false,
            preface: true,
        }
    }

    /// Moves all that is whole from `unseen` to `seen`.
    fn look(&mut self) {
        if self.preface && PREFACE.len() <= self.unseen.len() {
            self.seen.extend(self.unseen.drain(..PREFACE.len()));
            self.preface = false;
        }
        while !self.preface && !self.done {
            let Some(&[a, b, c, kind, flags, ..]) = self.unseen.get(..FRAME_HEADER_BYTES) else {
                return;
            };
            let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
            let whole = FRAME_HEADER_BYTES + length;
            if MAX_FRAME_BYTES < length {
                // The server will say what it thinks of it.
                self.pass();
                return;
            }
            if self.unseen.len() < whole {
                return;
            }
            if kind == HEADERS {
                let payload = &mut self.unseen[FRAME_HEADER_BYTES..whole];
                // A frame that cannot be read is for the server to refuse.
                let _ = overwrite_authority(payload, flags);
                self.pass();
                return;
            }
            self.seen.extend(self.unseen.drain(..whole));
        }
    }

    /// Looks at nothing any more.
    fn pass(&mut self) {
        self.seen.append(&mut self.unseen);
        self.done = true;
    }
}

/// Overwrites the value of a literal `:authority` in a HEADERS frame's payload; `None` if there is none.
fn overwrite_authority(payload: &mut [u8], flags: u8) -> Option<()> {
    let mut at = 0;
    let mut end = payload.len();
    if flags & PADDED != 0 {
        end = end.checked_sub(usize::from(*payload.first()?))?;
        at += 1;
    }
    if flags & PRIORITY != 0 {
        at += 5;
    }
    let block = payload.get_mut(at..end)?;
    let mut at = 0;
    loop {
        let first = *block.get(at)?;
        // RFC 7541, 6: what a field is shows in its first bits.
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40.. => (6, true),
            0x20.. => (5, false),
            _ => (4, true),
        };
        let (index, next) = integer(block, at, prefix)?;
        at = next;
        if !literal {
            continue;
        }
        if index == 0 {
            let (length, name) = integer(block, at, 7)?;
            at = name.checked_add(length)?;
        }
        let (length, value) = integer(block, at, 7)?;
        let after = value.checked_add(length)?;
        if index == AUTHORITY {
            block.get_mut(value..after)?.fill(b'a');
            // The bit that says Huffman.
            *block.get_mut(at)? &= 0x7F;
            return Some(());
        }
        at = after;
    }
}

/// An integer of HPACK at `at`, whose first byte has `prefix` bits of it, and what follows it (RFC 7541, 5.1).
fn integer(block: &[u8], mut at: usize, prefix: u32) -> Option<(usize, usize)> {
    let mask = (1_usize << prefix) - 1;
    let mut value = usize::from(*block.get(at)?) & mask;
    at += 1;
    if value < mask {
        return Some((value, at));
    }
    // Three bytes more reach two million, and a frame has far less.
    for shift in [0, 7, 14] {
        let byte = *block.get(at)?;
        at += 1;
        value += usize::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

impl AsyncRead for Legible {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            let waiting = &this.seen[this.given..];
            if !waiting.is_empty() {
                let n = waiting.len().min(out.remaining());
                out.put_slice(&waiting[..n]);
                this.given += n;
                return Poll::Ready(Ok(()));
            }
            if this.done {
                return Pin::new(&mut this.inner).poll_read(context, out);
            }
            let mut chunk = [0; 1024];
            let mut read = ReadBuf::new(&mut chunk);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                this.pass();
                continue;
            }
            this.unseen.extend_from_slice(read.filled());
            this.look();
        }
    }
}

impl AsyncWrite for Legible {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(context, data)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(context)
    }
}

impl Connected for Legible {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// The head of a call as gRPC for Go writes it, but for the path; the authority is `%2Fa`, in Huffman's code.
    const BLOCK: &[u8] = b"\x83\x86\x44\x02/x\x41\x84\x54\x58\x43\xff\x5f\x01c\x40\x02te\x01y";

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).expect("a short frame");
        let mut out = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        out.extend_from_slice(payload);
        out
    }

    fn overwritten(block: &[u8], flags: u8) -> (Vec<u8>, Option<()>) {
        let mut copy = block.to_vec();
        let found = overwrite_authority(&mut copy, flags);
        (copy, found)
    }

    #[test]
    fn only_the_authority_changes() {
        let (block, found) = overwritten(BLOCK, 0x04);
        assert_eq!(found, Some(()));
        assert_eq!(
            block,
            b"\x83\x86\x44\x02/x\x41\x04aaaa\x5f\x01c\x40\x02te\x01y"
        );
    }

    #[test]
    fn padding_and_priority_are_skipped() {
        let payload = [&[2, 0, 0, 0, 0, 9][..], BLOCK, &[0, 0]].concat();
        let (block, found) = overwritten(&payload, PADDED | PRIORITY);
        assert_eq!(found, Some(()));
        assert!(block.windows(6).any(|it| it == b"\x41\x04aaaa"));
    }

    #[test]
    fn a_long_value_keeps_its_length() {
        // 200 = 127 + 73.
        let block = [&[0x41, 0xFF, 73][..], &[b'%'; 200]].concat();
        let (block, found) = overwritten(&block, 0);
        assert_eq!(found, Some(()));
        assert_eq!(block[..3], [0x41, 0x7F, 73]);
        assert!(block[3..].iter().all(|it| *it == b'a'));
    }

    #[test]
    fn a_block_without_authority_stays() {
        for block in [
            &b"\x83\x86\x44\x02/x"[..],
            b"",
            b"\x41\xff\xff\xff\xff\xff",
            b"\x41\x05ab",
        ] {
            assert_eq!(overwritten(block, 0), (block.to_vec(), None));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(block: Vec<u8>, flags: u8) {
            prop_assert_eq!(overwritten(&block, flags).0.len(), block.len());
        }
    }

    #[tokio::test]
    async fn frames_pass_in_any_pieces() {
        let settings = frame(4, 0, &[]);
        let later = frame(HEADERS, 4, BLOCK);
        let sent = [PREFACE, &settings, &frame(HEADERS, 4, BLOCK), &later].concat();
        let wanted = [
            PREFACE,
            &settings,
            &frame(HEADERS, 4, &overwritten(BLOCK, 4).0),
            &later,
        ]
        .concat();
        for piece in [1, 7, 30, sent.len()] {
            let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
            let sending = async {
                for bytes in sent.chunks(piece) {
                    theirs.write_all(bytes).await.expect("written");
                    tokio::task::yield_now().await;
                }
                drop(theirs);
            };
            let mut legible = Legible::new(ours);
            let mut got = Vec::new();
            let (read, ()) = tokio::join!(legible.read_to_end(&mut got), sending);
            read.expect("read");
            assert_eq!(got, wanted, "pieces of {piece}");
        }
    }
}
