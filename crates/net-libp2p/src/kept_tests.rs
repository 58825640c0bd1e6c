//! Tests of byte streams that are used again, in memory and between two real transports.

use super::*;
use crate::pipe::Pipe;
use crate::transport::BULK_BYTES_MIN;
use crate::{Config, Libp2pTransport};
use bytes::Bytes;
use futures::SinkExt;
use potluck_net::{Env, Identity, Incoming, OpenError, StreamError, Transport};
use proptest::prelude::*;
use tokio::io::duplex;

const NAME: &str = "/test/kept/1";
const PATIENCE: Duration = Duration::from_secs(20);

/// Keeps what an ended stream leaves.
#[derive(Clone, Default)]
struct Heir(Arc<Mutex<Option<Left<Pipe>>>>);

impl Owner<Pipe> for Heir {
    fn sent(&self, _: usize) {}
    fn received(&self, _: usize) {}
    fn refusal(&self, _: u32) -> Option<StreamError> {
        None
    }
    fn retire(&self, left: Left<Pipe>) {
        *lock(&self.0) = Some(left);
    }
}

/// What is left of a stream on which the other side had written `bytes`, after `reads` frames were read of it.
async fn left_after(bytes: &[u8], reads: usize) -> (Left<Pipe>, Pipe) {
    let (near, far) = duplex(1 << 16);
    let mut far = Pipe(far);
    far.write_all(bytes).await.unwrap();
    let heir = Heir::default();
    let (sink, frames) = wire::frames(Pipe(near), heir.clone(), &Arc::default());
    let mut frames = Box::pin(frames);
    for _ in 0..reads {
        futures::StreamExt::next(&mut frames).await.unwrap().unwrap();
    }
    drop((sink, frames));
    let left = lock(&heir.0).take().expect("it ended with a frame");
    (left, far)
}

fn frame(payload: &[u8]) -> Vec<u8> {
    [&(payload.len() as u32).to_be_bytes()[..], payload].concat()
}

#[tokio::test]
async fn what_was_not_read_passes_and_the_next_stream_begins_behind_it() {
    let bytes = [frame(&[1; 10]), frame(&[]), frame(&[2; 3000]), FINISHED.to_be_bytes().to_vec(), vec![7]];
    for reads in 0..=3 {
        let (left, mut far) = left_after(&bytes.concat(), reads).await;
        assert!(left.untold == Some(DROPPED) && left.unread.is_some());
        let mut settled = settle(left).await.expect("it can be used again");
        let mut next = [0];
        settled.read_exact(&mut next).await.unwrap();
        assert_eq!(next, [7]);
        let mut told = [0; HEAD_BYTES];
        far.read_exact(&mut told).await.unwrap();
        assert_eq!(u32::from_be_bytes(told), DROPPED);
    }
}

#[tokio::test]
async fn too_much_or_nothing_behind_an_ended_stream_is_a_reset() {
    let (endless, _far) = left_after(&frame(&[1])[..4], 0).await;
    let settled = tokio::time::timeout(Duration::from_millis(50), settle(endless)).await;
    assert!(settled.is_err(), "it waits for the rest");
    let huge = (UNREAD_BYTES_MAX as u32 + 1).to_be_bytes();
    let (left, _far) = left_after(&huge, 0).await;
    assert!(settle(left).await.is_none());
    let (left, far) = left_after(&frame(&[1]), 1).await;
    drop(far);
    assert!(settle(left).await.is_none());
}

#[tokio::test]
async fn half_a_frame_cannot_be_taken_back() {
    let (near, _far) = duplex(64);
    let heir = Heir::default();
    let (mut sink, frames) = wire::frames(Pipe(near), heir.clone(), &Arc::default());
    let sending = sink.send(Bytes::from(vec![1; 1000]));
    assert!(tokio::time::timeout(Duration::from_millis(20), sending).await.is_err());
    drop((sink, frames));
    assert!(lock(&heir.0).is_none());
}

proptest! {
    #[test]
    fn random_bytes_settle_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0..5_usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (near, far) = duplex(1 << 16);
            let mut far = Pipe(far);
            far.write_all(&bytes).await.unwrap();
            drop(far);
            let place = Place { head: [0; HEAD_BYTES], head_len: at, rest: 0 };
            let left = Left { bytes: Pipe(near), untold: None, unread: Some(place) };
            let _either = settle(left).await;
        });
    }
}

struct Pair {
    opener: Arc<Libp2pTransport>,
    acceptor: Arc<Libp2pTransport>,
    incoming: Incoming,
}

