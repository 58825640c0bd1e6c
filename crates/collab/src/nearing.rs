//! Sans-I/O. Samples travel with heartbeats, once a second. When the target may be in by now, that is too slow: whoever has
//! news then tells it at once, so that the epoch ends with the batch that fills it and not up to a second later.

use crate::dialect::PeerView;
use crate::progress::{self, Own};
use potluck_averaging::HEARTBEAT;
use potluck_net::PeerId;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// How much too early the target may be expected: speeds are measured, and steps are no steady flow.
const MARGIN: Duration = Duration::from_millis(100);
/// Between two such reports of one peer, however short its steps are.
const PAUSE: Duration = Duration::from_millis(25);

/// When each peer last said something new.
#[derive(Debug, Default)]
pub(crate) struct Nearing {
    heard: BTreeMap<PeerId, Heard>,
    told: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Heard {
    epoch: u64,
    samples: u64,
    at: Instant,
}

impl Nearing {
    /// Whether this peer's samples must be told now. What is expected decides nothing else.
    pub(crate) fn must_tell(
        &mut self,
        now: Instant,
        epoch: u64,
        target: u64,
        own: &Own,
        peers: &BTreeMap<PeerId, PeerView>,
    ) -> bool {
        self.hear(now, peers);
        let known = progress::sum(epoch, own, peers.values()).samples;
        let recently = self.told.is_some_and(|told| now < told + PAUSE);
        if peers.is_empty() || known >= target || recently {
            return false;
        }
        let coming = f64::from(own.samples_per_second) * MARGIN.as_secs_f64();
        let unheard = peers.values().filter(|peer| peer.epoch == epoch).map(|peer| self.unheard(now, peer));
        let is_near = known as f64 + coming + unheard.sum::<f64>() >= target as f64;
        if is_near {
            self.told = Some(now);
        }
        is_near
    }

    fn hear(&mut self, now: Instant, peers: &BTreeMap<PeerId, PeerView>) {
        for peer in peers.values() {
            let PeerView { epoch, samples, .. } = *peer;
            let heard = self.heard.entry(peer.peer).or_insert(Heard { epoch, samples, at: now });
            if (heard.epoch, heard.samples) != (epoch, samples) {
                *heard = Heard { epoch, samples, at: now };
            }
        }
        if self.heard.len() > peers.len() {
            self.heard.retain(|peer, _| peers.contains_key(peer));
        }
    }

    /// What a peer has probably computed since it was heard, and will within the margin. A peer whose heartbeats bring
    /// nothing new computes no faster for it.
    fn unheard(&self, now: Instant, peer: &PeerView) -> f64 {
        let since = self.heard.get(&peer.peer).map_or(Duration::ZERO, |heard| now - heard.at);
        f64::from(peer.samples_per_second.max(0.0)) * (since.min(HEARTBEAT) + MARGIN).as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rates;

    fn beside(seed: u8, samples: u64) -> BTreeMap<PeerId, PeerView> {
        let peer = PeerId::from_ed25519(&[seed; 32]);
        let view = PeerView {
            peer,
            epoch: 3,
            samples,
            samples_per_second: 100.0,
            path: None,
            rates: Rates::default(),
            auxiliary: false,
            client: false,
            note: bytes::Bytes::new(),
        };
        BTreeMap::from([(peer, view)])
    }

    fn own(samples: u64) -> Own {
        let mut own = Own::new();
        own.samples = samples;
        own
    }

    #[tokio::test(start_paused = true)]
    async fn samples_are_told_at_once_when_the_target_may_be_in_and_not_before() {
        let (mut nearing, peers) = (Nearing::default(), beside(1, 40));
        let mut told = Vec::new();
        for step in 0..100 {
            if nearing.must_tell(Instant::now(), 3, 120, &own(20), &peers) {
                told.push(step * 10);
            }
            tokio::time::advance(Duration::from_millis(10)).await;
        }
        // 60 are missing, which takes the other 0.6 s; each 25 ms from 0.5 s on, in steps of 10 ms.
        assert_eq!((told[0], told[1], told.len()), (500, 530, 17), "{told:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_told_what_all_know_or_what_concerns_nobody() {
        let mut nearing = Nearing::default();
        assert!(!nearing.must_tell(Instant::now(), 3, 60, &own(20), &beside(1, 40)), "the target is in");
        assert!(!nearing.must_tell(Instant::now(), 3, 60, &own(59), &BTreeMap::new()), "nobody is here");
        assert!(
            !nearing.must_tell(Instant::now(), 2, 60, &own(20), &beside(1, 40)),
            "another epoch's samples"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_stands_still_does_not_bring_the_target_nearer_for_ever() {
        let (mut nearing, peers) = (Nearing::default(), beside(1, 40));
        for _ in 0..100 {
            assert!(!nearing.must_tell(Instant::now(), 3, 180, &own(20), &peers));
            tokio::time::advance(Duration::from_millis(100)).await;
        }
    }
}
