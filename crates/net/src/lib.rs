//! The seam between potluck and any network.
//!
//! Everything above the network talks to an [`Transport`] as `Arc<dyn Transport>` and to nothing else: it opens
//! framed [`Stream`]s to a [`PeerId`] under a [`Protocol`] name, and accepts them. The simulator and libp2p are two
//! implementations that pass one conformance suite (`net-conformance`).
//!
//! What lives here and why:
//! * [`PeerId`], [`Identity`]: who somebody is, and signatures that anyone can check.
//! * [`Transport`], [`Stream`], [`Incoming`]: ordered frames with back-pressure; a stream dropped unfinished is reset.
//! * [`rpc`]: one request, one answer, one deadline.
//! * [`Env`]: clock, seeded randomness and CPU off-loading, so that a simulated run is reproducible.
//! * [`PeerFault`], [`Outcome`]: a lost peer is a value, never an error.
//! * [`BufferPool`]: memory of bulk data, used again.
//! * [`Watermarks`]: which connections are given up when there are too many.
//! * [`Tasks`]: no task outlives its owner.
//!
//! The fault model fits the layer: inside a stream no frame is ever lost, duplicated or re-ordered, because TCP and
//! QUIC never do that; frames are late, streams stall or reset, opens are refused, peers vanish.

mod env;
mod fault;
#[doc(hidden)]
pub mod fuzz;
mod identity;
mod peer_id;
mod pool;
pub mod rpc;
mod stream;
mod tasks;
mod token;
mod transport;
mod watermarks;

pub use env::{Env, RUNTIME_THREADS};
pub use fault::{FaultKind, Outcome, PeerFault};
pub use identity::Identity;
pub use peer_id::{PeerId, PeerIdError};
pub use pool::BufferPool;
pub use stream::{FRAME_BYTES_MAX, FrameReceiver, FrameSender, Stream, StreamError};
pub use tasks::Tasks;
pub use token::{EVERY_RUN, Token, TokenError};
pub use transport::{AcceptError, Incoming, OpenError, Path, Protocol, Reachability, Transport};
pub use watermarks::Watermarks;
