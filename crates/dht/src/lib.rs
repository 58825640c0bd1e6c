//! Expiring records with subkeys on a Kademlia table: how potluck peers find each other.
//!
//! A record is a value under a key, or under a subkey of a key, that lives for a given time on the nodes whose ids are
//! nearest to the key. [`Dht`] is a node: it joins in the background, answers others, stores and gets. [`rendezvous`] is
//! what most callers want: who takes part in a run.
//!
//! ```
//! use potluck_dht::{Dht, DhtConfig, Found, rendezvous};
//! use potluck_net::Transport;
//! use potluck_net_sim::{PeerSpec, run};
//! use std::time::Duration;
//!
//! run(1, async |net| {
//!     let (one, two) = (net.add_peer(PeerSpec::default()), net.add_peer(PeerSpec::default()));
//!     let alice = Dht::start(one.clone(), net.env(one.local_peer()), DhtConfig::default()).await?;
//!     let config = DhtConfig { initial_peers: vec![one.local_peer()], ..DhtConfig::default() };
//!     let bob = Dht::start(two.clone(), net.env(two.local_peer()), config).await?;
//!     tokio::time::sleep(Duration::from_secs(1)).await;
//!
//!     let stored = bob.store(b"colour", None, "blue".into(), Duration::from_secs(60)).await;
//!     assert_eq!(stored.value.accepted, 2);
//!     let found = alice.get(b"colour", true).await.value;
//!     assert!(matches!(found, Some(Found::Regular(value, _)) if value == "blue"));
//!
//!     let _ = rendezvous::announce(&bob, b"my run", b"").await;
//!     assert_eq!(rendezvous::lookup(&alice, b"my run").await.value[0].peer, two.local_peer());
//!     Ok::<_, potluck_dht::StartError>(())
//! })?;
//! # Ok::<(), potluck_dht::StartError>(())
//! ```
//!
//! # How the code is organised
//!
//! Decisions are sans-I/O and keep hivemind's rules, so that a second wire can stand on them: [`DhtId`],
//! [`RoutingTable`], [`Lookup`], [`Storage`] with [`Entry`], [`RecordValidator`] with [`Ed25519Validator`],
//! [`RateLimiter`]; [`msgpack`] and [`dictionary`] are hivemind's encodings. [`wire`] holds the native messages. The
//! driver is `node` (state and one question to one peer), `server` (answers), `search` (store and get) and `upkeep`
//! (join, meet newcomers, hand records on, keep the table fresh).
//!
//! # Rules
//!
//! * The later expiry wins, strictly; dictionaries merge by subkey; there is no delete.
//! * A key or subkey that contains [`owner_tag`] can be written by that peer only, and its later store wins.
//! * Messages carry durations, never clock times. A copy that is handed on lives longer by the time of its way.
//! * A node enters a table only by answering a question. Clients are in no table and store nothing.
//! * A refusal costs a node neither its place in a table nor the next question; nor does a single broken stream.
//! * Its owner may leave: holders keep a record on the nodes nearest to its key until it expires.
//!
//! What it does not do: a signed record can be repeated by anyone once its owner's newer ones have expired, because no
//! clock is compared; treat an announcement as a hint and open a stream. Records without an owner tag can be
//! overwritten by anyone. Node ids follow from peer ids, which cost nothing to make, so a determined attacker can
//! surround a key.
//!
//! # Parameters
//!
//! | parameter | default | from |
//! |---|---|---|
//! | nodes per bucket, beam of a search, contacts per answer | 20 | hivemind |
//! | replicas | 5 | hivemind |
//! | depth modulo of bucket splits | 5 | hivemind |
//! | rpc timeout | 3 s | hivemind |
//! | open questions per search | 4, stalled ones (750 ms) not counted | hivemind's 4 workers |
//! | blacklist | 5 s, doubling up to 64-fold | hivemind |
//! | republish | every 30 s by the nearest holder, n times less often by the n-th | 10 % crashes a minute |
//! | table refresh | every 120 s; one silent node (60 s) is pinged every 6 to 9 s | |
//! | key and subkey, value, life | 512 B, 64 KiB, 24 h | |
//! | under one key, per storing peer, in total | 1 MiB, 16 MiB, 64 MiB | |
//! | records per storing peer, in total | 8,192, 32,768 | |
//! | records in one store; subkeys in one answer | 256; 8,192 | |
//! | requests per peer | 50 a second, 500 at once; 16 records of a store count as one | |
//! | questions that one node has open at another; streams of one peer that are read at a time | 16; 32 of 256 | |
//! | one search | ends after 30 s; a beam is heard of each answer, and nobody who invents nodes | |
//! | handing records on | one round at a time, at half the rate that a receiver allows | |

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
