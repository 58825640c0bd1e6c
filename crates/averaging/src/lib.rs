//! Who is here, who averages with whom, and an all-reduce that survives losing peers.
//!
//! * [`Swarm`]: membership of one run on one transport. Heartbeats, gossip, a failure detector; [`View`] says who is
//!   alive and how far along.
//! * [`Averager`]: one channel (a vector) on a swarm; [`Averager::step`] forms a group without fixed waits and returns
//!   the weighted mean, the same bits at every member.
//!
//! Decisions are sans-I/O, one file each (`membership`, `detector`, `plan`, `partition`, `station`, `reducer`, `spans`,
//! `rates`, `grid`, `view`); `swarm`, `link`, `router`, `exchange`, `pair`, `phases` and `averager` move bytes.
//! `docs/protocol.md` is the specification.

mod averager;
mod config;
mod detector;
mod exchange;
mod finding;
#[doc(hidden)]
pub mod fuzz;
mod grid;
mod invite;
mod link;
mod membership;
mod pair;
mod partition;
mod phases;
mod plan;
mod rates;
mod record;
mod reducer;
mod reducing;
mod router;
mod spans;
mod station;
mod store;
mod sum;
mod swarm;
mod twin;
mod view;
mod vote;
mod wire;

pub use averager::{
    Averager, AveragerConfig, Between, Expect, MemberReport, Round, RoundError, RoundErrorKind, RoundRequest,
    RoundStats,
};
pub use detector::HEARTBEAT;
pub use invite::Invite;
pub use plan::GROUP_MAX;
pub use record::Record;
pub use spans::{Chunk, Layout};
pub use swarm::{Directory, JoinError, Manifest, Roll, Swarm, SwarmConfig};
pub use view::{Member, View};
pub use wire::{APP_BYTES_MAX, GATHER_BYTES_MAX, PROTOCOL_VERSION, Progress};
