//! Sans-I/O. What is kept under one key, and which of two writes wins.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::time::Duration;

/// A point on the time line of whoever owns the storage, counted from an origin of its choice.
///
/// The native driver counts from its own start (so that no wall clock decides anything); hivemind's dialect counts
/// from 1970. Nanoseconds keep every Unix time that a float64 can express apart.
pub type Moment = Duration;

/// One value with its expiry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The value as it travels (with its signature, if it has one).
    pub value: Bytes,
    /// From this moment on the item does not exist.
    pub expires: Moment,
    /// The owner's counter for signed items, 0 for all others. The higher one wins before expiry is looked at.
    pub version: u64,
}

/// Everything under one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// A single value.
    Regular(Item),
    /// Values by subkey.
    Dictionary(BTreeMap<Bytes, Item>),
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is kept.
    Accepted,
    /// The very same item is here already.
    Same,
    /// Something newer is here; for signed items, with this version.
    Older {
        /// The version that won.
        version: u64,
    },
    /// It has expired before it arrived.
    Expired,
    /// There is no room for it.
    Full,
    /// A validator refuses it.
    Invalid,
}

impl Verdict {
    /// Whether the item is here now.
    pub fn is_held(self) -> bool {
        matches!(self, Self::Accepted | Self::Same)
    }
}

/// How a write came here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From its owner: an equal value with a later expiry prolongs its life.
    Owner,
    /// From another holder. Its clock of the remaining time lags by the way here, so an equal value whose expiry is
    /// later by less than this much is the same item: otherwise copies would keep each other alive.
    Holder(Duration),
}

impl Item {
    /// The verdict on `self` when `old` is here.
    fn against(&self, old: &Self, origin: Origin) -> Verdict {
        if self.version != old.version {
            return if self.version > old.version {
                Verdict::Accepted
            } else {
                Verdict::Older { version: old.version }
            };
        }
        let same_value = self.value == old.value;
        // A signature is made once; whoever sends it again must not prolong its life.
        if same_value && self.version != 0 {
            return Verdict::Same;
        }
        let slack = match origin {
            Origin::Holder(slack) if same_value => slack,
            _ => Duration::ZERO,
        };
        if self.expires > old.expires.saturating_add(slack) {
            Verdict::Accepted
        } else if same_value {
            Verdict::Same
        } else {
            Verdict::Older { version: old.version }
        }
    }
}

impl Entry {
    /// An entry that holds one item.
    pub fn new(subkey: Option<Bytes>, item: Item) -> Self {
        match subkey {
            None => Self::Regular(item),
            Some(subkey) => Self::Dictionary(BTreeMap::from([(subkey, item)])),
        }
    }

    /// The latest expiry of anything in here.
    pub fn expires(&self) -> Moment {
        match self {
            Self::Regular(item) => item.expires,
            Self::Dictionary(items) => items.values().map(|item| item.expires).max().unwrap_or_default(),
        }
    }

    /// What [`Entry::put`] would say.
    pub fn judge(&self, subkey: Option<&Bytes>, item: &Item, origin: Origin) -> Verdict {
        let old = match (self, subkey) {
            (Self::Regular(old), None) => return item.against(old, origin),
            (Self::Dictionary(items), Some(subkey)) => match items.get(subkey) {
                Some(old) => return item.against(old, origin),
                None => return Verdict::Accepted,
            },
            // A key changes between the two kinds only for a later expiry, as in hivemind.
            (Self::Regular(old), Some(_)) => old.expires,
            (Self::Dictionary(_), None) => self.expires(),
        };
        if item.expires > old { Verdict::Accepted } else { Verdict::Older { version: 0 } }
    }

    /// Merge one write: later expiry wins, strictly; dictionaries merge by subkey; a later regular value replaces a
    /// whole dictionary and the other way round.
    pub fn put(&mut self, subkey: Option<Bytes>, item: Item, origin: Origin) -> Verdict {
        let verdict = self.judge(subkey.as_ref(), &item, origin);
        if verdict == Verdict::Accepted {
            match (self, subkey) {
                (Self::Dictionary(items), Some(subkey)) => {
                    items.insert(subkey, item);
                }
                (entry, subkey) => *entry = Self::new(subkey, item),
            }
        }
        verdict
    }

    /// Merge another holder's view of the same key.
    pub fn merge(&mut self, other: Self, slack: Duration) {
        for (subkey, item) in other.into_items() {
            self.put(subkey, item, Origin::Holder(slack));
        }
    }

    /// The items one by one.
    pub fn into_items(self) -> Vec<(Option<Bytes>, Item)> {
        match self {
            Self::Regular(item) => vec![(None, item)],
            Self::Dictionary(items) => items.into_iter().map(|(subkey, item)| (Some(subkey), item)).collect(),
        }
    }

    /// Drop what has expired; `None` if nothing is left.
    #[must_use]
    pub fn live(mut self, now: Moment) -> Option<Self> {
        match &mut self {
            Self::Regular(item) => (item.expires > now).then_some(self),
            Self::Dictionary(items) => {
                items.retain(|_, item| item.expires > now);
                (!items.is_empty()).then_some(self)
            }
        }
    }
}
