//! What every [`Transport`] must do, as functions that panic with the property that was broken.
//!
//! A transport's tests implement [`Network`] and await [`run_all`], or one property at a time for a readable report:
//! the functions are public and need nothing but the network.
//!
//! Every wait has a limit of [`LIMIT`], by tokio's clock; run simulated networks with paused time.

mod reused;

pub use reused::*;

use bytes::Bytes;
use futures::future::join_all;
use futures::join;
use potluck_net::{
    AcceptError, FRAME_BYTES_MAX, Identity, Incoming, OpenError, PeerId, Protocol, Stream, StreamError,
    Transport, rpc,
};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long anything that must happen may take.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Streams that are opened at once by [`many_streams_at_once_are_all_served`].
const STREAMS: usize = 1500;
/// How long a writer must stand still to count as waiting.
const STILL: Duration = Duration::from_secs(2);

/// A network under test.
pub trait Network {
    /// Two new peers that can reach each other, with nothing accepted yet.
    fn two_peers(&self) -> impl Future<Output = (Arc<dyn Transport>, Arc<dyn Transport>)>;

    /// End this peer without a goodbye, as a killed process does. Its transport need not work afterwards.
    fn kill(&self, peer: PeerId) -> impl Future<Output = ()>;

    /// Somebody who keeps to no limit opens two streams of this protocol to this peer, one after the other, and sends a frame
    /// longer than [`FRAME_BYTES_MAX`], or its header, on the second. A frame that comes on the first one it sends back. The
    /// streams stay open until this is dropped; if one ends, that is the reason.
    fn send_oversize(&self, to: Arc<dyn Transport>, protocol: Protocol) -> impl Future<Output = String>;

    /// How long it may take until a connection to a peer that was killed counts as broken, where nothing else ends it.
    /// `None`: longer than a test should wait.
    fn noticed_within(&self) -> Option<Duration> {
        Some(LIMIT)
    }

    /// Most bytes that a sender may be ahead of a reader that does not read: all windows and buffers between them.
    fn ahead_bytes_max(&self) -> usize {
        32 << 20
    }
}

/// Every property, one after the other.
pub async fn run_all<N: Network>(network: &N) {
    frames_arrive_whole_and_in_order(network).await;
    a_finished_half_leaves_the_other_open(network).await;
    an_answer_survives_the_drop_of_its_sender(network).await;
    a_dropped_stream_is_reset(network).await;
    a_dropped_sender_resets_the_reader(network).await;
    a_dropped_receiver_stops_the_writer(network).await;
    a_cancelled_recv_loses_nothing(network).await;
    a_slow_reader_makes_the_writer_wait(network).await;
    an_oversize_frame_is_refused_by_its_sender(network).await;
    an_oversize_frame_is_refused_by_its_receiver(network).await;
    an_unknown_protocol_is_refused(network).await;
    an_unknown_peer_is_unreachable(network).await;
    a_full_backlog_reaches_the_opener(network).await;
    a_protocol_has_one_owner_at_a_time(network).await;
    many_streams_at_once_are_all_served(network).await;
    a_dead_peer_fails_within_the_deadline(network).await;
    close_is_final_and_idempotent(network).await;
    connections_are_reported(network).await;
    an_unknown_protocol_is_refused_on_a_used_stream(network).await;
    a_full_backlog_is_told_on_a_used_stream(network).await;
    a_dead_peer_fails_within_the_deadline_on_a_used_stream(network).await;
}

