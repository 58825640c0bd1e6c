//! Sans-I/O. Who coordinates a round, what the plan of a round says, and who reduces a part when its reducer is lost.

use crate::partition::{self, Capacity};
use crate::spans::CHUNK_BYTES;
use crate::wire::{Plan, PlanMember, Ready};
use potluck_net::PeerId;
use std::collections::BTreeMap;

/// Members of one group at most: the bits of an average's mask.
pub const GROUP_MAX: usize = 64;
/// A vector whose norm exceeds the group's median by this factor is not averaged.
const NORM_FACTOR_MAX: f64 = 1000.0;

/// Chunks are so small that the slowest member has sent one to everybody after this time: until then nobody can begin to
/// add, and as long again nobody has anything else to do at the end.
const CHUNK_TIME: f64 = 0.1;

/// Encoded bytes of a chunk for members with these capacities; the largest while nothing is known of them.
fn chunk_bytes(capacities: &[Capacity]) -> u32 {
    let known = capacities.iter().map(|capacity| capacity.rate).filter(|rate| *rate > 0.0);
    let slowest = known.fold(f64::INFINITY, f64::min);
    let bytes = slowest * CHUNK_TIME / (capacities.len() as f64 - 1.0).max(1.0);
    (bytes.min(1e9) as u32).clamp(*CHUNK_BYTES.start(), *CHUNK_BYTES.end())
}

/// Peers in the order in which they coordinate: highest hash first.
pub(crate) fn coordinators(
    run: &str,
    channel: &str,
    epoch: Option<u64>,
    peers: impl IntoIterator<Item = PeerId>,
) -> Vec<PeerId> {
    let mut round = blake3::Hasher::new_derive_key("potluck coordinator 2");
    for field in [run.as_bytes(), channel.as_bytes()] {
        round.update(&(field.len() as u64).to_le_bytes());
        round.update(field);
    }
    round.update(&epoch.map_or([0xff; 8], u64::to_le_bytes));
    let round = *round.finalize().as_bytes();
    let rank = |peer: PeerId| (*blake3::keyed_hash(&round, peer.as_bytes()).as_bytes(), peer);
    let mut ranked: Vec<([u8; 32], PeerId)> = peers.into_iter().map(rank).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.dedup();
    ranked.into_iter().map(|(_, peer)| peer).collect()
}

/// The plan for these members. Implausible ones get weight 0: they receive the average and are named.
pub(crate) fn make(
    run: &str,
    channel: &str,
    epoch: Option<u64>,
    attempt: u32,
    coordinator: PeerId,
    ready: &BTreeMap<PeerId, Ready>,
) -> Plan {
    let limit = norm_limit(ready.values());
    let capacities: Vec<Capacity> =
        ready.values().map(|r| Capacity { rate: r.rate.max(0.0), sends: !r.auxiliary }).collect();
    let shares = partition::shares(&capacities);
    let mut implausible = Vec::new();
    let members = ready
        .iter()
        .zip(shares)
        .map(|((peer, ready), share)| {
            let plausible = ready.norm.is_finite() && ready.norm <= limit;
            if !plausible && ready.weight > 0.0 {
                implausible.push(*peer);
            }
            PlanMember {
                peer: *peer,
                nonce: ready.nonce,
                weight: if plausible && !ready.auxiliary { ready.weight } else { 0.0 },
                norm: ready.norm,
                gathered: ready.gathered.clone(),
                share,
                private: ready.private,
                auxiliary: ready.auxiliary,
            }
        })
        .collect();
    let chunk_bytes = chunk_bytes(&capacities);
    let (run, channel) = (run.into(), channel.into());
    Plan { run, channel, epoch, attempt, coordinator, members, chunk_bytes, implausible }
}

