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
        let mut state = self.state();
        state.stats.answered += 1;
        match request.ask {
            Ask::Ping => Reply::Pong,
            Ask::Find { id: target, want_value } => {
                let entry = if want_value { state.wire_entry(now, &target) } else { None };
                let nearest = state.table.nearest(&target, self.config.bucket_size, Some(&id));
                let contacts = nearest.into_iter().map(|contact| (contact.peer, contact.addresses)).collect();
                Reply::Found { entry, contacts }
            }
            Ask::Store { handed_on, records } => {
                let origin = if handed_on { Origin::Holder(COPY_SLACK) } else { Origin::Owner };
                let verdicts =
                    records.into_iter().map(|record| state.accept(now, Some(peer), record, origin));
                Reply::Stored(verdicts.collect())
            }
        }
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

    /// Check and keep one record.
    pub(crate) fn accept(
        &mut self,
        now: Moment,
        source: Option<PeerId>,
        record: WireRecord,
        origin: Origin,
    ) -> Verdict {
        let WireRecord { key, subkey, value, left } = record;
        let record = Record { key, subkey, value, expiration: Expiration::In(left) };
        if left > LIFETIME_MAX || !self.validators.validate(&record) {
            return Verdict::Invalid;
        }
        let version = self.validators.version(&record);
        let Record { key: name, subkey, value, .. } = record;
        let item = Item { value, expires: now + left, version };
        self.storage.store(now, DhtId::of_key(&name), Write { source, name, subkey, item, origin })
    }
}
