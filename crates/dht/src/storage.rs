//! Sans-I/O. The records that a peer keeps for others: hivemind's merge rules, bounded per source, per key and in total.

use crate::entry::{Entry, Item, Moment, Origin, Verdict};
use crate::id::{DhtId, ID_BYTES};
use bytes::Bytes;
use potluck_net::PeerId;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::Duration;

/// What one item costs besides its own bytes, so that empty values are not free.
const ITEM_OVERHEAD: usize = 128;
/// A full storage looks for expired items no more often than this.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// Bounds of a [`Storage`], in bytes and in records: each record is work again and again, however small it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StorageLimits {
    /// Everything together.
    pub total_bytes_max: usize,
    /// What one peer may have stored here.
    pub source_bytes_max: usize,
    /// Everything under one key; it has to fit one answer.
    pub entry_bytes_max: usize,
    /// Everything together.
    pub total_records_max: usize,
    /// What one peer may have stored here.
    pub source_records_max: usize,
}

/// What records take.
#[derive(Debug, Clone, Copy, Default)]
struct Used {
    records: usize,
    bytes: usize,
}

impl Used {
    fn add(&mut self, bytes: usize) {
        self.records += 1;
        self.bytes += bytes;
    }

    fn subtract(&mut self, bytes: usize) {
        self.records -= 1;
        self.bytes -= bytes;
    }
}

/// Expiring records by key.
#[derive(Debug)]
pub struct Storage {
    own: DhtId,
    limits: StorageLimits,
    slots: BTreeMap<DhtId, Slot>,
    by_source: BTreeMap<PeerId, Used>,
    used: Used,
    /// When everything that had expired was dropped last.
    swept: Moment,
}

#[derive(Debug)]
struct Slot {
    name: Bytes,
    entry: Entry,
    bytes: usize,
    /// Who pays for which item.
    charges: BTreeMap<Option<Bytes>, (Option<PeerId>, usize)>,
}

/// One write.
#[derive(Debug, Clone)]
pub struct Write {
    /// Who sent it; `None` for ourselves, who have no quota.
    pub source: Option<PeerId>,
    /// What the key's id was hashed from (in hivemind's dialect, which does not send it, the id itself).
    pub name: Bytes,
    /// The subkey, if it goes into a dictionary.
    pub subkey: Option<Bytes>,
    /// The value.
    pub item: Item,
    /// From its owner or handed on.
    pub origin: Origin,
}

impl Storage {
    /// An empty storage of the node `own`.
    pub fn new(own: DhtId, limits: StorageLimits) -> Self {
        Self {
            own,
            limits,
            slots: BTreeMap::new(),
            by_source: BTreeMap::new(),
            used: Used::default(),
            swept: Moment::ZERO,
        }
    }

    /// Apply one write to key `id`. When the storage is full, the keys farthest from this node make room, so that an
    /// attacker cannot push out what others would look for here.
    pub fn store(&mut self, now: Moment, id: DhtId, write: Write) -> Verdict {
        if write.item.expires <= now {
            return Verdict::Expired;
        }
        self.prune(now, id);
        if let Some(slot) = self.slots.get(&id) {
            let verdict = slot.entry.judge(write.subkey.as_ref(), &write.item, write.origin);
            if verdict != Verdict::Accepted {
                return verdict;
            }
        }
        let subkey_len = write.subkey.as_ref().map_or(0, Bytes::len);
        let cost = write.item.value.len() + subkey_len + write.name.len() + ITEM_OVERHEAD;
        let freed = self.freed_by(id, &write);
        let slot_bytes = self.slots.get(&id).map_or(0, |slot| slot.bytes);
        if slot_bytes - freed.iter().map(|(_, bytes)| bytes).sum::<usize>() + cost
            > self.limits.entry_bytes_max
        {
            return Verdict::Full;
        }
        if let Some(source) = write.source {
            let mut used = self.by_source.get(&source).copied().unwrap_or_default();
            freed
                .iter()
                .filter(|(payer, _)| *payer == Some(source))
                .for_each(|(_, bytes)| used.subtract(*bytes));
            used.add(cost);
            if used.bytes > self.limits.source_bytes_max || used.records > self.limits.source_records_max {
                return Verdict::Full;
            }
        }
        if !self.make_room(now, id, cost, &freed) {
            return Verdict::Full;
        }
        self.apply(id, write, cost);
        Verdict::Accepted
    }

    /// The charges that an accepted write would lift.
    fn freed_by(&self, id: DhtId, write: &Write) -> Vec<(Option<PeerId>, usize)> {
        let Some(slot) = self.slots.get(&id) else { return Vec::new() };
        match (&slot.entry, &write.subkey) {
            (Entry::Dictionary(_), Some(_)) => slot.charges.get(&write.subkey).copied().into_iter().collect(),
            _ => slot.charges.values().copied().collect(),
        }
    }

