//! A scripted HTTP/1.1 server that can break the protocol wherever a test wants it to.
//!
//! It writes bytes by hand and not through hyper, which would refuse to send a body that is cut,
//! too long, or never ends.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// First byte of a TLS record that starts a handshake (RFC 8446, 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// The path with its query.
    pub(crate) path: String,
    headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// The value of a header, named in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The first byte of the range asked for.
    pub(crate) fn range_start(&self) -> Option<usize> {
        let range = self.header("range")?.strip_prefix("bytes=")?;
        Some(range.split_once('-')?.0.parse().unwrap())
    }
}

/// What happens after the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    KeepAlive,
    Close,
    Hang,
}

/// An answer.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// Bytes of the body that are sent.
    sent: usize,
    end: End,
    has_length: bool,
    has_head: bool,
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        let body = body.into();
        Self {
            status,
            headers: Vec::new(),
            sent: body.len(),
            body,
            end: End::KeepAlive,
            has_length: true,
            has_head: true,
        }
    }

    /// Never answers.
    pub(crate) fn silence() -> Self {
        Self {
            has_head: false,
            end: End::Hang,
            ..Self::new(200, "")
        }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    /// Breaks the connection after `sent` bytes of the body.
    pub(crate) fn cut(mut self, sent: usize) -> Self {
        self.sent = sent;
        self.end = End::Close;
        self
    }

    /// Sends `sent` bytes of the body, then nothing more.
    pub(crate) fn stall(mut self, sent: usize) -> Self {
        self.sent = sent;
        self.end = End::Hang;
        self
    }

    /// Sends the body without its length: it ends where the connection does.
    pub(crate) fn without_length(mut self) -> Self {
        self.has_length = false;
        self.end = End::Close;
        self
    }
}

/// A running server; stops when dropped.
#[derive(Debug)]
pub(crate) struct HttpServer {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    task: JoinHandle<()>,
}

impl HttpServer {
    /// Starts a server that answers with what `script` returns for a request.
    pub(crate) async fn start(script: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&requests);
        let script = Arc::new(script);
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&script), Arc::clone(&seen)));
            }
        });
        Self {
            address,
            requests,
            task,
        }
    }

    /// `127.0.0.1:port`.
    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    /// The requests whose path contains `part`, in order.
    pub(crate) fn requests(&self, part: &str) -> Vec<Request> {
        let requests = self.requests.lock().unwrap();
        requests
            .iter()
            .filter(|it| it.path.contains(part))
            .cloned()
            .collect()
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    script: Arc<impl Fn(&Request) -> Reply>,
    seen: Arc<Mutex<Vec<Request>>>,
) {
    while let Some(request) = read_request(&mut stream).await {
        seen.lock().unwrap().push(request.clone());
        let reply = script(&request);
        if reply.has_head {
            let mut head = format!("HTTP/1.1 {} Scripted\r\n", reply.status);
            for (name, value) in &reply.headers {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            if reply.has_length {
                head.push_str(&format!("content-length: {}\r\n", reply.body.len()));
            }
            head.push_str("\r\n");
            // The client may have gone: that is its right, and the test sees it elsewhere.
            let _ = stream.write_all(head.as_bytes()).await;
            let _ = stream.write_all(&reply.body[..reply.sent]).await;
        }
        match reply.end {
            End::KeepAlive => {}
            End::Close => break,
            End::Hang => std::future::pending().await,
        }
    }
    // A clean end, so that what was sent arrives.
    let _ = stream.shutdown().await;
}

async fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
        if head[0] == TLS_HANDSHAKE {
            // As servers do: the client shall see at once that nobody speaks TLS here.
            let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            return None;
        }
    }
    let head = String::from_utf8(head).ok()?;
    let mut lines = head.lines();
    let mut words = lines.next()?.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let headers: BTreeMap<_, _> = lines
        .filter_map(|it| it.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers.get("content-length").map_or("0", String::as_str);
    let mut body = vec![0; length.parse().ok()?];
    stream.read_exact(&mut body).await.ok()?;
    Some(Request {
        method,
        path,
        headers,
        body,
    })
}
