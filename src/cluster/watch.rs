//! Follows the objects of a kind, and keeps none of them.
//!
//! A listing in pages, then a watch from its version on, with bookmarks; a watch that has lost its place begins with
//! a listing again. Whoever is told of an object keeps what they need of it: a page of fifty is what is held at most,
//! where a store of whole objects takes as much as the cluster has (a page of 500 Pods alone is 64 MiB, of 50 it is 13).

use std::{fmt::Debug, time::Duration};

use futures_util::StreamExt;
use kube::{
    Api, Resource,
    api::{ListParams, WatchEvent, WatchParams},
};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, warn};

use crate::telemetry::error_chain;

/// Objects of one page.
const PAGE: u32 = 50;

/// How long one watch goes on: the API server is asked to end it then.
const WATCH_SECONDS: u32 = 240;

/// How long a watch is waited on in all. One that the API server has not ended half a minute late has a connection that
/// died without a word: nothing would ever come, for no read of it has a deadline of its own.
const WATCH_TIMEOUT: Duration = Duration::from_secs(WATCH_SECONDS as u64 + 30);

/// How long a page, or the begin of a watch, may take: an API server gives a request a minute.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(65);

/// First wait after a failure; each further one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(500);

/// Longest wait: a cluster of nodes must not crowd an API server that comes back.
const MAX_WAIT: Duration = Duration::from_secs(30);

/// What is seen of the objects of a kind.
#[derive(Debug)]
pub enum Seen<K> {
    /// A listing begins: what it does not name before [`Seen::Listed`] is not there any more.
    Listing,
    /// An object is there, like this.
    Is(Box<K>),
    /// An object has gone; this was it.
    Gone(Box<K>),
    /// The listing has named all.
    Listed,
}

impl<K> Seen<K> {
    /// Makes something smaller of the object.
    pub fn map<T>(self, of: impl FnOnce(K) -> T) -> Seen<T> {
        match self {
            Self::Listing => Seen::Listing,
            Self::Listed => Seen::Listed,
            Self::Is(object) => Seen::Is(Box::new(of(*object))),
            Self::Gone(object) => Seen::Gone(Box::new(of(*object))),
        }
    }
}

/// Which objects of a kind are meant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    /// Only those with these labels.
    pub labels: Option<String>,
    /// Only those with these fields.
    pub fields: Option<String>,
}

/// What a failed watch does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// A listing: the version is too old.
    List,
    /// The watch that follows a listing.
    First,
    /// Another watch from the same version.
    Watch,
}

/// Tells `see` what there is and what changes, for ever.
///
/// # Cancellation
/// Safe.
pub async fn watch<K>(api: Api<K>, selector: Selector, mut see: impl AsyncFnMut(Seen<K>))
where
    K: Resource + Clone + Debug + DeserializeOwned + 'static,
{
    let mut wait = FIRST_WAIT;
    let mut version = None;
    let mut last_error = String::new();
    loop {
        let begin = Instant::now();
        let step = match &version {
            None => list(&api, &selector, &mut see).await.map(|it| {
                version = Some(it);
                Next::First
            }),
            Some(from) => {
                let mut at = from.clone();
                let end = begin + WATCH_TIMEOUT;
                let step = follow(&api, &selector, &mut at, end, &mut see).await;
                version = Some(at);
                step
            }
        };
        match step {
            Ok(next) => {
                if next == Next::List {
                    version = None;
                }
                // A watch that ends as soon as it begins is no reason to ask as fast as one can.
                if next != Next::First && begin.elapsed() < FIRST_WAIT {
                    sleep(FIRST_WAIT).await;
                }
                wait = FIRST_WAIT;
                last_error.clear();
            }
            Err(err) => {
                let text = error_chain(&err);
                // Once for each cause: the API server may be down for hours.
                if text != last_error {
                    warn!(
                        url = api.resource_url(),
                        error = text,
                        "a watch failed, trying again"
                    );
                    last_error = text;
                }
                sleep(wait).await;
                wait = (wait * 2).min(MAX_WAIT);
            }
        }
    }
}

