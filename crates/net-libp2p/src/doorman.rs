//! Bounds the handshakes under way with one address and the connections that it has made, so that whoever floods a peer with
//! them keeps out itself and not everybody. The fewer places are free, the fewer one address gets of them: whoever wants
//! them all needs many addresses. Bounds on all of them together come behind it.

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

/// One address has so many already.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum TooMany {
    #[error("{0} has {1} handshakes under way")]
    Handshakes(IpAddr, usize),
    #[error("{0} has made {1} connections")]
    Connections(IpAddr, usize),
}

/// Whose an address is: of IPv6, everybody has a whole network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() >> NETWORK_BITS << NETWORK_BITS).into(),
        ip => ip,
    }
}

/// Places, and which addresses have taken them.
struct Room {
    places: usize,
    per_address_max: usize,
    full: fn(IpAddr, usize) -> TooMany,
    taken: BTreeMap<ConnectionId, IpAddr>,
    by_address: BTreeMap<IpAddr, usize>,
}

impl Room {
    fn new(places: usize, per_address_max: usize, full: fn(IpAddr, usize) -> TooMany) -> Self {
        Self { places, per_address_max, full, taken: BTreeMap::new(), by_address: BTreeMap::new() }
    }

    fn come(&mut self, id: ConnectionId, address: IpAddr) -> Result<(), TooMany> {
        let address = network(address);
        let free = self.places.saturating_sub(self.taken.len());
        let share = (free / PART_OF_FREE).clamp(1, self.per_address_max);
        let count = self.by_address.get(&address).copied().unwrap_or_default();
        if count >= share {
            return Err((self.full)(address, count));
        }
        self.by_address.insert(address, count + 1);
        self.taken.insert(id, address);
        Ok(())
    }

    fn leave(&mut self, id: ConnectionId) {
        let Some(address) = self.taken.remove(&id) else { return };
        if let Some(count) = self.by_address.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.by_address.remove(&address);
            }
        }
    }
}

/// Counts inbound connections from their first packet to their end.
pub(crate) struct Behaviour {
    handshakes: Room,
    connections: Room,
}

impl Behaviour {
    /// With so many connections in all.
    pub(crate) fn new(connections_max: usize) -> Self {
        let handshakes = Room::new(PENDING_MAX, PER_ADDRESS_MAX, TooMany::Handshakes);
        // A whole laboratory may sit behind one address for days: the free places alone are its limit.
        let connections = Room::new(connections_max, connections_max, TooMany::Connections);
        Self { handshakes, connections }
    }
}

