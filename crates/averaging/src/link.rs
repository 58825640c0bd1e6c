//! One control stream: hello in both directions, then frames both ways until it breaks.

use crate::invite::Invite;
use crate::swarm::{Inner, Manifest, run_protocol};
use crate::wire::{Control, Hello, PROTOCOL_VERSION, decode_control, encode_control};
use bytes::Bytes;
use potluck_net::rpc::{open_fault, stream_fault};
use potluck_net::{FaultKind, Incoming, PeerFault, PeerId, Protocol, Stream};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Time for the first message of a stream that somebody opened to us.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams that may be shaking hands at a time.
const HANDSHAKES_MAX: usize = 64;

/// Why there is no control stream.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("refused: {0}")]
    Refused(String),
    #[error("{0}")]
    Failed(PeerFault),
}

pub(crate) fn protocol(run: &str) -> Protocol {
    run_protocol("control", run)
}

/// Open a control stream to `peer`; its task goes on in the background.
pub(crate) async fn connect(
    inner: &Arc<Inner>,
    peer: PeerId,
    deadline: Instant,
) -> (PeerId, Result<(), LinkError>) {
    let silent =
        || LinkError::Failed(PeerFault::new(peer, FaultKind::Silent, "control stream: no answer in time"));
    let result = match tokio::time::timeout_at(deadline, handshake(inner, peer)).await {
        Ok(result) => result,
        Err(_) => Err(silent()),
    };
    let done = result.map(|(stream, hello)| {
        let link = inner.add_link(peer, hello);
        inner.spawn(run_link(inner.clone(), stream, link));
    });
    (peer, done)
}

/// As [`connect`], but a stream that breaks on the way is no answer yet: try up to three times.
pub(crate) async fn connect_patiently(
    inner: &Arc<Inner>,
    peer: PeerId,
    deadline: Instant,
) -> (PeerId, Result<(), LinkError>) {
    for _ in 0..2 {
        match connect(inner, peer, deadline).await.1 {
            Err(LinkError::Failed(fault)) if fault.kind == FaultKind::Reset => {}
            result => return (peer, result),
        }
    }
    connect(inner, peer, deadline).await
}

async fn handshake(inner: &Arc<Inner>, peer: PeerId) -> Result<(Stream, Hello), LinkError> {
    let failed = |fault| LinkError::Failed(fault);
    let mut stream = inner
        .transport
        .open(peer, protocol(&inner.config.run))
        .await
        .map_err(|error| failed(open_fault(peer, error)))?;
    let broke = |error: &_| LinkError::Failed(stream_fault(peer, error));
    let hello = encode_control(&Control::Hello(Box::new(inner.hello())));
    stream.send(hello).await.map_err(|error| broke(&error))?;
    let Some(frame) = stream.recv().await.map_err(|error| broke(&error))? else {
        return Err(failed(PeerFault::new(peer, FaultKind::Refused, "control stream closed at hello")));
    };
    match decode_control(&frame) {
        Ok(Control::Hello(hello)) => match objection(inner, &hello) {
            None => Ok((stream, *hello)),
            Some(reason) => Err(LinkError::Refused(reason)),
        },
        Ok(Control::Refuse(reason)) => Err(LinkError::Refused(printable(&reason))),
        Ok(_) => Err(failed(PeerFault::new(peer, FaultKind::Malformed, "first message is no hello"))),
        Err(error) => Err(failed(PeerFault::new(peer, FaultKind::Malformed, error.to_string()))),
    }
}

/// Accept control streams until the transport closes.
pub(crate) async fn accept(inner: Arc<Inner>, mut incoming: Incoming) {
    let permits = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES_MAX));
    while let Ok(permit) = permits.clone().acquire_owned().await {
        let Some(stream) = incoming.next().await else { return };
        let shaking = inner.clone();
        inner.spawn(async move {
            let welcomed = tokio::time::timeout(HELLO_TIMEOUT, welcome(&shaking, stream)).await;
            drop(permit);
            if let Ok(Some((stream, hello))) = welcomed {
                let link = shaking.add_link(stream.peer(), hello);
                run_link(shaking, stream, link).await;
            }
        });
    }
}

async fn welcome(inner: &Arc<Inner>, mut stream: Stream) -> Option<(Stream, Hello)> {
    let frame = stream.recv().await.ok()??;
    let Ok(Control::Hello(hello)) = decode_control(&frame) else { return None };
    if let Some(reason) = objection(inner, &hello) {
        tracing::warn!(target: "potluck::swarm", peer = %stream.peer().short(), %reason, "refused a peer");
        stream.send(encode_control(&Control::Refuse(reason))).await.ok()?;
        stream.finish().await.ok()?;
        // The opener closes; a reset here could overtake the reason.
        let _end = stream.recv().await;
        return None;
    }
    stream.send(encode_control(&Control::Hello(Box::new(inner.hello())))).await.ok()?;
    Some((stream, *hello))
}

/// What is wrong with a peer's hello, in words that fit both sides.
fn objection(inner: &Inner, hello: &Hello) -> Option<String> {
    if hello.version != PROTOCOL_VERSION {
        return Some(format!("protocol version {} here, {} there", PROTOCOL_VERSION, hello.version));
    }
    if hello.run != inner.config.run {
        return Some(format!("another run: {:?} here, {:?} there", inner.config.run, hello.run));
    }
    if let Some(owner) = &inner.config.owner {
        let invite = hello.invite.as_deref().and_then(Invite::from_bytes);
        if !invite.is_some_and(|invite| invite.is_valid(owner, &hello.run)) {
            return Some("this run is closed and the invite is missing or not signed by its owner".into());
        }
    }
    let fields = differing(&inner.config.manifest, &hello.manifest);
    (!fields.is_empty()).then(|| format!("the manifests differ: {}", fields.join("; ")))
}

/// What another peer says, for people's eyes: its words, without line ends or other controls, and not too many.
fn printable(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(2000).collect()
}

fn differing(here: &Manifest, there: &Manifest) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = here.keys().chain(there.keys()).collect();
    let text = |value: Option<&String>| value.map_or("nothing".to_owned(), |v| format!("{v:.200?}"));
    names
        .into_iter()
        .filter(|name| here.get(*name) != there.get(*name))
        .map(|name| format!("{}: {} and {}", printable(name), text(here.get(name)), text(there.get(name))))
        .collect()
}

async fn run_link(inner: Arc<Inner>, stream: Stream, (id, mut queue): (u64, mpsc::Receiver<Bytes>)) {
    let peer = stream.peer();
    let (mut sender, mut receiver) = stream.split();
    let write = async {
        while let Some(frame) = queue.recv().await {
            if sender.send(frame).await.is_err() {
                return;
            }
        }
    };
    let read = async {
        loop {
            let Ok(Some(frame)) = receiver.recv().await else { return };
            let message = match decode_control(&frame) {
                Ok(message) => message,
                Err(error) => {
                    tracing::warn!(target: "potluck::swarm", peer = %peer.short(), %error, "closed a control stream");
                    return;
                }
            };
            inner.on_control(peer, message);
        }
    };
    tokio::select! {
        biased;
        () = read => {}
        () = write => {}
    }
    inner.remove_link(peer, id);
}
