//! What all parts of a running DHT node share: its state, its clock, and one question to one peer.

use crate::config::DhtConfig;
use crate::entry::{Entry, Item, Moment};
use crate::id::DhtId;
use crate::rate::RateLimiter;
use crate::record::{Expiration, Record, RecordValidator, Validators};
use crate::storage::{Storage, StorageLimits};
use crate::table::{Contact, Insert, RoutingTable};
use crate::wire::{Answer, Ask, ENTRY_BYTES_MAX, PROTOCOL, Refusal, Reply, Request, WireEntry};
use bytes::Bytes;
use potluck_net::{Env, FaultKind, PeerFault, PeerId, Protocol, Transport, rpc};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

/// Peers whose failures are remembered.
const BLACKLIST_MAX: usize = 4096;
/// Failures in a row after which the pause no longer doubles.
const BLACKLIST_DOUBLINGS_MAX: u32 = 6;
/// A full bucket's oldest member is asked for a sign of life if it gave none for this long.
const SILENT_AFTER: Duration = Duration::from_secs(15);
/// Peers whose requests are counted.
const RATED_PEERS_MAX: usize = 4096;
/// Questions to one node that are open at a time; more wait for their turn, because it would refuse them.
pub(crate) const ASKED_MAX: usize = 16;
/// Peers for which a line is kept before those that nobody stands in are given up.
const LINES_MAX: usize = 256;

/// News for the upkeep task.
#[derive(Debug)]
pub(crate) enum News {
    /// A stranger asked us something; it enters the table if it answers too.
    Stranger(Contact),
    /// A node entered the table and should get its share of records.
    Joined(Contact),
    /// A full bucket's oldest member: does it still live?
    Doubtful(Contact),
}

pub(crate) struct Node {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) env: Env,
    pub(crate) config: DhtConfig,
    pub(crate) id: DhtId,
    pub(crate) news: mpsc::Sender<News>,
    protocol: Protocol,
    born: Instant,
    state: Mutex<State>,
    /// Who waits to ask whom.
    lines: Mutex<BTreeMap<PeerId, Arc<Semaphore>>>,
}

pub(crate) struct State {
    pub(crate) table: RoutingTable,
    pub(crate) storage: Storage,
    pub(crate) validators: Validators,
    pub(crate) limiter: RateLimiter,
    blacklist: BTreeMap<PeerId, Failures>,
    pub(crate) stats: Stats,
}

struct Failures {
    count: u32,
    until: Moment,
    /// When the last one came that was counted.
    at: Moment,
}

/// Counters of one node, for people and dashboards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Requests that were answered.
    pub answered: u64,
    /// Requests that were no message; their senders' streams were closed.
    pub malformed: u64,
    /// Requests beyond a peer's rate.
    pub over_rate: u64,
    /// Keys stored here.
    pub keys: usize,
    /// Bytes stored here.
    pub storage_bytes: usize,
    /// Nodes in the routing table.
    pub nodes: usize,
}

