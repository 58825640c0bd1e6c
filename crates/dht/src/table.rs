//! Sans-I/O. Who is where: Kademlia buckets under hivemind's split rule.

use crate::entry::Moment;
use crate::id::{DhtId, ID_BYTES};
use potluck_net::PeerId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A node of the DHT as others know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contact {
    /// Its place.
    pub id: DhtId,
    /// Its name on the network.
    pub peer: PeerId,
    /// Addresses under which it says it can be reached.
    pub addresses: Arc<[String]>,
}

/// What became of a contact that was reported alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Insert {
    /// It is new in the table.
    Added,
    /// It was there and has been refreshed.
    Refreshed,
    /// Its bucket is full. It waits as a replacement; ask whether the bucket's least recently seen member still lives,
    /// and [`RoutingTable::remove`] it if not.
    Full {
        /// The member to ask, and when it was last seen.
        oldest: (Contact, Moment),
    },
    /// Ourselves: never in our own table.
    Own,
}

/// Buckets of at most `bucket_size` live nodes. A full bucket splits if it contains our own id or if its depth is no
/// multiple of `depth_modulo`.
#[derive(Debug)]
pub struct RoutingTable {
    own: DhtId,
    bucket_size: usize,
    depth_modulo: usize,
    /// By the lowest id that a bucket covers.
    buckets: BTreeMap<DhtId, Bucket>,
}

#[derive(Debug, Default)]
struct Bucket {
    /// Number of leading bits that its ids share.
    depth: usize,
    /// Least recently seen first.
    members: Vec<(Contact, Moment)>,
    /// Most recent last.
    replacements: Vec<(Contact, Moment)>,
}

impl RoutingTable {
    /// An empty table of the node `own`.
    pub fn new(own: DhtId, bucket_size: usize, depth_modulo: usize) -> Self {
        let buckets = BTreeMap::from([(DhtId::ZERO, Bucket::default())]);
        Self { own, bucket_size: bucket_size.max(1), depth_modulo: depth_modulo.max(1), buckets }
    }

    fn bucket_of(&self, id: &DhtId) -> (DhtId, &Bucket) {
        let (low, bucket) =
            self.buckets.range(..=*id).next_back().expect("the first bucket starts at the lowest id");
        (*low, bucket)
    }

    fn bucket_of_mut(&mut self, id: &DhtId) -> &mut Bucket {
        self.buckets.range_mut(..=*id).next_back().expect("the first bucket starts at the lowest id").1
    }

    /// Report that a node answered us just now.
    pub fn insert(&mut self, contact: Contact, now: Moment) -> Insert {
        if contact.id == self.own {
            return Insert::Own;
        }
        loop {
            let size = self.bucket_size;
            let bucket = self.bucket_of_mut(&contact.id);
            if let Some(at) = bucket.members.iter().position(|(member, _)| member.id == contact.id) {
                let mut old = bucket.members.remove(at).0;
                // A later process under the same id, or news about its addresses.
                old.peer = contact.peer;
                if !contact.addresses.is_empty() {
                    old.addresses = contact.addresses;
                }
                bucket.members.push((old, now));
                return Insert::Refreshed;
            }
            if bucket.members.len() < size {
                bucket.replacements.retain(|(other, _)| other.id != contact.id);
                bucket.members.push((contact, now));
                return Insert::Added;
            }
            if self.split(&contact.id) {
                continue;
            }
            let bucket = self.bucket_of_mut(&contact.id);
            bucket.replacements.retain(|(other, _)| other.id != contact.id);
            if bucket.replacements.len() == size {
                bucket.replacements.remove(0);
            }
            bucket.replacements.push((contact, now));
            return Insert::Full { oldest: bucket.members[0].clone() };
        }
    }

    /// Split the bucket of `id` if the rules allow it.
    fn split(&mut self, id: &DhtId) -> bool {
        let (low, bucket) = self.bucket_of(id);
        let depth = bucket.depth;
        let holds_own = self.own.common_prefix(&low) >= depth;
        if depth >= ID_BYTES * 8 || !(holds_own || depth % self.depth_modulo != 0) {
            return false;
        }
        let Some(bucket) = self.buckets.remove(&low) else { return false };
        let mut halves = [
            Bucket { depth: depth + 1, ..Bucket::default() },
            Bucket { depth: depth + 1, ..Bucket::default() },
        ];
        for (contact, seen) in bucket.members {
            halves[usize::from(contact.id.bit(depth))].members.push((contact, seen));
        }
        for (contact, seen) in bucket.replacements {
            let half = &mut halves[usize::from(contact.id.bit(depth))];
            let list = if half.members.len() < self.bucket_size {
                &mut half.members
            } else {
                &mut half.replacements
            };
            list.push((contact, seen));
        }
        let [left, right] = halves;
        self.buckets.insert(low, left);
        self.buckets.insert(low.with_bit(depth, true), right);
        true
    }

    /// Whether a node is in the table.
    pub fn contains(&self, id: &DhtId) -> bool {
        self.bucket_of(id).1.members.iter().any(|(member, _)| member.id == *id)
    }

    /// Forget a node that does not answer; the most recent replacement takes its place.
    pub fn remove(&mut self, id: &DhtId) -> bool {
        let size = self.bucket_size;
        let bucket = self.bucket_of_mut(id);
        let before = bucket.members.len();
        bucket.members.retain(|(member, _)| member.id != *id);
        bucket.replacements.retain(|(other, _)| other.id != *id);
        let removed = bucket.members.len() < before;
        if removed
            && bucket.members.len() < size
            && let Some(replacement) = bucket.replacements.pop()
        {
            // It was not seen for a while: the least recently seen place is its.
            bucket.members.insert(0, replacement);
        }
        removed
    }

    /// Up to `count` nodes nearest to `target`, nearest first, without `exclude`.
    pub fn nearest(&self, target: &DhtId, count: usize, exclude: Option<&DhtId>) -> Vec<Contact> {
        let mut all: Vec<(DhtId, &Contact)> = self
            .contacts()
            .filter(|contact| Some(&contact.id) != exclude)
            .map(|contact| (contact.id.distance(target), contact))
            .collect();
        if count < all.len() {
            all.select_nth_unstable_by_key(count, |(distance, _)| *distance);
            all.truncate(count);
        }
        all.sort_unstable_by_key(|(distance, _)| *distance);
        all.into_iter().map(|(_, contact)| contact.clone()).collect()
    }

    /// How many known nodes are nearer to `target` than we are, counting to at most `limit`.
    pub fn rank(&self, target: &DhtId, limit: usize) -> usize {
        let own = self.own.distance(target);
        self.contacts().filter(|contact| contact.id.distance(target) < own).take(limit).count()
    }

    /// The node that was not heard from for the longest time.
    pub fn oldest(&self) -> Option<(&Contact, Moment)> {
        let firsts = self.buckets.values().filter_map(|bucket| bucket.members.first());
        firsts.min_by_key(|(_, seen)| *seen).map(|(contact, seen)| (contact, *seen))
    }

    /// Every node in the table.
    pub fn contacts(&self) -> impl Iterator<Item = &Contact> {
        self.buckets.values().flat_map(|bucket| bucket.members.iter().map(|(contact, _)| contact))
    }

    /// Number of nodes in the table.
    pub fn len(&self) -> usize {
        self.buckets.values().map(|bucket| bucket.members.len()).sum()
    }

    /// Whether we know nobody.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
