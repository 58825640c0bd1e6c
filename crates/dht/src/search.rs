//! The operations that a user sees: look up, store, get.

use crate::config::{KEY_BYTES_MAX, LIFETIME_MAX, VALUE_BYTES_MAX};
use crate::entry::{Entry, Moment, Origin, Verdict};
use crate::id::DhtId;
use crate::lookup::Lookup;
use crate::node::Node;
use crate::record::{Expiration, Record, RecordValidator};
use crate::server::COPY_SLACK;
use crate::table::Contact;
use crate::wire::{Ask, Reply, WireRecord};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use potluck_net::{FaultKind, Outcome, PeerFault};
use std::collections::BTreeMap;
use std::time::Duration;

/// A search ends by then with what it has: every node that answers may name others which answer late.
const SEARCH_MAX: Duration = Duration::from_secs(30);

/// What became of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreReport {
    /// Nodes that answered, this one included if it is among the nearest. A client-mode node never counts itself.
    pub replicas: usize,
    /// Those of them that hold the record now.
    pub accepted: usize,
    /// Why nothing was sent, if the record itself is not allowed.
    pub problem: Option<StoreProblem>,
}

/// Why a record cannot be stored at all. Change the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreProblem {
    /// Key or subkey too long.
    #[error("a key or subkey of {found} bytes exceeds the limit of {KEY_BYTES_MAX} bytes")]
    Key {
        /// Its length.
        found: usize,
    },
    /// Value too long.
    #[error("a value of {found} bytes (signature included) exceeds the limit of {VALUE_BYTES_MAX} bytes")]
    Value {
        /// Its length.
        found: usize,
    },
    /// A life too long, or none.
    #[error("a record must live between 1 ms and {LIFETIME_MAX:?}, not {found:?}")]
    Lifetime {
        /// What was asked for.
        found: Duration,
    },
    /// A validator of this node refuses it: usually the key or subkey carries another peer's owner tag.
    #[error("a record validator refuses it: is its owner tag ours?")]
    Invalid,
}

/// What is stored under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A single value and how long it will live.
    Regular(Bytes, Duration),
    /// Values by subkey, each with how long it will live.
    Dictionary(BTreeMap<Bytes, (Bytes, Duration)>),
}

/// How a search went.
pub(crate) struct Search {
    pub(crate) entry: Option<Entry>,
    /// Nearest nodes that answered.
    pub(crate) nearest: Vec<Contact>,
    pub(crate) faults: Vec<PeerFault>,
    /// Hops to the first node that had a value: 0 for ourselves.
    pub(crate) hops: usize,
}

/// When a search may end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// The first value.
    First,
    /// All of the nearest nodes have answered.
    All,
}

impl Node {
    /// Find the nodes nearest to `target`; with a key, also what they keep under it. Ends within [`SEARCH_MAX`].
    pub(crate) async fn search(&self, target: DhtId, key: Option<&Bytes>, until: Until) -> Search {
        let local = key.and_then(|_| self.state().storage.get(self.now(), &target).cloned());
        let mut search = Search { entry: local, nearest: Vec::new(), faults: Vec::new(), hops: 0 };
        if search.entry.is_some() && until == Until::First {
            return search;
        }
        let seeds = self.state().table.nearest(&target, self.config.bucket_size, None);
        let config = &self.config;
        let mut lookup =
            Lookup::new(target, config.bucket_size, config.parallel_rpcs, config.stalled_after, seeds);
        let mut open = FuturesUnordered::new();
        let want_value = key.is_some();
        let end = self.now() + SEARCH_MAX;
        while !lookup.is_done() && self.now() < end {
            while let Some(contact) = lookup.next(self.now()) {
                open.push(async move {
                    let reply = self.ask(&contact, Ask::Find { id: target, want_value }).await;
                    (contact, reply)
                });
            }
            let wakeup = lookup.next_wakeup(self.now()).unwrap_or(end).min(end);
            let (contact, reply) = tokio::select! {
                biased;
                answer = open.next() => match answer {
                    Some(answer) => answer,
                    None => break,
                },
                () = tokio::time::sleep_until(self.instant(wakeup)) => continue,
            };
            let (entry, contacts) = match reply {
                Ok(Reply::Found { entry, contacts }) => (entry, contacts),
                Ok(_) => {
                    lookup.failed(&contact.id);
                    let fault = PeerFault::new(contact.peer, FaultKind::Malformed, "no answer to a find");
                    search.faults.push(fault);
                    continue;
                }
                Err(fault) => {
                    lookup.failed(&contact.id);
                    search.faults.push(fault);
                    continue;
                }
            };
            let hops = lookup.answered(&contact.id, self.usable(contacts));
            if let (Some(key), Some(entry)) = (key, entry) {
                self.collect(&mut search, &contact, key, entry, hops);
            }
            if until == Until::First && search.entry.is_some() {
                break;
            }
        }
        search.nearest = lookup.nearest();
        search
    }