impl Pair {
    async fn new(listen: &str) -> Self {
        let mut config = Config::loopback(Identity::from_seed(&[2; 32]));
        config.listen = vec![listen.to_owned()];
        let acceptor = Libp2pTransport::start(config, Env::real()).await.unwrap();
        let pair = Self::between(acceptor).await;
        pair.opener.add_addresses(pair.acceptor.local_peer(), &pair.acceptor.addresses());
        pair
    }

    /// The opener knows no address of the acceptor yet.
    async fn between(acceptor: Arc<Libp2pTransport>) -> Self {
        let mut config = Config::loopback(Identity::from_seed(&[1; 32]));
        config.listen = BOTH.map(str::to_owned).to_vec();
        let opener = Libp2pTransport::start(config, Env::real()).await.unwrap();
        let incoming = acceptor.accept(Protocol::new(NAME), 1).unwrap();
        Self { opener, acceptor, incoming }
    }

    async fn open(&self) -> Result<Stream, OpenError> {
        self.opener.open(self.acceptor.local_peer(), Protocol::new(NAME)).await
    }

    /// A request and its answer; both sides of the stream have ended then.
    async fn exchange(&mut self) {
        let mut ours = self.open().await.unwrap();
        ours.send(Bytes::from_static(b"ping")).await.unwrap();
        ours.finish().await.unwrap();
        let mut theirs = self.incoming.next().await.unwrap();
        assert_eq!(theirs.recv().await.unwrap().unwrap(), "ping");
        theirs.send(Bytes::from_static(b"pong")).await.unwrap();
        theirs.finish().await.unwrap();
        assert_eq!(ours.recv().await.unwrap().unwrap(), "pong");
        assert_eq!(ours.recv().await.unwrap(), None);
    }

