//! How a newcomer gets the training state: a snapshot pinned to one epoch, cut into chunks, each known by its blake3
//! hash, fetched from several donors at once, resumed after any of them is lost. Whoever downloads serves what it already
//! has, so that many joiners feed one another. Donors copy nothing and wait for nobody: they serve slices of a buffer.
//!
//! [`Exchange::publish`] offers a snapshot; [`Exchange::download`] fetches the newest one of at least some epoch. Whoever is
//! only a little behind needs no state: [`Exchange::remember`] keeps what led from one history to the next, the last one
//! always, and more of them for as long as somebody downloads; [`Exchange::download_next`] fetches it.
//!
//! What is trusted: nobody. The list of hashes comes from the donors; where they disagree about the same epoch, the
//! list that most of them give wins, and a donor whose chunk does not match is named and not asked again.

mod download;
mod exchange;
#[doc(hidden)]
pub mod fuzz;
mod snapshot;
mod store;
mod wire;
mod work;

pub use exchange::{DownloadError, Exchange, HeldBytes};
pub use snapshot::{Sequel, Snapshot};
pub use wire::{BLOBS_MAX, CHUNK_BYTES, STATE_BYTES_MAX};
