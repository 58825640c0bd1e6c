//! Binding the listeners at the start, and waiting until their addresses are known.

use super::Driver;
use crate::convert;
use crate::transport::StartError;
use futures::{FutureExt, StreamExt};
use libp2p::Multiaddr;
use libp2p::core::transport::ListenerId;
use libp2p::swarm::SwarmEvent;
use std::time::Duration;

/// How long a start waits for the addresses of its listeners: they come from the system's list of interfaces.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it waits for a further address where all that was found is the machine's own loopback.
const LOOPBACK_PATIENCE: Duration = Duration::from_millis(250);

/// A listener whose addresses are still to come.
struct Awaited {
    id: ListenerId,
    /// Whether it listens on every interface, so that the first address is often just loopback.
    everywhere: bool,
    found: bool,
}

impl Awaited {
    fn new(id: ListenerId, address: &Multiaddr) -> Self {
        Self { id, everywhere: !convert::is_usable(address), found: false }
    }

    /// Whether an address that others can use may be still to come after this one.
    fn still_awaits(&mut self, address: &Multiaddr) -> bool {
        self.found = true;
        self.everywhere && convert::is_loopback(address)
    }
}

impl Driver {
    pub(super) async fn listen(&mut self, addresses: Vec<Multiaddr>) -> Result<(), StartError> {
        let mut awaited = Vec::new();
        for address in addresses {
            match self.swarm.listen_on(address.clone()) {
                // Interfaces without IPv6 give no address, so nothing is awaited for those.
                Ok(id) if !is_ip6(&address) => awaited.push(Awaited::new(id, &address)),
                Ok(_) => {}
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
        let mut alone = None;
        while !awaited.is_empty() {
            let mut until = deadline;
            if awaited.iter().all(|listener| listener.found) {
                until = deadline.min(*alone.get_or_insert(self.env.now() + LOOPBACK_PATIENCE));
            }
            let Ok(event) = tokio::time::timeout_at(until, self.swarm.select_next_some()).await else {
                if awaited.iter().any(|listener| !listener.found) {
                    tracing::warn!(target: "potluck::net", "some listeners have found no interface yet");
                }
                break;
            };
            if let SwarmEvent::NewListenAddr { listener_id, address } = &event {
                awaited.retain_mut(|listener| listener.id != *listener_id || listener.still_awaits(address));
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
