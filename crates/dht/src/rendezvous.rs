//! Who takes part in a run: short-lived, signed announcements under the run's key.
//!
//! An announcement proves that its peer was there at some time within the last lifetime or that somebody repeated what
//! it said then; whether it is there now is for the caller to find out by opening a stream.

use crate::{Dht, Found, StoreReport, owner_tag};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use potluck_net::{FaultKind, Outcome, PeerFault, PeerId};
use std::time::Duration;

/// How long an announcement lives. Announce again after a third of it.
pub const ANNOUNCEMENT_LIFETIME: Duration = Duration::from_secs(90);
/// Addresses of one announcement.
const ADDRESSES_MAX: usize = 16;
/// Longest address.
const ADDRESS_BYTES_MAX: usize = 255;
/// Longest caller's data in one announcement.
pub const PAYLOAD_BYTES_MAX: usize = 4096;

/// One peer of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Announcement {
    /// Who, proven by its signature.
    pub peer: PeerId,
    /// Where it says it can be reached.
    pub addresses: Vec<String>,
    /// What it says about itself, in the caller's own format.
    pub payload: Bytes,
    /// How long this will be believed without news.
    pub left: Duration,
}

/// Say that this peer takes part in the run. With an empty key's worth of time left the old one simply expires;
/// [`withdraw`] is the quicker way to leave.
pub async fn announce(dht: &Dht, run_key: &[u8], payload: &[u8]) -> Outcome<StoreReport> {
    let record = encode(&dht.transport().addresses(), payload);
    let subkey = owner_tag(dht.local_peer());
    dht.store(&key(run_key), Some(subkey.as_bytes()), record, ANNOUNCEMENT_LIFETIME).await
}

/// Say that this peer has left the run: an empty announcement in place of the old one.
pub async fn withdraw(dht: &Dht, run_key: &[u8]) -> Outcome<StoreReport> {
    let subkey = owner_tag(dht.local_peer());
    dht.store(&key(run_key), Some(subkey.as_bytes()), Bytes::new(), ANNOUNCEMENT_LIFETIME).await
}

/// Everybody who takes part in the run, this peer included, in the order of their peer ids. The transport learns the
/// addresses. Announcements that are not validly signed or not readable are left out.
pub async fn lookup(dht: &Dht, run_key: &[u8]) -> Outcome<Vec<Announcement>> {
    let Outcome { value: found, mut faults } = dht.get(&key(run_key), true).await;
    let mut peers = Vec::new();
    if let Some(Found::Dictionary(items)) = found {
        for (subkey, (record, left)) in items {
            let Some(peer) = owner(&subkey) else { continue };
            if record.is_empty() {
                continue;
            }
            let Some((addresses, payload)) = decode(record) else {
                faults.push(PeerFault::new(peer, FaultKind::Malformed, "its announcement is not readable"));
                continue;
            };
            dht.transport().add_addresses(peer, &addresses);
            peers.push(Announcement { peer, addresses, payload, left });
        }
    }
    peers.sort_by_key(|announcement| announcement.peer);
    Outcome { value: peers, faults }
}

fn key(run_key: &[u8]) -> Vec<u8> {
    [b"potluck/run/1/", run_key].concat()
}

/// The peer whose tag the subkey is; with anything around it, it is not an announcement.
fn owner(subkey: &[u8]) -> Option<PeerId> {
    let name = subkey.strip_prefix(b"[owner:")?.strip_suffix(b"]")?;
    std::str::from_utf8(name).ok()?.parse().ok()
}

/// `count:u8 (len:u8 address)* payload`.
fn encode(addresses: &[String], payload: &[u8]) -> Bytes {
    let fit: Vec<&String> =
        addresses.iter().filter(|address| address.len() <= ADDRESS_BYTES_MAX).take(ADDRESSES_MAX).collect();
    let mut out = BytesMut::new();
    out.put_u8(u8::try_from(fit.len()).unwrap_or(0));
    for address in fit {
        out.put_u8(u8::try_from(address.len()).unwrap_or(0));
        out.put_slice(address.as_bytes());
    }
    out.put_slice(payload);
    out.freeze()
}

/// Decode an announcement's addresses and payload; `None` if it breaks a rule.
pub fn decode(mut record: Bytes) -> Option<(Vec<String>, Bytes)> {
    let count = usize::from(record.try_get_u8().ok()?);
    if count > ADDRESSES_MAX {
        return None;
    }
    let mut addresses = Vec::new();
    for _ in 0..count {
        let len = usize::from(record.try_get_u8().ok()?);
        if len > record.len() {
            return None;
        }
        addresses.push(std::str::from_utf8(&record.split_to(len)).ok()?.to_owned());
    }
    (record.len() <= PAYLOAD_BYTES_MAX).then_some((addresses, record))
}