/// Tells of all that is there; returns the version of the listing.
async fn list<K>(
    api: &Api<K>,
    selector: &Selector,
    see: &mut impl AsyncFnMut(Seen<K>),
) -> kube::Result<String>
where
    K: Resource + Clone + Debug + DeserializeOwned + 'static,
{
    let mut params = ListParams {
        label_selector: selector.labels.clone(),
        field_selector: selector.fields.clone(),
        limit: Some(PAGE),
        ..ListParams::default()
    };
    see(Seen::Listing).await;
    loop {
        let page = match answered(api.list(&params)).await {
            Ok(page) => page,
            // The listing took longer than the API server remembers: from the beginning.
            Err(kube::Error::Api(status))
                if status.code == 410 && params.continue_token.is_some() =>
            {
                params.continue_token = None;
                see(Seen::Listing).await;
                continue;
            }
            Err(err) => return Err(err),
        };
        for object in page.items {
            see(Seen::Is(Box::new(object))).await;
        }
        match page.metadata.continue_.filter(|it| !it.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => {
                see(Seen::Listed).await;
                return Ok(page.metadata.resource_version.unwrap_or_default());
            }
        }
    }
}

/// Tells of changes from `version` on, which goes on with them, until the watch ends; at `end` if nothing comes any more.
async fn follow<K>(
    api: &Api<K>,
    selector: &Selector,
    version: &mut String,
    end: Instant,
    see: &mut impl AsyncFnMut(Seen<K>),
) -> kube::Result<Next>
where
    K: Resource + Clone + Debug + DeserializeOwned + 'static,
{
    let params = WatchParams {
        label_selector: selector.labels.clone(),
        field_selector: selector.fields.clone(),
        ..WatchParams::default()
    };
    let params = params.timeout(WATCH_SECONDS);
    let changes = match answered(api.watch(&params, version)).await {
        Ok(changes) => changes,
        Err(kube::Error::Api(status)) if status.code == 410 => return Ok(Next::List),
        Err(err) => return Err(err),
    };
    tokio::pin!(changes);
    loop {
        let change = match timeout_at(end, changes.next()).await {
            Ok(Some(change)) => change?,
            Ok(None) => return Ok(Next::Watch),
            Err(_) => {
                warn!(
                    url = api.resource_url(),
                    "a watch did not end in time, beginning another one"
                );
                return Ok(Next::Watch);
            }
        };
        match change {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                advance(version, &object);
                see(Seen::Is(Box::new(object))).await;
            }
            WatchEvent::Deleted(object) => {
                advance(version, &object);
                see(Seen::Gone(Box::new(object))).await;
            }
            WatchEvent::Bookmark(mark) => {
                debug!(version = mark.metadata.resource_version, "bookmark");
                *version = mark.metadata.resource_version;
            }
            // What went wrong is in a status; a version that is too old is usual after a pause.
            WatchEvent::Error(status) if status.code == 410 => return Ok(Next::List),
            WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
        }
    }
}

/// What the API server answers, or that it does not.
async fn answered<T>(request: impl Future<Output = kube::Result<T>>) -> kube::Result<T> {
    match timeout(ANSWER_TIMEOUT, request).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(kube::Error::Service(elapsed.into())),
    }
}

/// Goes on to what `object` was the news of.
fn advance(version: &mut String, object: &impl Resource) {
    if let Some(at) = &object.meta().resource_version {
        version.clone_from(at);
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Node;
    use kube::Client;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    #[tokio::test]
    async fn a_watch_on_a_connection_that_died_without_a_word_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serving = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 4096];
            let n_read = stream.read(&mut request).await.unwrap();
            assert_ne!(n_read, 0);
            let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
            stream.write_all(head).await.unwrap();
            let object = br#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"a","resourceVersion":"7"}}"#;
            let change = [br#"{"type":"ADDED","object":"#.as_slice(), object, b"}\n"].concat();
            let chunk = [
                format!("{:x}\r\n", change.len()).as_bytes(),
                &change,
                b"\r\n",
            ]
            .concat();
            stream.write_all(&chunk).await.unwrap();
            // Neither a byte nor an end.
            std::future::pending::<()>().await;
        };
        let config = kube::Config::new(url.parse().unwrap());
        let api: Api<Node> = Api::all(Client::try_from(config).unwrap());
        let selector = Selector::default();
        let (mut version, mut n_seen) = ("1".to_owned(), 0);
        let mut see = async |_| n_seen += 1;
        let end = Instant::now() + Duration::from_millis(300);
        let following = follow(&api, &selector, &mut version, end, &mut see);
        let step = tokio::select! {
            () = serving => unreachable!("it serves for ever"),
            step = timeout(Duration::from_secs(20), following) => step,
        };
        assert_eq!(step.expect("it ends").unwrap(), Next::Watch);
        // What came before counts: the next one goes on from there.
        assert_eq!((version.as_str(), n_seen), ("7", 1));
    }
}
