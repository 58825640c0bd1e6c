//! The one task that owns the swarm: dials for callers, keeps the bootstrap peers, learns addresses, reserves relays.

mod listening;

use crate::bootstrap::{Bootstrap, short};
use crate::config::Config;
use crate::convert;
use crate::dials::Dials;
use crate::punching::{self, Punching};
use crate::relays::Relays;
use crate::router;
use crate::shared::{Shared, lock};
use crate::stage;
use crate::streams;
use crate::swarm::{self, Behaviour, BehaviourEvent};
use crate::transport::StartError;
use futures::StreamExt;
use libp2p::core::ConnectedPoint;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError, SwarmEvent};
use libp2p::{Multiaddr, Swarm, autonat, identify, kad, ping, relay};
use potluck_net::{Env, Path, PeerId, Reachability, Watermarks};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// How often retries and reservations are looked at.
const TICK: Duration = Duration::from_millis(500);
/// How long a goodbye may take.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(1500);
/// A peer that has just connected and not yet said who it is may still teach us addresses for this long.
const INTRODUCTION_MAX: Duration = Duration::from_secs(3);
/// Addresses taken from one peer's identify message.
const IDENTIFY_ADDRESSES_MAX: usize = 16;

/// What callers ask of the swarm's task.
pub(crate) enum Command {
    /// Connect to a peer; the answer is one line per address that failed.
    Dial { peer: PeerId, reply: oneshot::Sender<Result<(), Vec<String>>> },
    /// Connect by TCP as well to a peer that is connected by QUIC.
    Upgrade { peer: PeerId },
    /// Say goodbye and end.
    Close { reply: oneshot::Sender<()> },
}

pub(crate) struct Driver {
    swarm: Swarm<Behaviour>,
    shared: Arc<Shared>,
    env: Env,
    commands: mpsc::Receiver<Command>,
    dials: Dials,
    bootstrap: Bootstrap,
    relays: Relays,
    /// Connected, but their identify message, which tells whether they relay and route, is still to come.
    strangers: BTreeMap<libp2p::PeerId, Instant>,
    /// Connected over loopback: the loopback addresses that they tell of mean something to us.
    on_this_machine: BTreeSet<libp2p::PeerId>,
    punching: Punching,
    /// Whether this peer wants to be reached through relays at all.
    wants_relay: bool,
    /// Whether this peer accepts connections; who only dials out has no hole to punch.
    listens: bool,
    marks: Watermarks,
}

