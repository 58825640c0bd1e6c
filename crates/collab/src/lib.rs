//! One peer's part in a run: how far the epoch is, when to average, what to do with the average, whose state to load.
//!
//! The training program drives and nothing here calls it back:
//!
//! ```ignore
//! let session = Session::join(transport, env, config).await?;
//! session.publish(snapshot());
//! loop {
//!     match session.step(samples) {
//!         Step::Accumulate => samples = forward_and_backward(),
//!         Step::Average => {
//!             let averaged = session.average_gradients(mean_gradients, samples_so_far as f64).await;
//!             if averaged.value.missed { continue; } // the others have applied it already: `LoadState` follows
//!             optimizer_step(averaged.value.vector);
//!             session.epoch_done(Some(snapshot()));
//!         }
//!         Step::AverageState => {
//!             set_parameters(session.average_state(parameters()).await.value.vector);
//!             session.publish(snapshot()); // local updates and DiLoCo: session.epoch_done(Some(snapshot()))
//!         }
//!         Step::Apply => apply(session.take_started()),
//!         Step::LoadState => match session.load_state().await.value {
//!             Loaded::State(state) => restore(state),
//!             Loaded::Gradients(average) => {
//!                 optimizer_step(average);
//!                 session.epoch_done(Some(snapshot()));
//!             }
//!             Loaded::Parameters(average) => {
//!                 set_parameters(average);
//!                 session.publish(snapshot()); // local updates and DiLoCo: session.epoch_done(Some(snapshot()))
//!             }
//!             Loaded::Nothing => {}
//!         }
//!     }
//! }
//! ```
//!
//! Decisions are sans-I/O (`core`, `progress`, `lineage`, `past`, `policy/`, `sketch`); [`Session`] moves them. The protocol
//! underneath is a [`Dialect`]: potluck's own, or hivemind's.

mod config;
mod core;
mod dialect;
mod events;
mod factors;
#[doc(hidden)]
pub mod fuzz;
mod gone;
mod invite;
mod keeper;
mod lineage;
mod manifest;
mod memory;
mod native;
mod nearing;
mod past;
mod policy;
mod progress;
mod session;
mod sight;
mod sketch;
mod speed;
mod status;
mod wire;

pub use config::{ConfigError, JoinError, PolicyKind, PowerSgd, SessionConfig, StateEvery};
pub use dialect::{
    Channel, Dialect, DownloadFailed, MissedRound, Offered, PeerView, Rates, Record, Report, RoundCall,
    RoundFailed, RoundResult, RoundStats, Sequel, Snapshot, Terms, Traffic,
};
pub use events::Event;
pub use invite::{Invite, InviteError};
pub use keeper::{Keeper, KeeperConfig};
pub use lineage::Lineage;
pub use manifest::{differences, manifest, manifest_hash};
pub use memory::{Held, Ledger, Purpose};
pub use policy::Step;
pub use potluck_averaging::{Directory, PROTOCOL_VERSION};
pub use potluck_compression::{Policy, Scheme, TensorInfo, TensorRole};
pub use session::{Averaged, Loaded, Session, Started};
pub use sight::Sight;
pub use speed::{Speed, serve_speed};
pub use status::{LeftPeer, PeerStatus, RoundStatus, Status};
