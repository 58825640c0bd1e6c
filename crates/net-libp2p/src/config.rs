//! What a peer of the real network is told at its start.

use potluck_net::{Identity, Watermarks};

/// Which encryption TCP and relayed connections may use. QUIC always uses its own TLS 1.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Security {
    /// TLS 1.3 where both sides speak it (AES-GCM first where the processor has AES), Noise otherwise.
    #[default]
    TlsOrNoise,
    /// TLS 1.3 only.
    TlsOnly,
    /// Noise only.
    NoiseOnly,
}

/// How one peer takes part in the network. Start from [`Config::new`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Who we are.
    pub identity: Identity,
    /// Multiaddrs to listen on; [`Config::default_listen`] unless told otherwise.
    pub listen: Vec<String>,
    /// Multiaddrs to tell others instead of those that we find ourselves, for peers behind a static port mapping.
    pub announce: Vec<String>,
    /// Multiaddrs with `/p2p/<id>` of peers to ask first. All are dialed at once, and again for ever.
    pub bootstrap: Vec<String>,
    /// Carry the connections of peers that cannot be dialed. For machines with a public address.
    pub relay_server: bool,
    /// Never listen, only dial: for machines that others must not or cannot reach.
    pub client_mode: bool,
    /// Ask the router for a port mapping (UPnP).
    pub port_mapping: bool,
    /// Which encryption TCP and relayed connections may use.
    pub security: Security,
    /// How many connections are kept that nothing runs on.
    pub connections: Watermarks,
}

impl Config {
    /// A peer that listens on all interfaces, maps its ports, knows nobody yet and relays for nobody.
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            listen: Self::default_listen(),
            announce: Vec::new(),
            bootstrap: Vec::new(),
            relay_server: false,
            client_mode: false,
            port_mapping: true,
            security: Security::default(),
            connections: Watermarks::PEER,
        }
    }

    /// All interfaces, IPv4 and IPv6, TCP and QUIC, on free ports.
    pub fn default_listen() -> Vec<String> {
        Self::listen_on_port(0)
    }

    /// All interfaces, IPv4 and IPv6, TCP and QUIC, on one port (0: free ones).
    pub fn listen_on_port(port: u16) -> Vec<String> {
        vec![
            format!("/ip4/0.0.0.0/tcp/{port}"),
            format!("/ip4/0.0.0.0/udp/{port}/quic-v1"),
            format!("/ip6/::/tcp/{port}"),
            format!("/ip6/::/udp/{port}/quic-v1"),
        ]
    }

    /// On this machine only, for tests and single-machine runs: loopback, TCP and QUIC, free ports, no port mapping.
    pub fn loopback(identity: Identity) -> Self {
        let listen = vec!["/ip4/127.0.0.1/tcp/0".into(), "/ip4/127.0.0.1/udp/0/quic-v1".into()];
        Self { listen, port_mapping: false, ..Self::new(identity) }
    }
}