impl Node {
    pub(crate) fn new(
        transport: Arc<dyn Transport>,
        env: Env,
        config: DhtConfig,
        news: mpsc::Sender<News>,
    ) -> Self {
        let id = DhtId::of_peer(transport.local_peer());
        let limits = StorageLimits {
            total_bytes_max: config.storage_bytes_max,
            source_bytes_max: config.storage_bytes_per_peer_max,
            entry_bytes_max: ENTRY_BYTES_MAX,
            total_records_max: config.storage_records_max,
            source_records_max: config.storage_records_per_peer_max,
        };
        let state = State {
            table: RoutingTable::new(id, config.bucket_size, config.depth_modulo),
            storage: Storage::new(id, limits),
            validators: Validators::default(),
            limiter: RateLimiter::new(config.requests_per_second, config.requests_burst, RATED_PEERS_MAX),
            blacklist: BTreeMap::new(),
            stats: Stats::default(),
        };
        let (born, protocol) = (env.now(), Protocol::new(PROTOCOL));
        Self {
            transport,
            env,
            config,
            id,
            news,
            protocol,
            born,
            state: Mutex::new(state),
            lines: Mutex::default(),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Now, on this node's own time line.
    pub(crate) fn now(&self) -> Moment {
        self.env.now() - self.born
    }

    pub(crate) fn instant(&self, moment: Moment) -> Instant {
        self.born + moment
    }

    pub(crate) fn addresses(&self) -> Arc<[String]> {
        self.transport.addresses().into()
    }

    /// One question to one node. Its success or failure is noted in the table.
    pub(crate) async fn ask(&self, contact: &Contact, ask: Ask) -> Result<Reply, PeerFault> {
        if !contact.addresses.is_empty() && !self.state().table.contains(&contact.id) {
            self.transport.add_addresses(contact.peer, &contact.addresses);
        }
        let sender = (!self.config.client_mode).then(|| self.addresses());
        let request = Request { sender, ask }.encode();
        let peer = contact.peer;
        let line = self.line(peer);
        let deadline = || self.env.now() + self.config.rpc_timeout;
        let Ok(_turn) = tokio::time::timeout_at(deadline(), line.acquire()).await else {
            // It is our own line: nothing is known of the node that is not known already.
            let context = "too many of our own questions to it are open";
            return Err(PeerFault::new(peer, FaultKind::Refused, context));
        };
        let asked = self.now();
        let answer = rpc::call(&*self.transport, peer, &self.protocol, request, deadline()).await;
        let answer = answer.and_then(|bytes| {
            Answer::decode(bytes)
                .map_err(|error| PeerFault::new(peer, FaultKind::Malformed, error.to_string()))
        });
        match answer {
            Ok(Answer { reply: Reply::Refused(reason), .. }) => {
                let context = match reason {
                    Refusal::Malformed => "it could not read our DHT request",
                    Refusal::Rate => "it gets too many DHT requests from us",
                };
                Err(PeerFault::new(peer, FaultKind::Refused, context))
            }
            Ok(Answer { addresses, reply }) => {
                self.alive(Contact { id: contact.id, peer, addresses });
                Ok(reply)
            }
            Err(fault) => {
                self.failed(contact, fault.kind, asked);
                Err(fault)
            }
        }
    }

    /// The line of those who ask `peer`.
    fn line(&self, peer: PeerId) -> Arc<Semaphore> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() >= LINES_MAX {
            lines.retain(|_, line| Arc::strong_count(line) > 1);
        }
        lines.entry(peer).or_insert_with(|| Arc::new(Semaphore::new(ASKED_MAX))).clone()
    }

    /// A node answered us: the only way into the table.
    fn alive(&self, contact: Contact) {
        let now = self.now();
        let mut state = self.state();
        state.blacklist.remove(&contact.peer);
        let news = match state.table.insert(contact.clone(), now) {
            Insert::Added => News::Joined(contact),
            Insert::Full { oldest: (oldest, seen) } if now.saturating_sub(seen) > SILENT_AFTER => {
                News::Doubtful(oldest)
            }
            _ => return,
        };
        // A full queue only delays upkeep: the next republish brings records to newcomers as well.
        drop(self.news.try_send(news));
    }

    /// A question to a node, `asked` then, has failed.
    fn failed(&self, contact: &Contact, kind: FaultKind, asked: Moment) {
        let now = self.now();
        let mut state = self.state();
        if matches!(kind, FaultKind::Refused | FaultKind::Busy) {
            // Somebody is there. It is no longer the one who was silent for longest, or nobody else would be asked.
            if state.table.contains(&contact.id) {
                state.table.insert(contact.clone(), now);
            }
            return;
        }
        // What was asked before its last failure shows nothing new: one broken connection fails all the questions on it.
        let known = |last: &Failures| asked < last.at || now < last.until;
        if state.blacklist.get(&contact.peer).is_some_and(known) {
            return;
        }
        // A single broken stream may be the end of a connection that nobody used. A node that died breaks the next too.
        let is_first = kind == FaultKind::Reset && !state.blacklist.contains_key(&contact.peer);
        if !is_first {
            state.table.remove(&contact.id);
        }
        if state.blacklist.len() >= BLACKLIST_MAX {
            state.blacklist.retain(|_, failures| failures.until > now);
        }
        if state.blacklist.len() >= BLACKLIST_MAX {
            state.blacklist.pop_first();
        }
        let first = Failures { count: 0, until: Moment::ZERO, at: now };
        let failures = state.blacklist.entry(contact.peer).or_insert(first);
        failures.at = now;
        if !is_first {
            failures.until = now + self.config.blacklist_time * 2u32.pow(failures.count);
            failures.count = (failures.count + 1).min(BLACKLIST_DOUBLINGS_MAX);
        }
    }

    /// The contacts among `found` that are worth asking.
    pub(crate) fn usable(&self, found: Vec<(PeerId, Arc<[String]>)>) -> Vec<Contact> {
        let (now, own) = (self.now(), self.transport.local_peer());
        let state = self.state();
        let banned = |peer: &PeerId| state.blacklist.get(peer).is_some_and(|failures| failures.until > now);
        found
            .into_iter()
            .filter(|(peer, _)| *peer != own && !banned(peer))
            .map(|(peer, addresses)| Contact { id: DhtId::of_peer(peer), peer, addresses })
            .collect()
    }

    /// Check what a node says it keeps under `key`, and put it on our time line.
    pub(crate) fn believe(&self, key: &Bytes, entry: WireEntry) -> (Option<Entry>, usize) {
        let (now, validators) = (self.now(), self.state().validators.clone());
        let mut refused = 0;
        let mut item = |subkey: Option<Bytes>, value: Bytes, left: Duration| {
            let expiration = Expiration::In(left);
            let record = Record { key: key.clone(), subkey, value, expiration };
            if left > crate::config::LIFETIME_MAX || left.is_zero() || !validators.validate(&record) {
                refused += usize::from(!left.is_zero());
                return None;
            }
            let version = validators.version(&record);
            Some(Item { value: record.value, expires: now + left, version })
        };
        let entry = match entry {
            WireEntry::Regular((value, left)) => item(None, value, left).map(Entry::Regular),
            WireEntry::Dictionary(items) => {
                let items = items.into_iter().filter_map(|(subkey, (value, left))| {
                    Some((subkey.clone(), item(Some(subkey), value, left)?))
                });
                let items: BTreeMap<_, _> = items.collect();
                (!items.is_empty()).then_some(Entry::Dictionary(items))
            }
        };
        (entry, refused)
    }
}