    fn apply(&mut self, id: DhtId, write: Write, cost: usize) {
        for (payer, bytes) in self.freed_by(id, &write) {
            self.refund(payer, bytes);
        }
        let charge = (write.source, cost);
        match self.slots.get_mut(&id) {
            Some(slot) => {
                if !matches!((&slot.entry, &write.subkey), (Entry::Dictionary(_), Some(_))) {
                    slot.charges.clear();
                }
                slot.charges.insert(write.subkey.clone(), charge);
                slot.bytes = slot.charges.values().map(|(_, bytes)| bytes).sum();
                slot.entry.put(write.subkey, write.item, write.origin);
            }
            None => {
                let charges = BTreeMap::from([(write.subkey.clone(), charge)]);
                let entry = Entry::new(write.subkey, write.item);
                self.slots.insert(id, Slot { name: write.name, entry, bytes: cost, charges });
            }
        }
        self.used.add(cost);
        if let Some(source) = write.source {
            self.by_source.entry(source).or_default().add(cost);
        }
    }

    fn refund(&mut self, payer: Option<PeerId>, bytes: usize) {
        self.used.subtract(bytes);
        if let Some(payer) = payer
            && let Some(used) = self.by_source.get_mut(&payer)
        {
            used.subtract(bytes);
            if used.records == 0 {
                self.by_source.remove(&payer);
            }
        }
    }

    /// Evict until one more record of `cost` bytes fits; false if `id` itself is the farthest key.
    fn make_room(&mut self, now: Moment, id: DhtId, cost: usize, freed: &[(Option<PeerId>, usize)]) -> bool {
        if self.has_room(cost, freed) {
            return true;
        }
        // Everything is looked at now and then only: while the storage is full, each write comes here.
        if now >= self.swept + SWEEP_EVERY {
            self.expire(now);
        }
        while !self.has_room(cost, freed) {
            match self.farthest() {
                Some(far) if self.own.distance(&far) > self.own.distance(&id) => self.remove(far),
                _ => return false,
            }
        }
        true
    }

    fn has_room(&self, cost: usize, freed: &[(Option<PeerId>, usize)]) -> bool {
        let mut used = self.used;
        freed.iter().for_each(|(_, bytes)| used.subtract(*bytes));
        used.add(cost);
        used.bytes <= self.limits.total_bytes_max && used.records <= self.limits.total_records_max
    }

    /// The stored key farthest from this node, found bit by bit.
    fn farthest(&self) -> Option<DhtId> {
        let mut low = DhtId::ZERO;
        let mut high = DhtId::from_bytes([0xff; ID_BYTES]);
        for bit in 0..ID_BYTES * 8 {
            let away = !self.own.bit(bit);
            let (far_low, far_high) = (low.with_bit(bit, away), high.with_bit(bit, away));
            let any =
                self.slots.range((Bound::Included(far_low), Bound::Included(far_high))).next().is_some();
            (low, high) =
                if any { (far_low, far_high) } else { (low.with_bit(bit, !away), high.with_bit(bit, !away)) };
        }
        self.slots.contains_key(&low).then_some(low)
    }

    fn remove(&mut self, id: DhtId) {
        let Some(slot) = self.slots.remove(&id) else { return };
        for (payer, bytes) in slot.charges.into_values() {
            self.refund(payer, bytes);
        }
    }

    /// Drop what has expired under one key.
    fn prune(&mut self, now: Moment, id: DhtId) {
        let Some(slot) = self.slots.get_mut(&id) else { return };
        if slot.entry.expires() <= now {
            return self.remove(id);
        }
        let Entry::Dictionary(items) = &mut slot.entry else { return };
        let mut freed = Vec::new();
        items.retain(|subkey, item| {
            let live = item.expires > now;
            if !live {
                freed.extend(slot.charges.remove(&Some(subkey.clone())));
            }
            live
        });
        slot.bytes -= freed.iter().map(|(_, bytes)| bytes).sum::<usize>();
        for (payer, bytes) in freed {
            self.refund(payer, bytes);
        }
    }

    /// Drop everything that has expired.
    pub fn expire(&mut self, now: Moment) {
        self.swept = now;
        let ids: Vec<DhtId> = self.slots.keys().copied().collect();
        for id in ids {
            self.prune(now, id);
        }
    }

    /// What is live under a key.
    pub fn get(&mut self, now: Moment, id: &DhtId) -> Option<&Entry> {
        self.prune(now, *id);
        self.slots.get(id).map(|slot| &slot.entry)
    }

    /// Every key: its id, what the id was hashed from, what is under it. May hold expired items; see
    /// [`Storage::expire`].
    pub fn iter(&self) -> impl Iterator<Item = (&DhtId, &Bytes, &Entry)> {
        self.slots.iter().map(|(id, slot)| (id, &slot.name, &slot.entry))
    }

    /// What a key's id was hashed from, and what is under it.
    pub fn slot(&self, id: &DhtId) -> Option<(&Bytes, &Entry)> {
        self.slots.get(id).map(|slot| (&slot.name, &slot.entry))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether nothing is stored.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Bytes in use, with overhead.
    pub fn bytes(&self) -> usize {
        self.used.bytes
    }
}
