//! What links, windows and routes cost in virtual time.

use bytes::Bytes;
use potluck_net::{Path, Protocol, Stream, Transport, Watermarks};
use potluck_net_sim::{NatClass, PeerSpec, SimNet, SimTransport, run};
use std::sync::Arc;
use std::time::Duration;

const MIB: usize = 1 << 20;

fn protocol() -> Protocol {
    Protocol::new("/test/1")
}

async fn pair(a: &Arc<SimTransport>, b: &Arc<SimTransport>) -> (Stream, Stream) {
    let mut incoming = b.accept(protocol(), 4).expect("nobody else accepts");
    let ours = a.open(b.local_peer(), protocol()).await.expect("b is up");
    (ours, incoming.next().await.expect("b is open"))
}

async fn pump(mut from: Stream, mut to: Stream, frames: usize, bytes: usize) {
    let frame = Bytes::from(vec![7; bytes]);
    let send = async {
        for _ in 0..frames {
            from.send(frame.clone()).await.expect("no fault is injected");
        }
        from.finish().await.expect("no fault is injected");
    };
    let receive = async {
        let mut count = 0;
        while let Some(frame) = to.recv().await.expect("no fault is injected") {
            assert_eq!(frame.len(), bytes);
            count += 1;
        }
        assert_eq!(count, frames);
    };
    futures::join!(send, receive);
}

fn slow() -> PeerSpec {
    PeerSpec { up_bytes_per_second: 1e6, down_bytes_per_second: 1e6, ..PeerSpec::default() }
}

#[test]
fn a_transfer_takes_its_bytes_over_the_bandwidth_plus_the_latency() {
    let elapsed = run(1, async |net: SimNet| {
        let (a, b) = (net.add_peer(slow()), net.add_peer(PeerSpec::default()));
        let (ours, theirs) = pair(&a, &b).await;
        let start = net.elapsed();
        pump(ours, theirs, 20, MIB).await;
        net.elapsed() - start
    });
    let wire = 20.0 * (MIB as f64 + 32.0) / 1e6;
    let extra = elapsed.as_secs_f64() - wire;
    assert!((0.0..0.1).contains(&extra), "{elapsed:?} for {wire} s of bytes");
}

#[test]
fn streams_share_a_link_fairly() {
    run(2, async |net: SimNet| {
        let a = net.add_peer(slow());
        let others = [net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default())];
        let (one, two) = (pair(&a, &others[0]).await, pair(&a, &others[1]).await);
        let start = net.elapsed();
        let finish = async |streams: (Stream, Stream)| {
            pump(streams.0, streams.1, 4, MIB).await;
            (net.elapsed() - start).as_secs_f64()
        };
        let (first, second) = futures::join!(finish(one), finish(two));
        assert!((8.3..8.6).contains(&first) && (8.3..8.6).contains(&second), "{first} and {second} s");
    });
}

#[test]
fn a_heartbeat_does_not_wait_behind_megabytes() {
    run(3, async |net: SimNet| {
        let (a, b) = (net.add_peer(slow()), net.add_peer(slow()));
        let mut bulk = Vec::new();
        for index in 0..8 {
            let name = Protocol::new(format!("/bulk/{index}"));
            let mut incoming = b.accept(name.clone(), 1).expect("free");
            let ours = a.open(b.local_peer(), name).await.expect("b is up");
            bulk.push((ours, incoming.next().await.expect("open")));
        }
        let (mut beat, mut heard) = pair(&a, &b).await;
        let load = futures::future::join_all(bulk.into_iter().map(|(from, to)| pump(from, to, 2, 4 * MIB)));
        let beats = async {
            for _ in 0..20 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let sent = net.elapsed();
                beat.send(Bytes::from_static(b"alive")).await.expect("open");
                heard.recv().await.expect("no fault").expect("not finished");
                let took = net.elapsed() - sent;
                // At most a quantum (66 ms) on either link, and 10 ms of latency.
                assert!(took < Duration::from_millis(160), "heartbeat took {took:?}");
            }
        };
        futures::join!(load, beats);
        assert!(net.elapsed() > Duration::from_secs(60), "the link was not loaded: {:?}", net.elapsed());
    });
}

#[test]
fn every_pair_of_nats_connects_and_reports_how() {
    use NatClass::{FullCone, Open, OutboundOnly, PortRestricted, Symmetric};
    run(4, async |net: SimNet| {
        let relay = net.add_peer(PeerSpec { relay: true, ..PeerSpec::default() });
        for (from, to, path) in [
            (Open, Open, Path::Direct),
            (Symmetric, FullCone, Path::Direct),
            (Open, OutboundOnly, Path::HolePunched),
            (PortRestricted, PortRestricted, Path::HolePunched),
            (PortRestricted, Symmetric, Path::Relayed),
            (OutboundOnly, OutboundOnly, Path::Relayed),
        ] {
            let peer = |nat| net.add_peer(PeerSpec { nat, ..PeerSpec::default() });
            let (a, b) = (peer(from), peer(to));
            let before = net.traffic(relay.local_peer());
            let (ours, theirs) = pair(&a, &b).await;
            assert_eq!(a.path(b.local_peer()), Some(path), "{from:?} to {to:?}");
            assert_eq!(b.path(a.local_peer()), Some(path), "{from:?} to {to:?}");
            pump(ours, theirs, 1, MIB).await;
            let carried = net.traffic(relay.local_peer()).relayed_bytes - before.relayed_bytes;
            assert_eq!(carried > MIB as u64, path == Path::Relayed, "{from:?} to {to:?}: {carried} bytes");
        }
    });
}