    fn collect(
        &self,
        search: &mut Search,
        contact: &Contact,
        key: &Bytes,
        entry: crate::wire::WireEntry,
        hops: usize,
    ) {
        let (entry, refused) = self.believe(key, entry);
        if refused > 0 {
            let context = format!("{refused} records under key {key:?} are not validly signed");
            search.faults.push(PeerFault::new(contact.peer, FaultKind::Malformed, context));
        }
        match (&mut search.entry, entry) {
            (Some(known), Some(entry)) => known.merge(entry, COPY_SLACK),
            (known @ None, Some(entry)) => {
                *known = Some(entry);
                search.hops = hops;
            }
            (_, None) => {}
        }
    }

    /// See [`crate::Dht::get`].
    pub(crate) async fn get(&self, key: &[u8], latest: bool) -> (Outcome<Option<Found>>, usize) {
        let key = Bytes::copy_from_slice(key);
        let until = if latest { Until::All } else { Until::First };
        let search = self.search(DhtId::of_key(&key), Some(&key), until).await;
        let now = self.now();
        let entry = search.entry.and_then(|entry| entry.live(now));
        let value = entry.map(|entry| self.found(&key, entry, now));
        (Outcome { value, faults: search.faults }, search.hops)
    }

    fn found(&self, key: &Bytes, entry: Entry, now: Moment) -> Found {
        let validators = self.state().validators.clone();
        let strip = |subkey: Option<Bytes>, value: Bytes, expires: Moment| {
            let left = expires.saturating_sub(now);
            let record = Record { key: key.clone(), subkey, value, expiration: Expiration::In(left) };
            (validators.strip(&record), left)
        };
        match entry {
            Entry::Regular(item) => {
                let (value, left) = strip(None, item.value, item.expires);
                Found::Regular(value, left)
            }
            Entry::Dictionary(items) => Found::Dictionary(
                items
                    .into_iter()
                    .map(|(subkey, item)| (subkey.clone(), strip(Some(subkey), item.value, item.expires)))
                    .collect(),
            ),
        }
    }

    /// See [`crate::Dht::store`].
    pub(crate) async fn store(
        &self,
        key: &[u8],
        subkey: Option<&[u8]>,
        value: Bytes,
        expires_in: Duration,
    ) -> Outcome<StoreReport> {
        let key = Bytes::copy_from_slice(key);
        let plain = Record {
            key: key.clone(),
            subkey: subkey.map(Bytes::copy_from_slice),
            value,
            expiration: Expiration::In(expires_in),
        };
        let record = match self.seal(&plain) {
            Ok(record) => record,
            Err(problem) => {
                return Outcome::clean(StoreReport { problem: Some(problem), ..StoreReport::default() });
            }
        };
        let until = self.now() + expires_in;
        let search = self.search(DhtId::of_key(&key), None, Until::All).await;
        let mut faults = search.faults;
        let mut sent = self.place(&search.nearest, vec![record], until, Origin::Owner, &mut faults).await;
        // Somebody holds a higher version of our own record, from before a restart: go beyond it, once.
        if let Some(version) = sent.newest
            && let Ok(record) = self.seal_beyond(&plain, version)
        {
            sent = self.place(&search.nearest, vec![record], until, Origin::Owner, &mut faults).await;
        }
        let value = StoreReport { replicas: sent.replicas, accepted: sent.accepted, problem: None };
        Outcome { value, faults }
    }

