//! What a session shows of itself: the status, from which every surface takes its numbers.

use super::Core;
use crate::memory::{Purpose, bytes_of};
use crate::status::{PeerStatus, Status};
use crate::wire::Note;
use crate::{Rates, progress};

impl Core {
    /// Bytes of memory by purpose: what is held here beside the snapshots.
    pub(crate) fn memory(&self) -> [(Purpose, u64); 4] {
        let bytes = |values: Option<&Vec<f32>>| values.map_or(0, |values| bytes_of(values));
        let agreed = bytes(self.agreed.as_ref()) + bytes(self.agreed_next.as_ref());
        let velocity = bytes(self.outer.as_ref().map(|outer| &outer.velocity));
        let (owed, factors) = self.factors.as_ref().map_or((0, 0), |factors| factors.bytes());
        [
            (Purpose::Agreed, agreed),
            (Purpose::Velocity, velocity),
            (Purpose::ErrorFeedback, owed),
            (Purpose::Factors, factors),
        ]
    }

    /// The session has ended: nothing that is large outlives it.
    pub(crate) fn let_go(&mut self) {
        (self.agreed, self.agreed_next, self.outer) = (None, None, None);
        if let Some(factors) = self.factors.take() {
            factors.let_go();
        }
    }

    pub(crate) fn status(&self) -> Status {
        let views = self.views();
        let swarm = progress::sum(self.lineage.epoch, &self.own, &views);
        let share = |samples: u64| samples as f32 / swarm.samples.max(1) as f32;
        let me = PeerStatus {
            peer: self.me,
            is_me: true,
            epoch: self.lineage.epoch,
            samples: self.own.samples,
            samples_per_second: self.own.samples_per_second,
            path: None,
            rates: Rates::default(),
            share: share(self.own.samples),
            contributed: self.contributed,
            auxiliary: self.config.auxiliary,
            client: self.config.client_mode,
            loss: self.loss,
        };
        let others = views.iter().map(|view| {
            let note = Note::decode(&view.note);
            let counted = if view.epoch == self.lineage.epoch { view.samples } else { 0 };
            PeerStatus {
                peer: view.peer,
                is_me: false,
                epoch: view.epoch,
                samples: view.samples,
                samples_per_second: view.samples_per_second,
                path: view.path,
                rates: view.rates,
                share: share(counted),
                contributed: self
                    .gone
                    .earlier(&view.peer)
                    .saturating_add(note.as_ref().map_or(0, |note| note.contributed)),
                auxiliary: view.auxiliary,
                client: view.client,
                loss: note.and_then(|note| note.loss),
            }
        });
        Status {
            run_id: self.config.run_id.clone(),
            peer: self.me.to_string(),
            epoch: self.lineage.epoch,
            samples: swarm.samples,
            target_batch_size: self.config.target_batch_size,
            samples_per_second: swarm.samples_per_second,
            eta_seconds: progress::eta_seconds(&swarm, self.config.target_batch_size),
            peers: std::iter::once(me).chain(others).collect(),
            left: self.gone.left(|peer| self.peers.contains_key(peer)),
            alone: views.iter().all(|view| view.auxiliary),
            last_round: self.last_round.clone(),
            rounds: self.rounds,
            rounds_failed: self.rounds_failed,
            rounds_unchanged: self.rounds_unchanged,
            faults: self.faults.clone(),
            lineage: Some(self.lineage),
            compression_ratio: match self.bytes_encoded {
                0 => 1.0,
                encoded => self.bytes_plain as f32 / encoded as f32,
            },
            loss: self.loss,
            ..Status::default()
        }
    }
}
