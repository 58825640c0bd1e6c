//! Who is here, who averages with whom, and an all-reduce that survives losing peers.
mod detector;
mod grid;
mod invite;
mod link;
mod membership;
mod partition;
mod plan;
mod rates;
mod router;
mod spans;
mod swarm;
mod wire;

pub use detector::HEARTBEAT;
pub use invite::Invite;
pub use membership::{Member, View};
pub use plan::GROUP_MAX;
pub use spans::{Chunk, Layout};
pub use swarm::{Directory, JoinError, Manifest, Swarm, SwarmConfig};
pub use wire::{APP_BYTES_MAX, GATHER_BYTES_MAX, Progress};
