//! What a simulated peer is like: its links, its NAT, its clock, and how often it misbehaves.

use std::time::Duration;

/// What a new peer is made from. `PeerSpec::default()` is a healthy machine in a data centre.
///
/// ```
/// use potluck_net_sim::{NatClass, PeerSpec};
/// let home = PeerSpec {
///     up_bytes_per_second: 2.5e6,
///     down_bytes_per_second: 12.5e6,
///     nat: NatClass::PortRestricted,
///     ..PeerSpec::default()
/// };
/// assert_eq!(home.clock_skew, 0);
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct PeerSpec {
    /// Bytes per second that the peer can send, over all its streams.
    pub up_bytes_per_second: f64,
    /// Bytes per second that the peer can receive, over all its streams.
    pub down_bytes_per_second: f64,
    /// One way from the peer to the backbone; two peers are the sum of theirs apart.
    pub latency: Duration,
    /// Most that a frame is late by on top of the latency; uniform, and never re-orders a stream.
    pub jitter: Duration,
    /// What stands between the peer and the internet.
    pub nat: NatClass,
    /// Whether the peer relays for others; it must be dialable ([`NatClass::Open`]) to be chosen.
    pub relay: bool,
    /// Seconds by which the peer's wall clock is ahead (behind, if negative).
    pub clock_skew: i64,
    /// The identity follows from this name, or from the peer's index if it is empty. Unique within a network.
    pub name: String,
    /// Seeded misbehaviour of what the peer sends and of what is opened to it.
    pub faults: FaultRates,
}

impl Default for PeerSpec {
    fn default() -> Self {
        Self {
            up_bytes_per_second: 100e6,
            down_bytes_per_second: 100e6,
            latency: Duration::from_millis(5),
            jitter: Duration::ZERO,
            nat: NatClass::Open,
            relay: false,
            clock_skew: 0,
            name: String::new(),
            faults: FaultRates::default(),
        }
    }
}

/// How often the network misbehaves for a peer, as probabilities from 0 to 1. All zero by default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaultRates {
    /// A frame (and all behind it in its stream) is late by up to `delay_max`.
    pub delay: f64,
    /// Longest such delay.
    pub delay_max: Duration,
    /// The stream stalls at this frame and never goes on in this direction.
    pub stall: f64,
    /// The stream is reset at this frame.
    pub reset: f64,
    /// An open towards this peer is refused.
    pub refuse_open: f64,
}

impl Default for FaultRates {
    fn default() -> Self {
        Self { delay: 0.0, delay_max: Duration::from_secs(1), stall: 0.0, reset: 0.0, refuse_open: 0.0 }
    }
}

/// What kind of NAT or firewall a peer is behind; decides who can connect to whom and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum NatClass {
    /// A public address: everybody can dial it.
    #[default]
    Open,
    /// One mapping for everybody: dialable once it has been online.
    FullCone,
    /// A mapping that only lets in whom the peer has sent to from the same port: hole punching works.
    PortRestricted,
    /// A fresh port for every destination: punches only against peers that let anybody in.
    Symmetric,
    /// A firewall that lets nothing in, not even punched: dials out, otherwise a relay.
    OutboundOnly,
}

/// What one peer has moved so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes that left through the uplink, framing and relayed bytes included.
    pub up_bytes: u64,
    /// Bytes that came in through the downlink, framing and relayed bytes included.
    pub down_bytes: u64,
    /// Frames that the peer's own programs sent.
    pub frames_sent: u64,
    /// Frames that were delivered to the peer's own programs.
    pub frames_received: u64,
    /// Streams that were opened to or from this peer.
    pub streams: u64,
    /// Connections that the peer holds at the moment.
    pub connections: usize,
    /// Bytes that the peer carried for others (counted once, on the way in).
    pub relayed_bytes: u64,
}
