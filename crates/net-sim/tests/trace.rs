//! The same seed gives the same trace, in any process.

use bytes::Bytes;
use potluck_net::{Protocol, Tasks, Transport, rpc};
use potluck_net_sim::{NatClass, PeerSpec, SimNet, Trace, run};
use std::time::Duration;

/// Makes this test binary print its trace and do nothing else.
const CHILD: &str = "POTLUCK_TRACE_CHILD";

/// Twelve peers that call one another under every kind of fault.
fn stormy(seed: u64) -> Trace {
    run(seed, async |net: SimNet| {
        let classes = [NatClass::Open, NatClass::FullCone, NatClass::PortRestricted, NatClass::Symmetric];
        let protocol = Protocol::new("/storm/1");
        let tasks = Tasks::new();
        let mut peers = Vec::new();
        for index in 0..12 {
            let mut spec = PeerSpec { jitter: Duration::from_millis(30), ..PeerSpec::default() };
            spec.nat = classes[index % classes.len()];
            spec.relay = index == 0;
            (spec.faults.delay, spec.faults.reset, spec.faults.stall) = (0.1, 0.05, 0.02);
            spec.faults.refuse_open = 0.05;
            spec.up_bytes_per_second = 2e6;
            let peer = net.add_peer(spec);
            let incoming = peer.accept(protocol.clone(), 16).expect("free");
            let places = rpc::Places { total: 4, per_peer: 4 };
            rpc::serve(incoming, &tasks, places, async |_, request| Some(request));
            peers.push(peer);
        }
        let calls = (0..120).map(async |index: usize| {
            let (from, to) = (&peers[index % 12], &peers[(index * 7 + 1 + index / 12) % 12]);
            let env = from.env();
            tokio::time::sleep(Duration::from_millis(env.random_u64() % 3000)).await;
            let bytes = Bytes::from(vec![1; (env.random_u64() % 300_000) as usize]);
            let deadline = env.now() + Duration::from_secs(8);
            rpc::call(&**from, to.local_peer(), &protocol, bytes, deadline).await.is_ok()
        });
        let crash = async {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            net.crash(peers[5].local_peer());
            net.vanish(peers[6].local_peer());
            let _guard = net.partition(&[peers[1].local_peer()], &[peers[2].local_peer()], false);
            tokio::time::sleep(Duration::from_millis(900)).await;
            net.restart(peers[6].local_peer());
        };
        let (answers, ()) = futures::join!(futures::future::join_all(calls), crash);
        let good = answers.iter().filter(|&&ok| ok).count();
        assert!(
            (30..120).contains(&good),
            "{good} of 120 calls were answered: no storm, or nothing but storm"
        );
        net.trace()
    })
}

fn in_another_process(seed: u64) -> String {
    let program = std::env::current_exe().expect("a test knows its own program");
    let output = std::process::Command::new(program)
        .args(["--exact", "the_same_seed_gives_the_same_trace_in_another_process", "--nocapture"])
        .env(CHILD, seed.to_string())
        .output()
        .expect("the program that runs can be run again");
    let text = String::from_utf8(output.stdout).expect("a hash is text");
    let hash = text.split("trace=").nth(1).unwrap_or_else(|| panic!("no trace in {text}"));
    hash.chars().take_while(char::is_ascii_hexdigit).collect()
}

#[test]
fn the_same_seed_gives_the_same_trace_in_another_process() {
    if let Ok(seed) = std::env::var(CHILD) {
        println!("trace={}", stormy(seed.parse().expect("set by the parent")).hash);
        return;
    }
    let here = stormy(5);
    assert!(here.total > 500, "a trace of {} lines shows nothing", here.total);
    assert_eq!(in_another_process(5), here.hash);
    assert_eq!(in_another_process(5), here.hash);
    assert_ne!(in_another_process(6), here.hash, "another seed, another run");
}
