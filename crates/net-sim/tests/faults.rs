//! Faults do what they say, and nothing else: rules, partitions, freezes, crashes, restarts.

use bytes::Bytes;
use potluck_net::{OpenError, PeerId, Protocol, Stream, StreamError, Transport};
use potluck_net_sim::{NatClass, PeerSpec, SimNet, SimTransport, Verdict, run};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

const SHORT: Duration = Duration::from_secs(5);

fn protocol() -> Protocol {
    Protocol::new("/test/1")
}

struct Pair {
    peers: [Arc<SimTransport>; 2],
    ours: Stream,
    theirs: Stream,
}

async fn pair(net: &SimNet, nat: NatClass) -> Pair {
    let spec = PeerSpec { nat, ..PeerSpec::default() };
    let peers = [net.add_peer(spec.clone()), net.add_peer(spec)];
    let mut incoming = peers[1].accept(protocol(), 4).expect("free");
    let ours = peers[0].open(peers[1].local_peer(), protocol()).await.expect("up");
    let theirs = incoming.next().await.expect("open");
    Pair { peers, ours, theirs }
}

fn frame(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn is_reset<T>(result: Result<T, StreamError>) -> bool {
    matches!(result, Err(StreamError::Reset { .. }))
}

fn ids(pair: &Pair) -> [[PeerId; 1]; 2] {
    [[pair.peers[0].local_peer()], [pair.peers[1].local_peer()]]
}

#[test]
fn a_late_frame_keeps_its_place() {
    run(1, async |net: SimNet| {
        let Pair { mut ours, mut theirs, peers: _peers } = pair(&net, NatClass::Open).await;
        let delay = |frame: &potluck_net_sim::FrameInfo| {
            if frame.index == 0 { Verdict::Deliver(Duration::from_secs(3)) } else { Verdict::Pass }
        };
        let _rule = net.set_rule(delay);
        let start = net.elapsed();
        ours.send(frame("first")).await.unwrap();
        ours.send(frame("second")).await.unwrap();
        assert_eq!(theirs.recv().await, Ok(Some(frame("first"))));
        assert_eq!(theirs.recv().await, Ok(Some(frame("second"))));
        assert!(net.elapsed() - start >= Duration::from_secs(3));
    });
}

#[test]
fn a_stall_lasts_as_long_as_its_rule() {
    run(2, async |net: SimNet| {
        let Pair { mut ours, mut theirs, peers: _peers } = pair(&net, NatClass::Open).await;
        let rule = net.set_rule(|frame| if frame.index == 1 { Verdict::Stall } else { Verdict::Pass });
        for text in ["before", "stalled", "behind"] {
            ours.send(frame(text)).await.unwrap();
        }
        assert_eq!(theirs.recv().await, Ok(Some(frame("before"))));
        assert!(timeout(Duration::from_secs(600), theirs.recv()).await.is_err(), "a stalled frame arrived");
        theirs.send(frame("the other way")).await.unwrap();
        assert_eq!(ours.recv().await, Ok(Some(frame("the other way"))));
        drop(rule);
        assert_eq!(theirs.recv().await, Ok(Some(frame("stalled"))));
        assert_eq!(theirs.recv().await, Ok(Some(frame("behind"))));
    });
}

#[test]
fn a_reset_verdict_breaks_both_ends() {
    run(3, async |net: SimNet| {
        let Pair { mut ours, mut theirs, peers: _peers } = pair(&net, NatClass::Open).await;
        let _rule = net.set_rule(|_| Verdict::Reset);
        assert!(is_reset(ours.send(frame("lost")).await));
        assert!(is_reset(ours.recv().await));
        assert!(is_reset(theirs.recv().await));
    });
}

#[test]
fn refused_opens_are_unreachable_until_the_guard_goes() {
    run(4, async |net: SimNet| {
        let Pair { peers: [a, b], .. } = pair(&net, NatClass::Open).await;
        let _incoming = b.accept(protocol(), 4).expect("the former owner is gone");
        let target = b.local_peer();
        let guard = net.refuse_opens(move |open| open.to == target);
        let refused = a.open(target, protocol()).await;
        assert!(matches!(refused, Err(OpenError::Unreachable { .. })), "{refused:?}");
        drop(guard);
        a.open(target, protocol()).await.expect("nothing refuses any more");
    });
}

#[test]
fn a_one_way_partition_stops_one_way_and_heals() {
    run(5, async |net: SimNet| {
        let mut pair = pair(&net, NatClass::Open).await;
        let [a, b] = ids(&pair);
        let guard = net.partition(&a, &b, true);
        pair.ours.send(frame("there")).await.unwrap();
        pair.theirs.send(frame("back")).await.unwrap();
        assert_eq!(pair.ours.recv().await, Ok(Some(frame("back"))), "the other way is open");
        assert!(timeout(SHORT, pair.theirs.recv()).await.is_err(), "a frame crossed a partition");
        drop(guard);
        assert_eq!(pair.theirs.recv().await, Ok(Some(frame("there"))));
        tokio::time::sleep(Duration::from_secs(60)).await;
        pair.ours.send(frame("healed in time")).await.expect("the connection did not break");
    });
}

#[test]
fn a_long_partition_breaks_connections_and_opens_time_out() {
    run(6, async |net: SimNet| {
        let mut pair = pair(&net, NatClass::Open).await;
        let [a, b] = ids(&pair);
        let guard = net.partition(&a, &b, false);
        let opened = pair.peers[0].open(b[0], protocol()).await;
        assert!(matches!(opened, Err(OpenError::TimedOut { .. })), "{opened:?}");
        assert!(is_reset(pair.theirs.recv().await) && is_reset(pair.ours.recv().await));
        assert_eq!(net.elapsed().as_secs(), 30, "keep-alives give up after 30 s");
        assert!(pair.peers[0].connected().is_empty() && pair.peers[1].connected().is_empty());
        let opened = pair.peers[0].open(b[0], protocol()).await;
        assert!(matches!(opened, Err(OpenError::Unreachable { .. })), "{opened:?}");
        drop(guard);
    });
}

#[test]
fn a_frozen_peer_sees_nothing_and_goes_on() {
    run(7, async |net: SimNet| {
        let Pair { mut ours, mut theirs, peers } = pair(&net, NatClass::Open).await;
        net.freeze(peers[1].local_peer());
        ours.send(frame("hello")).await.unwrap();
        assert!(timeout(SHORT, theirs.recv()).await.is_err(), "a frozen peer has read");
        assert!(
            timeout(SHORT, theirs.send(frame("I am frozen"))).await.is_err(),
            "a frozen peer has written"
        );
        net.thaw(peers[1].local_peer());
        assert_eq!(theirs.recv().await, Ok(Some(frame("hello"))));
    });
}

#[test]
fn a_crash_is_seen_at_once_and_a_vanished_peer_only_by_its_silence() {
    run(8, async |net: SimNet| {
        let mut crashed = pair(&net, NatClass::Open).await;
        let start = net.elapsed();
        net.crash(crashed.peers[1].local_peer());
        assert!(is_reset(crashed.ours.recv().await) && is_reset(crashed.theirs.recv().await));
        assert!(net.elapsed() - start < Duration::from_millis(20));
        assert!(crashed.peers[0].connected().is_empty());

        let mut vanished = pair(&net, NatClass::Open).await;
        let start = net.elapsed();
        net.vanish(vanished.peers[1].local_peer());
        assert!(is_reset(vanished.ours.recv().await));
        assert_eq!((net.elapsed() - start).as_secs(), 30);
    });
}

#[test]
fn a_restarted_peer_keeps_its_name_and_nothing_else() {
    run(9, async |net: SimNet| {
        let mut pair = pair(&net, NatClass::Open).await;
        let [_, [id]] = ids(&pair);
        let numbers = net.env(id).random_u64();
        net.vanish(id);
        let again = net.restart(id);
        assert_eq!(again.local_peer(), id);
        assert!(is_reset(pair.ours.recv().await), "the former life's streams are reset");
        assert_ne!(net.env(id).random_u64(), numbers, "a new life draws new numbers");
        let unknown = pair.peers[0].open(id, protocol()).await;
        assert!(matches!(unknown, Err(OpenError::UnknownProtocol { .. })), "{unknown:?}");
        let former = pair.peers[1].open(pair.peers[0].local_peer(), protocol()).await;
        assert!(matches!(former, Err(OpenError::Closed)), "{former:?}");
        let mut incoming = again.accept(protocol(), 1).expect("registrations are gone");
        pair.peers[0].open(id, protocol()).await.expect("up again");
        incoming.next().await.expect("open");
    });
}

#[test]
fn relayed_streams_end_with_their_relay() {
    run(10, async |net: SimNet| {
        let relay = net.add_peer(PeerSpec { relay: true, ..PeerSpec::default() });
        let mut pair = pair(&net, NatClass::Symmetric).await;
        net.crash(relay.local_peer());
        assert!(is_reset(pair.ours.recv().await) && is_reset(pair.theirs.recv().await));
    });
}

#[test]
fn clocks_are_skewed_as_asked() {
    run(11, async |net: SimNet| {
        let peer =
            |clock_skew| net.add_peer(PeerSpec { clock_skew, ..PeerSpec::default() }).env().unix_time();
        let (exact, ahead, behind) = (peer(0), peer(3600), peer(-3600));
        assert_eq!((ahead - exact).as_secs(), 3600);
        assert_eq!((exact - behind).as_secs(), 3600);
    });
}