/// The largest plausible norm: a multiple of the lower median over members that contribute.
fn norm_limit<'a>(ready: impl Iterator<Item = &'a Ready>) -> f64 {
    let mut norms: Vec<f64> =
        ready.filter(|r| r.weight > 0.0 && !r.auxiliary && r.norm.is_finite()).map(|r| r.norm).collect();
    norms.sort_by(f64::total_cmp);
    match norms.get(norms.len().saturating_sub(1) / 2) {
        Some(median) if *median > 0.0 => median * NORM_FACTOR_MAX,
        _ => f64::INFINITY,
    }
}

impl Plan {
    /// The name of the plan in every later message.
    pub(crate) fn hash(&self) -> [u8; 32] {
        let bytes = rmp_serde::to_vec(self).expect("plain data always encodes");
        *blake3::hash(&bytes).as_bytes()
    }

    /// Its round, for people.
    pub(crate) fn round(&self) -> String {
        match self.epoch {
            Some(epoch) => format!("the {} round of epoch {epoch}", self.channel),
            None => format!("a {} round", self.channel),
        }
    }

    /// Position of a member.
    pub(crate) fn index_of(&self, peer: PeerId) -> Option<usize> {
        self.members.iter().position(|member| member.peer == peer)
    }

    /// The member that reduces `part` in this generation: generation 0 is the planned one, then the next in order.
    pub(crate) fn reducer(&self, part: usize, generation: usize) -> usize {
        (part + generation) % self.members.len().max(1)
    }

    /// The first generation, from `generation` on, whose reducer is not lost.
    pub(crate) fn next_generation(&self, part: usize, generation: usize, lost: &[bool]) -> Option<usize> {
        (generation..generation + self.members.len())
            .find(|generation| !lost.get(self.reducer(part, *generation)).copied().unwrap_or(true))
    }

    /// Which of two members opens the stream between them: the one that others cannot dial, else the first.
    pub(crate) fn opens(&self, a: usize, b: usize) -> usize {
        let private = |at: usize| self.members.get(at).is_some_and(|member| member.private);
        match (private(a), private(b)) {
            (true, false) => a,
            (false, true) => b,
            _ => a.min(b),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn peer(seed: u8) -> PeerId {
        potluck_net::Identity::from_seed(&[seed; 32]).peer_id()
    }

    pub(crate) fn ready(norm: f64) -> Ready {
        Ready {
            epoch: Some(1),
            nonce: 1,
            attempt: 0,
            weight: 1.0,
            norm,
            gathered: Default::default(),
            rate: 0.0,
            private: false,
            auxiliary: false,
            layout: [0; 32],
        }
    }

    #[test]
    fn every_peer_computes_the_same_order_and_epochs_take_turns() {
        let peers: Vec<PeerId> = (0..8).map(peer).collect();
        let mut reversed = peers.clone();
        reversed.reverse();
        let order = |epoch, peers: &[PeerId]| coordinators("run", "grad", Some(epoch), peers.iter().copied());
        assert_eq!(order(1, &peers), order(1, &reversed));
        let firsts: std::collections::BTreeSet<PeerId> = (0..100).map(|e| order(e, &peers)[0]).collect();
        assert_eq!(firsts.len(), 8);
    }

    #[test]
    fn an_implausible_norm_loses_its_weight_and_is_named() {
        let group: BTreeMap<PeerId, Ready> =
            [(peer(1), ready(1.0)), (peer(2), ready(1e6)), (peer(3), ready(2.0))].into();
        let plan = make("run", "grad", Some(1), 0, peer(1), &group);
        assert_eq!(plan.implausible, [peer(2)]);
        let at = plan.index_of(peer(2)).unwrap();
        assert_eq!(plan.members[at].weight, 0.0);
    }

    #[test]
    fn fallback_skips_the_lost() {
        let group: BTreeMap<PeerId, Ready> = (1..=4).map(|seed| (peer(seed), ready(1.0))).collect();
        let plan = make("run", "grad", Some(1), 0, peer(1), &group);
        assert_eq!(plan.next_generation(2, 0, &[false, false, true, true]), Some(2));
        assert_eq!(plan.next_generation(2, 0, &[true; 4]), None);
    }
}