impl Driver {
    pub(crate) async fn start(
        config: Config,
        env: Env,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
    ) -> Result<Self, StartError> {
        let bootstrap = parse_bootstrap(&config)?;
        let announced = parse_all("announce", &config.announce)?;
        let listen = parse_all("listen", &config.listen)?;
        let mut swarm = swarm::build(&config, &shared)?;
        for address in &announced {
            swarm.add_external_address(address.clone());
        }
        let wants_relay = !config.client_mode && !config.relay_server && announced.is_empty();
        if config.port_mapping && !config.client_mode && announced.is_empty() {
            shared.router.send_modify(|router| router.asked = Some(env.now()));
        }
        lock(&shared.own).announced = announced;
        let bootstrap = Bootstrap::new(bootstrap, &shared);
        let dials = Dials::default();
        let (strangers, on_this_machine) = (BTreeMap::new(), BTreeSet::new());
        let (relays, punching) = (Relays::default(), Punching::default());
        let (listens, marks) = (!config.client_mode, config.connections);
        let mut driver = Self {
            swarm,
            shared,
            env,
            commands,
            dials,
            bootstrap,
            relays,
            strangers,
            on_this_machine,
            punching,
            wants_relay,
            listens,
            marks,
        };
        if !config.client_mode {
            driver.listen(listen).await?;
        }
        Ok(driver)
    }

    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(Command::Dial { peer, reply }) => self.dial(peer, reply),
                    Some(Command::Upgrade { peer }) => {
                        let all = self.shared.book.get(peer).into_iter();
                        let tcp = all.filter(|at| !convert::is_quic(at) && !convert::is_relayed(at));
                        self.dial_at(convert::to_libp2p(peer), tcp.collect());
                    }
                    Some(Command::Close { reply }) => {
                        self.close().await;
                        // Whoever asked may have gone.
                        let _gone = reply.send(());
                        return;
                    }
                    None => return self.close().await,
                },
                _ = tick.tick() => self.on_tick(),
                event = self.swarm.select_next_some() => self.on_event(event),
            }
        }
    }

    /// Tell every peer, give the router its ports back, then close the sockets by dropping the swarm.
    async fn close(&mut self) {
        let shared = self.shared.clone();
        tokio::join!(self.say_goodbye(), router::give_back(&shared));
    }

    async fn say_goodbye(&mut self) {
        let peers: Vec<libp2p::PeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            // Gone by itself: fine.
            let _gone = self.swarm.disconnect_peer_id(peer);
        }
        let deadline = self.env.now() + CLOSE_TIMEOUT;
        while self.swarm.network_info().num_peers() > 0 {
            if tokio::time::timeout_at(deadline, self.swarm.select_next_some()).await.is_err() {
                return;
            }
        }
    }

    fn on_tick(&mut self) {
        let now = self.env.now();
        let peers = &self.shared.peers;
        // See `dial`: not what the swarm says.
        let connected = |id: &_| convert::from_libp2p(id).is_some_and(|peer| peers.path(peer).is_some());
        for dial in self.bootstrap.due(now, connected) {
            let id = dial.connection_id();
            if let Err(error) = self.swarm.dial(dial) {
                self.bootstrap.on_failure(id, &error, now, false, &self.shared);
            }
        }
        self.reserve_relays(now);
        self.punch_again(now);
        self.shared.peers.forget_ended();
        let sought = |peer: &PeerId| {
            let id = convert::to_libp2p(*peer);
            self.bootstrap.contains(&id) || self.relays.is_reserved(&id)
        };
        self.shared.peers.give_up_surplus(now, &self.marks, sought);
        self.dials.forget_withdrawn();
        self.strangers.retain(|_, since| now < *since + INTRODUCTION_MAX);
        if !self.may_learn_more() {
            self.retry_parked();
        }
    }

    fn punch_again(&mut self, now: Instant) {
        let peers = &self.shared.peers;
        for action in self.punching.due(now, |peer| peers.path(peer) == Some(Path::Relayed)) {
            match action {
                punching::Action::Probe(peer, circuit) => {
                    let dial = DialOpts::peer_id(convert::to_libp2p(peer))
                        .condition(PeerCondition::Always)
                        .addresses(vec![circuit])
                        .build();
                    self.punching.dialing(now, peer, dial.connection_id());
                    if let Err(error) = self.swarm.dial(dial) {
                        tracing::debug!(target: "potluck::net", peer = %peer.short(), %error, "no second try");
                    }
                }
                punching::Action::Close(probe) => {
                    self.swarm.close_connection(probe);
                }
            }
        }
    }

    /// Whether somebody may be about to tell us of peers: we know too little to call a peer unreachable.
    fn may_learn_more(&self) -> bool {
        !self.strangers.is_empty() || self.bootstrap.beginning()
    }

    /// Somebody has told us who they are, or will not: whoever could not be found before may be found now.
    fn introduced(&mut self, id: &libp2p::PeerId) {
        if self.strangers.remove(id).is_some() {
            self.retry_parked();
        }
    }

    fn retry_parked(&mut self) {
        for peer in self.dials.unpark() {
            self.dial_known(peer);
        }
    }

    fn dial(&mut self, peer: PeerId, reply: oneshot::Sender<Result<(), Vec<String>>>) {
        // Not what the swarm says: it still counts a connection whose task has panicked.
        if self.shared.peers.path(peer).is_some() {
            // An error means that the caller has given up.
            let _gone = reply.send(Ok(()));
            return;
        }
        if self.dials.wait(peer, reply) {
            self.dial_known(peer);
        }
    }

    /// Dial all addresses that we know of.
    fn dial_known(&mut self, peer: PeerId) {
        let id = convert::to_libp2p(peer);
        let mut addresses = self.shared.book.get(peer);
        let direct = addresses.iter().any(|address| !convert::is_relayed(address));
        if !direct {
            addresses.extend(self.relays.circuits(id));
        }
        self.dials.trying(peer, &addresses);
        let dial = DialOpts::peer_id(id)
            .condition(PeerCondition::Always)
            .addresses(addresses)
            .extend_addresses_through_behaviour()
            .build();
        if let Err(error) = self.swarm.dial(dial) {
            self.on_dial_failed(id, &error);
        }
    }

    /// First failure: ask the swarm where the peer is, and try what it says. Second failure: tell the callers.
    fn on_dial_failed(&mut self, id: libp2p::PeerId, error: &DialError) {
        let Some(peer) = convert::from_libp2p(&id) else { return };
        let lines = stage::attempts(error).into_iter().map(|attempt| attempt.to_string());
        if self.shared.peers.path(peer).is_some() || !self.dials.failed(peer, lines) {
            return;
        }
        if self.dials.may_look_up(peer) && self.swarm.connected_peers().next().is_some() {
            let query = self.swarm.behaviour_mut().kad.get_closest_peers(id);
            self.dials.looking_up(peer, query);
        } else {
            self.not_found(peer);
        }
    }

    /// All that we know has been tried: tell the callers, unless we have only just come and know nobody yet.
    fn not_found(&mut self, peer: PeerId) {
        if self.may_learn_more() {
            self.dials.park(peer);
        } else {
            self.dials.give_up(peer);
        }
    }

    /// Dial what is new: a dial to nobody lasts until QUIC gives up, and what has just failed does not answer now.
    fn on_looked_up(&mut self, query: kad::QueryId, found: Vec<kad::PeerInfo>) {
        let Some((peer, tried)) = self.dials.looked_up(query) else { return };
        let id = convert::to_libp2p(peer);
        let told = found.into_iter().filter(|info| info.peer_id == id).flat_map(|info| info.addrs);
        self.shared.book.add(peer, told);
        let mut addresses = self.shared.book.get(peer);
        addresses.extend(self.relays.circuits(id));
        addresses.retain(|address| !tried.contains(address));
        if addresses.is_empty() {
            self.not_found(peer);
            return;
        }
        self.dial_at(id, addresses);
    }

    fn dial_at(&mut self, id: libp2p::PeerId, addresses: Vec<Multiaddr>) {
        let dial = DialOpts::peer_id(id).condition(PeerCondition::Always).addresses(addresses).build();
        if let Err(error) = self.swarm.dial(dial) {
            self.on_dial_failed(id, &error);
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint: ConnectedPoint::Dialer { address, port_use, .. },
                ..
            } if streams::is_probe(port_use) => {
                if let Some(peer) = convert::from_libp2p(&peer_id) {
                    self.shared.book.add(peer, [address]);
                }
                // Its success has been told; false means that it has closed already.
                let _open = self.swarm.close_connection(connection_id);
            }
            SwarmEvent::ConnectionEstablished {
                peer_id, connection_id, endpoint, num_established, ..
            } => {
                if num_established.get() == 1 {
                    self.strangers.insert(peer_id, self.env.now());
                }
                self.on_connected(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, cause, .. } => {
                tracing::debug!(target: "potluck::net", %peer_id, ?cause, "disconnected");
                let alone = self.swarm.connected_peers().next().is_none();
                self.bootstrap.on_disconnected(&peer_id, self.env.now(), alone, &self.shared);
                self.introduced(&peer_id);
                self.on_this_machine.remove(&peer_id);
                self.relays.disconnected(&peer_id);
            }
            SwarmEvent::OutgoingConnectionError { connection_id, peer_id, error } => {
                self.on_outgoing_failed(connection_id, peer_id, &error);
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                tracing::debug!(target: "potluck::net", %address, "listening");
                remember(&mut lock(&self.shared.own).listening, address);
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                lock(&self.shared.own).listening.retain(|known| *known != address);
            }
            SwarmEvent::ListenerClosed { listener_id, addresses, reason } => {
                tracing::debug!(target: "potluck::net", ?addresses, ?reason, "stopped listening");
                lock(&self.shared.own).listening.retain(|known| !addresses.contains(known));
                self.relays.lost(listener_id, self.env.now());
            }
            SwarmEvent::ExternalAddrConfirmed { address } if !convert::is_relayed(&address) => {
                remember(&mut lock(&self.shared.own).external, address);
            }
            SwarmEvent::ExternalAddrExpired { address } => {
                lock(&self.shared.own).external.retain(|known| *known != address);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                tracing::debug!(target: "potluck::net", %send_back_addr, %error, "refused a connection");
            }
            _ => {}
        }
    }

    fn on_connected(&mut self, id: libp2p::PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        tracing::debug!(target: "potluck::net", peer = %id, ?endpoint, "connected");
        self.bootstrap.on_connected(&id, connection, self.env.now());
        if convert::is_loopback(endpoint.get_remote_address()) && !endpoint.is_relayed() {
            self.on_this_machine.insert(id);
        }
        let Some(peer) = convert::from_libp2p(&id) else { return };
        if let ConnectedPoint::Dialer { address, .. } = endpoint {
            self.shared.book.add(peer, [address.clone()]);
            if self.listens && convert::is_relayed(address) {
                self.punching.relayed(self.env.now(), peer, address);
            }
        }
        self.dials.connected(peer);
    }

    fn on_outgoing_failed(
        &mut self,
        connection: ConnectionId,
        peer: Option<libp2p::PeerId>,
        error: &DialError,
    ) {
        tracing::debug!(target: "potluck::net", ?peer, %error, "dial failed");
        let connected = peer.is_some_and(|peer| self.swarm.is_connected(&peer));
        self.bootstrap.on_failure(connection, error, self.env.now(), connected, &self.shared);
        let Some(peer) = peer else { return };
        if !connected && !self.bootstrap.contains(&peer) {
            // Otherwise the routing table keeps the dead and dials them again at every refresh.
            self.swarm.behaviour_mut().kad.remove_peer(&peer);
        }
        self.on_dial_failed(peer, error);
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Identify(identify::Event::Received { peer_id, info, .. }) => {
                let program = short(&info.agent_version);
                tracing::debug!(target: "potluck::net", peer = %peer_id, program, "says what it is");
                let useful = self.bootstrap.on_identified(&peer_id, &info, &self.shared);
                self.on_identified(peer_id, info);
                self.introduced(&peer_id);
                if !useful && self.bootstrap.contains(&peer_id) {
                    // An error means that it has closed the connection already.
                    let _gone = self.swarm.disconnect_peer_id(peer_id);
                }
            }
            BehaviourEvent::Identify(identify::Event::Error { peer_id, error, .. }) => {
                tracing::debug!(target: "potluck::net", peer = %peer_id, %error, "does not say who it is");
                self.bootstrap.on_unidentified(&peer_id, &error.to_string(), &self.shared);
                self.introduced(&peer_id);
            }
            BehaviourEvent::Ping(ping::Event { peer, connection, result: Ok(_) }) => {
                if let Some(peer) = convert::from_libp2p(&peer) {
                    self.shared.peers.heard(peer, connection);
                }
            }
            BehaviourEvent::Ping(ping::Event { peer, connection, result: Err(failure) })
                if !matches!(failure, ping::Failure::Unsupported) =>
            {
                tracing::debug!(target: "potluck::net", %peer, %failure, "silent, closing");
                self.swarm.close_connection(connection);
            }
            BehaviourEvent::Kad(kad::Event::OutboundQueryProgressed { id, result, step, .. }) => {
                if let kad::QueryResult::GetClosestPeers(result) = result
                    && step.last
                {
                    let found = match result {
                        Ok(found) => found.peers,
                        Err(kad::GetClosestPeersError::Timeout { peers, .. }) => peers,
                    };
                    self.on_looked_up(id, found);
                }
            }
            BehaviourEvent::Autonat(autonat::Event::StatusChanged { new, .. }) => self.on_nat(&new),
            BehaviourEvent::Dcutr(event) => {
                let peer = event.remote_peer_id;
                match event.result {
                    Ok(_) => tracing::info!(target: "potluck::net", %peer, "hole punched"),
                    Err(error) => {
                        tracing::info!(target: "potluck::net", %peer, %error, "no hole punched, relaying");
                    }
                }
            }
            BehaviourEvent::RelayClient(relay::client::Event::ReservationReqAccepted {
                relay_peer_id,
                ..
            }) => tracing::debug!(target: "potluck::net", relay = %relay_peer_id, "reserved"),
            BehaviourEvent::Upnp(event) => {
                tracing::debug!(target: "potluck::net", ?event, "port mapping");
                self.shared.router.send_modify(|router| router.heard(event));
            }
            _ => {}
        }
    }

    fn on_identified(&mut self, id: libp2p::PeerId, info: identify::Info) {
        let Some(peer) = convert::from_libp2p(&id) else { return };
        let serves = |name: &str| info.protocols.iter().any(|protocol| protocol.as_ref() == name);
        // Who is on this machine needs no relay on it.
        let near = self.on_this_machine.contains(&id);
        let near = |address: &Multiaddr| near && !convert::is_relayed(address);
        let usable = |address: &Multiaddr| convert::is_usable(address) && !convert::is_loopback(address);
        let told: Vec<Multiaddr> = info
            .listen_addrs
            .iter()
            .filter(|address| usable(address) || near(address))
            .take(IDENTIFY_ADDRESSES_MAX)
            .cloned()
            .collect();
        self.shared.book.add(peer, told.clone());
        self.shared.note_observed(peer, info.observed_addr.clone());
        if serves("/potluck/kad/1") {
            for address in told {
                self.swarm.behaviour_mut().kad.add_address(&id, address);
            }
        }
        let relays = serves(relay::HOP_PROTOCOL_NAME.as_ref()) && self.swarm.is_connected(&id);
        if relays && !self.relays.contains(&id) {
            self.add_relay(peer, id);
        }
    }

    /// Only with an address that does not itself lead through a relay.
    fn add_relay(&mut self, peer: PeerId, id: libp2p::PeerId) {
        let known = self.shared.book.get(peer);
        let Some(address) = known.into_iter().find(|address| !convert::is_relayed(address)) else { return };
        let Some(address) = convert::with_target(address, id) else { return };
        self.relays.add(id, address, self.env.now());
        self.reserve_relays(self.env.now());
    }

    fn reserve_relays(&mut self, now: Instant) {
        if !self.wants_relay || lock(&self.shared.own).reachability == Reachability::Public {
            return;
        }
        let swarm = &mut self.swarm;
        self.relays.reserve(now, |circuit| {
            let asked = swarm.listen_on(circuit.clone());
            asked
                .inspect_err(
                    |error| tracing::debug!(target: "potluck::net", %circuit, %error, "cannot reserve"),
                )
                .ok()
        });
    }

    fn on_nat(&mut self, status: &autonat::NatStatus) {
        tracing::info!(target: "potluck::net", ?status, "reachability");
        let reachability = match status {
            autonat::NatStatus::Public(_) => Reachability::Public,
            autonat::NatStatus::Private => Reachability::Private,
            autonat::NatStatus::Unknown => Reachability::Unknown,
        };
        lock(&self.shared.own).reachability = reachability;
        if reachability == Reachability::Public {
            for listener in self.relays.release() {
                self.swarm.remove_listener(listener);
            }
        }
    }
}