    /// Until so many byte streams are kept here, and the other side is ready on each.
    async fn keeps(&self, count: usize) {
        let ready = || {
            let mut idle = lock(&self.opener.shared().kept.idle);
            let all: Vec<&mut Idle> = idle.values_mut().flatten().collect();
            all.len() == count && all.into_iter().all(|one| one.poll_usable() == Poll::Ready(true))
        };
        let reached = async {
            while !ready() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(PATIENCE, reached).await.expect("the byte stream is kept");
    }

    fn kept(&self) -> usize {
        lock(&self.opener.shared().kept.idle).values().map(Vec::len).sum()
    }
}

const BOTH: [&str; 2] = ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"];

#[tokio::test]
async fn an_ended_stream_is_used_again() {
    for listen in BOTH {
        let mut pair = Pair::new(listen).await;
        for _ in 0..20 {
            pair.exchange().await;
            pair.keeps(1).await;
        }
        let ours = pair.open().await.unwrap();
        assert_eq!(pair.kept(), 0);
        drop((ours, pair.incoming.next().await));
        pair.keeps(1).await;
    }
}

#[tokio::test]
async fn a_dropped_stream_is_a_reset_and_its_byte_stream_is_used_again() {
    for listen in BOTH {
        let mut pair = Pair::new(listen).await;
        for theirs_first in [true, false, true] {
            let mut ours = pair.open().await.unwrap();
            ours.send(Bytes::from_static(b"ping")).await.unwrap();
            let mut theirs = pair.incoming.next().await.unwrap();
            let mut last = if theirs_first {
                drop(theirs);
                ours
            } else {
                assert_eq!(theirs.recv().await.unwrap().unwrap(), "ping");
                drop(ours);
                theirs
            };
            assert!(matches!(last.recv().await, Err(StreamError::Reset { .. })));
            assert!(matches!(last.send(Bytes::new()).await, Err(StreamError::Reset { .. })));
            drop(last);
            pair.keeps(1).await;
        }
    }
}

#[tokio::test]
async fn a_side_that_holds_on_to_its_ended_stream_holds_up_nobody() {
    let mut pair = Pair::new(BOTH[0]).await;
    let mut ours = pair.open().await.unwrap();
    ours.finish().await.unwrap();
    let mut held = pair.incoming.next().await.unwrap();
    held.finish().await.unwrap();
    assert_eq!(ours.recv().await.unwrap(), None);
    drop(ours);
    // It has not read our end, so it is not ready; the next stream is a new one.
    timeout(PATIENCE, pair.exchange()).await.unwrap();
    assert_eq!(held.recv().await.unwrap(), None);
    drop(held);
    pair.keeps(2).await;
}

impl Pair {
    /// A byte stream is kept, and the acceptor takes no other: nobody accepts there any more, or somebody is busy.
    async fn refusing(listen: &str, busy: bool) -> (Self, OpenError) {
        let mut pair = Self::new(listen).await;
        pair.exchange().await;
        pair.keeps(1).await;
        let (peer, protocol) = (pair.acceptor.local_peer(), Protocol::new(NAME));
        let elsewhere = pair.acceptor.accept(Protocol::new("/test/other/1"), 1).unwrap();
        drop(std::mem::replace(&mut pair.incoming, elsewhere));
        if !busy {
            return (pair, OpenError::UnknownProtocol { peer, protocol });
        }
        pair.incoming = pair.acceptor.accept(protocol.clone(), 1).unwrap();
        // What is kept stays aside while the only place is taken, and comes back.
        let aside = std::mem::take(&mut *lock(&pair.opener.shared().kept.idle));
        drop(pair.open().await.unwrap());
        *lock(&pair.opener.shared().kept.idle) = aside;
        (pair, OpenError::Busy { peer, protocol })
    }
}

#[tokio::test]
async fn a_refusal_on_a_byte_stream_that_was_kept_is_told_and_the_byte_stream_is_used_again() {
    for (listen, busy) in BOTH.into_iter().flat_map(|listen| [(listen, false), (listen, true)]) {
        let (mut pair, refusal) = Pair::refusing(listen, busy).await;
        for _ in 0..3 {
            let mut ours = pair.open().await.expect("it is begun again");
            ours.send(Bytes::from_static(b"ping")).await.unwrap();
            assert_eq!(ours.recv().await, Err(StreamError::Refused(refusal.clone())));
            assert_eq!(ours.recv().await, Err(StreamError::Refused(refusal.clone())));
            assert_eq!(ours.send(Bytes::new()).await, Err(StreamError::Refused(refusal.clone())));
            drop(ours);
            pair.keeps(1).await;
        }
        if busy {
            let waiting = pair.incoming.next().await.unwrap();
            drop(waiting);
        } else {
            pair.incoming = pair.acceptor.accept(Protocol::new(NAME), 1).unwrap();
        }
        timeout(PATIENCE, pair.exchange()).await.unwrap();
    }
}

#[tokio::test]
async fn whoever_only_sends_is_told_of_a_refusal_as_well() {
    for listen in BOTH {
        let (pair, refusal) = Pair::refusing(listen, true).await;
        let mut ours = pair.open().await.expect("it is begun again");
        // More than is skipped behind a refusal.
        let sent = async {
            loop {
                if let Err(error) = ours.send(Bytes::from(vec![0; UNREAD_BYTES_MAX])).await {
                    return error;
                }
            }
        };
        assert_eq!(timeout(PATIENCE, sent).await.unwrap(), StreamError::Refused(refusal));
    }
}

#[tokio::test]
async fn what_is_kept_is_bounded_and_ends_with_its_time() {
    let mut pair = Pair::new(BOTH[0]).await;
    let many = KEPT_PER_PROTOCOL_MAX + 3;
    let mut both = Vec::new();
    for _ in 0..many {
        let ours = pair.open().await.unwrap();
        both.push((ours, pair.incoming.next().await.unwrap()));
    }
    drop(both);
    pair.keeps(KEPT_PER_PROTOCOL_MAX).await;
    pair.opener.shared().kept.sweep(Instant::now() + KEPT_FOR - Duration::from_secs(1));
    assert_eq!(pair.kept(), KEPT_PER_PROTOCOL_MAX);
    pair.opener.shared().kept.sweep(Instant::now() + KEPT_FOR);
    assert_eq!(pair.kept(), 0);
    pair.exchange().await;
    pair.keeps(1).await;
    pair.opener.close().await;
    assert_eq!(pair.kept(), 0);
}

#[tokio::test]
async fn whoever_moves_much_over_quic_gets_tcp_as_well_and_uses_it() {
    let mut config = Config::loopback(Identity::from_seed(&[2; 32]));
    config.listen = BOTH.map(str::to_owned).to_vec();
    let acceptor = Libp2pTransport::start(config, Env::real()).await.unwrap();
    let mut pair = Pair::between(acceptor).await;
    let (quic, tcp) = pair.acceptor.addresses().into_iter().partition::<Vec<_>, _>(|at| at.contains("quic"));
    assert_eq!((quic.len(), tcp.len()), (1, 1));
    let peer = pair.acceptor.local_peer();
    pair.opener.add_addresses(peer, &quic);
    pair.exchange().await;
    let is_quic = || pair.opener.shared().peers.best(peer).unwrap().0.quic;
    assert!(is_quic());
    pair.opener.add_addresses(peer, &tcp);
    for _ in 0..=BULK_BYTES_MIN >> 20 {
        let mut ours = pair.open().await.unwrap();
        let mut theirs = pair.incoming.next().await.unwrap();
        let (sent, got) = tokio::join!(ours.send(vec![7; 1 << 20].into()), theirs.recv());
        assert!(sent.is_ok() && got.unwrap().is_some());
    }
    let upgraded = async {
        while is_quic() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(PATIENCE, upgraded).await.expect("it is dialed");
    pair.exchange().await;
}
