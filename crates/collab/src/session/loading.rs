//! How a peer that is behind comes to what the others have: round by round where somebody still has those that it missed,
//! else by their state.

use super::{Inner, Loaded};
use crate::progress::Winner;
use crate::{Channel, Event, Lineage, Offered};
use potluck_net::{Outcome, PeerFault};
use std::time::Duration;
use tokio::time::Instant;

/// First pause between two attempts to load the state; doubles up to `LOAD_PAUSE_MAX`.
const LOAD_PAUSE_MIN: Duration = Duration::from_millis(200);
const LOAD_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why a state did not come.
struct NotLoaded {
    reason: String,
    offered: Offered,
}

impl Inner {
    /// Get what others have; with `by_rounds` the next round that this peer missed rather than the state.
    pub(super) async fn load_state(&self, by_rounds: bool, limit: Duration) -> Outcome<Loaded> {
        self.accept();
        let begun = self.env.now();
        let deadline = begun + limit;
        let mut faults = Vec::new();
        let mut pause = LOAD_PAUSE_MIN;
        loop {
            let winner = {
                let mut core = self.core();
                self.look(&mut core);
                core.winner(self.env.now())
            };
            let Some(winner) = winner else {
                return Outcome { value: Loaded::Nothing, faults };
            };
            let ours = self.core().lineage;
            if self.config.auxiliary {
                self.core().adopt_lineage(winner.lineage, self.env.now());
                self.drop_started();
                return Outcome { value: Loaded::Nothing, faults };
            }
            if by_rounds
                && let Some(value) = self.make_up(&winner.lineage, begun, deadline, &mut faults).await
            {
                return Outcome { value, faults };
            }
            let failed = match self.load_whole(&winner, ours, begun, deadline, &mut faults).await {
                Ok(value) => return Outcome { value, faults },
                Err(failed) => failed,
            };
            if self.core().not_loaded(self.env.now(), &winner, failed.offered) {
                let (why, whose) = (failed.reason, winner.peer.short());
                self.emit(Event::StateFailed {
                    reason: format!(
                        "{why}; peer {whose} says that it is there, and is not asked again for a while"
                    ),
                });
                continue;
            }
            if self.env.now() + pause >= deadline {
                self.emit(Event::StateFailed {
                    reason: format!("{}; it is tried again at the next step", failed.reason),
                });
                return Outcome { value: Loaded::Nothing, faults };
            }
            // The winner may only be about to offer its state; try again when news come, or after a growing pause.
            let _news_or_pause = tokio::time::timeout(pause, self.dialect.changed()).await;
            pause = (pause * 2).min(LOAD_PAUSE_MAX);
        }
    }

    /// The next round that this peer missed, if it can be had.
    async fn make_up(
        &self,
        winner: &Lineage,
        begun: Instant,
        deadline: Instant,
        faults: &mut Vec<PeerFault>,
    ) -> Option<Loaded> {
        let ours = {
            let core = self.core();
            core.may_make_up(winner).then_some(core.lineage)?
        };
        let left = deadline.saturating_duration_since(self.env.now());
        let outcome = self.dialect.missed(ours.hash, winner.hash, left).await?;
        faults.extend(outcome.faults);
        let channel = outcome.value.channel;
        let made_up = self.core().make_up(outcome.value, self.env.now());
        match made_up {
            Ok(vector) => {
                self.drop_started();
                let seconds = self.env.now().duration_since(begun).as_secs_f64();
                self.emit(Event::MadeUp { epoch: ours.epoch, channel, seconds });
                Some(match channel {
                    Channel::Gradients => Loaded::Gradients(vector),
                    Channel::State => Loaded::Parameters(vector),
                })
            }
            Err(reason) => {
                tracing::warn!(target: "potluck", "{reason}: loading a state instead");
                None
            }
        }
    }

    /// The state of the winner.
    async fn load_whole(
        &self,
        winner: &Winner,
        ours: Lineage,
        begun: Instant,
        deadline: Instant,
        faults: &mut Vec<PeerFault>,
    ) -> Result<Loaded, NotLoaded> {
        let left = deadline.saturating_duration_since(self.env.now());
        let outcome = match self.dialect.download(winner.lineage.hash, winner.lineage.epoch, left).await {
            Ok(outcome) => outcome,
            Err(failed) => {
                let (reason, offered) = (failed.to_string(), failed.offered);
                faults.extend(failed.faults);
                return Err(NotLoaded { reason, offered });
            }
        };
        faults.extend(outcome.faults);
        let mut snapshot = outcome.value;
        let adopted = self.core().adopt(&mut snapshot, winner.peer, self.env.now());
        let lost = adopted.map_err(|reason| NotLoaded { reason, offered: Offered::Part(1.0) })?;
        self.drop_started();
        if lost {
            let theirs = self.core().lineage;
            self.emit(Event::LineageLost { ours, theirs, peer: winner.peer });
        }
        let seconds = self.env.now().duration_since(begun).as_secs_f64();
        self.emit(Event::StateLoaded { from_epoch: ours.epoch, to_epoch: snapshot.epoch, seconds });
        Ok(Loaded::State(snapshot))
    }
}
