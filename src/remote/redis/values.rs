//! Sends values to Redis or Valkey and takes them from there without a copy of them, on connections of their own.
//!
//! redis-rs has a value three times while it sends it: in the command, packed, and in the buffer of its
//! connection, which keeps that size; and as often when it takes one. Of what the agent may hold, a fifth would be one
//! chunk. So `SET` is written here, as RESP2 has it (redis.io, "Redis serialization protocol specification"), whose answer is a
//! line, and `GETRANGE`, whose answer is as long as it says and is read into its place.
//!
//! # Cancellation
//! Safe: a connection in the middle of a command is dropped with it.

use std::io;

use ::redis::{ConnectionAddr, ConnectionInfo};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpStream, UnixStream},
};

/// Bytes of an answer at most. What is longer is none that this module knows.
const MAX_ANSWER_BYTES: u64 = 4096;

/// Words from this length on are written as they are, the others together.
const LONG_WORD_BYTES: usize = 4096;

/// A connection's two directions.
trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A connection that is logged in.
pub(super) struct Line(BufReader<Box<dyn Duplex>>);

/// What the server answers that it refuses, such as `OOM command not allowed`.
#[derive(Debug)]
pub(super) struct Refused(pub(super) String);

impl Line {
    /// Connects and logs in.
    ///
    /// # Errors
    /// Those of the network.
    pub(super) async fn connect(info: &ConnectionInfo) -> io::Result<Result<Self, Refused>> {
        let stream: Box<dyn Duplex> = match info.addr() {
            ConnectionAddr::Tcp(host, port) => {
                let stream = TcpStream::connect((host.as_str(), *port)).await?;
                stream.set_nodelay(true)?;
                Box::new(stream)
            }
            ConnectionAddr::Unix(path) => Box::new(UnixStream::connect(path).await?),
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        let mut line = Self(BufReader::with_capacity(512, stream));
        let settings = info.redis_settings();
        if let Some(password) = settings.password() {
            let mut words = vec![&b"AUTH"[..]];
            words.extend(settings.username().map(str::as_bytes));
            words.push(password.as_bytes());
            if let Err(refused) = line.call(&words).await? {
                return Ok(Err(refused));
            }
        }
        if settings.db() != 0 {
            let db = settings.db().to_string();
            if let Err(refused) = line.call(&[b"SELECT", db.as_bytes()]).await? {
                return Ok(Err(refused));
            }
        }
        // A server that accepts and does not answer is found out now. One that lets this user not ask does
        // answer, unless it wants a password.
        match line.call(&[b"PING"]).await? {
            Err(Refused(reason)) if reason.starts_with("NOAUTH ") => Ok(Err(Refused(reason))),
            Ok(()) | Err(_) => Ok(Ok(line)),
        }
    }

    /// Runs a command that answers with a word or nothing.
    ///
    /// # Errors
    /// Those of the network; then the connection is good for nothing more.
    pub(super) async fn call(&mut self, words: &[&[u8]]) -> io::Result<Result<(), Refused>> {
        let mut head = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            head.extend(format!("${}\r\n", word.len()).as_bytes());
            if word.len() < LONG_WORD_BYTES {
                head.extend(*word);
            } else {
                self.0.write_all(&head).await?;
                self.0.write_all(word).await?;
                head.clear();
            }
            head.extend(b"\r\n");
        }
        self.write(&head).await?;
        match &*self.answer().await? {
            [b'+', ..] | b"$-1" => Ok(Ok(())),
            [b'-', reason @ ..] => Ok(Err(Refused::of(reason))),
            _ => Err(no_answer()),
        }
    }

    /// Sends commands whose answers are to be taken in this order.
    ///
    /// # Errors
    /// As for [`call`](Self::call).
    pub(super) async fn write(&mut self, commands: &[u8]) -> io::Result<()> {
        self.0.write_all(commands).await?;
        self.0.flush().await
    }

    /// Takes a value of at most `max_bytes`.
    ///
    /// # Errors
    /// As for [`call`](Self::call); also if it is longer, of which nothing was read then.
    pub(super) async fn value(&mut self, max_bytes: usize) -> io::Result<Result<Vec<u8>, Refused>> {
        let len = match &*self.answer().await? {
            [b'-', reason @ ..] => return Ok(Err(Refused::of(reason))),
            [b'$', len @ ..] => str::from_utf8(len).ok().and_then(|it| it.parse().ok()),
            _ => None,
        };
        let len = len.filter(|it| *it <= max_bytes).ok_or_else(no_answer)?;
        let mut value = vec![0; len];
        self.0.read_exact(&mut value).await?;
        let mut end = [0; 2];
        self.0.read_exact(&mut end).await?;
        match &end {
            b"\r\n" => Ok(Ok(value)),
            _ => Err(no_answer()),
        }
    }