/// What comes through a relay has no address of its own, and the relay bounds it; what comes from this machine is no stranger's.
fn counted(remote: &Multiaddr) -> Option<IpAddr> {
    convert::ip(remote).filter(|ip| !ip.is_loopback() && !convert::is_relayed(remote))
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
        match counted(remote) {
            Some(address) => self.handshakes.come(id, address).map_err(ConnectionDenied::new),
            None => Ok(()),
        }
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        _peer: libp2p::PeerId,
        _local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.handshakes.leave(id);
        if let Some(address) = counted(remote) {
            self.connections.come(id, address).map_err(ConnectionDenied::new)?;
        }
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
        match event {
            // Also of a connection that stood, which another behaviour has refused.
            FromSwarm::ListenFailure(failed) => {
                self.handshakes.leave(failed.connection_id);
                self.connections.leave(failed.connection_id);
            }
            FromSwarm::ConnectionClosed(closed) => self.connections.leave(closed.connection_id),
            _ => {}
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

    const CONNECTIONS_MAX: usize = 4096;

    fn id(number: usize) -> ConnectionId {
        ConnectionId::new_unchecked(number)
    }

    fn handshakes() -> Room {
        Behaviour::new(CONNECTIONS_MAX).handshakes
    }

    /// Take all places that these addresses get.
    fn flood(room: &mut Room, addresses: impl Iterator<Item = IpAddr>) {
        let mut number = 0;
        for address in addresses {
            while room.come(id(number), address).is_ok() {
                number += 1;
            }
        }
    }

    #[test]
    fn many_addresses_that_take_what_they_get_leave_places() {
        let Behaviour { mut handshakes, mut connections } = Behaviour::new(CONNECTIONS_MAX);
        for (room, places) in [(&mut handshakes, PENDING_MAX), (&mut connections, CONNECTIONS_MAX)] {
            flood(room, (0..24).map(|host| [192, 0, 2, host].into()));
            assert!(room.taken.len() < places);
            assert!(room.come(id(places), [192, 0, 2, 100].into()).is_ok());
        }
    }

    #[test]
    fn a_network_of_ipv6_is_one_address_and_so_is_one_of_ipv4_in_ipv6() {
        let mut room = handshakes();
        flood(&mut room, (0..1000).map(|host: u16| [0x2001, 0xdb8, 0, 0, host, 0, 0, 1].into()));
        assert_eq!(room.taken.len(), PER_ADDRESS_MAX);
        let refused = room.come(id(1000), [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into());
        assert_eq!(refused.unwrap_err().to_string(), "2001:db8:: has 64 handshakes under way");
        assert!(room.come(id(1001), [0x2001, 0xdb8, 0, 1, 0, 0, 0, 1].into()).is_ok());
        for address in [[192, 0, 2, 1].into(), [0, 0, 0, 0, 0, 0xffff, 0xc000, 0x201].into()] {
            assert_eq!(network(address), IpAddr::from([192, 0, 2, 1]));
        }
    }

    #[test]
    fn a_flood_from_one_address_keeps_out_nobody_else() {
        let mut door = Behaviour::new(CONNECTIONS_MAX);
        let from = |host: u8| format!("/ip4/192.0.2.{host}/tcp/1").parse::<Multiaddr>().unwrap();
        let mut come = |number: usize, host: u8| {
            door.handle_pending_inbound_connection(id(number), &from(0), &from(host)).is_ok()
        };
        assert!((0..PER_ADDRESS_MAX).all(|number| come(number, 1)));
        assert!(!come(1000, 1));
        assert!(come(1001, 2));
        door.handshakes.leave(id(5));
        // One that was refused has never been counted.
        door.handshakes.leave(id(1000));
        let mut come =
            |number: usize| door.handle_pending_inbound_connection(id(number), &from(0), &from(1)).is_ok();
        assert!(come(1002) && !come(1003));
        for number in 0..1002 {
            door.handshakes.leave(id(number));
        }
        door.handshakes.leave(id(1002));
        assert!(door.handshakes.taken.is_empty() && door.handshakes.by_address.is_empty());
    }

    #[test]
    fn connections_count_until_their_end_whoever_they_say_they_are() {
        let mut door = Behaviour::new(CONNECTIONS_MAX);
        let from = |host: u8| format!("/ip4/192.0.2.{host}/tcp/1").parse::<Multiaddr>().unwrap();
        let mut stands = |number: usize, remote: &Multiaddr| {
            let peer = libp2p::PeerId::random();
            door.handle_pending_inbound_connection(id(number), &from(0), remote).unwrap();
            door.handle_established_inbound_connection(id(number), peer, &from(0), remote).is_ok()
        };
        // As many as a quarter of what they leave.
        let most = (0..CONNECTIONS_MAX).take_while(|number| stands(*number, &from(1))).count();
        assert_eq!(most, 819);
        assert!(stands(5000, &from(2)));
        assert!((6000..8000).all(|number| stands(number, &"/ip4/127.0.0.1/tcp/1".parse().unwrap())));
        let denied = ConnectionDenied::new(TooMany::Connections([192, 0, 2, 1].into(), most));
        let error = libp2p::swarm::ListenError::Denied { cause: denied };
        let (local_addr, send_back_addr) = (&from(0), &from(1));
        let failed = |number: usize| libp2p::swarm::ListenFailure {
            local_addr,
            send_back_addr,
            error: &error,
            connection_id: id(number),
            peer_id: None,
        };
        door.on_swarm_event(FromSwarm::ListenFailure(failed(most)));
        let (peer_id, endpoint) = (
            libp2p::PeerId::random(),
            libp2p::core::ConnectedPoint::Listener { local_addr: from(0), send_back_addr: from(1) },
        );
        for number in 0..most {
            door.on_swarm_event(FromSwarm::ConnectionClosed(libp2p::swarm::ConnectionClosed {
                peer_id,
                connection_id: id(number),
                endpoint: &endpoint,
                cause: None,
                remaining_established: 0,
            }));
        }
        assert_eq!(door.connections.taken.len(), 1, "the other address has one");
        assert_eq!(door.handshakes.taken.len(), 0);
    }
}
