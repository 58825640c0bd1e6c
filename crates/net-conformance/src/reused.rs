//! What an open promises must hold as well where a stream that has ended is used again without asking.

use crate::{LIMIT, Network, STILL, accept, breaks, protocol, within};
use bytes::Bytes;
use futures::future::{Either, select};
use potluck_net::{FaultKind, Incoming, OpenError, PeerId, Stream, StreamError, Transport, rpc};
use std::pin::pin;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Nobody accepts the protocol any more: whoever opens a used stream learns it from the first call, and so does an rpc.
pub async fn an_unknown_protocol_is_refused_on_a_used_stream<N: Network>(network: &N) {
    let (a, b) = network.two_peers().await;
    let peer = b.local_peer();
    let mut incoming = accept(&*b, &protocol(), 1);
    use_streams(&*a, peer, &mut incoming, 2).await;
    drop(incoming);
    let unknown = OpenError::UnknownProtocol { peer, protocol: protocol() };
    let refused = async {
        loop {
            match a.open(peer, protocol()).await {
                // What has just ended cannot be used again at once.
                Err(error) => assert_eq!(error, unknown),
                Ok(mut stream) => {
                    assert_eq!(stream.recv().await, Err(StreamError::Refused(unknown.clone())));
                    let more = stream.send(Bytes::new()).await;
                    assert_eq!(more, Err(StreamError::Refused(unknown.clone())), "a frame after a refusal");
                    return;
                }
            }
        }
    };
    within("an unknown protocol on a used stream", refused).await;
    let fault = rpc::call(&*a, peer, &protocol(), Bytes::new(), Instant::now() + LIMIT).await;
    assert_eq!(fault.expect_err("nobody accepts it").kind, FaultKind::Refused);
}

/// The backlog is full: whoever opens a used stream learns it from the first call. What was taken before is served.
pub async fn a_full_backlog_is_told_on_a_used_stream<N: Network>(network: &N) {
    let (a, b) = network.two_peers().await;
    let peer = b.local_peer();
    let mut incoming = accept(&*b, &protocol(), 1);
    use_streams(&*a, peer, &mut incoming, 3).await;
    let busy = OpenError::Busy { peer, protocol: protocol() };
    let told = async {
        loop {
            let mut first = a.open(peer, protocol()).await.expect("the backlog has room");
            let mut second = match a.open(peer, protocol()).await {
                // It was asked for, so that the first one is in the backlog.
                Err(error) => {
                    assert_eq!(error, busy);
                    let mut theirs = incoming.next().await.expect("not closed");
                    echo(&mut first, &mut theirs).await;
                    continue;
                }
                Ok(second) => second,
            };
            // Which of the two has come first is open. The other one gets no answer before it is accepted.
            let first_refused = match select(pin!(first.recv()), pin!(second.recv())).await {
                Either::Left((refused, _)) => {
                    assert_eq!(refused, Err(StreamError::Refused(busy.clone())));
                    true
                }
                Either::Right((refused, _)) => {
                    assert_eq!(refused, Err(StreamError::Refused(busy.clone())));
                    false
                }
            };
            let fault = rpc::call(&*a, peer, &protocol(), Bytes::new(), Instant::now() + LIMIT).await;
            assert_eq!(fault.expect_err("the backlog is full").kind, FaultKind::Busy);
            let mut theirs = incoming.next().await.expect("not closed");
            echo(if first_refused { &mut second } else { &mut first }, &mut theirs).await;
            return;
        }
    };
    within("a full backlog on a used stream", told).await;
}

/// What is kept of a peer that has died holds up nobody beyond the deadline, even if it opens at once.
pub async fn a_dead_peer_fails_within_the_deadline_on_a_used_stream<N: Network>(network: &N) {
    let (a, b) = network.two_peers().await;
    let peer = b.local_peer();
    let mut incoming = accept(&*b, &protocol(), 1);
    use_streams(&*a, peer, &mut incoming, 2).await;
    network.kill(peer).await;
    drop((incoming, b));
    let (start, patience) = (Instant::now(), Duration::from_secs(5));
    let fault = rpc::call(&*a, peer, &protocol(), Bytes::new(), start + patience).await;
    assert_eq!(fault.expect_err("the peer is dead").peer, peer);
    assert!(start.elapsed() < patience + STILL, "a call outlasted its deadline: {:?}", start.elapsed());
    let opened = timeout(Duration::from_secs(20), a.open(peer, protocol())).await;
    let opened = opened.expect("an open ends by itself within 15 s");
    if let (Ok(mut stream), Some(limit)) = (opened, network.noticed_within()) {
        breaks("a used stream", limit, &mut stream).await;
    }
}

/// As many streams at once, which both sides then end, so that others may begin on them.
async fn use_streams(a: &dyn Transport, peer: PeerId, incoming: &mut Incoming, count: usize) {
    let mut pairs = Vec::new();
    for _ in 0..count {
        let ours = within("open", a.open(peer, protocol())).await.expect("the peer accepts");
        pairs.push((ours, within("accept", incoming.next()).await.expect("not closed")));
    }
    for (ours, theirs) in &mut pairs {
        within("an exchange", echo(ours, theirs)).await;
    }
}

/// One frame there and back, and both ends.
async fn echo(ours: &mut Stream, theirs: &mut Stream) {
    let one_way = async |from: &mut Stream, to: &mut Stream| {
        from.send(Bytes::from_static(b"hello")).await.expect("open");
        from.finish().await.expect("open");
        assert_eq!(to.recv().await, Ok(Some(Bytes::from_static(b"hello"))));
        assert_eq!(to.recv().await, Ok(None));
    };
    one_way(ours, theirs).await;
    one_way(theirs, ours).await;
}
