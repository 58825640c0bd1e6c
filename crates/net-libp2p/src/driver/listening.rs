//! Binding the listeners at the start, and waiting until their addresses are known.

use super::Driver;
use crate::convert;
use crate::transport::StartError;
use futures::{FutureExt, StreamExt};
use libp2p::Multiaddr;
use libp2p::core::transport::ListenerId;
use libp2p::swarm::SwarmEvent;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// How long a start waits for the addresses of its listeners: they come from the system's list of interfaces.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(2);

/// A listener of which an address is still to come.
struct Awaited {
    id: ListenerId,
    /// Its first address may be the machine's own loopback, as it listens on every interface and there are others.
    beyond_loopback: bool,
}

impl Awaited {
    /// What a listener on `address` will find on a machine with these addresses, if it will find any: each looks them up by
    /// itself, and that of IPv6 may be later than that of IPv4.
    fn new(id: ListenerId, address: &Multiaddr, machine: &[IpAddr]) -> Option<Self> {
        if convert::is_usable(address) {
            return Some(Self { id, beyond_loopback: false });
        }
        let mut found = machine.iter().filter(|ip| ip.is_ipv6() == is_ip6(address)).peekable();
        found.peek()?;
        Some(Self { id, beyond_loopback: found.any(|ip| !ip.is_loopback()) })
    }

    fn is_found(&self, listener: ListenerId, address: &Multiaddr) -> bool {
        self.id == listener && !(self.beyond_loopback && convert::is_loopback(address))
    }
}

impl Driver {
    pub(super) async fn listen(&mut self, addresses: Vec<Multiaddr>) -> Result<(), StartError> {
        let mut awaited = Vec::new();
        // Without the list, one address of IPv4 is waited for.
        let machine: Vec<IpAddr> = match if_addrs::get_if_addrs() {
            Ok(interfaces) => interfaces.iter().map(if_addrs::Interface::ip).collect(),
            Err(_) => vec![Ipv4Addr::LOCALHOST.into()],
        };
        for address in addresses {
            match self.swarm.listen_on(address.clone()) {
                Ok(id) => awaited.extend(Awaited::new(id, &address, &machine)),
                Err(error) if is_ip6_any(&address) => {
                    tracing::info!(target: "potluck::net", %address, %error, "no IPv6 here");
                }
                Err(error) => {
                    // The outer errors say nothing themselves: the reason is a cause further in.
                    let detail = crate::stage::StageError::new(crate::stage::Stage::Address, &error).detail;
                    let detail =
                        detail.trim_start_matches([' ', ':']).trim_start_matches("connect: ").to_owned();
                    let address = address.to_string();
                    return Err(StartError::Listen { address, detail });
                }
            }
        }
        self.find_addresses(awaited).await;
        Ok(())
    }

    /// Take in the addresses of the listeners, so that whoever asks for them after the start gets them all.
    async fn find_addresses(&mut self, mut awaited: Vec<Awaited>) {
        let deadline = self.env.now() + LISTEN_TIMEOUT;
        while !awaited.is_empty() {
            let Ok(event) = tokio::time::timeout_at(deadline, self.swarm.select_next_some()).await else {
                tracing::warn!(target: "potluck::net", "some listeners have found no interface yet");
                break;
            };
            if let SwarmEvent::NewListenAddr { listener_id, address } = &event {
                awaited.retain(|listener| !listener.is_found(*listener_id, address));
            }
            self.on_event(event);
        }
        // The system's list comes in one piece: what else is in it has arrived as well.
        while let Some(event) = self.swarm.select_next_some().now_or_never() {
            self.on_event(event);
        }
    }
}

fn is_ip6(address: &Multiaddr) -> bool {
    convert::ip(address).is_some_and(|ip| ip.is_ipv6())
}

fn is_ip6_any(address: &Multiaddr) -> bool {
    convert::ip(address).is_some_and(|ip| ip.is_ipv6() && ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_listener_will_find_is_waited_for_and_nothing_else() {
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let id = ListenerId::next();
        let waits = |listen: &str, machine: &[&str], found: &str| {
            let listener = Awaited::new(id, &listen.parse().unwrap(), &ips(machine))?;
            Some(!listener.is_found(id, &found.parse().unwrap()))
        };
        let (v4, v6) = ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0");
        let (own4, own6) = ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1");
        // The network's address is not there yet with the loopback, in either family.
        let both = ["127.0.0.1", "::1", "10.0.0.2", "2001:db8::2"];
        assert_eq!(
            (waits(v4, &both, own4), waits(v4, &both, "/ip4/10.0.0.2/tcp/1")),
            (Some(true), Some(false))
        );
        assert_eq!(
            (waits(v6, &both, own6), waits(v6, &both, "/ip6/2001:db8::2/tcp/1")),
            (Some(true), Some(false))
        );
        // A machine on no network, and one without IPv6.
        assert_eq!((waits(v4, &both[..2], own4), waits(v6, &both[..2], own6)), (Some(false), Some(false)));
        assert_eq!((waits(v6, &["127.0.0.1", "10.0.0.2"], own6), waits(v4, &[], own4)), (None, None));
        assert_eq!(waits(own4, &both, own4), Some(false), "what was named");
        assert_eq!(waits("/ip6/2001:db8::2/tcp/1", &both, "/ip6/2001:db8::2/tcp/1"), Some(false));
    }
}