/// Frames of 0, 1, 65,536 and [`FRAME_BYTES_MAX`] bytes arrive whole and in order, both ways at once.
pub async fn frames_arrive_whole_and_in_order<N: Network>(network: &N) {
    let (mut ours, mut theirs) = streams(network).await.pair;
    let sizes = [0, 1, 64 << 10, FRAME_BYTES_MAX, 0, 1000, FRAME_BYTES_MAX - 1, 3];
    // Full duplex: split, so that neither direction waits for the other.
    let exchange = async |stream: &mut Stream, salt: u8| {
        for (index, &size) in sizes.iter().enumerate() {
            stream.send(pattern(index, size, salt)).await.expect("an open stream takes frames");
        }
        stream.finish().await.expect("an open stream can be finished");
    };
    let check = async |stream: &mut Stream, salt: u8| {
        for (index, &size) in sizes.iter().enumerate() {
            let frame = stream.recv().await.expect("no reset").expect("no end before the last frame");
            assert_eq!(frame.len(), size, "frame {index} changed its length");
            assert!(frame == pattern(index, size, salt), "frame {index} of {size} bytes changed on the way");
        }
        assert_eq!(stream.recv().await, Ok(None), "the end follows the last frame");
    };
    within("frames from the opener", async { join!(exchange(&mut ours, 1), check(&mut theirs, 1)) }).await;
    within("frames from the acceptor", async { join!(exchange(&mut theirs, 2), check(&mut ours, 2)) }).await;

    let (ours, theirs) = streams(network).await.pair;
    let (mut our_sender, mut our_receiver) = ours.split();
    let (mut their_sender, mut their_receiver) = theirs.split();
    let count = 200;
    let frame = pattern(0, 10_000, 3);
    within("frames both ways at once", async {
        let pump = async |sender: &mut potluck_net::FrameSender| {
            for _ in 0..count {
                sender.feed(frame.clone()).await.expect("open");
            }
            sender.flush().await.expect("open");
            sender.finish().await.expect("open");
        };
        let drain = async |receiver: &mut potluck_net::FrameReceiver| {
            let mut seen = 0;
            while let Some(got) = receiver.recv().await.expect("no reset") {
                assert!(got == frame, "frame {seen} changed on the way");
                seen += 1;
            }
            assert_eq!(seen, count, "frames were lost");
        };
        join!(
            pump(&mut our_sender),
            pump(&mut their_sender),
            drain(&mut our_receiver),
            drain(&mut their_receiver)
        )
    })
    .await;
}

/// After `finish` the other direction still works, and sending again is an error of the caller.
pub async fn a_finished_half_leaves_the_other_open<N: Network>(network: &N) {
    let (mut ours, mut theirs) = streams(network).await.pair;
    within("half-close", async {
        ours.send(Bytes::from_static(b"last")).await.expect("open");
        ours.finish().await.expect("open");
        assert_eq!(theirs.recv().await, Ok(Some(Bytes::from_static(b"last"))));
        assert_eq!(theirs.recv().await, Ok(None), "finish is seen as the end");
        theirs.send(Bytes::from_static(b"answer")).await.expect("the other half is open");
        theirs.finish().await.expect("the other half is open");
        assert_eq!(ours.recv().await, Ok(Some(Bytes::from_static(b"answer"))));
        assert_eq!(ours.recv().await, Ok(None));
        let again = ours.send(Bytes::from_static(b"more")).await;
        assert_eq!(again, Err(StreamError::Finished), "a frame after finish is refused");
    })
    .await;
}

/// What was sent before `finish` is read even if the sender drops its stream at once: unary rpc does exactly that.
pub async fn an_answer_survives_the_drop_of_its_sender<N: Network>(network: &N) {
    let (mut ours, mut theirs) = streams(network).await.pair;
    // Fits the first window of every muxer (yamux: 256 KiB), because nobody reads while it is sent.
    let answer = pattern(0, 128 << 10, 4);
    within("answer and drop", async {
        ours.send(Bytes::from_static(b"question")).await.expect("open");
        ours.finish().await.expect("open");
        theirs.recv().await.expect("no reset").expect("one frame");
        theirs.send(answer.clone()).await.expect("open");
        theirs.finish().await.expect("open");
        drop(theirs);
        let got = ours.recv().await.expect("the drop came after finish").expect("one frame");
        assert!(got == answer, "the answer changed on the way");
        assert_eq!(ours.recv().await, Ok(None));
    })
    .await;
}

