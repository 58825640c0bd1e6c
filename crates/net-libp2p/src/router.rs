//! What the router at home gives: ports of its own through which others reach this machine (UPnP).

use crate::convert;
use crate::shared::{Shared, lock};
use igd_next::aio::tokio::search_gateway;
use igd_next::{PortMappingProtocol, SearchOptions};
use libp2p::multiaddr::Protocol as Part;
use libp2p::{Multiaddr, upnp};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long a router that says nothing is waited for: it may take two seconds to say that it is there.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// How long a router may take to hear that its ports are not needed any more; without that it forgets them in an hour.
const TAKES_BACK_WITHIN: Duration = Duration::from_secs(2);

/// How far the router has answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Router {
    /// Nothing is asked of it.
    #[default]
    NotAsked,
    /// It was asked at this time.
    Asked(Instant),
    /// It has given these addresses.
    Gave(BTreeSet<Multiaddr>),
    /// There is none, or it is behind another one.
    Cannot,
}

impl Router {
    /// Take in what it has said.
    pub(crate) fn heard(&mut self, event: upnp::Event) {
        match (event, self) {
            (upnp::Event::NewExternalAddr { external_addr, .. }, Self::Gave(addresses)) => {
                addresses.insert(external_addr);
            }
            (upnp::Event::NewExternalAddr { external_addr, .. }, router) => {
                *router = Self::Gave(BTreeSet::from([external_addr]));
            }
            (upnp::Event::ExpiredExternalAddr { external_addr, .. }, Self::Gave(addresses)) => {
                addresses.remove(&external_addr);
            }
            (upnp::Event::ExpiredExternalAddr { .. }, _) => {}
            (upnp::Event::GatewayNotFound | upnp::Event::NonRoutableGateway, router) => {
                *router = Self::Cannot
            }
        }
    }

    /// The ports that it has given.
    fn ports(&self) -> impl Iterator<Item = (PortMappingProtocol, u16)> {
        let addresses = match self {
            Self::Gave(addresses) => Some(addresses.iter()),
            _ => None,
        };
        addresses.into_iter().flatten().filter_map(|address| match address.iter().nth(1) {
            Some(Part::Tcp(port)) => Some((PortMappingProtocol::TCP, port)),
            Some(Part::Udp(port)) => Some((PortMappingProtocol::UDP, port)),
            _ => None,
        })
    }
}

/// Tell the router that its ports are not needed any more. `libp2p-upnp` can do that as well, but not say when it is done.
pub(crate) async fn give_back(shared: &Shared) {
    let ports: Vec<_> = shared.router.borrow().ports().collect();
    if ports.is_empty() {
        return;
    }
    let work = async {
        let gateway = search_gateway(SearchOptions::default()).await.map_err(|error| error.to_string())?;
        for (protocol, port) in ports {
            gateway.remove_port(protocol, port).await.map_err(|error| error.to_string())?;
        }
        Ok::<_, String>(())
    };
    let done = tokio::time::timeout(TAKES_BACK_WITHIN, work).await;
    tracing::debug!(target: "potluck::net", ?done, "ports given back to the router");
}

/// Wait until the router has given a port for each address that it could give one for, or it is clear that it will not.
pub(crate) async fn answered(shared: &Shared) {
    let wanted = ports_to_map(&lock(&shared.own).listening);
    let since = match *shared.router.borrow() {
        Router::Asked(since) => since,
        _ => return,
    };
    let mut router = shared.router.subscribe();
    let done = router.wait_for(|router| match router {
        Router::Asked(_) => false,
        Router::Gave(addresses) => addresses.len() >= wanted,
        Router::NotAsked | Router::Cannot => true,
    });
    if wanted > 0 {
        // Late: what it gives then is announced when it comes.
        let _late = timeout_at(since + ANSWERS_WITHIN, done).await;
    }
}

/// On how many ports this machine listens that a router could map. Each of them counts once, on however many networks.
fn ports_to_map(listening: &[Multiaddr]) -> usize {
    let private =
        |address: &&Multiaddr| matches!(convert::ip(address), Some(IpAddr::V4(ip)) if ip.is_private());
    let ports = listening.iter().filter(private).map(|address| address.iter().skip(1).collect::<Multiaddr>());
    ports.collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(address: &str) -> upnp::Event {
        let external_addr: Multiaddr = address.parse().unwrap();
        upnp::Event::NewExternalAddr { local_addr: external_addr.clone(), external_addr }
    }

    #[tokio::test(start_paused = true)]
    async fn a_router_is_waited_for_until_it_has_answered_and_never_long() {
        let shared = Shared::default();
        let begun = Instant::now();
        answered(&shared).await;
        lock(&shared.own).listening.push("/ip4/127.0.0.1/tcp/1".parse().unwrap());
        shared.router.send_replace(Router::Asked(begun));
        answered(&shared).await;
        assert_eq!(Instant::now(), begun, "nothing is asked, or there is nothing to give");

        for address in [
            "/ip4/10.0.0.2/tcp/1",
            "/ip4/172.17.0.1/tcp/1",
            "/ip4/10.0.0.2/udp/1/quic-v1",
            "/ip4/11.0.0.2/tcp/2",
        ] {
            lock(&shared.own).listening.push(address.parse().unwrap());
        }
        let gives = async {
            for address in ["/ip4/11.0.0.1/tcp/7", "/ip4/11.0.0.1/udp/8/quic-v1"] {
                tokio::time::sleep(Duration::from_millis(400)).await;
                shared.router.send_modify(|router| router.heard(given(address)));
            }
        };
        tokio::join!(answered(&shared), gives);
        assert_eq!(Instant::now() - begun, Duration::from_millis(800), "both ports");
        let ports: Vec<_> = shared.router.borrow().ports().collect();
        assert_eq!(ports, [(PortMappingProtocol::TCP, 7), (PortMappingProtocol::UDP, 8)]);

        shared.router.send_replace(Router::Asked(Instant::now()));
        let refuses = async {
            shared.router.send_modify(|router| router.heard(upnp::Event::GatewayNotFound));
        };
        tokio::join!(answered(&shared), refuses);
        assert_eq!(Instant::now() - begun, Duration::from_millis(800), "there is none");

        shared.router.send_replace(Router::Asked(Instant::now()));
        answered(&shared).await;
        assert_eq!(Instant::now() - begun, Duration::from_millis(800) + ANSWERS_WITHIN, "silence");
    }
}