fn remember(known: &mut Vec<Multiaddr>, address: Multiaddr) {
    if !known.contains(&address) {
        known.push(address);
    }
}

fn parse(field: &'static str, text: &str) -> Result<Multiaddr, StartError> {
    text.parse::<Multiaddr>().map_err(|error| StartError::Address {
        field,
        address: text.to_owned(),
        detail: format!("{error}; it should look like /ip4/203.0.113.5/tcp/4001"),
    })
}

fn parse_all(field: &'static str, texts: &[String]) -> Result<Vec<Multiaddr>, StartError> {
    texts.iter().map(|text| parse(field, text)).collect()
}

fn parse_bootstrap(config: &Config) -> Result<Vec<(Multiaddr, libp2p::PeerId)>, StartError> {
    let mut targets = Vec::new();
    for text in &config.bootstrap {
        let address = parse("bootstrap", text)?;
        let Some(peer) = convert::target(&address) else {
            let detail = "it must end in /p2p/<peer id>, or nobody could tell whether the right peer answers";
            let address = text.clone();
            return Err(StartError::Address { field: "bootstrap", address, detail: detail.into() });
        };
        // Our own address in a shared list is no mistake: the first peer of a run is given the same list.
        if convert::from_libp2p(&peer) != Some(config.identity.peer_id()) {
            targets.push((address, peer));
        }
    }
    Ok(targets)
}
