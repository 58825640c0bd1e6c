//! hivemind's storage and merge rules, the bounds, and the routing table's rules.

use bytes::Bytes;
use potluck_dht::{
    Contact, DhtId, Entry, Insert, Item, Origin, RoutingTable, Storage, StorageLimits, Verdict, Write,
};
use potluck_net::PeerId;
use std::sync::Arc;
use std::time::Duration;

const OLDER: Verdict = Verdict::Older { version: 0 };

fn seconds(value: u64) -> Duration {
    Duration::from_secs(value)
}

fn peer(index: u8) -> PeerId {
    PeerId::from_ed25519(&[index; 32])
}

fn item(value: &str, expires: u64, version: u64) -> Item {
    Item { value: Bytes::copy_from_slice(value.as_bytes()), expires: seconds(expires), version }
}

fn storage(total: usize, source: usize) -> Storage {
    let limits = StorageLimits {
        total_bytes_max: total,
        source_bytes_max: source,
        entry_bytes_max: 4000,
        total_records_max: 100,
        source_records_max: 100,
    };
    Storage::new(DhtId::ZERO, limits)
}

fn put(storage: &mut Storage, subkey: Option<&'static str>, item: Item, origin: Origin) -> Verdict {
    let name = Bytes::from_static(b"key");
    let write = Write { source: Some(peer(1)), name, subkey: subkey.map(Bytes::from), item, origin };
    storage.store(seconds(10), DhtId::of_key(b"key"), write)
}

#[test]
fn the_later_expiry_wins_strictly() {
    let mut kept = storage(10_000, 10_000);
    assert_eq!(put(&mut kept, None, item("a", 10, 0), Origin::Owner), Verdict::Expired);
    assert_eq!(put(&mut kept, None, item("a", 20, 0), Origin::Owner), Verdict::Accepted);
    assert_eq!(put(&mut kept, None, item("b", 20, 0), Origin::Owner), OLDER);
    assert_eq!(put(&mut kept, None, item("b", 21, 0), Origin::Owner), Verdict::Accepted);
    assert_eq!(kept.get(seconds(20), &DhtId::of_key(b"key")), Some(&Entry::Regular(item("b", 21, 0))));
    assert_eq!(kept.get(seconds(21), &DhtId::of_key(b"key")), None, "never after it expired");
    assert_eq!(kept.bytes(), 0);
}

#[test]
fn subkeys_merge_and_the_kind_changes_only_for_a_later_expiry() {
    let mut kept = storage(10_000, 10_000);
    assert_eq!(put(&mut kept, None, item("plain", 20, 0), Origin::Owner), Verdict::Accepted);
    assert_eq!(put(&mut kept, Some("x"), item("1", 20, 0), Origin::Owner), OLDER);
    assert_eq!(put(&mut kept, Some("x"), item("1", 30, 0), Origin::Owner), Verdict::Accepted);
    assert_eq!(put(&mut kept, Some("y"), item("2", 15, 0), Origin::Owner), Verdict::Accepted);
    assert_eq!(put(&mut kept, Some("y"), item("3", 14, 0), Origin::Owner), OLDER);
    assert_eq!(put(&mut kept, None, item("plain", 30, 0), Origin::Owner), OLDER);
    let Some(Entry::Dictionary(items)) = kept.get(seconds(15), &DhtId::of_key(b"key")) else { panic!() };
    assert_eq!(items.len(), 1, "y has expired, x has not");
    assert_eq!(put(&mut kept, None, item("plain", 31, 0), Origin::Owner), Verdict::Accepted);
    assert_eq!(kept.get(seconds(30), &DhtId::of_key(b"key")), Some(&Entry::Regular(item("plain", 31, 0))));
}

#[test]
fn copies_do_not_prolong_a_life_but_the_owner_does() {
    let mut kept = storage(10_000, 10_000);
    let copied = Origin::Holder(seconds(3));
    assert_eq!(put(&mut kept, None, item("a", 20, 0), Origin::Owner), Verdict::Accepted);
    assert_eq!(put(&mut kept, None, item("a", 23, 0), copied), Verdict::Same);
    assert_eq!(put(&mut kept, None, item("a", 21, 0), Origin::Owner), Verdict::Accepted);
}

#[test]
fn a_signed_version_wins_over_expiry_and_cannot_be_repeated() {
    let mut kept = storage(10_000, 10_000);
    assert_eq!(put(&mut kept, Some("me"), item("a", 60, 7), Origin::Owner), Verdict::Accepted);
    assert_eq!(put(&mut kept, Some("me"), item("b", 30, 8), Origin::Owner), Verdict::Accepted);
    let replayed = put(&mut kept, Some("me"), item("a", 90, 7), Origin::Owner);
    assert_eq!(replayed, Verdict::Older { version: 8 });
    assert_eq!(put(&mut kept, Some("me"), item("b", 90, 8), Origin::Owner), Verdict::Same);
    let now = kept.get(seconds(29), &DhtId::of_key(b"key")).unwrap();
    assert_eq!(now.expires(), seconds(30));
}

