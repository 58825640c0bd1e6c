//! potluck's network in memory and in virtual time.
//!
//! [`SimNet`] implements the seam of `potluck-net`, so that the code that runs on libp2p runs here unchanged: links with
//! bandwidth and latency, NAT classes and relays, and faults that follow from a seed. A minute of training among dozens
//! of peers takes milliseconds, and the same seed gives the same [`Trace`] in every process.
//!
//! ```
//! use potluck_net::{Protocol, Transport};
//! use potluck_net_sim::{PeerSpec, run};
//!
//! let answer = run(7, async |net| {
//!     let (alice, bob) = (net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default()));
//!     let echo = Protocol::new("/echo/1");
//!     let mut incoming = bob.accept(echo.clone(), 8)?;
//!     let mut ours = alice.open(bob.local_peer(), echo).await?;
//!     let mut theirs = incoming.next().await.expect("bob is not closed");
//!     ours.send("hello".into()).await?;
//!     let frame = theirs.recv().await?.expect("alice has not finished");
//!     // Two round trips of 20 ms to connect, one to open, half of one for the frame; timers fire by the millisecond.
//!     assert_eq!(net.elapsed().as_millis(), 71);
//!     Ok::<_, Box<dyn std::error::Error>>(frame)
//! })?;
//! assert_eq!(&answer[..], b"hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The model
//!
//! * **Links.** Every peer has an uplink and a downlink, shared by its streams in turns of 64 KiB (2 ms on fast links);
//!   small frames go first, so a heartbeat does not wait behind megabytes. Latency is to a backbone that is never full.
//! * **Windows.** A sender is at most one window (256 KiB to 4 MiB, by bandwidth and latency) and one frame ahead of its
//!   reader.
//! * **Connections** cost two round trips ([`NatClass`] decides whether direct, punched or relayed; the last two cost
//!   three), streams one, or none where one of the same protocol has ended on the same connection. Relayed bytes use the relay's links. Opens and resets travel at the latency of the route but
//!   take no bandwidth. A peer with too many gives up those that nothing runs on ([`potluck_net::Watermarks`]), at both ends
//!   at once.
//! * **Faults.** Frames are late, streams stall or reset ([`Verdict`], [`FaultRates`]), opens are refused, peers
//!   [crash](SimNet::crash), [vanish](SimNet::vanish), [freeze](SimNet::freeze) and [restart](SimNet::restart), networks
//!   [split](SimNet::partition). A frame inside a stream is never lost, doubled or re-ordered.
//! * **Not modelled**: packet loss and congestion control, address discovery (every peer is known to every other),
//!   hard limits on connections, the CPU. Tasks of a crashed or frozen peer keep running; only their network is gone.
//!
//! # Determinism
//!
//! One thread, paused clock, ordered maps, one seeded generator per peer ([`SimNet::env`]) and one for the network. What
//! the caller adds must keep to it: `select!` with `biased;`, no `HashMap`, no wall clock.

mod control;
mod flow;
mod kept;
mod mangler;
mod nat;
mod pipe;
mod rule;
mod sim;
mod spec;
mod stream;
mod streams;
mod surplus;
mod trace;
mod transport;
mod world;

pub use mangler::{Mangle, Mangler};
pub use rule::{FrameInfo, OpenInfo, Verdict};
pub use sim::{FaultGuard, SimNet};
pub use spec::{FaultRates, NatClass, PeerSpec, Traffic};
pub use trace::{Trace, TraceName};
pub use transport::SimTransport;

use std::future::Future;

/// Run `main` in virtual time on a network made from `seed`, and return what it returns.
///
/// # Panics
/// Inside another runtime, and if `main` panics.
pub fn run<F: Future>(seed: u64, main: impl FnOnce(SimNet) -> F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime with timers only needs nothing from the system that could be missing");
    runtime.block_on(async move { main(SimNet::new(seed)).await })
}