    fn seal_beyond(&self, plain: &Record, version: u64) -> Result<WireRecord, StoreProblem> {
        self.state().validators.observe(version);
        self.seal(plain)
    }

    fn seal(&self, plain: &Record) -> Result<WireRecord, StoreProblem> {
        let Expiration::In(left) = plain.expiration else { return Err(StoreProblem::Invalid) };
        let key_len = plain.key.len().max(plain.subkey.as_ref().map_or(0, Bytes::len));
        if key_len > KEY_BYTES_MAX {
            return Err(StoreProblem::Key { found: key_len });
        }
        if left > LIFETIME_MAX || left < Duration::from_millis(1) {
            return Err(StoreProblem::Lifetime { found: left });
        }
        let validators = self.state().validators.clone();
        let record = Record { value: validators.sign(plain), ..plain.clone() };
        if record.value.len() > VALUE_BYTES_MAX {
            return Err(StoreProblem::Value { found: record.value.len() });
        }
        if !validators.validate(&record) {
            return Err(StoreProblem::Invalid);
        }
        Ok(WireRecord { key: record.key, subkey: record.subkey, value: record.value, left })
    }

    /// Have the `num_replicas` nearest of `nearest` and ourselves keep `records` of one key; whoever does not answer
    /// is replaced by the next.
    pub(crate) async fn place(
        &self,
        nearest: &[Contact],
        records: Vec<WireRecord>,
        until: Moment,
        origin: Origin,
        faults: &mut Vec<PeerFault>,
    ) -> Placed {
        let mut placed = Placed::default();
        let Some(id) = records.first().map(|record| DhtId::of_key(&record.key)) else { return placed };
        let count = self.config.num_replicas;
        let own = self.id.distance(&id);
        let nearer = nearest.iter().filter(|contact| contact.id.distance(&id) < own).count();
        if !self.config.client_mode && nearer < count && origin == Origin::Owner {
            placed.count(&self.accept(None, records.clone(), origin));
        }
        let mut candidates = nearest.iter();
        let mut open = FuturesUnordered::new();
        loop {
            while placed.replicas + open.len() < count
                && let Some(contact) = candidates.next()
            {
                let records = self.aged(&records, until, origin);
                open.push(async move {
                    let handed_on = origin != Origin::Owner;
                    (contact, self.ask(contact, Ask::Store { handed_on, records }).await)
                });
            }
            match open.next().await {
                Some((_, Ok(Reply::Stored(verdicts)))) if verdicts.len() == records.len() => {
                    placed.count(&verdicts);
                }
                Some((contact, Ok(_))) => {
                    let fault = PeerFault::new(contact.peer, FaultKind::Malformed, "no answer to a store");
                    faults.push(fault);
                }
                Some((_, Err(fault))) => faults.push(fault),
                None => return placed,
            }
        }
    }

    /// A record that waited for its turn has less time left. (Handed-on ones carry their own times.)
    fn aged(&self, records: &[WireRecord], until: Moment, origin: Origin) -> Vec<WireRecord> {
        let mut records = records.to_vec();
        if origin == Origin::Owner {
            let left = until.saturating_sub(self.now());
            records.iter_mut().for_each(|record| record.left = record.left.min(left));
        }
        records
    }
}

/// How many nodes took what [`Node::place`] sent.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    pub(crate) replicas: usize,
    pub(crate) accepted: usize,
    /// The highest version that won over ours.
    newest: Option<u64>,
}

impl Placed {
    fn count(&mut self, verdicts: &[Verdict]) {
        self.replicas += 1;
        self.accepted += usize::from(verdicts.iter().all(|verdict| verdict.is_held()));
        for verdict in verdicts {
            if let Verdict::Older { version } = verdict
                && *version > 0
            {
                self.newest = self.newest.max(Some(*version));
            }
        }
    }
}