/// Dropping an unfinished stream is seen as a reset, not as an end.
pub async fn a_dropped_stream_is_reset<N: Network>(network: &N) {
    let (ours, mut theirs) = streams(network).await.pair;
    drop(ours);
    let seen = within("reset after drop", theirs.recv()).await;
    assert!(matches!(seen, Err(StreamError::Reset { .. })), "a dropped stream was seen as {seen:?}");
}

/// Dropping the unfinished sending half alone resets the stream as well.
pub async fn a_dropped_sender_resets_the_reader<N: Network>(network: &N) {
    let (ours, mut theirs) = streams(network).await.pair;
    let (sender, _receiver) = ours.split();
    drop(sender);
    let seen = within("reset after dropping the sender", theirs.recv()).await;
    assert!(matches!(seen, Err(StreamError::Reset { .. })), "a dropped sender was seen as {seen:?}");
}

/// Dropping the receiving half makes the other side's sends fail, instead of waiting or going nowhere for ever.
pub async fn a_dropped_receiver_stops_the_writer<N: Network>(network: &N) {
    let (ours, mut theirs) = streams(network).await.pair;
    let (_sender, receiver) = ours.split();
    drop(receiver);
    let frame = pattern(0, 64 << 10, 5);
    let error = within("writing to a dropped receiver", async {
        loop {
            if let Err(error) = theirs.send(frame.clone()).await {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let error = error.await;
    assert!(matches!(error, StreamError::Reset { .. }), "writing to a dropped receiver gave {error:?}");
}

/// A `recv` that is dropped and called again loses no frame.
pub async fn a_cancelled_recv_loses_nothing<N: Network>(network: &N) {
    let (mut ours, mut theirs) = streams(network).await.pair;
    let count = 50usize;
    let send = async {
        for index in 0..count {
            ours.send(pattern(index, 100_000, 6)).await.expect("open");
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
        ours.finish().await.expect("open");
    };
    let receive = async {
        let mut index = 0;
        loop {
            match timeout(Duration::from_millis(1), theirs.recv()).await {
                Err(_) => {}
                Ok(Ok(Some(frame))) => {
                    assert!(
                        frame == pattern(index, 100_000, 6),
                        "frame {index} changed after a cancelled recv"
                    );
                    index += 1;
                }
                Ok(end) => {
                    assert_eq!(end, Ok(None));
                    return index;
                }
            }
        }
    };
    let ((), seen) = within("cancelled recv", async { join!(send, receive) }).await;
    assert_eq!(seen, count, "frames were lost by a cancelled recv");
}

/// A writer whose reader does not read waits, at most [`Network::ahead_bytes_max`] ahead; nothing is lost by that.
pub async fn a_slow_reader_makes_the_writer_wait<N: Network>(network: &N) {
    let (mut ours, mut theirs) = streams(network).await.pair;
    let frame = pattern(0, 64 << 10, 7);
    let frames_max = network.ahead_bytes_max() / frame.len();
    let count = frames_max + frames_max / 2;
    let sent = AtomicUsize::new(0);
    let write = async {
        for _ in 0..count {
            ours.send(frame.clone()).await.expect("open");
            sent.fetch_add(1, Ordering::Relaxed);
        }
        ours.finish().await.expect("open");
    };
    let read = async {
        let mut before = usize::MAX;
        while before != sent.load(Ordering::Relaxed) {
            before = sent.load(Ordering::Relaxed);
            tokio::time::sleep(STILL).await;
        }
        assert!(before > 0, "a writer must not wait before it has sent anything");
        assert!(before <= frames_max, "{} bytes ahead of a reader that does not read", before * frame.len());
        let mut seen = 0;
        while theirs.recv().await.expect("waiting is no reset").is_some() {
            seen += 1;
        }
        seen
    };
    let ((), seen) = within("back-pressure", async { join!(write, read) }).await;
    assert_eq!(seen, count, "frames were lost under back-pressure");
}

/// A frame that is too large is refused where it is sent, and the stream goes on.
pub async fn an_oversize_frame_is_refused_by_its_sender<N: Network>(network: &N) {
    let (mut ours, mut theirs) = streams(network).await.pair;
    let len = FRAME_BYTES_MAX + 1;
    within("oversize frame", async {
        let refused = ours.send(Bytes::from(vec![0; len])).await;
        assert_eq!(refused, Err(StreamError::FrameTooLarge { len, max: FRAME_BYTES_MAX }));
        ours.send(Bytes::from_static(b"fits")).await.expect("the stream goes on");
        assert_eq!(theirs.recv().await, Ok(Some(Bytes::from_static(b"fits"))));
    })
    .await;
}

/// A frame that is too large, from a peer that does not check, is refused by who receives it. It costs that peer this stream
/// and no other.
pub async fn an_oversize_frame_is_refused_by_its_receiver<N: Network>(network: &N) {
    let (_, receiver) = network.two_peers().await;
    let mut incoming = accept(&*receiver, &protocol(), 2);
    let receive = async {
        let mut sound = incoming.next().await.expect("the transport is open");
        let seen = incoming.next().await.expect("the transport is open").recv().await;
        let frame = Bytes::from_static(b"still here");
        sound.send(frame.clone()).await.expect("the other stream is open");
        assert_eq!(sound.recv().await, Ok(Some(frame)), "the other stream goes on");
        seen
    };
    let seen = within("oversize frame from outside", async {
        tokio::select! {
            seen = receive => seen,
            reason = network.send_oversize(receiver.clone(), protocol()) => panic!("not sent: {reason}"),
        }
    });
    let seen = seen.await;
    assert!(matches!(seen, Err(StreamError::FrameTooLarge { .. })), "an oversize frame was seen as {seen:?}");
}

/// Opening a protocol that the peer does not accept is refused as such.
pub async fn an_unknown_protocol_is_refused<N: Network>(network: &N) {
    let (a, b) = network.two_peers().await;
    let _other = accept(&*b, &Protocol::new("/conformance/other"), 1);
    let error =
        within("unknown protocol", a.open(b.local_peer(), protocol())).await.expect_err("not accepted");
    assert_eq!(error, OpenError::UnknownProtocol { peer: b.local_peer(), protocol: protocol() });
}

/// Nobody knows this peer: the open fails as unreachable.
pub async fn an_unknown_peer_is_unreachable<N: Network>(network: &N) {
    let (a, _b) = network.two_peers().await;
    let nobody = Identity::from_seed(&[0xA5; 32]).peer_id();
    let error =
        within("unknown peer", a.open(nobody, protocol())).await.expect_err("nobody has this identity");
    assert!(matches!(error, OpenError::Unreachable { peer, .. } if peer == nobody), "{error:?}");
    assert_eq!(a.path(nobody), None);
}

/// When the backlog is full the opener is told `Busy`; once a stream is taken, the next open succeeds.
pub async fn a_full_backlog_reaches_the_opener<N: Network>(network: &N) {
    let (a, b) = network.two_peers().await;
    let (peer, backlog) = (b.local_peer(), 2);
    let mut incoming = accept(&*b, &protocol(), backlog);
    let mut waiting = Vec::new();
    for _ in 0..backlog {
        let opened = within("open into the backlog", a.open(peer, protocol())).await;
        waiting.push(opened.expect("the backlog has room"));
    }
    let error = within("open into a full backlog", a.open(peer, protocol())).await.expect_err("full");
    assert_eq!(error, OpenError::Busy { peer, protocol: protocol() });
    let mut first = within("a waiting stream", incoming.next()).await.expect("not closed");
    let again = within("open after a stream was taken", a.open(peer, protocol())).await;
    waiting.push(again.expect("the backlog has room again"));
    within("a waiting stream works", async {
        waiting[0].send(Bytes::from_static(b"hello")).await.expect("open");
        assert_eq!(first.recv().await, Ok(Some(Bytes::from_static(b"hello"))), "streams are taken in order");
    })
    .await;
}

/// A second owner is refused; dropping the first un-registers the protocol, and then somebody else may have it.
pub async fn a_protocol_has_one_owner_at_a_time<N: Network>(network: &N) {
    let (a, b) = network.two_peers().await;
    let incoming = accept(&*b, &protocol(), 1);
    let second = b.accept(protocol(), 1).expect_err("the protocol has an owner");
    assert_eq!(second, AcceptError::Taken { protocol: protocol() });
    drop(incoming);
    let error = within("open without owner", a.open(b.local_peer(), protocol())).await.expect_err("no owner");
    assert!(matches!(error, OpenError::UnknownProtocol { .. }), "{error:?}");
    let mut incoming = accept(&*b, &protocol(), 1);
    within("open to the new owner", a.open(b.local_peer(), protocol())).await.expect("it has an owner");
    within("a stream for the new owner", incoming.next()).await.expect("not closed");
}

/// 1,500 exchanges that start at once are all answered, although all streams are open before the first answer.
pub async fn many_streams_at_once_are_all_served<N: Network>(network: &N) {
    let (a, b) = network.two_peers().await;
    let mut incoming = accept(&*b, &protocol(), STREAMS);
    let exchange = async |index: usize| {
        let mut stream = a.open(b.local_peer(), protocol()).await.expect("the backlog has room for all");
        stream.send(pattern(index, 200, 8)).await.expect("open");
        stream.finish().await.expect("open");
        let echo = stream.recv().await.expect("no reset").expect("an answer");
        assert!(echo == pattern(index, 200, 8), "stream {index} got the answer of another");
    };
    let answer = async |(mut stream, question): (Stream, Bytes)| {
        stream.send(question).await.expect("open");
        stream.finish().await.expect("open");
    };
    let serve = async {
        let mut asked = Vec::new();
        while asked.len() < STREAMS {
            let mut stream = incoming.next().await.expect("not closed");
            let question = stream.recv().await.expect("no reset").expect("a question");
            asked.push((stream, question));
        }
        join_all(asked.into_iter().map(answer)).await;
    };
    within("1,500 streams", async { join!(join_all((0..STREAMS).map(exchange)), serve) }).await;
}

/// Nothing that concerns a dead peer outlasts its deadline: a call, an open, a stream that was open.
pub async fn a_dead_peer_fails_within_the_deadline<N: Network>(network: &N) {
    let Connected { peers: (a, b), pair: (mut ours, theirs), .. } = streams(network).await;
    let peer = b.local_peer();
    network.kill(peer).await;
    drop((theirs, b));
    let start = Instant::now();
    let patience = Duration::from_secs(5);
    let fault = rpc::call(&*a, peer, &protocol(), Bytes::new(), start + patience).await;
    assert_eq!(fault.expect_err("the peer is dead").peer, peer);
    assert!(start.elapsed() < patience + STILL, "a call outlasted its deadline: {:?}", start.elapsed());
    let opened = timeout(Duration::from_secs(20), a.open(peer, protocol())).await;
    assert!(opened.expect("an open ends by itself within 15 s").is_err(), "opened a stream to a dead peer");
    if let Some(limit) = network.noticed_within() {
        breaks("the stream that was open", limit, &mut ours).await;
    }
}

/// Closing twice is closing once; afterwards everything is refused and the other side sees a reset.
pub async fn close_is_final_and_idempotent<N: Network>(network: &N) {
    let Connected { peers: (a, b), mut incoming, pair: (mut ours, mut theirs) } = streams(network).await;
    within("close", async {
        b.close().await;
        b.close().await;
    })
    .await;
    let refused = within("open on a closed transport", b.open(a.local_peer(), protocol())).await;
    assert_eq!(refused.expect_err("closed"), OpenError::Closed);
    let refused = b.accept(Protocol::new("/conformance/later"), 1).expect_err("closed");
    assert_eq!(refused, AcceptError::Closed);
    assert!(within("accepting after close", incoming.next()).await.is_none(), "a stream after close");
    assert!(b.connected().is_empty(), "connections after close");
    let seen = within("own stream after close", theirs.recv()).await;
    assert!(matches!(seen, Err(StreamError::Reset { .. })), "own stream after close: {seen:?}");
    let seen = within("the other side of a close", ours.recv()).await;
    assert!(matches!(seen, Err(StreamError::Reset { .. })), "the other side of a close: {seen:?}");
    let error =
        within("open to a closed peer", a.open(b.local_peer(), protocol())).await.expect_err("closed");
    assert!(matches!(error, OpenError::Unreachable { .. }), "open to a closed peer: {error:?}");
}

/// Both sides of a connection know each other and how they are connected.
pub async fn connections_are_reported<N: Network>(network: &N) {
    let Connected { peers: (a, b), pair: (ours, theirs), .. } = streams(network).await;
    assert_eq!((ours.peer(), theirs.peer()), (b.local_peer(), a.local_peer()));
    assert_eq!((ours.protocol(), theirs.protocol()), (&protocol(), &protocol()));
    for (here, there) in [(&a, &b), (&b, &a)] {
        assert!(here.connected().contains(&there.local_peer()), "a connection is missing from the list");
        assert!(here.path(there.local_peer()).is_some(), "a connection has no path");
        assert_eq!(here.identity().peer_id(), here.local_peer());
    }
    assert!(!b.addresses().is_empty(), "a peer that was dialed has an address");
    let suffix = format!("/p2p/{}", b.local_peer());
    assert!(b.addresses().iter().all(|address| address.ends_with(&suffix)), "{:?}", b.addresses());
}

struct Connected {
    peers: (Arc<dyn Transport>, Arc<dyn Transport>),
    incoming: Incoming,
    pair: (Stream, Stream),
}

/// Two new peers and one stream between them: (the opener's end, the acceptor's end).
async fn streams<N: Network>(network: &N) -> Connected {
    let (a, b) = network.two_peers().await;
    let mut incoming = accept(&*b, &protocol(), 4);
    let ours = within("open", a.open(b.local_peer(), protocol())).await.expect("the peer accepts");
    let theirs = within("accept", incoming.next()).await.expect("the transport is open");
    Connected { peers: (a, b), incoming, pair: (ours, theirs) }
}

fn protocol() -> Protocol {
    Protocol::new("/conformance/1")
}

fn accept(transport: &dyn Transport, protocol: &Protocol, backlog: usize) -> Incoming {
    transport.accept(protocol.clone(), backlog).expect("nobody else accepts this protocol")
}

/// Bytes that differ by position, frame and direction, so that no mix-up passes unseen.
fn pattern(index: usize, len: usize, salt: u8) -> Bytes {
    let start = index.wrapping_mul(31).wrapping_add(usize::from(salt) * 7);
    (0..len).map(|position| (position.wrapping_mul(13).wrapping_add(start) % 251) as u8).collect()
}

/// Whoever waits on the stream of a dead peer learns of it. What only the look at the end of the time finds, nobody was woken for.
async fn breaks(what: &str, limit: Duration, stream: &mut Stream) {
    let start = Instant::now();
    let seen = timeout(limit, stream.recv()).await;
    assert!(matches!(seen, Ok(Err(StreamError::Reset { .. }))), "{what} of a dead peer: {seen:?}");
    assert!(start.elapsed() < limit, "{what}: nobody was told within {limit:?}");
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match timeout(LIMIT, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing within {LIMIT:?}"),
    }
}
