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

/// What a router was asked, and what it has answered.
#[derive(Debug, Default)]
pub(crate) struct Router {
    /// When it was asked, if it was.
    pub(crate) asked: Option<Instant>,
    /// There is none, or it is behind another one.
    cannot: bool,
    /// The addresses that it has given.
    given: BTreeSet<Multiaddr>,
}

impl Router {
    /// Take in what it has said.
    pub(crate) fn heard(&mut self, event: upnp::Event) {
        match event {
            upnp::Event::NewExternalAddr { external_addr, .. } => {
                self.given.insert(external_addr);
            }
            upnp::Event::ExpiredExternalAddr { external_addr, .. } => {
                self.given.remove(&external_addr);
            }
            upnp::Event::GatewayNotFound | upnp::Event::NonRoutableGateway => self.cannot = true,
        }
    }

    /// The ports that it has given.
    fn ports(&self) -> impl Iterator<Item = (PortMappingProtocol, u16)> {
        self.given.iter().filter_map(|address| match address.iter().nth(1) {
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
    let mut router = shared.router.subscribe();
    let Some(since) = router.borrow().asked else { return };
    let done = router.wait_for(|router| router.cannot || router.given.len() >= wanted);
    // Late: what it gives then is announced when it comes.
    let _late = timeout_at(since + ANSWERS_WITHIN, done).await;
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
        let ask = || shared.router.send_replace(Router { asked: Some(Instant::now()), ..Router::default() });
        let hear = |event| shared.router.send_modify(|router| router.heard(event));
        let passed = || begun.elapsed().as_millis();
        let listen = |address: &str| lock(&shared.own).listening.push(address.parse().unwrap());
        listen("/ip4/10.0.0.2/tcp/1");
        answered(&shared).await;
        assert_eq!(passed(), 0, "nothing is asked");

        for address in ["/ip4/172.17.0.1/tcp/1", "/ip4/10.0.0.2/udp/1/quic-v1", "/ip4/11.0.0.2/tcp/2"] {
            listen(address);
        }
        ask();
        let gives = async {
            for address in ["/ip4/11.0.0.1/tcp/7", "/ip4/11.0.0.1/udp/8/quic-v1"] {
                tokio::time::sleep(Duration::from_millis(400)).await;
                hear(given(address));
            }
        };
        let between = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            answered(&shared).await;
        };
        tokio::join!(answered(&shared), between, gives);
        assert_eq!(passed(), 800, "both ports");
        let ports: Vec<_> = shared.router.borrow().ports().collect();
        assert_eq!(ports, [(PortMappingProtocol::TCP, 7), (PortMappingProtocol::UDP, 8)]);

        ask();
        tokio::join!(answered(&shared), async { hear(upnp::Event::GatewayNotFound) });
        assert_eq!(passed(), 800, "there is none");

        ask();
        answered(&shared).await;
        assert_eq!(passed(), 800 + ANSWERS_WITHIN.as_millis(), "silence");

        lock(&shared.own).listening.retain(|address| !address.to_string().starts_with("/ip4/1"));
        listen("/ip4/127.0.0.1/tcp/1");
        ask();
        answered(&shared).await;
        assert_eq!(passed(), 800 + ANSWERS_WITHIN.as_millis(), "there is nothing to give");
    }
}
