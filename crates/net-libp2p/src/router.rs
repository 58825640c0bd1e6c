//! What the router at home gives: ports of its own through which others reach this machine (UPnP).

use crate::convert;
use crate::shared::{Shared, lock};
use libp2p::{Multiaddr, upnp};
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// How long a router that says nothing is waited for: it may take two seconds to say that it is there.
const ANSWERS_WITHIN: Duration = Duration::from_secs(3);

/// How long a router may take to hear that its ports are not needed any more.
pub(crate) const TAKES_BACK_WITHIN: Duration = Duration::from_millis(500);

/// How far the router has answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Router {
    /// Nothing is asked of it.
    #[default]
    NotAsked,
    /// It was asked at this time.
    Asked(Instant),
    /// It has given so many ports.
    Gave(usize),
    /// There is none, or it is behind another one.
    Cannot,
}

impl Router {
    /// The router after this event.
    pub(crate) fn after(self, event: &upnp::Event) -> Self {
        match (event, self) {
            (upnp::Event::NewExternalAddr { .. }, Self::Gave(ports)) => Self::Gave(ports + 1),
            (upnp::Event::NewExternalAddr { .. }, _) => Self::Gave(1),
            (upnp::Event::ExpiredExternalAddr { .. }, Self::Gave(ports)) => {
                Self::Gave(ports.saturating_sub(1))
            }
            (upnp::Event::ExpiredExternalAddr { .. }, other) => other,
            (upnp::Event::GatewayNotFound | upnp::Event::NonRoutableGateway, _) => Self::Cannot,
        }
    }
}

/// Wait until the router has given a port for each address that it could give one for, or it is clear that it will not.
pub(crate) async fn answered(shared: &Shared) {
    let wanted = ports_to_map(&lock(&shared.own).listening);
    let Router::Asked(since) = *shared.router.borrow() else { return };
    let mut router = shared.router.subscribe();
    let done = router.wait_for(|router| match router {
        Router::Asked(_) => false,
        Router::Gave(ports) => *ports >= wanted,
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

    fn given() -> upnp::Event {
        let address: Multiaddr = "/ip4/11.0.0.1/tcp/1".parse().unwrap();
        upnp::Event::NewExternalAddr { local_addr: address.clone(), external_addr: address }
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
            for _ in 0..2 {
                tokio::time::sleep(Duration::from_millis(400)).await;
                shared.router.send_modify(|router| *router = router.after(&given()));
            }
        };
        tokio::join!(answered(&shared), gives);
        assert_eq!(Instant::now() - begun, Duration::from_millis(800), "both ports");

        shared.router.send_replace(Router::Asked(Instant::now()));
        let refuses = async {
            shared.router.send_modify(|router| *router = router.after(&upnp::Event::GatewayNotFound));
        };
        tokio::join!(answered(&shared), refuses);
        assert_eq!(Instant::now() - begun, Duration::from_millis(800), "there is none");

        shared.router.send_replace(Router::Asked(Instant::now()));
        answered(&shared).await;
        assert_eq!(Instant::now() - begun, Duration::from_millis(800) + ANSWERS_WITHIN, "silence");
    }
}
