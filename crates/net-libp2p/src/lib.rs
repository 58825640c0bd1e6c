//! potluck's [`Transport`](potluck_net::Transport) on rust-libp2p: the only crate that names libp2p.
//!
//! * TCP (TLS 1.3 or Noise, yamux) and QUIC v1, on all interfaces, IPv4 and IPv6.
//! * Peers are found by id: addresses told by others, identify, Kademlia peer routing, and circuits through relays.
//! * Behind NAT: port mapping (UPnP), relays, and hole punching from the listening port (DCUtR); [`Path`] says which.
//! * Bootstrap addresses are dialed at once and for ever; [`BootstrapAttempt`] says how far each got.
//! * Streams are one behaviour of our own (`streams`), because `libp2p-stream` loses inbound ones under load.
//!
//! [`Path`]: potluck_net::Path

mod bootstrap;
mod config;
mod convert;
mod dials;
mod doorman;
mod driver;
#[doc(hidden)]
pub mod fuzz;
pub mod identity_file;
mod kept;
mod mux;
#[cfg(test)]
mod pipe;
mod punching;
mod quic;
mod read_ahead;
mod relays;
mod router;
mod secure;
mod shared;
mod stage;
mod streams;
mod swarm;
mod tls;
mod traffic;
mod transport;
mod usage;
mod wire;

pub use bootstrap::BootstrapAttempt;
pub use config::{Config, Security};
pub use stage::Stage;
pub use traffic::Traffic;
pub use transport::{Libp2pTransport, StartError};