#[test]
fn memory_is_bounded_per_source_and_in_total_and_far_keys_go_first() {
    let mut kept = storage(3000, 1000);
    let mut verdicts = Vec::new();
    for index in 0..100u8 {
        let name = Bytes::from(vec![index]);
        let write = Write {
            source: Some(peer(index / 8)),
            name: name.clone(),
            subkey: None,
            item: item(&"v".repeat(50), 100, 0),
            origin: Origin::Owner,
        };
        verdicts.push(kept.store(seconds(1), DhtId::of_key(&name), write));
        assert!(kept.bytes() <= 3000);
    }
    // 179 bytes each: five per source, the rest of its eight is refused.
    assert!(verdicts[..8].iter().filter(|verdict| **verdict == Verdict::Full).count() == 3);
    let mut all: Vec<DhtId> = (0..100u8)
        .zip(&verdicts)
        .filter(|(_, verdict)| **verdict == Verdict::Accepted)
        .map(|(index, _)| DhtId::of_key(&[index]))
        .collect();
    all.sort();
    let held: Vec<DhtId> = kept.iter().map(|(id, ..)| *id).collect();
    assert_eq!(held, all[..held.len()], "what is left is what lies nearest to our own id, which is zero");
    kept.expire(seconds(100));
    assert_eq!((kept.len(), kept.bytes()), (0, 0));
}

#[test]
fn records_are_bounded_per_source_and_in_total_however_small_they_are() {
    let limits = StorageLimits {
        total_bytes_max: 1 << 20,
        source_bytes_max: 1 << 20,
        entry_bytes_max: 4000,
        total_records_max: 20,
        source_records_max: 5,
    };
    let mut kept = Storage::new(DhtId::ZERO, limits);
    let write = |index: u8, expires: u64| Write {
        source: Some(peer(index / 8)),
        name: Bytes::from(vec![index]),
        subkey: None,
        item: item("", expires, 0),
        origin: Origin::Owner,
    };
    let mut verdicts = Vec::new();
    for index in 0..80u8 {
        verdicts.push(kept.store(seconds(1), DhtId::of_key(&[index]), write(index, 100)));
        assert!(kept.len() <= 20);
    }
    assert_eq!(verdicts[..5], [Verdict::Accepted; 5]);
    assert_eq!(verdicts[5..8], [Verdict::Full; 3]);
    let held: Vec<DhtId> = kept.iter().map(|(id, ..)| *id).collect();
    assert_eq!(held.len(), 20);
    for index in (0..80u8).filter(|index| held.contains(&DhtId::of_key(&[*index]))) {
        let again = kept.store(seconds(2), DhtId::of_key(&[index]), write(index, 200));
        assert_eq!(again, Verdict::Accepted, "what is here may be renewed while everything is full");
    }
    assert_eq!(kept.iter().map(|(id, ..)| *id).collect::<Vec<_>>(), held);
}

fn contact(id: [u8; 2]) -> Contact {
    let mut bytes = [0; 20];
    bytes[..2].copy_from_slice(&id);
    Contact { id: DhtId::from_bytes(bytes), peer: peer(id[1]), addresses: Arc::new([]) }
}

#[test]
fn a_full_far_bucket_keeps_its_old_members_and_remembers_replacements() {
    // With a modulo of 1 only the buckets that hold our own id (zero) split.
    let mut table = RoutingTable::new(DhtId::ZERO, 2, 1);
    for low in 1..=2 {
        assert_eq!(table.insert(contact([0x80, low]), seconds(u64::from(low))), Insert::Added);
    }
    let full = table.insert(contact([0x80, 3]), seconds(3));
    assert_eq!(full, Insert::Full { oldest: (contact([0x80, 1]), seconds(1)) });
    assert_eq!(table.insert(contact([0x00, 9]), seconds(4)), Insert::Added, "our own half has room");
    assert!(table.remove(&contact([0x80, 1]).id));
    assert!(table.contains(&contact([0x80, 3]).id), "the replacement took the place");
    assert_eq!(table.insert(contact([0x00, 0]), seconds(5)), Insert::Own);
    assert_eq!(table.len(), 3);
}

#[test]
fn nearest_agrees_with_sorting_everybody() {
    let mut table = RoutingTable::new(DhtId::of_key(b"own"), 20, 5);
    for index in 0..=255u8 {
        let peer = peer(index);
        let contact = Contact { id: DhtId::of_peer(peer), peer, addresses: Arc::new([]) };
        table.insert(contact, seconds(u64::from(index)));
    }
    let target = DhtId::of_key(b"target");
    let mut all: Vec<DhtId> = table.contacts().map(|contact| contact.id).collect();
    all.sort_by_key(|id| id.distance(&target));
    let nearest: Vec<DhtId> = table.nearest(&target, 7, None).iter().map(|contact| contact.id).collect();
    assert_eq!(nearest, all[..7]);
}
