//! How a newcomer gets the training state: a snapshot pinned to one epoch, cut into chunks, each known by its blake3
//! hash, fetched from several donors at once, resumed after any of them is lost. Whoever downloads serves what it already
//! has, so that many joiners feed one another. Donors copy nothing and wait for nobody: they serve slices of a buffer.
//!
//! [`Exchange::publish`] offers a snapshot; [`Exchange::download`] fetches the newest one of at least some epoch.
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

pub use exchange::{DownloadError, Exchange};
pub use snapshot::Snapshot;
pub use wire::{BLOBS_MAX, CHUNK_BYTES, STATE_BYTES_MAX};
