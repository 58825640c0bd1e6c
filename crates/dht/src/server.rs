//! Answers to other nodes.

use crate::config::LIFETIME_MAX;
use crate::entry::{Entry, Item, Moment, Origin, Verdict};
use crate::id::DhtId;
use crate::node::{News, Node, State};
use crate::record::{Expiration, Record, RecordValidator};
use crate::storage::Write;
use crate::table::Contact;
use crate::wire::{Answer, Ask, Refusal, Reply, Request, WireEntry, WireRecord};
use bytes::Bytes;
use potluck_net::PeerId;
use std::time::Duration;

/// Records of a store that cost their sender as much as one request: their signatures take about a millisecond.
const RECORDS_PER_REQUEST: usize = 16;

/// Copies of one record whose expiries differ by less than this are the same record: what the way between holders adds.
pub(crate) const COPY_SLACK: Duration = Duration::from_secs(3);

impl Node {
    /// Answer one request; never fails, whatever the bytes are.
    pub(crate) fn answer(&self, peer: PeerId, request: Bytes) -> Bytes {
        let reply = self.reply(peer, request);
        Answer { addresses: self.addresses(), reply }.encode()
    }

    fn reply(&self, peer: PeerId, request: Bytes) -> Reply {
        let now = self.now();
        let id = DhtId::of_peer(peer);
        if !self.state().limiter.allow(peer, now) {
            self.state().stats.over_rate += 1;
            return Reply::Refused(Refusal::Rate);
        }
        let request = match Request::decode(request) {
            Ok(request) => request,
            Err(error) => {
                tracing::debug!(target: "potluck::dht", %peer, %error, "malformed request");
                self.state().stats.malformed += 1;
                return Reply::Refused(Refusal::Malformed);
            }
        };
        if let Some(addresses) = request.sender {
            self.meet(Contact { id, peer, addresses });
        }
        self.state().stats.answered += 1;
        match request.ask {
            Ask::Ping => Reply::Pong,
            Ask::Find { id: target, want_value } => {
                let mut state = self.state();
                let entry = if want_value { state.wire_entry(now, &target) } else { None };
                let nearest = state.table.nearest(&target, self.config.bucket_size, Some(&id));
                let contacts = nearest.into_iter().map(|contact| (contact.peer, contact.addresses)).collect();
                Reply::Found { entry, contacts }
            }
            Ask::Store { handed_on, records } => {
                self.state().limiter.charge(peer, store_cost(records.len()) - 1.0);
                let origin = if handed_on { Origin::Holder(COPY_SLACK) } else { Origin::Owner };
                Reply::Stored(self.accept(Some(peer), records, origin))
            }
        }
    }

    /// Check and keep records. Signatures are checked while others may have the state.
    pub(crate) fn accept(
        &self,
        source: Option<PeerId>,
        records: Vec<WireRecord>,
        origin: Origin,
    ) -> Vec<Verdict> {
        let (now, validators) = (self.now(), self.state().validators.clone());
        let checked = records.into_iter().map(|record| {
            let WireRecord { key, subkey, value, left } = record;
            let record = Record { key, subkey, value, expiration: Expiration::In(left) };
            if left > LIFETIME_MAX || !validators.validate(&record) {
                return None;
            }
            let version = validators.version(&record);
            let Record { key: name, subkey, value, .. } = record;
            let item = Item { value, expires: now + left, version };
            Some(Write { source, name, subkey, item, origin })
        });
        let checked: Vec<Option<Write>> = checked.collect();
        let mut state = self.state();
        let keep = |write: Option<Write>| {
            let Some(write) = write else { return Verdict::Invalid };
            state.storage.store(now, DhtId::of_key(&write.name), write)
        };
        checked.into_iter().map(keep).collect()
    }

    /// A node that calls itself a server asked us something. If we know it, it lives; if not, it has to answer a
    /// question of ours before it enters the table, or anyone could fill it with names that nobody can reach.
    fn meet(&self, contact: Contact) {
        let now = self.now();
        let mut state = self.state();
        if state.table.contains(&contact.id) {
            state.table.insert(contact, now);
        } else {
            drop(state);
            // A full queue drops strangers: they ask again, and lookups find them meanwhile.
            drop(self.news.try_send(News::Stranger(contact)));
        }
    }
}

/// What a store costs its sender, in requests.
pub(crate) fn store_cost(records: usize) -> f64 {
    records.div_ceil(RECORDS_PER_REQUEST).max(1) as f64
}

impl State {
    fn wire_entry(&mut self, now: Moment, id: &DhtId) -> Option<WireEntry> {
        let left = |item: &Item| (item.value.clone(), item.expires.saturating_sub(now));
        Some(match self.storage.get(now, id)? {
            Entry::Regular(item) => WireEntry::Regular(left(item)),
            Entry::Dictionary(items) => WireEntry::Dictionary(
                items.iter().map(|(subkey, item)| (subkey.clone(), left(item))).collect(),
            ),
        })
    }
}
