//! Unary rpc over the simulated network: deadlines, refusals, bounds.

use bytes::Bytes;
use potluck_net::{FaultKind, PeerFault, Protocol, Tasks, Transport, rpc};
use potluck_net_sim::{PeerSpec, SimNet, SimTransport, run};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

const PLACES: rpc::Places = rpc::Places { total: 4, per_peer: 4 };

fn protocol() -> Protocol {
    Protocol::new("/rpc/1")
}

fn two(net: &SimNet) -> (Arc<SimTransport>, Arc<SimTransport>) {
    (net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default()))
}

async fn call(a: &SimTransport, b: &SimTransport, patience: Duration) -> Result<Bytes, PeerFault> {
    let deadline = Instant::now() + patience;
    rpc::call(a, b.local_peer(), &protocol(), Bytes::from_static(b"ping"), deadline).await
}

#[test]
fn a_call_is_answered_and_leaves_nothing_behind() {
    run(1, async |net: SimNet| {
        let (a, b) = two(&net);
        let tasks = Tasks::new();
        let caller = a.local_peer();
        let incoming = b.accept(protocol(), 4).expect("free");
        rpc::serve(incoming, &tasks, PLACES, move |peer, request| async move {
            (peer == caller).then(|| [&request[..], b"-pong"].concat().into())
        });
        let answer = call(&a, &b, Duration::from_secs(1)).await;
        assert_eq!(answer, Ok(Bytes::from_static(b"ping-pong")));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(net.streams(), 0, "a finished call holds no stream");
    });
}

#[test]
fn a_silent_handler_costs_the_caller_its_deadline_and_not_more() {
    run(2, async |net: SimNet| {
        let (a, b) = two(&net);
        let tasks = Tasks::new();
        rpc::serve(b.accept(protocol(), 4).expect("free"), &tasks, PLACES, async |_, _| {
            futures::future::pending().await
        });
        let start = Instant::now();
        let fault = call(&a, &b, Duration::from_millis(1500)).await.expect_err("nobody answers");
        assert_eq!((fault.kind, fault.peer), (FaultKind::Silent, b.local_peer()));
        assert_eq!(start.elapsed().as_millis() / 10, 150);
    });
}

#[test]
fn refusals_are_told_apart_from_failures() {
    run(3, async |net: SimNet| {
        let (a, b) = two(&net);
        let patience = Duration::from_secs(20);
        let nobody_serves = call(&a, &b, patience).await.expect_err("not served");
        assert_eq!(nobody_serves.kind, FaultKind::Refused);
        let tasks = Tasks::new();
        rpc::serve(b.accept(protocol(), 4).expect("free"), &tasks, PLACES, async |_, _| None);
        let refused = call(&a, &b, patience).await.expect_err("the handler refuses");
        assert_eq!(refused.kind, FaultKind::Refused, "{refused}");
        net.crash(b.local_peer());
        let dead = call(&a, &b, patience).await.expect_err("dead");
        assert_eq!(dead.kind, FaultKind::Unreachable);
    });
}

#[test]
fn no_more_handlers_run_than_allowed_and_the_rest_is_told_to_wait() {
    run(4, async |net: SimNet| {
        let (a, b) = two(&net);
        let tasks = Tasks::new();
        let (running, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counter, peak) = (running.clone(), most.clone());
        rpc::serve(
            b.accept(protocol(), 5).expect("free"),
            &tasks,
            rpc::Places { total: 3, per_peer: 3 },
            move |_, request| {
                let (counter, peak) = (counter.clone(), peak.clone());
                async move {
                    peak.fetch_max(counter.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    counter.fetch_sub(1, Ordering::Relaxed);
                    Some(request)
                }
            },
        );
        let answers = futures::future::join_all((0..20).map(|_| call(&a, &b, Duration::from_secs(30)))).await;
        assert_eq!(most.load(Ordering::Relaxed), 3, "handlers at a time");
        let busy = answers.iter().filter(|answer| match answer {
            Err(fault) => fault.kind == FaultKind::Busy && fault.context.contains("busy"),
            Ok(_) => false,
        });
        let (busy, good) = (busy.count(), answers.iter().filter(|answer| answer.is_ok()).count());
        assert_eq!(busy + good, 20, "{answers:?}");
        assert!((5..=8).contains(&good), "{good} answered: three at a time and a backlog of five");
    });
}

#[test]
fn whoever_opens_streams_and_says_nothing_takes_its_own_places_and_nobody_elses() {
    run(5, async |net: SimNet| {
        let (hog, b) = two(&net);
        let honest = net.add_peer(PeerSpec::default());
        let tasks = Tasks::new();
        let places = rpc::Places { total: 16, per_peer: 2 };
        rpc::serve(b.accept(protocol(), 4).expect("free"), &tasks, places, async |_, request| Some(request));
        let mut silent = Vec::new();
        for _ in 0..40 {
            silent.push(hog.open(b.local_peer(), protocol()).await.expect("the backlog is not its to fill"));
        }
        let answer = call(&honest, &b, Duration::from_secs(1)).await;
        assert_eq!(answer, Ok(Bytes::from_static(b"ping")), "others have their places");
        let ends =
            silent.iter_mut().map(|stream| tokio::time::timeout(Duration::from_secs(1), stream.recv()));
        let ends = futures::future::join_all(ends).await;
        let refused = ends.iter().filter(|end| matches!(end, Ok(Ok(None)))).count();
        let waiting = ends.iter().filter(|end| end.is_err()).count();
        assert_eq!((waiting, refused), (2, 2), "{ends:?}");
        assert!(ends[4..].iter().all(|end| matches!(end, Ok(Err(_)))), "the rest is reset: {ends:?}");

        drop(silent);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let answer = call(&hog, &b, Duration::from_secs(1)).await;
        assert_eq!(answer, Ok(Bytes::from_static(b"ping")), "what it gave back it may take again");
    });
}

#[test]
fn a_call_beyond_a_peers_places_is_refused_and_not_broken_off() {
    run(6, async |net: SimNet| {
        let (a, b) = two(&net);
        let tasks = Tasks::new();
        let places = rpc::Places { total: 16, per_peer: 3 };
        rpc::serve(b.accept(protocol(), 8).expect("free"), &tasks, places, async |_, request| {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Some(request)
        });
        let answers = futures::future::join_all((0..6).map(|_| call(&a, &b, Duration::from_secs(30)))).await;
        let kinds: Vec<_> =
            answers.iter().map(|answer| answer.as_ref().err().map(|fault| fault.kind)).collect();
        let refused = Some(FaultKind::Refused);
        assert_eq!(kinds, [None, None, None, refused, refused, refused]);
    });
}
