//! What kind of NAT this machine is behind, from how several peers see the same socket of it.

use crate::doctor::SEEN_LIMIT;
use anyhow::Result;
use potluck_net::{Env, Identity, PeerId, Transport};
use potluck_net_libp2p::{Config, Libp2pTransport};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::Instant;

const PAUSE: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Nat {
    /// Peers see the address that this machine has itself.
    None,
    /// Every peer sees the same port: hole punching works.
    Cone,
    /// Every peer sees another port: a hole that is punched for one is none for another.
    Symmetric,
    /// There is one, but fewer than two peers have looked.
    Some,
    /// Nobody has looked.
    Unknown,
}

/// Address and port of a multiaddr, and whether it is UDP.
fn socket(address: &str) -> Option<(IpAddr, bool, u16)> {
    let parts: Vec<&str> = address.split('/').collect();
    let ["", "ip4" | "ip6", ip, kind @ ("tcp" | "udp"), port, ..] = parts[..] else { return None };
    Some((ip.parse().ok()?, kind == "udp", port.parse().ok()?))
}

/// `seen`: how each peer sees us; `own`: what we listen on.
pub(crate) fn classify(seen: &[(PeerId, String)], own: &[String]) -> Nat {
    let own: BTreeSet<IpAddr> = own.iter().filter_map(|address| Some(socket(address)?.0)).collect();
    let mut translated: BTreeMap<(IpAddr, bool), Vec<u16>> = BTreeMap::new();
    let mut looked = false;
    for (ip, udp, port) in seen.iter().filter_map(|(_, address)| socket(address)) {
        looked = true;
        if !own.contains(&ip) && !ip.is_loopback() {
            translated.entry((ip, udp)).or_default().push(port);
        }
    }
    if translated.is_empty() {
        return if looked { Nat::None } else { Nat::Unknown };
    }
    if translated.values().any(|ports| ports.iter().any(|port| *port != ports[0])) {
        return Nat::Symmetric;
    }
    if translated.values().any(|ports| ports.len() > 1) { Nat::Cone } else { Nat::Some }
}

/// Ask the bootstrap peers, all of them from one socket: UDP where the token has such addresses, else TCP.
pub(crate) async fn find(bootstrap: &[String], env: &Env) -> Result<Nat> {
    let udp: Vec<String> = bootstrap.iter().filter(|address| address.contains("/udp/")).cloned().collect();
    let by_udp = ask(udp, "/ip4/0.0.0.0/udp/0/quic-v1", env).await?;
    if matches!(by_udp, Nat::Cone | Nat::Symmetric | Nat::None) {
        return Ok(by_udp);
    }
    let tcp = bootstrap.iter().filter(|address| address.contains("/tcp/")).cloned().collect();
    let by_tcp = ask(tcp, "/ip4/0.0.0.0/tcp/0", env).await?;
    Ok(if by_tcp == Nat::Unknown { by_udp } else { by_tcp })
}

async fn ask(bootstrap: Vec<String>, listen: &str, env: &Env) -> Result<Nat> {
    let id_of = |address: &String| Some(address.rsplit('/').next()?.to_owned());
    let ids: BTreeSet<String> = bootstrap.iter().filter_map(id_of).collect();
    let peers = ids.len();
    if peers == 0 {
        return Ok(Nat::Unknown);
    }
    let mut config = Config::new(Identity::from_seed(&env.random_bytes()));
    config.listen = vec![listen.to_owned()];
    config.port_mapping = false;
    config.bootstrap = bootstrap;
    let transport = Libp2pTransport::start(config, env.clone()).await?;
    let until = Instant::now() + SEEN_LIMIT;
    // Others that are met on the way may be on this machine, and by IPv6 nobody sees the socket that listens.
    let seen = || -> Vec<(PeerId, String)> {
        let asked = |peer: &PeerId, address: &str| {
            ids.contains(peer.to_string().as_str()) && address.starts_with("/ip4/")
        };
        transport.observed().into_iter().filter(|(peer, address)| asked(peer, address)).collect()
    };
    while seen().len() < peers && Instant::now() < until {
        tokio::time::sleep(PAUSE).await;
    }
    let nat = classify(&seen(), &transport.addresses());
    transport.abort();
    Ok(nat)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(seen: &[&str]) -> Nat {
        let peer = |at: usize| PeerId::from_ed25519(&[at as u8 + 1; 32]);
        let seen: Vec<(PeerId, String)> =
            seen.iter().enumerate().map(|(at, address)| (peer(at), (*address).to_owned())).collect();
        classify(&seen, &["/ip4/192.168.1.5/udp/4001/quic-v1".to_owned()])
    }

    #[test]
    fn one_port_for_everybody_is_a_cone_and_one_for_each_is_not() {
        let quic = |ip: &str, port: u16| format!("/ip4/{ip}/udp/{port}/quic-v1");
        let (home, outside) = (quic("192.168.1.5", 4001), quic("203.0.113.9", 4001));
        let (other, elsewhere) = (quic("203.0.113.9", 50_022), quic("198.51.100.1", 7));
        assert_eq!(kind(&[&outside, &outside]), Nat::Cone);
        assert_eq!(kind(&[&outside, &other]), Nat::Symmetric);
        assert_eq!(kind(&[&outside, &outside, &other]), Nat::Symmetric);
        assert_eq!(kind(&[&outside]), Nat::Some, "one look says nothing about the next");
        assert_eq!(kind(&[&outside, &elsewhere]), Nat::Some, "two ways out, one look each");
        assert_eq!(kind(&[&home, &home]), Nat::None);
        assert_eq!(kind(&[&home, &outside, &outside]), Nat::Cone, "a peer of the same house sees no NAT");
        assert_eq!(
            kind(&["/ip4/203.0.113.9/tcp/9", &outside]),
            Nat::Some,
            "TCP and UDP have ports of their own"
        );
        assert_eq!(kind(&[]), Nat::Unknown);
        assert_eq!(kind(&["/dns4/example.org/tcp/1"]), Nat::Unknown);
    }
}
