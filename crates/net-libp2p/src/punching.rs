//! Another try where no hole could be punched: a pair must not stay relayed because the first attempt came too early.
//!
//! DCUtR punches once per relayed connection, with the addresses that were known when that connection was made; a peer that
//! has just come often knows none of its own. So whoever dialed a relayed connection makes another one later, a probe, over
//! which the other side tries again with what both know by then. Nothing else is sent over a probe.

use libp2p::Multiaddr;
use libp2p::swarm::ConnectionId;
use potluck_net::PeerId;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// From a relayed connection to the first probe; doubles up to `PAUSE_MAX`.
const PAUSE_FIRST: Duration = Duration::from_secs(5);
/// Symmetric NATs never let anybody through: their pairs ask this often, for some kilobytes.
const PAUSE_MAX: Duration = Duration::from_secs(300);
/// How long a probe may live: three attempts of the other side.
const PROBE_MAX: Duration = Duration::from_secs(20);

/// What the driver shall do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make another relayed connection to the peer, under the id that [`Punching::dialing`] is then told.
    Probe(PeerId, Multiaddr),
    /// The probe has done what it could.
    Close(ConnectionId),
}

struct Pair {
    circuit: Multiaddr,
    due: Instant,
    pause: Duration,
    probe: Option<(ConnectionId, Instant)>,
}

/// The pairs that are connected through a relay because we dialed so.
#[derive(Default)]
pub(crate) struct Punching {
    pairs: BTreeMap<PeerId, Pair>,
}

impl Punching {
    /// We have dialed a relayed connection.
    pub(crate) fn relayed(&mut self, now: Instant, peer: PeerId, circuit: &Multiaddr) {
        self.pairs.entry(peer).or_insert_with(|| Pair {
            circuit: circuit.clone(),
            due: now + PAUSE_FIRST,
            pause: PAUSE_FIRST,
            probe: None,
        });
    }

    /// The probe that was asked for is being dialed.
    pub(crate) fn dialing(&mut self, now: Instant, peer: PeerId, probe: ConnectionId) {
        if let Some(pair) = self.pairs.get_mut(&peer) {
            pair.probe = Some((probe, now + PROBE_MAX));
        }
    }

    /// What is due; `is_relayed` says whether a peer is still connected through a relay and not directly.
    pub(crate) fn due(&mut self, now: Instant, is_relayed: impl Fn(PeerId) -> bool) -> Vec<Action> {
        let mut actions = Vec::new();
        self.pairs.retain(|peer, pair| {
            let wanted = is_relayed(*peer);
            if let Some((probe, until)) = pair.probe
                && (!wanted || now >= until)
            {
                actions.push(Action::Close(probe));
                pair.probe = None;
            }
            if wanted && pair.probe.is_none() && now >= pair.due {
                pair.pause = (pair.pause * 2).min(PAUSE_MAX);
                pair.due = now + pair.pause;
                actions.push(Action::Probe(*peer, pair.circuit.clone()));
            }
            wanted
        });
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_come_at_growing_pauses_and_are_closed_until_the_pair_is_direct() {
        let peer = PeerId::from_ed25519(&[1; 32]);
        let circuit: Multiaddr = "/ip4/203.0.113.1/tcp/1/p2p-circuit".parse().unwrap();
        let start = Instant::now();
        let mut punching = Punching::default();
        punching.relayed(start, peer, &circuit);
        let (mut probes, mut closed) = (Vec::new(), 0);
        for second in 0..2000 {
            let now = start + Duration::from_secs(second);
            // A probe is a relayed connection that we dial.
            punching.relayed(now, peer, &circuit);
            for action in punching.due(now, |_| true) {
                match action {
                    Action::Probe(..) => {
                        probes.push(second);
                        punching.dialing(now, peer, ConnectionId::new_unchecked(probes.len()));
                    }
                    Action::Close(_) => closed += 1,
                }
            }
        }
        assert_eq!(probes, [5, 25, 45, 85, 165, 325, 625, 925, 1225, 1525, 1825]);
        assert_eq!(closed, probes.len());
        let now = start + Duration::from_secs(2200);
        assert_eq!(punching.due(now, |_| true).len(), 1);
        punching.dialing(now, peer, ConnectionId::new_unchecked(77));
        assert_eq!(punching.due(now, |_| false), [Action::Close(ConnectionId::new_unchecked(77))]);
        assert!(punching.pairs.is_empty());
    }
}
