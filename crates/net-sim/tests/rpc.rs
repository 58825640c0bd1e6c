//! Unary rpc over the simulated network: deadlines, refusals, bounds.

use bytes::Bytes;
use potluck_net::{FaultKind, PeerFault, Protocol, Tasks, Transport, rpc};
use potluck_net_sim::{PeerSpec, SimNet, SimTransport, run};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

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
        rpc::serve(incoming, &tasks, 4, move |peer, request| async move {
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
        rpc::serve(b.accept(protocol(), 4).expect("free"), &tasks, 4, async |_, _| {
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
        rpc::serve(b.accept(protocol(), 4).expect("free"), &tasks, 4, async |_, _| None);
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
        rpc::serve(b.accept(protocol(), 5).expect("free"), &tasks, 3, move |_, request| {
            let (counter, peak) = (counter.clone(), peak.clone());
            async move {
                peak.fetch_max(counter.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_secs(1)).await;
                counter.fetch_sub(1, Ordering::Relaxed);
                Some(request)
            }
        });
        let answers = futures::future::join_all((0..20).map(|_| call(&a, &b, Duration::from_secs(30)))).await;
        assert_eq!(most.load(Ordering::Relaxed), 3, "handlers at a time");
        let busy = answers.iter().filter(|answer| match answer {
            Err(fault) => fault.kind == FaultKind::Refused && fault.context.contains("busy"),
            Ok(_) => false,
        });
        let (busy, good) = (busy.count(), answers.iter().filter(|answer| answer.is_ok()).count());
        assert_eq!(busy + good, 20, "{answers:?}");
        assert!((5..=8).contains(&good), "{good} answered: three at a time and a backlog of five");
    });
}
