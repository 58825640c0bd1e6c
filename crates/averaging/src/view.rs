//! Sans-I/O. Who is here, as everybody above membership sees it.

use crate::grid::Place;
use bytes::Bytes;
use potluck_net::{Path, PeerId, Reachability};
use std::collections::BTreeMap;

/// One live peer, as everybody above this crate sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// The epoch that it works on.
    pub epoch: u64,
    /// Samples accumulated in it.
    pub samples: u64,
    /// Its speed.
    pub samples_per_second: f64,
    /// Whether it could take part in a round.
    pub ready: bool,
    /// Measured upload rate in bytes per second, 0 if unknown.
    pub up_bytes_per_second: f64,
    /// Measured download rate in bytes per second, 0 if unknown.
    pub down_bytes_per_second: f64,
    /// Whether others can dial it.
    pub reachability: Reachability,
    /// How we are connected to it.
    pub path: Option<Path>,
    /// How often it came back.
    pub incarnation: u64,
    /// Random at each start of its program.
    pub process: u32,
    /// Two processes speak under this identity: the file that holds it was copied.
    pub twice: bool,
    /// Helps reducing, has no vector.
    pub auxiliary: bool,
    /// Dials out only.
    pub client: bool,
    /// The layer above's payload.
    pub app: Bytes,
    /// Whether this is ourselves.
    pub local: bool,
    /// Where it is in the grid of a large swarm.
    pub(crate) place: Place,
}

/// Every live peer, ourselves included.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// The peers.
    pub members: BTreeMap<PeerId, Member>,
    /// Another number whenever somebody comes, goes or starts again.
    pub(crate) generation: u64,
}

impl View {
    /// Samples of all live peers that work on this epoch: the plain sum, nothing is extrapolated.
    pub fn samples(&self, epoch: u64) -> u64 {
        self.members.values().filter(|m| m.epoch == epoch).map(|m| m.samples).sum()
    }

    /// The highest epoch that anybody works on.
    pub fn epoch_max(&self) -> u64 {
        self.members.values().map(|m| m.epoch).max().unwrap_or(0)
    }

    /// Take in what changed: whether anything did, and whether it matters to a round, as reports alone do not.
    pub(crate) fn apply(&mut self, changes: Vec<(PeerId, Option<Member>)>) -> (bool, bool) {
        let (mut differs, mut matters) = (false, false);
        for (peer, now) in changes {
            let before = self.members.get(&peer);
            if before == now.as_ref() {
                continue;
            }
            differs = true;
            if before.map(|member| member.process) != now.as_ref().map(|member| member.process) {
                self.generation += 1;
            }
            let of_rounds =
                |member: &Member| (member.epoch, member.ready, member.process, member.incarnation);
            matters |= before.map(of_rounds) != now.as_ref().map(of_rounds);
            match now {
                Some(member) => _ = self.members.insert(peer, member),
                None => _ = self.members.remove(&peer),
            }
        }
        (differs, matters)
    }
}