#[test]
fn a_relay_is_slower_than_a_direct_path_because_its_links_are_shared() {
    let time = |nat| {
        run(5, async move |net: SimNet| {
            let relay = PeerSpec { relay: true, ..slow() };
            net.add_peer(relay);
            let fast = PeerSpec { nat, ..PeerSpec::default() };
            let (a, b) = (net.add_peer(fast.clone()), net.add_peer(fast));
            let (ours, theirs) = pair(&a, &b).await;
            let start = net.elapsed();
            pump(ours, theirs, 4, MIB).await;
            net.elapsed() - start
        })
    };
    assert!(time(NatClass::Symmetric) > time(NatClass::PortRestricted) * 20);
}

#[test]
fn without_a_relay_the_error_names_what_was_tried() {
    run(6, async |net: SimNet| {
        let hidden = || net.add_peer(PeerSpec { nat: NatClass::Symmetric, ..PeerSpec::default() });
        let (a, b) = (hidden(), hidden());
        let error = a.open(b.local_peer(), protocol()).await.expect_err("both sides are hidden");
        assert!(error.to_string().contains("no relay is reachable"), "{error}");
    });
}

/// One frame there and one back on a new stream; the time that took, in milliseconds.
async fn exchange(net: &SimNet, a: &Arc<SimTransport>, b: &Arc<SimTransport>) -> u128 {
    let mut incoming = b.accept(protocol(), 4).expect("nobody else accepts");
    let start = net.elapsed();
    let mut ours = a.open(b.local_peer(), protocol()).await.expect("b is up");
    ours.send(Bytes::from_static(b"ping")).await.expect("no fault is injected");
    let mut theirs = incoming.next().await.expect("b is open");
    let ping = theirs.recv().await.expect("no fault is injected").expect("a has not finished");
    theirs.send(ping).await.expect("no fault is injected");
    ours.recv().await.expect("no fault is injected").expect("b has not finished");
    (net.elapsed() - start).as_millis()
}

#[test]
fn a_stream_begins_without_a_round_trip_where_one_has_ended() {
    let far = || PeerSpec { latency: Duration::from_millis(25), ..PeerSpec::default() };
    run(3, async |net| {
        let (a, b) = (net.add_peer(far()), net.add_peer(far()));
        // Two round trips of 100 ms to connect, one to open, one for the frames.
        let first = exchange(&net, &a, &b).await;
        assert!((400..410).contains(&first), "{first} ms");
        // The acceptor has not heard of the end yet, or the opener not of its readiness.
        let at_once = exchange(&net, &a, &b).await;
        assert!((200..210).contains(&at_once), "{at_once} ms");
        tokio::time::sleep(Duration::from_millis(250)).await;
        let later = exchange(&net, &a, &b).await;
        assert!((100..110).contains(&later), "{later} ms");
        tokio::time::sleep(Duration::from_secs(200)).await;
        let much_later = exchange(&net, &a, &b).await;
        assert!((200..210).contains(&much_later), "{much_later} ms");
    });
}

#[test]
fn a_refused_beginning_is_a_reset() {
    run(4, async |net| {
        let (a, b) = (net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default()));
        exchange(&net, &a, &b).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        // Nobody accepts any more.
        let mut ours = a.open(b.local_peer(), protocol()).await.expect("the opener does not know it");
        assert!(ours.recv().await.is_err());
        drop(ours);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(a.open(b.local_peer(), protocol()).await.is_err());
    });
}

#[test]
fn of_too_many_connections_those_go_that_nothing_runs_on() {
    const MARKS: Watermarks = Watermarks::PEER;
    run(1, async |net: SimNet| {
        let busy = net.add_peer(PeerSpec::default());
        let mut incoming = busy.accept(protocol(), 4).unwrap();
        let mut first = None;
        let mut others = Vec::new();
        for _ in 0..=MARKS.high {
            let other = net.add_peer(PeerSpec::default());
            let ours = other.open(busy.local_peer(), protocol()).await.unwrap();
            let theirs = incoming.next().await.unwrap();
            first.get_or_insert((ours, theirs));
            others.push(other);
        }
        assert_eq!(net.traffic(busy.local_peer()).connections, MARKS.high + 1);
        tokio::time::sleep(MARKS.idle_min + Duration::from_secs(1)).await;
        let left = busy.connected();
        assert_eq!(left.len(), MARKS.low);
        assert!(left.contains(&others[0].local_peer()), "a stream runs on the oldest");
        assert!(!left.contains(&others[1].local_peer()), "the longest unused one goes first");
        let (mut ours, mut theirs) = first.unwrap();
        ours.send("still here".into()).await.unwrap();
        assert_eq!(theirs.recv().await.unwrap().unwrap(), "still here");
        others[1].open(busy.local_peer(), protocol()).await.expect("whoever needs one again gets it");
    });
}
