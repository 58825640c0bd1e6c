//! Peers that vanish without a word. A killed process closes its sockets; a machine without power, or behind a cable that
//! was cut, closes nothing: here each peer is reached through a forwarder that then keeps its connections and carries nothing.

use potluck_net::{Env, FaultKind, Identity, PeerId, Protocol, Tasks, Transport, rpc};
use potluck_net_conformance::{self as conformance, Network};
use potluck_net_libp2p::{Config, Libp2pTransport};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;

/// The only way to one peer that others are told.
struct Forwarder {
    address: String,
    silent: watch::Sender<bool>,
    _tasks: Tasks,
}

impl Forwarder {
    async fn to(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback can be listened on");
        let port = listener.local_addr().expect("it is bound").port();
        let (silent, heard) = watch::channel(false);
        let (tasks, scope) = (Tasks::new(), Tasks::new());
        tasks.spawn(async move {
            // What connects after the silence began is held, too: nobody refuses it.
            while let Ok((near, _)) = listener.accept().await {
                scope.spawn(forward(near, target, heard.clone()));
            }
        });
        Self { address: format!("/ip4/127.0.0.1/tcp/{port}"), silent, _tasks: tasks }
    }
}

async fn forward(near: TcpStream, target: u16, silent: watch::Receiver<bool>) {
    if *silent.borrow() {
        return std::future::pending().await;
    }
    let far = TcpStream::connect(("127.0.0.1", target)).await.expect("the peer lives");
    let ((near_out, near_in), (far_out, far_in)) = (near.into_split(), far.into_split());
    tokio::join!(carry(near_out, far_in, silent.clone()), carry(far_out, near_in, silent));
}

/// One direction, until its end or the silence.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, silent: watch::Receiver<bool>) {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut bytes).await;
        if *silent.borrow() {
            // Also an end is not passed on.
            return std::future::pending().await;
        }
        match read {
            Ok(count) if count > 0 && to.write_all(&bytes[..count]).await.is_ok() => {}
            // Dropped, it is closed.
            _ => return,
        }
    }
}

/// A network whose peers vanish.
#[derive(Default)]
struct Vanishing {
    alive: Mutex<BTreeMap<PeerId, (Arc<Libp2pTransport>, Forwarder)>>,
}

impl Vanishing {
    async fn peer(&self) -> Arc<Libp2pTransport> {
        let env = Env::real();
        let mut config = Config::loopback(Identity::from_seed(&env.random_bytes()));
        config.listen = vec!["/ip4/127.0.0.1/tcp/0".to_owned()];
        let peer = Libp2pTransport::start(config, env).await.expect("loopback can be listened on");
        let own = peer.addresses();
        let port = own[0].split('/').nth(4).and_then(|port| port.parse().ok());
        let forwarder = Forwarder::to(port.expect("an address of TCP")).await;
        self.alive
            .lock()
            .expect("no test thread has panicked")
            .insert(peer.local_peer(), (peer.clone(), forwarder));
        peer
    }
}

impl Network for Vanishing {
    async fn two_peers(&self) -> (Arc<dyn Transport>, Arc<dyn Transport>) {
        let (first, second) = (self.peer().await, self.peer().await);
        let alive = self.alive.lock().expect("no test thread has panicked");
        for (one, other) in [(&first, &second), (&second, &first)] {
            one.add_addresses(other.local_peer(), &[alive[&other.local_peer()].1.address.clone()]);
        }
        drop(alive);
        (first, second)
    }

    async fn kill(&self, peer: PeerId) {
        let alive = self.alive.lock().expect("no test thread has panicked");
        let (transport, forwarder) = &alive[&peer];
        forwarder.silent.send_replace(true);
        // Its sockets close now, which only the forwarder sees.
        transport.abort();
    }

    async fn send_oversize(&self, _: Arc<dyn Transport>, _: Protocol) -> String {
        unreachable!("the properties of dead peers send nothing of that kind")
    }

    fn noticed_within(&self) -> Option<Duration> {
        // The second ping that nobody answers has ended 45 s after the silence began, at the latest.
        Some(Duration::from_secs(60))
    }
}

/// Both at a time, because each waits for most of a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_peer_fails_within_the_deadline_on_new_streams_and_on_used_ones() {
    let (new, used) = (Vanishing::default(), Vanishing::default());
    tokio::join!(
        conformance::a_dead_peer_fails_within_the_deadline(&new),
        conformance::a_dead_peer_fails_within_the_deadline_on_a_used_stream(&used),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_peer_is_named_as_silent() {
    let network = Vanishing::default();
    let (a, b) = network.two_peers().await;
    let (protocol, serving) = (Protocol::new("/silence/1"), Tasks::new());
    let places = rpc::Places { total: 4, per_peer: 4 };
    rpc::serve(b.accept(protocol.clone(), 4).unwrap(), &serving, places, async |_, request| Some(request));
    let call = || {
        let deadline = Instant::now() + Duration::from_secs(3);
        rpc::call(&*a, b.local_peer(), &protocol, "hello".into(), deadline)
    };
    assert_eq!(call().await.unwrap(), "hello");
    network.kill(b.local_peer()).await;
    let fault = call().await.unwrap_err();
    assert_eq!((fault.peer, fault.kind), (b.local_peer(), FaultKind::Silent), "{fault}");
}
