//! Expiring records with subkeys on a Kademlia table: how potluck peers find each other.

mod config;
mod dht;
pub mod dictionary;
mod entry;
mod id;
mod lookup;
pub mod msgpack;
mod node;
mod rate;
mod record;
pub mod rendezvous;
mod search;
mod server;
mod signed;
mod storage;
mod table;
mod upkeep;
pub mod wire;

pub use config::{DhtConfig, KEY_BYTES_MAX, LIFETIME_MAX, StartError, VALUE_BYTES_MAX};
pub use dht::Dht;
pub use entry::{Entry, Item, Moment, Origin, Verdict};
pub use id::{DhtId, ID_BYTES};
pub use lookup::Lookup;
pub use node::Stats;
pub use rate::RateLimiter;
pub use record::{Expiration, Record, RecordValidator, Validators};
pub use search::{Found, StoreProblem, StoreReport};
pub use signed::{Ed25519Validator, owner_tag};
pub use storage::{Storage, StorageLimits, Write};
pub use table::{Contact, Insert, RoutingTable};
