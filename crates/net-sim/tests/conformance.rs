//! The simulator keeps the contract of the seam: the same suite that libp2p passes.

use bytes::Bytes;
use potluck_net::{FRAME_BYTES_MAX, PeerId, Protocol, Transport};
use potluck_net_conformance::{self as conformance, Network};
use potluck_net_sim::{NatClass, PeerSpec, SimNet, run};
use std::sync::Arc;

struct Simulated {
    net: SimNet,
    spec: PeerSpec,
    silent: bool,
}

impl Network for Simulated {
    async fn two_peers(&self) -> (Arc<dyn Transport>, Arc<dyn Transport>) {
        (self.net.add_peer(self.spec.clone()), self.net.add_peer(self.spec.clone()))
    }

    async fn kill(&self, peer: PeerId) {
        if self.silent { self.net.vanish(peer) } else { self.net.crash(peer) }
    }

    async fn send_oversize(&self, to: Arc<dyn Transport>, protocol: Protocol) -> String {
        let from = self.net.add_peer(self.spec.clone());
        let open = async || from.open(to.local_peer(), protocol.clone()).await;
        let (mut sound, _broken) = match (open().await, open().await) {
            (Ok(sound), Ok(broken)) => (sound, broken),
            (Err(error), _) | (_, Err(error)) => return error.to_string(),
        };
        let frame = Bytes::from(vec![0; FRAME_BYTES_MAX + 1]);
        assert!(self.net.inject_frame(from.local_peer(), to.local_peer(), &protocol, frame));
        loop {
            let echoed = match sound.recv().await {
                Ok(Some(frame)) => sound.send(frame).await,
                Ok(None) => return "the sound stream has ended".to_owned(),
                Err(error) => Err(error),
            };
            if let Err(error) = echoed {
                return error.to_string();
            }
        }
    }

    fn ahead_bytes_max(&self) -> usize {
        8 << 20
    }
}

fn check(spec: PeerSpec, silent: bool) {
    run(11, async |net: SimNet| {
        net.add_peer(PeerSpec { relay: true, ..PeerSpec::default() });
        conformance::run_all(&Simulated { net: net.clone(), spec, silent }).await;
        assert_eq!(net.streams(), 0, "the suite has dropped every stream");
    });
}

#[test]
fn open_peers_conform() {
    check(PeerSpec::default(), false);
}

#[test]
fn peers_that_vanish_conform() {
    check(PeerSpec::default(), true);
}

#[test]
fn relayed_peers_conform() {
    check(PeerSpec { nat: NatClass::Symmetric, ..PeerSpec::default() }, false);
}

#[test]
fn peers_with_jitter_and_late_frames_conform() {
    let mut spec = PeerSpec { jitter: std::time::Duration::from_millis(40), ..PeerSpec::default() };
    spec.faults.delay = 0.1;
    check(spec, false);
}
