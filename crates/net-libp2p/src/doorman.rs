//! Bounds the handshakes under way with one address, so that whoever floods a peer with connections keeps out itself and
//! not everybody. The fewer places are free, the fewer one address gets of them: whoever wants them all needs many addresses.
//! A bound on all of them together comes behind it.

use crate::convert;
use libp2p::core::transport::PortUse;
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent,
    ToSwarm, dummy,
};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv6Addr};
use std::task::{Context, Poll};

/// Handshakes under way in all; also the bound that [`crate::swarm`] sets behind this one.
pub(crate) const PENDING_MAX: usize = 512;
/// Handshakes under way with one address: many peers may sit behind one, but they seldom come in the same second.
const PER_ADDRESS_MAX: usize = 64;
/// One address may have this part of the places that are free, so that some are for whoever comes next.
const PART_OF_FREE: usize = 4;
/// The part of an IPv6 address that its owner is given; the rest it chooses itself.
const NETWORK_BITS: u32 = 64;

/// Too many handshakes are under way with this address.
#[derive(Debug, thiserror::Error)]
#[error("{0} has {1} handshakes under way")]
struct TooMany(IpAddr, usize);

/// Whose an address is: of IPv6, everybody has a whole network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> NETWORK_BITS << NETWORK_BITS).into(),
        ip => ip,
    }
}

/// Counts inbound connections from their first packet until they stand or have failed.
#[derive(Default)]
pub(crate) struct Behaviour {
    pending: BTreeMap<ConnectionId, IpAddr>,
    by_address: BTreeMap<IpAddr, usize>,
}

impl Behaviour {
    fn come(&mut self, id: ConnectionId, address: IpAddr) -> Result<(), TooMany> {
        let address = network(address);
        let free = PENDING_MAX.saturating_sub(self.pending.len());
        let share = (free / PART_OF_FREE).clamp(1, PER_ADDRESS_MAX);
        let count = self.by_address.get(&address).copied().unwrap_or_default();
        if count >= share {
            return Err(TooMany(address, count));
        }
        self.by_address.insert(address, count + 1);
        self.pending.insert(id, address);
        Ok(())
    }

    fn settled(&mut self, id: ConnectionId) {
        let Some(address) = self.pending.remove(&id) else { return };
        if let Some(count) = self.by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        // What comes through a relay has no address of its own, and the relay bounds it; what comes from this machine is no
        // stranger's.
        match convert::ip(remote).filter(|ip| !ip.is_loopback() && !convert::is_relayed(remote)) {
            Some(address) => self.come(id, address).map_err(ConnectionDenied::new),
            None => Ok(()),
        }
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        _peer: libp2p::PeerId,
        _local: &Multiaddr,
        _remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.settled(id);
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _id: ConnectionId,
        _peer: libp2p::PeerId,
        _address: &Multiaddr,
        _role: Endpoint,
        _port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        if let FromSwarm::ListenFailure(failed) = event {
            self.settled(failed.connection_id);
        }
    }

    fn on_connection_handler_event(
        &mut self,
        _peer: libp2p::PeerId,
        _id: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {}
    }

    fn poll(&mut self, _cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Take all places that these addresses get.
    fn flood(door: &mut Behaviour, addresses: impl Iterator<Item = IpAddr>) {
        let mut number = 0;
        for address in addresses {
            while door.come(ConnectionId::new_unchecked(number), address).is_ok() {
                number += 1;
            }
        }
    }

    #[test]
    fn many_addresses_that_take_what_they_get_leave_places() {
        let mut door = Behaviour::default();
        flood(&mut door, (0..24).map(|host| [192, 0, 2, host].into()));
        assert!(door.pending.len() < PENDING_MAX);
        assert!(door.come(ConnectionId::new_unchecked(1000), [192, 0, 2, 100].into()).is_ok());
    }

    #[test]
    fn a_network_of_ipv6_is_one_address_and_so_is_one_of_ipv4_in_ipv6() {
        let mut door = Behaviour::default();
        flood(&mut door, (0..1000).map(|host: u16| [0x2001, 0xdb8, 0, 0, host, 0, 0, 1].into()));
        assert_eq!(door.pending.len(), PER_ADDRESS_MAX);
        let refused = door.come(ConnectionId::new_unchecked(1000), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into());
        assert_eq!(refused.unwrap_err().to_string(), "2001:db8:: has 64 handshakes under way");
        assert!(
            door.come(ConnectionId::new_unchecked(1001), [0x2001, 0xdb8, 0, 1, 0, 0, 0, 1].into()).is_ok()
        );
        for address in [[192, 0, 2, 1].into(), [0, 0, 0, 0, 0, 0xffff, 0xc000, 0x201].into()] {
            assert_eq!(network(address), IpAddr::from([192, 0, 2, 1]));
        }
    }

    #[test]
    fn a_flood_from_one_address_keeps_out_nobody_else() {
        let mut door = Behaviour::default();
        let from = |host: u8| format!("/ip4/192.0.2.{host}/tcp/1").parse::<Multiaddr>().unwrap();
        let mut come = |number: usize, host: u8| {
            let id = ConnectionId::new_unchecked(number);
            door.handle_pending_inbound_connection(id, &from(0), &from(host)).is_ok()
        };
        assert!((0..PER_ADDRESS_MAX).all(|number| come(number, 1)));
        assert!(!come(1000, 1));
        assert!(come(1001, 2));
        door.settled(ConnectionId::new_unchecked(5));
        // One that was refused has never been counted.
        door.settled(ConnectionId::new_unchecked(1000));
        let mut come = |number: usize| {
            let id = ConnectionId::new_unchecked(number);
            door.handle_pending_inbound_connection(id, &from(0), &from(1)).is_ok()
        };
        assert!(come(1002) && !come(1003));
        for number in 0..1002 {
            door.settled(ConnectionId::new_unchecked(number));
        }
        door.settled(ConnectionId::new_unchecked(1002));
        assert!(door.pending.is_empty() && door.by_address.is_empty());
    }
}
