//! Makes each call a span, a count and a duration.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use tonic::{Code, Response, Status};
use tracing::{Instrument, debug, info, info_span, warn};

use super::status;
use crate::{metrics::Metrics, mount::MountError};

/// How much of a volume id that somebody made up is logged.
const MAX_SHOWN_BYTES: usize = 128;

/// Watches the calls of both services.
#[derive(Debug, Clone)]
pub(super) struct Observer {
    metrics: Metrics,
}

impl Observer {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { metrics }
    }

    /// Does the work of a call that concerns a volume, and answers with its outcome.
    pub(super) async fn call<T>(
        &self,
        rpc: &'static str,
        volume: &str,
        work: impl Future<Output = Result<T, MountError>>,
    ) -> Result<Response<T>, Status> {
        self.watch(rpc, volume, work, |took| {
            info!(seconds = took.as_secs_f64(), "call succeeded");
        })
        .await
    }

    /// As [`Self::call`], for one that comes every minute: its success is no news.
    pub(super) async fn call_often<T>(
        &self,
        rpc: &'static str,
        volume: &str,
        work: impl Future<Output = Result<T, MountError>>,
    ) -> Result<Response<T>, Status> {
        self.watch(rpc, volume, work, |took| {
            debug!(seconds = took.as_secs_f64(), "call succeeded");
        })
        .await
    }

    async fn watch<T>(
        &self,
        rpc: &'static str,
        volume: &str,
        work: impl Future<Output = Result<T, MountError>>,
        succeeded: impl FnOnce(Duration),
    ) -> Result<Response<T>, Status> {
        let shown = &volume[..volume.floor_char_boundary(MAX_SHOWN_BYTES)];
        let span = info_span!("csi", rpc, volume.id = shown);
        let pending = Pending::new(self, rpc);
        async move {
            let outcome = work.await.map_err(|err| status::status(&err));
            let (code, took) = pending.done(&outcome);
            match &outcome {
                Ok(_) => succeeded(took),
                Err(answer) => warn!(
                    code,
                    error = answer.message(),
                    seconds = took.as_secs_f64(),
                    "call failed"
                ),
            }
            outcome.map(Response::new)
        }
        .instrument(span)
        .await
    }

    /// Answers a call that cannot fail, and that comes too often to be logged.
    pub(super) fn quiet<T>(&self, rpc: &'static str, answer: T) -> Result<Response<T>, Status> {
        let outcome = Ok(answer);
        Pending::new(self, rpc).done(&outcome);
        debug!(rpc, "call succeeded");
        outcome.map(Response::new)
    }

    /// Answers a call that is not served.
    pub(super) fn unimplemented<T>(&self, rpc: &'static str) -> Result<Response<T>, Status> {
        let outcome = Err(Status::unimplemented(format!(
            "{rpc} is not served, and its capability not advertised"
        )));
        Pending::new(self, rpc).done(&outcome);
        debug!(rpc, "call is not served");
        outcome
    }
}

/// A call in flight: one that is dropped was cancelled by its client.
struct Pending<'a> {
    observer: &'a Observer,
    rpc: &'static str,
    since: Instant,
    code: Code,
}

impl<'a> Pending<'a> {
    fn new(observer: &'a Observer, rpc: &'static str) -> Self {
        Self {
            observer,
            rpc,
            since: Instant::now(),
            code: Code::Cancelled,
        }
    }

    fn done<T>(mut self, outcome: &Result<T, Status>) -> (&'static str, Duration) {
        self.code = match outcome {
            Ok(_) => Code::Ok,
            Err(status) => status.code(),
        };
        (status::name(self.code), self.since.elapsed())
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let metrics = &self.observer.metrics;
        metrics
            .csi_requests
            .with_label_values(&[self.rpc, status::name(self.code)])
            .inc();
        metrics
            .csi_request_duration
            .with_label_values(&[self.rpc])
            .observe(self.since.elapsed().as_secs_f64());
    }
}
