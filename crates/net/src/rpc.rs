//! Unary rpc on streams: one request frame, one answer frame, one deadline.

use crate::{
    FaultKind, Incoming, OpenError, PeerFault, PeerId, Protocol, Stream, StreamError, Tasks, Transport,
};
use bytes::Bytes;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// How long a caller may take to deliver its request once its stream is open; guards against slow-loris callers.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the answer may take to leave.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Send `request` and wait for the answer until `deadline`. Dropping the future cancels the call at both ends.
///
/// # Errors
/// The fault of the peer: the caller collects it.
pub async fn call(
    transport: &dyn Transport,
    peer: PeerId,
    protocol: &Protocol,
    request: Bytes,
    deadline: Instant,
) -> Result<Bytes, PeerFault> {
    let exchange = async {
        let mut stream =
            transport.open(peer, protocol.clone()).await.map_err(|error| open_fault(peer, error))?;
        stream.send(request).await.map_err(|error| stream_fault(peer, &error))?;
        stream.finish().await.map_err(|error| stream_fault(peer, &error))?;
        match stream.recv().await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => {
                Err(PeerFault::new(peer, FaultKind::Refused, format!("{protocol}: closed without an answer")))
            }
            Err(error) => Err(stream_fault(peer, &error)),
        }
    };
    match tokio::time::timeout_at(deadline, exchange).await {
        Ok(result) => result,
        Err(_) => {
            Err(PeerFault::new(peer, FaultKind::Silent, format!("{protocol}: no answer before the deadline")))
        }
    }
}

/// The fault that a failed open is.
pub fn open_fault(peer: PeerId, error: OpenError) -> PeerFault {
    let kind = match &error {
        OpenError::Unreachable { .. } | OpenError::Closed => FaultKind::Unreachable,
        OpenError::UnknownProtocol { .. } | OpenError::Busy { .. } => FaultKind::Refused,
        OpenError::TimedOut { .. } => FaultKind::Silent,
    };
    PeerFault::new(peer, kind, error.to_string())
}

/// The fault that a broken stream is.
pub fn stream_fault(peer: PeerId, error: &StreamError) -> PeerFault {
    let kind = match error {
        StreamError::FrameTooLarge { .. } => FaultKind::Malformed,
        StreamError::Reset { .. } | StreamError::Finished => FaultKind::Reset,
    };
    PeerFault::new(peer, kind, error.to_string())
}

/// Answer requests with `handler`, at most `concurrent_max` at a time, until the transport closes or `tasks` ends.
/// A handler that returns `None` refuses: the caller sees [`FaultKind::Refused`].
pub fn serve<F, Fut>(mut incoming: Incoming, tasks: &Tasks, concurrent_max: usize, handler: F)
where
    F: Fn(PeerId, Bytes) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Option<Bytes>> + Send + 'static,
{
    let handler = Arc::new(handler);
    let permits = Arc::new(Semaphore::new(concurrent_max));
    let scope = Tasks::new();
    tasks.spawn(async move {
        // Taking the permit first makes the accept backlog the only queue, so overload reaches the opener as `Busy`.
        while let Ok(permit) = permits.clone().acquire_owned().await {
            let Some(stream) = incoming.next().await else { return };
            let handler = handler.clone();
            scope.spawn(async move {
                answer(stream, &*handler).await;
                drop(permit);
            });
        }
    });
}

async fn answer<F, Fut>(mut stream: Stream, handler: &F)
where
    F: Fn(PeerId, Bytes) -> Fut,
    Fut: Future<Output = Option<Bytes>>,
{
    let peer = stream.peer();
    let Ok(Ok(Some(request))) = tokio::time::timeout(REQUEST_TIMEOUT, stream.recv()).await else {
        tracing::debug!(target: "potluck::rpc", %peer, protocol = %stream.protocol(), "caller gave up");
        return;
    };
    let Some(reply) = handler(peer, request).await else {
        // An end without an answer is a refusal; a drop would look like a broken connection.
        if !matches!(tokio::time::timeout(ANSWER_TIMEOUT, stream.finish()).await, Ok(Ok(()))) {
            tracing::debug!(target: "potluck::rpc", %peer, protocol = %stream.protocol(), "refusal was not taken");
        }
        return;
    };
    let sent = tokio::time::timeout(ANSWER_TIMEOUT, async {
        stream.send(reply).await?;
        stream.finish().await
    });
    if !matches!(sent.await, Ok(Ok(()))) {
        tracing::debug!(target: "potluck::rpc", %peer, protocol = %stream.protocol(), "answer was not taken");
    }
}