    /// Takes a line of an answer, without its end.
    async fn answer(&mut self) -> io::Result<Vec<u8>> {
        let mut answer = Vec::new();
        let mut limited = (&mut self.0).take(MAX_ANSWER_BYTES);
        limited.read_until(b'\n', &mut answer).await?;
        match answer.strip_suffix(b"\r\n") {
            Some(line) => Ok(line.to_vec()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Refused {
    fn of(reason: &[u8]) -> Self {
        Self(String::from_utf8_lossy(reason).into_owned())
    }
}

fn no_answer() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the server's answer is none to this command",
    )
}

/// A command of short words, as it is sent.
pub(super) fn command(words: &[&[u8]]) -> Vec<u8> {
    let mut command = format!("*{}\r\n", words.len()).into_bytes();
    for word in words {
        command.extend(format!("${}\r\n", word.len()).as_bytes());
        command.extend(*word);
        command.extend(b"\r\n");
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is sent, and what comes of `answer`.
    async fn called(words: &[&[u8]], answer: &[u8]) -> (Vec<u8>, io::Result<Result<(), Refused>>) {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        far.write_all(answer).await.unwrap();
        far.shutdown().await.unwrap();
        let mut line = Line(BufReader::new(Box::new(near)));
        let got = line.call(words).await;
        drop(line);
        let mut sent = Vec::new();
        far.read_to_end(&mut sent).await.unwrap();
        (sent, got)
    }

    #[tokio::test]
    async fn commands_are_written_as_resp_has_them() {
        let long = [b'x'; LONG_WORD_BYTES];
        let (sent, got) = called(&[b"SET", b"k", &long, b"NX"], b"+OK\r\n").await;
        let text = |it: &[u8]| String::from_utf8(it.to_vec()).unwrap();
        let expected = format!(
            "*4\r\n$3\r\nSET\r\n$1\r\nk\r\n$4096\r\n{}\r\n$2\r\nNX\r\n",
            text(&long)
        );
        assert_eq!(text(&sent), expected);
        assert!(matches!(got, Ok(Ok(()))));
    }

    #[test]
    fn short_commands_are_written_at_once() {
        let sent = command(&[b"GETRANGE", b"k", b"0", b"10"]);
        assert_eq!(
            sent,
            b"*4\r\n$8\r\nGETRANGE\r\n$1\r\nk\r\n$1\r\n0\r\n$2\r\n10\r\n"
        );
    }

    /// What comes of values that are asked for at once, of at most 10 bytes, until one fails.
    async fn values(answers: &[u8]) -> Vec<Result<Vec<u8>, String>> {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        far.write_all(answers).await.unwrap();
        far.shutdown().await.unwrap();
        let mut line = Line(BufReader::with_capacity(16, Box::new(near)));
        let mut got = Vec::new();
        loop {
            match line.value(10).await {
                Ok(value) => got.push(value.map_err(|it| it.0)),
                Err(error) => {
                    got.push(Err(error.kind().to_string()));
                    return got;
                }
            }
        }
    }

    #[tokio::test]
    async fn values_come_as_long_as_they_say_and_no_longer() {
        let end = || Err("unexpected end of file".to_owned());
        let wrong = || Err("invalid data".to_owned());
        let some = |it: &[u8]| Ok(it.to_vec());
        for (answers, expected) in [
            (
                &b"$10\r\n\r\n$1\r\n$123\r\n$0\r\n\r\n-WRONGTYPE no\r\n$1\r\nx\r\n"[..],
                vec![
                    some(b"\r\n$1\r\n$123"),
                    some(b""),
                    Err("WRONGTYPE no".to_owned()),
                    some(b"x"),
                    end(),
                ],
            ),
            (b"$11\r\n01234567890\r\n", vec![wrong()]),
            (b"$99999999999999999999\r\n", vec![wrong()]),
            (b"$-1\r\n", vec![wrong()]),
            (b":1\r\n", vec![wrong()]),
            (b"$3\r\nabcd\r\n", vec![wrong()]),
            (b"$3\r\nab", vec![end()]),
        ] {
            assert_eq!(values(answers).await, expected);
        }
    }

    #[tokio::test]
    async fn answers_are_told_apart() {
        let call = async |answer: &[u8]| called(&[b"SET"], answer).await.1;
        assert!(matches!(call(b"$-1\r\n").await, Ok(Ok(()))));
        let refused = call(b"-OOM no\r\n").await.unwrap().unwrap_err();
        assert_eq!(refused.0, "OOM no");
        for wrong in [
            &b""[..],
            b"+OK",
            b":1\r\n",
            b"\r\n",
            b"HTTP/1.1 400\r\n",
            &[b'+'; 5000],
        ] {
            assert!(call(wrong).await.is_err(), "{wrong:?}");
        }
    }
}
